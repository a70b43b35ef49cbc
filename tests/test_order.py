"""Rows by original token, where a model reordered, dropped or merged tokens; and their pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import reference_weights
from PIL import Image
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.attention import TokenOrder
from vistvis.decorators.overlays import run_overlay_for_reconstruction
from vistvis.errors import IndexOutOfRange, InputError, LayoutError

LAYOUT = TokenLayout(3, (2, 3), ("camera",), 8)
N, P = LAYOUT.num_tokens, LAYOUT.tokens_per_frame


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.6


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def site(order: Tensor | None = None, members: Tensor | None = None, **more: object) -> SiteInfo:
    made = None if order is None else TokenOrder(order, members)
    info = SiteInfo("global", kind="global", query_layout=LAYOUT, key_layout=LAYOUT)
    return replace(info, query_order=made, key_order=made, **more)  # type: ignore[arg-type]


QUERY, KEY = random(2, 3, N, 8, seed=1), random(2, 3, N, 8, seed=2)
TRUE = reference_weights(QUERY, KEY)
"""What the model computes, by original token: reordering both sides changes no weight."""


def reordered(order: Tensor) -> Attention:
    """What is captured: `order` `(N,)`, or `(2, N)` for one of each batch item."""
    index = order.expand(2, -1)[:, None, :, None].expand_as(QUERY)
    return Attention(query=QUERY.gather(2, index), key=KEY.gather(2, index), site=site(order))


@pytest.mark.parametrize(
    "order", [permutation(N, 3), torch.stack([permutation(N, 4), permutation(N, 5)])]
)
def test_rows_are_those_of_the_original_tokens(order: Tensor) -> None:
    attention = reordered(order)
    for batch in (0, 1):
        for tokens in (0, [9, 4], torch.tensor([20, 0]), None, -1):
            wanted = TRUE[batch, :, [tokens] if isinstance(tokens, int) else tokens]
            wanted = wanted.reshape(3, -1, N)
            found = attention.token_rows(tokens, batch=batch)
            torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
        one = attention.token_rows([2], batch=batch, heads=1)
        torch.testing.assert_close(one.double(), TRUE[batch, 1:2, [2]], atol=1e-5, rtol=0)
    assert TRUE.max() > 0.3


def test_a_wrong_order_is_seen() -> None:
    order = permutation(N, 3)
    attention = reordered(order)
    for wrong in (site(), site(order.argsort()), site(order.roll(1))):
        found = attention.with_site(wrong).token_rows(None).double()
        assert float((found - TRUE[0]).abs().max()) > 0.1


def test_without_an_order_rows_are_rows() -> None:
    for info in (None, site()):
        attention = Attention(query=QUERY, key=KEY, site=info)
        assert torch.equal(
            attention.token_rows([4, 1], batch=1), attention.rows([4, 1], batch=1)[0]
        )


def test_merged_and_dropped_tokens() -> None:
    layout = TokenLayout(1, (2, 3))
    # Captured: token 4; tokens 0 and 1 and 5 as one; token 2, of which token 3 was dropped; a pad.
    tokens, members = torch.tensor([4, 0, 1, 5, 2, -1]), torch.tensor([0, 1, 1, 1, 2, 3])
    order = TokenOrder(tokens, members)
    info = SiteInfo("a", query_layout=layout, key_layout=layout, query_order=order, key_order=order)
    query, key = QUERY[:, :, :4], KEY[:, :, :4]
    attention = Attention(query=query, key=key, site=info)
    true = reference_weights(query, key)[1]
    for token, captured in ((4, 0), (0, 1), (1, 1), (5, 1), (2, 2)):
        row = attention.token_rows(token, batch=1)[:, 0].double()
        given = true[:, captured]
        wanted = torch.zeros(3, 6, dtype=torch.float64)
        wanted[:, [0, 1, 5]] = given[:, [1]] / 3
        wanted[:, 4], wanted[:, 2] = given[:, 0], given[:, 2]
        torch.testing.assert_close(row, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(row.sum(-1), 1 - given[:, 3], atol=1e-5, rtol=0)
    with pytest.raises(IndexOutOfRange, match="token 3 is not among"):
        attention.token_rows(3)
    with pytest.raises(IndexOutOfRange, match=r"token 6 is outside 0…5"):
        attention.token_rows(6)


def test_an_order_that_does_not_fit_is_refused() -> None:
    attention = reordered(permutation(N, 3))
    wrong = (
        site(permutation(N - 1, 3)),
        site(permutation(N, 3).expand(3, -1)),
        site(torch.arange(N), torch.arange(N) + 1),
    )
    for info in wrong:
        with pytest.raises(LayoutError, match="does not fit 21 captured tokens in 2 batch items"):
            attention.with_site(info).token_rows(0)
    with pytest.raises(LayoutError, match="'global' has an order of tokens and no layout"):
        attention.with_site(replace(site(torch.arange(N)), query_layout=None)).token_rows(0)


def test_the_batch_item_of_a_picture() -> None:
    folded = SiteInfo("frame", kind="frame", frames_in_batch=True)
    assert [folded.batch_item(1, frame, frames=3) for frame in range(3)] == [3, 4, 5]
    order = torch.tensor([[2, 0, 1], [1, 0, 2]])  # reference view first, another in each scene
    moved = replace(folded, frame_order=order)
    for batch in (0, 1):
        for frame in range(3):
            item = moved.batch_item(batch, frame, frames=3)
            assert item // 3 == batch
            assert order[batch, item % 3] == frame
    assert site().batch_item(1, 2, frames=3) == 1
    for batch, frame in ((0, 3), (0, -1), (2, 0), (-1, 0)):
        with pytest.raises(IndexOutOfRange):
            moved.batch_item(batch, frame, frames=3)
    with pytest.raises(IndexOutOfRange, match="frame 2 is not among"):
        replace(folded, frame_order=order[:, 1:]).batch_item(0, 2, frames=3)


# -- overlays ------------------------------------------------------------------------------------


class Sites(dict[str, Attention]):
    layout = LAYOUT
    images = torch.full((2, 3, 3, 16, 24), 0.5)


def brightest(attention: Attention, folder: Path, *, query: int, keys: int) -> int:
    """Draw a row of head 0 and read back which patch of the picture is marked."""
    files = run_overlay_for_reconstruction(
        Sites(a=attention),
        query_frame_idx=1,
        query_idx=query,
        key_frame_idx=keys,
        head=0,
        output_path=folder,
        batch_idx=1,
        progress=False,
        cmap_name="gray",
    )
    with Image.open(files["a", 0][0]) as picture:
        grey = np.asarray(picture).astype(float).mean(-1)
    return int(grey.reshape(2, 8, 3, 8).mean((1, 3)).argmax())


def test_overlays_mark_the_right_patch_of_the_right_picture(tmp_path: Path) -> None:
    order = torch.stack([permutation(N, 4), permutation(N, 5)])
    attention = reordered(order)
    queries = range(1, P)
    wanted, found, unaware = [], [], []
    for query in queries:
        row = TRUE[1, 0, LAYOUT.index(frame=1, token=query)]
        wanted.append(int(LAYOUT.maps(row)[2].argmax()))
        found.append(brightest(attention, tmp_path, query=query, keys=2))
        unaware.append(brightest(attention.with_site(site()), tmp_path, query=query, keys=2))
    assert found == wanted
    assert unaware != wanted


def test_overlays_of_frames_that_were_moved(tmp_path: Path) -> None:
    frames = torch.tensor([[2, 0, 1], [1, 0, 2]])
    query, key = random(6, 1, P, 8, seed=6), random(6, 1, P, 8, seed=7)
    one = LAYOUT.frame_layout()
    info = SiteInfo("f", kind="frame", query_layout=one, key_layout=one, frames_in_batch=True)
    moved = replace(info, frame_order=frames)
    attention = Attention(query=query, key=key, site=moved)
    wanted, found, unaware = [], [], []
    for token in range(1, P):
        row = reference_weights(query, key)[3, 0, token]  # picture 1 lies first in scene 1
        wanted.append(int(one.maps(row)[0].argmax()))
        found.append(brightest(attention, tmp_path, query=token, keys=1))
        unaware.append(brightest(attention.with_site(info), tmp_path, query=token, keys=1))
    assert found == wanted
    assert unaware != wanted


def test_overlays_of_keys_from_a_cache(tmp_path: Path) -> None:
    """Queries of the second frame, keys of the first two."""
    both = replace(LAYOUT, frames=2)
    attention = Attention(
        query=QUERY[:, :, P : 2 * P],
        key=KEY[:, :, : 2 * P],
        site=SiteInfo(
            "a", query_layout=LAYOUT.frame_layout(), key_layout=both, first_frame=1, kind="global"
        ),
    )
    true = reference_weights(attention.query, attention.key)
    for token in range(1, P):
        wanted = int(both.maps(true[1, 0, token])[0].argmax())
        assert brightest(attention, tmp_path, query=token, keys=0) == wanted
    with pytest.raises(LayoutError, match=r"frame 2 is outside 0…1"):
        brightest(attention, tmp_path, query=1, keys=2)
    assert attention.site is not None
    later = attention.with_site(replace(attention.site, first_frame=2))
    with pytest.raises(InputError, match="not of query_frame_idx 1"):
        brightest(later, tmp_path, query=1, keys=0)
