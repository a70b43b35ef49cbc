"""What the runner needs to know of a repository's model."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vistvis.errors import LayoutError

Run = Callable[[nn.Module, Tensor], object]


def pictures(frames: int, rows: int, cols: int, patch: int = 14) -> Callable[[], Tensor]:
    """A maker of noise pictures `(S, 3, rows·patch, cols·patch)` in [0, 1]."""
    return lambda: torch.rand(frames, 3, rows * patch, cols * patch)


def run_pictures(model: nn.Module, images: Tensor) -> object:
    return model(images)


def draw_last_blocks(
    model: nn.Module, images: Tensor, run: Run, *, kinds: tuple[str, ...] = ("frame", "global")
) -> str:
    """Figures of the last frame block and of the last global one."""
    from vggt_adapter import AttentionExtractor, visualize_attention_on_image

    with AttentionExtractor(model) as extractor:
        extractor.register_hooks(attention_types=kinds)
        with torch.no_grad():
            run(model, images)
        maps = extractor.get_attention_maps()
    last = {entry["layer_type"]: entry["attn_weights"] for entry in maps.values()}
    for kind in kinds:
        layout = last[kind].site.key_layout
        if layout is None:
            raise LayoutError(f"{last[kind].site.name} has no layout")
        token = layout.index(frame=layout.frames - 1, row=layout.grid[0] - 1, col=0)
        visualize_attention_on_image(last[kind], images, token)
    return "drawn"


def draw_last_site(model: nn.Module, images: Tensor, run: Run) -> str:
    """The last site whose tokens are known, of a model without frame and global blocks."""
    import vistvis
    from vggt_adapter import visualize_attention_on_image

    with torch.no_grad(), vistvis.capture(model) as captured:
        run(model, images)
    for name in reversed(list(captured)):
        attention = captured[name]
        site = attention.site
        layout = site.key_layout if site else None
        if layout is None or site is None or site.query_layout is None:
            continue
        scenes = images.unflatten(0, (-1, layout.frames))
        height, width = layout.image_size
        if scenes.shape[-2:] != (height, width):  # latents, say
            scenes = scenes.new_zeros(*scenes.shape[:2], 3, height, width)
        token = layout.index(frame=layout.frames - 1, row=layout.grid[0] - 1, col=0)
        visualize_attention_on_image(attention, scenes, token)
        return "drawn"
    raise LayoutError(f"none of {len(captured)} sites has a layout")


def draw_frames(model: nn.Module, images: Tensor, run: Run) -> str:
    return draw_last_blocks(model, images, run, kinds=("frame",))


class Drawing(Protocol):
    def __call__(self, model: nn.Module, images: Tensor, run: Run, /) -> str: ...


@dataclass(frozen=True)
class Model:
    """One model of one repository.

    `build` makes it tiny, with random weights; the checkout's `paths` are on `sys.path` then.
    `patch` is the size of its patches in pixels, and `pictures` are what `run` gives it.
    """

    name: str
    repository: str
    """The checkout's folder; empty for an installed package."""
    build: Callable[[Path], nn.Module]
    pictures: Callable[[], Tensor]
    patch: int = 14
    run: Run = run_pictures
    paths: tuple[str, ...] = (".",)
    package: str = ""
    """The installed package, where there is no checkout."""
    draw: Drawing = draw_last_blocks
    """Draws a figure, or raises; what it returns goes into the table."""
    refused: str = ""
    """Why no figure can be drawn, if that is known; the drawing must then raise."""
    steps: bool = False
    """Pictures come one by one: each run of a site gets the next."""
    raises: str = ""
    """What `capture(model)` says at its end, where it can't read every site."""
    stays: float | None = 0.05
    """What the gates (LayerScale) are set to, so that a token stays itself through all blocks."""
    not_attention: Mapping[str, str] = field(default_factory=dict)
    """Module whose softmax is no attention → why."""
    note: str = ""
    """What the runner had to replace."""


def stub(*names: str, **attributes: Any) -> None:
    """Put empty modules where a repository imports what is not run."""
    for name in names:
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], last, module)


@contextlib.contextmanager
def shrunk(module: str, **defaults: Mapping[str, Any]) -> Iterator[types.ModuleType]:
    """Classes and functions of a module get other arguments than those that it writes itself."""
    home = importlib.import_module(module)
    before = {name: getattr(home, name) for name in defaults}

    def changed(make: Any, given: Mapping[str, Any]) -> Any:
        return lambda *args, **kwargs: make(*args, **{**kwargs, **given})

    for name, given in defaults.items():
        setattr(home, name, changed(before[name], given))
    try:
        yield home
    finally:
        for name, original in before.items():
            setattr(home, name, original)
