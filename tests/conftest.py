"""One thread and fixed seeds, so that every test gives the same numbers everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """On a machine with a GPU, too, a test runs on the CPU that its references run on, unless it is marked ``gpu``."""
    if item.get_closest_marker("gpu") is not None:
        return (yield)
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        return (yield)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed every random generator that a test or a model could draw from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
