"""What is around a kernel call: queries that it did not get, modules that iterate, models that
overflow. Each miniature has a twin that must go through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vistvis
from vistvis.errors import CaptureError, VistvisWarning


class Opaque(torch.autograd.Function):
    """Attention by code that no torch function shows."""

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.from_numpy(F.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1).numpy() @ v.numpy())


class Sparse(nn.Module):
    """The first queries by the fused kernel, the rest by other code: as block-sparse forks do."""

    def __init__(self, special: int) -> None:
        super().__init__()
        self.num_heads, self.special = 2, special
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, 2, 8).permute(2, 0, 3, 1, 4)
        first = F.scaled_dot_product_attention(q[:, :, : self.special], k, v)
        parts = [first]
        if self.special < count:
            parts.append(Opaque.apply(q[:, :, self.special :], k, v))
        return self.proj(torch.cat(parts, 2).transpose(1, 2).reshape(batch, count, width))


@pytest.mark.parametrize("verify", [False, True])
def test_a_call_for_some_of_the_queries_is_refused(verify: bool) -> None:
    model, x = Sparse(special=2).eval(), torch.randn(1, 10, 16)
    capture = vistvis.capture(model, verify=verify)
    with torch.no_grad():
        plain = Sparse.forward(model, x)
        assert torch.equal(model(x), plain)
    with pytest.raises(CaptureError, match="kernel saw 2 of the 10 queries"):
        capture["Sparse"]
    assert "2 of the 10" in capture.report()
    capture.close()


def test_a_call_for_all_of_them_is_not() -> None:
    with torch.no_grad(), vistvis.capture(Sparse(special=10).eval(), verify=True) as captured:
        captured._model(torch.randn(3, 10, 16))
    assert captured["Sparse"].shape == (3, 2, 10, 10)


class Pooled(Sparse):
    """Queries are pooled, and as many tokens come out: rows are what the module returns."""

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q = q.unflatten(2, (-1, 2)).mean(3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_pooled_queries_are_those_that_come_out() -> None:
    with torch.no_grad(), vistvis.capture(Pooled(0).eval(), verify=True) as captured:
        assert captured._model(torch.randn(2, 10, 16)).shape == (2, 5, 16)
    assert captured["Pooled"].shape == (2, 2, 5, 10)


class Iterating(nn.Module):
    """A trunk, and a head that runs its own attention several times: as VGGT's camera head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Sparse(special=6), Sparse(special=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        for _ in range(4):
            x = x + self.head(x)
        return x


def test_a_head_that_iterates_does_not_spoil_the_rest() -> None:
    model, x = Iterating().eval(), torch.randn(1, 6, 16)
    with (
        pytest.warns(VistvisWarning, match="'head': ran 4 times in one forward pass"),
        torch.no_grad(),
        vistvis.capture(model) as captured,
    ):
        model(x)
    assert captured["trunk"].shape == (1, 2, 6, 6)
    with pytest.raises(CaptureError, match="ran 4 times"):
        captured["head"]
    with torch.no_grad(), vistvis.capture(model, accumulate=True) as several:
        model(x)
    assert [len(several[name]) for name in several] == [1, 4]


def test_a_head_that_was_asked_for_by_name_is_an_error() -> None:
    model = Iterating().eval()
    with pytest.raises(CaptureError, match="'head': ran 4 times"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, ["trunk", "head"]):
            model(torch.randn(1, 6, 16))


def test_verify_tells_a_model_that_overflows_from_a_wrong_reading() -> None:
    model, x = Sparse(special=6).eval(), torch.randn(1, 6, 16)
    x[0, 3] = torch.inf
    with pytest.raises(CaptureError, match="the model itself gives NaN"):  # noqa: SIM117
        with torch.no_grad(), vistvis.capture(model, verify=True):
            model(x)
