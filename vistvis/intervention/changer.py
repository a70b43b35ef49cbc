"""The function mode that changes the kernel call of the site that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vistvis.errors import SiteError
from vistvis.hooks.changed import Change, changed_attention, kernel
from vistvis.hooks.multihead import MULTIHEAD_FORWARD, relinked
from vistvis.hooks.readings import SDPA, SdpaCall
from vistvis.models.sites import Site

# A mask below this hides a key, as −inf does: what code writes that wants finite numbers.
_HIDES = -1e4


class Changer(TorchFunctionMode):
    """Changes the one kernel call of a run of a site, as `change_of` says of it."""

    def __init__(self, site: Site, change_of: Callable[[SdpaCall], Change]) -> None:
        super().__init__()
        self._site, self._change_of = site, change_of
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self._changed(SdpaCall(*args, **kwargs), None)
        if func is changed_attention:  # by an intervention that was opened before
            return self._changed(*args)
        if func is MULTIHEAD_FORWARD:
            return self._multihead(*args, **kwargs)
        return func(*args, **kwargs)

    def _changed(self, call: SdpaCall, before: Change | None) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise SiteError(
                f"site {self._site.name!r} calls its kernel more than once in a run, and which "
                "heads and tokens each call is about is not known; it can't be changed"
            )
        change = self._change_of(call)
        if not (change.modes or change.cuts):  # frame blocks within their frame
            return changed_attention(call, before) if before else kernel(call)
        if "uniform" in change.modes.values():
            self._check_mask(call.attn_mask)
        return changed_attention(call, before.then(change) if before else change)

    def _check_mask(self, mask: Tensor | None) -> None:
        if mask is None or mask.dtype == torch.bool:
            return
        if not bool(((mask == 0) | (mask <= _HIDES)).all()):
            raise SiteError(
                f'mode="uniform" needs to know which keys a query sees, and the kernel of site '
                f"{self._site.name!r} got numbers that are added to its logits (a position bias?); "
                'use mode="zero" or "mean"'
            )

    def _multihead(self, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's own multi-head attention: its code as it is, with its kernel call changed."""
        arguments = inspect.signature(MULTIHEAD_FORWARD).bind(*args, **kwargs)
        arguments.apply_defaults()
        if arguments.arguments["need_weights"]:
            raise SiteError(
                f"site {self._site.name!r} returns its weights, and computes them without a "
                "kernel; call it with need_weights=False"
            )
        made = relinked(
            MULTIHEAD_FORWARD,
            F,
            scaled_dot_product_attention=lambda *a, **k: self._changed(SdpaCall(*a, **k), None),
            has_torch_function=lambda tensors: False,  # or it would come by here again
        )
        return made(*args, **kwargs)
