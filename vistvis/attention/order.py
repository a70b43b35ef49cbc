"""Which original tokens captured ones are, where a model reorders, drops or merges them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistvis.errors import IndexOutOfRange, InputError, LayoutError


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """Which original tokens captured ones are.

    Parameters
    ----------
    tokens
        `(M,)`, or `(B, M)` where batch items differ: original tokens, numbered as in the layout of
        this side; −1 stands for a token that the layout does not have.
    members
        Of the same shape: the captured token that each of them is part of. None: the i-th one is
        the i-th captured token. Merged tokens are several originals in one captured token; an
        original in several captured tokens is one that the model kept twice: the first is its row.
    """

    tokens: Tensor
    members: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "members"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
                raise InputError(f"{name} of an order is an int64 tensor")
            if tensor.ndim not in (1, 2) or tensor.shape != self.tokens.shape:
                raise InputError(
                    f"tokens of an order are (M,) or (B, M), and members too; got "
                    f"{tuple(self.tokens.shape)} and {tuple(tensor.shape)}"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenOrder) or (self.members is None) != (other.members is None):
            return False
        return torch.equal(self.tokens, other.tokens) and (
            self.members is None or torch.equal(self.members, other.members)  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]

    def check(self, batch: int, count: int) -> None:
        """`LayoutError` if it is no order of `count` captured tokens in `batch` batch items."""
        items = {1: batch, 2: self.tokens.shape[0]}[self.tokens.ndim]
        if self.members is None:
            fits = self.tokens.shape[-1] == count
        else:
            fits = not self.members.numel() or (
                int(self.members.min()) >= 0 and int(self.members.max()) < count
            )
        if items != batch or not fits:
            raise LayoutError(
                f"an order {tuple(self.tokens.shape)} does not fit {count} captured tokens in "
                f"{batch} batch items; it was made for other attention"
            )

    def index(self, token: int, *, batch: int = 0) -> int:
        """The captured token that an original one is (part of).

        `IndexOutOfRange` if the model dropped it before this site.
        """
        tokens, members = self._of(batch)
        found = (tokens == token).nonzero()
        if not len(found):
            raise IndexOutOfRange(f"token {token} is not among the tokens that this site saw")
        at = int(found[0])
        return at if members is None else int(members[at])

    def originals(self, index: int, *, batch: int = 0) -> Tensor:
        """The original tokens of one captured token, `(m,)`."""
        tokens, members = self._of(batch)
        chosen = tokens[index : index + 1] if members is None else tokens[members == index]
        return chosen[chosen >= 0]

    def spread(self, row: Tensor, count: int, *, batch: int = 0) -> Tensor:
        """Weights over captured tokens `(…, n)` as weights over `count` original ones.

        Returns `(…, count)`. Merged tokens share their weight equally; the weight of a token
        outside the layout is left out, and originals that the model dropped get 0.
        """
        tokens, members = self._of(batch)
        tokens = tokens.to(row.device)
        if members is None:
            parts = row
        else:
            members = members.to(row.device)
            sizes = torch.bincount(members, minlength=row.shape[-1]).clamp_min(1)
            parts = (row / sizes)[..., members]
        known = tokens >= 0
        out = row.new_zeros(*row.shape[:-1], count)
        return out.index_add_(-1, tokens[known], parts[..., known])

    def _of(self, batch: int) -> tuple[Tensor, Tensor | None]:
        if self.tokens.ndim == 1:
            return self.tokens, self.members
        members = None if self.members is None else self.members[batch]
        return self.tokens[batch], members
