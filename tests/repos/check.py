"""Measures one model: what is captured, refused, seen outside; rows, columns, places, figure."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import randomise_zeros, sharpen, sharpen_once
from torch import Tensor, nn

import vistvis
from vistvis.attention import Attention
from vistvis.errors import IndexOutOfRange, VistvisError
from vistvis.tokens import TokenLayout

from .model import Model
from .witness import Call, witnessed

TOLERANCE = 2e-5
ALL = slice(None)


@dataclass
class Outcome:
    """One line of the table, and what is behind it."""

    model: str
    commit: str = ""
    note: str = ""
    found: int = 0
    captured: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Site → why it has no attention here."""
    idle: int = 0
    """Sites that did not run."""
    calls: int = 0
    calls_captured: int = 0
    calls_refused: int = 0
    calls_outside: int = 0
    calls_other: int = 0
    """Softmaxes that are no attention."""
    silent: list[str] = field(default_factory=list)
    rows: float = 0.0
    columns: float = 0.0
    largest: tuple[float, float] = (0.0, 0.0)
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    no_layout: list[str] = field(default_factory=list)
    figure: str = ""
    failures: list[str] = field(default_factory=list)


# -- making a model ready --------------------------------------------------------------------------


def prepare(model: nn.Module, entry: Model, images: Tensor) -> dict[str, float]:
    """Sharpen every attention module until its largest weight lies between 0.3 and 0.95."""
    model.eval()
    randomise_zeros(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if entry.stays is not None and name.endswith(".gamma"):
                parameter.fill_(entry.stays)
    owners: dict[str, nn.Module] = dict(model.named_modules())

    def owner(name: str) -> str:
        """The module around a kernel call that holds the projections."""
        while name and not sharpen_once(owners[name], 1.0):
            name = name.rpartition(".")[0]
        return name

    def largest() -> dict[str, float]:
        calls, _ = witnessed(model, lambda: entry.run(model, images))
        found: dict[str, float] = {}
        for call in calls:
            name = owner(call.module)
            found[name] = max(found.get(name, 0.0), float(call.weights.max()))
        return found

    names = [name for name in largest() if name]
    return sharpen({name: owners[name] for name in names}, largest, steps=30)


# -- witness against capture -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One captured attention, and the kernel calls that it is made of."""

    attention: Attention
    calls: list[int]
    along: str
    """How the calls lie in it: "one", "queries" (one under the other), "blocks" or "heads"."""

    def weights(self, calls: list[Call]) -> Tensor:
        parts = [calls[number].weights for number in self.calls]
        return self._joined(parts, blocks=True)

    def answers(self, calls: list[Call], other: list[Call]) -> tuple[Tensor, Tensor]:
        """How much each query and each key differs between two runs, `(B, Nq)` and `(B, Nk)`."""
        sides = [calls[n].answers(other[n]) for n in self.calls]
        sizes = self.attention.shape[2], self.attention.shape[3]
        out = []
        for side, size in enumerate(sizes):
            parts = [one[side].reshape(-1, one[side].shape[-1]) for one in sides]
            if self.along == "blocks" or (self.along == "queries" and side == 0):
                joined = torch.cat([part.sum(0, keepdim=True) for part in parts], -1)
            else:
                joined = torch.stack(parts).sum(0)
            assert joined.shape[-1] == size, (joined.shape, size)
            out.append(joined.reshape(self.attention.shape[0], -1, size).sum(1))
        return out[0], out[1]

    def _joined(self, parts: list[Tensor], *, blocks: bool) -> Tensor:
        shape = self.attention.shape
        if self.along == "one":
            return parts[0].reshape(shape)
        if self.along == "heads":
            return torch.stack(parts, 1).reshape(shape)
        if self.along == "queries":
            return torch.cat(parts, -2).reshape(shape)
        whole = parts[0].new_zeros(shape)
        q = k = 0
        for part in parts:
            rows, columns = part.shape[-2:]
            whole[..., q : q + rows, k : k + columns] = part.reshape(shape[0], shape[1], rows, -1)
            q, k = q + rows, k + columns
        return whole


def match(attention: list[Attention], calls: list[Call], numbers: list[int]) -> list[Reading]:
    """Which kernel calls each captured attention is made of; none if they don't fit."""
    if not attention or len(numbers) % len(attention):
        return []
    size = len(numbers) // len(attention)
    readings = []
    for at, one in enumerate(attention):
        part = numbers[at * size : (at + 1) * size]
        shapes = [calls[number].weights.shape for number in part]
        rows, columns = one.shape[2:]
        total = sum(calls[number].weights.numel() for number in part)
        if size == 1 and tuple(shapes[0][-2:]) == (rows, columns):
            along = "one"
        elif all(tuple(s[-2:]) == (rows, columns) for s in shapes) and total == one.numel():
            along = "heads"
        elif all(s[-1] == columns for s in shapes) and sum(s[-2] for s in shapes) == rows:
            along = "queries"
        elif sum(s[-1] for s in shapes) == columns and sum(s[-2] for s in shapes) == rows:
            along = "blocks"
        else:
            return []
        readings.append(Reading(one, part, along))
    return readings


def compare(reading: Reading, calls: list[Call], outcome: Outcome) -> None:
    """Every row and every column of a captured attention against the witness."""
    expected, attention = reading.weights(calls), reading.attention
    for number in range(attention.shape[2]):
        got = attention.rows(number)[:, :, 0].double()
        outcome.rows = max(outcome.rows, float((got - expected[:, :, number]).abs().max()))
    for number in range(attention.shape[3]):
        got = attention.columns(number)[..., 0].double()
        outcome.columns = max(outcome.columns, float((got - expected[..., number]).abs().max()))


# -- places ----------------------------------------------------------------------------------------


def same(left: Any, right: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if dataclasses.is_dataclass(left):
        return same(vars(left), vars(right))
    return True


def dyed(images: Tensor, patch: int, frame: int, cell: tuple[int, int]) -> Tensor:
    """The pictures with one patch of one of them replaced by noise."""
    out = images.clone()
    rows = slice(cell[0] * patch, (cell[0] + 1) * patch)
    columns = slice(cell[1] * patch, (cell[1] + 1) * patch)
    out[frame, :, rows, columns] = torch.rand_like(out[frame, :, rows, columns])
    return out


def expected_at(
    attention: Attention, side: str, frame: int, cell: tuple[int, int]
) -> tuple[int, int] | None:
    """`(batch index, captured index)` where the site says a patch is; None if it isn't there."""
    site = attention.site
    assert site is not None
    layout: TokenLayout = getattr(site, f"{side}_layout")
    order, batch = getattr(site, f"{side}_order"), 0
    if site.frames_in_batch or (layout.frames == 1 and attention.shape[0] > 1):
        batch, frames = frame, site.frame_order
        if frames is not None:
            batch = int((frames.flatten() == frame).nonzero()[0])
        frame = 0
    elif side == "query":
        frame -= site.first_frame
    if not 0 <= frame < layout.frames:
        return None
    token = layout.index(frame=frame, row=cell[0], col=cell[1])
    try:
        return batch, order.index(token, batch=batch) if order is not None else token
    except IndexOutOfRange:
        return None


def strongest(change: Tensor) -> tuple[int, int]:
    """The batch index and the token that answer most."""
    batch, token = divmod(int(change.argmax()), change.shape[-1])
    return batch, token


def probe_places(
    entry: Model,
    images: Tensor,
    calls: list[Call],
    readings: dict[str, list[Reading]],
    rerun: Callable[[Tensor], list[Call]],
    outcome: Outcome,
) -> dict[tuple[str, int, str, int, tuple[int, int]], tuple[int, int]]:
    """Dye one patch at a time and see which token answers; returns the answers."""
    grid = images.shape[-2] // entry.patch, images.shape[-1] // entry.patch
    cells = [(0, grid[1] - 1), (grid[0] - 1, 0), (grid[0] // 2, grid[1] // 2)]
    answers = {}
    for name, made in readings.items():
        site = made[0].attention.site
        assert site is not None
        if site.query_layout is None or site.key_layout is None:
            outcome.no_layout.append(name)
    for frame in range(len(images)):
        for cell in cells:
            other = rerun(dyed(images, entry.patch, frame, cell))
            if [c.weights.shape for c in other] != [c.weights.shape for c in calls]:
                outcome.failures.append(f"dyed frame {frame} {cell}: other kernel calls")
                continue
            for name, made in readings.items():
                for run, reading in enumerate(made):
                    changes = reading.answers(calls, other)
                    for side, change in zip(("query", "key"), changes, strict=True):
                        if getattr(reading.attention.site, f"{side}_layout") is None:
                            continue
                        expected = expected_at(reading.attention, side, frame, cell)
                        if expected is None:
                            continue
                        got = strongest(change)
                        answers[name, run, side, frame, cell] = got
                        if got == expected:
                            outcome.right += 1
                        else:
                            outcome.wrong.append(
                                f"{name} run {run}: {side} of frame {frame}, row {cell[0]}, "
                                f"col {cell[1]} is at {got}, said to be at {expected}"
                            )
    return answers


# -- the whole -------------------------------------------------------------------------------------


def told(report: str, module: str) -> bool:
    """Whether a report speaks of kernel calls seen outside all sites while a module ran."""
    return any(
        "outside" in line and re.search(rf"(?<![\w.]){re.escape(module)}(?![\w.])", line)
        for line in report.splitlines()
    )


def within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def account(
    calls: list[Call], captured: Any, entry: Model, outcome: Outcome
) -> dict[str, list[Reading]]:
    """Sort every kernel call into captured, refused, seen outside, no attention, or silent."""
    report = captured.report()
    sites = {site.path: site.name for site in captured._every} | {
        attention.site.path: name
        for name in captured
        if name not in outcome.refused
        for attention in _listed(captured[name])[:1]
    }
    left, readings = set(range(len(calls))), {}
    # Inner sites first: a call belongs to the innermost site around it.
    for path in sorted(sites, key=len, reverse=True):
        name, base = sites[path], path.partition("#")[0]
        mine = [n for n in sorted(left) if within(calls[n].module, base)]
        if not mine:
            continue
        if name in outcome.refused:
            outcome.calls_refused += len(mine)
            left -= set(mine)
            continue
        try:
            made = match(_listed(captured[name]), calls, mine)
        except VistvisError:
            continue
        if made:
            readings[name] = made
            outcome.calls_captured += len(mine)
            left -= set(mine)
        else:
            outcome.failures.append(
                f"{name}: captured {[tuple(a.shape) for a in _listed(captured[name])]}, "
                f"witness {[tuple(calls[n].weights.shape) for n in mine]}"
            )
    for number in sorted(left):
        module = calls[number].module
        if any(within(module, path) for path in entry.not_attention):
            outcome.calls_other += 1
        elif told(report, module):
            outcome.calls_outside += 1
        else:
            shape = "×".join(map(str, calls[number].weights.shape))
            outcome.silent.append(f"{module or type(entry).__name__} ({shape})")
    return readings


def _listed(value: Any) -> list[Attention]:
    return value if isinstance(value, list) else [value]


def measure(entry: Model, model: nn.Module, outcome: Outcome) -> None:
    """Fill in everything of one built model."""
    images = entry.pictures()
    sharp = prepare(model, entry, images)
    outcome.largest = (min(sharp.values()), max(sharp.values()))
    with torch.no_grad():
        plain = entry.run(model, images)
    _default_capture(entry, model, images, outcome)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captured = vistvis.capture(model, accumulate=True)
        try:
            calls, output = witnessed(model, lambda: entry.run(model, images))
        finally:
            captured.remove()
    if not same(plain, output):
        outcome.failures.append("output differs while the model is captured")
    if any(module.__dict__.get("forward") is not None for module in model.modules()) and (
        "forward" not in entry.note
    ):
        outcome.failures.append("a hook was left behind")
    outcome.calls = len(calls)
    _sites(captured, outcome)
    readings = account(calls, captured, entry, outcome)
    for name, made in readings.items():
        outcome.captured += 1
        for reading in made:
            try:
                compare(reading, calls, outcome)
            except Exception as error:
                outcome.failures.append(f"{name}: {type(error).__name__}: {error}")
                break

    def rerun(other: Tensor) -> list[Call]:
        return witnessed(model, lambda: entry.run(model, other))[0]

    answers = probe_places(entry, images, calls, readings, rerun, outcome)
    _figure(entry, model, images, outcome)
    for name in outcome.silent:
        outcome.failures.append(f"silent: {name}")
    outcome.failures += outcome.wrong
    if max(outcome.rows, outcome.columns) > TOLERANCE:
        outcome.failures.append(f"weights differ: {outcome.rows:.1e}, {outcome.columns:.1e}")
    del answers


def _default_capture(entry: Model, model: nn.Module, images: Tensor, outcome: Outcome) -> None:
    """`capture(model)`, as the README has it, must not raise."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with vistvis.capture(model):
                entry.run(model, images)
    except Exception as error:
        outcome.failures.append(f"capture(model): {type(error).__name__}: {error}")


def _sites(captured: Any, outcome: Outcome) -> None:
    outcome.found = len(captured._every)
    for site in captured._every:
        if site.refused:
            outcome.refused[site.name] = site.refused
    for name in captured:
        try:
            captured[name]
        except VistvisError as error:
            outcome.refused[name] = str(error)
    held = set(captured) | set(outcome.refused)
    outcome.idle = sum(site.name not in held for site in captured._every)


def _figure(entry: Model, model: nn.Module, images: Tensor, outcome: Outcome) -> None:
    draw = entry.draw or draw_last_blocks
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draw(model, images)
        outcome.figure = "drawn"
        if entry.refused:
            outcome.failures.append(f"figure drawn, expected a refusal: {entry.refused}")
    except Exception as error:
        outcome.figure = f"refused: {str(error).splitlines()[0]}"
        if not entry.refused:
            outcome.failures.append(f"figure: {type(error).__name__}: {error}")


def draw_last_blocks(model: nn.Module, images: Tensor, run: Any = None) -> None:
    """A figure of the last frame block and of the last global one."""
    from vggt_adapter import AttentionExtractor, visualize_attention_on_image

    with AttentionExtractor(model) as extractor:
        extractor.register_hooks()
        with torch.no_grad():
            run(model, images) if run else model(images)
        maps = extractor.get_attention_maps()
    last = {entry["layer_type"]: entry["attn_weights"] for entry in maps.values()}
    for kind in ("frame", "global"):
        layout = last[kind].site.query_layout
        token = layout.index(frame=layout.frames - 1, row=layout.grid[0] - 1, col=0)
        figure = visualize_attention_on_image(last[kind], images, token)
        assert figure is not None
