"""The groups of a model: which positions of which tensors go with each unit, now and after every removal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from singe_plugin.errors import SingeError
from singe_plugin.method.units import refuse_tied, tied_parameters
from singe_plugin.nested import call_model

from .algebra import Atom, Axis, expand, fix, fix_all, labels, leaves
from .blocks import Block
from .groups import Group
from .layers import adapt
from .parameters import ModelAxes
from .questions import Questions
from .reasons import why_whole
from .trace import Forward

__all__ = ["AxisGraph"]


class AxisGraph(ModelAxes):
    """Every group of a model that one forward pass reveals.

    Args:
        model: any module; it is run in eval mode and left as it was.
        inputs: example inputs.
        ignored: modules whose own output channels stay.
        ignored_parameters: parameters that stay as they are.
        forward: how the model is called with the inputs.

    Attributes:
        groups: by name, in forward order.
        blocks: residual blocks that can go as a whole, by name; none until they are looked for
            (:func:`singe_plugin.axes.depth.find_blocks`).
        questions: what the model asked of its sizes.
        left_whole: layer, or a parameter alone -> why nothing is removed from its outputs; all with two dimensions or
            more that no group writes are there.
        history: what a host notes of its removals; undone together with them.

    Raises:
        GroupError: if the model does not run on the inputs.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = AxisGraph(net, torch.zeros(2, 4))
        >>> graph.groups, graph.left_whole
        ({'0': Group('0', 8 units)}, {'2': "it reaches the model's output"})
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        ignored: Collection[nn.Module] = (),
        ignored_parameters: Collection[nn.Parameter] = (),
        forward: Forward = call_model,
    ) -> None:
        super().__init__(model, inputs, forward)
        self.history: list[Any] = []
        adapt(self)
        self._fix_what_cannot_go(ignored, {id(p) for p in ignored_parameters})
        self.find_places()
        self.groups: dict[str, Group] = {}
        self.blocks: dict[str, Block] = {}
        self._dropped: dict[str, str] = {}
        self.questions = Questions(self.trace, self.index)
        self._find_groups()
        self._whole: dict[str, str] | None = dict(why_whole(self, self.groups.values()))

    @property
    def left_whole(self) -> dict[str, str]:
        """Why layers, and parameters alone, are left whole, by name: found when it is asked, not for every drop."""
        if self._whole is None:
            self._whole = dict(why_whole(self, self.groups.values())) | self._dropped
        return self._whole

    def allowed(self, counts: Mapping[Group, int]) -> dict[Group, int]:
        """How many units of groups may go together: less than is asked for where the model would go another way.

        See :mod:`singe_plugin.axes.questions`.
        """
        return self.questions.allowed(counts)

    def before_removal(self) -> None:
        """Say what is said of the sizes as they are: units are about to go."""
        self._whole = self.left_whole

    def leave_blocks(self, reasons: Mapping[str, str]) -> None:
        """Say why residual blocks stay: it is told with the other reasons."""
        for name, reason in reasons.items():
            self.blocks.pop(name, None)
            self._dropped[name] = reason
        self._whole = None

    def take_out(self, module: nn.Module, after: nn.Module) -> None:
        """Forget a block that is gone, with the groups that were in it; the others lose its layers."""
        self.before_removal()
        block = self.blocks.pop(self.names[module])
        inside, begins = block.modules, f"{block.name}."
        for name, group in list(self.groups.items()):
            if block.holds(group.writers):
                del self.groups[name]
            else:
                group.writers = {n: writer for n, writer in group.writers.items() if writer not in inside}
        for other in [b for b in self.blocks.values() if b.module in inside]:
            del self.blocks[other.name]
        whole = self.left_whole.items()
        self._whole = {name: why for name, why in whole if not f"{name}.".startswith(begins)}
        super().take_out(module, after)

    def back_in(self) -> Callable[[], None]:
        """Return a function that takes in again whatever is :meth:`taken out <take_out>` from now on."""
        inner, whole, blocks, groups = super().back_in(), self._whole, dict(self.blocks), dict(self.groups)
        writers = [(group, group.writers) for group in groups.values()]

        def rewind() -> None:
            if len(self.blocks) != len(blocks):
                self._whole = whole
                self.blocks.clear()
                self.blocks.update(blocks)
                self.groups.clear()
                self.groups.update(groups)
                for group, mine in writers:
                    group.writers = mine
            inner()

        return rewind

    def _fix_what_cannot_go(self, ignored: Collection[nn.Module], parameters: set[int]) -> None:
        for held in self.held:
            if id(held.tensor) in parameters:
                fix_all(held.axes, "it is in ignored_layers")
            if held.owner in ignored:
                fix_all(self.outputs_of(held), "it is in ignored_layers")
            for axis in held.axes:
                found = leaves(axis)
                for leaf in found:
                    if found.count(leaf) > 1:
                        try:
                            labels(axis, leaf)
                        except ValueError:
                            fix((leaf,), "its units are combined with each other")

    def _find_groups(self) -> None:
        ties = tied_parameters(self.model)
        outer = self._outer()
        found: list[tuple[int, bool, Atom, dict[str, nn.Module]]] = []
        for leaf, places in self.places.items():
            writers: dict[str, nn.Module] = {
                self.names[layer]: layer
                for h, d in sorted(places, key=lambda p: self.trace.order.get(p[0].owner, 1 << 30))
                if self.writes(h, d)
                for layer in [self.layer_of(h)]
            }
            if not writers or leaf.size < 2:
                continue
            first = min(self.trace.order.get(w, 1 << 30) for w in writers.values())
            found.append((first, leaf in outer, leaf, writers))
        taken: set[str] = set()
        for _, _, leaf, writers in sorted(found, key=lambda f: (f[0], f[1], -f[2].size * f[1])):
            name = next(n for n in self._candidates(writers) if n not in taken)
            taken.add(name)
            group = Group(self, leaf, name, writers)
            try:
                refuse_tied(group.unit_group(), ties)
            except SingeError as error:
                leaf.fixed = str(error)
                continue
            self.groups[name] = group
        self._meet()
        self._rank(self.groups.values())

    def _outer(self) -> set[Atom]:
        """Find the leaves whose units contain units of others; of two groups of one layer they are named second."""
        found: set[Atom] = set()
        for held in self.held:
            for axis in held.axes:
                for chain in _chains(axis):
                    found.update([atom for atom in chain if not atom.fixed][:-1])
        return found

    @staticmethod
    def _candidates(writers: dict[str, nn.Module]) -> Iterator[str]:
        yield from list(writers)[:1]
        yield from (f"{next(iter(writers))}#{number}" for number in itertools.count(2))

    def _meet(self) -> None:
        """Note which groups share channels: the units of one contain units of the other."""
        free = {group.leaf: group for group in self.groups.values()}
        heads = {leaf for axis in self.trace.heads for leaf in leaves(axis)}
        for group in self.groups.values():
            group.is_heads = group.leaf in heads
        self._in_heads: set[Group] = set()
        self._number = {group: number for number, group in enumerate(self.groups.values())}
        self._above, self._below = ({group: set[Group]() for group in self.groups.values()} for _ in range(2))
        for held in self.held:
            for axis in held.axes:
                for chain in _chains(axis):
                    outer = [number for number, atom in enumerate(chain) if atom in heads][:1]
                    self._in_heads |= {free[atom] for atom in chain[outer[0] + 1 :] if atom in free} if outer else set()
                    for above, below in itertools.combinations([free[atom] for atom in chain if atom in free], 2):
                        self._below[above].add(below)
                        self._above[below].add(above)

    def _rank(self, groups: Collection[Group]) -> None:
        """Of groups that share channels, choose those with the smallest units; the others are secondary."""
        first: set[Group] = set()
        for group in sorted(groups, key=lambda g: (bool(self._below[g]), -g.size)):
            group.in_heads = group in self._in_heads
            group.secondary = bool((self._above[group] | self._below[group]) & first)
            if not group.secondary:
                first.add(group)

    def _separate(self, group: Group) -> list[Group]:
        """Forget a group that shares channels with others; return these, and all that share some with them."""
        above, below = self._above.pop(group), self._below.pop(group)
        for others, table in ((above, self._below), (below, self._above)):
            for other in others:
                table[other].discard(group)
        found, todo = set[Group](), [*above, *below]
        while todo:
            other = todo.pop()
            if other not in found:
                found.add(other)
                todo += [*self._above[other], *self._below[other]]
        return sorted(found, key=self._number.__getitem__)

    def rewinder(self) -> Callable[[], None]:
        """Return a function that gives all groups the sizes that they have now, and forgets later removals."""
        sizes = [(group.leaf.root(), group.size) for group in self.groups.values()]
        left = [(group, list(group.left)) for group in self.groups.values()]
        scale_rows = [[rows for _, _, rows in scale.rows] for scale in self.scales]
        removals, back_in = len(self.history), self.back_in()

        def rewind() -> None:
            back_in()
            for leaf, size in sizes:
                leaf.resize(size)
            for group, units in left:
                group.left = list(units)
            self.changed()
            del self.history[removals:]
            for scale, saved in zip(self.scales, scale_rows, strict=True):
                scale.rows = [(m, a, rows) for (m, a, _), rows in zip(scale.rows, saved, strict=True)]

        return rewind

    def drop(self, name: str, reason: str) -> None:
        """Leave a group whole, for a reason."""
        group = self.groups.pop(name)
        group.leaf.root().fixed = reason
        self._dropped[name] = reason
        self._rank(self._separate(group))
        self._whole = None


def _chains(axis: Axis) -> Iterator[list[Atom]]:
    """Yield the leaves that meet in one product, outermost first."""
    atoms = expand(axis)
    own = [a for a in atoms if a.parts is None]
    inner = [chain for a in atoms if a.parts is not None for part in a.parts for chain in _chains(part)]
    if not inner:
        yield own
    for chain in inner:
        yield [*own, *chain]
