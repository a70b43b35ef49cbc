"""Why a site has nothing to show."""

from __future__ import annotations

from torch import nn

from vistvis.models.sites import Site


def why_unseen(site: Site) -> str:
    """Why a site that ran showed no kernel call."""
    implementation = getattr(getattr(site.module, "config", None), "_attn_implementation", None)
    if implementation not in (None, "sdpa", "eager"):
        return (
            f"its kernel is {implementation!r}, and no call of it was seen; load the model with "
            'attn_implementation="sdpa"'
        )
    return (
        "ran without a kernel call that can be seen (no scaled_dot_product_attention or other "
        "known kernel, no softmax over a product of queries and keys)"
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
