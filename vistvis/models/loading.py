"""Models by name, for commands that run one: timm's here, others through entry points.

A front end brings a loader in the entry-point group "vistvis.models":

    load(model: str, *, device: str | None, dtype: str | None, images: list[Photo],
         size: int | None) -> LoadedModel

and is named before a colon, as in `vggt:tiny`; without one the name is timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vistvis.devices import device_of, dtype_of
from vistvis.errors import CheckpointError, InputError
from vistvis.files import PathLike
from vistvis.models.sites import Chooser, SiteList, choose_sites, find_sites
from vistvis.names import nearest
from vistvis.photos.finding import find_photos
from vistvis.photos.geometry import ImageGeometry
from vistvis.photos.photo import Photo, SeenPhoto, model_pixels
from vistvis.photos.reading import read_photos, seen_part, sharp_scale

if TYPE_CHECKING:
    from PIL import Image

GROUP = "vistvis.models"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode and the pictures it is to see."""

    model: nn.Module
    images: Tensor  # what the model takes
    pictures: Tensor  # (B, S, 3, H, W) in [0, 1]: the same before the model's normalisation
    watched: nn.Module  # the part whose sites count; the model itself, usually
    photos: tuple[SeenPhoto, ...] = ()  # B·S: their names, and where their pixels went
    sharp_pixels: NDArray[np.uint8] | None = None  # what `sharp` gives, as bytes
    names: Mapping[str, str] = field(default_factory=dict)  # of sites, as `capture` takes them
    scene: Mapping[str, Any] = field(default_factory=dict)  # points and cameras, as runs take them

    def sites(self, chooser: Chooser = None) -> SiteList:
        """The chosen sites under their names, in the order in which they run."""
        return choose_sites(find_sites(self.watched).named(self.names), chooser)

    def sharp(self) -> NDArray[np.float32] | None:
        """The pictures with more pixels, `(B·S, k·H, k·W, 3)` in [0, 1], for figures.

        None where the model's own are at least 500 wide.
        """
        if self.sharp_pixels is None:
            return None
        return self.sharp_pixels.astype(np.float32) / np.float32(255)

    def to_model(self, batch: int = 0) -> Callable[[int, float, float], tuple[float, float]]:
        """For `TokenQuery.index`: from a frame's pixel in the photo to that in the model's picture.

        InputErrors as of `model_pixels`.
        """
        frames = self.pictures.shape[1]
        return model_pixels(self.photos[batch * frames : (batch + 1) * frames])


def load(
    name: str,
    *,
    images: Sequence[PathLike | Photo],
    device: str | None = None,
    dtype: str | None = None,
    size: int | None = None,
) -> LoadedModel:
    """The model that `name` means, with pictures; `InputError` if one of them is not there.

    `images` are files, folders, globs or videos, as `photos.finding.find_photos` takes them, or
    what it gives.
    """
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
    photos: list[Photo] = []
    for image in images:  # before the model, which may take long
        photos += [image] if isinstance(image, Photo) else find_photos(image)[0]
    loaded: LoadedModel = loaders[loader]()(
        model, device=device, dtype=dtype, images=photos, size=size
    )
    return loaded


def load_timm(
    model: str, *, device: str | None, dtype: str | None, images: Sequence[Photo], size: int | None
) -> LoadedModel:
    """A timm model: `NAME`, `NAME@random` for untrained weights, `NAME@FILE` for a checkpoint."""
    place, number = device_of(device), dtype_of(dtype or "float32")
    made = _timm_model(model, size).to(device=place, dtype=number)
    config = _timm_config(made, size)
    batch, seen, sharp = _timm_pictures(config, images)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return LoadedModel(
        model=made,
        images=batch.to(device=place, dtype=number),
        pictures=(batch * std + mean).clamp(0, 1).unsqueeze(1),
        watched=made,
        photos=seen,
        sharp_pixels=sharp,
    )


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


def _timm_config(model: nn.Module, size: int | None) -> dict[str, Any]:
    import timm.data

    data: Any = timm.data  # without types of its own
    config: dict[str, Any] = data.resolve_model_data_config(model)
    return config if size is None else config | {"input_size": (3, size, size)}


def _timm_pictures(
    config: Mapping[str, Any], photos: Sequence[Photo]
) -> tuple[Tensor, tuple[SeenPhoto, ...], NDArray[np.uint8] | None]:
    """Pictures as the model takes them `(B, 3, H, W)`, what each is, and sharper ones to draw."""
    import timm.data

    data: Any = timm.data
    transform = data.create_transform(**config, is_training=False)
    tensors, seen, sharp = [], [], []
    for photo, picture in zip(photos, read_photos(photos), strict=True):
        tensors.append(transform(picture))
        height, width = tensors[-1].shape[-2:]
        geometry = _timm_geometry(transform, picture, (height, width))
        seen.append(SeenPhoto(photo.name, photo.time, geometry))
        if geometry is not None and (scale := sharp_scale(width)) > 1:
            sharp.append(seen_part(picture, geometry, scale))
    return torch.stack(tensors), tuple(seen), np.stack(sharp) if sharp else None


def _timm_geometry(
    transform: Any, picture: Image.Image, size: tuple[int, int]
) -> ImageGeometry | None:
    """Where a picture's pixels go: it is resized, then its middle cut out, or borders added.

    The size after resizing is what timm's own step gives. None for steps that are not these.
    """
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
    from torchvision.transforms import CenterCrop, Resize

    resize, crop, *rest = transform.transforms
    known = isinstance(resize, (Resize, ResizeKeepRatio)) and isinstance(
        crop, (CenterCrop, CenterCropOrPad)
    )
    if not known or any(isinstance(step, (Resize, ResizeKeepRatio)) for step in rest):
        return None
    width, height = resize(picture).size
    # As torchvision's and timm's `center_crop`: half of the rest is rounded, to even where it ends
    # in a half; of a border, it is rounded down.
    top, left = (
        (new - old) // 2 if old < new else -round((old - new) / 2)
        for old, new in zip((height, width), size, strict=True)
    )
    return ImageGeometry(picture.size[::-1], (height, width), size, (top, left))
