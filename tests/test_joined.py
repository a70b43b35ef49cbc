"""Kernel calls that together are one, both directions of a cross block, softmax over the queries.

What each kernel call got is noted under the capture, and computed once more in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import reference_weights
from torch import Tensor, nn

import vistvis
from vistvis import Attention
from vistvis.errors import CaptureError
from vistvis.hooks import finishing, joining, readings

HEADS, WIDTH = 2, 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(*args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **kwargs)


class Block(nn.Module):
    """Projections in one of the usual memory layouts, and an attention of the test's own."""

    def __init__(self, attend: Attend, layout: str = "fused") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.attend, self.layout = HEADS, attend, layout
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        nn.init.normal_(self.qkv.weight, std=0.6)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, WIDTH)
        if self.layout == "fused":
            return made.permute(2, 0, 3, 1, 4).unbind(0)
        if self.layout == "one storage":
            return made.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        if self.layout == "tokens first":
            return tuple(t.transpose(1, 2) for t in made.permute(2, 0, 1, 3, 4).clone().unbind(0))
        return tuple(t.contiguous() for t in made.permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x: Tensor) -> Tensor:
        if x is None:
            return F.scaled_dot_product_attention(x, x, x).softmax(-1)
        q, k, v = self.heads(x)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


LAYOUTS = ["fused", "one storage", "tokens first", "apart"]


def run(attend: Attend, *, batch: int = 2, tokens: int = 10, layout: str = "fused") -> Attention:
    model = Block(attend, layout).eval()
    x = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
        with vistvis.capture(model, verify=True) as captured:
            assert torch.equal(model(x), plain)
    with torch.inference_mode(), vistvis.capture(model) as again:
        model(x)
    assert torch.allclose(again["Block"].rows(None), captured["Block"].rows(None), atol=1e-6)
    return captured["Block"]


def whole(*, batch: int = 2, tokens: int = 10, **more: Any) -> Tensor:
    """The weights of one call on all tokens, in float64."""
    model = Block(sdpa).eval()
    x = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        q, k, _ = model.heads(x)
    weights = reference_weights(q, k, **more)
    assert weights.max() > 0.3
    return weights


def within(lengths: list[int], weights: Tensor) -> Tensor:
    """Only the blocks along the diagonal, each normalised for itself."""
    allowed = torch.block_diag(*[torch.ones(n, n) for n in lengths]).double()
    kept = weights * allowed
    return kept / kept.sum(-1, keepdim=True)


def close(attention: Attention, wanted: Tensor) -> None:
    assert attention.shape == wanted.shape
    torch.testing.assert_close(attention.rows(None).double(), wanted, atol=1e-5, rtol=0)


def by_queries(*lengths: int, **more: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(part, k, v, **more) for part in q.split(lengths, 2)], 2)

    return attend


def by_windows(*lengths: int, **more: Any) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part, **more) for part in parts], 2)

    return attend


# -- chunks of queries ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 4, 2), (9, 1)])
def test_chunks_of_queries_are_one_attention(
    lengths: tuple[int, ...], batch: int, layout: str
) -> None:
    attention = run(by_queries(*lengths), batch=batch, layout=layout)
    close(attention, whole(batch=batch))
    assert attention.segments is None


def test_keys_of_chunks_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = readings.Notes._sharing_keys

    def watched(self: Any, reading: Any) -> Any:
        shared = original(self, reading)
        made.append(shared.attention.key)
        return shared

    monkeypatch.setattr(readings.Notes, "_sharing_keys", watched)
    run(by_queries(2, 2, 2, 2, 2))
    assert len({key.data_ptr() for key in made[:5]}) == 1


def test_chunks_with_their_rows_of_a_mask() -> None:
    mask = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[..., 0] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [slice(0, 4), slice(4, 10)]
        return torch.cat([sdpa(q[:, :, r], k, v, attn_mask=mask[:, :, r]) for r in rows], 2)

    close(run(attend), whole(mask=mask))


def test_chunks_with_one_mask_of_keys() -> None:
    mask = (torch.arange(10) < 7)[None, None, None]
    attention = run(by_queries(4, 4, 2, attn_mask=mask))
    close(attention, whole(mask=mask))
    assert attention.mask is not None
    assert attention.mask.numel() == 10


def test_keys_that_are_made_again_for_each_chunk() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(part, k.clone(), v) for part in q.split(5, 2)], 2)

    close(run(attend), whole())


# -- windows and pictures ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 1, 3, 2), (8, 2)])
def test_calls_on_ranges_of_tokens_are_segments(
    lengths: tuple[int, ...], batch: int, layout: str
) -> None:
    attention = run(by_windows(*lengths), batch=batch, layout=layout)
    close(attention, within(list(lengths), whole(batch=batch)))
    assert attention.segments is not None
    assert attention.segments.diff().tolist() == list(lengths[:-1])


def test_windows_of_one_size_taken_one_by_one() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (5, 2)) for t in (q, k, v))
        return torch.cat([sdpa(q[:, :, i], k[:, :, i], v[:, :, i]) for i in range(5)], 2)

    close(run(attend), within([2] * 5, whole()))


def test_windows_that_are_causal() -> None:
    lower = torch.ones(10, 10).tril().bool()
    weights = within([4, 6], whole(mask=lower))
    close(run(by_windows(4, 6, is_causal=True)), weights)


def test_windows_alike_are_no_chunks_of_queries() -> None:
    """Equal keys in every window: still the keys of its own."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k[:, :, :5].repeat(1, 1, 2, 1)
        return by_windows(5, 5)(q, k, v)

    attention = run(attend)
    assert attention.shape == (2, HEADS, 10, 10)
    assert attention.segments is not None


# -- pictures of a batch, heads ------------------------------------------------------------------


def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))])


def each_without_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([sdpa(*one) for one in zip(q, k, v, strict=True)])


def pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(*two) for two in zip(*(t.split(2) for t in (q, k, v)), strict=True)])


def each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([sdpa(q[:, i], k[:, i], v[:, i]) for i in range(HEADS)], 1)


def each_head_kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slices = [slice(i, i + 1) for i in range(HEADS)]
    return torch.cat([sdpa(q[:, i], k[:, i], v[:, i]) for i in slices], 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [2, 3, 4])
@pytest.mark.parametrize(
    "attend", [each, each_without_batch, pairs, each_head, each_head_kept], ids=lambda f: f.__name__
)
def test_pictures_and_heads_one_by_one(attend: Attend, batch: int, layout: str) -> None:
    close(run(attend, batch=batch, layout=layout), whole(batch=batch))


def test_pictures_with_masks_of_their_own() -> None:
    mask = torch.arange(10)[None] < torch.tensor([7, 10, 4])[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(q.split(1), k.split(1), v.split(1), mask, strict=True)
        return torch.cat([sdpa(*part, attn_mask=keys[None]) for *part, keys in parts])

    attention = run(attend, batch=3)
    close(attention, whole(batch=3, mask=mask[:, None, None]))
    assert attention.mask is not None
    assert attention.mask.shape[2] == 1


# -- eager code ----------------------------------------------------------------------------------


def soft(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * WIDTH**-0.5).softmax(-1)


def eager_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([soft(q[:, i], k[:, i]) @ v[:, i] for i in range(HEADS)], 1)


def eager_slices(count: int) -> Attend:
    """Slices of batch · heads, as diffusers' sliced attention does."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
        out = torch.empty_like(flat[0])
        for start in range(0, len(out), count):
            part = slice(start, start + count)
            out[part] = torch.bmm(soft(flat[0][part], flat[1][part]), flat[2][part])
        return out.view(q.shape)

    return attend


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("attend", [eager_heads, eager_slices(1), eager_slices(2), eager_slices(3)])
def test_eager_slices_are_one(attend: Attend, batch: int, layout: str) -> None:
    attention = run(attend, batch=batch, layout=layout)
    close(attention, whole(batch=batch))
    assert attention.weights is not None


# -- what is refused -----------------------------------------------------------------------------


def copies(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(10).chunk(2)
    return torch.cat([sdpa(*(t.index_select(2, i) for t in (q, k, v))) for i in index], 2)


def out_of_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    second, first = sdpa(q[:, :, 5:], k, v), sdpa(q[:, :, :5], k, v)
    return torch.cat([first, second], 2)


def overlapping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = sdpa(q[:, :, :6], k, v), sdpa(q[:, :, 5:], k, v)
    return torch.cat([first, second[:, :, 1:]], 2)


def not_covering(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(q[:, :, :3], k, v), sdpa(q[:, :, 3:8], k, v), v[:, :, 8:]], 2)


def not_from_the_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([v[:, :, :2], sdpa(q[:, :, 2:5], k, v), sdpa(q[:, :, 5:], k, v)], 2)


def other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(q[:, :, :5], k, v), sdpa(q[:, :, 5:], k + 1, v)], 2)


def causal_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_queries(5, 5, is_causal=True)(q, k, v)


def windows_with_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_windows(5, 5, attn_mask=torch.ones(5, 5).bool())(q, k, v)


def other_windows_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat(
        [sdpa(q[:, :, :4], k[:, :, :6], v[:, :, :6]), sdpa(*(t[:, :, 4:] for t in (q, k, v)))], 2
    )


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v) + sdpa(q, k, v)


def one_picture_missing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([each(q[:2], k[:2], v[:2]), v[2:]])


@pytest.mark.parametrize(
    ("attend", "text"),
    [
        (copies, "made 2 .* of 5, 5 queries on 5 keys, which are no slices of one tensor"),
        (out_of_order, "of 5, 5 queries on 10 keys"),
        (overlapping, "of 6, 5 queries on 10 keys"),
        (not_covering, "of 3, 5 queries on 10 keys, .* in order and covering it"),
        (not_from_the_first, "of 3, 5 queries on 10 keys"),
        (other_keys, "of 5, 5 queries on 10 keys"),
        (causal_chunks, "of 5, 5 queries on 10 keys"),
        (windows_with_masks, "of 5, 5 queries on 5 keys"),
        (other_windows_of_keys, "of 4, 6 queries on 6 keys"),
        (twice, "made 2 attention kernel calls in one run, of 10, 10 queries on 10 keys"),
        (one_picture_missing, "of 10, 10 queries on 10 keys"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_that_are_no_one_are_refused(attend: Attend, text: str, layout: str) -> None:
    with pytest.raises(CaptureError, match=text):
        run(attend, batch=4 if attend is one_picture_missing else 2, layout=layout)


def test_scales_that_differ_are_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q[:, :, :5], k, v), sdpa(q[:, :, 5:], k, v, scale=1.0)], 2)

    with pytest.raises(CaptureError, match="its 2 kernel calls are not alike"):
        run(attend)


@pytest.mark.parametrize(
    "attend",
    [by_queries(5, 5), by_windows(4, 6), each, each_without_batch, each_head, eager_slices(2)],
)
def test_verify_sees_parts_in_the_wrong_order(
    attend: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = joining._combined

    def turned(parts: Any, cat: Any, **options: Any) -> Any:
        right = original(parts, cat, **options)
        wrong = original([*parts[1:], parts[0]], cat, **options)
        attention = wrong.attention.replace(value=right.attention.value)
        return readings.Reading(attention, right.source, right.output)

    monkeypatch.setattr(joining, "_combined", turned)
    with pytest.raises(CaptureError, match="differs from the kernel's output"):
        run(attend)


def test_a_wrong_start_of_a_window_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "accumulate", lambda lengths: [n + 1 for n in lengths])
    with pytest.raises(CaptureError, match="differs from the kernel's output"):
        run(by_windows(4, 6))


# -- which side the softmax runs over ------------------------------------------------------------


def heads_last(dim: int) -> Attend:
    """Scores `(B, L, S, H)`, as LoFTR's full attention has them."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.einsum("nlhd,nshd->nlsh", q, k)
        weights = torch.softmax(WIDTH**-0.5 * scores, dim=dim)
        return torch.einsum("nlsh,nshd->nlhd", weights, v).transpose(1, 2)

    return attend


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * WIDTH**-0.5).softmax(-2) @ v


def over_queries_that_lie_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * WIDTH**-0.5).softmax(-1).mT @ v


def over_keys_that_lie_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.mT * WIDTH**-0.5).softmax(-2).mT @ v


@pytest.mark.parametrize("attend", [heads_last(2), heads_last(-2), over_keys_that_lie_first])
def test_keys_may_lie_anywhere(attend: Attend) -> None:
    close(run(attend), whole())


@pytest.mark.parametrize("attend", [heads_last(1), over_queries, over_queries_that_lie_last])
def test_a_softmax_over_the_queries_is_no_row(attend: Attend) -> None:
    with pytest.raises(CaptureError, match="its softmax runs over the queries, so columns sum"):
        run(attend)


def test_a_softmax_over_the_heads_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"softmax runs over dimension 3 of .*not over the keys"):
        run(heads_last(3))


# -- both directions -----------------------------------------------------------------------------


class CrossBlock(nn.Module):
    """Two sets of tokens that see each other, from one product: as LightGlue does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.way = HEADS, way
        self.to_qk, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16)
        nn.init.normal_(self.to_qk.weight, std=0.7)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        made = (self.to_qk(x), self.to_v(x))
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in made)  # type: ignore[return-value]

    def forward(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        (qk0, v0), (qk1, v1) = self.split(x0), self.split(x1)
        if self.way == "kernel":
            m0, m1 = sdpa(qk0, qk1, v1), F.scaled_dot_product_attention(qk1, qk0, v0)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", qk0 * 8**-0.25, qk1 * 8**-0.25)
            there = F.softmax(scores, dim=-1)
            if self.way == "transposed":
                back = F.softmax(scores.transpose(-2, -1).contiguous(), dim=-1)
            elif self.way == "other axis":
                back = F.softmax(scores, dim=-2).mT
            else:  # once more the same
                back = F.softmax(scores * 0.5, dim=-1)
            m0 = torch.einsum("bhij,bhjd->bhid", there, v1)
            if self.way == "same":
                m1 = torch.einsum("bhij,bhjd->bhid", back, v1)
            else:
                m1 = torch.einsum("bhji,bhjd->bhid", back.transpose(-2, -1), v0)
        return m0.transpose(1, 2).flatten(2), m1.transpose(1, 2).flatten(2)


def both(way: str, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    settled: list[Any] = []
    original = finishing.settle

    def watched(*args: Any) -> Any:
        found = original(*args)
        settled.extend(found)
        return found

    monkeypatch.setattr(finishing, "settle", watched)
    model = CrossBlock(way).eval()
    x0, x1 = (torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in counts)
    with torch.no_grad(), vistvis.capture(model, verify=True) as captured:
        model(x0, x1 + 1)
        keys = [model.split(x)[0] for x in (x0, x1 + 1)]
    captured["CrossBlock"]
    return [*settled, *keys]


@pytest.mark.parametrize("way", ["transposed", "other axis", "kernel"])
@pytest.mark.parametrize("counts", [(3, 5), (5, 3), (4, 4)])
def test_both_directions_are_read(
    way: str, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, there), (_, back), first, second = both(way, counts, monkeypatch)
    close(there, reference_weights(first, second))
    close(back, reference_weights(second, first))
    wrong = reference_weights(first, second).mT
    assert float((back.dense() - wrong).abs().max()) > 0.1, "a transposed matrix must show"


def test_one_direction_twice_is_not_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for counts in ((3, 5), (4, 4)):
        with pytest.raises(CaptureError, match="made 2 attention kernel calls"):
            both("same", counts, monkeypatch)
