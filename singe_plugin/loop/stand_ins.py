"""Stand-ins for residual blocks that are gone, while the network is repaired.

The repair compares the pruned network with the unpruned one operator by operator. A block that is gone is as good as
one whose branch gives zeros: so one of the unpruned network's, with the channels that are left and zeros in the layers
that write its results, stands in its place until the repair is over. What it would have added, the layers behind make
up for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import nn

from singe_plugin.axes.blocks import AFTER
from singe_plugin.axes.depth import find_blocks
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.removal import remove_units
from singe_plugin.errors import GroupError
from singe_plugin.rollback import Snapshot

__all__ = ["blocks_gone", "standing_in"]

_KINDS = tuple(type(make()) for make in AFTER.values())


def blocks_gone(original: nn.Module, pruned: nn.Module) -> list[str]:
    """Return the names of the modules of a network that are replaced by nothing, or an activation, in a pruned copy.

    Example:
        >>> blocks_gone(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Identity(), nn.ReLU()))
        ['0']
    """
    now = dict(pruned.named_modules())
    layers = (name for name, module in original.named_modules() if any(p.ndim > 1 for p in module.parameters()))
    return [name for name in layers if type(now.get(name)) in _KINDS]


@contextmanager
def standing_in(graph: AxisGraph, pruned: nn.Module, kept: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Put stand-ins into a pruned network, and what was there back in the end.

    Args:
        graph: of the unpruned network, which is left as it was.
        pruned: the network.
        kept: group -> the units that are left, in the numbering of the unpruned network; of others, all are.

    Yields:
        the names of their parameters; none if no block is gone.

    Raises:
        GroupError: if what is missing is no residual block.
    """
    names = blocks_gone(graph.model, pruned)
    if not names:
        yield []
        return
    if not graph.blocks.keys() >= set(names):
        find_blocks(graph, verify=False)
    for name in names:
        if name not in graph.blocks:
            raise GroupError(
                f"{name!r} is {type(pruned.get_submodule(name)).__name__} in the pruned network, and no residual block "
                "in the unpruned one that could have gone: they cannot be compared; give the network before pruning"
            )
    there = {name: pruned.get_submodule(name) for name in names}
    try:
        for name, module in _cut(graph, names, kept).items():
            _put(pruned, name, module)
        zeros = {
            f"{graph.names[owner]}.{attr}"
            for name in names
            for producer in graph.blocks[name].producers
            for owner, attr in (
                *((slot.owner, slot.attr) for slot in producer.slots),
                *((norm, attr) for norm in (producer.norm,) if norm is not None for attr in ("weight", "bias")),
            )
        }
        mine = {f"{name}.{n}": p for name in names for n, p in pruned.get_submodule(name).named_parameters()}
        with torch.no_grad():
            for name in zeros & mine.keys():
                mine[name].zero_()
        yield list(mine)
    finally:
        for name, module in there.items():
            _put(pruned, name, module)


def _cut(graph: AxisGraph, names: Sequence[str], kept: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    """Copies of blocks with the units that are left."""
    undo = Snapshot(graph.model, graph)
    try:
        for name, units in kept.items():
            group, left = graph.groups[name], set(units)
            remove_units(graph, group, [unit for unit in range(group.size) if unit not in left], undo=False)
        return {name: deepcopy(graph.blocks[name].module) for name in names}
    finally:
        undo.restore()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, attr = name.rpartition(".")
    model.get_submodule(path)._modules[attr] = module
