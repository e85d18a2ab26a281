"""What the tables of the zoo's models are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Entry", "images", "made", "of", "tokens"]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        library: the package that it is of, as pip calls it.
        make: builds it, with random weights.
        inputs: what it is called with.
        fast: whether it is in the subset that CI runs where the library is installed.
    """

    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    fast: bool = False


def of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def made(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: of(path)(*args, **options)  # type: ignore[no-any-return]


def tokens(length: int = 12, words: int = 90) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, words, (2, length))}


def images(size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size)
