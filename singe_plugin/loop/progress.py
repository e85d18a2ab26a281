"""How far a run is: what is removed, and what is still to go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from singe_plugin.loop.budget import GroupSpec

__all__ = ["CountedProgress", "Progress"]


@dataclass
class Progress:
    """How far a run is; what a checkpoint stores next to the tensors.

    Attributes:
        plan: layer -> units to remove.
        next_layer: the position of the first layer that is not done.
        removals: ``(layer, units)`` in the numbering that was current then, in order.
        alive: layer -> the original numbers of its remaining units.
        end_done: steps of the final fine-tuning phase that are done.
        finished: whether the run is over.
        goal: for rounds: layer -> units to remove in all, where that is fixed from the start.
        before: for rounds: the sizes of the model before the first.
        stopped: why nothing more is removed; None where the plan is followed to its end.
    """

    plan: dict[str, int]
    next_layer: int = 0
    removals: list[tuple[str, list[int]]] = field(default_factory=list)
    alive: dict[str, list[int]] = field(default_factory=dict)
    end_done: int = 0
    finished: bool = False
    goal: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None

    def begin(self, layers: Sequence[GroupSpec]) -> None:
        """Take over what the host has now, if nothing is known of it yet."""
        if not self.alive:
            self.alive = {layer.name: list(range(layer.units)) for layer in layers}

    def left(self, layer: str) -> int:
        """How many units remain."""
        return len(self.alive[layer])

    def original(self, layer: str) -> int:
        """How many units there were."""
        return self.left(layer) + sum(len(units) for name, units in self.removals if name == layer)

    def remove(self, layer: str, chosen: Sequence[int]) -> tuple[int, ...]:
        """Write a removal down; the original numbers of the units."""
        alive, gone = self.alive[layer], set(chosen)
        names = tuple(alive[i] for i in chosen)
        self.alive[layer] = [unit for i, unit in enumerate(alive) if i not in gone]
        self.removals.append((layer, list(chosen)))
        return names


@dataclass
class CountedProgress(Progress):
    """The progress of a host with millions of units, whose masks say which are gone: only their number is kept."""

    counts: dict[str, int] = field(default_factory=dict)
    originals: dict[str, int] = field(default_factory=dict)

    def begin(self, layers: Sequence[GroupSpec]) -> None:
        self.counts = {layer.name: layer.units for layer in layers}
        done = [layer.name for layer in layers if self.plan.get(layer.name, 0) > 0][: self.next_layer]
        self.originals = {n: count + (self.plan[n] if n in done else 0) for n, count in self.counts.items()}

    def left(self, layer: str) -> int:
        return self.counts[layer]

    def original(self, layer: str) -> int:
        return self.originals[layer]

    def remove(self, layer: str, chosen: Sequence[int]) -> tuple[int, ...]:
        self.counts[layer] -= len(chosen)
        return ()
