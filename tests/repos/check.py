"""Measures one model: what is captured, refused, seen outside; rows, columns, places, figure."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import randomise_zeros, sharpen, sharpen_once
from torch import Tensor, nn

import vistvis
from vistvis.attention import Attention
from vistvis.errors import VistvisError
from vistvis.models.sites import SiteList

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
    gated = any(name.endswith(".gamma") for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if entry.stays is not None and name.endswith(".gamma"):
                parameter.fill_(entry.stays)
            # Where blocks have no gates, what they add is made small at its source.
            ends = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            if entry.stays is not None and ends and not gated:
                parameter.mul_(2 * entry.stays)
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


def told(report: str) -> Counter[str]:
    """How many kernel calls a report says were seen outside all sites, by running module."""
    lines = re.findall(
        r"outside all sites: .* while '(.*?)' .* (\d+) times?$", report, re.MULTILINE
    )
    counts: Counter[str] = Counter()
    for module, count in lines:
        counts[module] += int(count)
    return counts


def within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def account(
    sites: SiteList, calls: list[Call], captured: Any, entry: Model, outcome: Outcome
) -> dict[str, list[Reading]]:
    """Sort every kernel call into captured, refused, seen outside, no attention, or silent."""
    names = {site.name: site.path for site in sites} | {name: name for name in captured}
    # Calls that no site claims are kept under their module's name, the second under `name#2`.
    owners: dict[str, list[str]] = {}
    for name, path in names.items():
        owners.setdefault(path.partition("#")[0], []).append(name)
    left, readings = set(range(len(calls))), {}
    # Inner sites first: a call belongs to the innermost site around it.
    for base in sorted(owners, key=len, reverse=True):
        every = [n for n in sorted(left) if within(calls[n].module, base)]
        for at, name in enumerate(owners[base]):
            mine = every[at :: len(owners[base])]
            if mine and name in outcome.refused:
                outcome.calls_refused += len(mine)
                left -= set(mine)
            elif mine and name in captured:
                attention = _listed(captured[name])
                made = match(attention, calls, mine)
                if made:
                    readings[name] = made
                    outcome.calls_captured += len(mine)
                    left -= set(mine)
                else:
                    outcome.failures.append(
                        f"{name}: captured {[tuple(one.shape) for one in attention]}, "
                        f"witness {[tuple(calls[n].weights.shape) for n in mine]}"
                    )
    counts = told(captured.report())
    for number in sorted(left):
        module = around = calls[number].module
        while around and not counts[around]:
            around = around.rpartition(".")[0]
        if any(within(module, path) for path in entry.not_attention):
            outcome.calls_other += 1
        elif counts[around]:
            counts[around] -= 1
            outcome.calls_outside += 1
        else:
            shape = "×".join(map(str, calls[number].weights.shape))
            outcome.silent.append(f"{module or 'the model'} ({shape})")
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
    sites = vistvis.find_sites(model)
    _sites(sites, captured, outcome)
    readings = account(sites, calls, captured, entry, outcome)
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


def _sites(sites: SiteList, captured: Any, outcome: Outcome) -> None:
    outcome.found = len(sites)
    for site in sites:
        if site.refused:
            outcome.refused[site.name] = site.refused
    for name in captured:
        try:
            captured[name]
        except VistvisError as error:
            outcome.refused[name] = str(error)
    held = set(captured) | set(outcome.refused)
    outcome.idle = sum(site.name not in held for site in sites)


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
