"""Attention in segments and with functions of indices: laws, what they cost, breaks, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from laws import reference_weights
from test_attention import QK, random
from torch import Tensor

from vistvis import Attention, SiteInfo
from vistvis.attention import GivenWeights
from vistvis.errors import CaptureError, DenseLimitError, InputError

STARTS = (0, 3, 4, 9)  # of 3, 1, 5 and 2 tokens


class Segments(QK):
    queries = keys = 11
    starts: tuple[int, ...] = STARTS

    def more(self) -> dict[str, object]:
        return {}

    def extras(self) -> dict[str, object]:
        return {"segments": torch.tensor(self.starts), **self.more()}

    def dense(self) -> Tensor:
        """One block after the other, as calls of their own."""
        query, key = self.tensors()
        out = torch.zeros(self.batch, self.heads, self.queries, self.keys, dtype=torch.float64)
        more = self.more()
        mask = more.pop("mask", None)
        for start, stop in zip(self.starts, (*self.starts[1:], self.queries), strict=True):
            rows = slice(start, stop)
            if isinstance(mask, Tensor):
                more["mask"] = mask.expand(out.shape)[:, :, rows, rows]
            part = reference_weights(query[:, :, rows], key[:, :, rows], **more)  # type: ignore[arg-type]
            out[:, :, rows, rows] = part
        return out


class TestSegments(Segments):
    def test_outside_is_exactly_zero(self, attention: Attention) -> None:
        assert bool((attention.rows(4)[..., :4] == 0).all())
        assert bool((attention.columns(9)[:, :, :9] == 0).all())
        assert bool((attention.logits(3)[..., [0, 1, 2, 4, 10]] == -math.inf).all())
        assert "in 4 segments" in repr(attention)


class TestOneSegment(Segments):
    starts = (0,)


class TestSegmentsOfOne(Segments):
    starts = tuple(range(11))

    def test_is_sharp(self, attention: Attention, expected: Tensor) -> None:
        assert torch.equal(expected[0, 0], torch.eye(11, dtype=torch.float64))


class TestSegmentsGrouped(Segments):
    key_heads = 2


class TestSegmentsHalf(Segments):
    dtype = torch.bfloat16


class TestSegmentsCausal(Segments):
    def more(self) -> dict[str, object]:
        return {"causal": True}


class TestSegmentsScaleAndMask(Segments):
    key_heads = 2

    def more(self) -> dict[str, object]:
        mask = random(self.batch, 1, self.queries, self.keys, seed=3) > -0.5
        mask[1, 0, 5] = False
        return {"scale": torch.tensor([0.1, 0.4, 0.9, 0.2]), "mask": mask}


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - (q - k).abs() * 0.4 * (h + 1) - b * k * 0.3


def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 3 * torch.tanh(score / 3)


DOCUMENTS = torch.tensor([0, 0, 1, 1, 1, 2, 2])


def same_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (DOCUMENTS[q] == DOCUMENTS[k]) & ~((b == 1) & (q == 4))  # one row without any key


class Functions(QK):
    """The reference calls them with plain numbers, one after the other."""

    score_mod = mask_mod = None

    def extras(self) -> dict[str, object]:
        return {"score_mod": self.score_mod, "mask_mod": self.mask_mod}

    def dense(self) -> Tensor:
        query, key = self.tensors()
        groups = self.heads // self.key_heads
        key = key.repeat_interleave(groups, 1)
        logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double()) * self.width**-0.5
        for index in torch.cartesian_prod(*map(torch.arange, logits.shape)):
            at = tuple(index)
            if self.score_mod is not None:
                logits[at] = type(self).score_mod(logits[at], *index)
            if self.mask_mod is not None and not type(self).mask_mod(*index):
                logits[at] = -math.inf
        return torch.softmax(logits, -1).nan_to_num(0.0)


class TestAlibi(Functions):
    score_mod = staticmethod(alibi)


class TestSoftCap(Functions):
    score_mod = staticmethod(capped)
    key_heads = 2


class TestDocuments(Functions):
    mask_mod = staticmethod(same_document)


class TestBothFunctions(Functions):
    score_mod, mask_mod = staticmethod(alibi), staticmethod(same_document)


class TestFunctionCross(TestAlibi):
    queries, keys = 5, 9


CASES = [
    TestSegments,
    TestSegmentsCausal,
    TestSegmentsGrouped,
    TestAlibi,
    TestSoftCap,
    TestDocuments,
]


class TestBreaks:
    """What a mistake would give must differ from the reference by much."""

    @pytest.mark.parametrize("starts", [(0, 4, 5, 9), (0, 3, 4, 8), (0, 2, 4, 9), (0, 3, 9), (0,)])
    def test_a_wrong_start_is_seen(self, starts: tuple[int, ...]) -> None:
        for case in (TestSegments(), TestSegmentsCausal(), TestSegmentsGrouped()):
            query, key = case.tensors()
            wrong = Attention(query=query, key=key, segments=starts, **case.more())  # type: ignore[arg-type]
            assert float((wrong.dense() - case.dense()).abs().max()) > 0.1

    def test_causal_over_all_tokens_is_another_thing(self) -> None:
        case = TestSegments()
        query, key = case.tensors()
        wrong = Attention(query=query, key=key, causal=True).dense()
        assert float((wrong - TestSegmentsCausal().dense()).abs().max()) > 0.1

    def test_a_dropped_or_turned_function_is_seen(self) -> None:
        def turned(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return alibi(score, h, b, q, k)

        for case, wrong in (
            (TestAlibi(), {}),
            (TestAlibi(), {"score_mod": turned}),
            (TestSoftCap(), {}),
            (TestDocuments(), {}),
        ):
            query, key = case.tensors()
            found = Attention(query=query, key=key, **wrong).dense()  # type: ignore[arg-type]
            assert float((found - case.dense()).abs().max()) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_copies_give_the_same(case: type[QK]) -> None:
    site = SiteInfo("a")
    attention, expected = case().make().with_site(site), case().dense()
    for copied in (
        copy.deepcopy(attention),
        attention.detach(),
        attention.to(torch.float64),
        attention.with_site(site),
    ):
        torch.testing.assert_close(copied.dense().double(), expected, atol=1e-5, rtol=0)
        assert copied.site == site
    again = pickle.loads(pickle.dumps(attention))
    torch.testing.assert_close(again.dense().double(), expected, atol=1e-5, rtol=0)
    assert again.site == site
    assert isinstance(again, GivenWeights) == isinstance(case(), Functions)
    if not isinstance(again, GivenWeights):
        again.query.zero_()  # its own, and watched like any
        with pytest.raises(CaptureError, match="written into"):
            again.rows(0)


def test_a_copy_of_what_was_written_before_it_was_taken() -> None:
    query, key = TestSegments().tensors()
    for attention in (Attention(query=query.mul_(2), key=key), Attention.from_weights(query)):
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert torch.equal(copied.dense(), attention.dense())


def test_functions_of_a_large_matrix_are_not_pickled() -> None:
    wide = torch.zeros(1, 16, 10_992, 2)
    attention = Attention(query=wide, key=wide, score_mod=capped)
    with pytest.raises(DenseLimitError):
        pickle.dumps(attention)
    assert attention.rows(3, heads=0).shape == (1, 1, 1, 10_992)


def test_segments_cost_their_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 tokens in windows of 64: never more than a window at once."""
    count, made = 20_000, []
    query, key = random(1, 1, count, 4, seed=1), random(1, 1, count, 4, seed=2)
    attention = Attention(query=query, key=key, segments=torch.arange(0, count, 64))
    matmul = Tensor.__matmul__

    def watched(first: Tensor, second: Tensor) -> Tensor:
        made.append(first.shape[-2] * second.shape[-1])
        return matmul(first, second)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    lse = attention.log_sum_exp()
    assert lse.shape == (1, 1, count)
    assert max(made) == 64 * 64
    assert sum(made) <= count * 64
    made.clear()
    attention.rows([130, 131])
    attention.columns(19_999)
    assert sum(made) <= 2 * 64 + 32 * 32
    wanted = reference_weights(query[:, :, 128:192], key[:, :, 128:192])
    found = attention.columns(150)[:, :, 128:192, 0]
    torch.testing.assert_close(found.double(), wanted[..., 22], atol=1e-5, rtol=0)


def test_segments_are_differentiable() -> None:
    query, key = (t.double().requires_grad_() for t in TestSegments().tensors())

    def use(q: Tensor, k: Tensor) -> Tensor:
        lazy = Attention(query=q, key=k, segments=STARTS)
        return lazy[:, :, [0, 5]].square().sum() + (lazy.columns(4) ** 2).sum()

    assert torch.autograd.gradcheck(use, (query, key), fast_mode=True)


@pytest.mark.parametrize(
    ("segments", "keys"),
    [
        ([1, 3], 11),
        ([0, 3, 3], 11),
        ([0, 5, 4], 11),
        ([0, 11], 11),
        ([], 11),
        ([0.0, 2.0], 11),
        ([[0, 2]], 11),
        ("abc", 11),
        ([0, 3], 9),
    ],
)
def test_starts_that_are_none_are_refused(segments: list[int], keys: int) -> None:
    query, key = random(1, 2, 11, 4, seed=1), random(1, 2, keys, 4, seed=2)
    with pytest.raises(InputError, match="segments are the start rows of blocks"):
        Attention(query=query, key=key, segments=segments)


def test_segments_and_functions_do_not_mix() -> None:
    query = random(1, 2, 11, 4, seed=1)
    with pytest.raises(InputError, match="segments don't go with"):
        Attention(query=query, key=query, segments=[0], mask_mod=same_document)


def test_starts_that_were_written_into_are_noticed() -> None:
    starts = torch.tensor(STARTS)
    query, key = TestSegments().tensors()
    attention = Attention(query=query, key=key, segments=starts)
    starts[1] = 2
    with pytest.raises(CaptureError, match="written into"):
        attention.rows(2)
