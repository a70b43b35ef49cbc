"""How `Attention` passes for a tensor: torch, numpy and operators get its dense matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class TensorLike:
    """Whatever has a `shape` and can make itself `dense()`, used like a tensor."""

    shape: torch.Size

    def dense(self) -> Tensor:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, TensorLike):
                return value.dense()
            if isinstance(value, (list, tuple)) and any(isinstance(v, TensorLike) for v in value):
                return type(value)(real(v) for v in value)
            return value

        return func(*map(real, args), **{k: real(v) for k, v in (kwargs or {}).items()})

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError(
                "attention weights are computed when asked for: a copy can't be avoided"
            )
        array = self.dense().detach().cpu().numpy()
        return array if dtype is None else array.astype(dtype)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that the class does not have: tensor methods such as `.mean(1)`.
        if name == "layout":
            raise AttributeError(
                "Attention has two layouts, .query_layout and .key_layout: tokens of its rows and "
                "of its columns"
            )
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"Attention has no attribute {name!r}")
        if name.endswith("_") or not callable(getattr(Tensor, name)):
            raise AttributeError(
                f"Attention has no {name!r}; its weights are computed when asked for. "
                "Use .dense() for a tensor"
            )
        return functools.partial(self._tensor_method, name)

    def _tensor_method(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.dense(), name)(*args, **kwargs)


# Python looks operators up on the class, past `__getattr__`.
for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("radd", "rsub", "rmul", "rtruediv", "rpow", "rmatmul"),
    *("neg", "abs", "lt", "le", "gt", "ge"),
):
    _method = functools.partialmethod(TensorLike._tensor_method, f"__{_name}__")
    setattr(TensorLike, f"__{_name}__", _method)
