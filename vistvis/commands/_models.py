"""Models by name, for commands that run one: timm's here, others through entry points.

A front end brings a loader in the entry-point group "vistvis.models":

    load(model: str, *, device: str | None, dtype: str | None, images: list[Path],
         size: int | None) -> LoadedModel

and is named before a colon, as in `vggt:tiny`; without one the name is timm's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.errors import CheckpointError, InputError

GROUP = "vistvis.models"

Sink = Callable[[str, Attention], None]


class LoadedModel(Protocol):
    """A model in eval mode and the pictures it is to see."""

    model: nn.Module
    images: Tensor  # what the model takes
    pictures: Tensor  # (B, S, 3, H, W) in [0, 1]: the same before the model's normalisation

    def names(self, sites: Sequence[str] | None) -> list[str]:
        """What the chosen sites are called, in the order in which they run."""

    def capture(self, sites: Sequence[str] | None, sink: Sink) -> AbstractContextManager[Any]:
        """Hand every chosen site to `sink` under its name while the model runs."""


def load(
    name: str,
    *,
    images: Sequence[str | Path],
    device: str | None = None,
    dtype: str | None = None,
    size: int | None = None,
) -> LoadedModel:
    """The model that `name` means, with pictures.

    Raises
    ------
    InputError
        If no loader, model or picture of that name is there.
    """
    loader, colon, model = name.partition(":")
    loaders = {entry.name: entry.load for entry in metadata.entry_points(group=GROUP)}
    loaders["timm"] = lambda: TimmModel
    if not colon:
        loader, model = "timm", name
    if loader not in loaders or not model:
        raise InputError(
            f"no model {name!r}: a model is a timm name, or one of a front end as "
            f"{', '.join(f'{known}:NAME' for known in sorted(loaders))}"
        )
    files = [Path(file) for file in images]
    for file in files:
        if not file.is_file():
            raise InputError(f"no picture {file}")
    found: LoadedModel = loaders[loader]()(
        model, device=device, dtype=dtype, images=files, size=size
    )
    return found


class TimmModel:
    """A timm model: `NAME`, `NAME@random` for untrained weights, `NAME@FILE` for a checkpoint."""

    def __init__(
        self,
        model: str,
        *,
        device: str | None,
        dtype: str | None,
        images: Sequence[Path],
        size: int | None,
    ) -> None:
        import timm
        import timm.data
        import torch
        from PIL import Image, UnidentifiedImageError

        name, _, weights = model.partition("@")
        if not timm.is_model(name.split(".")[0]):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has all"
            raise InputError(f"timm has no model {name!r}: {hint}")
        known: dict[str, Any] = {"pretrained": not weights}
        if weights and weights != "random":
            if not Path(weights).is_file():
                raise InputError(f"no checkpoint {weights}")
            # As timm loads its own: position embeddings are resampled where the size differs.
            known = {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
        if size is not None:
            known["img_size"] = size
        try:
            with torch.random.fork_rng():  # untrained weights are the same every time
                torch.manual_seed(0)
                self.model = timm.create_model(name, **known).eval()
        except TypeError as error:
            raise InputError(f"{name} can't be made for size {size}: {error}") from error
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"the weights of {name} can't be had: {error}") from error
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = getattr(torch, dtype or "float32")
        self.model.to(device=place, dtype=kind)
        data: Any = timm.data  # without types of its own
        config = data.resolve_model_data_config(self.model)
        if size is not None:
            config["input_size"] = (3, size, size)
        transform = data.create_transform(**config, is_training=False)
        tensors = []
        for file in images:
            try:
                with Image.open(file) as picture:
                    tensors.append(transform(picture.convert("RGB")))
            except (UnidentifiedImageError, OSError) as error:
                raise InputError(f"{file} can't be read as a picture: {error}") from error
        batch = torch.stack(tensors)
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        self.pictures = (batch * std + mean).clamp(0, 1).unsqueeze(1)
        self.images = batch.to(device=place, dtype=kind)

    def names(self, sites: Sequence[str] | None) -> list[str]:
        from vistvis.models.sites import choose_sites, find_sites

        return choose_sites(find_sites(self.model), None if sites is None else list(sites)).names

    def capture(self, sites: Sequence[str] | None, sink: Sink) -> AbstractContextManager[Any]:
        from vistvis.hooks.capture import capture

        return capture(self.model, None if sites is None else list(sites), sink=sink)
