"""Parameters and MACs: counted, and predicted for the network that is left.

One MAC is one multiply-add; ``torch.utils.flop_counter`` counts two operations for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from singe_plugin.errors import ConfigError
from singe_plugin.loop.times import LayerTime
from singe_plugin.nested import call_model
from singe_plugin.state import plain_layers, preserved

__all__ = [
    "ALL", "KINDS", "LATENCY", "POINT", "CostModel", "Counted", "Goal", "Kind", "TensorCost", "all_of", "check_kind",
    "count_macs", "count_macs_by_module", "count_params", "own_costs", "structure_of",
]  # fmt: skip


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# PyTorch counts what CUDA runs for attention, but not what a CPU does
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}

POINT = 0.01
LATENCY, ALL = "latency", "all"  # the second is that of several targets that are met together
_SETTINGS = (bool, int, float, str, tuple)


def count_params(model: nn.Module) -> int:
    """The number of parameters; a shared one counts once.

    Example:
        >>> count_params(torch.nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters())


def count_macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of one forward pass, per module (nested modules count in their parents too); ``""`` is the whole model.

    Counted with ``torch.utils.flop_counter`` in eval mode, for the batch that is given.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with preserved(model), plain_layers(model), torch.no_grad(), counter:
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # the counter asks for the gradient function of what wants a gradient
        model.eval()
        call_model(model, example_inputs)
    root = type(model).__name__
    counts: dict[str, int] = {}
    for name, operations in counter.get_flop_counts().items():
        total = sum(int(v) for v in operations.values()) // 2
        if name == "Global":
            counts[""] = total
        elif name.startswith(f"{root}."):
            counts[name[len(root) + 1 :]] = total
    counts.setdefault("", 0)
    return counts


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-adds of one forward pass over ``example_inputs`` (the whole batch).

    Example:
        >>> count_macs(torch.nn.Linear(3, 2), torch.zeros(1, 3))
        6
    """
    return count_macs_by_module(model, example_inputs)[""]


def own_costs(model: nn.Module, by_module: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The parameters and MACs of every module alone, without those of the modules in it.

    Args:
        model: the model; a shared parameter counts where it is met first, and what a parametrization holds counts for
            the layer.
        by_module: as :func:`count_macs_by_module` counts.

    Returns:
        module -> its parameters and its MACs, of those that have any, in the order of the model; ``""`` is what the
        model does itself.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> own_costs(net, count_macs_by_module(net, torch.zeros(1, 3)))
        {'0': (8, 6)}
    """
    found: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        layer, inside, _ = name.rpartition(".parametrizations.")
        owner, params, macs = (layer if inside else name), 0, 0
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                params += parameter.numel()
        if not inside:
            parts = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
            macs = max(by_module.get(name, 0) - sum(by_module.get(part, 0) for part in parts), 0)
        before = found.get(owner, (0, 0))
        found[owner] = before[0] + params, before[1] + macs
    return {name: costs for name, costs in found.items() if any(costs)}


class Counted:
    """The MACs of a model while units go: every structure that it has is counted once.

    Args:
        model: the model, as it is whenever something is asked.
        example_inputs: what it is counted with.

    Example:
        >>> net = torch.nn.Linear(3, 2, bias=False)
        >>> counted = Counted(net, torch.zeros(1, 3))
        >>> first = counted.macs
        >>> net.weight.data = net.weight.data[:1]
        >>> first, counted.macs
        (6, 3)
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self._found: dict[tuple[Any, ...], dict[str, int]] = {}

    @property
    def by_module(self) -> dict[str, int]:
        """As :func:`count_macs_by_module` counts."""
        structure = structure_of(self.model)
        if structure not in self._found:
            self._found[structure] = count_macs_by_module(self.model, self.example_inputs)
        return self._found[structure]

    @property
    def macs(self) -> int:
        """As :func:`count_macs` counts."""
        return self.by_module[""]


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """The shapes of all tensors and the settings of all modules, on which depends what is counted."""
    found: list[Any] = []
    for name, module in model.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = tuple((attr, None if tensor is None else tuple(tensor.shape)) for attr, tensor in tensors)
        plain = tuple((k, repr(v)) for k, v in vars(module).items() if isinstance(v, _SETTINGS) and k != "training")
        found.append((name, type(module), shapes, plain))
    return tuple(found)


@dataclass(frozen=True)
class TensorCost:
    """A parameter whose size depends on what is removed.

    Attributes:
        shape: its shape now.
        links: ``(dimension, layer, positions that go with each unit)``.
        macs: multiply-adds that scale with its number of elements.
        is_parameter: whether its elements are parameters; if not, it stands for multiply-adds alone.
    """

    shape: tuple[float, ...]
    links: tuple[tuple[int, str, float], ...] = ()
    macs: float = 0.0
    is_parameter: bool = True

    def left(self, removed: Mapping[str, int]) -> tuple[float, ...]:
        """Its shape after ``removed[layer]`` units are gone."""
        sizes = [float(s) for s in self.shape]
        for dim, layer, per_unit in self.links:
            sizes[dim] -= per_unit * removed.get(layer, 0)
        return tuple(max(s, 0.0) for s in sizes)

    def elements(self, removed: Mapping[str, int]) -> float:
        """Its number of elements after ``removed[layer]`` units are gone."""
        return math.prod(self.left(removed))


@dataclass(frozen=True)
class Goal:
    """One of several targets that are met together.

    Attributes:
        kind: what it counts.
        fraction: of it is to go.
        whole: what the unpruned network has.
    """

    kind: str
    fraction: float
    whole: float


def all_of(goals: Sequence[Goal], costs: Sequence[float]) -> float:
    r"""What several targets come to as one, of which the largest fraction F is to go:

    .. math:: 1 - F\,\min_k\frac{1 - c_k/c_k^0}{f_k}

    which has lost F when all targets are met, and one of them exactly.

    Example:
        >>> both = [Goal("params", 0.5, 100), Goal("macs", 0.25, 1000)]
        >>> all_of(both, [100, 1000]), all_of(both, [40, 750]), all_of(both, [75, 500])
        (1.0, 0.5, 0.75)
    """
    most = max(goal.fraction for goal in goals)
    shares = [(1 - cost / goal.whole) / goal.fraction for goal, cost in zip(goals, costs, strict=True)]
    return 1 - most * min(shares)


@dataclass(frozen=True)
class CostModel:
    """Predicts parameters, MACs and latency of the pruned network from the number of units removed per layer.

    Parameters are exact; MACs are those of convolutions and linear layers scaled exactly, the rest constant; latency is
    what a table of measured layers says.
    """

    tensors: tuple[TensorCost, ...]
    fixed_params: int = 0
    total_macs: float = 0
    times: tuple[LayerTime, ...] = ()
    goals: tuple[Goal, ...] = ()
    _base: dict[str, float] = field(default_factory=dict, compare=False)

    def after(self, removed: Mapping[str, int]) -> CostModel:
        """The model of what is left after some removals: it counts further ones on top of these."""
        left = []
        for tensor in self.tensors:
            share = tensor.elements(removed) / max(math.prod(tensor.shape), 1e-12) if tensor.macs else 0.0
            left.append(TensorCost(tensor.left(removed), tensor.links, tensor.macs * share, tensor.is_parameter))
        times = tuple(layer.after(removed) for layer in self.times)
        return CostModel(tuple(left), self.fixed_params, self.macs(removed), times, self.goals)

    def params(self, removed: Mapping[str, int]) -> float:
        """The parameters after the removals."""
        return self.fixed_params + sum(t.elements(removed) for t in self.tensors if t.is_parameter)

    def macs(self, removed: Mapping[str, int]) -> float:
        """The multiply-adds after the removals."""
        moving = sum(t.macs for t in self.tensors)
        left = sum(t.macs * t.elements(removed) / math.prod(t.shape) for t in self.tensors if t.macs)
        return self.total_macs - moving + left

    def latency(self, removed: Mapping[str, int]) -> float:
        """The milliseconds after the removals."""
        return sum(layer.ms(removed) for layer in self.times)

    def together(self, removed: Mapping[str, int]) -> float:
        """What several targets come to after the removals, see :func:`all_of`."""
        return all_of(self.goals, [self.cost(goal.kind, removed) for goal in self.goals])

    def cost(self, kind: str, removed: Mapping[str, int]) -> float:
        """What a target of some kind counts, after the removals."""
        if kind == ALL:
            return self.together(removed)
        check_kind(kind)
        return KINDS[kind].predict(self, removed)

    def unit_cost(self, kind: str, layer: str) -> float:
        """What one unit of a layer costs now; of several targets, the sum of its shares in each."""
        if kind == ALL:
            return sum(self.unit_cost(g.kind, layer) / (g.fraction * g.whole) for g in self.goals)
        return max(self.cost(kind, {}) - self.cost(kind, {layer: 1}), KINDS[kind].least)

    def removed_fraction(self, kind: str, removed: Mapping[str, int]) -> float:
        """The fraction of what is counted that goes."""
        if kind not in self._base:
            self._base[kind] = self.cost(kind, {})
        return 1 - self.cost(kind, removed) / max(self._base[kind], 1e-12)


@dataclass(frozen=True)
class Kind:
    """Something that can be counted, and so be a target.

    Attributes:
        measure: ``(model, example inputs) -> number``: what the model has; None for what needs more than these.
        predict: ``(cost model, units removed by layer) -> number``: what it would have. Where that is not exact, the
            plan is corrected by what is measured.
        of_macs: whether ``predict`` asks for MACs; if not, the cost model need not know them.
        least: what a unit costs at least.
        point: how far off a target is still met, as a fraction of the whole.
    """

    measure: Callable[[nn.Module, Any], float] | None
    predict: Callable[[CostModel, Mapping[str, int]], float]
    of_macs: bool = True
    least: float = 1.0
    point: float = POINT


KINDS = {
    "params": Kind(lambda model, _: count_params(model), CostModel.params, of_macs=False),
    "macs": Kind(count_macs, CostModel.macs),
    LATENCY: Kind(None, CostModel.latency, of_macs=False, least=1e-9, point=3 * POINT),
}
"""Name -> what is counted; one MAC is one multiply-add, and latency is in milliseconds."""


def check_kind(kind: object) -> None:
    """Raise :class:`ConfigError` for something that is not counted."""
    if kind not in KINDS:
        raise ConfigError(
            f"{kind!r} is not a target kind: what can be counted, and so be a target, is params, macs and latency (one "
            "MAC is one multiply-add, two FLOPs); give e.g. 'params=0.5', 'macs=0.5' or 'latency=0.3'"
        )
