"""Statistics that need to know where tokens lie: in which frame, and whether they are patches.

Tokens are told by the site's layouts. Where a model reordered or dropped some, its orders are
followed; a merged token gives and gets an even part for each of its originals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistvis.analysis.places import Side
from vistvis.analysis.walk import Rows, walk
from vistvis.attention import Attention
from vistvis.attention.indexing import Block
from vistvis.errors import LayoutError
from vistvis.tokens import PATCH, TokenLayout


def special_mass(
    a: Attention, *, max_bytes: int | None = None, progress: bool = False
) -> dict[str, Tensor]:
    """What each query gives to special tokens, by their kind: `{kind: (B, h, Nq)}` float64.

    Kinds come in the order of the key layout; without special tokens the dict is empty.
    LayoutError if the site does not say where its keys lie. Cost: all rows once.
    """
    masses = Masses(a)
    out = torch.empty(*a.shape[:3], len(masses.kinds), dtype=torch.float64, device=a.device)
    if masses.kinds:
        for rows in walk(a, max_bytes=max_bytes, progress=progress):
            out[rows.index] = masses.of(rows)[0]
    return {kind: out[..., number] for number, kind in enumerate(masses.kinds)}


def frame_mass(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """Mean mass that a token of one frame gives to another frame, `(B, h, S_q, S_k, 2, 2)` float64.

    The last two dimensions tell special tokens (0) and patches (1) apart, of the query's frame and
    of the key's: `[b, h, 1, 0, 1, 0]` is what a patch of frame 1 gives to all special tokens of
    frame 0, on average. NaN where a frame has no tokens of that kind among the queries. Where
    frames are folded into the batch, S is 1 on both sides. Tokens of no frame are left out.

    LayoutError if the site does not say where its tokens lie. Cost: all rows once.
    """
    sums = FrameSums(a)
    masses = Masses(a)
    for rows in walk(a, max_bytes=max_bytes, progress=progress):
        sums.add(rows.index, masses.of(rows)[1])
    return sums.means()


def distance(a: Attention, *, max_bytes: int | None = None, progress: bool = False) -> Tensor:
    """Mean distance to what a patch attends to in its own frame, `(B, h, Nq)` float64, in patches.

    Σ p·|place of key − place of query| / Σ p over the patches of the query's frame; Euclidean, in
    steps of the grid (Dosovitskiy et al., "An Image Is Worth 16x16 Words", figure 7, has it in
    pixels). NaN for special tokens, and where nothing is given to that frame's patches.

    LayoutError if the site does not say where its tokens lie, its sides have grids that differ, or
    tokens are merged. Cost: all rows once, and a table of `Nq · rows · cols` distances for each
    block.
    """
    distances = Distances(a)
    out = torch.empty(a.shape[:3], dtype=torch.float64, device=a.device)
    for rows in walk(a, max_bytes=max_bytes, progress=progress):
        out[rows.index] = distances.of(rows)
    return out


class Masses:
    """What rows give to special tokens by kind, and to frames."""

    def __init__(self, a: Attention) -> None:
        side = Side.of(a, "key")
        names = side.kinds()
        self.frames = side.layout.frames
        self.kinds = [kind for kind in dict.fromkeys(names) if kind != PATCH]
        numbers = {kind: number for number, kind in enumerate(self.kinds)}
        kinds = torch.tensor([numbers.get(name, -1) for name in names])
        # One column for each kind, then two for each frame.
        members = [kinds == number for number in numbers.values()]
        members += [side.groups() == number for number in range(2 * self.frames)]
        self._shares = side.shares(torch.stack(members, 1).to(a.dtype)).to(a.device)
        self._patches = None if side.order else side.layout
        self._special = (kinds >= 0).nonzero()[:, 0].to(a.device)

    def of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """`(b, h, q, kinds)` and `(b, h, q, 2·S)` float64: of every frame special, then patches.

        Asked first of a block, it spares others sums: those of whole rows and of frames.
        """
        if self._patches is None:
            sums = rows.values @ of_batch(self._shares, rows.index)[:, None]
        else:
            sums = self._by_runs(rows, self._patches)
        return tuple(rows.weigh(sums).tensor_split([len(self.kinds)], -1))  # type: ignore[return-value]

    def _by_runs(self, rows: Rows, layout: TokenLayout) -> Tensor:
        """Where patches lie in runs: their sums, which are nearly all of it, without a product."""
        values = rows.values
        start = len(layout.before)
        frames = slice(start, start + self.frames * layout.tokens_per_frame)
        first, last = layout.patch_start_idx, layout.patch_start_idx + layout.num_patches
        framed = values[..., frames]
        framed = framed.view(*values.shape[:3], self.frames, -1)
        # What is left is little.
        few = self._special
        rest = values[..., few]
        sums, patches = rest @ self._shares[0, few], framed[..., first:last].sum(-1)
        rows.patches = patches
        if not rows.divided:
            rows.total = rest.sum(-1) + patches.sum(-1)
        sums[..., len(self.kinds) + 1 :: 2] = patches
        return sums


class FrameSums:
    """Sums what queries give to frames, by the frames of the queries."""

    def __init__(self, a: Attention) -> None:
        side = Side.of(a, "query")
        self._frames = side.layout.frames, Side.of(a, "key").layout.frames
        groups, rows = side.groups(), side.rows()
        # How many original tokens of each group a captured query is the row of, `(B|1, Nq, 2·S)`.
        known = ((rows >= 0) & (groups >= 0)).double()
        index = rows.clamp_min(0) * (2 * self._frames[0]) + groups.clamp_min(0)
        self._members = torch.zeros(len(rows), a.shape[2] * 2 * self._frames[0], dtype=known.dtype)
        self._members.scatter_add_(1, index, known)
        self._members = self._members.view(len(rows), a.shape[2], -1).to(a.device)
        sizes = (*a.shape[:2], 2 * self._frames[0], 2 * self._frames[1])
        self._total = torch.zeros(sizes, dtype=torch.float64, device=a.device)

    def add(self, index: Block, masses: Tensor) -> None:
        """Masses of a block, `(b, h, q, 2·S_k)`."""
        members = of_batch(self._members, index)[:, index[2]]
        self._total[index[:2]] += members.mT[:, None] @ masses

    def means(self) -> Tensor:
        """`(B, h, S_q, S_k, 2, 2)`, as in `frame_mass`."""
        count = self._members.sum(1)[:, None, :, None]
        mean = torch.where(count > 0, self._total / count, torch.nan)
        queries, keys = self._frames
        return mean.view(*mean.shape[:2], queries, 2, keys, 2).transpose(3, 4)


class Distances:
    """How far rows look within the frame of their query."""

    def __init__(self, a: Attention) -> None:
        query, key = Side.of(a, "query"), Side.of(a, "key")
        if query.layout.grid != key.layout.grid:
            raise LayoutError(
                f"distances are within one frame; {query.name} has queries in {query.layout} and "
                f"keys in {key.layout}"
            )
        self._first = a.site.first_frame if a.site else 0
        self._layouts = None if query.order or key.order else (query.layout, key.layout)
        if self._layouts:
            # A table of all pairs of patches on one grid, of which every head reads the same part;
            # special tokens beside them have 0, so that whole frames are multiplied.
            down, across = (torch.arange(n, dtype=a.dtype) for n in key.layout.grid)
            squares = [(t[:, None] - t) ** 2 for t in (down, across)]
            both = squares[0][:, None, :, None] + squares[1][None, :, None, :]
            n, first = key.layout.num_patches, key.layout.patch_start_idx
            self._far = both.new_zeros(n, key.layout.tokens_per_frame)
            self._far[:, first : first + n] = both.sqrt_().reshape(n, n)
            self._far = self._far.to(a.device)
        else:
            self._own, self._from = _spots(query, self._first, a)
            self._other, self._to = _spots(key, 0, a)

    def of(self, rows: Rows) -> Tensor:
        """`(b, h, q)` float64."""
        if self._layouts is None:
            own, start = (
                of_batch(t, rows.index)[:, rows.index[2]] for t in (self._own, self._from)
            )
            other, end = (of_batch(table, rows.index) for table in (self._other, self._to))
            same = (own[..., None] == other[:, None]) & (own[..., None] >= 0)
            within = rows.values * same[:, None]
            far = torch.cdist(start, end).to(within.dtype)
            return rows.weigh(rows.dot(within, far[:, None])) / rows.weigh(within.sum(-1))
        query, key = self._layouts
        out = torch.full(
            rows.values.shape[:3], torch.nan, dtype=torch.float64, device=self._far.device
        )
        begin, end = rows.index[2].start, rows.index[2].stop
        for frame in range(min(query.frames, key.frames - self._first)):
            first = query.index(frame=frame, patch=0)
            chosen = slice(max(first, begin), min(first + query.num_patches, end))
            if chosen.start < chosen.stop:
                keyed = frame + self._first
                at = slice(chosen.start - begin, chosen.stop - begin)
                keys = len(key.before) + keyed * key.tokens_per_frame
                within = rows.values[:, :, at, keys : keys + key.tokens_per_frame]
                far = self._far[chosen.start - first : chosen.stop - first]
                if rows.patches is None:
                    patches = slice(key.patch_start_idx, key.patch_start_idx + key.num_patches)
                    mass = within[..., patches].sum(-1)
                else:
                    mass = rows.patches[:, :, at, keyed]
                # The sum of weights cancels what they would be divided by.
                out[:, :, at] = rows.dot(within, far).double() / mass
        return out


def of_batch(table: Tensor, index: Block) -> Tensor:
    """The part of a table `(B|1, …)` for a block's batch items."""
    return table if len(table) == 1 else table[index[0]]


def _spots(side: Side, first: int, a: Attention) -> tuple[Tensor, Tensor]:
    """Of each captured token its frame, −1 if it is no patch, `(B|1, N)`, and its place."""
    frames, spots = side.spots()
    frames = torch.where(frames < 0, -1, frames + first)
    tokens = side.originals()
    known = tokens >= 0
    tokens = tokens.clamp_min(0)
    return torch.where(known, frames[tokens], -1).to(a.device), spots[tokens].to(a.device)
