"""An endless stream of batches whose position can be saved and found again, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from singe_plugin.errors import DataError
from singe_plugin.method.batches import materialise, read
from singe_plugin.state import RngState

__all__ = ["BatchStream", "loader_generators"]


class BatchStream:
    """An endless stream of batches whose position can be saved and found again, exactly.

    A new pass over the loader starts whenever the last one is used up. The random state at its start and the number
    of batches taken from it are the position.

    Args:
        batches: a DataLoader or any other iterable that can be iterated again.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = materialise(batches)
        self.taken = 0
        self.start: RngState | None = None
        self.generators = loader_generators(self.batches)
        self._starts: list[Tensor] = []
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self.start = RngState.capture()
                self._starts = [g.get_state() for g in self.generators]
                self._iterator, self.taken = self._open(), 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            self.taken += 1
            return batch
        raise DataError("the fine-tuning loader is empty; give at least one batch of (inputs, targets)")

    def _open(self) -> Iterator[Any]:
        """Begin a pass; where ranks have samples of their own, these are drawn anew, with the same number on all."""
        sampler = getattr(self.batches, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(int(torch.randint(2**31, ())))
        return read(self.batches, "the fine-tuning loader")

    def position(self) -> dict[str, Any]:
        """What :meth:`seek` needs to continue from here."""
        return {"taken": self.taken if self._iterator is not None else 0, "start": self.start, "loaders": self._starts}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a saved position; the current random state is left as it is."""
        self._iterator, self.taken, self.start = None, 0, position["start"]
        if not position["taken"] or self.start is None:
            return
        now = RngState.capture()
        self.start.restore()
        for generator, state in zip(self.generators, position["loaders"], strict=True):
            generator.set_state(state)
        self._starts = list(position["loaders"])
        self._iterator = self._open()
        for _ in range(position["taken"]):
            next(self._iterator)
            self.taken += 1
        now.restore()


def loader_generators(batches: Any) -> list[torch.Generator]:
    """The generators a DataLoader carries of its own."""
    holders = (
        batches,
        getattr(batches, "sampler", None),
        getattr(getattr(batches, "batch_sampler", None), "sampler", None),
    )
    found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    return list(found.values())
