"""Temporary changes to a model, for the oracles: random values, units permuted or masked, double precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError
from singe_plugin.state import preserved

from .groups import UnitSlice, group_name, roots_of
from .slices import tensor_of

__all__ = ["NormOfTheRest", "derangement", "exchanged", "in_double", "masked", "random_inputs", "randomised"]


@contextmanager
def randomised(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """The model in eval mode with random affine parameters and statistics; restored on leaving.

    Batch-norm statistics and one-dimensional parameters are drawn anew; larger weights are kept unless they are
    (nearly) zero, as zero-initialised branches are.
    """
    generator = torch.Generator().manual_seed(seed)
    originals = [(p, p.data) for p in model.parameters()]
    with preserved(model), torch.no_grad():
        for parameter, _ in originals:
            parameter.grad = None  # put back by preserved; a gradient would pin the type
        try:
            for name, buffer in model.named_buffers():
                if not buffer.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    buffer.copy_(_uniform(buffer, generator))
                elif name.endswith("running_mean"):
                    buffer.copy_(_normal(buffer, generator) * 0.2)
            for parameter, data in originals:
                if not parameter.is_floating_point() or not data.numel():
                    continue
                if parameter.ndim <= 1:
                    sign = _uniform(data, generator) * torch.where(_normal(data, generator) > -1.0, 1.0, -1.0)
                    parameter.data = sign.to(data.dtype)
                elif float(data.abs().max()) < 1e-3:
                    parameter.data = _normal(data, generator) / max(data[0].numel(), 1) ** 0.5
            model.eval()
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) + 0.5).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def random_inputs(inputs: Any, seed: int = 0) -> Any:
    """Random normal tensors in the place of floating ones, everything else as it is."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs
        return _normal(inputs, torch.Generator().manual_seed(seed))
    if isinstance(inputs, dict):
        return {k: random_inputs(v, seed + 1) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        moved = [random_inputs(v, seed + i) for i, v in enumerate(inputs)]
        return tuple(moved) if isinstance(inputs, tuple) else moved
    return inputs


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """All floating parameters and buffers in double precision; call inside :func:`randomised`."""
    parameters = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        for parameter, data in parameters:
            parameter.data = data.double()
        for module, table in buffers:
            doubled = {k: b.double() for k, b in table.items() if b is not None and b.is_floating_point()}
            module._buffers.update(doubled)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, table in buffers:
            module._buffers.update(table)


def double_inputs(inputs: Any) -> Any:
    """The floating tensors of nested inputs in double precision."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {k: double_inputs(v) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        moved = [double_inputs(v) for v in inputs]
        return tuple(moved) if isinstance(inputs, tuple) else moved
    return inputs


def derangement(count: int, generator: torch.Generator) -> list[int]:
    """A permutation without fixed points: a random cycle through all units."""
    order = torch.randperm(count, generator=generator).tolist()
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


@contextmanager
def exchanged(slices: list[UnitSlice], target: list[int]) -> Iterator[None]:
    """Move unit ``u``'s slices to unit ``target[u]``'s places, in every tensor at once."""
    with _substituted(slices) as put:
        for part in slices:
            places: dict[int, list[int]] = {}
            for position, unit in zip(part.positions, part.units, strict=True):
                places.setdefault(unit, []).append(position)
            tensor = put.current(part)
            source = list(range(tensor.shape[part.dim]))
            for unit, mine in places.items():
                theirs = places.get(target[unit])
                if theirs is not None and len(theirs) == len(mine):
                    for a, b in zip(mine, theirs, strict=True):
                        source[b] = a
            if sorted(source) != list(range(len(source))):
                source = list(range(len(source)))  # units of unequal make-up cannot be exchanged: the oracle fails
            put.set(part, tensor.index_select(part.dim, torch.tensor(source, device=tensor.device)))
        yield


@contextmanager
def masked(slices: list[UnitSlice], chosen: set[int]) -> Iterator[None]:
    """Zero the producing rows of the chosen units."""
    with _substituted(slices) as put:
        for part in slices:
            if not part.produces:
                continue
            gone = [p for p, u in zip(part.positions, part.units, strict=True) if u in chosen]
            tensor = put.current(part)
            index = torch.tensor(gone, device=tensor.device, dtype=torch.int64)
            put.set(part, tensor.index_fill(part.dim, index, 0.0))
        yield


class _Substitutes:
    """Temporary values for the tensors of some slices; the objects stay the same, only their data changes."""

    def __init__(self, slices: list[UnitSlice]) -> None:
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        for part in slices:
            tensor = self.current(part)
            self.saved[id(tensor)] = (tensor, tensor.data)

    def current(self, part: UnitSlice) -> Tensor:
        tensor = tensor_of(part.owner, part.attr)
        if tensor is None:
            raise GroupError(f"{type(part.owner).__name__}.{part.attr} is gone")
        return tensor

    def set(self, part: UnitSlice, value: Tensor) -> None:
        self.current(part).data = value.detach()

    def restore(self) -> None:
        for tensor, data in self.saved.values():
            tensor.data = data


@contextmanager
def _substituted(slices: list[UnitSlice]) -> Iterator[_Substitutes]:
    substitutes = _Substitutes(slices)
    try:
        yield substitutes
    finally:
        substitutes.restore()


class NormOfTheRest:
    """A forward hook that takes a layer or group norm over the channels that are left; the others become zero.

    Raises:
        GroupError: if a group norm would not lose as many channels in each of its groups.
    """

    def __init__(self, group: Any, number: int, roots: set[int]) -> None:
        dep, idxs = group[number].dep, list(group[number].idxs)
        gone = sorted(i for i, root in zip(idxs, roots_of(group, number), strict=True) if root in roots)
        self.module: nn.Module = dep.target.module
        self.width = int(group._DG.get_out_channels(self.module))
        self.kept = torch.tensor(sorted(set(range(self.width)) - set(gone)), dtype=torch.int64)
        if not len(self.kept):
            raise GroupError(f"group {group_name(group)!r}: some of its units are all that a norm has")
        if isinstance(self.module, nn.GroupNorm):
            groups = self.kept // (self.width // self.module.num_groups)
            if len(set(torch.bincount(groups, minlength=self.module.num_groups).tolist())) > 1:
                raise GroupError(
                    f"group {group_name(group)!r}: its units are not spread evenly over the {self.module.num_groups} "
                    "groups of a group norm, whose statistics would mix other channels"
                )
        self.small = copy.deepcopy(self.module)
        self.exact = True
        if gone:
            dep.handler.__self__.pruning_dim = dep.target.pruning_dim
            dep.handler(self.small, gone)
        for attr, full in self.module._parameters.items():
            small = self.small._parameters[attr]
            if small is not None and full is not None and full.ndim == 1:
                # torch-pruning's own cut of a layer norm does not always keep the order of its channels
                small.data = full.data.index_select(0, self.kept.to(full.device))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        dims = [d for d, size in enumerate(args[0].shape) if size == self.width] if args else []
        if isinstance(module, nn.GroupNorm):
            dims = [1]
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            dims = [args[0].ndim - 1]
        if len(dims) != 1:  # a layer norm over we do not know which dimension
            self.exact = False
            return output
        kept = self.kept.to(output.device)
        rest = self.small(args[0].index_select(dims[0], kept))
        return torch.zeros_like(output).index_copy(dims[0], kept, rest)
