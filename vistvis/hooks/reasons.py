"""Why a site has nothing to show."""

from __future__ import annotations

from torch import nn

from vistvis.models.code import reached_names
from vistvis.models.families import unreadable_packages
from vistvis.models.sites import Site


def why_unseen(site: Site) -> str:
    """Why a site that ran showed no kernel call."""
    unreadable = unreadable_packages(reached_names(type(site.module)))
    implementation = getattr(getattr(site.module, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa", "eager"):
        return (
            f"its kernel is {implementation!r}, which can't be read; load the model with "
            'attn_implementation="sdpa"'
        )
    if unreadable:
        return (
            f"ran without a kernel call that can be seen: it can call {', '.join(unreadable)}, "
            "which can't be read; switch that off"
        )
    return (
        "ran without a kernel call that can be seen (no scaled_dot_product_attention, no "
        "softmax over a product of queries and keys)"
    )


def why_unfired(model: nn.Module, site: Site) -> str:
    """Why a site did not run, though its model did."""
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return (
                "the model is compiled, and its compiled code does not call the module's forward; "
                "capture the model before torch.compile, or call torch._dynamo.reset() first"
            )
    return (
        f"its forward was never called (another branch of the model, a fused path that skips "
        f"{site.type}, or code that calls its parts directly)"
    )
