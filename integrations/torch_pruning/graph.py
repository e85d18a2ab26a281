"""torch-pruning's dependency graph, with the groups that :mod:`singe_plugin.axes` finds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, Group, Node

from singe_plugin import axes
from singe_plugin.axes.removal import remove_units
from singe_plugin.computed import computed_in
from singe_plugin.errors import GroupError
from singe_plugin.method.units import UnitGroup
from singe_plugin.stale import remember_shapes

__all__ = ["AxisDependencyGraph", "BlockView", "GroupView", "is_rooted"]

_OPTYPE = tp.ops.OPTYPE
_CLASSES = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)  # of root_module_types; there is none for the others


class GroupView(Group):  # type: ignore[misc]
    """A group as torch-pruning's importances and users read it: ``(dependency, indices)`` for every layer.

    The items are made when somebody asks for them. ``prune()`` keeps parameter objects, cuts optimizer and EMA state
    along, and rolls back on failure.

    Attributes:
        axis_group: the group of :class:`singe_plugin.axes.AxisGraph`.
        units: the units it is about, all or some.
    """

    def __init__(
        self, graph: AxisDependencyGraph, group: axes.Group | axes.Block, units: Sequence[int] | None = None
    ) -> None:
        self.axis_group: Any = group
        self.units = list(range(group.size)) if units is None else sorted({int(u) for u in units})
        self._items: list[Any] | None = None
        self._unit_of_number: list[int] = []
        super().__init__()
        self._DG = graph

    @property
    def _group(self) -> list[Any]:
        if self._items is None:
            self._items = list(self._make_items())
        return self._items

    @_group.setter
    def _group(self, _: Any) -> None:
        self._items = None  # the base class starts with an empty list

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's units (or those that own the root's channels ``idxs``) from every coupled layer.

        Raises:
            RemovalError: if it fails, would leave a layer empty, or would change the answer to what the model asks of
                its widths; the model is as before.
        """
        if idxs is not None:
            self._DG.restricted(self, idxs).prune(record_history=record_history)
            return
        self._DG.remove(self.axis_group, self.units, self._DG.trackers, record_history)

    def unit_group(self) -> UnitGroup:
        """Return the rows that produce all units of the group (see :mod:`singe_plugin.method.units`)."""
        found: UnitGroup = self.axis_group.unit_group()
        return found

    def per_unit(self, scores: Tensor) -> Tensor:
        """Compute the mean score of each unit from the scores that an importance gives to the root's indices."""
        self._group  # numbers the indices  # noqa: B018
        position = {unit: number for number, unit in enumerate(self.units)}
        owners = torch.tensor([position[u] for u in self._unit_of_number], device=scores.device)
        total = torch.zeros(len(self.units), dtype=scores.dtype, device=scores.device)
        return total.index_add(0, owners, scores[: len(owners)]) / (len(owners) // len(self.units))

    def per_channel(self, scores: Tensor) -> Tensor:
        """Return the score of its unit for each of the root's indices, from one score per unit of the whole group."""
        self._group  # numbers the indices  # noqa: B018
        return scores[torch.tensor(self._unit_of_number, device=scores.device)]

    def _parts(self) -> Iterator[tuple[Node, Any, list[int]]]:
        """Yield ``(node, pruning function, unit of every channel)`` for every layer that torch-pruning is to see."""
        graph: AxisDependencyGraph = self._DG
        yield from graph.parts(self.axis_group)

    def _make_items(self) -> Iterator[Any]:
        found: dict[tuple[Any, Any], list[tuple[int, int]]] = {}
        chosen = set(self.units)
        for node, handler, units in self._parts():
            wanted = [(i, u) for i, u in enumerate(units) if u in chosen]
            if wanted:
                found.setdefault((node, handler), wanted)
        copies = min(len(positions) for positions in found.values()) // len(self.units)
        first = next(iter(found.values()))
        number: dict[tuple[int, int], int] = {}
        seen: dict[int, int] = {}
        for _, unit in first:
            copy = seen.get(unit, 0)
            seen[unit] = copy + 1
            if copy < copies:
                number[unit, copy] = len(number)
        self._unit_of_number = [unit for unit, _ in number]
        root_node = next(iter(found))[0]
        root_handler = next(iter(found))[1]
        for (node, handler), positions in found.items():
            seen = {}
            idxs, roots = [], []
            for position, unit in positions:
                copy = seen.get(unit, 0)
                seen[unit] = copy + 1
                idxs.append(position)
                roots.append(number[unit, copy % copies])
            item = _helpers.GroupItem(dep=Dependency(root_handler, handler, root_node, node), idxs=idxs)
            item.root_idxs = roots
            yield item


class AxisDependencyGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A ``tp.DependencyGraph`` whose groups come from the axes of the model's tensors.

    Works on every model that runs: what is not understood is not offered. ``get_all_groups``,
    ``get_pruning_group`` and the pruning history are as in torch-pruning; removals are
    :func:`singe_plugin.axes.removal.remove_units`.

    Args:
        graph: the groups.
        trackers: optimizers and averaged copies that are cut along.
    """

    def __init__(self, graph: axes.AxisGraph, trackers: axes.Trackers | None = None) -> None:
        super().__init__()
        self.axis_graph, self.trackers = graph, trackers or axes.Trackers()
        self.model = graph.model
        self._pruning_history = graph.history
        self.ignored_params: list[nn.Parameter] = []
        self.unwrapped_parameters: list[Any] = []
        self._module2name = dict(graph.names)
        self._param_to_name = {p: name for name, p in graph.model.named_parameters()}
        self.module2node = {
            module: Node(module, None, name)
            for module, name in graph.names.items()
            if (module._parameters or next(computed_in(module), None))
            and tp.ops.module2type(module) in self.REGISTERED_PRUNERS
        }
        for held in graph.held:
            if isinstance(held.tensor, nn.Parameter) and not _has_function(held.owner):
                self.module2node[held.tensor] = Node(held.tensor, None, self._param_to_name.get(held.tensor))

    def get_all_groups(
        self,
        ignored_layers: Collection[nn.Module] = (),
        root_module_types: Sequence[type] = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR),
        root_instances: Collection[nn.Module] | None = None,
    ) -> Iterator[GroupView]:
        """Yield every group with a writer of the given types, and none that is ignored, in forward order."""
        for group in list(self.axis_graph.groups.values()):
            writers = list(group.writers.values())
            if any(writer in ignored_layers for writer in writers):
                continue
            if root_instances is not None and not any(writer in root_instances for writer in writers):
                continue
            if is_rooted(group, root_module_types):
                yield GroupView(self, group)

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> GroupView:
        """Find the group whose units own exactly these channels of a layer.

        Raises:
            GroupError: if there is none: the channels cannot be removed, or not without others.
        """
        wanted = {int(i) for i in (idxs if not isinstance(idxs, int) else [idxs])}
        is_in = self.is_in_channel_pruning_fn(pruning_fn) and not self.is_out_channel_pruning_fn(pruning_fn)
        whole: set[int] = set()
        for group in sorted(self.axis_graph.groups.values(), key=lambda g: g.secondary):
            units = self._units_of(group, module, is_in)
            chosen = {u for i, u in enumerate(units) if i in wanted and u >= 0}
            together = {i for i, u in enumerate(units) if u in chosen}
            if chosen and together == wanted:
                return GroupView(self, group, sorted(chosen))
            whole |= together
        name = self._module2name.get(module, type(module).__name__)
        if not whole:
            reason = self.axis_graph.left_whole.get(name, "it is not in any group")
            raise GroupError(f"channels {sorted(wanted)} of {name!r} cannot be removed: {reason}")
        raise GroupError(
            f"channels {sorted(wanted)} of {name!r} cannot be removed alone; together with them go "
            f"{sorted(whole - wanted) or 'channels of another group'}"
        )

    def remove(
        self,
        group: axes.Group,
        units: Sequence[int],
        trackers: axes.Trackers,
        record: bool = True,
        settled: bool = False,
    ) -> None:
        """Remove units and note it in the pruning history; ``settled`` is :func:`~singe_plugin.axes.remove_units`'."""
        gone = {int(u) for u in units}
        rows = group.unit_group().producers[0]
        channels = [r for r, u in zip(rows.rows.tolist(), rows.units.tolist(), strict=True) if u in gone]
        before = [(part.tensor, part.tensor.shape) for part in group.slices() if part.is_parameter]
        remove_units(self.axis_graph, group, units, trackers, settled=settled)
        remember_shapes(before)
        if record and gone:
            self._pruning_history.append([next(iter(group.writers)), True, channels])

    def restricted(self, group: GroupView, idxs: Sequence[int]) -> GroupView:
        """Return the part of a group that owns the root's channels ``idxs``."""
        rows = group.axis_group.unit_group().producers[0]
        owner = dict(zip(rows.rows.tolist(), rows.units.tolist(), strict=True))
        units = {owner[int(i)] for i in idxs if int(i) in owner}
        if {r for r, u in owner.items() if u in units} != {int(i) for i in idxs}:
            raise GroupError(f"group {group.axis_group.name!r}: channels {sorted(idxs)} are not whole units")
        return GroupView(self, group.axis_group, sorted(units))

    def remove_block(self, block: axes.Block, trackers: axes.Trackers) -> None:
        """Remove a residual block and note it in the pruning history, as the one unit that it is."""
        axes.remove_block(self.axis_graph, block, trackers)
        self._pruning_history.append([block.name, True, [0]])

    def check_pruning_group(self, group: Any) -> bool:
        """Whether something would be left of the group."""
        return bool(len(group.units) < group.axis_group.size)

    def _units_of(self, group: axes.Group, module: nn.Module, is_in: bool) -> list[int]:
        if not is_in and module in group.writers.values():
            for producer in group.unit_group().producers:
                if producer.slots[0].owner is module:
                    return [int(u) for u in producer.unit_of_row()]
        for part in group.plain_slices():
            if part.owner is module and part.reads == is_in and part.is_weight:
                return [int(u) for u in part.units]
        return []

    def parts(self, group: axes.Group) -> Iterator[tuple[Node, Any, list[int]]]:
        """Yield ``(node, pruning function, unit of every channel)`` for every layer of a group, its writers first."""
        slices = [s for s in group.plain_slices() if s.is_weight]
        writers = list(group.writers.values())
        slices.sort(key=lambda s: writers.index(s.owner) if s.owner in writers and not s.reads else len(writers))
        done: set[tuple[nn.Module, bool]] = set()
        for part in slices:
            owner = part.owner
            if not _has_function(owner):
                if part.tensor.ndim > 1 and (part.reads or part.writes):
                    pruner = self.REGISTERED_PRUNERS[_OPTYPE.LINEAR]
                    handler = pruner.prune_in_channels if part.reads else pruner.prune_out_channels
                    node = Node(_as_linear(part), None, f"{self._module2name[owner]}.{part.attr}".strip("."))
                    yield node, handler, part.units.tolist()
                    continue
                if not part.is_parameter:
                    continue
                node = self.module2node[part.tensor]
                node.pruning_dim = part.dim
                yield node, self.REGISTERED_PRUNERS[_OPTYPE.PARAMETER].prune_out_channels, part.units.tolist()
                continue
            if (owner, part.reads) in done or _is_beyond(owner, part.reads):
                continue
            done.add((owner, part.reads))
            pruner = self.REGISTERED_PRUNERS[tp.ops.module2type(owner)]
            handler = pruner.prune_in_channels if part.reads else pruner.prune_out_channels
            units = self._units_of(group, owner, part.reads)
            yield self.module2node[owner], handler, units


class BlockView(GroupView):
    """A residual block as torch-pruning's importances read a group: the layers that write its branch's results.

    Attributes:
        axis_group: the :class:`singe_plugin.axes.Block`.
    """

    def __init__(self, graph: AxisDependencyGraph, block: axes.Block) -> None:
        super().__init__(graph, block)

    def per_unit(self, scores: Tensor) -> Tensor:
        """Add up the scores of all channels: what goes is all of them."""
        return scores.sum().reshape(1)

    def per_channel(self, scores: Tensor) -> Tensor:
        """Return the score of the block for each of the root's indices."""
        return scores.expand(len(self[0].idxs))

    def _parts(self) -> Iterator[tuple[Node, Any, list[int]]]:
        graph: AxisDependencyGraph = self._DG
        for producer in self.axis_group.unit_group().producers:
            for owner in (producer.slots[0].owner, producer.norm):
                if owner in graph.module2node:
                    pruner = graph.REGISTERED_PRUNERS[tp.ops.module2type(owner)]
                    yield graph.module2node[owner], pruner.prune_out_channels, producer.units.tolist()


def is_rooted(group: axes.Group, roots: Sequence[type]) -> bool:
    """Whether a layer of one of these classes writes a group; where all are given, any layer will do."""
    return set(_CLASSES) <= set(roots) or any(isinstance(w, tuple(roots)) for w in group.writers.values())


def _as_linear(part: axes.UnitSlice) -> nn.Linear:
    """A matrix that a module holds itself, as the linear layer that torch-pruning's importances would score."""
    turned = [t.movedim(part.dim, 0).flatten(1) for t in (part.tensor.detach(), part.tensor.grad) if t is not None]
    weight, *grad = [t.t() if part.reads else t for t in turned]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.weight.grad = grad[0] if grad else None
    return layer


def _is_beyond(module: nn.Module, reads: bool) -> bool:
    """Whether torch-pruning's importances misread a layer's channels: grouped inputs, grouped transposed outputs."""
    return getattr(module, "groups", 1) > 1 and (reads or bool(getattr(module, "transposed", False)))


def _has_function(module: nn.Module) -> bool:
    """Whether torch-pruning has pruning functions for a layer. (That for an LSTM takes one layer in one direction.)"""
    return not isinstance(module, nn.LSTM) and tp.ops.module2type(module) in tp.pruner.function.PrunerBox
