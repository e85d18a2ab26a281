"""Groups of torch-pruning's own dependency graph as the method sees them: units and the rows that produce them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from singe_plugin.errors import GroupError
from singe_plugin.folding import can_fold, is_batchnorm
from singe_plugin.units import Producer, RowLayout, Slot, UnitGroup

from .slices import ItemSlice, item_slices, owner_of_parameter, tensor_of

__all__ = ["group_name", "roots_of", "unit_group"]

_BOX = tp.pruner.function.PrunerBox
_OPTYPE = tp.ops.OPTYPE
_CONV_OUT = _BOX[_OPTYPE.CONV].prune_out_channels
_NO_ROWS = (_BOX[_OPTYPE.PRELU].prune_out_channels,)


def group_name(group: Any) -> str:
    """The qualified name of the layer that a group is rooted at."""
    name = group._DG._module2name.get(group[0].dep.target.module)
    return str(name) if name is not None else str(group[0].dep.target.name)


def roots_of(group: Any, number: int) -> list[int]:
    """The root channel of every index of an item, in the item's own order; the item is not changed."""
    roots = group[number].root_idxs
    if roots is None or len(roots) != len(group[number].idxs) or any(r is None for r in roots):
        raise GroupError(
            f"group {group_name(group)!r}: torch-pruning does not say which root channels the indices of "
            f"{group[number].dep.target.name} belong to"
        )
    return [int(r) for r in roots]


def unit_group(group: Any, units: Sequence[Sequence[int]] | None = None) -> UnitGroup:
    """The producing rows of a torch-pruning group, for the scoring engine.

    Args:
        group: any group; its root's indices may be a subset. It is not changed.
        units: sets of positions *into the root's indices*; None makes every root channel its own unit.

    Raises:
        GroupError: if a producing layer is not understood.
    """
    root = list(group[0].idxs)
    units = [[i] for i in range(len(root))] if units is None else units
    unit_of_root: dict[int, int] = {}
    for number, members in enumerate(units):
        for member in members:
            unit_of_root[root[member]] = number
    producers: list[Producer] = []
    folded: set[int] = set()
    for number in range(len(group)):
        dep = group[number].dep
        if id(dep.target) in folded or dep.handler in _NO_ROWS:
            continue
        producer, norm_node = _producer(group, number, unit_of_root)
        if producer is None:
            continue
        if norm_node is not None:
            folded.add(id(norm_node))
        producers.append(producer)
    kept = [p for p in producers if not any(p.slots[0].owner is q.norm for q in producers)]
    return UnitGroup(group_name(group), len(units), tuple(kept))


def _producer(group: Any, number: int, unit_of_root: dict[int, int]) -> tuple[Producer | None, Any]:
    dep, idxs = group[number].dep, list(group[number].idxs)
    layer = dep.target.module
    if isinstance(layer, nn.LSTM):
        raise GroupError(f"group {group_name(group)!r}: nn.LSTM cannot be scored; put it in ignored_layers")
    slots = _producing_slots(group._DG, dep, idxs)
    if not slots:
        return None, None
    pairs: dict[int, int] = {}
    for row, channel in zip(idxs, roots_of(group, number), strict=True):
        unit = unit_of_root.get(channel)
        if unit is not None:
            pairs.setdefault(row, unit)
    rows, owners = torch.tensor(list(pairs), dtype=torch.int64), torch.tensor(list(pairs.values()), dtype=torch.int64)
    name = str(group._DG._module2name.get(layer, dep.target.name))
    if dep.target.type == _OPTYPE.PARAMETER:
        name = str(group._DG._param_to_name[layer])
    norm_node = _folded_norm(dep.target)
    is_norm = is_batchnorm(layer) and getattr(layer, "running_mean", None) is not None
    norm = norm_node.module if norm_node is not None else None
    return Producer(name, slots, rows, owners, norm, is_norm), norm_node


def _producing_slots(graph: Any, dep: Any, idxs: Sequence[int]) -> tuple[Slot, ...]:
    layer = dep.target.module
    if dep.target.type == _OPTYPE.PARAMETER:
        owner, attr = owner_of_parameter(graph.model, graph._param_to_name[layer])
        return (Slot(owner, attr, RowLayout(dep.target.pruning_dim % layer.ndim)),)
    if dep.handler == _CONV_OUT and layer.transposed:
        return Slot(layer, "weight", RowLayout(1, groups=layer.groups)), Slot(layer, "bias")
    if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        is_out = graph.is_out_channel_pruning_fn(dep.handler)
        return (Slot(layer, "weight"), Slot(layer, "bias")) if is_out else ()
    parts: list[ItemSlice] = [s for s in item_slices(graph, dep, idxs) if s.produces]
    if is_batchnorm(layer):
        return Slot(layer, "weight"), Slot(layer, "bias")
    present = [s for s in parts if tensor_of(s.owner, s.attr) is not None]
    return tuple(Slot(s.owner, s.attr, s.layout) for s in present)


def _folded_norm(node: Any) -> Any:
    """The node of the batch-norm that reads this layer and nothing else, if the layer is read by nothing else."""
    if not isinstance(node.module, (nn.modules.conv._ConvNd, nn.Linear)):
        return None
    readers = {id(n): n for n in node.outputs}
    if len(readers) != 1:
        return None
    reader = next(iter(readers.values()))
    alone = {id(n) for n in reader.inputs} == {id(node)}
    return reader if alone and can_fold(node.module, reader.module) else None
