"""KeyboardInterrupt at every line of `vistvis.hooks` that a capture executes."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import vistvis.hooks
from vistvis import capture
from vistvis.hooks.kernels import EARS

HOOKS = str(Path(vistvis.hooks.__file__).parent)
EARLY = 12  # loops over thousands of loaded modules run the same lines


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class EagerAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Model(nn.Module):
    """A kernel, eager code, PyTorch's own module and a block, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.eager = EagerAttention()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.eager(self.attn(x))
        return self.blocks[0](x + self.mha(x, x, x, need_weights=False)[0])


def images(seed: int = 1) -> Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))


class Interrupter:
    """Raises KeyboardInterrupt at one line event in the hooks, or only counts them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.where = at, 0, ""
        self.seen: Counter[tuple[str, int]] = Counter()
        self.early: list[int] = []
        """Which events were a line's first ones."""

    def __enter__(self) -> Interrupter:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(HOOKS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.count += 1
            line = frame.f_code.co_filename, frame.f_lineno
            if self.at is None:
                self.seen[line] += 1
                if self.seen[line] <= EARLY:
                    self.early.append(self.count)
            elif self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def _with_block(model: nn.Module, **options: Any) -> None:
    with capture(model, **options) as captured:
        model(images())
        list(captured.values())


def _opened_and_closed(model: nn.Module, **options: Any) -> None:
    captured = capture(model, **options)
    try:
        model(images())
    finally:
        captured.close()


USES: dict[str, Callable[..., None]] = {"with": _with_block, "close": _opened_and_closed}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"accumulate": True, "verify": True},
    {"sites": "attn", "source": "projection"},
)


def _state() -> list[Any]:
    return [
        list(_get_current_function_mode_stack()),
        list(_get_current_dispatch_mode_stack()),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        EARS.stack,
    ]


def _on(model: nn.Module) -> list[list[str]]:
    return [
        [*sorted(module.__dict__), *map(str, module._forward_hooks), *map(str, module._buffers)]
        for module in model.modules()
    ]


def _try(model: nn.Module, plain: Tensor, use: Callable[..., None], at: int, **options: Any) -> str:
    """What is wrong after an interrupt at one line; empty if nothing is."""
    state, on = _state(), _on(model)
    with Interrupter(at) as interrupter, contextlib.suppress(KeyboardInterrupt):
        use(model, **options)
    wrong = []
    if _state() != state:
        wrong.append("modes, gradients or ears are not as before")
    if not torch.equal(model(images()), plain):
        wrong.append("another output")
    if _on(model) != on:
        wrong.append("something is left on the model after the next forward")
    with capture(model) as captured:
        model(images())
        if captured["attn"].shape != (1, 2, 5, 5) or captured.passes != 1:
            wrong.append("a later capture does not read")
    return f"{interrupter.where}: {'; '.join(wrong)}" if wrong else ""


def interrupt_at_every_line(*, step: int = 1) -> tuple[int, list[str]]:
    """Interrupt opening, running and closing at every `step`-th line executed in the hooks.

    Of a line only its first dozen executions count. Returns how many interrupts were tried, and
    what was wrong after those that left something: file and line, and what. Cost: some 20 ms a try.
    """
    tried, failures = 0, []
    for options in OPTIONS:
        for name, use in USES.items():
            torch.manual_seed(0)
            model = Model().eval()
            plain = model(images())
            use(model, **options)
            with Interrupter() as counter:
                use(model, **options)
            for at in counter.early[::step]:
                failure = _try(model, plain, use, at, **options)
                tried += 1
                if failure:
                    failures.append(f"{name} {options} {failure}")
                    model = Model().eval()
                    model.load_state_dict(_weights())
    gc.collect()
    return tried, failures


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Model().state_dict()
