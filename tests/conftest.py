"""Settings for every test."""

from __future__ import annotations

import os

# Before torch is imported: a fork can't go on with OpenMP's threads, and threads of other counts
# round otherwise.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

# Fixed examples and no deadline: a test run says the same thing on every machine.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
