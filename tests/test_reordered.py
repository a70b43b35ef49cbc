"""Models that reorder, drop and merge tokens: which original tokens the captured ones are.

Every miniature takes the numbers of its tokens along with them, by the same indexing: the truth
that sites are compared with. Each check goes red where nobody follows the tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vistvis
from vistvis.attention import SiteInfo, TokenOrder
from vistvis.errors import CaptureError
from vistvis.hooks.merging import Merge
from vistvis.hooks.order import Orders
from vistvis.hooks.positions import places
from vistvis.tokens import TokenLayout

WIDTH = 16
Moved = tuple[Tensor, Tensor, Tensor]
Move = Callable[[Tensor, Tensor, Tensor], Moved]


class Attention(nn.Module):
    """Fused attention that notes the queries and keys that its kernel got."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.weight[: 2 * WIDTH] *= 3

    def merged(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return x, nn.Identity()

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x, undo = self.merged(x)
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, 2, -1).permute(2, 0, 3, 1, 4)
        if pos is not None:
            q, k = (t + torch.sin(pos.sum(-1)[:, None, :, None].to(t)) for t in (q, k))
        self.seen = q.double(), k.double()
        x = F.scaled_dot_product_attention(q, k, v)
        return undo(self.proj(x.transpose(1, 2).reshape(batch, count, WIDTH)))


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), attn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.attn(self.norm(x), **kwargs)


def stay(x: Tensor, ids: Tensor, pos: Tensor) -> Moved:
    return x, ids, pos


class Moving(nn.Module):
    """Blocks over tokens `(B, S, P, C)` that are moved before some of them; odd ones are global."""

    def __init__(
        self, moves: dict[int, Move], pos: Tensor, *, depth: int = 4, given: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(Attention()) for _ in range(depth))
        self.moves, self.pos, self.given = moves, pos, given
        self.truth: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, count, _ = x.shape
        ids = torch.arange(frames * count).view(1, frames, count).expand(batch, -1, -1)
        pos, self.truth = self.pos.expand(batch, frames, -1, -1), []
        for index, block in enumerate(self.blocks):
            x, ids, pos = self.moves.get(index, stay)(x, ids, pos)
            fold = (1, 2) if index % 2 else (0, 1)
            shape = x.shape[:3]
            self.truth.append(ids.flatten(*fold))
            where = {"pos": pos.flatten(*fold)} if self.given else {}
            x = block(x.flatten(*fold), **where).view(*shape, WIDTH)
        return x


def grid(rows: int, cols: int, special: int = 1) -> Tensor:
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    return torch.cat((torch.zeros(special, 2, dtype=torch.int64), cells + int(special > 0)))


def named(site: SiteInfo, side: str, batch: int, count: int, layout: TokenLayout) -> Tensor:
    """The numbers `(batch, count)` that a site gives to its tokens."""
    order: TokenOrder | None = getattr(site, f"{side}_order")
    tokens = torch.arange(count) if order is None else order.tokens
    tokens = tokens.expand(batch, -1)
    if not site.frames_in_batch:
        return tokens
    frames = torch.arange(layout.frames).expand(batch // layout.frames, -1)
    frames = frames if site.frame_order is None else site.frame_order
    placed = tokens + frames.reshape(batch, 1) * layout.tokens_per_frame
    return torch.where(tokens < 0, -1, placed)


def run(model: nn.Module, x: Tensor, layout: TokenLayout | None) -> vistvis.Capture:
    with torch.no_grad():
        plain = model(x)
        with vistvis.capture(model, layout=layout, verify=True) as captured:
            assert torch.equal(model(x), plain)
    assert all("forward" not in module.__dict__ for module in model.modules())
    return captured


def check(model: Moving, x: Tensor, layout: TokenLayout) -> vistvis.Capture:
    """Every site names every token as the model moved it."""
    captured = run(model, x, layout)
    for attention, truth in zip(captured.values(), model.truth, strict=True):
        site = attention.site
        assert site is not None
        for side in ("query", "key"):
            assert torch.equal(named(site, side, *truth.shape, layout), truth), "other tokens"
    return captured


def check_goes_red(monkeypatch: pytest.MonkeyPatch, *args: Any) -> None:
    """Where nobody follows the tokens, the check sees others."""
    monkeypatch.setattr(Orders, "of", lambda *_: None)
    with pytest.raises(AssertionError, match="other tokens"):
        check(*args)


CURVE = torch.tensor([0, 1, 5, 6, 2, 3, 7, 8, 4])  # along a curve through 2×4, 1 special token
BACK = CURVE.argsort()


def along(order: Tensor) -> Move:
    return lambda x, ids, pos: (x[:, :, order], ids[:, :, order], pos[:, :, order])


@pytest.fixture
def curved() -> tuple[Moving, Tensor, TokenLayout]:
    torch.manual_seed(0)
    model = Moving({0: along(CURVE), 3: along(BACK)}, grid(2, 4), given=True).eval()
    return model, torch.randn(2, 3, 9, WIDTH), TokenLayout(3, (2, 4), ("camera",))


def test_patches_along_a_curve(curved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = check(*curved)
    first, second, _, last = (one.site for one in captured.values())
    assert first.key_order == TokenOrder(CURVE)
    assert first.frame_order is None
    assert second.key_order == TokenOrder(torch.cat([CURVE + 9 * s for s in range(3)]))
    assert last.key_order is None
    check_goes_red(monkeypatch, *curved)


@pytest.mark.parametrize("followed", [True, False])
def test_the_lit_patch_is_drawn_where_it_lies(
    curved: Any, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, layout = curved
    if not followed:
        monkeypatch.setattr(Orders, "of", lambda *_: None)
    attention = run(model, x, layout)["blocks.1.attn"]
    query, key = model.blocks[1].attn.seen
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)[1, 0]
    truth = model.truth[1][1]
    patches = truth % 9 > 0
    lit = weights.masked_fill(~patches, 0).amax(-1)
    row = int(lit.argmax())
    assert 0.3 < float(lit[row]) < 0.999
    token = int(truth[int((weights[row] * patches).argmax())])
    place = layout.locate(token)
    values = attention.rows([row])[1, 0, 0]
    site = attention.site
    order = site.key_order or TokenOrder(torch.arange(layout.num_tokens))
    maps = layout.maps(order.spread(values, layout.num_tokens, batch=1))
    drawn = (maps == maps.max()).nonzero()[0].tolist()
    assert (drawn == [place.frame, place.row, place.col]) is followed


def test_a_curve_that_was_learnt_holds_where_positions_are_not_given(curved: Any) -> None:
    model, x, layout = curved
    # As in Depth Anything 3: global blocks get positions without place.
    blocks = model.blocks
    for block in (blocks[1], blocks[3]):
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"pos": kwargs["pos"].clamp(0, 1)}), with_kwargs=True
        )
    check(model, x, layout)


def test_positions_without_place_say_nothing() -> None:
    model = Moving({}, grid(2, 4).clamp(0, 1), given=True).eval()
    captured = check(model, torch.randn(1, 2, 9, WIDTH), TokenLayout(2, (2, 4), 1))
    assert all(one.site.key_order is None for one in captured.values())


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (TokenLayout(2, (4, 2), 1), "contradict the layout"),
        (TokenLayout(2, (1, 6), 3), "contradict the layout"),
        (TokenLayout(2, (2, 4), 1), ""),
    ],
)
def test_positions_that_contradict_the_layout_are_refused(layout: TokenLayout, words: str) -> None:
    model, x = Moving({}, grid(2, 4), given=True).eval(), torch.randn(1, 2, 9, WIDTH)
    if not words:
        run(model, x, layout)
        return
    with vistvis.capture(model, layout=layout) as captured, torch.no_grad():
        model(x)
        for name in captured:
            with pytest.raises(CaptureError, match=words):
                captured[name]


def test_rows_and_columns_exchanged_are_refused() -> None:
    model, x = Moving({}, grid(3, 3).flip(-1), given=True).eval(), torch.randn(1, 2, 10, WIDTH)
    captured = vistvis.capture(model, layout=TokenLayout(2, (3, 3), 1))
    with torch.no_grad():
        model(x)
    with pytest.raises(CaptureError, match="rows and columns exchanged"):
        captured["blocks.0.attn"]
    captured.close()


# -- frames -------------------------------------------------------------------------------------


def chosen_first(chosen: list[int], *, back: bool = False, mark: bool = False) -> Move:
    """The chosen frame of each batch item goes first, the others stay in order."""
    orders = [[r, *(s for s in range(3) if s != r)] for r in chosen]

    def move(*tensors: Tensor) -> Moved:
        moved = []
        for tensor in tensors:
            rows = [torch.tensor(order) for order in orders]
            rows = [order.argsort() for order in rows] if back else rows
            moved.append(torch.stack([t[o] for t, o in zip(tensor, rows, strict=True)]))
        if mark:  # the cls slot is written over at the same time
            moved[0][:, :, 0] = torch.randn(WIDTH)
        return moved[0], moved[1], moved[2]

    return move


@pytest.mark.parametrize("mark", [False, True])
def test_the_reference_view_first(mark: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    moves = {1: chosen_first([2, 1], mark=mark), 4: chosen_first([2, 1], back=True)}
    model, layout = Moving(moves, grid(1, 2), depth=5).eval(), TokenLayout(3, (1, 2), ("cls",))
    x = torch.randn(2, 3, 3, WIDTH)
    if mark:
        monkeypatch.setattr(torch, "randn", lambda *size: torch.ones(*size))
    captured = check(model, x, layout)
    sites = [one.site for one in captured.values()]
    assert sites[1].key_order.originals(0, batch=0).tolist() == [6]
    assert sites[1].key_order.originals(3, batch=0).tolist() == [0]
    assert sites[2].frame_order.tolist() == [[2, 0, 1], [1, 0, 2]]
    assert sites[2].key_order is None
    assert sites[4].frame_order is None
    check_goes_red(monkeypatch, model, x, layout)


def test_frames_that_moved_and_can_not_be_found_have_no_layout() -> None:
    torch.manual_seed(1)

    def renew(x: Tensor, ids: Tensor, pos: Tensor) -> Moved:
        return x + 1, ids, pos

    moves = {1: chosen_first([2, 1]), 3: renew}
    layout = TokenLayout(3, (1, 2), 1)
    captured = run(Moving(moves, grid(1, 2)).eval(), torch.randn(2, 3, 3, WIDTH), layout)
    assert captured["blocks.2.attn"].site.key_layout == layout.frame_layout()
    assert captured["blocks.3.attn"].site.key_layout is None
    # Where nothing had moved, new numbers (an added embedding) change nothing.
    captured = run(Moving({3: renew}, grid(1, 2)).eval(), torch.randn(2, 3, 3, WIDTH), layout)
    assert captured["blocks.3.attn"].site.key_layout == layout


# -- dropped tokens -----------------------------------------------------------------------------


def keep(kept: list[list[int]]) -> Move:
    """Tokens of each batch item that go on; −1 is padding."""
    index = torch.tensor(kept)

    def move(x: Tensor, ids: Tensor, pos: Tensor) -> Moved:
        def take(tensor: Tensor, padding: int) -> Tensor:
            where = index.clamp_min(0)[:, None, :, None]
            taken = tensor.gather(2, where.expand(-1, -1, -1, tensor.shape[-1]))
            return taken.masked_fill(index[:, None, :, None] < 0, padding)

        return take(x, 0), take(ids[..., None], -1)[..., 0], take(pos, 0)

    return move


def test_tokens_that_are_dropped_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    moves = {1: keep([[0, 2, 4], [4, 1, 0]]), 2: keep([[1, 2], [0, 2]])}
    model, layout = Moving(moves, grid(1, 5, 0), depth=3).eval(), TokenLayout(1, (1, 5))
    x = torch.randn(2, 1, 5, WIDTH)
    captured = check(model, x, layout)
    site = captured["blocks.2.attn"].site
    assert site.key_order.tokens.tolist() == [[2, 4], [4, 0]]
    assert site.key_layout == layout
    # Without a layout, tokens are numbered as the first block got them.
    site = run(model, x, None)["blocks.2.attn"].site
    assert site.key_order.tokens.tolist() == [[2, 4], [4, 0]]
    assert site.key_layout is None
    check_goes_red(monkeypatch, model, x, layout)


def test_a_batch_that_is_reordered_and_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    moves = {1: keep([[3, 0, 2, 1], [2, 4, -1, -1]])}
    model, layout = Moving(moves, grid(1, 5, 0), depth=3).eval(), TokenLayout(1, (1, 5))
    x = torch.randn(2, 1, 5, WIDTH)
    site = check(model, x, layout)["blocks.2.attn"].site
    assert site.key_order.tokens.tolist() == [[3, 0, 2, 1], [2, 4, -1, -1]]
    check_goes_red(monkeypatch, model, x, layout)


def test_alike_tokens_that_moved_are_no_guess() -> None:
    torch.manual_seed(4)
    x = torch.randn(1, 1, 5, WIDTH)
    x[0, 0, 3] = x[0, 0, 1]
    model = Moving({1: keep([[4, 3, 0]])}, grid(1, 5, 0), depth=2).eval()
    site = run(model, x, TokenLayout(1, (1, 5)))["blocks.1.attn"].site
    assert site.key_order is None
    assert site.key_layout is None


def test_a_masked_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    visible = keep([[1, 3], [0, 3]])
    model = Moving({0: visible}, grid(2, 2, 0), depth=2, given=True).eval()
    x, layout = torch.randn(2, 1, 4, WIDTH), TokenLayout(1, (2, 2))
    captured = check(model, x, layout)
    assert captured["blocks.0.attn"].site.query_layout == layout
    check_goes_red(monkeypatch, model, x, layout)


def test_a_smaller_picture_is_no_part_of_this_one() -> None:
    model = Moving({0: keep([[0, 1]])}, grid(2, 2, 0), depth=1, given=True).eval()
    captured = run(model, torch.randn(1, 1, 4, WIDTH), TokenLayout(1, (2, 2)))
    assert captured["blocks.0.attn"].site.query_layout is None


def test_an_encoder_without_the_special_tokens_of_the_whole_is_no_contradiction() -> None:
    """Its patches lie from (0, 0); those of the whole from (1, 1), the special at (0, 0)."""
    layout = TokenLayout(2, (2, 3), ("pose",))
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(3))[None]
    assert places(cells, layout) is None
    with pytest.raises(CaptureError, match="contradict"):
        places(torch.cat((cells[:, :1], cells[:, 1:] + 2), 1), layout)  # beyond the grid


def test_registers_attend_alone_and_patches_bypass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)

    class Registers(Moving):
        """Frames are swapped before the first block; the second gets the special tokens only."""

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.arange(8).view(1, 2, 4)
            x = self.blocks[0](x.flatten(0, 1)).view(1, 2, 4, WIDTH).flip(1)
            first = self.blocks[1](x[:, :, :2].flatten(1, 2)).view(1, 2, 2, WIDTH)
            x = torch.cat((first, x[:, :, 2:]), 2)
            self.truth = [ids.flatten(0, 1), ids.flip(1)[:, :, :2].flatten(1, 2)]
            self.truth += [ids.flip(1).flatten(0, 1)]
            return self.blocks[2](x.flatten(0, 1))

    # As many special tokens in all as one frame has tokens: counting would take them for a frame.
    model, layout = Registers({}, grid(1, 2, 2), depth=3).eval(), TokenLayout(2, (1, 2), 2)
    x = torch.randn(1, 2, 4, WIDTH)
    captured = check(model, x, layout)
    assert captured["blocks.1.attn"].site.key_order == TokenOrder(torch.tensor([4, 5, 0, 1]))
    assert captured["blocks.2.attn"].site.frame_order.tolist() == [[1, 0]]
    check_goes_red(monkeypatch, model, x, layout)


class Crossing(nn.Module):
    """Cross attention with positions for each side, as in the CroCo family."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *pos: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].cross_attn = Crossing()

    def forward(self, x: Tensor, y: Tensor, *pos: Tensor) -> Tensor:
        return self.blocks[0].cross_attn(x, y, y, *pos)


def test_each_side_of_cross_attention_has_its_own_order() -> None:
    torch.manual_seed(8)
    pos, order = grid(2, 2, 0)[None], torch.tensor([0, 2, 3, 1])
    x, y, layout = torch.randn(1, 4, WIDTH), torch.randn(1, 4, WIDTH), TokenLayout(2, (2, 2))
    with vistvis.capture(Pair(), layout=layout) as captured, torch.no_grad():
        captured._model(x, y, pos, pos[:, order])
    site = captured["blocks.0.cross_attn"].site
    assert site.query_layout == site.key_layout == layout.frame_layout()
    assert (site.query_order, site.key_order) == (None, TokenOrder(order))


# -- merged tokens ------------------------------------------------------------------------------


def token_merge_bipartite2d(metric: Tensor) -> tuple[Any, Any]:
    """6 → 5: two pairs are averaged, and token 1 is kept a second time, at the end."""
    batch = len(metric)

    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        pairs = (x[:, 3] + x[:, 2]) / 2, (x[:, 1] + x[:, 4]) / 2
        return torch.stack((*pairs, x[:, 0], x[:, 5], x[:, 1]), 1)

    def unmerge(x: Tensor) -> Tensor:
        assert len(x) == batch
        return x[:, torch.tensor([2, 4, 0, 0, 1, 3])]

    return merge, unmerge


class Merging(Attention):
    def merged(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        merge, unmerge = token_merge_bipartite2d(x)
        return merge(x), unmerge


class Averaging(Attention):
    """Merges by code that nobody knows."""

    def merged(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return x.unflatten(1, (-1, 2)).mean(2), lambda y: y.repeat_interleave(2, 1)


def merging(attention: type[Attention]) -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(Block(attention()), Block(attention())).eval()


def test_merged_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, layout = merging(Merging), torch.randn(2, 6, WIDTH), TokenLayout(1, (2, 3))
    here = sys.modules[__name__]
    function = token_merge_bipartite2d
    attention = run(model, x, layout)["0.attn"]
    assert here.token_merge_bipartite2d is function
    site = attention.site
    assert site.query_layout == site.key_layout == layout
    order = site.key_order
    assert order is site.query_order
    parts = [sorted(order.originals(i).tolist()) for i in range(5)]
    assert parts == [[2, 3], [1, 4], [0], [5], [1]]
    assert order.index(1) == 4  # what comes out of the module for it
    values = attention.rows([0])[0, 0, 0]
    drawn = layout.maps(order.spread(values, 6))[0]
    torch.testing.assert_close(drawn.sum(), values.sum())
    torch.testing.assert_close(drawn[0, 1], values[1] / 2 + values[4])
    # Without the map, row numbers are no tokens.
    monkeypatch.setattr(Merge, "order", lambda *_: None)
    site = run(model, x, layout)["0.attn"].site
    assert site.key_layout is None
    assert site.key_order is None


def test_merged_tokens_without_a_map_have_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    # Six tokens become three: as many as a frame has.
    model, x, layout = merging(Averaging), torch.randn(2, 6, WIDTH), TokenLayout(2, (1, 3))
    site = run(model, x, layout)["0.attn"].site
    assert (site.query_layout, site.key_layout) == (None, None)
    monkeypatch.setattr(Orders, "of", lambda *_: None)
    assert run(model, x, layout)["0.attn"].site.key_layout == layout.frame_layout()


def test_a_map_that_is_not_what_was_merged_is_none() -> None:
    merge, unmerge = token_merge_bipartite2d(torch.zeros(1, 6, 1))
    good = Merge(merge, unmerge, (1, 6, 1), torch.device("cpu"))
    assert good.order(5) is not None
    for bad in (lambda x: merge(x) * 1.01, lambda x: merge(x).roll(1, 1), lambda x, size: x):
        assert good._replace(merge=bad).order(5) is None


def test_what_goes_wrong_while_following_never_breaks_the_model(
    curved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vistvis.hooks.order.same_rows", fail)
    monkeypatch.setattr("vistvis.hooks.order.places", fail)
    model, x, layout = curved
    captured = run(model, x, layout)
    assert captured["blocks.1.attn"].site.key_layout is None
