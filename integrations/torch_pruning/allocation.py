"""How many units go from each layer: in all, or in one of several rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from singe_plugin.errors import BudgetError
from singe_plugin.loop.budget import GroupSpec, plan_removals
from singe_plugin.loop.costs import LATENCY, POINT, CostModel
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.target import Target, points
from singe_plugin.loop.widths import Widths

from .host import TorchPruningHost

__all__ = ["Rounds", "counts_for"]

Counts = dict[str, int]
Scores = Mapping[str, Tensor]


def counts_for(
    host: TorchPruningHost,
    target: Target,
    ratios: str | Mapping[str, float],
    widths: Widths,
    scores: Scores | None = None,
) -> Counts:
    """How many units to remove from each layer; units are really removed to see what is reached, and put back.

    Args:
        host: the layers and their cost.
        target: the fraction of what is there now.
        ratios, scores: see :func:`~singe_plugin.loop.budget.plan_removals`.
        widths: that the layers may have.

    Raises:
        BudgetError: if the target cannot be met, with the nearest that can.
    """
    before = host.sizes(target.kind)[target.kind]
    costs = host.costs(target.kind)
    return widths.plan(
        widths.of(host.layers()),
        lambda specs: _nearest(host, target, ratios, scores, specs, costs, before, target.point),
    )


def _nearest(
    host: TorchPruningHost,
    target: Target,
    ratios: str | Mapping[str, float],
    scores: Scores | None,
    specs: list[GroupSpec],
    costs: CostModel,
    before: float,
    point: float,
) -> Counts:
    """As :func:`counts_for`, given what the host says: within a point, or else the best that is within ``point``."""
    aim, near = target.fraction, min(POINT, point)
    tried: list[tuple[float, float, Counts]] = []  # how far off, what was reached, by what
    for _ in range(6):
        try:
            counts = plan_removals(specs, costs, target, ratios, scores, aim=aim, point=point)
        except BudgetError:
            if not tried:
                raise
            break
        reached = 1 - host.trial(counts, target.kind) / before
        tried.append((abs(reached - target.fraction), reached, counts))
        aim += target.fraction - reached
        if tried[-1][0] <= near or not 0 < aim < 1:
            break
    miss, reached, counts = min(tried, key=lambda one: one[0])
    if miss <= point:
        return counts
    raise BudgetError(
        f"target {target} cannot be met within {points(target)}: the nearest that was reached is "
        f"{target.said(reached)}; choose that, or relax round_to, max_pruning_ratio and min_width"
    )


class Rounds:
    r"""What goes in a round: the :data:`~singe_plugin.loop.loop.Allocation` of a model whose units are removed.

    With fixed ratios every layer goes its own way to the goal. With ratios by score the units of all layers are
    ranked again in every round, and as many go as the target T and the share s of the way say: of what is left,

    .. math:: 1-\frac{1-Ts}{1-r}

    where r is the fraction that is gone already.

    Args:
        host: the layers and their cost.
        progress: what is removed; keeps the goal and the sizes before the first round, for a resumed run.
        target, pruning_ratio: what goes in all; without a target, a ratio of the units.
        ratios: ``"global"`` or ``"per_cost"``, if there is no goal.
        widths: that the layers may have.
    """

    def __init__(
        self,
        host: TorchPruningHost,
        progress: Progress,
        target: Target | None,
        pruning_ratio: float,
        ratios: str | Mapping[Any, float],
        widths: Widths,
    ) -> None:
        self.host, self.progress, self.target = host, progress, target
        self.pruning_ratio, self.ratios, self.widths = pruning_ratio, str(ratios), widths

    def __call__(self, scores: Scores, share: float) -> Counts:
        removed = self.progress.plan
        if self.progress.goal:
            return {name: round(count * share) - removed.get(name, 0) for name, count in self.progress.goal.items()}
        specs, costs = self._now()
        first = self.progress.before
        now = self.host.sizes() if self.target is None else self.host.sizes(self.target.kind)
        if self.target is None:
            ratio = 1 - (1 - self.pruning_ratio * share) * first["units"] / now["units"]
            return plan_removals(specs, costs, None, self.ratios, scores, max(ratio, 0.0))
        kind, whole, near = self.target.kind, self.target.fraction, self.target.point
        reached, fraction = 1 - now[kind] / first[kind], 1 - (1 - whole * share) * first[kind] / now[kind]
        if fraction <= 0 or (share < 1 and whole * (1 - share) * first[kind] < few_units(specs, costs, kind)):
            return {}
        last = near * first[kind] / now[kind]  # a point of the whole, in terms of what is left
        point = near if share < 1 else last
        left = replace(self.target, fraction=fraction)
        end = replace(self.target, fraction=1 - (1 - whole) * first[kind] / now[kind])

        def plan(specs: list[GroupSpec]) -> Counts:
            if share < 1 and LATENCY in left.kinds:  # what it comes to is measured before the next round
                return plan_removals(specs, costs, left, self.ratios, scores, point=1.0)
            counts = _nearest(self.host, left, self.ratios, scores, specs, costs, now[kind], point)
            return counts if share == 1 else self._with_a_way_on(counts, left, end, scores, specs, costs, last)

        try:
            return self.widths.plan(specs, plan)
        except BudgetError as error:
            if share < 1:
                return {}  # too small a step for whole units; a later round makes up for it
            if not reached:
                raise
            if abs(reached - whole) <= near:
                return {}
            raise BudgetError(
                f"target {self.target} cannot be met within {points(self.target)}: {self.target.said(reached)} is "
                "reached, and no whole units of what is left lead closer; choose that, prune more layers, or relax "
                "round_to, max_pruning_ratio and min_width"
            ) from error

    def expected(self, scores: Scores) -> Counts:
        """What one round would do before any other: as the cost model says, without trying it out.

        Raises:
            BudgetError: if the target cannot be met.
        """
        if self.progress.goal:
            return dict(self.progress.goal)
        specs, costs = self._now()
        ratio = self.pruning_ratio
        return self.widths.plan(specs, lambda s: plan_removals(s, costs, self.target, self.ratios, scores, ratio))

    def _now(self) -> tuple[list[GroupSpec], CostModel]:
        """The layers as they are, and what their units cost."""
        removed = self.progress.plan
        specs = self.widths.of(
            [self._spec(spec) for spec in self.host.layers()], lambda spec: spec.units + removed.get(spec.name, 0)
        )
        return specs, self.host.costs("params" if self.target is None else self.target.kind)

    def _with_a_way_on(
        self,
        counts: Counts,
        left: Target,
        end: Target,
        scores: Scores,
        specs: list[GroupSpec],
        costs: CostModel,
        point: float,
    ) -> Counts:
        """The counts of a round; others near them where these lead to where no whole units meet the target any more.

        These others are no more, in any layer, than what the whole target would take now.

        Args:
            left, end: the targets of this round and of the last one, of what is there now.
            point: how far off the end may be.
        """

        def goal(specs: list[GroupSpec], costs: CostModel, target: Target, ratios: str) -> Counts | None:
            try:
                return plan_removals(specs, costs, target, ratios, scores, point=point)
            except BudgetError:
                return None

        finest, behind = self.widths.finest(specs), costs.after(counts)
        after = [_after(spec, counts[spec.name]) for spec in finest]
        further = 1 - (1 - end.fraction) * costs.cost(end.kind, {}) / behind.cost(end.kind, {})
        after = [spec for spec in after if not spec.is_block and not counts.get(spec.inside or "")]
        if further <= 0 or self._steps_are_small(after, behind, end.kind, further, point):
            return counts
        if goal(after, behind, replace(end, fraction=further), "uniform") is not None:
            return counts
        whole = goal(finest, costs, end, self.ratios)
        if whole is None:
            return counts
        within = [
            replace(spec, min_units=max(spec.min_units, spec.units - whole[spec.name]))
            for spec in specs
            if whole[spec.name] or not spec.is_block
        ]
        return plan_removals(within, costs, left, self.ratios, scores, point=1.0)

    def _steps_are_small(
        self, specs: list[GroupSpec], costs: CostModel, kind: str, fraction: float, point: float
    ) -> bool:
        """Whether a fraction is met by taking units one after the other: every step is less than two points.

        That is more than is needed, and quickly seen.
        """
        fewest = {spec.name: spec.units - spec.kept_for(0) for spec in specs}
        if costs.removed_fraction(kind, fewest) < fraction:
            return False
        able = [spec for spec in specs if fewest[spec.name]]
        steps = (costs.removed_fraction(kind, {s.name: min(s.quantum, fewest[s.name])}) for s in able)
        return all(step <= 2 * point for step in steps)

    def _spec(self, spec: GroupSpec) -> GroupSpec:
        """The layer with its largest ratio in terms of the units that it has now."""
        first = spec.units + self.progress.plan.get(spec.name, 0)
        return _after(replace(spec, units=first), first - spec.units)


def _after(spec: GroupSpec, count: int) -> GroupSpec:
    """A layer when some of its units are gone; what it keeps at least stays the same."""
    kept = spec.units - count
    if not kept:
        return replace(spec, units=0)  # a block that is gone
    return replace(spec, units=kept, max_ratio=max(0.0, 1 - (1 - spec.max_ratio) * spec.units / kept))


def few_units(specs: list[GroupSpec], costs: CostModel, kind: str) -> float:
    """What a few of the cheapest units cost: a round that left less to go would leave the last one no choice.

    Where units are a good part of the model, one too many or too few may miss the target. Layers that have no more than
    they keep are no choice.
    """
    whole = costs.cost(kind, {})
    can_go = (
        spec for spec in specs if not spec.is_block and replace(spec, step=1).kept_for(spec.units - 1) < spec.units
    )
    return 6 * min((whole - costs.cost(kind, {spec.name: 1}) for spec in can_go), default=0.0)
