"""A host for Algorithm 1 that removes units physically."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.axes import Group, Snapshot, Trackers, remove_units
from singe_plugin.budget import CostModel, LayerSpec, TensorCost, count_macs, count_macs_by_module, count_params
from singe_plugin.errors import GroupError, ScoringError, SingeError
from singe_plugin.units import UnitGroup

from .graph import AxisDependencyGraph, AxisGroup

__all__ = ["TorchPruningHost", "block_of", "scores_per_unit"]


def block_of(name: str) -> str:
    """The block a layer belongs to: its path up to the last number of a parent, or its parent, or itself.

    Example:
        >>> block_of("layer1.0.conv1"), block_of("layer1.0.downsample.1"), block_of("features.3"), block_of("conv1")
        ('layer1.0', 'layer1.0', 'features', 'conv1')
    """
    parents = name.split(".")[:-1]
    for end in range(len(parents), 0, -1):
        if parents[end - 1].isdigit():
            return ".".join(parents[:end])
    return ".".join(parents) or name


class TorchPruningHost:
    """Layers, slices, removal and cost, for :func:`singe_plugin.algorithm.prune_layers`.

    Args:
        graph: the dependency graph.
        groups: the names of its groups that may be pruned, in forward order.
        trackers: optimizers and EMA copies to cut along.
        example_inputs: for counting MACs.
        max_ratio: the largest fraction of a layer's units that may go.
        min_width: how many units of a layer stay at least.
    """

    def __init__(
        self,
        graph: AxisDependencyGraph,
        groups: Sequence[str],
        trackers: Trackers,
        example_inputs: Any,
        max_ratio: float = 1.0,
        min_width: int = 1,
    ) -> None:
        self.graph, self.trackers, self.example_inputs = graph, trackers, example_inputs
        self.max_ratio, self.min_width = max_ratio, min_width
        self.model: nn.Module = graph.model
        self._groups: dict[str, Group] = {name: graph.axis_graph.groups[name] for name in groups}

    def layers(self) -> list[LayerSpec]:
        return [
            LayerSpec(
                name,
                group.size,
                block_of(name),
                channels_per_unit(group),
                self.max_ratio,
                max(self.min_width, group.least),
            )
            for name, group in self._groups.items()
        ]

    def units(self, layer: str) -> UnitGroup:
        return self._groups[layer].unit_group()

    def remove(self, layer: str, units: Sequence[int]) -> None:
        self.graph.remove(self._groups[layer], units, self.trackers)

    def costs(self) -> CostModel:
        links: dict[int, list[tuple[int, str, float]]] = {}
        for name, group in self._groups.items():
            for part in group.slices():
                if part.is_parameter:
                    per_unit = int((part.units >= 0).sum()) / group.size
                    links.setdefault(id(part.tensor), []).append((part.dim, name, per_unit))
        by_module = count_macs_by_module(self.model, self.example_inputs)
        tensors, fixed, seen = [], 0, set()
        for module_name, module in self.model.named_modules():
            for attr, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                found = links.get(id(parameter))
                if not found:
                    fixed += parameter.numel()
                    continue
                macs = by_module.get(module_name, 0) if attr == "weight" else 0
                tensors.append(TensorCost(tuple(parameter.shape), tuple(found), float(macs)))
        return CostModel(tuple(tensors), fixed, by_module[""])

    def trial(self, plan: dict[str, int]) -> dict[str, int]:
        """Parameters and MACs after really removing that many (arbitrary) units; everything is put back."""
        undo = Snapshot(self.model, self.graph.axis_graph)
        try:
            for name, count in plan.items():
                remove_units(self.graph.axis_graph, self._groups[name], range(count))
            return {"params": count_params(self.model), "macs": count_macs(self.model, self.example_inputs)}
        finally:
            undo.restore()

    def score(self, layer: str, importance: Any) -> Tensor | None:
        """One score per unit from any torch-pruning importance.

        Raises:
            ScoringError: if one of torch-pruning's importances fails, or any gives something else than a score per
                channel.
        """
        group = AxisGroup(self.graph, self._groups[layer])
        by_unit = getattr(importance, "score_units", None)
        if by_unit is not None:
            return by_unit(group, None)  # type: ignore[no-any-return]
        try:
            scores = importance(group)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            theirs = type(importance).__module__.split(".")[0] == "torch_pruning"  # a user's own error passes as it is
            if not theirs or isinstance(error, (SingeError, torch.cuda.OutOfMemoryError)):
                raise
            raise ScoringError(
                f"layer {layer!r}: {type(importance).__name__} failed with {type(error).__name__}: {error}; use "
                "another importance or put the layer in ignored_layers"
            ) from error
        return scores_per_unit(group, importance, scores)


def scores_per_unit(group: AxisGroup, importance: Any, scores: Any) -> Tensor:
    """What an importance returned for a group's channels, as one score per unit.

    Raises:
        GroupError: if it gives no score for this group.
        ScoringError: if it gives something else than one per channel.
    """
    name = group.axis_group.name
    if scores is None:
        raise GroupError(
            f"layer {name!r}: {type(importance).__name__} gives no score for this group (it ignores its layers); "
            "use another importance or put the layer in ignored_layers"
        )
    lengths = {len(item.idxs) for item in group.items}
    if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) not in lengths:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ScoringError(
            f"layer {name!r} has {len(group[0].idxs)} channels, but {type(importance).__name__} returned {got}; an "
            "importance gives one score per channel"
        )
    return group.per_unit(scores)


def channels_per_unit(group: Group) -> int:
    """How many output channels of its first writer one unit is."""
    return len(group.unit_group().producers[0].rows) // group.size
