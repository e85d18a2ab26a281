"""Why nothing is removed from a parameter: one sentence for every one that no group writes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from .algebra import leaves
from .groups import Group
from .parameters import LAYERS, Held, ModelAxes

__all__ = ["why_whole"]

_NO_WRITER = "no convolution or linear layer writes its units, and only such groups are pruned"
_ONE = "it has one output channel"
_HEADS = "its units are whole attention heads, which go with prune_num_heads=True only"
_OVERLAP = "its units (group {!r}) overlap with those of a group with smaller ones, which is pruned instead"


def _written(group: Group) -> set[tuple[int, int]]:
    return {(id(part.tensor), part.dim) for part in group.slices() if part.is_parameter and not part.reads}


def _outputs(held: Held) -> set[tuple[int, int]]:
    """The dimensions along which a place writes; of a tensor that is tied, a layer has those of its own class."""
    dims = range(held.tensor.ndim)
    if isinstance(held.owner, LAYERS) and held.attr == "weight" and not getattr(held.owner, "transposed", False):
        dims = range(1)
    return {(id(held.tensor), dim) for dim in dims}


def why_whole(axes: ModelAxes, groups: Collection[Group]) -> Iterator[tuple[str, str]]:
    """Yield ``(name, reason)`` for the layers and parameters that no group writes, unless on request.

    Args:
        axes: of the model; parameters with two or more dimensions are looked at.
        groups: that can be pruned.
    """
    written = {key for group in groups if not group.secondary for key in _written(group)}
    whole = [
        h
        for h in axes.held
        if h.attr in h.owner._parameters and h.tensor.ndim > 1 and written.isdisjoint(_outputs(h))
    ]
    on_request = {key: group for group in groups if group.secondary for key, _ in _written(group)}
    found: dict[nn.Module, dict[str, str]] = {}
    for held in whole:
        group = on_request.get(id(held.tensor))
        reason = _reason(axes, held) if group is None else _HEADS if group.is_heads else _OVERLAP.format(group.name)
        found.setdefault(held.owner, {})[held.attr] = reason
    for owner, reasons in found.items():
        name = axes.names[owner]
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


def _reason(axes: ModelAxes, held: Held) -> str:
    found = [leaf for axis in axes.outputs_of(held) for leaf in leaves(axis)]
    free = [leaf for leaf in found if not leaf.fixed]
    if not found or all(leaf.size < 2 for leaf in found):
        return next((leaf.fixed for leaf in reversed(found) if leaf.fixed), _ONE)
    if any(leaf.size > 1 for leaf in free):
        return _NO_WRITER
    return [leaf.fixed for leaf in found if leaf.fixed][-1]
