"""What is said of one family of models: how it is recognised, its blocks, its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from vistvis.errors import LayoutError
from vistvis.models.places import Place, nowhere
from vistvis.tokens import TokenLayout


class Scene(NamedTuple):
    """The pictures of a pass: how many a sequence holds, and `(H, W)`, which all share."""

    frames: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Inputs:
    """What the model was called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def argument(self, name: str, place: int | None = None) -> Any:
        """One argument by its name, or by its place among the positional ones; else None."""
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[place] if place is not None and place < len(self.args) else None

    def pictures(self) -> Tensor | None:
        """The first tensor of pictures, `(n, C, H, W)` or `(B, S, C, H, W)`; with C = 3 before
        others of so many dimensions (intrinsics, latents)."""
        values = (*self.args, *self.kwargs.values())
        found = [x for x in values if isinstance(x, Tensor) and x.ndim in (4, 5)]
        return next((x for x in found if x.shape[-3] == 3), found[0] if found else None)

    def views(self) -> list[Any]:
        """Pictures given one by one: dicts with `img`, or tensors, in lists or as arguments."""
        found: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            several = value if isinstance(value, (list, tuple)) else [value]
            if several and all(_picture(view) is not None for view in several):
                found += several
        return found

    def scene(self) -> Scene | None:
        """The frames of a multi-view model; None if there are none, or sizes differ."""
        pictures = self.pictures()
        if pictures is not None:
            if pictures.shape[-3] != 3:
                raise LayoutError(
                    f"images are (S, 3, H, W) or (B, S, 3, H, W), got shape {tuple(pictures.shape)}"
                )
            return Scene(pictures.shape[-4], _size(pictures))
        return self.scene_of_views()

    def scene_of_views(self) -> Scene | None:
        """The same, where every view is an argument or an item of a list."""
        views = self.views()
        sizes = {_size(picture) for view in views if (picture := _picture(view)) is not None}
        return Scene(len(views), sizes.pop()) if len(sizes) == 1 else None


def _picture(view: Any) -> Tensor | None:
    picture = view.get("img") if isinstance(view, Mapping) else view
    return picture if isinstance(picture, Tensor) and picture.ndim in (3, 4) else None


def _size(picture: Tensor) -> tuple[int, int]:
    return int(picture.shape[-2]), int(picture.shape[-1])


@dataclass(frozen=True)
class Role:
    """What a family says of a block: its kind and number, and where its tokens lie.

    None leaves kind or number to the words in the site's name.
    """

    kind: str | None = None
    block: int | None = None
    place: Place = nowhere


Blocks = Iterator[tuple[str, Role]]


@dataclass(frozen=True)
class Family:
    """A family of models.

    `knows` recognises a module by its attributes, never by its class; the module may lie inside a
    larger model. `blocks` gives the dotted names, inside that module, of blocks and submodules with
    their roles, in the order in which they run. `layout` says how tokens are laid out for what the
    whole model was called with; None where that can't be told.
    """

    name: str
    knows: Callable[[Any], bool]
    blocks: Callable[[Any], Blocks]
    layout: Callable[[Any, Inputs], TokenLayout | None]


def has(*names: str) -> Callable[[Any], bool]:
    """Whether a module has all these attributes, none of them None."""
    return lambda module: all(getattr(module, name, None) is not None for name in names)


def patch_of(module: Any) -> tuple[int, int] | None:
    """The patch size that a module says, or the module that embeds its patches; None if neither."""
    for owner in (module, getattr(module, "patch_embed", None)):
        size = getattr(owner, "patch_size", None)
        if size is not None:
            return _two(size)
        for conv in (owner, getattr(owner, "proj", None)):
            kernel = getattr(conv, "kernel_size", None)
            if kernel is not None and kernel == getattr(conv, "stride", None):
                return _two(kernel)
    return None


def _two(size: Any) -> tuple[int, int]:
    down, across = size if isinstance(size, (tuple, list)) else (size, size)
    return int(down), int(across)


def grid_of(size: tuple[int, int], patch: Any) -> tuple[int, int]:
    """`(rows, cols)` of patches in a picture `(H, W)`; LayoutError if there is none."""
    (height, width), (down, across) = size, _two(patch)
    rows, cols = height // down, width // across
    if not rows or not cols:
        raise LayoutError(
            f"pictures of {width}×{height} are smaller than one patch of {across}×{down}"
        )
    return rows, cols


def special_tokens(vit: Any) -> tuple[str, ...] | None:
    """Special tokens in front of the patches of a plain ViT; None if they can't be told."""
    kinds = [
        kind
        for name, kind in (("cls_token", "cls"), ("dist_token", "distillation"))
        if getattr(vit, name, None) is not None
    ]
    for name in ("reg_token", "register_tokens", "storage_tokens"):
        registers = getattr(vit, name, None)
        if isinstance(registers, Tensor):
            kinds += ["register"] * int(registers.shape[1])
            break
    prefix = getattr(vit, "num_prefix_tokens", None)
    if prefix is not None and int(prefix) != len(kinds):
        if int(prefix) < len(kinds) and getattr(vit, "no_embed_class", None) is None:
            return None
        kinds = (kinds + ["special"] * int(prefix))[: int(prefix)]
    return tuple(kinds)
