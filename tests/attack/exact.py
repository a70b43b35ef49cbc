"""Random `Attention`, everything it gives against float64: shapes with zeros, masks, any index."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistvis import Attention, SiteInfo, TokenLayout, TokenOrder
from vistvis.errors import IndexOutOfRange, InputError

from .case import Case, Setting
from .indices import check_index
from .truth import Truth, tensor_of

DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def attention(setting: Setting) -> Iterator[Case]:
    """`Attention` made of anything, asked for anything."""
    for number in range(setting.count(20_500)):
        yield Case(str(number), partial(one, setting.random(f"attention/{number}")))


def orders(setting: Setting) -> Iterator[Case]:
    """`token_rows`: rows by original token, through orders."""
    for number in range(setting.count(1_500)):
        yield Case(str(number), partial(one_order, setting.random(f"orders/{number}")))


# -- making one ------------------------------------------------------------------------------------


def sizes(random: Random) -> tuple[int, int, int, int, int, int]:
    """B, h, h_k, Nq, Nk, d; each may be what only an empty tensor has."""
    heads = random.choice((1, 1, 2, 3, 4, 6))
    key_heads = random.choice([n for n in range(1, heads + 1) if heads % n == 0])
    queries = random.randint(1, 9)
    keys = queries if random.random() < 0.5 else random.randint(1, 12)
    batch, width = random.randint(1, 3), random.choice((1, 2, 3, 4, 8, 16))
    batch, queries, keys = (0 if random.random() < 0.03 else n for n in (batch, queries, keys))
    return batch, heads, key_heads, queries, keys, width


def mask_of(random: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mask that broadcasts to the shape, of any of the kinds that models use."""
    dims = [n if random.random() < 0.6 else 1 for n in shape][random.randint(0, 4) :]
    kind = random.choice(("bool", "bias", "-1e9", "lowest", "-inf", "far", "bool rows"))
    taken = tensor_of(random, dims, torch.float32) > -0.3
    if kind == "bool rows" and dims:
        taken &= tensor_of(random, [*dims[:-1], 1], torch.float32) > -0.5
    if kind.startswith("bool"):
        return taken
    dtype = random.choice((torch.float32, torch.float64, torch.float16, dtype))
    lowest = torch.finfo(dtype).min
    values = {"bias": None, "-1e9": -1e9, "lowest": lowest, "-inf": -math.inf, "far": -3e4}
    value = values[kind]
    if value is None:
        return tensor_of(random, dims, dtype)
    if random.random() < 0.4 and dims:  # whole rows of nothing else
        taken &= tensor_of(random, [*dims[:-1], 1], torch.float32) > 0
    far = torch.full_like(taken, max(value, lowest) if math.isfinite(value) else value, dtype=dtype)
    return torch.where(taken, torch.zeros_like(far), far)


def made(random: Random) -> tuple[Attention, Truth]:
    """An `Attention` and what is true of it."""
    batch, heads, key_heads, queries, keys, width = sizes(random)
    dtype, shape = random.choice(DTYPES), (batch, heads, queries, keys)
    if random.random() < 0.08:
        weights = tensor_of(random, shape, dtype).abs()
        return Attention.from_weights(weights), Truth.given(weights)
    size = random.choice((0.1, 1.0, 1.0, 3.0, 10.0, 30.0, 300.0))
    query = tensor_of(random, (batch, heads, queries, width), dtype, size=size)
    key = tensor_of(random, (batch, key_heads, keys, width), dtype, size=size)
    if random.random() < 0.3:  # views, as a projection gives them
        query, key = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    scale: Any = random.choice((None, None, 0.37, 1, -0.5, 0.0, "heads", "one"))
    if isinstance(scale, str):
        scale = tensor_of(random, (heads if scale == "heads" else 1,), random.choice(DTYPES))
    options: dict[str, Any] = {"scale": scale, "causal": random.random() < 0.25}
    if random.random() < 0.5:
        options["mask"] = mask_of(random, shape, dtype)
    if queries == keys > 0 and random.random() < 0.2:
        starts = sorted({0, *(random.randrange(queries) for _ in range(random.randint(0, 3)))})
        options["segments"] = torch.tensor(starts) if random.random() < 0.5 else starts
    elif random.random() < 0.12:
        which = random.randrange(3)
        if which != 1:
            options["score_mod"] = lambda score, b, h, q, k: score * 0.5 + (q - k) * 0.25 + h
        if which != 0:
            options["mask_mod"] = lambda b, h, q, k: (q + k + b) % 3 != 0
    return Attention(query=query, key=key, **options), Truth.of(query, key, **options)


# -- asking ----------------------------------------------------------------------------------------


def one(random: Random) -> None:
    roll = random.random()
    if roll < 0.04:
        poisoned(random)
        return
    if roll < 0.06:
        refused(random)
        return
    real, truth = made(random)
    assert tuple(real.shape) == truth.shape
    asked = random.sample(ASKED, random.randint(3, 5))
    for ask in asked:
        ask(random, real, truth)


def ask_dense(random: Random, real: Attention, truth: Truth) -> None:
    ways = (real.dense, lambda: real + 0, lambda: torch.as_tensor(np.asarray(real)), real.abs)
    truth.compare(random.choice(ways)(), (ALL,) * 4, what="dense")


ALL = slice(None)


def selection(random: Random, size: int) -> tuple[Any, list[int]]:
    """A selection as `rows` takes it, and the numbers that it means."""
    kind = random.choice(("none", "int", "slice", "list", "tensor", "range"))
    numbers = [random.randint(-size, size - 1) for _ in range(random.randint(0, 4))] if size else []
    plain = [number % size for number in numbers]
    if kind == "int" and size:
        number = random.randint(-size, size - 1)
        return number, [number % size]
    if kind == "slice":
        low, high = (random.choice((None, random.randint(-size - 2, size + 2))) for _ in "ab")
        chosen = slice(low, high, random.choice((None, 1, 2, 3)))
        return chosen, list(range(size)[chosen])
    if kind == "list":
        return numbers, plain
    if kind == "tensor":
        dtype = random.choice((torch.int64, torch.int32, torch.int16, torch.int8))
        return torch.tensor(numbers, dtype=dtype), plain
    if kind == "range":
        count = random.randint(0, size)
        return range(count), list(range(count))
    return None, list(range(size))


def ask_part(random: Random, real: Attention, truth: Truth, *, what: str = "rows") -> None:
    chosen = [selection(random, n) for n in truth.shape]
    box = [numbers for _, numbers in chosen]
    side = 3 if what == "columns" else 2
    box[5 - side] = list(range(truth.shape[5 - side]))
    (batch, _), (heads, _) = chosen[:2]
    if what == "logits" and not truth.has_logits:
        expect_refusal(lambda: real.logits(chosen[side][0]))
        return
    if what == "columns" and random.random() < 0.5 and truth.has_logits:
        real.log_sum_exp()
    found = getattr(real, what)(chosen[side][0], batch=batch, heads=heads)
    truth.compare(found, tuple(box), what=what)


def ask_blocks(random: Random, real: Attention, truth: Truth) -> None:
    chosen = [selection(random, n) for n in truth.shape[:3]]
    box = (*(numbers for _, numbers in chosen), list(range(truth.shape[3])))
    names = ("batch", "heads", "queries")
    limit = random.choice((None, 1, 7, 40, 1000))
    selections = {name: one for name, (one, _) in zip(names, chosen, strict=True)}
    out = torch.full([len(numbers) for numbers in box], math.nan, dtype=real.dtype)
    for index, weights in real.row_blocks(max_bytes=limit, **selections):
        assert bool(out[index].isnan().all()), "a row came twice"
        out[index] = weights
    truth.compare(out, box, what="row_blocks")


def ask_sums(random: Random, real: Attention, truth: Truth) -> None:
    if not truth.has_logits:
        expect_refusal(real.log_sum_exp)
    else:
        truth.compare_sums(real.log_sum_exp())


def ask_index(random: Random, real: Attention, truth: Truth) -> None:
    check_index(random, real, truth)


def ask_copy(random: Random, real: Attention, truth: Truth) -> None:
    made = random.choice(
        (
            copy.deepcopy,
            lambda one: pickle.loads(pickle.dumps(one)),
            lambda one: one.detach(),
            lambda one: one.with_site(SiteInfo("x")),
            lambda one: one.cpu(),
        )
    )(real)
    assert (made.shape, made.dtype) == (real.shape, real.dtype)
    assert torch.equal(made.dense(), real.dense()), "a copy gives other weights"


ASKED = (
    *(ask_dense, ask_part, partial(ask_part, what="columns"), partial(ask_part, what="columns")),
    *(partial(ask_part, what="logits"), ask_blocks, ask_sums, ask_index, ask_index, ask_copy),
)


def expect_refusal(call: Any) -> None:
    try:
        call()
    except InputError:
        return
    raise AssertionError("it was to be refused")


def poisoned(random: Random) -> None:
    """NaN or infinity in queries, keys, scale or mask: an error where it's met, never a weight."""
    shape = (1, 2, random.randint(1, 5), random.randint(1, 5))
    query, key = (torch.ones(1, 2, n, 3) * 0.5 for n in shape[2:])
    options: dict[str, Any] = {}
    bad = random.choice((math.nan, math.inf, -math.inf))
    where = random.choice(("query", "key", "scale", "mask"))
    if where in ("query", "key"):
        tensor = query if where == "query" else key
        tensor.view(-1)[random.randrange(tensor.numel())] = bad
    elif where == "scale":
        options["scale"] = torch.tensor([1.0, bad])
    else:
        bad = math.nan if bad == -math.inf else bad
        options["mask"] = torch.zeros(shape[2:])
        options["mask"].view(-1)[random.randrange(shape[2] * shape[3])] = bad
    real = Attention(query=query, key=key, **options)
    ways = {
        "dense": real.dense,
        "rows": lambda: real.rows(None),
        "columns": lambda: real.columns(None),
        "one column": lambda: [real[0, :, :, k] for k in range(shape[3])],
        "row_blocks": lambda: list(real.row_blocks()),
        "log_sum_exp": real.log_sum_exp,
        "single rows": lambda: [real[0, h, q] for h in (0, 1) for q in range(shape[2])],
    }
    name = random.choice(list(ways))
    try:
        ways[name]()
    except InputError:
        return
    raise AssertionError(f"{bad} in the {where} gave numbers: {name}")


def refused(random: Random) -> None:
    """Sizes and types that can't be: an InputError when it is made, and nothing else."""
    query, key = torch.ones(2, 4, 3, 5), torch.ones(2, 2, 6, 5)
    wrong: list[dict[str, Any]] = [
        {"query": query[..., :0], "key": key[..., :0]},
        {"query": query[:, :0]},
        {"key": key[:, :0]},
        {"key": torch.ones(2, 3, 6, 5)},
        {"key": key[:1]},
        {"key": key[..., :4]},
        {"query": query.long()},
        {"query": query[0]},
        {"key": key.to(torch.complex64)},
        {"key": None},
        {"query": "query"},
        *(
            {"scale": scale}
            for scale in ("1", True, 1j, [1.0], torch.ones(3), torch.ones(4).bool())
        ),
        *({"mask": mask} for mask in (torch.ones(2, 6).bool(), torch.ones(3, 6).long(), [1], 0.0)),
        {"mask": torch.zeros(1, 1, 1, 3, 6)},
        {"mask": torch.zeros(3, 7)},
        {"segments": [0]},
        *({"key": torch.ones(2, 2, 3, 5), "segments": s} for s in ([1], [0, 0], [0, 3], [], [0.5])),
        {"segments": "0"},
    ]
    chosen = random.choice(wrong)
    expect_refusal(lambda: Attention(**{"query": query, "key": key, **chosen}))


# -- orders ----------------------------------------------------------------------------------------


def one_order(random: Random) -> None:
    batch, heads, frames = random.randint(1, 3), random.randint(1, 3), random.randint(1, 3)
    grid = (random.randint(1, 2), random.randint(1, 3))
    layout = TokenLayout(frames, grid)
    originals, captured = layout.num_tokens, random.randint(1, layout.num_tokens + 2)
    each = random.random() < 0.5  # an order for each batch item
    merged = random.random() < 0.6
    count = captured if not merged else random.randint(1, originals + 3)
    orders = []
    for _ in range(batch if each else 1):
        tokens = [random.randint(-1, originals - 1) for _ in range(count)]
        if not merged:
            tokens = (random.sample(range(originals), originals) + [-1] * captured)[:captured]
        orders.append((tokens, [random.randrange(captured) for _ in tokens] if merged else None))
    stack = [
        torch.tensor([order[part] for order in orders]) if merged or not part else None
        for part in (0, 1)
    ]
    tensors = [t if t is None or each else t[0] for t in stack]
    order = TokenOrder(*tensors)
    sides = random.choice(("query", "key", "both"))
    site = SiteInfo(
        "s",
        query_layout=layout,
        key_layout=layout,
        query_order=order if sides != "key" else None,
        key_order=order if sides != "query" else None,
    )
    captured_queries = captured if sides != "key" else originals
    captured_keys = captured if sides != "query" else originals
    query = tensor_of(random, (batch, heads, captured_queries, 4), torch.float32)
    key = tensor_of(random, (batch, heads, captured_keys, 4), torch.float32)
    real = Attention(query=query, key=key, site=site)
    dense = Truth.of(query, key, scale=None, causal=False).weights
    item = random.randrange(batch)
    tokens, members = orders[item if each else 0]
    token = random.randrange(originals)
    row = token
    if sides != "key":
        if token not in tokens:
            try:
                real.token_rows(token, batch=item)
            except IndexOutOfRange:
                return
            raise AssertionError("a token that the site never saw has a row")
        row = tokens.index(token) if members is None else members[tokens.index(token)]
    found = real.token_rows(token, batch=item)
    wanted = dense[item, :, row]
    if sides != "query":
        spread = torch.zeros(heads, originals, dtype=torch.float64)
        for place, original in enumerate(tokens):
            at = place if members is None else members[place]
            if original >= 0:
                share = 1 if members is None else members.count(at)
                spread[:, original] += wanted[:, at] / share
        wanted = spread
    assert found.shape == (heads, 1, wanted.shape[-1])
    assert torch.allclose(found[:, 0].double(), wanted, rtol=1e-4, atol=1e-5)
