"""A host for Algorithm 1 that removes channels physically, through torch-pruning's dependency graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.budget import CostModel, LayerSpec, TensorCost, count_macs, count_macs_by_module, count_params
from singe_plugin.errors import GroupError, ScoringError
from singe_plugin.units import UnitGroup

from .groups import aligned_units, unit_group, unit_slices
from .removal import Snapshot, Trackers, remove_channels

__all__ = ["PrunableLayer", "TorchPruningHost", "block_of"]


@dataclass
class PrunableLayer:
    """A verified group: its root, and how many channels make up one unit."""

    name: str
    root: nn.Module
    pruning_fn: Any
    channel_groups: int
    block: str


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
        layers: the verified groups, in forward order.
        trackers: optimizers and EMA copies to cut along.
        example_inputs: for counting MACs.
        max_ratio: the largest fraction of a layer's units that may go.
    """

    def __init__(
        self,
        graph: Any,
        layers: Sequence[PrunableLayer],
        trackers: Trackers,
        example_inputs: Any,
        max_ratio: float = 1.0,
    ) -> None:
        self.graph, self.trackers, self.example_inputs, self.max_ratio = graph, trackers, example_inputs, max_ratio
        self.model: nn.Module = graph.model
        self._layers = {layer.name: layer for layer in layers}

    def full_group(self, layer: str) -> tuple[Any, list[list[int]]]:
        """The group over all remaining channels of a layer's root, and the root channels of each unit."""
        entry = self._layers[layer]
        is_out = self.graph.is_out_channel_pruning_fn(entry.pruning_fn)
        count = self.graph.get_out_channels(entry.root) if is_out else self.graph.get_in_channels(entry.root)
        group = self.graph.get_pruning_group(entry.root, entry.pruning_fn, list(range(count)))
        return group, aligned_units(count, entry.channel_groups)

    def layers(self) -> list[LayerSpec]:
        specs = []
        for name, entry in self._layers.items():
            _, units = self.full_group(name)
            specs.append(LayerSpec(name, len(units), entry.block, entry.channel_groups, self.max_ratio))
        return specs

    def units(self, layer: str) -> UnitGroup:
        group, units = self.full_group(layer)
        return unit_group(group, units)

    def remove(self, layer: str, units: Sequence[int]) -> None:
        entry = self._layers[layer]
        _, members = self.full_group(layer)
        channels = [channel for unit in units for channel in members[unit]]
        remove_channels(self.graph, entry.root, entry.pruning_fn, channels, self.trackers)

    def costs(self) -> CostModel:
        links: dict[tuple[nn.Module, str], list[tuple[int, str, float]]] = {}
        for name in self._layers:
            group, units = self.full_group(name)
            if len(units) == 1:
                continue  # nothing more can go, and torch-pruning mistakes some of these for depthwise
            for part in unit_slices(group, units):
                if part.attr in part.owner._parameters:
                    per_unit = len(part.positions) / len(units)
                    links.setdefault((part.owner, part.attr), []).append((part.dim, name, per_unit))
        by_module = count_macs_by_module(self.model, self.example_inputs)
        names = {module: name for name, module in self.model.named_modules()}
        tensors, fixed, seen = [], 0, set()
        for module in self.model.modules():
            for attr, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                found = links.get((module, attr))
                if not found:
                    fixed += parameter.numel()
                    continue
                macs = by_module.get(names[module], 0) if attr == "weight" else 0
                tensors.append(TensorCost(tuple(parameter.shape), tuple(found), float(macs)))
        return CostModel(tuple(tensors), fixed, by_module[""])

    def trial(self, plan: dict[str, int]) -> dict[str, int]:
        """Parameters and MACs after really removing that many (arbitrary) units; everything is put back."""
        undo = Snapshot(self.graph)
        keep, self.trackers = self.trackers, Trackers()
        try:
            for name, count in plan.items():
                if count:
                    self.remove(name, list(range(count)))
            return {"params": count_params(self.model), "macs": count_macs(self.model, self.example_inputs)}
        finally:
            undo.restore()
            self.trackers = keep

    def score(self, layer: str, importance: Any) -> Tensor | None:
        """One score per unit from any torch-pruning importance."""
        group, units = self.full_group(layer)
        by_unit = getattr(importance, "score_units", None)
        if by_unit is not None:
            return by_unit(group, units)  # type: ignore[no-any-return]
        scores = importance(group)
        if scores is None:
            raise GroupError(
                f"layer {layer!r}: {type(importance).__name__} gives no score for this group (it ignores its layers); "
                "use another importance or put the layer in ignored_layers"
            )
        channels = sum(len(members) for members in units)
        if not isinstance(scores, Tensor) or scores.shape != (channels,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(
                f"layer {layer!r} has {channels} channels, but {type(importance).__name__} returned {got}; an "
                "importance gives one score per channel"
            )
        averaged: Tensor = scores.reshape(-1, len(units)).mean(0)
        return averaged


def is_conv_or_linear(module: Any) -> bool:
    """Whether a module is a layer whose output channels can be removed."""
    return isinstance(module, (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR))
