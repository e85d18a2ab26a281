"""Groups of torch-pruning's own dependency graph as the method sees them: units and the rows that produce them.

torch-pruning says "prune output channels 3 and 5 of this layer"; scoring needs to know which rows of which parameters
that means. :func:`register_slots` says so for a customized pruner.
(:class:`~singe_plugin.integrations.torch_pruning.SInGEPruner` finds its groups otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from singe_plugin.computed import REMEDY, computed_in
from singe_plugin.errors import GroupError
from singe_plugin.method.folding import can_fold, is_batchnorm
from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup

__all__ = ["SlotFunction", "register_slots", "unit_group"]

SlotFunction = Callable[[Any, int], Iterable[Slot]]
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def unit_group(group: Any, units: Sequence[Sequence[int]] | None = None) -> UnitGroup:
    """Find the producing rows of a torch-pruning group, for the scoring engine.

    Args:
        group: any group; its root's indices may be a subset. It is not changed.
        units: sets of positions *into the root's indices*; None makes every root channel its own unit.

    Raises:
        GroupError: if a producing layer is not understood.
    """
    root = list(group[0].idxs)
    units = [[i] for i in range(len(root))] if units is None else units
    unit_of_root = {root[member]: number for number, members in enumerate(units) for member in members}
    producers: list[Producer] = []
    for number in range(len(group)):
        slots = _slots(group._DG, group[number].dep)
        if slots:
            producers.append(_producer(group, number, slots, unit_of_root))
    folded = {id(p.norm) for p in producers}
    kept = tuple(p for p in producers if id(p.slots[0].owner) not in folded)
    return UnitGroup(_name_of(group), len(units), kept)


def _name_of(group: Any) -> str:
    """Return the qualified name of the layer that a group is rooted at."""
    target = group[0].dep.target
    return str(group._DG._module2name.get(target.module, target.name))


def _producer(group: Any, number: int, slots: tuple[Slot, ...], unit_of_root: dict[int, int]) -> Producer:
    graph, target, roots = group._DG, group[number].dep.target, group[number].root_idxs
    idxs = list(group[number].idxs)
    if roots is None or len(roots) != len(idxs) or any(r is None for r in roots):
        raise GroupError(
            f"group {_name_of(group)!r}: torch-pruning does not say which root channels the indices of {target.name} "
            "belong to; put its layer in ignored_layers"
        )
    pairs: dict[int, int] = {}
    for row, channel in zip(idxs, roots, strict=True):
        if int(channel) in unit_of_root:
            pairs.setdefault(row, unit_of_root[int(channel)])
    rows, owners = torch.tensor(list(pairs), dtype=torch.int64), torch.tensor(list(pairs.values()), dtype=torch.int64)
    if target.type == tp.ops.OPTYPE.PARAMETER:
        name = str(graph._param_to_name[target.module])
    else:
        name = str(graph._module2name.get(target.module, target.name))
    is_norm = is_batchnorm(target.module) and getattr(target.module, "running_mean", None) is not None
    return Producer(name, slots, rows, owners, _folded_norm(target), is_norm)


def _folded_norm(node: Any) -> nn.Module | None:
    """Find the batch-norm that reads this layer and nothing else, if the layer is read by nothing else."""
    readers = {id(n): n for n in node.outputs}
    if not isinstance(node.module, _LAYERS) or len(readers) != 1:
        return None
    reader = next(iter(readers.values()))
    alone = {id(n) for n in reader.inputs} == {id(node)}
    return reader.module if alone and can_fold(node.module, reader.module) else None


# -- which parameters an item of a group produces with -------------------------------------------------------------


def _slots(graph: Any, dep: Any) -> tuple[Slot, ...]:
    """Return the parameters whose rows produce the channels of one item of a group; none if it only reads them.

    Raises:
        GroupError: for a layer or pruning function that is not known.
    """
    layer, handler, dim = dep.target.module, dep.handler, dep.target.pruning_dim
    if dep.target.type == tp.ops.OPTYPE.PARAMETER:
        parent, _, attr = graph._param_to_name[layer].rpartition(".")
        return (Slot(graph.model.get_submodule(parent), attr, RowLayout(dim % layer.ndim)),)
    if isinstance(layer, _LAYERS) and next(computed_in(layer), None) is not None:
        raise GroupError(
            f"the weight of {graph._module2name.get(layer)!r} is computed (parametrized), which torch-pruning's own "
            f"graph does not cut; use SInGEPruner or prune(), or {REMEDY}"
        )
    if isinstance(layer, _LAYERS):
        return _of_layer(layer) if graph.is_out_channel_pruning_fn(handler) else ()
    if is_batchnorm(layer):
        return Slot(layer, "weight"), Slot(layer, "bias")
    if isinstance(getattr(handler, "__self__", None), tp.ops.DummyPruner):
        return ()
    if handler not in _SLOTS:
        raise GroupError(
            f"nobody said what {getattr(handler, '__qualname__', handler)} cuts of a {type(layer).__name__}; "
            "use singe_plugin.integrations.torch_pruning.register_slots"
        )
    return tuple(slot for slot in _SLOTS[handler](layer, dim) if slot.tensor is not None)


def _of_layer(layer: Any) -> tuple[Slot, ...]:
    layout = RowLayout(1, groups=layer.groups) if getattr(layer, "transposed", False) else RowLayout()
    return Slot(layer, "weight", layout), Slot(layer, "bias")


def _of_norm(layer: Any, dim: int) -> Iterable[Slot]:
    return Slot(layer, "weight"), Slot(layer, "bias")


def _of_layer_norm(layer: Any, dim: int) -> Iterable[Slot]:
    layout = RowLayout(dim % len(layer.normalized_shape))
    return Slot(layer, "weight", layout), Slot(layer, "bias", layout)


def _of_prelu(layer: Any, dim: int) -> Iterable[Slot]:
    return ()  # the slopes modulate a channel but do not produce it: PReLU(0) = 0 whatever the slope


def _of_embedding(layer: Any, dim: int) -> Iterable[Slot]:
    return (Slot(layer, "weight", RowLayout(1)),)


def _of_attention(layer: Any, dim: int) -> Iterable[Slot]:
    if layer.q_proj_weight is not None or layer.bias_k is not None:
        raise GroupError("nn.MultiheadAttention with separate q, k, v widths or bias_k cannot be cut by torch-pruning")
    packed = RowLayout(blocks=3)
    own = Slot(layer, "in_proj_weight", packed), Slot(layer, "in_proj_bias", packed)
    return Slot(layer.out_proj, "weight"), Slot(layer.out_proj, "bias"), *own


def _of_lstm(layer: Any, dim: int) -> Iterable[Slot]:
    raise GroupError(f"{type(layer).__name__} cannot be scored; put it in ignored_layers")


_PRUNERS, _TYPES = tp.pruner.function.PrunerBox, tp.ops.OPTYPE
_SLOTS: dict[Any, SlotFunction] = {
    _PRUNERS[_TYPES.IN].prune_out_channels: _of_norm,
    _PRUNERS[_TYPES.GN].prune_out_channels: _of_norm,
    _PRUNERS[_TYPES.LN].prune_out_channels: _of_layer_norm,
    _PRUNERS[_TYPES.PRELU].prune_out_channels: _of_prelu,
    _PRUNERS[_TYPES.EMBED].prune_out_channels: _of_embedding,
    _PRUNERS[_TYPES.MHA].prune_out_channels: _of_attention,
    _PRUNERS[_TYPES.LSTM].prune_out_channels: _of_lstm,
    _PRUNERS[_TYPES.LSTM].prune_in_channels: _of_lstm,
}


def register_slots(pruning_function: Callable[..., Any], slots: SlotFunction) -> None:
    """Teach the plugin which parameters a customized pruning function cuts rows of.

    Args:
        pruning_function: the bound method, as given to torch-pruning's ``customized_pruners``.
        slots: ``(layer, pruning_dim) -> slots``, the parameters whose rows produce the channels that are pruned;
            none for a function that prunes input channels. The i-th row is the i-th channel.

    Example:
        >>> class Own:
        ...     def prune_out_channels(self, layer, idxs): ...
        >>> own = Own()
        >>> register_slots(own.prune_out_channels, lambda layer, dim: [Slot(layer, "gain")])
        >>> _ = _SLOTS.pop(own.prune_out_channels)
    """
    _SLOTS[pruning_function] = slots
