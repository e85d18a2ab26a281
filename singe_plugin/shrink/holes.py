"""Where a model is masked is looked up here, per parameter and per unit of its groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Group, UnitSlice

__all__ = [
    "Holes", "Units", "any_unit", "holes_of", "line_of", "masked_along", "slices_of", "touched", "units_at",
    "with_units",
]  # fmt: skip

Holes = dict[int, Tensor]  # id of a parameter -> where it is masked
Units = Mapping[Group, Tensor]  # [N] bool


def any_unit(chosen: Units) -> bool:
    """Say whether any unit of any group is chosen."""
    return any(bool(units.any()) for units in chosen.values())


def holes_of(model: nn.Module, twin: nn.Module) -> Holes:
    """Return where the parameters of a model are masked, by a copy of it whose parameters are the masks."""
    masks = dict(twin.named_parameters())
    return {id(p): masks[name].detach() == 0 for name, p in model.named_parameters()}


def with_units(holes: Holes, chosen: Units) -> Holes:
    """Return the holes together with every slice of some units."""
    found = dict(holes)
    for part, flags in slices_of(chosen):
        if part.is_parameter:
            found[id(part.tensor)] = found[id(part.tensor)] | flags
    return found


def slices_of(chosen: Units) -> Iterator[tuple[UnitSlice, Tensor]]:
    """Yield the slices of some units, and where they are, shaped to fit the tensor that they are of."""
    for group, units in chosen.items():
        for part in group.slices():
            unit_of = torch.from_numpy(part.units)
            flags = (unit_of >= 0) & units[unit_of.clamp(min=0)]
            tensor = part.tensor
            yield part, flags.to(tensor.device).view(-1, *[1] * (tensor.ndim - part.dim - 1)).expand_as(tensor)


def touched(graph: AxisGraph, holes: Holes) -> tuple[dict[Group, Tensor], dict[Group, Tensor]]:
    """Return the units of which a mask covers all of some parameter's slice, and of these the unwritten ones.

    All that writes an unwritten unit is masked, biases and norms included: it is zero, whatever the rest is.
    """
    lines: dict[tuple[int, int], Tensor] = {}
    some, all_of = {}, {}
    for group in graph.groups.values():
        some[group] = torch.zeros(group.size, dtype=torch.bool)
        all_of[group] = torch.ones(group.size, dtype=torch.bool)
        for part in group.slices():
            if part.is_parameter:
                key = id(part.tensor), part.dim
                if key not in lines:
                    lines[key] = line_of(~holes[key[0]], part.dim)
                there, mine = _along(part, lines[key], group.size)
                some[group] |= mine
                if not part.reads:
                    all_of[group] &= mine | ~there
    return some, {group: units & some[group] for group, units in all_of.items()}


def masked_along(part: UnitSlice, holes: Holes, size: int) -> Tensor:
    """Return the units that a parameter has positions of, all of them masked: ``[N]`` bool."""
    return _along(part, line_of(~holes[id(part.tensor)], part.dim), size)[1]


def _along(part: UnitSlice, line: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the units that a parameter has positions of, and those of them that are masked at all of these."""
    there = units_at(torch.ones_like(line), part.units, size)
    return there, there & ~units_at(line, part.units, size)


def line_of(flags: Tensor, dim: int) -> Tensor:
    """Say for each position along a dimension whether anything is set there."""
    return (flags.movedim(dim, 0).flatten(1).any(1) if flags.ndim > 1 else flags).cpu()


def units_at(positions: Tensor, unit_of: Any, size: int) -> Tensor:
    """Return the units that flagged positions belong to."""
    owner = torch.from_numpy(unit_of)
    found = torch.zeros(size, dtype=torch.bool)
    found[owner[positions & (owner >= 0)]] = True
    return found
