"""Why nothing is removed from a parameter: one sentence for every one that no group writes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import nn

from .algebra import leaves

if TYPE_CHECKING:
    from .graph import AxisGraph, Group, Held

__all__ = ["unwritten", "why_whole"]

_NO_WRITER = "no convolution or linear layer writes its units, and only such groups are pruned"
_ONE = "it has one output channel"
_HEADS = "its units are whole attention heads, which go with prune_num_heads=True only"
_OVERLAP = "its units (group {!r}) overlap with those of a group with smaller ones, which is pruned instead"


def unwritten(graph: AxisGraph) -> list[Held]:
    """The parameters with two or more dimensions from whose outputs no group removes anything, unless on request."""
    written = {key for group in graph.groups.values() if not group.secondary for key in _written(group)}
    return [
        held
        for held in graph.held
        if held.attr in held.owner._parameters and held.tensor.ndim > 1 and id(held.tensor) not in written
    ]


def _written(group: Group) -> set[int]:
    return {id(part.tensor) for part in group.slices() if part.is_parameter and not part.reads}


def why_whole(graph: AxisGraph) -> Iterator[tuple[str, str]]:
    """``(name, reason)`` for all of :func:`unwritten`: the name of the layer, or that of a parameter alone."""
    on_request = {key: group for group in graph.groups.values() if group.secondary for key in _written(group)}
    found: dict[nn.Module, dict[str, str]] = {}
    for held in unwritten(graph):
        group = on_request.get(id(held.tensor))
        reason = _reason(graph, held) if group is None else _HEADS if group.is_heads else _OVERLAP.format(group.name)
        found.setdefault(held.owner, {})[held.attr] = reason
    for owner, reasons in found.items():
        name = graph.names[owner]
        layer, computed, _ = name.rpartition(".parametrizations.")
        if computed or name.startswith("parametrizations."):
            yield layer or name, f"its weight is computed by a parametrization: {next(iter(reasons.values()))}"
        elif _is_layer(owner, reasons) and name:
            yield name, next(iter(reasons.values()))
        else:
            yield from ((f"{name}.{attr}".lstrip("."), reason) for attr, reason in reasons.items())


def _is_layer(owner: nn.Module, whole: Collection[str]) -> bool:
    """Whether a module is named as such: it has no parts, and nothing is removed from any matrix that it holds."""
    matrices = {attr for attr, p in owner._parameters.items() if p is not None and p.ndim > 1}
    return next(owner.children(), None) is None and matrices == set(whole)


def _reason(graph: AxisGraph, held: Held) -> str:
    axes = graph.outputs_of(held)
    found = [leaf for axis in axes for leaf in leaves(axis)]
    free = [leaf for leaf in found if not leaf.fixed]
    if not found or all(leaf.size < 2 for leaf in found):
        return next((leaf.fixed for leaf in reversed(found) if leaf.fixed), _ONE)
    if any(leaf.size > 1 for leaf in free):
        return _NO_WRITER
    return [leaf.fixed for leaf in found if leaf.fixed][-1]
