"""Where attention points from one frame to another, and how often that is the true match."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from vistvis.analysis.places import Side
from vistvis.attention import Attention
from vistvis.attention.indexing import taken
from vistvis.attention.rows import Selection
from vistvis.errors import InputError, LayoutError

How = Literal["argmax", "expected"]


class Correspondence(NamedTuple):
    """Where each patch of a frame points in another one; P = rows · cols, in reading order.

    Float64 all. A patch that the model dropped is NaN throughout; one that gives nothing to the
    patches of the other frame has a mass of 0 and is NaN but for that.
    """

    places: Tensor
    """`(B, h, P, 2)`: (row, col) on the grid of the key frame, in patches. Centres of patches are
    whole numbers: (0, 0) is the middle of the top left patch."""
    confidence: Tensor
    """`(B, h, P)`: of the mass on all patches of the key frame, the share that is on the patch in
    which the place lies. 1 is on that patch alone, 1 / P' evenly spread."""
    mass: Tensor
    """`(B, h, P)`: weight on all patches of the key frame; the rest went to other keys."""
    cycle: Tensor
    """`(B, h, P)`: how far, in patches, Euclidean, from a patch to where its match points back. NaN
    where there is no way back: the site has no queries of the key frame."""


class MatchRate(NamedTuple):
    """Share of true matches that each head found, and how many there were to find."""

    rate: Tensor
    """`(B, h)` float64, 0…1; NaN where nothing was counted."""
    counted: Tensor
    """`(B,)` int64: how many true matches that were."""


def correspondence(
    a: Attention,
    frame: SupportsIndex,
    key_frame: SupportsIndex,
    *,
    how: How = "argmax",
    batch: Selection = None,
    heads: Selection = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Correspondence:
    """Where the patches of `frame` point among those of `key_frame`, and whether they point back.

    Parameters
    ----------
    a
        Attention whose site says where its tokens lie.
    frame, key_frame
        Counted in the layouts of queries and of keys, which are those of the model's pictures;
        with cached keys the two differ by `site.first_frame`.
    how
        "argmax": the strongest patch, of equal ones the first. "expected": the mean place,
        Σ p·place / Σ p. The softmax goes over all keys; then those patches are taken.
    batch, heads
        As in `Attention.rows`; B and h of the result are those chosen.
    max_bytes, progress
        As in `Attention.row_blocks`.

    Of merged tokens each patch has an equal share. The way back is `key_frame` to `frame` by the
    same rule, from the patch in which the place lies (cycle consistency: Dwibedi et al., "Temporal
    Cycle-Consistency Learning", section 3).

    Cost: P rows there and P' back, `(P + P') · Nk · d` multiply-adds a head. LayoutError if the
    site does not say where its tokens lie, has frames in its batch, or saw no patch of a frame;
    InputError for another `how`, and for given weights that are negative.
    """
    sides = frames_of(a, frame, key_frame)
    frame, key_frame = operator.index(frame), operator.index(key_frame)
    walk = _Walk(a, how, batch, heads, max_bytes, progress)
    places, confidence, mass = walk.matches(sides, frame, key_frame)
    cycle = torch.full_like(mass, torch.nan)
    if (back := _way_back(a, sides, frame, key_frame)) is not None:
        returned = walk.matches(sides, *back)[0]
        seen = ~places.isnan().any(-1)
        number = _holding(places, sides[1].layout.grid)
        ends = returned.gather(2, number[..., None].expand(*number.shape, 2))
        far = (ends - _spots(sides[0].layout.grid, a.device)).norm(dim=-1)
        cycle = torch.where(seen, far, cycle)
    return Correspondence(places, confidence, mass, cycle)


def match_rate(
    a: Attention,
    frame: SupportsIndex,
    key_frame: SupportsIndex,
    truth: Any,
    *,
    within: float = 1.0,
    pixels: float | None = None,
    how: How = "argmax",
    batch: Selection = None,
    heads: Selection = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> MatchRate:
    """How often each head points from a patch of `frame` to its true match in `key_frame`.

    Parameters
    ----------
    a, frame, key_frame, how, batch, heads, max_bytes, progress
        As in `correspondence`. The truth is that of every chosen batch item.
    truth
        A tensor or array, told by its shape; pixels count in the pictures as the model saw them, x
        to the right, y down, from the outer corner (as `TokenLayout.token_at`).

        `(M, 4)`: known matches `x, y, x', y'`. The patch that holds (x, y) is asked; matches that
        are not finite, or outside of the pictures, are not counted.

        `(H, W)`, the size of the picture: a disparity map of a rectified pair, of which `frame` is
        the left picture: x' = x − d, y' = y. Not finite or ≤ 0 is unknown. It is read at the
        centres of patches. Not counted are those whose match is outside of the picture, or hidden:
        a pixel that is nearer (by more than a pixel of disparity) lands within a pixel of it.

        `(3, 3)`: a fundamental matrix, x'ᵀ F x = 0. It says on which line the match lies, and no
        more. Patches whose line misses the picture are not counted.
    within
        A hit is so many patches off, or less, in the larger of the two directions; half a patch is
        added, since a true place lies anywhere in its patch, and on a border in two. 1 is the patch
        or one of its eight neighbours, 0 the patch alone.
    pixels
        With a fundamental matrix: the largest Sampson distance of a hit. Default: `within` and a
        half, in pixels of the shorter side of a patch.

    Sampson distance: |x'ᵀFx| / √((Fx)₁² + (Fx)₂² + (Fᵀx')₁² + (Fᵀx')₂²), with x the centre of a
    patch and x' where it points (Hartley & Zisserman, "Multiple View Geometry", 2nd ed., 11.4.3).
    A patch that gives nothing to the other frame is a miss; one that the model dropped is not
    counted.

    Cost: P rows, `P · Nk · d` multiply-adds a head. InputError for a truth of no such shape, or of
    two (pictures of 3×3 pixels, or 4 wide), a negative `within` or `pixels`, and `pixels` without a
    fundamental matrix; LayoutError as in `correspondence`.
    """
    sides = frames_of(a, frame, key_frame)
    known, given = _kind_of_truth(truth, sides[0].layout.image_size)
    if not within >= 0 or (pixels is not None and not pixels >= 0):
        raise InputError(f"within and pixels are 0 or more; got {within!r} and {pixels!r}")
    if pixels is not None and given != "fundamental matrix":
        raise InputError(f"pixels go with a fundamental matrix, the truth is {given}; use within")
    walk = _Walk(a, how, batch, heads, max_bytes, progress)
    places, _, mass = walk.matches(sides, operator.index(frame), operator.index(key_frame))
    known = known.to(a.device)
    limit = within + 0.5
    if given == "fundamental matrix":
        far, fits, asked = _from_lines(known, places, sides)
        limit = limit * min(sides[1].layout.patch_size) if pixels is None else pixels
    else:
        if given == "disparity":
            known = _matches_of_disparity(known, sides[0])
        far, fits, asked = _from_matches(known, places, sides)
    counted = fits & ~mass[:, :1, asked].isnan()  # a dropped token is so in every head
    number = counted.sum(-1)
    return MatchRate(((far <= limit) & counted).sum(-1).double() / number, number[:, 0])


def frames_of(a: Attention, frame: SupportsIndex, key_frame: SupportsIndex) -> tuple[Side, Side]:
    """Both sides of attention between two frames that it saw, else a LayoutError."""
    query, key = Side.of(a, "query"), Side.of(a, "key")
    if a.site is not None and a.site.frames_in_batch:
        raise LayoutError(
            f"{query.name} has its frames in the batch, so each sees only itself; take a site that "
            "sees all frames (kind global or cross)"
        )
    for side, number, what in ((query, frame, "queries"), (key, key_frame, "keys")):
        number, frames = operator.index(number), side.layout.frames
        if not 0 <= number < frames:
            raise LayoutError(f"{side.name} has {what} of frames 0…{frames - 1}, got {number}")
        if bool((side.patches(number) < 0).all()):
            raise LayoutError(f"{side.name} saw no patch of frame {number} among its {what}")
    return query, key


def chosen(selection: Selection, size: int, name: str) -> list[int]:
    """The numbers that a selection along a dimension takes."""
    numbers = torch.arange(size)
    return numbers[taken(selection, size, name, numbers.device)].tolist()


@dataclass(frozen=True)
class _Walk:
    """How rows are walked through, the same there and back."""

    a: Attention
    how: How
    batch: Selection
    heads: Selection
    max_bytes: int | None
    progress: bool

    def matches(
        self, sides: tuple[Side, Side], frame: int, key_frame: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places, confidence and mass, as in `Correspondence`."""
        if self.how not in ("argmax", "expected"):
            raise InputError(f'how is "argmax" or "expected", got {self.how!r}')
        a, (query, key) = self.a, sides
        tokens, grid = query.patches(frame), key.layout.grid
        first, spots = key.layout.index(frame=key_frame, patch=0), _spots(grid, a.device)
        items = chosen(self.batch, a.shape[0], "batch")
        shape = len(items), len(chosen(self.heads, a.shape[1], "head")), tokens.shape[1], 4
        out = torch.full(shape, torch.nan, dtype=torch.float64, device=a.device)
        for part, item in zip(out, items, strict=True):
            for heads, patches, rows in self._blocks(key, tokens[item % len(tokens)], item):
                p = rows[..., first : first + key.layout.num_patches].double()
                if a.weights is not None and p.numel() and float(p.min()) < 0:
                    raise InputError(f"{key.name} has negative weights, which lie nowhere")
                mass = p.sum(-1, keepdim=True)
                places = spots[p.argmax(-1)] if self.how == "argmax" else p @ spots / mass
                places = torch.where(mass > 0, places, torch.nan)
                share = p.gather(-1, _holding(places, grid)[..., None]) / mass
                part[heads, patches] = torch.cat([places, share, mass], -1)
        return out[..., :2], out[..., 2], out[..., 3]

    def _blocks(
        self, key: Side, tokens: Tensor, item: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Heads, patches, and rows of these over original tokens `(h, q, n)`."""
        patches = (tokens >= 0).nonzero()[:, 0]
        for (_, heads, q), weights in self.a.row_blocks(
            batch=item,
            heads=self.heads,
            queries=tokens[patches],
            max_bytes=self.max_bytes,
            progress=self.progress,
        ):
            rows = weights[0].detach()
            if key.order is not None:
                rows = key.order.spread(rows, key.layout.num_tokens, batch=item)
            yield heads, patches[q], rows


def _spots(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(row, col) of every patch, `(P, 2)` float64."""
    rows, cols = (torch.arange(n, device=device, dtype=torch.float64) for n in grid)
    return torch.cartesian_prod(rows, cols)


def _holding(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patch in which each place `(…, 2)` on a grid lies, `(…)`; 0 for NaN."""
    row, col = (places.nan_to_num() + 0.5).floor().long().unbind(-1)
    return row * grid[1] + col


def _way_back(
    a: Attention, sides: tuple[Side, Side], frame: int, key_frame: int
) -> tuple[int, int] | None:
    """The frames of queries and keys on the way back; None where the site has none."""
    (query, key), site = sides, a.site
    assert site is not None
    # Layouts of one picture each may be of two pictures; an order says of which.
    alone = site.kind == "cross" and query.order is None
    same = replace(key.layout, frames=query.layout.frames) == query.layout
    back = key_frame - site.first_frame
    if alone or not same or not 0 <= back < query.layout.frames:
        return None
    return back, frame + site.first_frame


def _kind_of_truth(truth: Any, image_size: tuple[int, int]) -> tuple[Tensor, str]:
    """The truth in float64, and what it is."""
    try:
        values = truth.detach() if isinstance(truth, Tensor) else torch.from_numpy(np.array(truth))
        values = values.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"a truth is an array of numbers, got {type(truth).__name__}") from error
    shape = tuple(values.shape)
    kinds = {
        "fundamental matrix": shape == (3, 3),
        "disparity": shape == image_size,
        "matches": len(shape) == 2 and shape[1] == 4,
    }
    fitting = [kind for kind, fits in kinds.items() if fits]
    if len(fitting) != 1:
        height, width = image_size
        raise InputError(
            f"a truth is matches (M, 4), a disparity map of the picture ({height}, {width}) or a "
            f"fundamental matrix (3, 3); {shape} fits {' and '.join(fitting) or 'none'}"
        )
    if fitting[0] == "fundamental matrix" and not bool(values.isfinite().all() and values.any()):
        raise InputError("a fundamental matrix is finite and not zero")
    return values, fitting[0]


def _centres(side: Side) -> Tensor:
    """(x, y) of the centres of a frame's patches in pixels, `(P, 2)` float64."""
    height, width = side.layout.patch_size
    size = torch.tensor([height, width], dtype=torch.float64)
    return ((_spots(side.layout.grid, size.device) + 0.5) * size).flip(-1)


def _matches_of_disparity(disparity: Tensor, side: Side) -> Tensor:
    """`x, y, x', y'` of every patch, `(P, 4)`; NaN where it is unknown or hidden."""
    (rows, width), device = disparity.shape, disparity.device
    d = torch.where(disparity.isfinite() & (disparity > 0), disparity, 0)
    # Of all pixels of a line that land on a place, or beside it, the largest disparity hides it.
    landing = (torch.arange(width, device=device) + 0.5 - d).floor().long()
    nearest = d.new_zeros(rows, width + 2)
    for shift in (0, 1, 2):
        index = (landing + shift).clamp_min(0)  # what leaves the picture goes to its margin
        nearest.scatter_reduce_(1, index, d, "amax")
    x, y = _centres(side).to(device).unbind(-1)
    here = y.long(), x.long()
    shown = d[here] >= nearest[y.long(), (landing[here] + 1).clamp_min(0)] - 1
    there = torch.where((d[here] > 0) & shown, x - d[here], torch.nan)
    return torch.stack([x, y, there, y], -1)


def _from_matches(
    known: Tensor, places: Tensor, sides: tuple[Side, Side]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of known matches: patches between the true place and the found one `(B, h, M)`, which count
    `(M,)`, and the patches asked `(M,)`."""
    numbers, counted = [], torch.ones_like(known[:, 0], dtype=torch.bool)
    for side, pixel in zip(sides, (known[:, :2], known[:, 2:]), strict=True):
        height, width = side.layout.image_size
        size = pixel.new_tensor([width, height])
        counted &= ((pixel >= 0) & (pixel < size)).all(-1)
        patch = pixel.new_tensor(side.layout.patch_size)
        numbers.append(pixel.flip(-1) / patch - 0.5)
    start, end = numbers
    asked = _holding(torch.where(counted[:, None], start, 0.0), sides[0].layout.grid)
    return (places[:, :, asked] - end).abs().amax(-1), counted, asked


def _from_lines(
    matrix: Tensor, places: Tensor, sides: tuple[Side, Side]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a fundamental matrix, for all patches and with Sampson distances in pixels."""
    query, key = sides
    x = torch.nn.functional.pad(_centres(query), (0, 1), value=1.0).to(matrix.device)
    lines = x @ matrix.T
    height, width = key.layout.image_size
    corners = torch.cartesian_prod(lines.new_tensor([0, width]), lines.new_tensor([0, height]))
    beside = lines @ torch.nn.functional.pad(corners, (0, 1), value=1.0).T
    crossing = (beside.amin(-1) < 0) & (beside.amax(-1) > 0)
    there = ((places + 0.5) * places.new_tensor(key.layout.patch_size)).flip(-1)
    there = torch.nn.functional.pad(there, (0, 1), value=1.0)
    product = (there * lines).sum(-1)
    slopes = lines[:, :2].square().sum(-1) + (there @ matrix)[..., :2].square().sum(-1)
    every = torch.arange(len(x), device=x.device)
    return product.abs() / slopes.sqrt(), crossing, every
