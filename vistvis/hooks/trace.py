"""The dye test: which token of a site is which patch of which picture, by measurement.

For every bit of the frame, row and column numbers, the patches whose number has that bit are
replaced by noise, and once those that have it not. A token answers more to the one or to the other,
which is its bit. Nothing is assumed of the model but that a token still remembers where it came
from, so this works at early sites, before attention has mixed them. Bits of a random number that
each patch gets beside its place are read in the same way, and must be those of the place that was
read: a token of no patch, or a bit read wrongly, does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vistvis.attention import SiteInfo
from vistvis.errors import CaptureError, InputError, VistvisError
from vistvis.hooks.dye import (
    Code,
    Dye,
    Run,
    TracedTokens,
    check_repeats,
    inputs_of,
    patch_size_of,
    pictures_of,
    with_pictures,
)
from vistvis.hooks.fits import Fit, fit_of, order_of
from vistvis.models.sites import Chooser, SiteList, choose_sites, find_sites, table
from vistvis.progress import progress as bar
from vistvis.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class TracedSite:
    """What the dye test says of one site's tokens, `(B, N)` at its input."""

    name: str
    tokens: TracedTokens
    grid: tuple[int, int]
    patch_size: tuple[int, int]
    frames: int
    """Pictures of one scene, S."""

    @cached_property
    def fits(self) -> list[Fit] | None:
        """The order of each batch item, or None where one is not told."""
        fits = [
            fit_of(picture, patch, self.grid[0] * self.grid[1])
            for picture, patch in zip(self.tokens.picture, self.tokens.patch, strict=True)
        ]
        known = [fit for fit in fits if fit is not None]
        shapes = {(fit[:4], len(fit.pictures)) for fit in known}
        return known if len(known) == len(fits) and len(shapes) == 1 else None

    @property
    def layout(self) -> TokenLayout | None:
        """The layout that the tokens show, numbered as the pictures came in; None if unknown.

        Special tokens are places where no patch is; their kinds are not known.
        """
        if self.fits is None:
            return None
        fit = self.fits[0]
        kinds = {
            name: ("special",) * count
            for name, count in zip(("before", "special", "behind", "after"), fit[:4], strict=True)
        }
        return TokenLayout(len(fit.pictures), self.grid, patch_size=self.patch_size, **kinds)

    def describe(self, site: SiteInfo, shape: Sequence[int]) -> SiteInfo:
        """The site's description with the layout and order that were measured.

        `shape` is that of its attention; nothing is said where it has other tokens.
        """
        plain = _nowhere(site)
        layout, fits = self.layout, self.fits
        batch, count = self.tokens.patch.shape
        if layout is None or fits is None or (shape[0], *shape[2:]) != (batch, count, count):
            return plain
        pictures = torch.stack([fit.pictures for fit in fits])
        single = layout.frames == 1 and self.frames > 1
        if single:
            firsts = torch.arange(batch)[:, None] // self.frames * self.frames
        else:
            firsts = torch.arange(batch)[:, None] * layout.frames
        frames = pictures - firsts
        size = self.frames if single else layout.frames
        if bool((frames < 0).any() or (frames >= size).any()):
            return plain  # scenes are mixed in the batch
        order = order_of(layout, fits, torch.zeros_like(frames) if single else frames)
        turned = frames.view(-1, self.frames) if single else None
        if turned is not None and torch.equal(turned, torch.arange(size).expand_as(turned)):
            turned = None
        return replace(
            plain,
            query_layout=layout,
            key_layout=layout,
            query_order=order,
            key_order=order,
            frames_in_batch=single,
            frame_order=turned,
        )

    @property
    def row(self) -> tuple[str, ...]:
        known = self.tokens.patch >= 0
        sure = float(self.tokens.confidence[known].median()) if bool(known.any()) else 0.0
        batch, count = known.shape
        share = int(known.sum()), int(known.numel())
        if self.fits is None:
            what = "unknown"
        else:
            fit = self.fits[0]
            moved = any(
                not torch.equal(seen, torch.sort(seen).values)
                for one in self.fits
                for seen in (one.pictures, one.patches)
            )
            what = f"{len(fit.pictures)} × {self.grid[0]}×{self.grid[1]} patches"
            special = [f"{n} {name}" for name, n in zip(_PLACES, fit[:4], strict=True) if n]
            what += f", special: {', '.join(special)}" if special else ""
            what += ", REORDERED" if moved else ", in order"
        return self.name, f"{batch} × {count}", f"{share[0]} of {share[1]}", f"{sure:.2f}", what


def _nowhere(site: SiteInfo) -> SiteInfo:
    """The description without anything that says where tokens lie."""
    return replace(
        site,
        query_layout=None,
        key_layout=None,
        query_order=None,
        key_order=None,
        frames_in_batch=False,
        frame_order=None,
        first_frame=0,
    )


_PLACES = ("before all", "before each", "behind each", "after all")


class Trace(Mapping[str, TracedSite]):
    """What the dye test found, by name of the site, in the order in which they run."""

    def __init__(self, sites: Mapping[str, TracedSite], forwards: int) -> None:
        self._sites, self.forwards = dict(sites), forwards

    def __getitem__(self, name: str) -> TracedSite:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def describe(self, site: SiteInfo, shape: Sequence[int]) -> SiteInfo:
        """A site's description with what was measured of its tokens, as `TracedSite.describe`."""
        found = self._sites.get(site.name)
        return _nowhere(site) if found is None else found.describe(site, shape)

    @property
    def layout(self) -> TokenLayout | None:
        """The first layout with the most frames, for `capture(layout=…)`; None if none is known."""
        layouts = [site.layout for site in self._sites.values()]
        return max((one for one in layouts if one), key=lambda one: one.frames, default=None)

    def __str__(self) -> str:
        head = ("site", "tokens", "patches known", "confidence", "order")
        return table([head, *(site.row for site in self._sites.values())])

    __repr__ = __str__


def trace_layout(
    model: nn.Module,
    images: Tensor,
    *,
    sites: Chooser = None,
    run: Run | None = None,
    patch_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Trace:
    """Find out which token of each site is which patch of which picture, by measurement.

    Parameters
    ----------
    model
        Any `nn.Module`, in `eval` mode; it runs under `no_grad` and is not changed.
    images
        `(S, 3, H, W)`, `(B, 3, H, W)` or `(B, S, 3, H, W)`: pictures, the more varied the better.
    sites
        As in `capture`; None: all that are found.
    run
        How to run the model on images like these: `lambda images: model([{"img": i[None]} for i in
        images])`, say. Default: `model(images)`.
    patch_size
        In pixels. Default: that of the model's patch embedding.
    seed
        Of the noise.
    progress
        A bar; None: where somebody watches a terminal.

    Returns
    -------
    A mapping from site to what its tokens are; it prints as a table. A token whose patch was not
    told with confidence is −1, and a site has a `layout` only where its known tokens, half of the
    patches at least, all show one: «unknown», never a guess. At late sites, where attention has
    mixed the tokens, that is usual. `.layout` is what to hand to `capture(layout=…)`.

    InputError if the patch size is not known or the pictures have no whole patch; CaptureError if
    the model gives other numbers when it runs again (dropout: call `eval()`).

    Cost: 2 + 2·(5 + ⌈log₂ S⌉ + ⌈log₂ rows⌉ + ⌈log₂ cols⌉) forwards, and memory for the input of
    every site, N·C numbers each.
    """
    chosen = choose_sites(find_sites(model), sites)
    return _traced(model, images, chosen, run or model, patch_size, seed, progress)


def trace_pass(
    model: nn.Module, sites: SiteList, forward: Run, args: Any, kwargs: Any
) -> Trace | str:
    """The dye test on the pictures among the arguments of one pass, `forward(*args, **kwargs)`.

    They are one tensor, or several of one shape `(B, 3, H, W)`, a view each. A text says why
    nothing was found: the user's forward goes on.
    """
    try:
        return _of_pass(model, sites, forward, args, kwargs)
    except VistvisError as error:
        return str(error)


def _of_pass(model: nn.Module, sites: SiteList, forward: Run, args: Any, kwargs: Any) -> Trace:
    pictures = list(pictures_of((args, kwargs)))
    single = len(pictures) == 1
    if not pictures or (not single and len({one.shape for one in pictures}) > 1):
        raise InputError(
            'layout="trace" needs pictures of one shape among the inputs, (…, 3, H, W) each; found '
            f"{[tuple(one.shape) for one in pictures]}; use trace_layout(model, images, run=…)"
        )

    def run(images: Tensor) -> Any:
        stained = iter([images] if single else images.unbind(1))
        new_args, new_kwargs = with_pictures((args, kwargs), stained)
        return forward(*new_args, **new_kwargs)

    images = pictures[0] if single else torch.stack(pictures, 1)
    return _traced(model, images, sites, run, None, 0, None)


def _traced(
    model: nn.Module,
    images: Tensor,
    chosen: SiteList,
    run: Run,
    patch_size: int | tuple[int, int] | None,
    seed: int,
    progress: bool | None,
) -> Trace:
    shape = tuple(images.shape)
    if images.ndim not in (4, 5) or shape[-3] != 3 or not images.is_floating_point():
        raise InputError(f"images are floating (S, 3, H, W) or (B, S, 3, H, W), got {shape}")
    size = patch_size_of(model) if patch_size is None else patch_size
    height, width = size if isinstance(size, tuple) else (size, size)
    grid = shape[-2] // height, shape[-1] // width
    if 0 in grid:
        raise InputError(f"pictures of {shape[-1]}×{shape[-2]} have no patch of {width}×{height}")
    dye = Dye(images.detach(), grid, (height, width), seed)
    inputs = partial(inputs_of, chosen, run)
    base = inputs(dye.images)
    check_repeats(base, inputs(dye.images))
    if not base:
        raise CaptureError(f"none of the {len(chosen)} sites ran, or none got tokens (B, N, C)")
    codes = {name: Code(tokens) for name, tokens in base.items()}
    for bit in bar(range(len(dye.bits)), "dye test", shown=progress, unit="bit"):
        with_bit, without = map(inputs, dye.stained(bit))
        for name, code in codes.items():
            code.add(with_bit.get(name), without.get(name))
    tokens = {name: dye.read(code) for name, code in codes.items()}
    together = any(
        len(set(one[one >= 0].tolist())) > 1 for each in tokens.values() for one in each.picture
    )
    frames = shape[1] if len(shape) == 5 else shape[0] if together else 1
    found = {
        name: TracedSite(name, each, grid, (height, width), frames) for name, each in tokens.items()
    }
    return Trace(found, 2 + 2 * len(dye.bits))
