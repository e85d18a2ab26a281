"""Why nothing is removed from a parameter: one sentence for every one that no group writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from singe_plugin.computed import REMEDY

from .algebra import Atom, leaves
from .groups import Group
from .parameters import LAYERS, Held, ModelAxes

__all__ = ["why_whole"]

_NO_WRITER = "no matrix that reads something writes its units, and only such groups are pruned"
_TABLE = (
    "no matrix that reads something writes its columns, and only such groups are pruned; its rows are the vocabulary, "
    "which stays"
)
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
        h for h in axes.held if h.attr in h.owner._parameters and h.tensor.ndim > 1 and written.isdisjoint(_outputs(h))
    ]
    ids = {key for key, _ in written}
    for weight in axes.computed:  # of what goes together, one is enough
        sources = {(owner, attr): owner._parameters.get(attr) for owner, attr in weight.weight.sources()}
        if any(id(p) in ids for p in sources.values() if p is not None):
            whole = [h for h in whole if (h.owner, h.attr) not in sources]
    on_request = {key: group for group in groups if group.secondary for key, _ in _written(group)}
    found: dict[nn.Module, dict[str, str]] = {}
    for held in whole:
        group = on_request.get(id(held.tensor))
        reason = _reason(axes, held) if group is None else _HEADS if group.is_heads else _OVERLAP.format(group.name)
        found.setdefault(held.owner, {})[held.attr] = reason
    for owner, reasons in found.items():
        name = axes.names[owner]
        made = next(filter(None, (axes.made_of(owner, attr) for attr in reasons)), None)
        if made is not None:
            layer, computed = axes.names[made.weight.layer], ", ".join(made.weight.steps())
            outputs = [axis for axis, reads in zip(made.axes, made.reads, strict=True) if not reads]
            reason = _of_leaves([leaf for axis in outputs for leaf in leaves(axis)]) or next(iter(reasons.values()))
            inside = any(step in reason for step in made.weight.steps()) and REMEDY not in reason
            reason = f"its {made.weight.attr} is computed by a parametrization ({computed}): {reason}"
            yield layer or made.weight.attr, f"{reason}; {REMEDY}" if inside else reason
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
        computed = not found and axes.made_of(held.owner, held.attr) is not None
        every = [leaf for axis in held.axes for leaf in leaves(axis)] if computed else found  # it may be read only
        return next((leaf.fixed for leaf in reversed(every) if leaf.fixed), _ONE)
    if any(leaf.size > 1 for leaf in free):
        return _TABLE if isinstance(held.owner, nn.Embedding | nn.EmbeddingBag) else _NO_WRITER
    return _of_leaves(found) or _NO_WRITER


def _of_leaves(found: Iterable[Atom]) -> str | None:
    """Why none of some leaves can go, the outputs of a layer first."""
    return next((leaf.fixed for leaf in reversed(list(found)) if leaf.fixed and leaf.size > 1), None)
