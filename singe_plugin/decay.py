"""The rows of a group on their way to zero: folded substitutes in the model's place, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError, ScoringError
from singe_plugin.folding import norm_scale_shift
from singe_plugin.units import Producer, RowLayout, UnitGroup

__all__ = ["LayerStats", "Row", "decaying", "join", "measure_weights", "root", "row_power", "to_units", "weight_norms"]


@dataclass
class LayerStats:
    """What one layer of the group measured on one batch: ``norms`` and ``covered`` [N], the others [K, N]."""

    norms: Tensor
    covered: Tensor
    grads: Tensor
    inner: Tensor


@dataclass
class Row:
    """A parameter that decays: the folded tensor it starts from, and the unit of each of its rows."""

    owner: nn.Module
    attr: str
    layout: RowLayout
    base: Tensor
    unit_of: Tensor
    producer: int

    def scaled(self, scale: float, unit: Tensor | None = None) -> Tensor:
        """The tensor with its units' rows (or those of one unit) multiplied by ``scale``."""
        chosen = self.unit_of >= 0 if unit is None else self.unit_of == unit
        factors = torch.where(chosen, torch.full((), scale, dtype=self.base.dtype, device=self.base.device), 1.0)
        return self.base * self.layout.spread(factors.to(self.base.dtype), self.base)


@contextmanager
def decaying(model: nn.Module, group: UnitGroup) -> Iterator[list[Row]]:
    """Put folded substitutes in the place of the group's parameters; the caller restores through ``preserved``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows: list[Row] = []
    for number, producer in enumerate(group.producers):
        if not producer.is_norm and all(slot.tensor is None for slot in producer.slots):
            raise GroupError(
                f"group {group.name!r}: {producer.name!r} has no parameter that could decay "
                f"({', '.join(slot.attr for slot in producer.slots)} are None); leave it out of the producers"
            )
        for owner, attr, layout, base in _folded(producer):
            parameter = nn.Parameter(base.clone(memory_format=torch.preserve_format))
            unit_of = producer.unit_of_row().to(base.device)
            if len(unit_of) != layout.count(base):
                raise ScoringError(
                    f"group {group.name!r}: {producer.name}.{attr} has {layout.count(base)} rows, "
                    f"expected {len(unit_of)}"
                )
            owner._parameters[attr] = parameter
            rows.append(Row(owner, attr, layout, base, unit_of, number))
    yield rows


def _folded(producer: Producer) -> Iterator[tuple[nn.Module, str, RowLayout, Tensor]]:
    """The tensors of a producer with batch-norm folded in; the batch-norm itself becomes the identity."""
    slots = [(slot, slot.tensor) for slot in producer.slots]
    norm = producer.norm
    if norm is None and not producer.is_norm:
        for slot, tensor in slots:
            if tensor is not None:
                yield slot.owner, slot.attr, slot.layout, tensor.detach()
        return
    if producer.is_norm:
        norm = producer.slots[0].owner
        scale, shift = norm_scale_shift(norm)
        _make_identity(norm)
        for (slot, tensor), value in zip(slots, (scale, shift), strict=True):
            # a half-precision batch-norm refuses float32 scales
            yield (
                slot.owner,
                slot.attr,
                slot.layout,
                value.to((cast(Tensor, norm.running_mean) if tensor is None else tensor).dtype),
            )
        return
    assert norm is not None
    scale, shift = norm_scale_shift(norm)
    _make_identity(norm)
    (weight_slot, weight), (bias_slot, bias) = slots
    assert weight is not None
    weight = weight.detach()
    # The batch-norm has one channel per output channel, however many blocks of rows the units see.
    channels = replace(weight_slot.layout, blocks=1)
    folded = (weight * channels.spread(scale.to(weight.device), weight)).to(weight.dtype)
    yield weight_slot.owner, weight_slot.attr, weight_slot.layout, folded
    start = torch.zeros_like(shift) if bias is None else bias.detach().to(shift.dtype)
    yield bias_slot.owner, bias_slot.attr, bias_slot.layout, (scale * start + shift).to(weight.dtype)


def _make_identity(norm: nn.Module) -> None:
    """Replace a batch-norm's tensors so that it passes its input on, in eval mode."""
    plain = {
        "running_mean": 0.0,
        "running_var": 1.0 - float(norm.eps),  # type: ignore[arg-type]
        "weight": 1.0,
        "bias": 0.0,
    }
    for name, value in plain.items():
        parameter, buffer = norm._parameters.get(name), norm._buffers.get(name)
        if parameter is not None:
            fresh = torch.full_like(parameter.detach(), value)
            norm._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        if buffer is not None:
            norm._buffers[name] = torch.full_like(buffer, value)


def row_power(rows: Tensor, p: float) -> Tensor:
    """Per row, sum of |x|^p in float64 (the largest |x| for p = inf)."""
    values = rows.detach().double().abs()
    if math.isinf(p):
        return values.amax(1)
    return values.pow(p).sum(1)


def to_units(per_row: Tensor, unit_of: Tensor, size: int, p: float = 1) -> Tensor:
    """Collect one value per row into one per unit, by sum (by maximum for p = inf)."""
    out = torch.zeros(size, dtype=per_row.dtype, device=per_row.device)
    chosen = unit_of >= 0
    if math.isinf(p):
        return out.scatter_reduce(0, unit_of[chosen], per_row[chosen], "amax")
    return out.index_add(0, unit_of[chosen], per_row[chosen])


def root(power: Tensor, p: float) -> Tensor:
    return power if math.isinf(p) else power.pow(1 / p)


def join(parts: list[Tensor], p: float) -> Tensor:
    stacked = torch.stack(parts)
    return stacked.amax(0) if math.isinf(p) else stacked.sum(0)


def weight_norms(group: UnitGroup, rows: list[Row], p: float) -> tuple[list[Tensor], list[Tensor]]:
    norms, covered = [], []
    for number in range(len(group.producers)):
        mine = [r for r in rows if r.producer == number]
        parts = [to_units(row_power(r.layout.rows(r.base), p), r.unit_of, group.size, p) for r in mine]
        norms.append(root(join(parts, p), p))
        ones = [to_units(torch.ones_like(r.unit_of, dtype=torch.float64), r.unit_of, group.size) for r in mine]
        covered.append(torch.stack(ones).sum(0) > 0)
    return norms, covered


def measure_weights(group: UnitGroup, rows: list[Row], p: float) -> list[LayerStats]:
    norms, covered = weight_norms(group, rows, p)
    zeros = [torch.zeros(1, group.size, dtype=n.dtype, device=n.device) for n in norms]
    return [LayerStats(n, c, z, z) for n, c, z in zip(norms, covered, zeros, strict=True)]
