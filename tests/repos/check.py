"""Measures one model: what is captured, refused, seen outside; rows, columns, places, figure."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import randomise_zeros, sharpen, sharpen_once
from torch import Tensor, nn

import vistvis
from vistvis.attention import Attention
from vistvis.errors import VistvisError

from .model import Model
from .places import Places
from .readings import Reading, largest_errors, match
from .witness import Call, witnessed

TOLERANCE = 2e-5


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
    values: int = 0
    """Numbers of figures that are the witness's weight between the two dyed tokens."""
    unvalued: dict[str, str] = field(default_factory=dict)
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
            # Tokens of almost nothing would answer to anything, once they are normalised.
            if "token" in name and parameter.std() < 0.1:
                parameter.normal_()
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
            # A row that a mask leaves one key only is 1 whatever the weights are.
            free = (call.weights > 0).sum(-1, keepdim=True) > 1
            found[name] = max(found.get(name, 0.0), float((call.weights * free).max()))
        return found

    names = [name for name in largest() if name]
    return sharpen({name: owners[name] for name in names}, largest, steps=30)


# -- the whole -------------------------------------------------------------------------------------


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
    images, before = entry.pictures(), _own_forwards(model)
    sharp = prepare(model, entry, images)
    outcome.largest = (min(filter(None, sharp.values())), max(sharp.values()))
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
    if _own_forwards(model) != before:
        outcome.failures.append("a hook was left behind")
    outcome.calls = len(calls)
    _sites(captured, outcome)
    readings = account(calls, captured, entry, outcome)
    for name, made in readings.items():
        outcome.captured += 1
        for reading in made:
            try:
                rows, columns = largest_errors(reading, calls)
            except Exception as error:
                outcome.failures.append(f"{name}: {type(error).__name__}: {error}")
                break
            outcome.rows, outcome.columns = max(outcome.rows, rows), max(outcome.columns, columns)

    def rerun(other: Tensor) -> list[Call]:
        return witnessed(model, lambda: entry.run(model, other))[0]

    _places(entry, Places(images, entry.patch, calls, readings, rerun, entry.steps), outcome)
    _figure(entry, model, images, outcome)
    for name in outcome.silent:
        outcome.failures.append(f"silent: {name}")
    if max(outcome.rows, outcome.columns) > TOLERANCE:
        outcome.failures.append(f"weights differ: {outcome.rows:.1e}, {outcome.columns:.1e}")


def _own_forwards(model: nn.Module) -> list[object]:
    """What sits on the instances in place of their class's forward, and their hooks."""
    return [
        (vars(one).get("forward"), len(one._forward_hooks), len(one._forward_pre_hooks))
        for one in model.modules()
    ]


def _places(entry: Model, places: Places, outcome: Outcome) -> None:
    """Where tokens lie: each said place measured, and the figure's numbers with it."""
    for name, made in places.readings.items():
        site = made[0].attention.site
        if site is None or site.query_layout is None or site.key_layout is None:
            outcome.no_layout.append(name)
    for step in (places.probe, places.probe_registers, places.check_values):
        try:
            step()
        except Exception as error:
            outcome.failures.append(f"{step.__name__}: {type(error).__name__}: {error}")
    outcome.right, outcome.values = places.right, places.values
    outcome.wrong, outcome.unvalued = places.wrong, places.unvalued
    outcome.failures += places.wrong


def _default_capture(entry: Model, model: nn.Module, images: Tensor, outcome: Outcome) -> None:
    """`capture(model)`, as the README has it, raises nothing but what is known."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            with vistvis.capture(model):
                entry.run(model, images)
    except Exception as error:
        if (
            not isinstance(error, VistvisError)
            or not entry.raises
            or entry.raises not in str(error)
        ):
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome.figure = entry.draw(model, images, entry.run)
        if entry.refused:
            outcome.failures.append(f"figure drawn, expected a refusal: {entry.refused}")
    except Exception as error:
        outcome.figure = f"refused: {str(error).splitlines()[0]}"
        if not entry.refused:
            outcome.failures.append(f"figure: {type(error).__name__}: {error}")
