"""What becomes of matching when single heads of a multi-view model are knocked out."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistvis.attention import Attention
from vistvis.errors import InputError, LayoutError, SiteError
from vistvis.hooks.capture import capture
from vistvis.intervention.intervening import block_names, intervene
from vistvis.intervention.plan import Mode
from vistvis.intervention.truth import Truth
from vistvis.models.families import blocks_of
from vistvis.models.layouts import layout_of_inputs
from vistvis.models.sites import Chooser, SiteList, choose_sites, find_sites
from vistvis.progress import progress as bar
from vistvis.tokens import TokenLayout

# The number of a patch that is far from all others.
_NOWHERE = -(10**6)

Head: TypeAlias = tuple[str, int]
Groups: TypeAlias = Callable[[Mapping[Head, float]], Mapping[str, Sequence[Head]]]


class Rates(NamedTuple):
    """Shares of patches, 0…1, whose match lies where it should, or near enough."""

    tokens: float
    """By the nearest token (cosine) of the last global block in the other frame."""
    pointing: float
    """By the strongest patch of the other frame in the rows of the pointing head; of a row that
    weighs all of them alike, none."""


class Knockout(NamedTuple):
    """One head, knocked out."""

    site: str
    kind: str
    head: int
    rates: Rates
    own: float
    """How often the head itself points right while nothing is changed; NaN of frame blocks."""


@dataclass(frozen=True)
class KnockoutTable:
    """Matching with each head knocked out, beside that of the model as it is.

    `pointing` is the site and head that point right most often; `counted` how many matches the
    rates are shares of; `truth` whether these are true ones, or those of the undisturbed tokens.
    `within_frames` are the rates where no global block sees another frame, `groups` those where
    several heads are knocked out together.
    """

    mode: Mode
    truth: bool
    pointing: tuple[str, int]
    counted: int
    undisturbed: Rates
    within_frames: Rates
    knockouts: tuple[Knockout, ...] = field(repr=False)
    groups: Mapping[str, Rates] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """In the order in which they run."""
        return list(dict.fromkeys(one.site for one in self.knockouts))

    def grid(self, of: Callable[[Knockout], float]) -> Tensor:
        """A number of each knock-out, `(sites, heads)` float64; NaN where there is no such head."""
        heads = 1 + max(one.head for one in self.knockouts)
        made = torch.full((len(self.sites), heads), torch.nan, dtype=torch.float64)
        for one in self.knockouts:
            made[self.sites.index(one.site), one.head] = of(one)
        return made

    def to_csv(self) -> str:
        """A line for the undisturbed model, for each knock-out, and for the control."""
        text = io.StringIO()
        write = csv.writer(text, lineterminator="\n").writerow
        write(["site", "kind", "head", "mode", *_COLUMNS])
        plain = self.undisturbed
        for site, what, rates in (
            ("", "undisturbed", plain),
            ("all global", "within_frame", self.within_frames),
        ):
            write([site, "", "", what, *_changes(rates, plain), ""])
        for one in self.knockouts:
            numbers = *_changes(one.rates, plain), _number(one.own)
            write([one.site, one.kind, one.head, self.mode, *numbers])
        return text.getvalue()


_COLUMNS = (
    *("token_rate", "token_change", "pointing_rate", "pointing_change"),
    "own_pointing_rate",
)


def _changes(rates: Rates, plain: Rates) -> list[str]:
    return [
        _number(value)
        for rate, before in zip(rates, plain, strict=True)
        for value in (rate, rate - before)
    ]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.6f}"


def knockout_table(
    model: nn.Module,
    images: Tensor,
    *,
    mode: Mode = "uniform",
    sites: Chooser = None,
    truth: Truth | None = None,
    within: float = 1.0,
    groups: Groups | None = None,
    layout: TokenLayout | None = None,
    max_bytes: int | None = None,
    progress: bool | None = False,
) -> KnockoutTable:
    """Knock out every head of the frame and global blocks in turn, and match again.

    Parameters
    ----------
    model
        A multi-view model in eval mode that takes pictures `(B, S, 3, H, W)`: VGGT and relatives
        whose last global block gives the tokens of all frames.
    images
        `(B, S, 3, H, W)` as the model takes them, S ≥ 2.
    mode
        As in `intervene`.
    sites
        Which blocks' heads are knocked out, as in `intervene`; None: all frame and global blocks.
    truth
        Where patches truly lie. None: the matches of the undisturbed tokens take its place, and
        rates say how many of those are left.
    within
        How many patches off a match may lie, the larger of rows and columns, counted from the edge
        of the patch: 1 is in it or one beside it, 0.001 in it, as «within one» and «exact» in the
        card of the bundled model.
    groups
        Heads that are knocked out together, by a name of the group: a function of how often each
        head of a global block points right by itself, `{(site, head): rate}`.
    layout
        As in `intervene`.
    max_bytes, progress
        Bound on a block of rows, as in `Attention.row_blocks`; a bar over the knock-outs, None:
        only on a terminal.

    For each head: the share of patches whose nearest token, by cosine similarity of the last global
    block's output, among the patches of another frame lies where it should;
    the same of the strongest patch in the rows of the head that points best; and once, undisturbed,
    of each head of a global block by itself. A measure of this kind, and knock-outs of heads of
    VGGT: arXiv 2512.11508.

    InputError for pictures or a truth of other shapes, SiteError for a model without global blocks
    or whose last one gives other tokens, LayoutError where nothing is known of its tokens.

    Cost: one forward for each head and group, and three more; each head of a global block once row
    by row, `(S·P)²` weights, and the pointing head again in every forward.
    """
    if images.ndim != 5 or images.shape[1] < 2:
        raise InputError(
            f"images are (B, S, 3, H, W) of two views or more, got {tuple(images.shape)}"
        )
    found = layout or layout_of_inputs(model, (images,), {})
    if found is None:
        raise LayoutError(
            "the token layout of this model is not known; give layout=TokenLayout(frames, (rows, "
            "cols), special=(…), patch_size=…)"
        )
    every = find_sites(model)
    every = every.named(block_names(model, every))
    blocks = SiteList(site for site in every if site.kind in ("frame", "global"))
    run = _Run(model, images, found, blocks, max_bytes)
    chosen = choose_sites(blocks, sites)
    with torch.no_grad():
        nearest, pointed, counts = run.undisturbed()
        matches = _matches(truth, nearest, found)

        def share(best: Tensor) -> float:
            """Of patches `(B, S, S, P)`, the share that lies near enough to the match."""
            places = torch.stack([best // found.grid[1], best % found.grid[1]], -1)
            off = (places - matches.places.to(best.device)).abs().amax(-1)
            return float(((off <= within + 0.5) & visible).sum() / visible.sum())

        visible = matches.visible.to(nearest.device)
        own = {
            (name, head): share(best) for name in pointed for head, best in enumerate(pointed[name])
        }
        pointing = max(own, key=lambda place: own[place])
        plain = Rates(share(nearest), own[pointing])

        def rates(sites: list[str], **change: Any) -> Rates:
            with intervene(model, sites, layout=found, **change):
                return Rates(*map(share, run.again(*pointing)))

        alone = rates(run.together, within_frame=True)
        heads = [(site, head) for site in chosen for head in range(counts[site.name])]
        done = []
        for site, head in bar(heads, "knock-outs", unit="head", shown=progress):
            changed = rates([site.path], heads=[head], mode=mode)
            itself = own.get((site.name, head), float("nan"))
            done.append(Knockout(site.name, site.kind, head, changed, itself))
        together = {}
        for group, members in (groups(own) if groups else {}).items():
            with contextlib.ExitStack() as stack:
                for name in dict.fromkeys(name for name, _ in members):
                    of_site = [head for site, head in members if site == name]
                    one = intervene(model, [name], heads=of_site, mode=mode, layout=found)
                    stack.enter_context(one)
                together[group] = Rates(*map(share, run.again(*pointing)))
    counted = int(visible.sum())
    return KnockoutTable(
        mode, truth is not None, pointing, counted, plain, alone, tuple(done), together
    )


def _matches(truth: Truth | None, nearest: Tensor, layout: TokenLayout) -> Truth:
    """The truth, or what the undisturbed tokens say."""
    cols = layout.grid[1]
    if truth is None:
        places = torch.stack([nearest // cols, nearest % cols], -1).double()
        apart = ~torch.eye(layout.frames, dtype=torch.bool)[None, :, :, None]
        return Truth(places, apart.expand(nearest.shape))
    if truth.places.shape != (*nearest.shape, 2) or truth.visible.shape != nearest.shape:
        raise InputError(
            f"truth has places (B, S, S, P, 2) and visible (B, S, S, P) = {tuple(nearest.shape)}, "
            f"got {tuple(truth.places.shape)} and {tuple(truth.visible.shape)}"
        )
    return truth


class _Run:
    """Forwards of one model on the same pictures."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        layout: TokenLayout,
        blocks: SiteList,
        max_bytes: int | None,
    ) -> None:
        self._model, self._images, self._layout = model, images, layout
        self._max_bytes = max_bytes
        self._names = {site.path: site.name for site in blocks}
        self.together = [site.path for site in blocks if site.kind == "global"]
        if not self.together:
            raise SiteError("this model has no global blocks, whose tokens could be matched")
        self._last = [path for path, kind, _ in blocks_of(model) if kind == "global"][-1]

    def undisturbed(self) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        """The nearest patches of tokens `(B, S, S, P)`, where each head of global blocks points
        `(h, B, S, S, P)`, by site, and how many heads each site has."""
        pointed: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def take(name: str, attention: Attention) -> None:
            counts[name] = attention.num_heads
            if attention.site is not None and attention.site.kind == "global":
                pointed[name] = self._strongest(attention)

        nearest = self._forward(list(self._names), take)
        return nearest, pointed, counts

    def again(self, name: str, head: int) -> tuple[Tensor, Tensor]:
        """The nearest patches of tokens, and where one head points."""
        pointed: list[Tensor] = []
        (path,) = (path for path, own in self._names.items() if own == name)
        nearest = self._forward(
            [path], lambda _, attention: pointed.append(self._strongest(attention, head)[0])
        )
        return nearest, pointed[0]

    def _forward(self, sites: list[str], sink: Callable[[str, Attention], None]) -> Tensor:
        seen: list[Tensor] = []

        def take(module: nn.Module, args: Any, out: Any) -> None:
            seen[:] = [out[0] if isinstance(out, (tuple, list)) else out]

        handle = self._model.get_submodule(self._last).register_forward_hook(take)
        try:
            with capture(self._model, sites, names=self._names, sink=sink, layout=self._layout):
                self._model(self._images)
        finally:
            handle.remove()
        return self._nearest(seen[0])

    def _nearest(self, tokens: Tensor) -> Tensor:
        """For each patch of each frame the patch of each frame that is nearest, `(B, S, S, P)`."""
        batch, frames = self._images.shape[:2]
        sizes = batch, frames, self._layout.tokens_per_frame
        if tokens.numel() != batch * frames * sizes[2] * tokens.shape[-1]:
            raise SiteError(
                f"block {self._last!r} gives {tuple(tokens.shape)}, which are not the "
                f"{frames} · {sizes[2]} tokens of all frames, so they can't be matched"
            )
        patches = F.normalize(self._patches(tokens.reshape(*sizes, -1), 2).double(), dim=-1)
        near = [
            torch.einsum("bnd,bjmd->bjnm", patches[:, frame], patches).argmax(-1)
            for frame in range(frames)
        ]
        return torch.stack(near, 1)

    def _strongest(self, attention: Attention, head: int | None = None) -> Tensor:
        """The patch of each frame that gets most of each patch's row, `(h, B, S, S, P)`."""
        site, layout = attention.site, self._layout
        known = site is not None and site.query_layout == site.key_layout == layout
        if not known or site.key_order is not None or site.query_order is not None:  # type: ignore[union-attr]
            raise LayoutError(
                f"the tokens of {site.name if site else 'a site'!r} are not those of the layout in "
                "their order, so where its heads point is not known"
            )
        first, each = len(layout.before), layout.tokens_per_frame
        inner = slice(first, first + layout.frames * each)
        best = torch.empty(
            *(attention.shape[0], attention.num_heads if head is None else 1),
            *(attention.shape[2], layout.frames),
            dtype=torch.int64,
            device=attention.device,
        )
        rows = attention.row_blocks(heads=head, max_bytes=self._max_bytes)
        for index, weights in rows:
            keys = weights[..., inner]
            keys = self._patches(keys.reshape(*keys.shape[:-1], layout.frames, each), -1)
            # Where all weigh alike (0, after a cut), none is the strongest.
            points = keys.amax(-1) > keys.amin(-1)
            best[index] = keys.argmax(-1).where(points, _NOWHERE)
        queries = best[:, :, inner].reshape(*best.shape[:2], layout.frames, each, -1)
        return self._patches(queries, 3).permute(1, 0, 2, 4, 3)

    def _patches(self, tokens: Tensor, dim: int) -> Tensor:
        """Without the special tokens of a frame."""
        return tokens.narrow(dim, self._layout.patch_start_idx, self._layout.num_patches)
