"""The rows of a group on their way to zero: folded substitutes in the model's place, and what is measured on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from singe_plugin.computed import plain_layers_of
from singe_plugin.errors import GroupError, ScoringError
from singe_plugin.method.folding import norm_scale_shift
from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup

__all__ = [
    "LayerStats", "Measured", "Row", "decaying", "inner_products", "join", "on_norms", "root", "row_power",
    "substituted", "to_units", "touched", "unit_norms", "weight_norms",
]  # fmt: skip

Measured: TypeAlias = list[tuple[Tensor, Tensor]]
"""At one node of the path, per producer: gradient norms and inner products, ``[N]`` each."""


@dataclass
class LayerStats:
    """What one layer of the group measured on one batch: ``norms`` and ``covered`` [N], the others [K, N]."""

    norms: Tensor
    covered: Tensor
    grads: Tensor
    inner: Tensor


@dataclass
class Row:
    """A parameter that decays: the folded tensor it starts from, and where its rows are.

    Attributes:
        owner, attr, layout: see :class:`~singe_plugin.method.units.Slot`.
        base: the tensor at the start of the path.
        source: the producer it belongs to.
        producer: the number of that producer.
        element_of: where every unit is *one number* of this tensor and nothing else, the place of that number in the
            flat tensor, ``[N]`` (a slice if they are in order): norms are absolute values then, and nothing has to be
            added up. None for all other rows.
    """

    owner: nn.Module
    attr: str
    layout: RowLayout
    base: Tensor
    source: Producer
    producer: int
    element_of: Tensor | slice | None = None

    @cached_property
    def unit_of(self) -> Tensor:
        """``[rows]`` int64: the unit of each row, -1 for rows that belong to none."""
        return self.source.unit_of_row().to(self.base.device)

    def scaled(self, scale: float, unit: Tensor | None = None) -> Tensor:
        """Return the tensor with its units' rows (or those of one unit) multiplied by ``scale``."""
        return self.base * self._factors(scale, unit)

    def write(self, scale: float, unit: Tensor | None = None) -> Tensor:
        """Write what :meth:`scaled` returns into the parameter that stands in the model, and return that."""
        leaf = cast(Tensor, self.owner._parameters[self.attr])
        with torch.no_grad():
            torch.mul(self.base, self._factors(scale, unit), out=leaf)
        return leaf

    def _factors(self, scale: float, unit: Tensor | None) -> Tensor:
        factor = torch.full((), scale, dtype=self.base.dtype, device=self.base.device)
        if unit is None and isinstance(self.element_of, slice):
            return factor  # all of it
        chosen = self.unit_of >= 0 if unit is None else self.unit_of == unit
        factors = torch.where(chosen, factor, 1.0)
        return self.layout.spread(factors.to(self.base.dtype), self.base)

    def elements(self, tensor: Tensor) -> Tensor:
        """Read the number that belongs to each unit off a tensor shaped like ``base``, ``[N]`` in float64."""
        return tensor.detach().reshape(-1)[self.element_of].double()


@contextmanager
def decaying(model: nn.Module, group: UnitGroup) -> Iterator[list[Row]]:
    """Put folded substitutes in the place of the group's parameters; nothing else of the model wants a gradient.

    That is put back by the caller, through ``preserved``.
    """
    model.requires_grad_(False)
    with substituted(group) as rows:
        yield rows


def touched(group: UnitGroup) -> list[nn.Module]:
    """The modules of which tensors are substituted: those of the producers' parameters, norms and biases."""
    found: list[nn.Module] = []
    for producer in group.producers:
        slots = [*producer.slots, *([] if producer.bias is None else [producer.bias])]
        found += [slot.owner for slot in slots] + ([] if producer.norm is None else [producer.norm])
        found += [owner for slot in slots for owner, _ in slot.places]
    return list(dict.fromkeys(found))


def on_norms(group: UnitGroup) -> UnitGroup:
    r"""The same group, with scale and shift of folded batch-norms decaying in the place of the layers before them.

    What such a layer and its norm write, :math:`y=(\gamma/\sigma)Wx+c`, is linear in the folded rows and in scale and
    shift alike: F is the same all along the path, and so is the inner product of the decaying rows with their gradient,
    :math:`\langle y,\nabla_yF\rangle`. Norms are not: this is for criteria that read none. No gradient of a weight is
    computed then, and the layers themselves count to what is in front.
    """
    return replace(group, producers=tuple(map(_on_norm, group.producers)))


def _on_norm(producer: Producer) -> Producer:
    norm, layout = producer.norm, producer.slots[0].layout
    plain = type(layout) is RowLayout and layout.blocks == 1 and producer.bias is None
    plain = plain and not any(slot.places for slot in producer.slots)  # in its other places there is no norm
    if norm is None or not plain or not {"weight", "bias"} <= norm._parameters.keys():
        return producer
    slots = Slot(norm, "weight"), Slot(norm, "bias")
    return replace(producer, slots=slots, norm=None, is_norm=True)


@contextmanager
def substituted(group: UnitGroup, runs: bool = True) -> Iterator[list[Row]]:
    """Put folded substitutes in the place of the group's parameters, and take them out again.

    Args:
        group: what decays.
        runs: whether the model runs with them; if not, only the rows are wanted, and no copy of them is made.
    """
    computed = [slot.owner for slot in group.slots() if slot.attr not in slot.owner._parameters]
    with plain_layers_of(computed):  # others may compute a weight from what decays: a mask does
        before = [(module, dict(module._parameters), dict(module._buffers)) for module in touched(group)]
        try:
            yield _substitutes(group, runs)
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)


def _substitutes(group: UnitGroup, runs: bool) -> list[Row]:
    rows: list[Row] = []
    places = {(slot.owner, slot.attr): slot.places for slot in group.slots()}
    for number, producer in enumerate(group.producers):
        if not producer.is_norm and all(slot.tensor is None for slot in producer.slots):
            raise GroupError(
                f"group {group.name!r}: {producer.name!r} has no parameter that could decay "
                f"({', '.join(slot.attr for slot in producer.slots)} are None); leave it out of the producers"
            )
        folded = list(_folded(producer))
        for owner, attr, layout, base in folded:
            place = _elements(producer, layout, base, group.size) if len(folded) == 1 else None
            row = Row(owner, attr, layout, base, producer, number, place)
            if place is None and len(row.unit_of) != layout.count(base):
                raise ScoringError(
                    f"group {group.name!r}: {producer.name}.{attr} has {layout.count(base)} rows, "
                    f"expected {len(row.unit_of)}"
                )
            if runs:
                owner._parameters[attr] = fresh = nn.Parameter(base.clone(memory_format=torch.preserve_format))
                for other, name in places.get((owner, attr), ()):
                    other._parameters[name] = fresh
            rows.append(row)
    return rows


def _elements(producer: Producer, layout: RowLayout, base: Tensor, size: int) -> Tensor | slice | None:
    """Find the place of every unit's number in the tensor, or None: :attr:`Row.element_of`."""
    if len(producer.units) != size or layout.count(base) != base.numel():
        return None
    place = torch.full((size,), -1, dtype=torch.int64)
    place[producer.units] = producer.rows
    if bool((place < 0).any()):
        return None  # some unit has several numbers, and another one none
    if size == base.numel() and bool((place == torch.arange(size)).all()):
        return slice(None)
    return place.to(base.device)


def _folded(producer: Producer) -> Iterator[tuple[nn.Module, str, RowLayout, Tensor]]:
    """Yield the tensors of a producer with batch-norm folded in; the batch-norm itself becomes the identity."""
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
    (weight_slot, weight), *decaying_bias = slots
    assert weight is not None
    weight = weight.detach()
    # The batch-norm has one channel per output channel, whatever rows the units see.
    channels = weight_slot.layout.channels
    folded = (weight * channels.spread(scale.to(weight.device), weight)).to(weight.dtype)
    yield weight_slot.owner, weight_slot.attr, weight_slot.layout, folded
    if producer.bias is None and not decaying_bias:
        raise GroupError(
            f"{producer.name!r}: a batch-norm is to be folded in, but no parameter is named that takes its shift; give "
            "the bias as a second slot if it decays with the units, or as Producer(bias=...) if it stays"
        )
    slot = producer.bias if producer.bias is not None else decaying_bias[0][0]
    bias = slot.tensor
    start = torch.zeros_like(shift) if bias is None else bias.detach().to(shift.dtype)
    value = (scale * start + shift).to(weight.dtype)
    if producer.bias is None:
        yield slot.owner, slot.attr, slot.layout, value
    else:  # it belongs to no unit: it takes the shift and stays
        slot.owner._parameters[slot.attr] = nn.Parameter(value, requires_grad=False)


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
    """Sum |x|^p over every row (take the largest |x| for p = inf), in float64.

    Single precision is as good where the values are: the sum of a row rounds by some 1e-7 of itself there, and takes an
    eighth of the time. Rows whose powers leave its range are summed in double precision.

    Example:
        >>> bool(row_power(torch.tensor([[3e-25, 4e-25]]), 2) > 0)
        True
    """
    rows = rows.detach()
    if rows.dtype == torch.float32 and p in (1, 2) and rows.device.type == "cpu":  # elsewhere to look is to wait
        norms: Tensor = torch.linalg.vector_norm(rows, p, dim=1).double()
        if bool(((norms > 1e-15) & norms.isfinite()).all()):
            return norms.pow(p)
    if rows.dtype in (torch.float32, torch.float64):  # in one go: the values in double precision are never kept
        norms = torch.linalg.vector_norm(rows, p, dim=1, dtype=torch.float64)
        return norms if math.isinf(p) else norms.pow(p)
    values = rows.double().abs()
    return values.amax(1) if math.isinf(p) else values.pow(p).sum(1)


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


def unit_norms(rows: list[tuple[Row, Tensor]], size: int, p: float) -> Tensor:
    """Compute the p-norm of each unit ``[N]``, over the rows of one producer, each with the tensor to measure."""
    row, tensor = rows[0]
    if row.element_of is not None:
        return row.elements(tensor).abs()
    return root(join([to_units(row_power(r.layout.rows(t), p), r.unit_of, size, p) for r, t in rows], p), p)


def inner_products(rows: list[tuple[Row, Tensor, Tensor]], size: int) -> Tensor:
    """Compute the inner product of two tensors for each unit ``[N]``, over the rows of one producer."""
    row, one, other = rows[0]
    if row.element_of is not None:
        return row.elements(one) * row.elements(other)
    parts = [
        to_units(_products(r.layout.rows(a.detach()), r.layout.rows(b.detach())), r.unit_of, size) for r, a, b in rows
    ]
    return torch.stack(parts).sum(0)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row with its other, summed up in float64."""
    if one.dtype == other.dtype == torch.float32:
        return (one * other).sum(1, dtype=torch.float64)
    return (one.double() * other.double()).sum(1)


def weight_norms(group: UnitGroup, rows: list[Row], p: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return, per producer, the norms of its units at the start of the path and which units it has, ``[N]`` each."""
    norms, covered = [], []
    for number in range(len(group.producers)):
        mine = [r for r in rows if r.producer == number]
        norms.append(unit_norms([(r, r.base) for r in mine], group.size, p))
        covered.append(_covered(mine, group.size))
    return norms, covered


def _covered(rows: list[Row], size: int) -> Tensor:
    if rows[0].element_of is not None:
        return torch.ones(size, dtype=torch.bool, device=rows[0].base.device)
    ones = [to_units(torch.ones_like(r.unit_of, dtype=torch.float64), r.unit_of, size) for r in rows]
    return torch.stack(ones).sum(0) > 0
