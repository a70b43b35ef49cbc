"""The steps of `vggt_adapter.demo`: model, pictures, token, numbers, files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from vggt_adapter.blocks import find_blocks, watched_part
from vggt_adapter.config import IMAGE_SIZE
from vggt_adapter.extractor import extract_both_attentions
from vggt_adapter.inputs import ATTENTION_TYPES, Query, checked_types
from vggt_adapter.model import VGGT
from vggt_adapter.preprocess import LoadedImages, load_images
from vggt_adapter.sample_scene import sample_views
from vggt_adapter.values import QueryValues, query_values, resolve_token
from vistvis import TokenLayout, TokenPlace
from vistvis.devices import device_of, dtype_of
from vistvis.errors import InputError
from vistvis.files import PathLike, atomic_file
from vistvis.models.sites import find_sites
from vistvis.photos.photo import Photo
from vistvis.progress import run_progress

if TYPE_CHECKING:
    from vistvis.views.figures import NotebookFigure

TINY = "tiny"


@dataclass(frozen=True, eq=False)
class Answer:
    """What one token attends to: numbers by attention type, and what was extracted."""

    values: dict[str, QueryValues]
    result: dict[str, Any]

    def draw(self, **look: Any) -> dict[str, NotebookFigure]:
        """The figures; `look` are keywords of `vggt_adapter.figures.draw_values`."""
        from vggt_adapter.figures import draw_values

        return {kind: draw_values(values, **look) for kind, values in self.values.items()}

    def write(
        self,
        figures: dict[str, NotebookFigure],
        folder: PathLike,
        *,
        formats: Sequence[str] = ("png",),
    ) -> list[Path]:
        """The figures, and their numbers as an NPZ file, which numpy reads without pickle.

        That is `values.npz`, or `values_block_<b>_head_<h>_token_<t>.npz` where the folder has one
        of another query or of other pictures. It holds `frame_attention_maps` `(rows, cols)`,
        `global_attention_maps` `(S, rows, cols)`, both also `…_resized`, `images` `(S, H, W, 3)` as
        uint8, and `metadata`, a JSON text by attention type. Each file is whole or not there.
        Returns the paths.
        """
        written, arrays, stem = [], {}, ""
        for kind, values in self.values.items():
            numbers = values.as_dict()
            block, token = self.result["block_idx"], values.query.token
            stem = f"block_{block}_head_{values.head}_token_{token}"
            written += figures[kind].save_as(Path(folder) / f"{kind}_{stem}", formats)
            for part in ("attention_maps", "attention_maps_resized"):
                arrays[f"{kind}_{part}"] = numbers[part]
            arrays["images"] = (values.images * 255).round().astype(np.uint8)
        metadata = {kind: values.metadata for kind, values in self.values.items()}
        arrays["metadata"] = np.array(json.dumps(metadata))
        target = Path(folder) / "values.npz"
        if target.exists() and not _is_of(target, arrays):
            target = target.with_name(f"values_{stem}.npz")
        with atomic_file(target, sync=False) as file:
            np.savez_compressed(file, **arrays)
        return [*written, target]


def _is_of(file: Path, arrays: Mapping[str, Any]) -> bool:
    """Whether a file of numbers is of the same query and pictures."""
    try:
        with np.load(file) as there:
            return all(np.array_equal(there[name], arrays[name]) for name in ("metadata", "images"))
    except (OSError, ValueError, KeyError, BadZipFile):
        return False


def load_model(
    model: PathLike | nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """The model that is meant, on its device, in eval mode; as in `demo_visualize_token_attention`.

    InputError for a device this machine does not have or an unknown dtype, CheckpointError if the
    weights can't be had, or don't fit.
    """
    to_dtype = None if dtype is None else dtype_of(dtype)
    if isinstance(model, nn.Module):  # stays where it is, unless a device is named
        to_device = None if device is None else device_of(device)
        return model.to(device=to_device, dtype=to_dtype).eval()
    to_device = device_of(device)
    if model == TINY:
        return VGGT.tiny(device=to_device, dtype=to_dtype).eval()
    return VGGT.from_pretrained(os.fspath(model), device=to_device, dtype=to_dtype).eval()


def suggested(model: nn.Module, name: str, otherwise: Any) -> Any:
    """What a model's description suggests to look at ("size", "block", "head")."""
    return getattr(model, "default", {}).get(name, otherwise)


def load_pictures(
    paths: Sequence[PathLike | Photo] | None,
    model: nn.Module,
    *,
    size: int | None = None,
    mode: str = "crop",
) -> LoadedImages:
    """Photographs as the model takes them; None: the sample views."""
    chosen = sample_views() if paths is None else list(paths)
    patch_size = patch_size_of(model)
    if size is None:
        config = getattr(model, "config", None)
        default = getattr(config, "img_size", IMAGE_SIZE // patch_size * patch_size)
        size = int(suggested(model, "size", default))
    return load_images(chosen, mode=mode, size=size, patch_size=patch_size)


def patch_size_of(model: nn.Module) -> int:
    """The side of a model's patches in pixels; InputError where they are not square."""
    # Of any pictures that are large enough: a model's patches have one size.
    (patch_size, across) = TokenLayout.from_model(model, torch.empty(1, 1, 3, 512, 512)).patch_size
    if across != patch_size:
        raise InputError(f"patches are square here, this model's are {patch_size}×{across}")
    return int(patch_size)


def layout_of(model: nn.Module, loaded: LoadedImages) -> TokenLayout:
    """Where the tokens of these pictures lie."""
    return TokenLayout.from_model(model, loaded.images.unsqueeze(0))


def choose_token(
    model: nn.Module,
    loaded: LoadedImages,
    token_idx: SupportsIndex | None = None,
    *,
    allow_special: bool = False,
) -> tuple[TokenPlace, int]:
    """The query token: an absolute index, or None for the middle of frame 0.

    Before the forward pass, so that a slip costs no waiting. Returns its place, and the index that
    was asked for.
    """
    layout = layout_of(model, loaded)
    asked = layout.center() if token_idx is None else int(token_idx)
    return resolve_token(layout, asked, allow_special=allow_special), asked


def ask(
    model: nn.Module,
    loaded: LoadedImages,
    place: TokenPlace,
    query: Query,
    *,
    block_idx: SupportsIndex,
    attention_types: Sequence[str] | str = ATTENTION_TYPES,
) -> Answer:
    """Run the model once and compute what the token at `place` attends to.

    `query` says how to look at it; its `token_idx` is what was asked for, before it was moved.
    """
    kinds = checked_types(attention_types)
    # With a batch dimension, which some relatives insist on.
    images = loaded.images.unsqueeze(0).to(next(model.parameters()))
    with blocks_progress(model):
        result = extract_both_attentions(model, images, block_idx=int(block_idx))
    values = {}
    for kind in kinds:
        token = place.token_in_frame if kind == "frame" else place.token
        # What the token is has been settled.
        settled = replace(
            query, token_idx=token, frame_idx=place.frame, attention_type=kind, allow_special=True
        )
        answered = query_values(result[f"{kind}_attention"]["attn_weights"], loaded.images, settled)
        values[kind] = replace(answered, requested=int(query.token_idx))
    return Answer(values, result)


@contextmanager
def blocks_progress(model: nn.Module) -> Iterator[None]:
    """A `run_progress` over what has attention up to the last block."""
    part = watched_part(model)
    # What has attention up to the last block: encoders come first, heads that may not run after.
    names = find_sites(part).names
    last = max(names.index(block.path) for block in find_blocks(part))
    with run_progress(part, names[: last + 1], unit="block"):
        yield
