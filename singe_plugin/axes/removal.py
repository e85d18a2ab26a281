"""Removing units without breaking what surrounds the model.

Parameter and buffer objects stay and only get smaller data: optimizer, scheduler, hooks and ``requires_grad`` live
on. Integer attributes that give a dimension's size follow, optimizer state and an EMA copy are cut along; a failure
puts everything back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from singe_plugin.computed import Computed, weight_of_layer
from singe_plugin.errors import RemovalError, SingeError, is_of_the_machine
from singe_plugin.rollback import Snapshot, Trackers, swap_data

from .algebra import contains, labels, size_of
from .graph import AxisGraph
from .groups import Group
from .scales import ImpliedScale
from .widths import refresh_widths, tensor_of

__all__ = ["remove_units"]

_SCALARS = (bool, int, float, str, tuple, type(None))


@dataclass
class _Cut:
    """What stays of one tensor."""

    owner: nn.Module
    attr: str
    tensor: Tensor
    shape: torch.Size
    keep: list[tuple[int, Tensor]]

    def select(self, tensor: Tensor) -> Tensor:
        for dim, index in self.keep:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor


def remove_units(
    graph: AxisGraph,
    group: Group,
    units: Sequence[int],
    trackers: Trackers | None = None,
    undo: bool = True,
    settled: bool = False,
) -> None:
    """Remove units from every tensor that has a slice of them.

    Args:
        graph: the graph of the model.
        group: one of its groups.
        units: their present numbers, each once.
        trackers: what is cut along.
        undo: whether a failure is undone here; else by whoever tries this out, who goes back in any case.
        settled: whether :meth:`AxisGraph.allowed` was asked about all that goes, and this is a part of it.

    Raises:
        RemovalError: for units that are not there, if none would be left, if the model would go another way without
            them (:mod:`singe_plugin.axes.questions`), or if something fails on the way; the model is as before.
    """
    trackers = trackers or Trackers()
    gone = {int(u) for u in units}
    if not gone:
        return
    if min(gone) < 0 or max(gone) >= group.size:
        raise RemovalError(
            f"group {group.name!r} has units 0 to {group.size - 1}, but unit "
            f"{max(gone) if max(gone) >= group.size else min(gone)} was to be removed"
        )
    if len(gone) > group.size - group.least:
        left = "a layer without any" if group.least == 1 else f"fewer than the {group.least} that the model runs with"
        raise RemovalError(
            f"group {group.name!r}: removing {len(gone)} of {group.size} units would leave {left}; lower the ratio"
        )
    if undo and (group.size - len(gone)) % group.multiple:
        raise RemovalError(
            f"group {group.name!r}: removing {len(gone)} of {group.size} units would leave a number that is no "
            f"multiple of {group.multiple}, and {group.multiple_of} takes no others; remove as many at once, or let "
            "the model use another implementation (of transformers: set_experts_implementation('eager'))"
        )
    if undo and not settled:
        graph.questions.check(group, len(gone))
    graph.before_removal()
    leaf = group.leaf.root()
    cuts = _cuts(group, gone)
    places = {place: graph.trace.links[place][0] for place in graph.index.places(leaf)}
    caches = [module for module, attr in graph.trace.caches if module.__dict__[attr]]
    weights = _weights(graph, group, gone, trackers)
    changed = list(dict.fromkeys([*(c.owner for c in cuts), *(p.owner for p in places), *caches]))
    changed += [
        m for m in dict.fromkeys(m for w in weights for m in w.modules) if m not in changed and m in graph.names
    ]
    before = Snapshot(graph.model, group, changed, trackers) if undo else None
    try:
        widths = [(scale, size_of(scale.width)) for scale in graph.index.widths(leaf)]
        for cut in cuts:
            _apply(cut, trackers)
        _cut_scale_rows(graph, cuts)
        leaf.shrink(len(gone))
        group.left = [unit for number, unit in enumerate(group.left) if number not in gone]
        graph.changed()
        for place, (times, axis) in places.items():
            place.set(int(times * size_of(axis)))
        for owner in changed:
            refresh_widths(owner)
        graph.trace.forget()
        _cut_emas(graph, cuts, changed, trackers)
        for weight in weights:
            weight.settle()
        for owner in changed if undo else ():
            if isinstance(owner, nn.RNNBase):
                owner.flatten_parameters()  # cuDNN wants them in one piece of memory
        for scale, width in widths:
            _rescale(graph, scale, math.sqrt(size_of(scale.width) / width), trackers)
    except BaseException as error:
        if before is not None:
            before.restore()
        if isinstance(error, Exception) and not isinstance(error, SingeError) and not is_of_the_machine(error):
            raise RemovalError(
                f"group {group.name!r}: removing units failed with {type(error).__name__}: {error}; the model is as "
                "it was before"
            ) from error
        raise


def _stays(group: Group, gone: set[int]) -> NDArray[np.bool_]:
    """Which units stay; the last place is for positions of no unit, which are -1."""
    stays = np.ones(group.size + 1, dtype=bool)
    stays[list(gone)] = False
    return stays


def _cuts(group: Group, gone: set[int]) -> list[_Cut]:
    cuts: dict[int, _Cut] = {}
    stays = _stays(group, gone)
    for part in group.slices():
        kept = torch.from_numpy(np.flatnonzero(stays[part.units]))
        tensor = part.tensor
        cut = cuts.setdefault(id(tensor), _Cut(part.owner, part.attr, tensor, tensor.shape, []))
        if all(dim != part.dim for dim, _ in cut.keep):
            cut.keep.append((part.dim, kept))
    return list(cuts.values())


@dataclass
class _Weight:
    """A weight that is computed from what is cut, of the model or of an EMA, and what has to be left of it."""

    weight: Computed
    name: str
    wanted: Tensor

    @property
    def modules(self) -> list[nn.Module]:
        """What may change of the model."""
        return [self.weight.layer, *(owner for owner, _ in self.weight.sources())]

    def settle(self) -> None:
        self.weight.become(self.wanted, self.name)
        refresh_widths(self.weight.layer)


def _weights(graph: AxisGraph, group: Group, gone: set[int], trackers: Trackers) -> list[_Weight]:
    leaf, stays, found = group.leaf.root(), _stays(group, gone), list[_Weight]()
    for made in graph.made(leaf):
        name, attr = graph.names[made.weight.layer], made.weight.attr
        for model in (graph.model, *trackers.ema_models()):
            weight = weight_of_layer(model.get_submodule(name), attr)
            if weight is None:
                raise RemovalError(f"the EMA has a plain {name}.{attr}, and the model computes it; make both alike")
            if weight.is_complex() != made.weight.is_complex():
                continue  # a copy that holds something else than weights
            wanted = weight.value()
            for dim, axis in enumerate(made.axes):
                if contains(axis, leaf):
                    kept = torch.from_numpy(np.flatnonzero(stays[labels(axis, leaf)]))
                    wanted = wanted.index_select(dim, kept.to(wanted.device))
            found.append(_Weight(weight, name, wanted))
    return found


@torch.no_grad()
def _apply(cut: _Cut, trackers: Trackers) -> None:
    tensor = cut.tensor
    shape, grad = tensor.shape, tensor.grad
    fresh = cut.select(tensor.data)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        fresh = fresh.contiguous(memory_format=torch.channels_last)
    tensor.grad = None
    swap_data(tensor, fresh)
    if grad is not None:
        tensor.grad = cut.select(grad)
    for optimizer in trackers.optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, Tensor) and value.shape == shape:
                optimizer.state[tensor][key] = cut.select(value)


def _cut_scale_rows(graph: AxisGraph, cuts: list[_Cut]) -> None:
    rows_of = {(c.owner, c.attr): dict(c.keep)[0] for c in cuts if 0 in dict(c.keep)}
    for scale in graph.index.rows(cut.owner for cut in cuts):
        scale.rows = [
            (m, a, rows.index_select(0, rows_of[m, a].to(rows.device)) if (m, a) in rows_of else rows)
            for m, a, rows in scale.rows
        ]


@torch.no_grad()
def _rescale(graph: AxisGraph, scale: ImpliedScale, factor: float, trackers: Trackers) -> None:
    for model in (graph.model, *trackers.ema_models()):
        for owner, attr, rows in scale.rows:
            tensor = model.get_submodule(graph.names[owner])._parameters[attr]
            assert tensor is not None
            chosen = rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            tensor.data = torch.where(chosen, tensor.data * factor, tensor.data)


def _cut_emas(graph: AxisGraph, cuts: list[_Cut], changed: list[nn.Module], trackers: Trackers) -> None:
    for ema in trackers.ema_models():
        for cut in cuts:
            twin = ema.get_submodule(graph.names[cut.owner])
            tensor = tensor_of(twin, cut.attr)
            if tensor is None:
                continue
            if tensor.shape != cut.shape:
                raise RemovalError(
                    f"the EMA of {graph.names[cut.owner]}.{cut.attr} has shape {tuple(tensor.shape)} and cannot be cut "
                    f"along with one of {tuple(cut.shape)}"
                )
            fresh = cut.select(tensor.data)
            tensor.grad = None
            swap_data(tensor, fresh)
        for module in changed:
            twin = ema.get_submodule(graph.names[module])
            for key, value in module.__dict__.items():
                if key != "training" and isinstance(value, (*_SCALARS, list)) and key in twin.__dict__:
                    twin.__dict__[key] = list(value) if isinstance(value, list) else value
