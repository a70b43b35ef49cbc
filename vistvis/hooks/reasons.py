"""Why a site has nothing to show."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vistvis.hooks.results import Call
from vistvis.models.code import reached_names
from vistvis.models.families import KERNELS
from vistvis.models.sites import Site, SiteList


def why_unseen(site: Site) -> str:
    """Why a site that ran showed no kernel call."""
    implementation = getattr(getattr(site.module, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa", "eager"):
        return (
            f"its kernel is {implementation!r}, and no call of it was seen; load the model with "
            'attn_implementation="sdpa"'
        )
    named = sorted((reached_names(site.module) & KERNELS) - {"scaled_dot_product_attention"})
    if named:
        return (
            f"ran without a kernel call that can be seen: its code names {', '.join(named)}, and "
            "no function of that name and signature was called; load it before capture(), or "
            "switch it off"
        )
    return (
        "ran without a kernel call that can be seen (no scaled_dot_product_attention or other "
        "known kernel, no softmax over a product of queries and keys)"
    )


def why_unfired(model: nn.Module, site: Site) -> str:
    """Why a site did not run, though its model did."""
    if compiles(model):
        return (
            "the model is compiled, and its compiled code does not call the module's forward; "
            "capture the model before torch.compile, or call torch._dynamo.reset() first"
        )
    return (
        f"its forward was never called (another branch of the model, a fused path that skips "
        f"{site.type}, or code that calls its parts directly)"
    )


def compiles(model: nn.Module) -> bool:
    """Whether a model or a part of it runs as compiled code."""
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def outside_lines(model: nn.Module, outside: Mapping[Call, int], every: SiteList) -> list[str]:
    """A line for what was seen outside of the sites of a capture; none if nothing was."""
    known = {site.path for site in every if not site.refused}
    mine = {call: count for call, count in outside.items() if call.name in known}
    lines = [
        f"seen outside all sites: {call.kernel}, while {call.name!r} ({call.type}) ran, "
        f"{count} time{'s' * (count > 1)}"
        for call, count in outside.items()
        if call not in mine
    ]
    if mine:
        names, calls = len({call.name for call in mine}), sum(mine.values())
        lines.append(
            f"{names} site{'s' * (names > 1)} not chosen made {calls} kernel "
            f"call{'s' * (calls > 1)}"
        )
    if compiles(model):
        lines.append("compiled code: kernel calls outside sites are not seen there")
    return lines
