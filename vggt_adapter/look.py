"""Looking at one token: model and photographs in, numbers and figures out, step by step.

`vggt_adapter.demo` puts these steps together, as a function and as a command.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from vggt_adapter.inputs import ATTENTION_TYPES, PATCH_SIZE, FloatArray, Head
from vistvis.errors import InputError, VistvisWarning

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vggt_adapter.preprocess import LoadedImages
    from vggt_adapter.values import QueryValues
    from vistvis import TokenPlace
    from vistvis.views.figures import NotebookFigure

    Paths: TypeAlias = "Sequence[str | os.PathLike[str]]"

TINY = "tiny"
VGGT_SIZE = 518
# Figures show pictures at least this wide.
_SHARP = 500
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, eq=False)
class Look:
    """One token, looked at: numbers by kind of attention, and what was extracted."""

    values: dict[str, QueryValues]
    result: dict[str, Any]

    def draw(
        self, *, norm: str = "linear", pictures: FloatArray | None = None
    ) -> dict[str, NotebookFigure]:
        """The figures; `pictures` as in `sharp_pictures`."""
        from vggt_adapter.figures import draw_values

        return {
            kind: draw_values(values, norm=norm, pictures=pictures)
            for kind, values in self.values.items()
        }

    def write(
        self, figures: dict[str, NotebookFigure], folder: str | os.PathLike[str]
    ) -> list[Path]:
        """PNGs and `values.npz`; each file is whole or not there. Returns the paths."""
        written = []
        for kind, values in self.values.items():
            block = self.result["block_idx"]
            name = f"{kind}_block_{block}_head_{values.head}_token_{values.query.token}.png"
            written.append(figures[kind].save(Path(folder) / name))
        written.append(write_values(self.values, Path(folder) / "values.npz"))
        return written


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """The model that is meant, on its device, in eval mode.

    Raises
    ------
    InputError
        For a device this machine does not have, or an unknown dtype.
    CheckpointError
        If the weights can't be had, or don't fit.
    """
    import torch
    from torch import nn

    if isinstance(model, nn.Module):
        if device is not None or dtype is not None:
            model = model.to(
                device=None if device is None else _device(device),
                dtype=None if dtype is None else _dtype(dtype),
            )
        return model.eval()
    from vggt_adapter.model import VGGT

    place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = None if dtype is None else _dtype(dtype)
    if model == TINY:
        return VGGT.tiny(device=place, dtype=kind).eval()
    return VGGT.from_pretrained(os.fspath(model), device=place, dtype=kind).eval()


def suggested(model: nn.Module, name: str, otherwise: Any) -> Any:
    """What a model's description suggests to look at ("size", "block", "head")."""
    return getattr(model, "default", {}).get(name, otherwise)


def load_pictures(
    paths: Paths | None, model: nn.Module, *, size: int | None = None, mode: str = "crop"
) -> LoadedImages:
    """Photographs as the model takes them; None: the sample views."""
    from vggt_adapter.preprocess import load_images

    chosen = sample_views() if paths is None else list(paths)
    if size is None:
        usual = getattr(getattr(model, "config", None), "img_size", VGGT_SIZE)
        size = int(suggested(model, "size", usual))
    patch = getattr(getattr(model, "config", None), "patch_size", PATCH_SIZE)
    return load_images(chosen, mode=mode, size=size, patch_size=patch)


def sharp_pictures(loaded: LoadedImages, *, mode: str = "crop") -> FloatArray | None:
    """The same views with more pixels, for figures of a model that takes small pictures.

    Returns
    -------
    `(S, k·H, k·W, 3)` in [0, 1]; None where the model's own pictures are large enough.
    """
    from vggt_adapter.inputs import pictures
    from vggt_adapter.preprocess import load_images

    height, width = loaded.images.shape[-2:]
    size = width if mode == "crop" else max(height, width)
    times = -(-_SHARP // size)
    if times < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VistvisWarning)  # given when they were loaded before
        # Patches of k times the size make the same choices of rounding and cropping.
        large = load_images(
            loaded.paths, mode=mode, size=times * size, patch_size=times * PATCH_SIZE
        )
    if large.images.shape[-2:] != (times * height, times * width):
        return None
    return pictures(large.images)


def sample_views() -> list[Path]:
    """The three views that come with the package."""
    folder = Path(__file__).parent / "samples"
    return sorted(p for p in folder.iterdir() if p.suffix in (".jpg", ".png"))


def choose_token(
    model: nn.Module,
    loaded: LoadedImages,
    token_idx: SupportsIndex | None = None,
    *,
    pixel: tuple[int, float, float] | None = None,
    allow_special: bool = False,
) -> tuple[TokenPlace, int]:
    """The query token: an absolute index, a pixel `(frame, x, y)` of an original photo, or neither
    for the middle of frame 0. Before the forward pass, so that a slip costs no waiting.

    Returns
    -------
    Its place, and the index that was asked for.

    Raises
    ------
    InputError
        If there is no such pixel, or it was cropped away.
    """
    from vggt_adapter.extractor import find_aggregator, token_layout
    from vggt_adapter.values import resolve_token

    layout = token_layout(find_aggregator(model), (loaded.images,), {})
    assert layout is not None
    if pixel is not None:
        frame, x, y = pixel
        if not 0 <= frame < layout.frames:
            raise InputError(f"the pixel is one of frame {frame}: there are 0…{layout.frames - 1}")
        token_idx = loaded.token_at(layout, frame, x, y)
    elif token_idx is None:
        token_idx = layout.center()
    place = resolve_token(layout, token_idx, allow_special=allow_special)
    return place, int(token_idx)


def look(
    model: nn.Module,
    loaded: LoadedImages,
    place: TokenPlace,
    *,
    requested: int,
    block_idx: SupportsIndex,
    head_idx: Head = 0,
    attention_types: Sequence[str] | str = ATTENTION_TYPES,
    renormalize: bool = False,
) -> Look:
    """Run the model once and compute what one token attends to."""
    from vggt_adapter.extractor import extract_both_attentions
    from vggt_adapter.values import query_values

    kinds = [attention_types] if isinstance(attention_types, str) else list(attention_types)
    wrong = [kind for kind in kinds if kind not in ATTENTION_TYPES]
    if wrong or not kinds:
        raise InputError(f"attention types are 'frame' and 'global', got {kinds!r}")
    weight = next(model.parameters())
    images = loaded.images.to(device=weight.device, dtype=weight.dtype)
    with blocks_progress(model):
        result = extract_both_attentions(model, images, block_idx=int(block_idx))
    values = {}
    for kind in (kind for kind in ATTENTION_TYPES if kind in kinds):
        relative = kind == "frame"
        found = query_values(
            result[f"{kind}_attention"]["attn_weights"],
            loaded.images,
            place.token_in_frame if relative else place.token,
            head_idx=head_idx,
            attention_type=kind,
            frame_idx=place.frame if relative else None,
            renormalize=renormalize,
            allow_special=True,  # what the token is has been settled
        )
        values[kind] = replace(found, requested=requested)
    return Look(values, result)


@contextmanager
def blocks_progress(model: nn.Module) -> Iterator[None]:
    """A bar over the blocks while the model runs, if that takes longer than two seconds."""
    from tqdm import tqdm

    from vggt_adapter.extractor import find_aggregator

    aggregator = find_aggregator(model)
    blocks = [
        *getattr(getattr(aggregator, "patch_embed", None), "blocks", ()),
        *aggregator.frame_blocks,  # type: ignore[misc, unused-ignore]
        *aggregator.global_blocks,  # type: ignore[misc, unused-ignore]
    ]
    with tqdm(
        total=len(blocks), desc="running the model", unit="block", delay=2, leave=False
    ) as bar:
        hooks = [block.register_forward_hook(lambda *_: bar.update() and None) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def write_values(values: dict[str, QueryValues], path: str | os.PathLike[str]) -> Path:
    """The numbers of each kind of attention as one `.npz`, which numpy reads without pickle.

    Holds `frame_attention_maps` `(rows, cols)`, `global_attention_maps` `(S, rows, cols)`, both
    also `…_resized`, `images` `(S, H, W, 3)` as uint8, and `metadata`, a JSON text by kind.
    """
    import numpy as np

    from vistvis.files import atomic_file

    arrays: dict[str, Any] = {}
    for kind, found in values.items():
        numbers = found.as_dict()
        arrays[f"{kind}_attention_maps"] = numbers["attention_maps"]
        arrays[f"{kind}_attention_maps_resized"] = numbers["attention_maps_resized"]
        arrays["images"] = (found.images * 255).round().astype(np.uint8)
    metadata = {kind: found.metadata for kind, found in values.items()}
    arrays["metadata"] = np.array(json.dumps(metadata))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target, sync=False) as file:
        np.savez_compressed(file, **arrays)
    return target


def _device(device: str | torch.device) -> torch.device:
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"no device {device!r}: cpu, cuda, cuda:0, mps, …") from error
    if place.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= count:
            seen = f"has {count} CUDA devices" if count else "has no CUDA device"
            raise InputError(f"device {device!r} was asked for, and this machine {seen}; use cpu")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {device!r} was asked for, and this machine has none; use cpu")
    return place


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found
