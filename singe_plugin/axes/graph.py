"""The groups of a model: which positions of which tensors go with each unit, now and after every removal."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from singe_plugin.errors import GroupError, SingeError, is_of_the_machine
from singe_plugin.folding import is_batchnorm
from singe_plugin.nested import call_model
from singe_plugin.units import Producer, RowLayout, Slot, UnitGroup, refuse_tied, tied_parameters

from .algebra import Atom, Axis, expand, fix, fix_all, labels, leaves, size_of, split
from .layers import adapt
from .reasons import why_whole
from .scales import ImpliedScale, implied_scales
from .trace import Forward, Trace, trace

__all__ = ["AxisGraph", "Group", "UnitSlice"]

_CONV = nn.modules.conv._ConvNd
_LAYERS = (_CONV, nn.Linear)
_LARGE, _SMALLER = 320, (160, 168, 192, 224, 256)  # pixels a side


@dataclass(frozen=True)
class UnitSlice:
    """A dimension of a tensor, with the unit of every position along it.

    Attributes:
        owner: the module that holds the tensor.
        attr: its name there; a parameter or a buffer.
        dim: the dimension.
        units: ``[shape[dim]]`` int64, -1 where a position belongs to no unit of the group.
        reads: whether the positions only read the units (the input columns of a layer) instead of producing them.
    """

    owner: nn.Module
    attr: str
    dim: int
    units: NDArray[np.int64]
    reads: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        found: Tensor | None = self.owner._parameters.get(self.attr)
        found = self.owner._buffers.get(self.attr) if found is None else found
        assert found is not None
        return found

    @property
    def is_parameter(self) -> bool:
        return self.attr in self.owner._parameters


@dataclass(frozen=True)
class Held:
    """A parameter or buffer, where it is held, and its axes."""

    owner: nn.Module
    attr: str
    tensor: Tensor
    axes: tuple[Axis, ...]


class Group:
    """Units that can be removed one by one: the leaf of an axis, and everything that contains it.

    Attributes:
        name: the first layer that writes the units, with a number if there are several such groups.
        writers: the convolutions and linear layers that write them, by name.
        secondary: whether its units overlap with those of a group with smaller units (an attention head is made of
            head dimensions); such a group is pruned on request only.
        is_heads: whether its units are attention heads.
        in_heads: whether attention heads are made of its units.
        least: how many units have to stay: 1, or 2 where the model does not run with one (a standardised weight).
    """

    def __init__(self, graph: AxisGraph, leaf: Atom, name: str, writers: dict[str, nn.Module]) -> None:
        self.graph, self.leaf, self.name, self.writers = graph, leaf, name, writers
        self.secondary = self.is_heads = self.in_heads = False
        self.least = 1

    @property
    def size(self) -> int:
        """The number of units, now."""
        return self.leaf.root().size

    @property
    def only_training(self) -> bool:
        """Whether its layers are read in training mode only (auxiliary heads)."""
        return all(id(writer.weight) in self.graph.only_training for writer in self.writers.values())

    def slices(self) -> list[UnitSlice]:
        """Every dimension of every parameter and buffer that goes with the units."""
        return self.graph.slices(self.leaf)

    def unit_group(self) -> UnitGroup:
        """The rows that produce the units, for the scoring engine."""
        return self.graph.unit_group(self)

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.size} units)"


class AxisGraph:
    """Every group of a model that one forward pass reveals.

    Args:
        model: any module; it is run in eval mode and left as it was.
        inputs: example inputs.
        ignored: modules whose own output channels stay.
        ignored_parameters: parameters that stay as they are.
        forward: how the model is called with the inputs.

    Attributes:
        groups: by name, in forward order.
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
        self.model, self.inputs, self.forward = model, inputs, forward
        self.history: list[Any] = []
        self.only_training: set[int] = set()
        self._slices: dict[Atom, list[UnitSlice]] = {}
        self._unit_groups: dict[Group, UnitGroup] = {}
        try:
            self.trace: Trace = self._traced()
        except SingeError:
            raise
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise GroupError(
                f"{type(model).__name__} could not be traced: {type(error).__name__}: {error}; check that "
                "model(example_inputs) runs"
            ) from error
        if self.trace.unread():
            self._read_more()
        self.names = {module: name for name, module in model.named_modules()}
        self.held = list(self._held())
        self.scales: list[ImpliedScale] = implied_scales(model, self.inputs, self.trace, self.forward)
        adapt(self)
        self._fix_what_cannot_go(ignored, {id(p) for p in ignored_parameters})
        self._places: dict[Atom, list[tuple[Held, int]]] = {}
        for held, dim in ((h, d) for h in self.held for d in range(len(h.axes))):
            for leaf in dict.fromkeys(leaves(held.axes[dim])):
                if not leaf.fixed:
                    self._places.setdefault(leaf, []).append((held, dim))
        self.groups: dict[str, Group] = {}
        self._dropped: dict[str, str] = {}
        self._find_groups()
        self.left_whole = dict(why_whole(self))

    def _traced(self) -> Trace:
        """The trace of the example, or of a smaller image if the example is large and the model takes one."""
        inputs = self.inputs
        if isinstance(inputs, Tensor) and inputs.ndim == 4 and min(inputs.shape[2:]) > _LARGE:
            for side in _SMALLER:
                try:
                    small = inputs[:2, :, :side, :side].contiguous()
                    found = trace(self.model, small, self.forward)
                except Exception as error:  # not a size for this model
                    if is_of_the_machine(error):
                        raise
                    continue
                self.inputs = small
                return found
        return trace(self.model, inputs, self.forward)

    def _read_more(self) -> None:
        """Some parameters (of auxiliary heads) are only read in training mode: trace both modes."""
        forward = self.forward

        def both(model: nn.Module, inputs: Any) -> Any:
            outputs = [forward(model, inputs)]
            with containers_training(model):
                outputs.append(forward(model, inputs))
            return outputs

        try:
            more = trace(self.model, self.inputs, both)
        except Exception as error:  # it cannot be run so: what is not read stays as it is
            if is_of_the_machine(error):
                raise
            more = self.trace
        if len(more.unread()) < len(self.trace.unread()):
            self.only_training = {id(p) for p in self.trace.unread()} - {id(p) for p in more.unread()}
            self.trace, self.forward = more, both
        for tensor in self.trace.unread():
            fix_all(self.trace.of(tensor), "no forward pass reads it")

    def _held(self) -> Iterator[Held]:
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for attr, tensor in table.items():
                    if tensor is not None:
                        yield Held(module, attr, tensor, tuple(self.trace.of(tensor)))

    def _fix_what_cannot_go(self, ignored: Collection[nn.Module], parameters: set[int]) -> None:
        for held in self.held:
            if id(held.tensor) in parameters:
                fix_all(held.axes, "it is in ignored_layers")
            if held.owner in ignored:
                for dim, axis in enumerate(held.axes):
                    if not self.reads(held, dim):
                        fix(axis, "it is in ignored_layers")
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
        for leaf, places in self._places.items():
            writers: dict[str, nn.Module] = {
                self.names[h.owner]: h.owner
                for h, d in sorted(places, key=lambda p: self.trace.order.get(p[0].owner, 1 << 30))
                if isinstance(h.owner, _LAYERS) and h.attr == "weight" and not self.reads(h, d)
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
        self.rank()

    def _outer(self) -> set[Atom]:
        """Leaves whose units contain units of other leaves; of two groups of one layer they are named second."""
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

    def rank(self) -> None:
        """Of groups that share channels, choose those with the smallest units; the others are secondary."""
        free = {group.leaf: group for group in self.groups.values()}
        heads = {leaf for axis in self.trace.heads for leaf in leaves(axis)}
        for group in self.groups.values():
            group.is_heads, group.in_heads, group.secondary = group.leaf in heads, False, False
        outer: set[Group] = set()
        meets: dict[Group, set[Group]] = {group: set() for group in self.groups.values()}
        for held in self.held:
            for axis in held.axes:
                for chain in _chains(axis):
                    for above, below in itertools.combinations([free[atom] for atom in chain if atom in free], 2):
                        outer.add(above)
                        meets[above].add(below)
                        meets[below].add(above)
                        below.in_heads = below.in_heads or above.is_heads
        first: set[Group] = set()
        for group in sorted(self.groups.values(), key=lambda g: (g in outer, -g.size)):
            group.secondary = bool(meets[group] & first)
            if not group.secondary:
                first.add(group)

    def drop(self, name: str, reason: str) -> None:
        """Leave a group whole."""
        group = self.groups.pop(name)
        group.leaf.root().fixed = reason
        self._dropped[name] = reason
        self.rank()
        self.left_whole = dict(why_whole(self)) | self._dropped

    def outputs_of(self, held: Held) -> list[Axis]:
        """The axes of a parameter along which it produces units."""
        if isinstance(held.owner, _LAYERS) and held.attr == "weight":
            return [_out_axis(held)]
        return [axis for dim, axis in enumerate(held.axes) if not self.reads(held, dim)]

    def reads(self, held: Held, dim: int) -> bool:
        """Whether a dimension of a parameter or buffer only reads units, instead of producing them.

        The slopes of a PReLU and buffers produce nothing, whatever is done with them.
        """
        if held.attr in held.owner._buffers or isinstance(held.owner, nn.PReLU):
            return True
        return self.trace.origins.reads(held.tensor, dim)

    # -- what goes with a unit --------------------------------------------------------------------------------------

    def slices(self, leaf: Atom) -> list[UnitSlice]:
        """See :meth:`Group.slices`."""
        leaf = leaf.root()
        if leaf not in self._slices:
            self._slices[leaf] = [
                UnitSlice(held.owner, held.attr, dim, labels(held.axes[dim], leaf), self.reads(held, dim))
                for held, dim in self._places.get(leaf, [])
            ]
        return self._slices[leaf]

    def changed(self) -> None:
        """Units were removed or put back: positions are computed anew."""
        self._slices.clear()
        self._unit_groups.clear()

    def unit_group(self, group: Group) -> UnitGroup:
        """See :meth:`Group.unit_group`."""
        if group not in self._unit_groups:
            self._unit_groups[group] = self._unit_group(group)
        return self._unit_groups[group]

    def _unit_group(self, group: Group) -> UnitGroup:
        leaf = group.leaf.root()
        owners: dict[nn.Module, list[tuple[Held, int]]] = {}
        for held, dim in self._places[leaf]:
            if held.attr in held.owner._parameters and not self.reads(held, dim):
                owners.setdefault(held.owner, []).append((held, dim))
        # affine parameters of norms without weights of their own may be missing
        for held, dim in self._places[leaf]:
            if is_batchnorm(held.owner) and held.attr == "running_mean":
                owners.setdefault(held.owner, []).append((held, dim))
        producers: list[Producer] = []
        folded: set[nn.Module] = set()
        for owner in sorted(owners, key=lambda m: self.trace.order.get(m, 1 << 30)):
            producers += self._producers(owner, owners[owner], leaf, folded)
        kept = tuple(p for p in producers if p.slots[0].owner not in folded)
        return UnitGroup(group.name, leaf.size, kept)

    def _producers(
        self, owner: nn.Module, places: list[tuple[Held, int]], leaf: Atom, folded: set[nn.Module]
    ) -> Iterator[Producer]:
        name = self.names[owner]
        if isinstance(owner, _LAYERS):
            for held, _ in places[:1]:
                weight = next((h for h in self.held if h.owner is owner and h.attr == "weight"), held)
                transposed = isinstance(owner, _CONV) and owner.transposed
                layout = RowLayout(1, groups=getattr(owner, "groups", 1)) if transposed else RowLayout(0)
                rows, units = _rows(labels(_out_axis(weight), leaf))
                norm = self.trace.sole_reader(owner)
                norm = norm if norm is not None and self._can_fold(owner, norm) else None
                if norm is not None:
                    folded.add(norm)
                yield Producer(name, (Slot(owner, "weight", layout), Slot(owner, "bias")), rows, units, norm)
            return
        if is_batchnorm(owner):
            held, dim = places[0]
            rows, units = _rows(labels(held.axes[dim], leaf))
            tracked = getattr(owner, "running_mean", None) is not None
            yield Producer(name, (Slot(owner, "weight"), Slot(owner, "bias")), rows, units, None, tracked)
            return
        by_labels: dict[bytes, list[tuple[Held, int]]] = {}
        for held, dim in places:
            by_labels.setdefault(labels(held.axes[dim], leaf).tobytes(), []).append((held, dim))
        for same in by_labels.values():
            rows, units = _rows(labels(same[0][0].axes[same[0][1]], leaf))
            slots = tuple(Slot(owner, held.attr, RowLayout(dim)) for held, dim in same)
            whole = name and len(by_labels) == 1 and len(slots) != 1
            label = name if whole else " and ".join(f"{name}.{slot.attr}".strip(".") for slot in slots)
            yield Producer(label, slots, rows, units)

    @staticmethod
    def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
        if not is_batchnorm(norm) or getattr(norm, "running_mean", None) is None:
            return False
        width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
        return width == len(norm.running_mean)  # type: ignore[arg-type]


@contextmanager
def containers_training(model: nn.Module) -> Iterator[None]:
    """Modules that have parts are in training mode; single layers (norms, dropout) stay as they are."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            if next(module.children(), None) is not None:
                module.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training


def _rows(units: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    rows = np.flatnonzero(units >= 0)
    return torch.from_numpy(rows), torch.from_numpy(units[rows])


def _out_axis(weight: Held) -> Axis:
    """The axis of a layer's output channels."""
    owner = weight.owner
    if isinstance(owner, _CONV) and owner.transposed:
        if owner.groups == 1:
            return weight.axes[1]
        groups = int(owner.groups)
        outer, _ = split(weight.axes[0], [groups, size_of(weight.axes[0]) // groups], "a transposed convolution")
        return (*outer, *weight.axes[1])
    return weight.axes[0]


def _chains(axis: Axis) -> Iterator[list[Atom]]:
    """Leaves that meet in one product, outermost first."""
    atoms = expand(axis)
    own = [a for a in atoms if a.parts is None]
    inner = [chain for a in atoms if a.parts is not None for part in a.parts for chain in _chains(part)]
    if not inner:
        yield own
    for chain in inner:
        yield [*own, *chain]
