"""A host for the loop that removes units physically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from singe_plugin.axes import Block, Group, Snapshot, Trackers, remove_block, remove_units
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.costs import ALL, KINDS, LATENCY, CostModel, TensorCost, count_params
from singe_plugin.loop.events import Repaired
from singe_plugin.loop.survivors import Unpruned

from .graph import AxisDependencyGraph, BlockView, GroupView
from .meter import Meter
from .scorers import Ranking

__all__ = ["TorchPruningHost", "block_of", "channels_per_unit"]


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
    """Layers, scores, removal and cost, for :mod:`singe_plugin.loop.loop`.

    Args:
        graph: the dependency graph.
        groups: the names of its groups that may be pruned, in forward order.
        trackers: optimizers and EMA copies to cut along.
        meter: counts what targets are of.
        ranking: what scores the groups.
        max_ratio: the largest fraction of a layer's units that may go.
        min_width: how many units of a layer stay at least.
        unpruned: the network before pruning, if the survivors take over; or None.
    """

    def __init__(
        self,
        graph: AxisDependencyGraph,
        groups: Sequence[str],
        trackers: Trackers,
        meter: Meter,
        ranking: Ranking,
        max_ratio: float = 1.0,
        min_width: int = 1,
        unpruned: Unpruned | None = None,
    ) -> None:
        self.graph, self.trackers, self.meter, self.ranking = graph, trackers, meter, ranking
        self.max_ratio, self.min_width, self.unpruned = max_ratio, min_width, unpruned
        self.model: nn.Module = graph.model
        self._names = list(groups)
        self._agreed: dict[str, int] = {}  # how many units of layers go in this turn

    @property
    def _groups(self) -> dict[str, Group]:
        """Those that are there: some may have gone with the block that they were in."""
        there = self.graph.axis_graph.groups
        return {name: there[name] for name in self._names if name in there}

    @property
    def _blocks(self) -> dict[str, Block]:
        return self.graph.axis_graph.blocks

    def layers(self) -> list[GroupSpec]:
        """The groups, and behind them the residual blocks, if these may go."""
        blocks = self._blocks
        inside = {n: b for n, g in self._groups.items() for b, block in blocks.items() if block.holds(g.writers)}
        return [
            GroupSpec(
                name,
                group.size,
                block_of(name),
                channels_per_unit(group),
                self.max_ratio,
                max(self.min_width, group.least),
                group.multiple,
                inside.get(name),
            )
            for name, group in self._groups.items()
        ] + [GroupSpec(name, 1, name, min_units=0) for name in blocks]

    def score(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """One score per unit of some layers, from any torch-pruning importance.

        Raises:
            ScoringError: if one of torch-pruning's importances fails, or any gives something else than a score per
                channel.
        """
        groups, blocks = self._groups, self._blocks
        return self.ranking.scores(
            {n: BlockView(self.graph, blocks[n]) if n in blocks else GroupView(self.graph, groups[n]) for n in layers}
        )

    def allowed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How many units of layers may go together: less where the model would go another way without them."""
        found = self._together(counts)
        self._agreed = dict(found)
        return found

    def _together(self, counts: Mapping[str, int]) -> dict[str, int]:
        groups = self._groups
        found = self.graph.axis_graph.allowed({groups[name]: count for name, count in counts.items() if name in groups})
        return {**counts, **{group.name: count for group, count in found.items()}}

    def remove(self, layer: str, units: Sequence[int]) -> None:
        """Remove units; as many as :meth:`allowed` gave together with others, or as many as may go alone."""
        if layer in self._blocks:
            self.graph.remove_block(self._blocks[layer], self.trackers)
        else:
            settled = self._agreed.pop(layer, 0) == len(units)
            self.graph.remove(self._groups[layer], units, self.trackers, settled=settled)
        if self.unpruned is not None:
            self.unpruned.removed()

    def repair(self, last: bool) -> Repaired | None:
        return None if self.unpruned is None else self.unpruned.repair(last, self.trackers.ema_models())

    def params(self) -> int:
        return count_params(self.model)

    def sizes(self, *kinds: str) -> dict[str, Any]:
        """The units of the prunable layers, and what some kinds of targets count."""
        found = {kind: self._measured(kind) for kind in kinds}
        return found | {"units": sum(group.size for group in self._groups.values())}

    def _measured(self, kind: str) -> float:
        return self.meter.measure(kind, self.costs)

    def begin(self) -> None:
        """Before the first removal: see what latency depends on, and what there is of all that is met together."""
        self.meter.begin(self.graph.axis_graph, self._groups, self.layers(), self.costs)

    def costs(self, kind: str = "macs") -> CostModel:
        """What removals cost.

        Args:
            kind: what is to be predicted; MACs are not counted for one that does not ask for them.
        """
        links: dict[int, list[tuple[int, str, float]]] = {}
        for name, group in self._groups.items():
            for part in group.slices():
                if part.is_parameter:
                    per_unit = int((part.units >= 0).sum()) / group.size
                    links.setdefault(id(part.tensor), []).append((part.dim, name, per_unit))
        kinds = [goal.kind for goal in self.meter.goals] if kind == ALL else [kind]
        by_module = self.meter.counted.by_module if any(KINDS[one].of_macs for one in kinds) else {}
        block_of_module = {m: name for name, block in self._blocks.items() for m in block.modules}
        rest = {name: float(by_module.get(name, 0)) for name in self._blocks}  # what no matrix accounts for
        tensors, fixed, seen = [], 0, set()
        for module_name, module in self.model.named_modules():
            macs = _macs_of(module_name, module, by_module)
            block = block_of_module.get(module)
            for attr, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                found, shape = links.get(id(parameter), []), tuple(parameter.shape)
                if block is not None:  # nothing of it is left when all its positions along a dimension are gone
                    shape = shape or (1,)
                    found = [*found, (0, block, float(shape[0]))]
                    rest[block] -= macs.get(attr, 0.0)
                if not found:
                    fixed += parameter.numel()
                    continue
                tensors.append(TensorCost(shape, tuple(found), macs.get(attr, 0.0)))
        tensors += [TensorCost((1.0,), ((0, n, 1.0),), more, False) for n, more in rest.items() if more > 0]
        times = self.meter.times(links, block_of_module) if LATENCY in kinds else ()
        return CostModel(tuple(tensors), fixed, by_module.get("", 0), times, self.meter.goals if kind == ALL else ())

    def trial(self, plan: dict[str, int], kind: str) -> float:
        """What a kind of target counts after really removing that many (arbitrary) units; everything is put back."""
        undo = Snapshot(self.model, self.graph.axis_graph)
        try:
            axes, groups, blocks = self.graph.axis_graph, self._groups, dict(self._blocks)
            for name, count in self._together(plan).items():
                if name in blocks and count:
                    remove_block(axes, blocks[name], undo=False)
                elif name in axes.groups:
                    remove_units(axes, groups[name], range(count), undo=False)
            return self._measured(kind)
        finally:
            undo.restore()


def _macs_of(name: str, module: nn.Module, by_module: Mapping[str, int]) -> dict[str, float]:
    """The MACs of a module alone, without its parts, by the matrices that it holds: of each as many per element.

    Those that a parametrization holds are multiplied by the layer.
    """
    layer, _, inside = name.rpartition(".parametrizations.")
    parts = [] if inside else [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
    own = by_module.get(layer or name, 0) - sum(by_module.get(part, 0) for part in parts)
    sizes = {attr: p.numel() for attr, p in module._parameters.items() if p is not None and p.ndim > 1}
    wide = {attr: size for attr, size in sizes.items() if size > max(module._parameters[attr].shape)}  # type: ignore[union-attr]
    sizes = wide or sizes  # else lengths of the rows of another one
    return {attr: own * size / sum(sizes.values()) for attr, size in sizes.items()}


def channels_per_unit(group: Group) -> int:
    """How many output channels of its first writer one unit is."""
    return len(group.unit_group().producers[0].rows) // group.size
