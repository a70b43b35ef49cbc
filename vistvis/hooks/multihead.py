"""`nn.MultiheadAttention` and the fused encoder layer: read without changing what they run.

A function mode would switch off their fused paths, and forcing `need_weights` would change how the
output is computed. So their own Python code runs, as it is, with a few names of its module looked
up here instead: the kernel calls in it pass through a recorder. The fused native kernels take
weights of the projection whole; there, queries and keys are projected once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules import activation, transformer

from vistvis.attention import Attention
from vistvis.hooks.folding import UnreadableError
from vistvis.hooks.readings import (
    SDPA,
    Keeping,
    KernelReader,
    Notes,
    Reading,
    SdpaCall,
    autocast_dtype,
    keep,
)

MULTIHEAD_FORWARD = F.multi_head_attention_forward


class _Namespace:
    """A module with some of its names replaced."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def relinked(function: Any, module: Any, **replaced: Any) -> Any:
    """The same code, with some of its module's names looked up elsewhere."""
    names = {**module.__dict__, **replaced}
    made = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class MultiheadReader:
    """Runs PyTorch's multi-head attention code and records the kernel call in it."""

    def __init__(self, keeping: Keeping) -> None:
        self.keeping, self.notes = keeping, Notes()
        self._heads = 1
        self._soft: Tensor | None = None

    def can_run(self, original: Any) -> bool:
        """Whether `original` is PyTorch's own code."""
        own = (nn.MultiheadAttention.forward, nn.TransformerEncoderLayer.forward)
        return isinstance(original, MethodType) and original.__func__ in own

    def run(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the `forward` of an `nn.MultiheadAttention` or `nn.TransformerEncoderLayer`."""
        native = _Namespace(
            torch,
            _native_multi_head_attention=self._native,
            _transformer_encoder_layer_fwd=self._encoder_layer,
        )
        if original.__func__ is nn.TransformerEncoderLayer.forward:
            made = relinked(original.__func__, transformer, torch=native)
        else:
            functions = _Namespace(F, multi_head_attention_forward=self.multi_head_attention)
            made = relinked(original.__func__, activation, torch=native, F=functions)
        return made(original.__self__, *args, **kwargs)

    def multi_head_attention(self, *args: Any, **kwargs: Any) -> Any:
        """`F.multi_head_attention_forward`, recorded."""
        self._heads = kwargs["num_heads"] if "num_heads" in kwargs else args[4]
        made = relinked(
            MULTIHEAD_FORWARD,
            F,
            scaled_dot_product_attention=self._sdpa,
            softmax=self._softmax,
            dropout=self._dropout,
            torch=_Namespace(torch, bmm=self._bmm),
        )
        return made(*args, **kwargs)

    def _sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        out = SDPA(*args, **kwargs)
        reader = KernelReader(self.keeping, self._heads)
        self._record(lambda: reader.sdpa(SdpaCall(*args, **kwargs), out, autocast_dtype(out)))
        return out

    def _softmax(self, scores: Tensor, dim: int) -> Tensor:
        self._soft = F.softmax(scores, dim=dim)
        return self._soft

    def _dropout(self, weights: Tensor, p: float) -> Tensor:
        self.notes.problems.append(f"dropout is active on its weights (p={p:g}); call model.eval()")
        return F.dropout(weights, p=p)

    def _bmm(self, first: Tensor, second: Tensor) -> Tensor:
        out = torch.bmm(first, second)
        if first is self._soft:
            self._soft = None
            reader = KernelReader(self.keeping, self._heads)
            self._record(lambda: reader.weights(first, second, out, source="module"))
        return out

    def _native(self, *args: Any) -> Any:
        out = torch._native_multi_head_attention(*args)
        query, heads, weight, bias, mask, kind = args[0], *args[4:7], args[9], args[12]
        self._record(lambda: self._projected(query, weight, bias, heads, mask, kind))
        return out

    def _encoder_layer(self, src: Tensor, width: int, heads: int, *rest: Any) -> Any:
        out = torch._transformer_encoder_layer_fwd(src, width, heads, *rest)
        weight, bias, norm_first, eps, norm_weight, norm_bias = *rest[:2], *rest[5:9]
        mask, kind = rest[-2:]

        def read() -> Reading:
            x = F.layer_norm(src, (width,), norm_weight, norm_bias, eps) if norm_first else src
            return self._projected(x, weight, bias, heads, mask, kind)

        self._record(read)
        return out

    def _projected(
        self, x: Tensor, weight: Tensor, bias: Tensor, heads: int, mask: Any, kind: Any
    ) -> Reading:
        """Queries, keys and values of fused kernels, which don't show theirs: projected again."""
        keys: Tensor | None = None
        if x.is_nested:
            lengths = torch.tensor([len(one) for one in x.unbind()], device=x.device)
            x = x.to_padded_tensor(0.0)
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            # Padding is no token here: its rows are empty, as its columns are.
            keys = real[:, None, None, :] & real[:, None, :, None]
        elif mask is not None:
            keys = _native_mask(mask, kind)
        if self.keeping.outputs:
            raise UnreadableError(
                "verify=True can't see what PyTorch's fused native kernel gives before its "
                "projection; call torch.backends.mha.set_fastpath_enabled(False) to verify"
            )
        parts = 3 if self.keeping.values else 2
        rows = parts * x.shape[-1]
        made = F.linear(x, weight[:rows], bias[:rows])
        made = rearrange(made, "b n (parts h d) -> parts b h n d", parts=parts, h=heads)
        query, key, *value = (keep(one, None, self.keeping.device) for one in made)
        attention = Attention(
            query=query,
            key=key,
            mask=None if keys is None else self.keeping.mask(keys, None),
            value=value[0] if value else None,
        )
        return Reading(attention, "module")

    def _record(self, read: Callable[[], Reading]) -> None:
        with torch.no_grad():
            self.notes.take("module", read)


def _native_mask(mask: Tensor, kind: int) -> Tensor:
    """The mask of the native kernels, as `scaled_dot_product_attention` would take it."""
    if mask.dtype == torch.bool:
        mask = ~mask  # here True leaves a key out
    # Kind 1: one row of keys for each batch item.
    return mask[:, None, None, :] if kind == 1 else mask


def encoder_layers(
    model: nn.Module, attentions: Sequence[nn.Module]
) -> list[nn.TransformerEncoderLayer]:
    """Encoder layers whose fused path would skip the forward of one of these modules."""
    watched = {id(module) for module in attentions}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and type(module).forward is nn.TransformerEncoderLayer.forward
        and id(module.self_attn) in watched
    ]


def fused_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that run otherwise under a function mode: with a fused path, or compiled."""

    def fused(module: nn.Module) -> bool:
        if isinstance(module, nn.TransformerEncoderLayer):
            return isinstance(module.self_attn, nn.MultiheadAttention)
        if isinstance(module, nn.TransformerEncoder):
            return bool(getattr(module, "use_nested_tensor", False))
        return isinstance(module, nn.MultiheadAttention) or (
            type(module).__name__ == "OptimizedModule"
        )

    return [module for module in (*model.modules(), *_hidden(model)) if fused(module)]


def _hidden(model: nn.Module) -> Iterator[nn.Module]:
    """Modules in plain lists, tuples and dicts, which `modules()` does not give."""
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) not in (list, tuple, dict) or name == "_modules":
                continue
            for one in value.values() if isinstance(value, dict) else value:
                if isinstance(one, nn.Module):
                    yield from one.modules()
