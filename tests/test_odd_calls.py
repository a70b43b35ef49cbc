"""What is said of calls that are plainly meant otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.errors import InputError


def test_a_model_is_a_module() -> None:
    with pytest.raises(InputError, match=r"a model is a torch\.nn\.Module, got int"):
        vistvis.find_sites(3)  # type: ignore[arg-type]


def test_a_site_is_named_by_a_string() -> None:
    attention: Any = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with vistvis.capture(attention) as captured:
        attention(*[torch.rand(1, 3, 8)] * 3)
    with pytest.raises(InputError, match="a site is named by a string, got 11"):
        captured[11]  # type: ignore[index]


def test_attention_says_which_layouts_it_has() -> None:
    one = TokenLayout(1, (2, 2))
    two = TokenLayout(2, (2, 2))
    site = SiteInfo("cross", query_layout=one, key_layout=two)
    attention = Attention(query=torch.rand(1, 1, 4, 2), key=torch.rand(1, 1, 8, 2), site=site)
    assert (attention.query_layout, attention.key_layout) == (one, two)
    given = Attention.from_weights(torch.rand(1, 1, 4, 8))
    assert given.query_layout is given.key_layout is None
    with pytest.raises(AttributeError, match=r"\.query_layout and \.key_layout"):
        attention.layout  # noqa: B018
