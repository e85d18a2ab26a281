"""Which masked units nobody can miss, whatever the values of the parameters that are not masked.

A unit that happens to be silent on some inputs (a rectifier that is off, a branch that was initialised with zeros) must
stay. So little is concluded from the model's own values: all that is not masked is drawn at random, rectifiers let both
signs pass, and a unit is *silent* if none of its parameters moves the outputs then. Removing it has to change nothing,
neither then nor for the model's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.axes import Group
from singe_plugin.axes.algebra import labels
from singe_plugin.axes.substitutes import normal, uniform
from singe_plugin.axes.values import Values
from singe_plugin.errors import is_of_the_machine
from singe_plugin.masks import LAYERS
from singe_plugin.nested import map_tensors, tensors_in

from .holes import Holes, line_of, units_at
from .laboratory import Laboratory, OpenFunctions

__all__ = ["find_constant", "find_loud", "find_silent"]

_DRAWS = 3


def find_silent(lab: Laboratory, holes: Holes, norms: bool = False) -> dict[Group, Tensor]:
    """Find the units through which no parameter moves the outputs, for random values of all that is not in a hole."""
    found = {g: torch.ones(g.size, dtype=torch.bool) for g in lab.graph.groups.values()}
    for seed in range(_DRAWS):
        with lab.drawn(holes, seed), lab.running():
            try:
                moving = _moving(lab, seed, norms)
            except Exception as error:
                if is_of_the_machine(error):
                    raise
                lab.trouble = f"its gradient cannot be taken ({type(error).__name__}: {error})"
                return {g: torch.zeros_like(units) for g, units in found.items()}
            flags: dict[tuple[int, int], Tensor] = {}
            for group, units in found.items():
                for part in group.slices():
                    key = id(part.tensor), part.dim
                    if part.is_parameter and key[0] in moving:
                        if key not in flags:
                            flags[key] = line_of(moving[key[0]], part.dim)
                        units &= ~units_at(flags[key], part.units, group.size)
    return found


def _moving(lab: Laboratory, seed: int, norms: bool) -> dict[int, Tensor]:
    """Return the entries of every parameter that are not zero and have a gradient."""
    parameters = [p for p in lab.graph.model.parameters() if p.is_floating_point() and p.numel()]
    with torch.enable_grad(), OpenFunctions(norms):
        for parameter in parameters:
            parameter.requires_grad_(True)
        outputs = lab.forward(lab.noise(seed))
        total: Any = sum((t * normal(t, torch.Generator().manual_seed(seed))).sum() for t in outputs)
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {id(p): (g != 0) & (p.detach() != 0) for p, g in zip(parameters, found, strict=True) if g is not None}


def find_constant(lab: Laboratory, holes: Holes) -> dict[Group, Tensor]:
    """Find the units of which every reader sees the same, whatever the model's inputs are.

    Only convolutions and linear layers that are called as modules are watched; what others read is not constant.
    """
    first, second = lab.noise(0), map_tensors(_moved_on, lab.noise(1000))
    groups = list(lab.graph.groups.values())
    if all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(second), strict=True)):
        return {group: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    found = {group: torch.ones(group.size, dtype=torch.bool) for group in groups}
    for seed in range(_DRAWS):
        with lab.drawn(holes, seed), OpenFunctions():
            try:
                with lab.running():
                    one = _seen(lab, first, _projected)
                with _other_words(lab.graph.model), lab.running():
                    other = _seen(lab, second, _projected)
            except Exception as error:
                if is_of_the_machine(error):
                    raise
                one, other = {}, {}  # the model takes no other inputs
        differ = {
            module: torch.stack([a != b for a, b in zip(calls, other[module], strict=True)]).any(0)
            for module, calls in one.items()
            if len(calls) == len(other.get(module, ()))
        }
        for group, units in found.items():
            units &= ~_heard(lab, group, differ, holes)
    return found


def find_loud(lab: Laboratory, holes: Holes) -> dict[Group, Tensor]:
    """Find the units of which a reader sees anything but zeros, for the model's own values."""
    with lab.running():
        seen = _seen(lab, lab.graph.inputs, _largest)
    flags = {module: torch.stack(calls).amax(0) != 0 for module, calls in seen.items()}
    return {group: _heard(lab, group, flags, holes) for group in lab.graph.groups.values()}


def _seen(lab: Laboratory, inputs: Any, summary: Callable[[Tensor, int], Tensor]) -> dict[nn.Module, list[Tensor]]:
    """Return a number per input channel for every call of every layer."""
    found: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.setdefault(module, []).append(summary(args[0], _channel_dim(module, args[0].ndim)).cpu())

    handles = [m.register_forward_pre_hook(note) for m in lab.graph.model.modules() if isinstance(m, LAYERS)]
    try:
        lab.forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _heard(lab: Laboratory, group: Group, flags: Mapping[nn.Module, Tensor], holes: Holes) -> Tensor:
    """Return the units that a layer with weights for them has a flag for; of layers without flags, all of them."""
    heard = torch.zeros(group.size, dtype=torch.bool)
    readers = [p for p in group.slices() if p.is_parameter and p.reads and not isinstance(p.owner, nn.PReLU)]
    for part in readers:
        used = units_at(line_of(~holes[id(part.tensor)], part.dim), part.units, group.size)
        mine, axes = flags.get(part.owner), lab.graph.trace.inputs.get(part.owner)
        if mine is not None and axes:
            unit_of = labels(axes[0][_channel_dim(part.owner, len(axes[0]))], group.leaf.root())
            if len(unit_of) == len(mine):
                used &= units_at(mine, unit_of, group.size)
        heard |= used
    return heard if readers else torch.ones_like(heard)


def _channel_dim(layer: nn.Module, ndim: int) -> int:
    """Return the dimension of a convolution's or linear layer's input that its channels are in."""
    weight = layer._parameters.get("weight")
    return ndim - 1 if weight is None or isinstance(layer, nn.Linear) else ndim - weight.ndim + 1


def _projected(x: Tensor, dim: int) -> Tensor:
    """Project each channel at random: two numbers that are equal bit for bit come from equal channels."""
    probe = uniform(x, torch.Generator().manual_seed(0))
    return (x * probe).movedim(dim, 0).flatten(1).sum(1)


def _largest(x: Tensor, dim: int) -> Tensor:
    return x.abs().movedim(dim, 0).flatten(1).amax(1).nan_to_num(nan=1.0)


def _moved_on(x: Tensor) -> Tensor:
    """Return other whole numbers (ids, attention masks) that are as valid: the first twice, the last not at all."""
    flat = x.flatten()
    return x if x.is_floating_point() else torch.cat([flat[:1], flat[:-1]]).view_as(x)


@contextmanager
def _other_words(model: nn.Module) -> Iterator[None]:
    """Let every id stand for another word, so that what is made of words is no constant, whatever the ids are."""
    values = Values()
    try:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                values.put(module.weight, module.weight.data.roll(1, 0))
        yield
    finally:
        values.restore()
