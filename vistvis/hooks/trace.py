"""The dye test: which token of a site is which patch of which picture, by measurement.

For every bit of the frame, row and column numbers, the patches whose number has that bit are
replaced by noise, and once those that have it not. A token answers more to the one or to the other,
which is its bit. Nothing is assumed of the model but that a token still remembers where it came
from, so this works at early sites, before attention has mixed them. Bits of a random number that
each patch gets beside its place are read in the same way, and must be those of the place that was
read: a token of no patch, or a bit read wrongly, does not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vistvis.attention import SiteInfo, TokenOrder
from vistvis.errors import CaptureError, InputError
from vistvis.models.sites import Chooser, SiteList, choose_sites, find_sites, table
from vistvis.progress import progress as bar
from vistvis.tokens import TokenLayout

Run: TypeAlias = Callable[..., Any]

CONFIDENCE = 0.08
WEAKEST = 0.4
# Chance lets one wrong token in 2⁵ pass; what then claims a patch that another token has, or stands
# outside the order that the rest shows, is seen there.
CHECK_BITS = 5
# Share of the patches that must be known for the rest to follow from the order that they show.
ENOUGH = 0.5


class TracedTokens(NamedTuple):
    """Which patch each token at a site's input is: `(B, N)` each.

    `picture` counts over all pictures that the model got, `patch` is `row · cols + col`; both −1
    for a token that is unknown: special, mixed with others, or of no picture. `confidence` is the
    least |a₁ − a₀| / (a₁ + a₀) over all bits, with a₁ and a₀ the token's answers to noise in the
    patches that have the bit and in those that have it not.
    """

    picture: Tensor
    patch: Tensor
    confidence: Tensor


class _Fit(NamedTuple):
    """Frames in a row that known tokens show: special tokens around them, and what is where."""

    before: int
    front: int
    behind: int
    after: int
    pictures: Tensor  # (S,): the picture of each frame of the sequence
    patches: Tensor  # (P',): the patch at each place among a frame's patches


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
    def fits(self) -> list[_Fit] | None:
        """The order of each batch item, or None where one is not told."""
        fits = [
            _fit(picture, patch, self.grid[0] * self.grid[1])
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
        order = _order(layout, fits, torch.zeros_like(frames) if single else frames)
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


def trace_pass(model: nn.Module, sites: SiteList, forward: Run, args: Any, kwargs: Any) -> Trace:
    """The dye test on the pictures among the arguments of one pass, `forward(*args, **kwargs)`.

    They are one tensor, or several of one shape `(B, 3, H, W)`, a view each.
    """
    pictures = list(_pictures((args, kwargs)))
    single = len(pictures) == 1
    if not pictures or (not single and len({one.shape for one in pictures}) > 1):
        raise InputError(
            'layout="trace" needs pictures of one shape among the inputs, (…, 3, H, W) each; found '
            f"{[tuple(one.shape) for one in pictures]}; use trace_layout(model, images, run=…)"
        )

    def run(images: Tensor) -> Any:
        stained = iter([images] if single else images.unbind(1))
        new_args, new_kwargs = _replaced((args, kwargs), stained)
        return forward(*new_args, **new_kwargs)

    images = pictures[0] if single else torch.stack(pictures, 1)
    return _traced(model, images, sites, run, None, 0, None)


def _is_picture(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim in (4, 5)
        and value.shape[-3] == 3
    )


def _pictures(value: Any) -> Iterator[Tensor]:
    if _is_picture(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _pictures(one)
    elif isinstance(value, dict):
        yield from _pictures(list(value.values()))


def shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all pictures among inputs."""
    return tuple(tuple(one.shape) for one in _pictures(value))


def _replaced(value: Any, pictures: Iterator[Tensor]) -> Any:
    """The same containers with other pictures in them."""
    if _is_picture(value):
        return next(pictures)
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(one, pictures) for one in value)
    if isinstance(value, dict):
        return {key: _replaced(one, pictures) for key, one in value.items()}
    return value


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
    size = _patch_size(model) if patch_size is None else patch_size
    height, width = size if isinstance(size, tuple) else (size, size)
    grid = shape[-2] // height, shape[-1] // width
    if 0 in grid:
        raise InputError(f"pictures of {shape[-1]}×{shape[-2]} have no patch of {width}×{height}")
    dye = _Dye(images.detach(), grid, (height, width), seed)
    inputs = partial(_inputs, chosen, run)
    base = inputs(dye.images)
    _check_repeats(base, inputs(dye.images))
    if not base:
        raise CaptureError(f"none of the {len(chosen)} sites ran, or none got tokens (B, N, C)")
    codes = {name: _Code(tokens) for name, tokens in base.items()}
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


class _Dye:
    """Numbers of patches, bit by bit, and pictures that are noise where a bit is set."""

    def __init__(
        self, images: Tensor, grid: tuple[int, int], patch: tuple[int, int], seed: int
    ) -> None:
        self.images, self._patch = images, patch
        self._random = torch.Generator().manual_seed(seed)
        flat = images.flatten(0, -4)
        self._spread = flat.std((-2, -1), keepdim=True).clamp_min(0.1)  # also where one is flat
        numbers = torch.cartesian_prod(*map(torch.arange, (len(flat), *grid)))
        self._numbers = numbers.view(len(flat), *grid, 3)  # picture, row, col
        self._widths = [max(1, (n - 1).bit_length()) for n in self._numbers.shape[:3]]
        shape = self._numbers.shape[:3]
        self._checks = torch.randint(2**CHECK_BITS, shape, generator=self._random)
        values = [*zip(self._numbers.unbind(-1), self._widths, strict=True)]
        values.append((self._checks, CHECK_BITS))
        self.bits = [value >> bit & 1 == 1 for value, width in values for bit in range(width)]

    def stained(self, number: int) -> tuple[Tensor, Tensor]:
        """The pictures with noise in the patches that have a bit, and with the same noise in those
        that have it not."""
        bit = self.bits[number]
        # A token of two patches always answers most to the same one. Check bits come with noise of
        # another strength in each patch, and it contradicts itself.
        checks = number >= len(self.bits) - CHECK_BITS
        strength = torch.rand(bit.shape, generator=self._random) if checks else torch.zeros(())
        strength = WEAKEST**strength
        flat = self.images.flatten(0, -4)
        noise = torch.randn(flat.shape, generator=self._random).to(flat) * self._spread
        height, width = self._patch
        made = []
        for where in (bit, ~bit):
            weight = repeat(strength * where, "p r c -> p 1 (r h) (c w)", h=height, w=width)
            out = flat.clone()
            out[..., : weight.shape[-2], : weight.shape[-1]] += noise[
                ..., : weight.shape[-2], : weight.shape[-1]
            ] * weight.to(flat)
            made.append(out.view_as(self.images))
        return made[0], made[1]

    def read(self, code: _Code) -> TracedTokens:
        """The places that tokens' bits spell, −1 where they don't pass."""
        bits, at = code.bits, 0
        numbers = []
        for width in (*self._widths, CHECK_BITS):
            places = torch.arange(width)
            numbers.append((bits[..., at : at + width] << places).sum(-1))
            at += width
        picture, row, col, check = numbers
        count, rows, cols = self._numbers.shape[:3]
        known = (picture < count) & (row < rows) & (col < cols) & (code.confidence > CONFIDENCE)
        place = tuple(n.where(known, 0) for n in (picture, row, col))
        known &= self._checks[place] == check
        patch = (row * cols + col).where(known, -1)
        picture = picture.where(known, -1)
        # A patch that two tokens of a sequence claim is known of neither.
        for pictures, patches in zip(picture, patch, strict=True):
            claims = pictures * rows * cols + patches
            _, back, times = torch.unique(claims, return_inverse=True, return_counts=True)
            twice = times[back] > 1
            pictures[twice], patches[twice] = -1, -1
        return TracedTokens(picture, patch, code.confidence)


class _Code:
    """The bits of a site's tokens, read one after the other."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self._bits: list[Tensor] = []
        self.confidence = torch.ones(base.shape[:2])

    def add(self, with_bit: Tensor | None, without: Tensor | None) -> None:
        first, second = self._answer(with_bit), self._answer(without)
        total = (first + second).clamp_min(torch.finfo(torch.float32).tiny)
        self.confidence = torch.minimum(self.confidence, (first - second).abs() / total)
        self._bits.append(first > second)

    @property
    def bits(self) -> Tensor:
        return torch.stack(self._bits, -1).long()

    def _answer(self, tokens: Tensor | None) -> Tensor:
        if tokens is None or tokens.shape != self._base.shape:
            return torch.zeros_like(self.confidence)  # other tokens: nothing can be told
        answer: Tensor = torch.linalg.vector_norm(tokens.float() - self._base.float(), dim=-1)
        return answer.cpu()


def _inputs(sites: SiteList, run: Run, images: Tensor) -> dict[str, Tensor]:
    """Tokens `(B, N, C)` at the input of each site, of its first run."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.ndim <= 4:
                tokens = value[None] if value.ndim == 2 else value
                tokens = rearrange(tokens, "b r c w -> b (r c) w") if value.ndim == 4 else tokens
                seen.setdefault(name, tokens.detach().clone())
                return

    handles = []
    try:
        for site in sites:
            hook = partial(note, site.name)
            handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            run(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _check_repeats(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    for name, tokens in first.items():
        if name not in second or not torch.equal(tokens, second[name]):
            raise CaptureError(
                f"site {name!r} got other numbers when the model ran on the same pictures again, "
                "so answers to noise mean nothing; call model.eval(), and fix what is random"
            )


def _patch_size(model: nn.Module) -> tuple[int, int]:
    """The kernel of the first convolution over pictures whose kernels do not overlap."""
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            continue
        if module.kernel_size == module.stride and module.kernel_size[0] > 1:
            return module.kernel_size[0], module.kernel_size[1]
    raise InputError(
        f"{type(model).__name__} has no convolution that cuts pictures into patches; pass "
        "patch_size="
    )


def _fit(picture: Tensor, patch: Tensor, per_frame: int) -> _Fit | None:
    """Frames in a row that a sequence's known tokens `(N,)` show, or None."""
    known = (patch >= 0).nonzero()[:, 0]
    frames = len(set(picture[known].tolist()))
    extra = len(patch) - frames * per_frame
    if not frames or extra < 0 or len(known) < ENOUGH * frames * per_frame:
        return None
    each = range(extra // frames, -1, -1)
    # In front of each frame is usual, then behind; around all frames only if neither fits.
    tries = sorted(
        (
            (before, front, behind, extra - before - frames * (front + behind))
            for front in each
            for behind in range(extra // frames - front + 1)
            for before in range(extra - frames * (front + behind) + 1)
            if frames > 1 or before == 0
        ),
        key=lambda one: (one[0] + one[3], one[2]),
    )
    for places in tries:
        fit = _fitted(picture, patch, known, places, frames, per_frame)
        if fit is not None:
            return fit
    return None


def _fitted(
    picture: Tensor,
    patch: Tensor,
    known: Tensor,
    places: tuple[int, int, int, int],
    frames: int,
    per_frame: int,
) -> _Fit | None:
    before, front, behind, _ = places
    if frames == 1 and places[3]:
        return None
    tokens = front + per_frame + behind
    frame = (known - before).div(tokens, rounding_mode="floor")
    at = (known - before) % tokens - front
    inside = (known >= before) & (frame < frames) & (at >= 0) & (at < per_frame)
    if not bool(inside.all()):
        return None
    pictures = _unanimous(frame, picture[known], frames)
    patches = _unanimous(at, patch[known], per_frame)
    if pictures is None or patches is None or bool((pictures < 0).any()):
        return None
    told = patches >= 0
    in_order = bool((patches == torch.arange(per_frame))[told].all())
    if in_order:
        patches = torch.arange(per_frame)
    elif not bool(told.all()):
        return None  # reordered, and not all of the order is known
    return _Fit(*places, pictures, patches)


def _unanimous(places: Tensor, values: Tensor, count: int) -> Tensor | None:
    """The one value that each place has, −1 where nothing is said; None if they contradict."""
    out = torch.full((count,), -1)
    out[places] = values
    said = out[out >= 0]
    agree = torch.equal(out[places], values) and len(set(said.tolist())) == len(said)
    return out if agree else None


def _order(layout: TokenLayout, fits: list[_Fit], frames: Tensor) -> TokenOrder | None:
    """Captured index → token of the layout, `(B, N)`; None where all are in order."""
    places = torch.arange(layout.num_tokens)
    start, first = len(layout.before), layout.patch_start_idx
    orders = []
    for fit, order in zip(fits, frames, strict=True):
        inner = torch.arange(layout.tokens_per_frame)
        inner[first : first + layout.num_patches] = first + fit.patches
        moved = places.clone()
        whole = order[:, None] * layout.tokens_per_frame + inner
        moved[start : start + whole.numel()] = start + whole.flatten()
        orders.append(moved)
    tokens = torch.stack(orders)
    return None if torch.equal(tokens, places.expand_as(tokens)) else TokenOrder(tokens)
