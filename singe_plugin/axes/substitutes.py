"""Temporary changes to a model, for the oracles: random values, units permuted or masked, double precision."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.computed import weight_of_layer
from singe_plugin.errors import GroupError
from singe_plugin.nested import map_tensors
from singe_plugin.state import preserved

from .algebra import Atom, Axis, labels, leaves
from .graph import AxisGraph
from .groups import Group
from .rules import LOSSES
from .values import Values

__all__ = [
    "NormsOfTheRest",
    "SharedNoise",
    "derangement",
    "double_inputs",
    "exchanged",
    "in_double",
    "masked",
    "normal",
    "random_inputs",
    "randomised",
    "uniform",
]


@contextmanager
def randomised(model: nn.Module, seed: int = 0, bias: float = 1.0, turned: bool = False) -> Iterator[None]:
    """Put the model into eval mode with random affine parameters and statistics; restore it on leaving.

    Batch-norm statistics and one-dimensional parameters are drawn anew; larger weights are kept unless they are
    (nearly) zero, as zero-initialised branches are.

    Args:
        model: the model.
        seed: of the draw.
        bias: the size of biases; large ones leave a channel on one side of an activation, whatever its inputs are.
        turned: whether rows of the larger weights, drawn at random, change their sign: behind a sigmoid a channel may
            else stay on one side in every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    values = Values()
    small = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    with preserved(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = None  # put back by preserved; a gradient would pin the type
        try:
            for name, buffer in model.named_buffers():
                if not buffer.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    buffer.copy_(uniform(buffer, generator))
                elif name.endswith("running_mean"):
                    buffer.copy_(normal(buffer, generator) * 0.2)
            for parameter in model.parameters():
                data = parameter.data
                if not parameter.is_floating_point() or not data.numel():
                    continue
                if parameter.ndim <= 1 or data.numel() == max(data.shape):
                    sign = uniform(data, generator) * torch.where(normal(data, generator) > -1.0, 1.0, -1.0)
                    values.put(parameter, (sign * bias if id(parameter) in small else sign).to(data.dtype))
                elif max(-float(data.min()), float(data.max())) < 1e-3:
                    values.put(parameter, normal(data, generator) / max(data[0].numel(), 1) ** 0.5)
                elif turned:
                    rows = data.new_ones((len(data),) + (1,) * (data.ndim - 1))
                    values.put(parameter, data * normal(rows, generator).sign())
            model.eval()
            yield
        finally:
            values.restore()


def uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw numbers between 0.5 and 1.5, of a tensor's shape, type and device."""
    return (torch.rand(like.shape, generator=generator) + 0.5).to(like)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers, of a tensor's shape, type and device."""
    return torch.randn(like.shape, generator=generator).to(like)


def random_inputs(inputs: Any, seed: int = 0) -> Any:
    """Put random normal tensors in the place of floating ones, each with a seed of its own; leave everything else.

    Example:
        >>> left, right = random_inputs({"left": torch.zeros(2), "right": torch.zeros(2)}).values()
        >>> bool((left == right).any())
        False
    """
    seeds = itertools.count(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return normal(tensor, torch.Generator().manual_seed(next(seeds)))

    return map_tensors(drawn, inputs)


def double_inputs(inputs: Any) -> Any:
    """Turn the floating tensors of nested inputs to double precision."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, inputs)


@contextmanager
def in_double(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Turn all floating parameters and buffers to double precision; call inside :func:`randomised`.

    Yields:
        by the id of a parameter, what its data is a copy of.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    originals = [(t, t.data) for t in tensors]
    own = {id(p) for p in model.parameters()}
    try:
        for tensor, data in originals:
            tensor.data = data.to(torch.float64, copy=True)
        yield {id(tensor): data for tensor, data in originals if id(tensor) in own}
    finally:
        for tensor, data in originals:
            tensor.data = data


def derangement(count: int, generator: torch.Generator) -> list[int]:
    """Draw a permutation without fixed points: a random cycle through all units."""
    order = torch.randperm(count, generator=generator).tolist()
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


@contextmanager
def exchanged(targets: Mapping[Group, Sequence[int]], values: Values | None = None) -> Iterator[None]:
    """Move unit ``u`` of each group to unit ``targets[group][u]``'s places, in every tensor at once.

    Args:
        targets: the places.
        values: what replaces the data of tensors.

    Raises:
        GroupError: if the units of a group are not made up alike.
    """
    values = Values() if values is None else values
    try:
        for group, target in targets.items():
            goal = torch.tensor(target)
            for part in group.slices():
                units = torch.from_numpy(part.units)
                own = (units >= 0).nonzero().flatten()
                places = own[units[own].argsort(stable=True)]
                if len(places) % len(goal) or bool(
                    (units[places].view(len(goal), -1) != torch.arange(len(goal))[:, None]).any()
                ):
                    raise GroupError(f"its units take different numbers of positions in {part.attr}")
                places = places.view(len(goal), -1)
                source = torch.arange(len(units))
                source[places[goal].flatten()] = places.flatten()
                tensor = part.tensor
                values.put(tensor, tensor.data.index_select(part.dim, source.to(tensor.device)))
        yield
    finally:
        values.restore()


@contextmanager
def masked(
    chosen: Mapping[Group, Sequence[int]], producers_only: bool = False, values: Values | None = None
) -> Iterator[None]:
    """Zero every position of the chosen units, in all parameters, and in all weights that are computed from some."""
    values = Values() if values is None else values
    with ExitStack() as stack:
        stack.callback(values.restore)
        for group, units in chosen.items():
            gone = torch.tensor(sorted(units))
            for part in group.plain_slices():
                if not part.is_weight or (producers_only and part.reads):
                    continue
                index = torch.isin(torch.from_numpy(part.units), gone).nonzero().flatten()
                if part.is_parameter:
                    values.zero(part.tensor, part.dim, index)
                else:
                    weight = weight_of_layer(part.owner, part.attr)
                    assert weight is not None
                    stack.enter_context(weight.seen_as(_zeroed(part.dim, index)))
        yield


def _zeroed(dim: int, index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(dim, index.to(tensor.device), 0.0)


class NormsOfTheRest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, operators that take all channels together (norms, means, softmaxes) leave the chosen units out.

    Args:
        graph: the graph; the positions are computed here, before anything is removed.
        chosen: the units that are treated as removed.
        before: how often operators of the model ran before, if only a part of it runs.

    Raises:
        GroupError: if a group norm would not lose as many channels in each of its groups.
    """

    def __init__(
        self, graph: AxisGraph, chosen: Mapping[Group, Sequence[int]], before: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter(before)
        self.kept: dict[tuple[str, int], dict[int, Tensor]] = {}
        gone = {group.leaf.root(): units for group, units in chosen.items()}
        for key in graph.index.mixing(gone):
            dims = graph.trace.mixing[key]
            self.kept[key] = {dim: index for dim, axis in dims if (index := _kept(axis, gone)) is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        kept = self.kept.get((name, self.counts[name]))
        self.counts[name] += 1
        if kept is None:
            return func(*args, **(kwargs or {}))
        return _of_the_rest(func, name, args, kwargs or {}, kept)


def _kept(axis: Axis, chosen: Mapping[Atom, Sequence[int]]) -> Tensor | None:
    """Return the positions that stay, or None if all do."""
    stay: Tensor | None = None
    for leaf in dict.fromkeys(leaves(axis)):
        if leaf in chosen:
            mine = ~torch.isin(torch.from_numpy(labels(axis, leaf)), torch.tensor(sorted(chosen[leaf])))
            stay = mine if stay is None else stay & mine
    return None if stay is None else stay.nonzero().flatten()


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _spread(small: Tensor, like: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Put ``small`` in its places of a tensor shaped as ``like``, with zeros elsewhere."""
    for dim, index in kept.items():
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy(dim, index.to(small.device), small)
    return small


def _of_the_rest(func: Any, name: str, args: Any, kwargs: Any, kept: dict[int, Tensor]) -> Any:
    x, rest = args[0], list(args[1:])
    small = _select(x, kept)
    if name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        first = x.ndim - len(rest[0])
        rest[0] = list(small.shape[first:])
        inner = {dim - first: index for dim, index in kept.items()}
        rest = [_select(r, inner) if isinstance(r, Tensor) else r for r in rest]
    elif name == "native_group_norm":
        groups = kept[1] // (x.shape[1] // rest[5])
        counts = torch.bincount(groups)
        counts = counts[counts > 0]
        if len(set(counts.tolist())) > 1:
            raise GroupError("its units are not spread evenly over the groups of a group norm")
        rest[:2] = [_select(r, {0: kept[1]}) if isinstance(r, Tensor) else r for r in rest[:2]]
        rest[3], rest[5] = small.shape[1], len(counts)
    elif name in LOSSES:
        rest[0] = _select(rest[0], kept)
    out = func(small, *rest, **kwargs)
    if name in ("native_layer_norm", "_fused_rms_norm", "native_group_norm", "rms_norm") or "batch_norm" in name:
        if isinstance(out, Tensor):
            return _spread(out, x, kept)
        return (_spread(out[0], x, kept), *out[1:])
    if "softmax" in name:
        return _spread(out, x, kept)
    return out


class SharedNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, all random numbers that one operator draws are the same, and nothing is dropped at random.

    So a forward pass that draws noise for every unit (a reparameterisation, dropout that is on in eval mode) is the
    same function, whatever the order of the units is and however many there are. Permutations and whole numbers are
    drawn as ever, always the same; so is what comes of a generator of the model's own.

    Example:
        >>> with SharedNoise():
        ...     noise = torch.randn_like(torch.zeros(3))
        >>> len(noise.unique())
        1
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = 0
        # without an accelerator, torch.manual_seed queues the seed for one that may come, with a stack trace
        self.seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)  # what has a generator of its own may be a constant of the model
        self.draws += 1
        self.seed(self.draws)  # what was drawn before may have been of another shape
        name = func._schema.name.split("::")[1]
        x: Any = args[0] if args else None
        if name == "native_dropout":
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        if name == "bernoulli_":
            return x.fill_(1.0)
        if name.startswith("bernoulli") and isinstance(x, Tensor):
            return torch.ones_like(x) if len(args) > 1 else (x > 0.5).to(x)
        if name == "normal":
            one, mean, std = torch.randn(()), x, args[1] if len(args) > 1 else kwargs.get("std", 1.0)
            return func(*args, **kwargs).zero_() + mean + std * one.item()
        if name not in _DRAWN:
            return func(*args, **kwargs)
        # one number by itself: the first of many depends on how many there are
        if isinstance(x, Tensor):
            one = func(x.new_empty(1), *args[1:], **kwargs)
            return x.copy_(one.expand_as(x)) if name.endswith("_") else one.expand_as(x).clone()
        one = func([1], *args[1:], **kwargs)
        return func(*args, **kwargs).copy_(one[0])


_DRAWN = frozenset(
    {
        "rand", "randn", "rand_like", "randn_like", "normal_", "uniform_", "log_normal_", "exponential_",
        "cauchy_", "geometric_",
    }
)  # fmt: skip
