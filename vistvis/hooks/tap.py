"""Function modes that see which kernels a module calls: one for eager code, one for compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vistvis.hooks.changed import Change, changed_attention, changed_reading
from vistvis.hooks.flow import PRODUCTS, SOFTMAX, Flow
from vistvis.hooks.readings import SDPA, KernelReader, Notes, SdpaCall, autocast_dtype

_WATCHED = frozenset({SDPA, changed_attention, F.multi_head_attention_forward, *PRODUCTS, *SOFTMAX})


class KernelTap(TorchFunctionMode):
    """Reads the attention kernel calls of the module that runs while it is active.

    A call of `scaled_dot_product_attention` gives its queries and keys; eager code gives its
    weights (`Flow`). `active` says whether calls belong to this tap (False inside a nested site);
    functions in `instead` (of those watched) are run by another, which reads what they hide.
    """

    def __init__(
        self,
        reader: KernelReader,
        notes: Notes,
        *,
        active: Callable[[], bool],
        instead: Mapping[Callable[..., Any], Callable[..., Any]],
    ) -> None:
        super().__init__()
        self._reader, self._notes, self._active, self._instead = reader, notes, active, instead
        self._flow = Flow(reader, notes, active)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Every function of the module comes by here, reading a shape among them: what is of no
        # interest has to leave soon. (A global set: code that compiles itself is traced through
        # here, and Dynamo can't hash what an attribute of a mode holds.)
        kwargs = kwargs or {}
        if func not in _WATCHED and not self._flow.begun:
            return func(*args, **kwargs)
        if func is SDPA:
            out = SDPA(*args, **kwargs)
            if self._active():
                sdpa = self._reader.sdpa
                self._notes.take(
                    "kernel", lambda: sdpa(SdpaCall(*args, **kwargs), out, autocast_dtype(out))
                )
            return out
        if func is changed_attention:
            return self._changed(*args)
        if func in self._instead and self._active():
            return self._instead[func](*args, **kwargs)
        out = func(*args, **kwargs)
        self._flow.follow(func, args, kwargs, out)
        return out

    def _changed(self, call: SdpaCall, change: Change) -> Tensor:
        """A call that an intervention has changed: read with what was changed of its weights."""
        out = changed_attention(call, change.weighing)
        if self._active():
            reader, dtype = self._reader, autocast_dtype(out)
            self._notes.take("kernel", lambda: changed_reading(reader, call, change, out, dtype))
        return change.averaged(out)


class PassBegan(NamedTuple):
    """Compiled code: a forward of the watched model began."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class KernelRan(NamedTuple):
    """Compiled code: a site called its kernel."""

    site: str
    call: SdpaCall
    out: Tensor | None
    autocast: torch.dtype | None


class Hidden(NamedTuple):
    """Compiled code: a site ran whose kernel can't be seen there."""

    site: str


Event = PassBegan | KernelRan | Hidden


class CompiledTap(TorchFunctionMode):
    """Inside compiled code: only notes the kernel's arguments; they are read afterwards."""

    def __init__(self, events: list[Event], site: str, values: bool, outputs: bool) -> None:
        super().__init__()
        self.events, self.site, self.values, self.outputs = events, site, values, outputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is SDPA:
            call = SdpaCall(*args, **kwargs)
            # `autocast_dtype` in short: Dynamo traces this and can't follow the `try` in there.
            # What it compiles for has autocast.
            kind = call.query.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if not self.values:  # they would be kept alive for nothing
                call = call._replace(value=call.key)
            self.events.append(KernelRan(self.site, call, out if self.outputs else None, dtype))
        return out
