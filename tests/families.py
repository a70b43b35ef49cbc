"""Checking one model: every site exact against an independent reference, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import randomise_zeros, record_inputs, reference_weights, sharpen
from torch import Tensor, nn

import vistvis
from vistvis.errors import CaptureError
from vistvis.models.sites import Site

TOLERANCE = 1e-5
EPS = torch.finfo(torch.float32).eps


@dataclass
class SiteResult:
    """What came of one site."""

    name: str
    type: str
    kind: str
    source: str = ""
    difference: float = float("nan")
    largest: float = float("nan")
    allowed: float = TOLERANCE
    refused: str = ""
    wrong: str = ""

    @property
    def exact(self) -> bool:
        return not self.refused and not self.wrong and self.difference <= self.allowed


@dataclass
class Outcome:
    """What came of one model."""

    model: str
    family: str
    sites: list[SiteResult] = field(default_factory=list)
    unchanged: bool = False
    clean: bool = False

    def failures(self) -> list[str]:
        """Everything that is neither exact nor refused, and everything that was disturbed."""
        bad = [
            f"{self.model}: {s.name} ({s.type}): {s.wrong or f'off by {s.difference:.2g}'}"
            for s in self.sites
            if not s.exact and not s.refused
        ]
        if not self.unchanged:
            bad.append(f"{self.model}: its output changed")
        if not self.clean:
            bad.append(f"{self.model}: something was left on it")
        return bad


def prepare(model: nn.Module, run: Callable[[], Any] | None = None) -> nn.Module:
    """Ready to check: eval mode, no dead parameters, tables that show, calibrated batch norms."""
    model.requires_grad_(False)
    randomise_zeros(model)
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    if run is not None and norms:
        # Without statistics of its own, activations of an untrained network grow without end, and
        # logits of 10⁵ leave nothing to compare.
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        with torch.no_grad():
            run()
    model.eval()
    return model


def outputs_equal(first: Any, second: Any) -> bool:
    """Whether two nested outputs are equal bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second) or (
            first.shape == second.shape
            and torch.equal(first.isnan(), second.isnan())
            and torch.equal(first.nan_to_num(), second.nan_to_num())
        )
    if isinstance(first, dict):
        return all(outputs_equal(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return all(outputs_equal(a, b) for a, b in zip(first, second, strict=True))
    return True


def check_model(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    name: str,
    family: str,
    reference: Callable[[], dict[str, Tensor]] | None = None,
    sharpened: bool = True,
    most: int = 3,
) -> Outcome:
    """Capture every site of a model and compare with references.

    `reference` gives `{site name: (B, h, Nq, Nk)}`; by default a float64 copy of each module. Of
    many sites of one class, `most` are compared (the first ones, and the last).
    """
    outcome = Outcome(name, family)
    sites = vistvis.find_sites(model)
    readable = [site for site in sites if not site.refused]
    for site in sites:
        if site.refused:
            outcome.sites.append(SiteResult(site.name, site.type, site.kind, refused=site.refused))
    if not readable:
        outcome.unchanged = outcome.clean = True
        return outcome
    modules = {site.name: site.module for site in readable}

    def largest() -> dict[str, float]:
        with torch.no_grad():
            captured = vistvis.capture(model)
            run()
            captured.remove()
        found = {}
        for one in captured:
            try:
                found[one] = float(captured[one].dense().max())
            except CaptureError:
                continue
        return found

    if sharpened:
        sharpen(modules, largest)
    before = [(set(module.__dict__), len(module._forward_hooks)) for module in model.modules()]
    with torch.no_grad():
        plain = run()
        captured = vistvis.capture(model)
        try:
            watched = run()
        finally:
            captured.remove()
    outcome.unchanged = outputs_equal(plain, watched)
    after = [(set(module.__dict__), len(module._forward_hooks)) for module in model.modules()]
    outcome.clean = before == after and torch._C._len_torch_function_stack() == 0
    chosen = _sample(readable, most)
    expected = reference() if reference is not None else None
    inputs = {}
    if expected is None:
        with torch.no_grad():
            inputs = record_inputs({site.name: site.module for site in chosen}, run)
    for site in chosen:
        outcome.sites.append(_check_site(site, captured, inputs.get(site.name), expected))
    return outcome


def _sample(sites: list[Site], most: int) -> list[Site]:
    by_type: dict[str, list[Site]] = {}
    for site in sites:
        by_type.setdefault(site.type, []).append(site)
    chosen = []
    for same in by_type.values():
        chosen += same if len(same) <= most else [*same[: most - 1], same[-1]]
    return [site for site in sites if site in chosen]


def _check_site(
    site: Site,
    captured: vistvis.Capture,
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    expected: dict[str, Tensor] | None,
) -> SiteResult:
    result = SiteResult(site.name, site.type, site.kind)
    try:
        attention = captured[site.name]
    except CaptureError as error:
        result.refused = str(error).split(": ", 1)[-1]
        return result
    result.source = attention.site.source if attention.site else ""
    weights = attention.dense()
    result.largest = float(weights.max())
    if expected is not None:
        reference = expected[site.name].double()
    else:
        if inputs is None:
            result.wrong = "no inputs were seen"
            return result
        try:
            reference = reference_weights(site.module, *inputs, site.heads)
        except AssertionError as error:
            result.wrong = f"no reference: {error}"
            return result
    if reference.shape != weights.shape:
        result.wrong = f"shape {tuple(weights.shape)}, reference {tuple(reference.shape)}"
        return result
    result.difference = float((weights - reference).abs().max())
    if attention.weights is None:
        logits = attention.logits(None)
        size = float(logits[logits > -1e6].abs().max())  # masks of −10³⁸ say nothing
        result.allowed = max(TOLERANCE, 2 * EPS * size)
    # The comparison itself must be able to turn red.
    for dim, what in ((3, "a token shifted by one"), (1, "heads swapped")):
        if weights.shape[dim] > 1:
            broken = float((weights.roll(1, dim) - reference).abs().max())
            if not broken > 10 * result.allowed:
                result.wrong = f"{what} would not be noticed ({broken:.2g})"
    return result
