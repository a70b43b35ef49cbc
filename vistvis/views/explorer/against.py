"""The sites of two runs of one scene, or of two checkpoints, that can be set side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vistvis.attention import Attention
from vistvis.errors import CaptureError, InputError
from vistvis.views.maps import last_of

_LAYOUTS = ("query_layout", "key_layout", "frames_in_batch", "first_frame")
_ORDERS = ("query_order", "key_order")


def shared_sites(
    source: Mapping[str, Attention], other: Mapping[str, Attention], names: Sequence[str]
) -> tuple[list[str], list[dict[str, str]]]:
    """Which of the sites `names` both have alike, and of the others `{name, reason}`.

    Alike are sites of one name, of as many heads, queries and keys, and with their tokens in the
    same places; so that a token, and a head, mean the same in both. InputError if there is none.
    """
    shared: list[str] = []
    left: list[dict[str, str]] = []
    for name in names:
        if name not in other:
            left.append({"name": name, "reason": "the other has no site of that name"})
            continue
        try:
            reason = _difference(last_of(source[name]), last_of(other[name]))
        except (CaptureError, InputError) as error:
            reason = str(error)
        if reason:
            left.append({"name": name, "reason": reason})
        else:
            shared.append(name)
    if not shared:
        told = f"{left[0]['name']}: {left[0]['reason']}" if left else "there is no site"
        raise InputError(
            f"two runs are set side by side at sites that both have alike, and none is: {told}; "
            "give runs of the same pictures and the same kind of model"
        )
    return shared, left


def labels_of(*runs: Mapping[str, Attention]) -> list[str]:
    """What tells runs apart: the names of their folders, else their models, else their numbers."""
    folders = [str(getattr(run, "path", "")).rstrip("/").rpartition("/")[2] for run in runs]
    models = [str(getattr(run, "model", None) or "") for run in runs]
    for labels in (folders, models):
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    return [f"run {number}" for number in range(1, len(runs) + 1)]


def _difference(one: Attention, other: Attention) -> str:
    """What keeps two sites from being set side by side; nothing where they can be."""
    if one.shape != other.shape:
        shapes = [" × ".join(map(str, each.shape)) for each in (one, other)]
        return f"batch, heads, queries and keys are {shapes[0]}, the other's {shapes[1]}"
    first, second = one.site, other.site
    if first is None or second is None:
        return "" if first is second else "only one of them says what its tokens are"
    if any(getattr(first, part) != getattr(second, part) for part in _LAYOUTS):
        return "the tokens lie elsewhere in the other's pictures"
    if any(getattr(first, part) != getattr(second, part) for part in _ORDERS):
        return "the other has its tokens in another order"
    orders = [order for order in (first.frame_order, second.frame_order) if order is not None]
    if len(orders) == 1 or (orders and not torch.equal(orders[0].cpu(), orders[1].cpu())):
        return "the other has its frames in another order"
    return ""
