r"""Parameters, MACs; and a global target turned into a number of units to remove from each layer.

§3.3 of the paper: layer-wise objectives :math:`\rho_l` with
:math:`\sum_l\rho_l\,\Omega(W_l)=\rho\,\Omega(F)`. The cost of a layer depends on what is removed from the layers
that feed it, so the ratios are found by bisection on the exact cost of the whole network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from singe_plugin.errors import BudgetError, ConfigError
from singe_plugin.loop.costs import POINT, CostModel
from singe_plugin.loop.pace import BY_SCORE, RATIOS
from singe_plugin.loop.target import Target, points

__all__ = ["GroupSpec", "Target", "plan_removals"]

_BEAM, _PATIENCE = 16, 4  # of the search for the counts nearest to a target
_EVERY = 4096  # allocations, if there are no more: all of them are tried


@dataclass(frozen=True)
class GroupSpec:
    """A prunable layer (a group of coupled layers) as the budget sees it.

    Attributes:
        name: unique; the qualified name of its first layer.
        units: how many it has now.
        block: the name of its block; layers of a block get one ratio under ``ratios="block"``.
        channels_per_unit: above 1 for grouped layers and heads.
        max_ratio: the largest fraction of its units that may go.
        min_units: how many of its units stay at least; all of them, if there are fewer. Of a residual block, which is
            one unit, none has to.
        multiple: the number of units that stay is a multiple of this.
        inside: the residual block that it goes with, or None.
        step: the number of channels that stay is a multiple of this.
    """

    name: str
    units: int
    block: str
    channels_per_unit: int = 1
    max_ratio: float = 1.0
    min_units: int = 1
    multiple: int = 1
    inside: str | None = None
    step: int = 1

    @property
    def is_block(self) -> bool:
        """Whether it is a residual block, which goes as a whole."""
        return self.min_units == 0

    def kept_for(self, kept: float) -> int:
        """The number of units kept that is nearest to ``kept`` and allowed: at least ``min_units``, channels a multiple
        of ``step``."""
        quantum = self.quantum
        floor = max(self.min_units, math.ceil(self.units * (1 - self.max_ratio) - 1e-9))
        if quantum == 1:
            return min(self.units, max(floor, round(kept)))
        lowest = math.ceil(floor / quantum) * quantum
        if lowest >= self.units:
            return self.units
        nearest = max(lowest, round(kept / quantum) * quantum)
        return self.units if nearest > self.units else nearest

    @property
    def quantum(self) -> int:
        """How many units one rounding step is."""
        return math.lcm(self.multiple, self.step // math.gcd(self.step, self.channels_per_unit))


Scores = Mapping[str, Tensor]
Counts = dict[str, int]
Miss = Callable[[Counts], float]  # how far off the cost of counts is, in what is removed of the whole


def plan_removals(
    layers: Sequence[GroupSpec],
    cost: CostModel,
    target: Target | None,
    ratios: str | Mapping[str, float] = "block",
    scores: Scores | None = None,
    pruning_ratio: float | None = None,
    aim: float | None = None,
    point: float | None = None,
) -> Counts:
    """How many units to remove from each layer.

    Args:
        layers: in forward order.
        cost: what removals cost.
        target: what to reach; None removes ``pruning_ratio`` of every layer's units (or what the dict says).
        ratios: ``"uniform"`` (one ratio for all), ``"block"`` (one ratio per block, growing linearly with depth from
            half of the last block's), ``"global"`` (all units ranked by score), ``"per_cost"`` (by score per parameter,
            or per MAC or millisecond if the target counts these: what a unit is worth for what it costs), or ``{layer
            or block: ratio}``.
        scores: per layer, for ``"global"`` and ``"per_cost"``.
        pruning_ratio: the ratio of units when there is no target.
        aim: the fraction to aim at in place of the target's, to correct for costs the model does not know.
        point: how far off is still met: a point of the whole is more than that of what is left of it. By default the
            target's.

    Returns:
        layer name -> number of units to remove.

    Raises:
        BudgetError: if the target cannot be met (see :attr:`Target.point`); it names the nearest fraction that can.
        ConfigError: for an unknown way to spread, or unknown names in the dict.
    """
    if not layers:
        raise BudgetError("there is no layer that can be pruned; see the report for the reasons")
    if isinstance(ratios, Mapping):
        counts = _from_dict(layers, ratios)
        if target is not None:
            said = "the given ratios (which need no target, target=None) remove"
            _check(cost, target, counts, said, aim, target.point if point is None else point)
        return counts
    if ratios not in RATIOS:
        raise ConfigError(f"unknown ratios {ratios!r}; choose one of {', '.join(RATIOS)} or give a dict")
    if ratios == "per_cost" and scores is not None:
        scores = _per_cost(layers, cost, "params" if target is None else target.kind, scores)
    spread = _spreader(layers, ratios, scores)
    if target is None:
        if pruning_ratio is None or not 0 <= pruning_ratio < 1:
            raise ConfigError(f"pruning_ratio={pruning_ratio!r} is not a fraction of units inside [0, 1[")
        counts = spread(pruning_ratio)
        return counts | _blocks_in(layers, counts)
    wanted, point = target.fraction if aim is None else aim, target.point if point is None else point

    def miss(counts: Counts) -> float:
        return abs(cost.removed_fraction(target.kind, counts) - wanted)

    def levelled(spread: Callable[[float], Counts]) -> tuple[Counts, Counts]:
        low, high = 0.0, 2.0
        for _ in range(50):
            middle = (low + high) / 2
            if cost.removed_fraction(target.kind, spread(middle)) < wanted:
                low = middle
            else:
                high = middle
        return spread(low), spread(high)

    def met(layers: Sequence[GroupSpec], fixed: Counts) -> Counts:
        def spread(layers: Sequence[GroupSpec]) -> Callable[[float], Counts]:
            mine = _spreader(layers, ratios, scores)
            return lambda level: fixed | mine(level)

        # with coarse steps the way from below and the way from above end in different places
        smooth = [replace(layer, step=1) for layer in layers]
        best = _refine(smooth, miss, levelled(spread(smooth)))
        if smooth != list(layers):
            best = _rounded(layers, miss, best)
            if miss(best) > POINT:
                best = _refine(layers, miss, [best, *levelled(spread(layers))])
        return best

    if not any(layer.is_block for layer in layers):
        best = met(layers, {})
    else:  # the blocks below the level go, and channels make up for the rest; with one more, if they cannot
        for start in levelled(spread):
            gone = _blocks_in(layers, start)
            left = [layer for layer in layers if layer.name not in gone]
            best = met(left, gone)
            if miss(best) <= point:
                break
    _check(cost, target, best, "the nearest that these ratios reach is", aim, point)
    return best


def _blocks_in(layers: Sequence[GroupSpec], counts: Counts) -> Counts:
    """The counts of all blocks, and of the layers in those that go: nothing is removed from these before."""
    found = {layer.name: counts[layer.name] for layer in layers if layer.is_block}
    return found | {layer.name: 0 for layer in layers if layer.inside is not None and found.get(layer.inside)}


def _check(cost: CostModel, target: Target, counts: Counts, what: str, aim: float | None, point: float) -> None:
    reached = cost.removed_fraction(target.kind, counts)
    wanted = target.fraction if aim is None else aim
    if abs(reached - wanted) > point:
        raise BudgetError(
            f"target {target} cannot be met within {points(target)}: {what} {target.said(reached)}; choose that, prune "
            "more layers, or relax round_to, max_pruning_ratio and min_width"
        )


def _from_dict(layers: Sequence[GroupSpec], ratios: Mapping[str, float]) -> Counts:
    known = {layer.name for layer in layers} | {layer.block for layer in layers}
    unknown = [name for name in ratios if name not in known]
    if unknown:
        raise ConfigError(f"ratios names {unknown}, which are no prunable layers or blocks; there are {sorted(known)}")
    bad = {name: r for name, r in ratios.items() if not 0 <= float(r) < 1}
    if bad:
        raise ConfigError(f"ratios must be inside [0, 1[, got {bad}")
    counts = {}
    for layer in layers:
        ratio = float(ratios.get(layer.name, ratios.get(layer.block, 0.0)))
        counts[layer.name] = layer.units - layer.kept_for(layer.units * (1 - ratio)) if ratio else 0
    return counts


def _spreader(layers: Sequence[GroupSpec], ratios: str, scores: Scores | None) -> Callable[[float], Counts]:
    """A monotone function from one number (the level) to removals per layer."""
    if ratios in BY_SCORE:
        if scores is None:
            raise ConfigError(f"ratios={ratios!r} needs the scores of every layer")
        return _by_score(layers, scores)
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    weight = dict.fromkeys(blocks, 1.0)
    if ratios == "block" and len(blocks) > 1:
        weight = {b: 0.5 + 0.5 * i / (len(blocks) - 1) for i, b in enumerate(blocks)}

    def spread(level: float) -> Counts:
        counts = {}
        for layer in layers:
            ratio = min(level * weight[layer.block], layer.max_ratio)
            counts[layer.name] = layer.units - layer.kept_for(layer.units * (1 - ratio))
        return counts

    return spread


def _per_cost(layers: Sequence[GroupSpec], cost: CostModel, kind: str, scores: Scores) -> Scores:
    """The scores of a layer's units divided by what one of them costs now."""
    return {layer.name: scores[layer.name] / cost.unit_cost(kind, layer.name) for layer in layers}


def _by_score(layers: Sequence[GroupSpec], scores: Scores) -> Callable[[float], Counts]:
    # equal scores (batch-norm scales that were never trained) are taken evenly from all layers
    ordered = sorted(
        (score, (position + 0.5) / layer.units, number)
        for number, layer in enumerate(layers)
        for position, score in enumerate(scores[layer.name].double().sort().values.tolist())
    )

    owners = np.array([number for _, _, number in ordered], dtype=np.int64)

    def spread(level: float) -> Counts:
        below = np.bincount(owners[: round(min(level, 1.0) * len(owners))], minlength=len(layers)).tolist()
        return {
            layer.name: layer.units - layer.kept_for(layer.units - gone)
            for layer, gone in zip(layers, below, strict=True)
        }

    return spread


def _refine(layers: Sequence[GroupSpec], miss: Miss, starts: Sequence[Counts]) -> Counts:
    """Move layers by one rounding step while that brings the cost nearer to what is wanted.

    Where the best single move leads into a dead end more than a point away (coarse steps, a small network), the best
    few are followed instead, for a while also where they lead away. Where these end there, too, every allocation is
    looked at, if there are not too many: of those that meet the target, the one nearest to the first start.
    """

    def search(start: Counts, width: int, patience: int) -> Counts:
        return _search(start, miss, lambda counts: _moves(layers, counts), 4 * len(layers), width, patience)

    best = min((search(start, 1, 1) for start in starts), key=miss)
    if miss(best) > POINT:
        best = min((best, *(search(start, _BEAM, _PATIENCE) for start in starts)), key=miss)
    if miss(best) > POINT:
        every = ({**starts[0], **counts} for counts in _every(layers))
        met = [counts for counts in every if miss(counts) <= POINT]
        best = min(met, key=lambda counts: _apart(layers, counts, starts[0]), default=best)
    return dict(best)


def _rounded(layers: Sequence[GroupSpec], miss: Miss, smooth: Counts) -> Counts:
    """Counts without steps, rounded: every layer up or down to a step of its own, so that the cost is what is wanted.

    The widths stay those that the scores said: no layer goes further than to the next step on either side. Only where
    that does not meet the target, as in a small network, may each go two or three.
    """

    def moves(counts: Counts) -> Iterator[Counts]:
        for moved in _moves(layers, counts):
            if all(abs(moved[layer.name] - smooth[layer.name]) < reach * layer.quantum for layer in layers):
                yield moved

    best = smooth | {layer.name: layer.units - layer.kept_for(layer.units - smooth[layer.name]) for layer in layers}
    for reach, width in itertools.product((1, 2, 3), (1, _BEAM)):
        best = _search(best, miss, moves, reach * len(layers), width, 1 if width == 1 else _PATIENCE)
        if miss(best) <= POINT:
            break
    return best


def _search(
    start: Counts,
    miss: Miss,
    moves: Callable[[Counts], Iterable[Counts]],
    most: int,
    width: int = 1,
    patience: int = 1,
) -> Counts:
    """The nearest counts on a way of the best few moves; it ends where it leads away for so many steps."""
    best, beam, followed, left = start, [start], {tuple(start.values())}, patience
    for _ in range(most):
        if miss(best) < POINT / 20 or not left:
            break
        fresh = {tuple(c.values()): c for b in beam for c in moves(b)}
        ranked = sorted((miss(fresh[key]), key) for key in fresh.keys() - followed)[:width]
        if not ranked:
            break
        beam = [fresh[key] for _, key in ranked]
        followed |= {key for _, key in ranked}
        left = patience if ranked[0][0] < miss(best) else left - 1
        best = min(best, beam[0], key=miss)
    return best


def _every(layers: Sequence[GroupSpec]) -> Iterator[Counts]:
    """Every allocation; none if there are too many."""
    steps = [sorted({layer.units - layer.kept_for(k) for k in range(layer.units + 1)}) for layer in layers]
    if math.prod(len(mine) for mine in steps) <= _EVERY:
        for counts in itertools.product(*steps):
            yield dict(zip((layer.name for layer in layers), counts, strict=True))


def _apart(layers: Sequence[GroupSpec], one: Counts, other: Counts) -> float:
    """By how much of each layer's units two allocations differ, in all."""
    return sum(abs(one[layer.name] - other[layer.name]) / layer.units for layer in layers)


def _moves(layers: Sequence[GroupSpec], counts: Counts) -> Iterator[Counts]:
    """The counts with one layer moved by one rounding step, up or down."""
    for layer in layers:
        step = layer.quantum
        for move in (-step, step):
            kept = layer.kept_for(layer.units - counts[layer.name] - move)
            if kept != layer.units - counts[layer.name]:
                yield {**counts, layer.name: layer.units - kept}
