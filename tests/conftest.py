"""Settings for every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Fixed examples and no deadline: a test run says the same thing on every machine.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
