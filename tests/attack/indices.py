"""Indices of every kind: what torch gives, `Attention` gives; what torch refuses, it refuses."""

# ruff: noqa: PT017 - these are no tests of pytest

from __future__ import annotations

import warnings
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistvis import Attention
from vistvis.errors import VistvisError

from .truth import Truth

REFUSALS = (IndexError, TypeError, ValueError, RuntimeError)


def item(random: Random, size: int) -> Any:
    """One item of an index; now and then one that can't be."""
    low, high = -size - (random.random() < 0.05), size - (random.random() > 0.05)
    numbers = [random.randint(low, max(low, high)) for _ in range(random.choice((0, 1, 2, 2, 3)))]
    numbers = numbers or ([] if random.random() < 0.3 else [0])
    number, pair = random.choice(numbers or [0]), [*numbers, 0, 0][:2]
    length = size if random.random() < 0.8 else size + random.choice((-1, 1))
    bools = [random.random() < 0.5 for _ in range(max(0, length))]
    makers = (
        *(lambda: number, lambda: number, lambda: np.int64(number), lambda: torch.tensor(number)),
        lambda: bounds(random, size),
        lambda: bounds(random, size),
        *(lambda: numbers, lambda: np.array(numbers, dtype=np.int64)),
        lambda: torch.tensor(numbers, dtype=random.choice((torch.int64, torch.int32))),
        *(lambda: torch.tensor([pair, pair[::-1]]), lambda: [pair, pair[::-1]]),
        *(lambda: torch.tensor(bools), lambda: bools, lambda: np.array(bools, dtype=bool)),
        *(lambda: torch.tensor([number]), lambda: np.array(number), lambda: tuple(numbers)),
    )
    odd = (
        *(lambda: 1.0, lambda: "0", lambda: torch.tensor([0.0]), lambda: object(), lambda: [None]),
        *(lambda: torch.zeros(2, 2, dtype=torch.bool), lambda: 1j, lambda: {0}, lambda: b"0"),
    )
    return random.choice(odd if random.random() < 0.03 else makers)()


def bounds(random: Random, size: int) -> slice:
    ends = [random.choice((None, random.randint(-size - 2, size + 2))) for _ in "ab"]
    return slice(*ends, random.choice((None, None, 1, 2, 3, 3, 0, -1)))


def index_of(random: Random, shape: tuple[int, ...]) -> Any:
    """An index: items, Ellipsis, None, a mask over several dimensions; or too many of them."""
    roll = random.random()
    if roll < 0.06:
        dims = random.randint(2, 4)
        wrong = random.random() < 0.2
        sizes = [n + (wrong and d == 0) for d, n in enumerate(shape[:dims])]
        mask = torch.rand(sizes, generator=torch.Generator().manual_seed(random.getrandbits(60)))
        rest = [item(random, n) for n in shape[dims:]]
        return (mask > 0.5, *rest) if rest and random.random() < 0.5 else mask > 0.5
    count = random.choice((1, 2, 3, 4, 4, 4, 4, 5)) if random.random() < 0.3 else 4
    items = [item(random, shape[d % 4]) for d in range(random.randint(1, count))]
    if random.random() < 0.3:
        at = random.randint(0, len(items))
        items[at : at + (random.random() < 0.7)] = [Ellipsis]
    if random.random() < 0.15:
        items.insert(random.randint(0, len(items)), None)
    # A list of lists alone is a tuple to some versions of torch, as it once was to numpy.
    nested = isinstance(items[0], list) and items[0] and not isinstance(items[0][0], (int, bool))
    alone = len(items) == 1 and not nested and random.random() < 0.5
    return items[0] if alone else tuple(items)


def in_torch(tensor: Tensor, index: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tensor[index]
        except REFUSALS as error:
            return error


def check_index(random: Random, real: Attention, truth: Truth) -> None:
    index = index_of(random, truth.shape)
    wanted = in_torch(truth.weights, index)
    text = f"index {index!r} of {truth.shape}"
    try:
        found = real[index]
    except VistvisError as error:
        # Torch does not look at the numbers of an index that takes nothing.
        nothing = isinstance(error, IndexError) and not getattr(wanted, "numel", lambda: 1)()
        given = getattr(wanted, "shape", None)
        assert isinstance(wanted, Exception) or nothing, (
            f"{text}: torch gives {given}, here {error}"
        )
        return
    except Exception as error:
        raise AssertionError(f"{text}: {type(error).__name__}: {error}") from error
    assert not isinstance(wanted, Exception), f"{text}: torch refuses it ({wanted})"
    truth.compare_tensors(found, wanted, in_torch(truth.tolerance, index), what=text)
