"""One thread and fixed seeds, so that every test gives the same numbers everywhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed every random generator that a test or a model could draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
