"""A host in memory: what whoever writes another one copies. A layer is a list of numbers, the scores of its units.

:class:`singe_plugin.loop.loop.Host` is the whole protocol: ``model``, ``layers``, ``score``, ``remove`` and ``params``;
``repair`` is called after every turn of a host that has it. Nothing else is asked of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin import FineTune
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.events import Callback, Repaired
from singe_plugin.loop.tuner import Tuner

__all__ = ["MemoryHost", "MemoryTuner", "RepairingHost"]


class MemoryHost:
    """Writes down what it is asked to do."""

    def __init__(self, log: list[Any] | None = None, **layers: Sequence[float]) -> None:
        self.model: nn.Module = nn.Linear(1, 1)
        self.log: list[Any] = [] if log is None else log
        self.values = {name: list(values) for name, values in layers.items()}

    def layers(self) -> list[GroupSpec]:
        return [GroupSpec(name, len(values), name) for name, values in self.values.items()]

    def score(self, layers: Sequence[str]) -> dict[str, Tensor]:
        self.log += [("score", layer, len(self.values[layer])) for layer in layers]
        return {layer: torch.tensor(self.values[layer]) for layer in layers}

    def remove(self, layer: str, units: Sequence[int]) -> None:
        self.log.append(("remove", layer, [self.values[layer][unit] for unit in units]))
        for unit in sorted(units, reverse=True):
            del self.values[layer][unit]

    def params(self) -> int:
        return sum(len(values) for values in self.values.values())


class RepairingHost(MemoryHost):
    """One that can repair."""

    def repair(self, last: bool) -> Repaired:
        self.log.append(("repair", self.params(), last))
        return Repaired((), 0.0)


class MemoryTuner(Tuner):
    """Takes no steps, but writes down how many it was asked for."""

    def __init__(self, log: list[Any], steps: int, every: str) -> None:
        super().__init__(FineTune([(torch.zeros(1, 1), torch.zeros(1))], steps, every))
        self.log = log

    def run(self, model: nn.Module, steps: int, callback: Callback, phase: tuple[int, int] | None = None) -> None:
        if phase is not None:  # a piece of the one phase that has all the steps
            assert phase[1] == self.options.steps
            assert 0 <= phase[0] <= self.options.steps - steps
        self.log.append(("tune", steps))
