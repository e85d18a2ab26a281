"""Units that can be removed one by one, together with everything that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from singe_plugin.method.units import UnitGroup

from .algebra import Atom, contains, labels
from .parameters import ModelAxes, UnitSlice
from .producers import unit_group

__all__ = ["Group", "Together"]


class Group:
    """Units that can be removed one by one: the leaf of an axis, and everything that contains it.

    Attributes:
        name: the first layer that writes the units, with a number if there are several such groups.
        writers: the convolutions and linear layers that write them, by name.
        secondary: whether its units overlap with those of a group with smaller units (an attention head is made of
            head dimensions); such a group is pruned on request only.
        is_heads: whether its units are attention heads.
        in_heads: whether attention heads are made of its units.
        initial: how many units it had.
        left: the units that are left, in the numbering of the unpruned model.
        multiple: the number of units that stay has to be a multiple of this, and ``multiple_of`` says where.
        least: how many units have to stay: 1, or 2 where the model does not run with one (a standardised weight), or
            as many as an adapter says.
    """

    def __init__(self, axes: ModelAxes, leaf: Atom, name: str, writers: dict[str, nn.Module]) -> None:
        self.axes, self.leaf, self.name, self.writers = axes, leaf, name, writers
        self.secondary = self.is_heads = self.in_heads = False
        self.least = max([1, *(count for axis, count in axes.at_least if axis and axis[0].root() is leaf.root())])
        self.multiple, self.multiple_of = self._multiple()
        self.initial = self.size
        self.left = list(range(self.size))

    def _multiple(self) -> tuple[int, str]:
        found, places = 1, dict[str, None]()
        for axis, number, where in self.axes.trace.multiples:
            if contains(axis, self.leaf.root()):
                each = int((labels(axis, self.leaf.root()) == 0).sum())
                found = math.lcm(found, number // math.gcd(number, each))
                places[where] = None
        return found, " and ".join(places)

    @property
    def size(self) -> int:
        """The number of units, now."""
        return self.leaf.root().size

    @property
    def only_training(self) -> bool:
        """Whether its layers are read in training mode only (auxiliary heads)."""
        written = [part for part in self.slices() if part.is_parameter and not part.reads and part.tensor.ndim > 1]
        return all(id(part.tensor) in self.axes.only_training for part in written)

    def slices(self) -> list[UnitSlice]:
        """Return every dimension of every parameter and buffer that goes with the units."""
        return self.axes.slices(self.leaf)

    def plain_slices(self) -> list[UnitSlice]:
        """As :meth:`slices`, with computed weights in the place of what they are computed from."""
        return self.axes.plain_slices(self.leaf)

    def readers(self) -> set[str]:
        """The names of the matrices that are contracted along the units."""
        return self.matrices(reading=True)

    def matrices(self, reading: bool = False) -> set[str]:
        """The names of the matrices that produce the units, or that are contracted along them."""
        parts = (p for p in self.slices() if p.reads == reading and p.is_parameter and p.tensor.ndim > 1)
        return {f"{self.axes.names[part.owner]}.{part.attr}".strip(".") for part in parts}

    def unit_group(self) -> UnitGroup:
        """Return the rows that produce the units, for the scoring engine."""
        leaf = self.leaf.root()
        if leaf not in self.axes.unit_groups:
            self.axes.unit_groups[leaf] = unit_group(self.axes, self.name, leaf)
        return self.axes.unit_groups[leaf]

    def rewinder(self) -> Callable[[], None]:
        """Return a function that gives the group the size that it has now, and forgets later removals from it."""
        leaf, size, left = self.leaf.root(), self.size, list(self.left)
        scales = [(scale, list(scale.rows)) for scale in self.axes.index.rows(part.owner for part in self.slices())]

        def rewind() -> None:
            leaf.resize(size)
            self.left = list(left)
            for scale, rows in scales:
                scale.rows = list(rows)
            self.axes.changed()

        return rewind

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.size} units)"


@dataclass(frozen=True)
class Together:
    """Some groups, which go back together."""

    groups: Iterable[Group]

    def rewinder(self) -> Callable[[], None]:
        """Return a function that gives the groups the sizes that they have now."""
        rewinders = [group.rewinder() for group in self.groups]

        def rewind() -> None:
            for back in reversed(rewinders):  # two may have changed the same scale
                back()

        return rewind
