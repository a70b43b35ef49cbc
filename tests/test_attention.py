"""Attention: the laws for every kind of source, what torch and numpy see, limits, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import AttentionLaws, reference_weights
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout, WindowInfo
from vistvis.attention import GivenWeights
from vistvis.errors import CaptureError, DenseLimitError, IndexOutOfRange, InputError


def random(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, factor: float = 1.6
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * factor).to(dtype)


class QK(AttentionLaws):
    """Queries and keys with whatever a subclass adds to them."""

    batch, heads, key_heads, queries, keys, width = 2, 4, 4, 7, 7, 8
    dtype = torch.float32

    def extras(self) -> dict[str, object]:
        return {}

    def tensors(self) -> tuple[Tensor, Tensor]:
        query = random(self.batch, self.heads, self.queries, self.width, seed=1)
        key = random(self.batch, self.key_heads, self.keys, self.width, seed=2)
        return query.to(self.dtype), key.to(self.dtype)

    def make(self) -> Attention:
        query, key = self.tensors()
        return Attention(query=query, key=key, **self.extras())  # type: ignore[arg-type]

    def dense(self) -> Tensor:
        return reference_weights(*self.tensors(), **self.extras())  # type: ignore[arg-type]


class TestSelf(QK):
    pass


class TestDouble(QK):
    dtype = torch.float64


class TestHalf(QK):
    dtype = torch.bfloat16


class TestCross(QK):
    queries, keys = 5, 11


class TestOneOfEach(QK):
    batch, heads, key_heads, queries, keys = 1, 2, 2, 3, 3


class TestGrouped(QK):
    key_heads = 2


class TestOneKeyHead(QK):
    key_heads = 1


class TestNonContiguous(QK):
    def tensors(self) -> tuple[Tensor, Tensor]:
        fused = random(self.batch, self.queries, 2, self.heads, self.width, seed=5)
        query, key = fused.permute(2, 0, 3, 1, 4)
        return query, key


class TestScalePerHead(QK):
    def extras(self) -> dict[str, object]:
        return {"scale": torch.tensor([0.1, 0.4, 0.9, 0.2]).reshape(4, 1, 1)}


class TestGroupedScalePerHead(TestScalePerHead):
    key_heads = 2


class TestCausal(QK):
    def extras(self) -> dict[str, object]:
        return {"causal": True}


class TestCausalCross(TestCausal):
    queries, keys = 6, 9


class TestBoolMask(QK):
    def extras(self) -> dict[str, object]:
        mask = random(self.batch, 1, self.queries, self.keys, seed=3) > -0.5
        mask[1, 0, 2] = False  # a query without any key
        return {"mask": mask}


class TestPaddingMask(QK):
    def extras(self) -> dict[str, object]:
        mask = torch.ones(self.batch, 1, 1, self.keys, dtype=torch.bool)
        mask[0, ..., 4:] = False
        mask[1] = False  # a padded picture: no query has a key
        return {"mask": mask}


class TestAddedMask(QK):
    def extras(self) -> dict[str, object]:
        mask = random(1, self.heads, self.queries, self.keys, seed=4, factor=2)
        mask[0, :, 3] = -math.inf
        mask[0, 1, 2, :4] = -math.inf
        return {"mask": mask}


class TestFarMask(QK):
    """A finite mask on every key of a row, far below what its logits can be seen beside."""

    batch, heads, key_heads, queries, keys = 1, 2, 2, 5, 2000
    far = -1e9

    def tensors(self) -> tuple[Tensor, Tensor]:
        query, key = super().tensors()
        query[:, :, 2] = 0  # so that in float64, too, the far row is uniform
        return query, key

    def extras(self) -> dict[str, object]:
        mask = random(1, 1, self.queries, self.keys, seed=3)
        mask[:, :, 2] = self.far
        return {"mask": mask}

    @pytest.fixture
    def tolerance(self, attention: Attention) -> float:
        logits = attention.logits([0, 1, 3, 4])
        return 8 * torch.finfo(attention.dtype).eps * float(logits.abs().max())


class TestFarthestMask(TestFarMask):
    far = torch.finfo(torch.float32).min


class TestLargeLogits(QK):
    """All logits near one large number, so that the weights stay a mixture."""

    offset = 1e3

    def tensors(self) -> tuple[Tensor, Tensor]:
        query, key = super().tensors()
        for tensor in (query, key):
            tensor[..., 0] = (self.offset * self.width**0.5) ** 0.5
        return query, key


class TestLargerLogits(TestLargeLogits):
    offset, width, queries, keys = 5e3, 64, 50, 90


class TestVeryLargeLogits(TestLargerLogits):
    offset, queries, keys = 1e5, 7, 9  # few, so that mistakes are larger than the rounding


class TestVeryLowLogits(TestLargeLogits):
    def tensors(self) -> tuple[Tensor, Tensor]:
        query, key = super().tensors()
        return query, key * torch.tensor([-100.0, *(self.width - 1) * (1.0,)])


class TestGivenWeights(QK):
    stochastic = False

    def make(self) -> Attention:
        return Attention.from_weights(self.dense().float())

    def dense(self) -> Tensor:
        mixed = reference_weights(*self.tensors())
        return torch.einsum("gh,bhqk->bgqk", random(4, 4, seed=6).abs().double(), mixed)


class TestBreaks:
    """The reference must notice: each of these is a mistake that tools in this field make."""

    def setup_method(self) -> None:
        self.query, self.key = TestSelf().tensors()
        self.wanted = reference_weights(self.query, self.key)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda q, k: Attention(query=q, key=k, scale=1.0),
            lambda q, k: Attention(query=q.flip(1), key=k),
            lambda q, k: Attention(query=q, key=k.roll(1, 2)),
            lambda q, k: Attention(query=q, key=k, causal=True),
            lambda q, k: Attention(query=k, key=q),
        ],
    )
    def test_a_mistake_is_seen(self, wrong: object) -> None:
        found = wrong(self.query, self.key).dense()  # type: ignore[operator]
        assert float((found - self.wanted).abs().max()) > 0.1

    def test_a_dropped_mask_is_seen(self) -> None:
        for case in (TestBoolMask(), TestAddedMask(), TestCausal()):
            bare = Attention(query=self.query, key=self.key).dense()
            assert float((bare - case.dense()).abs().max()) > 0.1

    def test_softmax_over_chosen_keys_only_is_seen(self) -> None:
        lazy = Attention(query=self.query, key=self.key)
        chosen = torch.softmax(lazy.logits(slice(None))[..., :3], -1)
        assert float((chosen - lazy[..., :3]).abs().max()) > 0.1


@pytest.fixture
def attention() -> Attention:
    return TestSelf().make()


@given(st.data())
def test_any_index_gives_what_torch_gives(data: st.DataObject) -> None:
    attention = TestCross().make()
    dense = attention.dense()

    def along(size: int) -> st.SearchStrategy[object]:
        number = st.integers(-size, size - 1)
        return st.one_of(
            number,
            st.slices(size).filter(lambda s: s.step is None or s.step > 0),
            st.lists(number, min_size=2, max_size=2),
            number.map(torch.tensor),
        )

    count = data.draw(st.integers(0, 4))
    index: list[object] = [data.draw(along(size)) for size in dense.shape[:count]]
    for extra in (None, Ellipsis):
        if data.draw(st.booleans()):
            index.insert(data.draw(st.integers(0, len(index))), extra)
    for place in [p for p, item in enumerate(index) if item is Ellipsis]:
        del index[place + 1 :]  # what follows would count from the end
    wanted = dense[tuple(index)]
    found = attention[tuple(index)]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "index",
    [
        [True] * 3,
        (0, 0, [True] * 4),
        (0, 0, torch.ones(6, dtype=torch.bool)),
        (0, 0, np.zeros(4, dtype=bool)),
        (..., torch.ones(5, dtype=torch.bool)),
        (None, 0, ..., torch.ones(10, dtype=torch.bool), None),
        (0, torch.ones(4, 6, dtype=torch.bool)),
        (0, torch.ones(5, 4, dtype=torch.bool)),
        (..., torch.zeros(5, 10, dtype=torch.bool)),
        (torch.ones(1, 4, dtype=torch.bool), 0),
    ],
)
def test_a_mask_of_another_length_is_refused_as_torch_does(index: object) -> None:
    attention = TestCross().make()
    with pytest.raises(IndexError):
        attention.dense()[index]
    with pytest.raises(IndexOutOfRange, match=r"a mask over .* has shape \(.*\), got \("):
        attention[index]
    with pytest.raises(IndexOutOfRange, match=r"a query mask has shape \(5,\), got \(6,\)"):
        attention.rows(torch.ones(6, dtype=torch.bool))


def test_masks_of_several_dimensions_are_those_of_torch() -> None:
    attention = TestCross().make()
    dense = attention.dense()
    for index in (
        dense > 0.5,
        (0, dense[0] > 0.5),
        (..., dense[0, 0] > 0.5),
        (None, dense[..., 0, 0] > 0.01, ...),
        (dense[:, 0, 0, 0] > 2, 0),
    ):
        assert torch.allclose(attention[index], dense[index], rtol=0, atol=5e-6)


def test_what_it_says_of_itself() -> None:
    attention = TestGrouped().make()
    assert attention.shape == (2, 4, 7, 7)
    assert (attention.ndim, attention.dim(), len(attention)) == (4, 4, 2)
    assert attention.numel() == 2 * 4 * 7 * 7
    assert attention.size(1) == attention.num_heads == 4
    assert attention.device == torch.device("cpu")
    assert attention.nbytes == (2 * 4 * 7 * 8 + 2 * 2 * 7 * 8) * 4
    attention.log_sum_exp()
    assert attention.nbytes == (2 * 4 * 7 * 8 + 2 * 2 * 7 * 8 + 2 * 2 * 4 * 7) * 4
    site = SiteInfo("global_block_3", rope=False, intervened="head 0 zero")
    text = repr(attention.with_site(site))
    assert "'global_block_3'" in text
    assert "2 key heads" in text
    assert "WITHOUT rope" in text
    assert "INTERVENED: head 0 zero" in text


def test_half_precision_computes_in_float32() -> None:
    attention = TestHalf().make()
    assert attention.query is not None
    assert attention.query.dtype == torch.bfloat16
    assert attention.dtype == attention.rows(0).dtype == torch.float32


def test_torch_and_numpy_see_a_tensor(attention: Attention) -> None:
    dense = attention.dense()
    assert torch.equal(attention.mean(1), dense.mean(1))
    assert torch.equal(attention.max(-1).values, dense.max(-1).values)
    assert torch.equal(torch.stack([attention[0], attention[1]]), dense)
    assert torch.equal(torch.cat([attention, attention]), torch.cat([dense, dense]))
    assert torch.equal(torch.einsum("bhqk->bhk", attention), torch.einsum("bhqk->bhk", dense))
    assert torch.equal(attention * 2 + 1, dense * 2 + 1)
    assert torch.equal(1 - attention, 1 - dense)
    assert torch.equal(dense * attention, dense * dense)
    assert torch.equal(attention > 0.5, dense > 0.5)
    assert torch.equal(torch.stack(list(attention)), dense)
    assert np.array_equal(np.asarray(attention), dense.numpy())
    assert np.array_equal(attention.numpy(), dense.numpy())
    assert np.asarray(attention, dtype=np.float64).dtype == np.float64
    with pytest.raises(AttributeError, match=r"\.dense\(\)"):
        attention.requires_grad_()
    with pytest.raises(AttributeError, match="no attribute 'wieghts'"):
        _ = attention.wieghts


def test_a_dense_matrix_over_the_limit_is_refused_by_name() -> None:
    wide = torch.zeros(1, 16, 10_992, 2)
    attention = Attention(query=wide, key=wide)
    for ask in (attention.dense, lambda: attention.mean(1), lambda: np.asarray(attention)):
        with pytest.raises(DenseLimitError, match=r"7\.2 GB.*limit of 2 GB.*rows\(queries\)"):
            ask()
    with pytest.raises(MemoryError):
        attention[0, :, :]
    assert attention[0, 3, 500].shape == (10_992,)
    for part in (attention.rows, attention.columns, attention.logits):
        with pytest.raises(DenseLimitError, match=r"7\.2 GB.*limit of 2 GB.*max_bytes=…"):
            part(None)
    small = TestSelf().make()
    with pytest.raises(DenseLimitError):
        small.dense(max_bytes=100)
    for part in (small.rows, small.columns, small.logits):
        with pytest.raises(DenseLimitError):
            part([0, 1], max_bytes=2 * 4 * 2 * 7 * 4 - 1)
        assert part([0, 1], max_bytes=2 * 4 * 2 * 7 * 4).numel() == 2 * 4 * 2 * 7


def test_log_sum_exp_is_right_and_costs_once(
    attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attention.log_sum_exp()
    with monkeypatch.context() as patch:
        patch.delattr(Attention, "_logits")
        assert torch.equal(attention.log_sum_exp(), first)
    wanted = attention.logits(None).double().exp().sum(-1).log()
    torch.testing.assert_close(first.double(), wanted, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="made from weights alone"):
        TestGivenWeights().make().log_sum_exp()


def test_columns_of_a_far_row_are_those_of_the_row() -> None:
    """Beside −1e9 logits keep steps of 64: what is left of them is the same both ways."""
    query, key = (random(1, 1, n, 8, seed=n) for n in (3, 2000))
    mask = torch.zeros(3, 2000)
    mask[1] = -1e9
    attention = Attention(query=query, key=key, mask=mask)
    attention.log_sum_exp()
    for found in (attention.columns([7]), attention[..., [7]]):
        assert abs(float(found[0, 0, 1]) - 1 / 2000) < 1e-6
        assert torch.allclose(found, attention.rows(None)[..., [7]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e38])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("case", [TestSelf, TestCausal, TestBoolMask, TestGrouped])
def test_what_is_not_finite_is_refused(case: type[QK], name: str, value: float) -> None:
    query, key = case().tensors()
    other, tensor = (key, query) if name == "query" else (query, key)
    tensor[0, 0, 3, 1] = value
    other[..., 1] = 10 * other[..., 1].sign()  # of either sign: one inf alone is a weight of 0
    attention = Attention(query=query, key=key, **case().extras())  # type: ignore[arg-type]
    asked = [
        attention.dense,
        attention.log_sum_exp,
        lambda: attention.columns(3),
        lambda: attention.rows(3),
        lambda: attention.logits(3),
        lambda: attention[0, 0, 3],
        lambda: next(attention.row_blocks()),
        lambda: np.asarray(attention),
    ]
    for ask in asked:
        with pytest.raises(InputError, match=r"this attention has NaN or inf .*float32: use"):
            ask()
    if name == "query":
        assert bool(attention.rows(2).isfinite().all())  # others are what they were
    if value == 2e38:
        assert bool(attention.to(torch.float64).dense().isfinite().all())


def test_products_whose_sum_overflows_are_finite() -> None:
    query = torch.full((1, 1, 4, 1), 1e19)
    attention = Attention(query=query, key=query)
    assert torch.equal(attention.rows(0), torch.full((1, 1, 1, 4), 0.25))
    attention.log_sum_exp()
    assert torch.equal(attention.columns(0, batch=0, heads=0), torch.full((1, 1, 4, 1), 0.25))


def test_gradients_flow_through_what_is_asked() -> None:
    query, key = (t.double().requires_grad_() for t in TestCross().tensors())

    def rows_and_columns(q: Tensor, k: Tensor) -> Tensor:
        lazy = Attention(query=q, key=k)
        return lazy[:, :, [0, 2]].sum() + (lazy.columns(3) ** 2).sum() + (lazy.dense() ** 3).sum()

    assert torch.autograd.gradcheck(rows_and_columns, (query, key))


def test_writing_into_what_was_taken_is_noticed(attention: Attention) -> None:
    assert attention.key is not None
    attention.rows(0)
    attention.key.mul_(2)
    for ask in (lambda: attention.rows(0), lambda: attention[0], attention.dense):
        with pytest.raises(CaptureError, match="written into"):
            ask()


def test_site_travels_and_round_trips() -> None:
    layout = TokenLayout(2, (3, 5), ("camera",))
    site = SiteInfo(
        "frame_block_0",
        kind="frame",
        block=0,
        query_layout=layout,
        key_layout=layout,
        frames_in_batch=True,
        window=WindowInfo((7, 7), (4, 4), (2, 2)),
    )
    assert SiteInfo.from_dict(site.to_dict()) == site
    attention = TestSelf().make().with_site(site)
    assert attention.to(torch.float64).site == site
    assert attention.site is not None
    assert attention.site.patch_size == (14, 14)
    with pytest.raises(InputError, match="not a site description"):
        SiteInfo.from_dict({"nom": "x"})


def test_a_renamed_site_keeps_its_path() -> None:
    site = SiteInfo("blocks.3.attn", kind="global")
    assert site.path == site.name
    assert "path" not in site.to_dict()  # what is on disk already reads and looks the same
    renamed = replace(site, name="global_block_3")
    assert (renamed.name, renamed.path) == ("global_block_3", "blocks.3.attn")
    assert renamed.to_dict()["path"] == "blocks.3.attn"
    for one in (site, renamed):
        assert SiteInfo.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"query": torch.zeros(2, 3, 4), "key": torch.zeros(2, 3, 4, 5)}, r"query is a floating"),
        ({"query": torch.zeros(1, 4, 4, 5), "key": torch.zeros(1, 3, 4, 5)}, "h_k divides h"),
        ({"query": torch.zeros(1, 4, 4, 5), "key": torch.zeros(1, 4, 4, 6)}, "share B and d"),
        ({"query": torch.zeros(1, 1, 1, 1).long(), "key": torch.zeros(1, 1, 1, 1)}, "int64"),
        ({"mask": torch.zeros(3, 3)}, r"must broadcast to .* \(1, 2, 4, 4\)"),
        ({"mask": torch.zeros(4, 4).long()}, "a mask is bool"),
        ({"scale": torch.ones(3)}, "one for each of the 2 heads"),
        ({"scale": torch.ones(2, dtype=torch.bool)}, "one for each of the 2 heads, got torch.bool"),
        ({"scale": torch.tensor(1j)}, "one for each of the 2 heads, got torch.complex64"),
        ({"scale": "0.5"}, "one for each of the 2 heads, got str"),
        ({"scale": True}, "one for each of the 2 heads, got bool"),
        ({"scale": [0.1, 0.2]}, "one for each of the 2 heads, got list"),
        ({"scale": np.ones(2)}, "one for each of the 2 heads, got ndarray"),
        ({"query": torch.zeros(1, 2, 4, 0), "key": torch.zeros(1, 2, 4, 0)}, "a d of 1; got"),
        ({"query": torch.zeros(1, 0, 4, 5)}, r"at least one head and a d of 1; got \(1, 0, 4, 5\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments: dict[str, Tensor], text: str) -> None:
    pair = {"query": torch.zeros(1, 2, 4, 5), "key": torch.zeros(1, 2, 4, 5)}
    with pytest.raises(InputError, match=text):
        Attention(**{**pair, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 3, 0), (0, 3, 5), (2, 0, 5), (2, 0, 0)])
@pytest.mark.parametrize("more", [{}, {"mask": torch.ones(1, 1, 1, 1).bool()}, {"causal": True}])
def test_without_batch_queries_or_keys_it_is_as_empty_as_in_torch(
    shape: tuple[int, int, int], more: dict[str, object]
) -> None:
    batch, queries, keys = shape
    query, key = torch.zeros(batch, 4, queries, 8), torch.zeros(batch, 2, keys, 8)
    attention = Attention(query=query, key=key, **more)  # type: ignore[arg-type]
    for found in (attention.dense(), attention.rows(None), attention.logits(None), attention[...]):
        assert found.shape == (batch, 4, queries, keys)
    lse = torch.logsumexp(attention.logits(None), -1)
    assert torch.equal(attention.log_sum_exp(), lse)
    assert attention.columns(None).shape == (batch, 4, queries, keys)
    assert attention.columns([]).shape == (batch, 4, queries, 0)
    assert not list(attention.row_blocks(queries=[]))


def test_given_weights_are_attention_without_queries_and_keys() -> None:
    tensor = torch.rand(1, 2, 3, 4)
    attention = Attention.from_weights(tensor, site=SiteInfo("a"))
    assert isinstance(attention, GivenWeights)
    assert attention.weights is tensor
    assert attention.query is attention.key is attention.mask is None
    assert (attention.scale, attention.causal, attention.groups) == (1.0, False, 1)
    assert attention.dense() is tensor
    assert "'a', batch 1" in repr(attention)
    assert "given weights" in repr(attention)
    for other in (attention.with_site(None), attention.detach(), attention.to(torch.float64)):
        assert isinstance(other, GivenWeights)
    tensor.zero_()
    for ask in (attention.check_unwritten, lambda: attention[0, 0, 0], attention.dense):
        with pytest.raises(CaptureError, match="written into"):
            ask()


def test_detached_attention_has_no_graph_and_still_notices_writing() -> None:
    query, key = (t.requires_grad_() for t in TestSelf().tensors())
    made = query * 1
    attention = Attention(query=made, key=key, scale=torch.ones(4, requires_grad=True)).detach()
    assert not attention.dense().requires_grad
    with torch.no_grad():
        made.mul_(2)
    with pytest.raises(CaptureError, match="written into"):
        attention.check_unwritten()


def test_a_write_between_two_blocks_is_noticed(attention: Attention) -> None:
    blocks = attention.row_blocks(max_bytes=1)
    next(blocks)
    attention.key.mul_(2)
    with pytest.raises(CaptureError, match="written into"):
        next(blocks)


def test_weights_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(B, h, Nq, Nk\)"):
        Attention.from_weights(torch.zeros(3, 3))


def test_index_errors_name_the_dimension(attention: Attention) -> None:
    with pytest.raises(IndexOutOfRange, match=r"query 7 is outside 0…6"):
        attention.rows(7)
    with pytest.raises(IndexOutOfRange, match=r"head 4 is outside 0…3"):
        attention[0, 4]
    with pytest.raises(InputError, match="positive step"):
        attention[::-1]
    with pytest.raises(InputError, match="query takes an int, slice"):
        attention.rows("cls")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="query takes an int, slice"):
        attention.rows(1.5)  # type: ignore[arg-type]
