"""Models by name, for commands that run one: timm's here, others through entry points.

A front end brings a loader in the entry-point group "vistvis.models":

    load(model: str, *, device: str | None, dtype: str | None, images: list[Path],
         size: int | None) -> LoadedModel

and is named before a colon, as in `vggt:tiny`; without one the name is timm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistvis.devices import device_of, dtype_of
from vistvis.errors import CheckpointError, InputError
from vistvis.files import checked_path
from vistvis.images import open_photo
from vistvis.models.sites import Chooser, SiteList, choose_sites, find_sites
from vistvis.names import nearest

GROUP = "vistvis.models"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode and the pictures it is to see."""

    model: nn.Module
    images: Tensor  # what the model takes
    pictures: Tensor  # (B, S, 3, H, W) in [0, 1]: the same before the model's normalisation
    watched: nn.Module  # the part whose sites count; the model itself, usually
    names: Mapping[str, str] = field(default_factory=dict)  # as `capture` takes them

    def sites(self, chooser: Chooser = None) -> SiteList:
        """The chosen sites under their names, in the order in which they run."""
        return choose_sites(find_sites(self.watched).named(self.names), chooser)


def load(
    name: str,
    *,
    images: Sequence[str | Path],
    device: str | None = None,
    dtype: str | None = None,
    size: int | None = None,
) -> LoadedModel:
    """The model that `name` means, with pictures; `InputError` if one of them is not there."""
    loader, colon, model = name.partition(":")
    loaders = {entry.name: entry.load for entry in metadata.entry_points(group=GROUP)}
    loaders["timm"] = lambda: load_timm
    if not colon:
        loader, model = "timm", name
    if loader not in loaders or not model:
        raise InputError(
            f"no model {name!r}: a model is a timm name, or one of a front end as "
            f"{', '.join(f'{one}:NAME' for one in sorted(loaders))}"
        )
    files = [checked_path(file) for file in images]
    for file in files:  # before the model, which may take long
        with open_photo(file):
            pass
    loaded: LoadedModel = loaders[loader]()(
        model, device=device, dtype=dtype, images=files, size=size
    )
    return loaded


def load_timm(
    model: str, *, device: str | None, dtype: str | None, images: Sequence[Path], size: int | None
) -> LoadedModel:
    """A timm model: `NAME`, `NAME@random` for untrained weights, `NAME@FILE` for a checkpoint."""
    place, number = device_of(device), dtype_of(dtype or "float32")
    made = _timm_model(model, size).to(device=place, dtype=number)
    batch, pictures = _timm_pictures(made, images, size)
    return LoadedModel(made, batch.to(device=place, dtype=number), pictures, watched=made)


def _timm_model(model: str, size: int | None) -> nn.Module:
    import timm

    name, _, weights = model.partition("@")
    if not timm.is_model(name.split(".")[0]):
        near = nearest(name, timm.list_models())
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has all"
        raise InputError(f"timm has no model {name!r}: {hint}")
    options: dict[str, Any] = {"pretrained": not weights}
    if weights and weights != "random":
        if not Path(weights).is_file():
            raise InputError(f"no checkpoint {weights}")
        # As timm loads its own: position embeddings are resampled where the size differs.
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    if size is not None:
        options["img_size"] = size
    try:
        with torch.random.fork_rng():  # untrained weights are the same every time
            torch.manual_seed(0)
            made: nn.Module = timm.create_model(name, **options).eval()
    except TypeError as error:
        raise InputError(f"{name} can't be made for size {size}: {error}") from error
    except Exception as error:  # of a damaged file the reader of each format has errors of its own
        raise CheckpointError(f"the weights of {name} can't be had: {error}") from error
    return made


def _timm_pictures(
    model: nn.Module, files: Sequence[Path], size: int | None
) -> tuple[Tensor, Tensor]:
    """Pictures as the model takes them `(B, 3, H, W)`, and before its normalisation."""
    import timm.data

    data: Any = timm.data  # without types of its own
    config = data.resolve_model_data_config(model)
    if size is not None:
        config["input_size"] = (3, size, size)
    transform = data.create_transform(**config, is_training=False)
    tensors = []
    for file in files:
        with open_photo(file) as picture:
            tensors.append(transform(picture.convert("RGB")))
    batch = torch.stack(tensors)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return batch, (batch * std + mean).clamp(0, 1).unsqueeze(1)
