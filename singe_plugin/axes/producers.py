"""The rows that produce the units of a leaf, for the scoring engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from singe_plugin.method.folding import is_batchnorm
from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup

from .algebra import Atom, contains, labels
from .parameters import CONV, LAYERS, Held, ModelAxes, out_axis

__all__ = ["producers_of", "unit_group"]


def unit_group(axes: ModelAxes, name: str, leaf: Atom) -> UnitGroup:
    """Describe the units of a leaf: every layer that writes them, with the batch-norm that folds into it.

    Args:
        axes: of the model.
        name: how messages call the group.
        leaf: the root of its units.
    """
    owners: dict[nn.Module, list[tuple[Held, int]]] = {}
    for held, dim in axes.places[leaf]:
        plain = axes.made_of(held.owner, held.attr) is None
        if plain and held.attr in held.owner._parameters and not axes.reads(held, dim):
            owners.setdefault(held.owner, []).append((held, dim))
    for made in axes.made(leaf):
        mine = [d for d, axis in enumerate(made.axes) if contains(axis, leaf) and not made.reads[d]]
        owners.setdefault(made.weight.layer, [])[:0] = [(made.held(), dim) for dim in mine]
    owners = {owner: places for owner, places in owners.items() if places}
    # affine parameters of norms without weights of their own may be missing
    for held, dim in axes.places[leaf]:
        if is_batchnorm(held.owner) and held.attr == "running_mean":
            owners.setdefault(held.owner, []).append((held, dim))
    producers: list[Producer] = []
    folded: set[nn.Module] = set()
    for owner in sorted(owners, key=lambda m: axes.trace.order.get(m, 1 << 30)):
        producers += producers_of(axes, owner, owners[owner], leaf, folded)
    kept = tuple(p for p in producers if p.slots[0].owner not in folded)
    return UnitGroup(name, leaf.size, kept)


def producers_of(
    axes: ModelAxes, owner: nn.Module, places: list[tuple[Held, int]], leaf: Atom, folded: set[nn.Module]
) -> Iterator[Producer]:
    """Describe how a module writes the units of a leaf.

    Args:
        axes: of the model.
        owner: the module.
        places: where it holds them.
        leaf: the root of the units.
        folded: gets the batch-norms that fold into it.
    """
    name = axes.names[owner]
    if isinstance(owner, LAYERS) and axes.stands(axes.weights.get(owner, places[0][0])):
        for held, _ in places[:1]:
            weight = axes.weights.get(owner, held)
            transposed = isinstance(owner, CONV) and owner.transposed
            layout = RowLayout(1, groups=getattr(owner, "groups", 1)) if transposed else RowLayout(0)
            rows, units = _rows(labels(out_axis(weight), leaf))
            norm = axes.norm_of(owner)
            if norm is not None:
                folded.add(norm)
            own = _slot(axes, owner, "weight", layout), _slot(axes, owner, "bias", RowLayout())
            yield Producer(name, own, rows, units, norm)
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
        slots = tuple(_slot(axes, owner, held.attr, RowLayout(dim)) for held, dim in same)
        whole = name and len(by_labels) == 1 and len(slots) != 1
        label = name if whole else " and ".join(f"{name}.{slot.attr}".strip(".") for slot in slots)
        yield Producer(label, slots, rows, units)


def _slot(axes: ModelAxes, owner: nn.Module, attr: str, layout: RowLayout) -> Slot:
    """A parameter of a producer, in every place that holds it."""
    tensor = owner._parameters.get(attr)
    held = () if tensor is None else axes.shared.get(id(tensor), ())
    return Slot(owner, attr, layout, tuple((h.owner, h.attr) for h in held if (h.owner, h.attr) != (owner, attr)))


def _rows(units: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    rows = np.flatnonzero(units >= 0)
    return torch.from_numpy(rows), torch.from_numpy(units[rows])
