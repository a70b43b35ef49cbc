"""Pictures as callers hold them, as the tensors and arrays that are stored and drawn."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from vistvis.errors import InputError, StoreError
from vistvis.files import PathLike, regular_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    Values: TypeAlias = "NDArray[Any] | Tensor"

# What cameras and pages give; Pillow knows many more, some of which are programs (EPS, PDF).
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")

# How their files begin, and those of HEIC, which only pillow-heif reads.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF8")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Resampling overshoots, so that a picture in 0…1 may reach a little beyond; one in 0…255 whose
# largest value is this small would be black.
_LARGEST_UNIT = 2.0
_BELOW_ZERO = -0.5
_LARGEST_BYTE = 320.0


def extra(module: str, name: str, what: str) -> Any:
    """A module of the optional dependencies `name`; InputError that says how it is had.

    `what` begins the message: "x.heic: HEIC".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} needs one more package: pip install 'vistvis[{name}]'") from error


@contextlib.contextmanager
def open_photo(path: PathLike) -> Iterator[Image.Image]:
    """A photo as Pillow opens it, without its pixels yet; a file of `PHOTO_FORMATS`, or HEIC.

    HEIC needs the extra `heic`, and comes upright and decoded. InputError if there is no such file,
    it is of another format, or has more pixels than Pillow takes (`PIL.Image.MAX_IMAGE_PIXELS`,
    twice); also for what goes wrong in the block, where the pixels are decoded.
    """
    from PIL import Image, UnidentifiedImageError

    file = repr(str(path))
    try:
        with regular_file(path) as stream:
            start = stream.read(12)
            stream.seek(0)
            if is_heic(start):
                heif = extra("pillow_heif", "heic", f"{file}: HEIC")
                yield heif.open_heif(stream).to_pillow()
                return
            with Image.open(stream, formats=PHOTO_FORMATS) as picture:
                yield picture
    except (MemoryError, InputError):
        raise
    except StoreError as error:
        raise InputError(f"no picture: {error}") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{file} has more pixels than are taken for a photo ({error}); make it smaller, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        if start.startswith(_BEGINNINGS):
            reason = "it begins as one and is damaged or cut short; save it again"
        elif start:
            reason = f"it is no {', '.join(PHOTO_FORMATS)} or HEIC; save it as one of these"
        else:
            reason = "it is empty"
        raise InputError(f"{file} can't be read as a picture: {reason}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, zlib.error, …
        raise InputError(
            f"{file} can't be read as a picture ({type(error).__name__}: {error}); it may be "
            "damaged or cut short: open it in a viewer, or save it again"
        ) from error


def is_heic(start: bytes) -> bool:
    """Whether a file that starts so is HEIC or HEIF."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def to_rgb(images: Values) -> NDArray[np.uint8]:
    """Pictures as a model's input holds them, as uint8 RGB: `(..., C, H, W)` → `(..., H, W, 3)`.

    Parameters
    ----------
    images
        uint8, or floating in 0…1 or in 0…255 (told apart by the largest value of all pictures
        given, a little overshoot of resampling included); one channel or three.

    Raises
    ------
    InputError
        For other shapes and dtypes, NaN, or values that no such picture has (an input normalised
        by mean and standard deviation).
    """
    array = _array(images)
    if array.dtype != np.uint8:
        array = np.rint(255 * _unit(array, "[0, 1] or [0, 255]", _LARGEST_BYTE)).astype(np.uint8)
    return np.ascontiguousarray(_channels_last(array))


def thumbnail_tags(images: Values, *, count: int = 8, height: int = 64) -> str:
    """The first pictures of `(..., C, H, W)`, as `to_rgb` takes them, small, as HTML that needs no
    file: `data:` URLs of some KB each."""
    from PIL import Image

    array = _array(images)
    tags = []
    for picture in to_rgb(array.reshape(-1, *array.shape[-3:])[:count]):
        small, buffer = Image.fromarray(picture), io.BytesIO()
        width = max(1, round(height * small.width / small.height))
        small.resize((width, height)).save(buffer, "JPEG", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        style = 'style="display: inline; margin: 2px"'
        tags.append(f'<img src="data:image/jpeg;base64,{data}" {style}>')
    return "".join(tags)


def to_unit(images: Values) -> NDArray[np.float32]:
    """The same as float32 in 0…1, without rounding; floating pictures have to lie there already.

    No copy where values and dtype are right as they are.
    """
    return _channels_last(_unit(_array(images), "[0, 1]", _LARGEST_UNIT))


def _array(images: Values) -> NDArray[Any]:
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
        images = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = np.asarray(images)
    if array.ndim < 3 or array.shape[-3] not in (1, 3):
        raise InputError(
            f"pictures are (..., C, H, W) with 1 or 3 channels, got shape {array.shape}"
        )
    return array


def _unit(array: NDArray[Any], usual: str, largest: float) -> NDArray[np.float32]:
    if array.dtype.kind not in "fiu":
        raise InputError(f"pictures are uint8 or floating, got {array.dtype}")
    values: NDArray[np.float32] = array.astype(np.float32, copy=False)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    whole = array.dtype.kind != "f"
    if not (low >= _BELOW_ZERO and high <= (_LARGEST_BYTE if whole else largest)):
        raise InputError(
            f"floating pictures lie in {usual}, got values from {low:g} to {high:g}; divide by "
            "255, or where they were normalised for the model, undo mean and standard deviation"
        )
    if whole or high > _LARGEST_UNIT:
        values, high = values / np.float32(255), high / 255
    return values if low >= 0 and high <= 1 else np.clip(values, 0, 1)


def _channels_last(array: NDArray[Any]) -> NDArray[Any]:
    if array.shape[-3] == 3:
        return rearrange(array, "... c h w -> ... h w c")
    return repeat(array, "... 1 h w -> ... h w rgb", rgb=3)


def image_tensor(images: Any) -> Tensor:
    """Pictures as one tensor, as they are: dtype, range and shape are kept.

    Raises
    ------
    InputError
        If they are not `(S, C, H, W)`, `(B, S, C, H, W)`, or a list of equal pictures.
    """
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim != 3:
        tensor = torch.as_tensor(images)
    else:
        pictures = [images] if isinstance(images, (Tensor, np.ndarray)) else images
        tensors = [p if isinstance(p, Tensor) else torch.as_tensor(np.array(p)) for p in pictures]
        if not tensors or len({one.shape for one in tensors}) > 1:
            shapes = [tuple(one.shape) for one in tensors]
            raise InputError(f"a list of pictures has at least one, all of one shape, got {shapes}")
        tensor = torch.stack(tensors)
        if tensor.ndim == 4 and tensor.shape[-1] in (1, 3) and tensor.shape[1] not in (1, 3):
            tensor = rearrange(tensor, "s h w c -> s c h w")
    if tensor.ndim not in (4, 5) or tensor.shape[-3] not in (1, 3):
        raise InputError(
            "images are (S, C, H, W) or (B, S, C, H, W) with 1 or 3 channels, or a list of "
            f"pictures (H, W, 3), got {tuple(tensor.shape)}"
        )
    return tensor.detach()
