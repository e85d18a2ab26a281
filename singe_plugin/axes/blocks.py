"""Residual blocks that can go as a whole: without its branch such a module returns what it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from singe_plugin.method.units import Producer, UnitGroup

from .algebra import Atom, leaves
from .parameters import LAYERS, Held, ModelAxes
from .producers import producers_of

__all__ = ["AFTER", "Block", "is_matrix", "producers_in", "tensors_of"]

AFTER: Mapping[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "LeakyReLU": nn.LeakyReLU,
    "ELU": nn.ELU,
    "Mish": nn.Mish,
}
"""What may be left in the place of a block: nothing, or the activation behind its sum; by the name of PyTorch's class.

The activation stays also where what comes in went through the same one, which changes nothing: that is true whatever
comes in, and costs no multiply-add.
"""


@dataclass(eq=False)
class Block:
    """A module that is ``x -> after(x + branch(x))``, and may go as a whole: one unit.

    Attributes:
        axes: of the model.
        name: of the module.
        module: it.
        producers: what writes the branch's results; at zero, these are zero.
        after: what is left in its place, of :data:`AFTER`.
    """

    axes: ModelAxes
    name: str
    module: nn.Module
    producers: tuple[Producer, ...]
    after: str

    size = 1
    only_training = False

    @property
    def modules(self) -> set[nn.Module]:
        """Everything that goes."""
        return set(self.module.modules())

    def holds(self, writers: Mapping[str, nn.Module]) -> bool:
        """Whether all layers that write a group are in it, so that the group goes with it."""
        inside = self.modules
        return all(writer in inside for writer in writers.values())

    def unit_group(self) -> UnitGroup:
        """Return the rows that write the branch's results as one unit, for the scoring engine."""
        return UnitGroup(self.name, 1, tuple(_whole(producer) for producer in self.producers))

    def tensors(self) -> Iterator[Tensor]:
        """Yield what has to be zero for the block to be gone: rows, biases, and the batch-norms behind."""
        for producer in self.producers:
            yield from tensors_of(producer)

    def __repr__(self) -> str:
        return f"Block({self.name!r}, {self.after} is left)"


def _whole(producer: Producer) -> Producer:
    """Return all rows that a layer has now, as those of one unit."""
    slot = next(slot for slot in producer.slots if slot.tensor is not None)
    assert slot.tensor is not None
    rows = torch.arange(slot.layout.count(slot.tensor))
    return replace(producer, rows=rows, units=torch.zeros_like(rows))


def tensors_of(producer: Producer) -> Iterator[Tensor]:
    """Yield the parameters of a producer, and those of the batch-norm that folds into it."""
    norm = producer.norm
    held = [slot.tensor for slot in producer.slots]
    held += [] if norm is None else [norm._parameters.get("weight"), norm._parameters.get("bias")]
    yield from (tensor for tensor in held if tensor is not None)


def is_matrix(producer: Producer) -> bool:
    """Whether a producer makes its results of other numbers, and does not just scale and shift what is there."""
    slot = producer.slots[0]
    return isinstance(slot.owner, LAYERS) or (slot.tensor is not None and slot.tensor.ndim > 1)


def producers_in(axes: ModelAxes, module: nn.Module) -> list[Producer]:
    """Return everything in a module that writes along a dimension of what the module returns, in forward order."""
    (result,) = axes.trace.outputs[module]
    wanted = {leaf for axis in result for leaf in leaves(axis) if leaf.size > 1}
    inside = set(module.modules())
    found: dict[nn.Module, dict[Atom, list[tuple[Held, int]]]] = {}
    made = [weight.held() for weight in axes.computed if weight.weight.layer in inside]
    plain = [h for h in axes.held if h.owner in inside and axes.made_of(h.owner, h.attr) is None]
    for held in [*made, *plain]:
        if held.owner in inside and held.attr not in held.owner._buffers:
            for dim, axis in enumerate(held.axes):
                mine = [leaf for leaf in leaves(axis) if leaf in wanted]
                if mine and not (held in plain and axes.reads(held, dim)):
                    found.setdefault(held.owner, {}).setdefault(mine[0], []).append((held, dim))
    folded: set[nn.Module] = set()
    producers: list[Producer] = []
    for owner in sorted(found, key=lambda m: axes.trace.order.get(m, 1 << 30)):
        if owner not in folded:
            leaf, places = next(iter(found[owner].items()))
            producers += producers_of(axes, owner, places, leaf, folded)
    return [_whole(p) for p in producers if p.slots[0].owner not in folded and any(True for _ in tensors_of(p))]
