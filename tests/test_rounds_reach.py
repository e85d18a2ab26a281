"""Whatever order the scores give in a round, the rounds after it can still meet the target."""

from __future__ import annotations

import itertools
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from singe_plugin.errors import BudgetError
from singe_plugin.integrations.torch_pruning.allocation import Rounds
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.costs import CostModel, TensorCost
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.target import Target
from singe_plugin.loop.widths import Widths


class Numbers:
    """A chain of layers that is widths alone: what :class:`Rounds` asks of a host."""

    def __init__(self, widths: list[int], least: int, inputs: int = 3, outputs: int = 10) -> None:
        self.widths = {f"layer{i}": width for i, width in enumerate(widths)}
        self.least, self.ends = least, (inputs, outputs)

    def layers(self) -> list[GroupSpec]:
        return [GroupSpec(name, width, name, 1, 0.95, self.least) for name, width in self.widths.items()]

    def costs(self, _: str = "macs") -> CostModel:
        names: list[str | None] = [None, *self.widths, None]
        sizes = [self.ends[0], *self.widths.values(), self.ends[1]]
        tensors = []
        for (i, read), (o, name) in itertools.pairwise(zip(sizes, names, strict=True)):
            links = tuple((dim, n, 1.0) for dim, n in ((0, name), (1, read)) if n is not None)
            tensors.append(TensorCost((o, i, 9), links, 9.0 * o * i))
        return CostModel(tuple(tensors), 0, sum(t.macs for t in tensors))

    def sizes(self, *_: str) -> dict[str, Any]:
        costs = self.costs()
        return {"params": costs.params({}), "macs": costs.macs({}), "units": sum(self.widths.values())}

    def trial(self, counts: dict[str, int], kind: str) -> float:
        return self.costs().cost(kind, counts)


def in_rounds(host: Numbers, target: Target, rounds: int, seed: int, widths: Widths) -> float:
    """What is reached when the scores of every round are drawn anew."""
    progress = Progress(dict.fromkeys(host.widths, 0), before=host.sizes())
    choose = Rounds(host, progress, target, 0.5, "per_cost", widths)  # type: ignore[arg-type]
    drawn = torch.Generator().manual_seed(seed)
    for number in range(rounds):
        scores: dict[str, Tensor] = {}
        for name, width in host.widths.items():
            scores[name] = 10 ** (4 * torch.rand((), generator=drawn)) * torch.rand(width, generator=drawn)
        for name, count in choose(scores, (number + 1) / rounds).items():
            host.widths[name] -= count
            progress.plan[name] += count
    return 1 - host.sizes()[target.kind] / progress.before[target.kind]


def reachable(host: Numbers, target: Target, widths: Widths) -> float:
    """How near to a target some allocation comes: all are looked at."""
    layers, costs = widths.finest(widths.of(host.layers())), host.costs()
    steps = [{layer.kept_for(kept) for kept in range(layer.units + 1)} for layer in layers]
    return min(
        abs(costs.removed_fraction(target.kind, {s.name: s.units - k for s, k in zip(layers, kept, strict=True)})
            - target.fraction)
        for kept in itertools.product(*steps)
    )  # fmt: skip


@pytest.mark.parametrize("allowed", [Widths(), Widths(2, exact=True), Widths(2)])
@pytest.mark.parametrize("seed", range(40))
def test_a_target_that_one_round_meets_is_met_in_several(seed: int, allowed: Widths) -> None:
    drawn = torch.Generator().manual_seed(seed)
    widths = torch.randint(4, 13, (2 + seed % 2,), generator=drawn).tolist()
    target = Target("macs" if seed % 3 else "params", 0.3 + 0.05 * (seed % 7))
    host = Numbers(widths, 2 + seed % 3)
    out_of_reach = reachable(host, target, allowed) > 0.01
    with suppress(BudgetError) if out_of_reach else nullcontext():
        assert in_rounds(host, target, 4, seed, allowed) == pytest.approx(target.fraction, abs=0.01 + 1e-9)


def test_what_is_left_costs_what_is_left() -> None:
    host = Numbers([6, 9, 5], 1)
    first, further = {"layer0": 2, "layer2": 1}, {"layer0": 1, "layer1": 4}
    both = {name: first.get(name, 0) + further.get(name, 0) for name in host.widths}
    for kind in ("params", "macs"):
        assert host.costs().after(first).cost(kind, further) == pytest.approx(host.costs().cost(kind, both))
