"""Which forward pass a run is of, so that only the same one is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vistvis.errors import InputError
from vistvis.files import version
from vistvis.store.tensors import crc32_of


def pass_id_of(model: nn.Module, inputs: Any, **options: Any) -> str:
    """The identity of a forward pass, for `pass_id` of `RunWriter` and `save_run`.

    `inputs` are what the model is called with: tensors, or lists and dicts of them; `options` what
    else decides the outcome and JSON can hold, such as the model's name and its settings. Which
    sites are stored is none of them. The same pass has the same identity in every process: SHA-256
    over checksums of all weights, buffers and inputs with their dtypes and kinds of device, the
    options, and the versions of vistvis and torch. What is drawn at random while the model runs
    is in none of these: leave a pass with dropout or noise without an identity.

    InputError for options and inputs of other kinds. Cost: reads every weight once, 3 GiB/s.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    weights = [(name, *_said(tensor)) for name, tensor in held]
    facts = {
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "training": model.training,
        "weights": weights,
        "inputs": list(_tensors("inputs", inputs)),
        "options": options,
        "versions": [version(), torch.__version__],
    }
    try:
        text = json.dumps(facts, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(f"options are what JSON can hold: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _said(tensor: Tensor) -> tuple[str, str, list[int], int]:
    return str(tensor.dtype), tensor.device.type, list(tensor.shape), crc32_of(tensor)


def _tensors(where: str, value: Any) -> Iterator[tuple[Any, ...]]:
    """Every tensor and plain value of nested lists and dicts, with its place."""
    if isinstance(value, Tensor):
        yield (where, *_said(value))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{where}[{key!r}]", part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, part in enumerate(value):
            yield from _tensors(f"{where}[{number}]", part)
    elif value is None or isinstance(value, (str, int, float)):
        yield where, value
    else:
        raise InputError(
            f"inputs are tensors, or lists and dicts of them; {where} is a {type(value).__name__}"
        )
