"""How many units go from each layer: in all, or in one of several rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from singe_plugin.algorithm import Progress
from singe_plugin.budget import LayerSpec, Target, count_macs, count_params, plan_removals
from singe_plugin.errors import BudgetError

from .host import TorchPruningHost

__all__ = ["Rounds", "counts_for", "sizes"]

Counts = dict[str, int]
Scores = Mapping[str, Tensor]


def sizes(host: TorchPruningHost) -> dict[str, int]:
    """The model's parameters and MACs, and the units of its prunable layers."""
    return {
        "params": count_params(host.model),
        "macs": count_macs(host.model, host.example_inputs),
        "units": sum(spec.units for spec in host.layers()),
    }


def counts_for(
    host: TorchPruningHost,
    target: Target,
    ratios: str | Mapping[str, float],
    round_to: int | None = None,
    scores: Scores | None = None,
    specs: list[LayerSpec] | None = None,
    point: float = 0.01,
) -> Counts:
    """How many units to remove from each layer; units are really removed to see what is reached, and put back.

    Args:
        host: the layers and their cost.
        target: the fraction of what is there now.
        ratios, round_to, scores: see :func:`~singe_plugin.budget.plan_removals`.
        specs: the layers, if their largest ratios are not the host's.
        point: how far off is still met; a point of the whole model is more of what is left of it.

    Raises:
        BudgetError: if the target cannot be met within one point, with the nearest that can.
    """
    specs, costs, aim, nearest = specs or host.layers(), host.costs(), None, math.inf
    before = sizes(host)
    for _ in range(6):
        counts = plan_removals(specs, costs, target, ratios, round_to, scores, aim=aim, point=point)
        reached = 1 - host.trial(counts)[target.kind] / before[target.kind]
        nearest = min(nearest, reached, key=lambda r: abs(r - target.fraction))
        if abs(reached - target.fraction) <= point:
            return counts
        aim = (target.fraction if aim is None else aim) + target.fraction - reached
        if not 0 < aim < 1:
            break
    raise BudgetError(
        f"target {target.kind}={target.fraction:g} cannot be met within one point: the nearest that was reached is "
        f"{target.kind}={nearest:.4f}; choose that, or relax round_to and max_pruning_ratio"
    )


class Rounds:
    r"""What goes in a round: the :data:`~singe_plugin.rounds.Allocation` of a model whose units are removed.

    With fixed ratios every layer goes its own way to the goal. With ratios by score the units of all layers are
    ranked again in every round, and as many go as the target T and the share s of the way say: of what is left,

    .. math:: 1-\frac{1-Ts}{1-r}

    where r is the fraction that is gone already.

    Args:
        host: the layers and their cost.
        progress: what is removed; keeps the goal and the sizes before the first round, for a resumed run.
        target, pruning_ratio: what goes in all; without a target, a ratio of the units.
        ratios: ``"global"`` or ``"per_cost"``, if there is no goal.
        round_to: channels kept are a multiple of this.
    """

    def __init__(
        self,
        host: TorchPruningHost,
        progress: Progress,
        target: Target | None,
        pruning_ratio: float,
        ratios: str | Mapping[Any, float],
        round_to: int | None,
    ) -> None:
        self.host, self.progress, self.target = host, progress, target
        self.pruning_ratio, self.ratios, self.round_to = pruning_ratio, str(ratios), round_to

    def __call__(self, scores: Scores, share: float) -> Counts:
        removed = self.progress.plan
        if self.progress.goal:
            return {name: round(count * share) - removed.get(name, 0) for name, count in self.progress.goal.items()}
        specs, now, first = [self._spec(spec) for spec in self.host.layers()], sizes(self.host), self.progress.before
        if self.target is None:
            ratio = 1 - (1 - self.pruning_ratio * share) * first["units"] / now["units"]
            return plan_removals(specs, self.host.costs(), None, self.ratios, self.round_to, scores, max(ratio, 0.0))
        kind = self.target.kind
        fraction = 1 - (1 - self.target.fraction * share) * first[kind] / now[kind]
        if fraction <= 0 or (share < 1 and self._too_near(specs, self.target.fraction * (1 - share) * first[kind])):
            return {}
        left, reached = Target(kind, fraction), 1 - now[kind] / first[kind]
        points = [0.01]
        if share == 1 and reached:
            points.append(0.01 * first[kind] / now[kind])  # if not close to what is left to go, then to the whole
        for point in points:
            try:
                return counts_for(self.host, left, self.ratios, self.round_to, scores, specs, point)
            except BudgetError as error:
                failure = error
        if share < 1:
            return {}  # too small a step for whole units; a later round makes up for it
        if not reached:
            raise failure
        if abs(reached - self.target.fraction) <= 0.01:
            return {}
        raise BudgetError(
            f"target {kind}={self.target.fraction:g} cannot be met within one point: {kind}={reached:.4f} is reached, "
            "and no whole units of what is left lead closer; choose that, prune more layers, or relax round_to and "
            "max_pruning_ratio"
        ) from failure

    def _too_near(self, specs: list[LayerSpec], left: float) -> bool:
        """Whether so little would be left to go that the last round could not choose: less than a few small units.

        Where units are a good part of the model, one unit too many or too few may miss the target.
        """
        assert self.target is not None
        costs, kind = self.host.costs(), self.target.kind
        whole = costs.cost(kind, {})
        units = [whole - costs.cost(kind, {spec.name: 1}) for spec in specs if spec.units > 1]
        return left < 6 * min(units, default=0.0)

    def _spec(self, spec: LayerSpec) -> LayerSpec:
        """The layer with its largest ratio in terms of the units that it has now."""
        first = spec.units + self.progress.plan.get(spec.name, 0)
        return replace(spec, max_ratio=max(0.0, 1 - (1 - spec.max_ratio) * first / spec.units))
