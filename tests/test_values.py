"""Numbers of one query token, against weights computed here from the formula."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from laws import reference_weights
from torch import Tensor

from vggt_adapter.inputs import Query
from vggt_adapter.values import get_attention_values, query_values, resolve_token
from vistvis import Attention, SiteInfo, TokenLayout, VistvisWarning
from vistvis.errors import IndexOutOfRange, InputError

B, S, ROWS, COLS, SPECIAL, PATCH = 2, 3, 3, 4, 5, 14
KINDS = ("camera", *("register",) * 4)
P = SPECIAL + ROWS * COLS
LAYOUT = TokenLayout(S, (ROWS, COLS), KINDS, PATCH)
METADATA = {
    *("grid_h", "grid_w", "H", "W", "S", "token_idx", "head_idx", "attention_type"),
    *("patch_start_idx", "patch_mass", "frame_idx", "token_in_frame", "batch_idx"),
    *("requested_token_idx", "renormalized", "patch_size", "block_idx"),
}


def make(kind: str, *, batch: int = B, heads: int = 3) -> Attention:
    generator = torch.Generator().manual_seed(7)
    shape = (batch * S, heads, P, 8) if kind == "frame" else (batch, heads, S * P, 8)
    query = 4 * torch.randn(shape, generator=generator)
    key = torch.randn(shape, generator=generator)
    layout = LAYOUT.frame_layout() if kind == "frame" else LAYOUT
    site = SiteInfo(
        f"{kind}_block_3",
        kind,
        block=3,
        query_layout=layout,
        key_layout=layout,
        frames_in_batch=kind == "frame",
    )
    return Attention(query=query, key=key, site=site)


def reference(attention: Attention) -> np.ndarray[Any, Any]:
    assert attention.query is not None
    assert attention.key is not None
    return reference_weights(attention.query, attention.key).numpy()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(B, S, 3, ROWS * PATCH, COLS * PATCH, generator=generator)


def by_hand(weights: np.ndarray[Any, Any], kind: str, batch: int, token: int) -> Any:
    """Head 1's maps, indexed one patch at a time. `token` is absolute."""
    frame, inner = divmod(token, P)
    maps = np.empty((1 if kind == "frame" else S, ROWS, COLS))
    for f in range(len(maps)):
        for row in range(ROWS):
            for col in range(COLS):
                key = SPECIAL + row * COLS + col
                if kind == "frame":
                    maps[f, row, col] = weights[batch * S + frame, 1, inner, key]
                else:
                    maps[f, row, col] = weights[batch, 1, token, f * P + key]
    return maps[0] if kind == "frame" else maps


@pytest.mark.parametrize("kind", ["frame", "global"])
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("token", [5, 2 * P - 1, 2 * P + 9])
def test_maps(kind: str, batch: int, token: int, images: Tensor) -> None:
    attention = make(kind)
    weights = reference(attention)
    assert weights.max() > 0.3
    frame, inner = divmod(token, P)
    named: dict[str, Any] = {"token_idx": token}
    if kind == "frame":
        named = {"token_idx": inner, "frame_idx": frame}
    expected = by_hand(weights, kind, batch, token)
    for given in (attention, attention.dense(), attention.dense().numpy()):
        values = get_attention_values(given, images, head_idx=1, batch_idx=batch, **named)
        maps = values["attention_maps"]
        assert maps.shape == expected.shape
        np.testing.assert_allclose(maps, expected, atol=2e-6)
        assert set(values["metadata"]) == METADATA
        assert values["metadata"]["frame_idx"] == frame
        assert values["metadata"]["token_in_frame"] == inner
        assert values["metadata"]["attention_type"] == kind
        np.testing.assert_allclose(values["metadata"]["patch_mass"], expected.sum(), atol=1e-5)
    # A slip by one token, head or batch is seen.
    for slip in (
        by_hand(weights, kind, batch, token - 1),
        by_hand(weights, kind, 1 - batch, token),
    ):
        assert np.abs(maps - slip).max() > 1e-3
    other = get_attention_values(attention, images, head_idx=0, batch_idx=batch, **named)
    assert np.abs(other["attention_maps"] - expected).max() > 1e-3


def test_a_captured_model_and_its_dense_weights_agree(images: Tensor) -> None:
    attention = make("global")
    lazy = get_attention_values(attention, images, 30, 0, SPECIAL, "global")
    dense = get_attention_values(attention.dense(), images, 30, 0, SPECIAL, "global")
    np.testing.assert_allclose(lazy["attention_maps"], dense["attention_maps"], atol=1e-7)
    assert lazy["metadata"].pop("block_idx") == 3
    assert dense["metadata"].pop("block_idx") is None
    mass = lazy["metadata"].pop("patch_mass"), dense["metadata"].pop("patch_mass")
    assert mass[0] == pytest.approx(mass[1], abs=1e-6)
    assert lazy["metadata"] == dense["metadata"]


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_heads_together(reduction: str, images: Tensor) -> None:
    attention = make("global")
    rows = reference(attention)[1, :, 30]
    row = rows.mean(0) if reduction == "mean" else rows.max(0)
    expected = row.reshape(S, P)[:, SPECIAL:].reshape(S, ROWS, COLS)
    values = get_attention_values(attention, images, 30, reduction, batch_idx=1)
    np.testing.assert_allclose(values["attention_maps"], expected, atol=2e-6)
    assert values["metadata"]["head_idx"] == reduction


def test_a_negative_head_counts_from_the_end(images: Tensor) -> None:
    last = get_attention_values(make("global"), images, 30, -1)
    assert last["metadata"]["head_idx"] == 2


def test_renormalised_maps_sum_to_one(images: Tensor) -> None:
    raw = get_attention_values(make("global"), images, 30)
    over = get_attention_values(make("global"), images, 30, renormalize=True)
    mass = raw["metadata"]["patch_mass"]
    assert 0 < mass < 1
    assert over["metadata"]["patch_mass"] == mass
    np.testing.assert_allclose(over["attention_maps"].sum(), 1, atol=1e-6)
    np.testing.assert_allclose(over["attention_maps"] * mass, raw["attention_maps"], atol=1e-7)


@pytest.mark.parametrize("kind", ["frame", "global"])
def test_resizing_is_bilinear(kind: str, images: Tensor) -> None:
    values = get_attention_values(make(kind), images, 9)
    maps = torch.from_numpy(np.atleast_3d(values["attention_maps"])).float()
    maps = maps.permute(2, 0, 1) if kind == "frame" else maps
    size = (ROWS * PATCH, COLS * PATCH)
    expected = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    resized = values["attention_maps_resized"]
    assert resized.shape == (size if kind == "frame" else (S, *size))
    np.testing.assert_allclose(resized, expected.numpy().reshape(resized.shape), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_pictures_come_back(dtype: torch.dtype, images: Tensor) -> None:
    given = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
    found = get_attention_values(make("global"), given, 9, batch_idx=1)["images"]
    assert found.shape == (S, ROWS * PATCH, COLS * PATCH, 3)
    np.testing.assert_allclose(found, images[1].permute(0, 2, 3, 1).numpy(), atol=5e-3)


def test_one_scene_needs_no_batch_dimension(images: Tensor) -> None:
    for kind in ("frame", "global"):
        attention = make(kind, batch=1)
        with_batch = get_attention_values(attention, images[:1], 9)
        without = get_attention_values(attention, images[0], 9)
        np.testing.assert_array_equal(with_batch["attention_maps"], without["attention_maps"])


@pytest.mark.parametrize(
    ("kind", "asked", "used", "words"),
    [
        ("global", 0, 5, ("token_idx 0", "camera", "token 5 ", "allow_special")),
        ("global", P + 4, P + 5, ("token_idx 21", "register", f"token {P + 5} ")),
        ("global", S * P, S * P - 1, (f"token_idx {S * P}", f"token {S * P - 1} ")),
        ("global", 10**6, S * P - 1, ("outside 0…50",)),
        ("global", -1, 5, ("token_idx -1", "token 5 ")),
        ("frame", 3, 5, ("token_idx 3", "register")),
        ("frame", P + 7, P - 1, (f"token_idx {P + 7}", "frame_idx=1, token_idx=7")),
        ("frame", S * P, P - 1, (f"token_idx {S * P}", f"token {P - 1} ")),
    ],
)
def test_a_token_that_is_no_patch_is_moved(
    kind: str, asked: int, used: int, words: tuple[str, ...], images: Tensor
) -> None:
    with pytest.warns(VistvisWarning) as caught:
        moved = get_attention_values(make(kind), images, asked)
    (warning,) = caught
    assert warning.filename == __file__  # the caller's line, not the package's
    for word in words:
        assert word in str(warning.message)
    assert moved["metadata"]["token_idx"] == used
    assert moved["metadata"]["requested_token_idx"] == asked
    direct = get_attention_values(make(kind), images, used)
    np.testing.assert_array_equal(moved["attention_maps"], direct["attention_maps"])


def test_special_tokens_on_purpose(images: Tensor) -> None:
    attention = make("global")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = get_attention_values(attention, images, P + 1, allow_special=True)
    row = reference(attention)[0, 0, P + 1].reshape(S, P)[:, SPECIAL:]
    np.testing.assert_allclose(values["attention_maps"].reshape(S, -1), row, atol=2e-6)
    with pytest.warns(VistvisWarning):  # past the end there is nothing to allow
        resolve_token(LAYOUT, 10**6, allow_special=True)


def test_metadata_is_plain(images: Tensor) -> None:
    for kind in ("frame", "global"):
        values = get_attention_values(make(kind), images, np.int64(9), head_idx=np.int64(1))
        text = json.loads(json.dumps(values["metadata"]))
        assert text["token_idx"] == 9
        assert (text["H"], text["W"], text["grid_h"], text["grid_w"]) == (42, 56, ROWS, COLS)


def test_the_strongest_patch_of_every_frame(images: Tensor) -> None:
    attention = make("global")
    weights = reference(attention)[0, 2, 30].reshape(S, P)[:, SPECIAL:]
    matches = query_values(attention, images, Query(30, head_idx=2)).matches
    assert [m.place.frame for m in matches] == [0, 1, 2]
    assert [m.place.patch for m in matches] == weights.argmax(1).tolist()
    np.testing.assert_allclose([m.weight for m in matches], weights.max(1), atol=1e-6)
    np.testing.assert_allclose([m.share for m in matches], weights.sum(1), atol=1e-5)


def plain(row: Tensor) -> Tensor:
    """Global weights, all of whose rows of one head are the same, over S frames."""
    return (row / row.sum()).expand(B, 1, S * P, S * P)


def test_weak_matches_are_told_against_the_uniform_share(images: Tensor) -> None:
    """Frame 0 is looked at, frame 1 has 4.9 times the uniform weight, frame 2 is all but ignored:
    6 times, but little else."""
    keys = S * P
    row = torch.full((S, P), 1e-6)
    row[0, SPECIAL + 3] = 0.4
    row[1, SPECIAL + 4] = 4.9 / keys
    row[2, SPECIAL + 5] = 5.1 / keys
    row[0, 0] = 1 - row.sum()
    for renormalize in (False, True):
        query = Query(30, renormalize=renormalize)
        values = query_values(plain(row.flatten()), images, query)
        scale = values.patch_mass if renormalize else 1
        assert values.uniform * scale == pytest.approx(1 / keys)
        assert [match.weak for match in values.matches] == [False, True, False]
    uniform = query_values(plain(torch.ones(keys)), images, Query(30))
    assert all(match.weak for match in uniform.matches)


def test_a_frame_that_is_hardly_looked_at_has_no_strong_match() -> None:
    """Of 40 × 40 patches, six times the uniform weight on one is next to nothing."""
    layout = TokenLayout(1, (40, 40), KINDS, 1)
    row = torch.full((1605,), 1e-9)
    row[700] = 6 / 1605
    row[0] = 1 - row.sum()
    values = query_values(
        row.expand(1, 1, 1605, 1605), torch.zeros(1, 3, 40, 40), Query(20, patch_size=1)
    )
    (match,) = values.matches
    assert match.weight > 5 / layout.num_tokens
    assert match.weak


def test_maxima_over_heads_are_no_shares(images: Tensor) -> None:
    values = query_values(make("global"), images, Query(30, head_idx="max"))
    assert all(np.isnan(match.share) for match in values.matches)
    assert all(match.weight > 0 for match in values.matches)
    assert values.metadata["patch_mass"] is None
    json.dumps(values.metadata, allow_nan=False)


def test_the_query_in_the_maps(images: Tensor) -> None:
    """Where `own` points, dark frames counted by their number in the scene."""
    values = query_values(make("global"), images, Query(P + SPECIAL + 6))
    assert values.own == (1, 1, 2)
    assert query_values(make("frame"), images, Query(11, frame_idx=2)).own == (0, 1, 2)
    special = query_values(make("global"), images, Query(P, allow_special=True))
    assert special.own is None
    row = torch.full((S, P), 1e-7)
    row[1, SPECIAL + 6], row[0, SPECIAL], row[2, SPECIAL] = 0.6, 0.1, 0.01
    values = query_values(plain(row.flatten()), images, Query(P + SPECIAL + 6))
    assert values.dark_frames() == (2,)
    assert values.dark_frames(norm="linear") == (2,)
    assert values.dark_frames(norm="log") == ()


def test_only_rows_are_computed(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No N×N matrix: `rows` of the one query is all that is asked for."""
    asked = []
    rows = Attention.rows

    def watched(self: Attention, queries: Any, **named: Any) -> Tensor:
        asked.append((queries, named))
        return rows(self, queries, **named)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole matrix was built")

    monkeypatch.setattr(Attention, "rows", watched)
    for name in ("dense", "columns", "log_sum_exp", "__array__", "__torch_function__"):
        monkeypatch.setattr(Attention, name, refuse)
    for head in (1, "mean"):
        get_attention_values(make("global"), images, 30, head)
    assert [queries for queries, _ in asked] == [30, 30]


# -- what does not fit ---------------------------------------------------------------------------


def bare(kind: str, **named: Any) -> Tensor:
    return make(kind, **named).dense()


@pytest.mark.parametrize(
    ("kind", "named", "words"),
    [
        ("frame", {"attention_type": "global"}, ("'global'", "is frame attention")),
        ("global", {"attention_type": "frame"}, ("'frame'", "is global attention")),
        ("global", {"attention_type": "cross"}, ("'cross'", "global")),
        ("global", {"attention_type": "causal"}, ("'frame' or 'global'", "'causal'")),
        ("global", {"head_idx": "median"}, ("'mean' or 'max'", "'median'")),
        ("global", {"frame_idx": 2}, ("lies in frame 0", "frame_idx=2")),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_contradictions(
    kind: str, named: dict[str, Any], words: tuple[str, ...], plain: bool, images: Tensor
) -> None:
    weights = bare(kind) if plain else make(kind)
    with pytest.raises(InputError) as caught:
        get_attention_values(weights, images, 9, **named)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"patch_start_idx": 1}, ("patch_start_idx=1", "has 5 special")),
        ({"patch_size": 16}, ("patch_size=16", "(14, 14)")),
    ],
)
def test_arguments_against_the_site(
    named: dict[str, Any], words: tuple[str, ...], images: Tensor
) -> None:
    with pytest.raises(InputError) as caught:
        get_attention_values(make("global"), images, 9, **named)
    for word in words:
        assert word in str(caught.value)
    # The same values, said again, are no contradiction.
    get_attention_values(make("global"), images, 9, patch_start_idx=5, patch_size=14)


@pytest.mark.parametrize("kind", ["frame", "global"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (B, S + 1, 3, 42, 56),
        (B, S - 1, 3, 42, 56),
        (B, S, 3, 56, 56),
        (B, S, 3, 42, 42),
        (B, S, 3, 43, 57),
        (B + 1, S, 3, 42, 56),
        (S, 3, 42, 56),
        (B, S, 1, 42, 56),
        (3, 42, 56),
        (0, 3, 42, 56),
    ],
)
def test_pictures_that_do_not_fit(kind: str, plain: bool, shape: tuple[int, ...]) -> None:
    weights = bare(kind) if plain else make(kind)
    with pytest.raises(InputError, match=r"images|pictures"):
        get_attention_values(weights, torch.zeros(shape), 9)


def test_a_captured_site_says_how_many_frames_it_saw() -> None:
    with pytest.raises(InputError, match="'global_block_3' saw 3 frames, images has 4"):
        get_attention_values(make("global"), torch.zeros(B, S + 1, 3, 42, 56), 9)


def test_another_patch_size_and_start(images: Tensor) -> None:
    """Plain tensors of another model: patch size and special tokens come as arguments."""
    tokens = 1 + 6 * 8
    weights = torch.softmax(torch.randn(B, 2, S * tokens, S * tokens), -1)
    values = get_attention_values(
        weights, images, tokens + 10, 1, 1, "global", patch_size=7, batch_idx=1
    )
    row = weights[1, 1, tokens + 10].reshape(S, tokens)[:, 1:].reshape(S, 6, 8)
    np.testing.assert_array_equal(values["attention_maps"], row.numpy())
    with pytest.raises(InputError, match="patch_size"):
        get_attention_values(weights, images, 20)


def test_one_frame_fits_both_kinds(images: Tensor) -> None:
    weights = bare("frame", batch=1)[:1]
    for kind in ("frame", "global"):
        values = get_attention_values(weights, images[0, :1], 9, attention_type=kind)
        assert values["metadata"]["attention_type"] == kind


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [],
        [torch.zeros(1)],
        {"attn_weights": 1},
        torch.zeros(3, 3),
        torch.zeros(1, 1, 4, 4, dtype=torch.int64),
        torch.rand(1, 1, 4, 5),
    ],
)
def test_things_that_are_no_weights(weights: Any, images: Tensor) -> None:
    with pytest.raises(InputError):
        get_attention_values(weights, images, 9)


def test_out_of_range(images: Tensor) -> None:
    attention = make("global")
    for named in ({"head_idx": 3}, {"head_idx": -4}, {"batch_idx": 2}):
        with pytest.raises(IndexOutOfRange, match=r"0…\d"):
            get_attention_values(attention, images, 9, **named)
    with pytest.raises(IndexOutOfRange, match="frame_idx 3"):
        get_attention_values(make("frame"), images, 9, frame_idx=3)


def test_cross_attention_is_refused(images: Tensor) -> None:
    attention = make("global")
    assert attention.site is not None
    window = attention.with_site(replace(attention.site, kind="window"))
    with pytest.raises(InputError, match="window attention"):
        get_attention_values(window, images, 9)


def test_overflow_is_refused(images: Tensor) -> None:
    weights = bare("global")
    weights[0, 0, 9, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        get_attention_values(weights, images, 9)


def test_normalised_pictures_are_refused(images: Tensor) -> None:
    for wrong in (images * 255, (images - 0.45) / 0.22):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            get_attention_values(make("global"), wrong, 9)
