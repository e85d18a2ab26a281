"""Costs against hand counts and really pruned models; plans against their targets."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.errors import BudgetError, ConfigError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.budget import GroupSpec, plan_removals
from singe_plugin.loop.costs import CostModel, TensorCost, count_macs, count_macs_by_module, count_params
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.target import Target
from singe_plugin.loop.widths import Widths

from references import Net
from small_nets import Chain, Dense, Grouped, Residual, Trace

# --- hand counts ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head over a sequence, with nothing hidden in a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


HAND: dict[str, tuple[nn.Module, tuple[int, ...], int, int]] = {
    # name: model, input shape, parameters, multiply-adds
    "linear": (nn.Linear(5, 7), (3, 5), 5 * 7 + 7, 3 * 5 * 7),
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 4), 8 * 3 * 9 + 8, 2 * 8 * 3 * 9 * 5 * 4),
    "strided": (nn.Conv2d(3, 8, 3, stride=2, bias=False), (1, 3, 7, 7), 8 * 3 * 9, 8 * 3 * 9 * 3 * 3),
    "grouped": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (1, 6, 4, 4), 8 * 3 * 9 + 8, 8 * 3 * 9 * 16),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 4, 4), 6 * 9 + 6, 6 * 9 * 16),
    "batchnorm": (nn.BatchNorm2d(4), (2, 4, 3, 3), 8, 0),
    "attention": (
        Attention(), (2, 5, 6), 6 * 18 + 18 + 6 * 6 + 6,
        2 * (5 * 6 * 18 + 5 * 5 * 6 + 5 * 5 * 6 + 5 * 6 * 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_parameters_and_macs_counted_by_hand(name: str) -> None:
    model, shape, params, macs = HAND[name]
    trace = Trace(model.train())
    assert count_params(model) == params
    assert count_macs(model, torch.ones(shape)) == macs
    assert count_macs_by_module(model, torch.zeros(shape))[""] == macs
    trace.assert_unchanged()


def test_macs_of_nested_modules_add_up() -> None:
    model = Residual()
    counts = count_macs_by_module(model, torch.zeros(1, 2, 6, 6))
    assert counts["stem"] == 8 * 2 * 9 * 36
    assert counts["blocks.0"] == counts["blocks.0.0"] + counts["blocks.0.3"] == 2 * 8 * 16 * 36
    assert counts[""] == counts["stem"] + 2 * counts["blocks.0"] + 8 * 3


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 4 + 4


def test_inputs_as_tuple_and_keywords() -> None:
    model = Net(lambda m, a, b: m.one(a) + m.two(b), one=nn.Linear(2, 4), two=nn.Linear(3, 4))
    assert count_macs(model, (torch.zeros(1, 2), torch.zeros(1, 3))) == 8 + 12
    assert count_macs(model, {"a": torch.zeros(5, 2), "b": torch.zeros(5, 3)}) == 5 * (8 + 12)


TARGETS = {"params=0.5": ("params", 0.5), "macs=0.25": ("macs", 0.25), " params = 1e-1": ("params", 0.1)}
NO_TARGETS: list[Any] = [
    "params", "params=", "params=x", "params=0", "params=1", "params=-0.1", "params=nan", "params=50%", "flops=0.5",
    "=0.5", "", "params=0.5=0.5", 0.5, None, Target("macs", 2.0),
]  # fmt: skip


@pytest.mark.parametrize("text", TARGETS)
def test_targets_that_mean_something(text: str) -> None:
    assert Target.parse(text) == Target(*TARGETS[text]) == Target.parse(Target.parse(text))


@pytest.mark.parametrize("text", NO_TARGETS)
def test_targets_that_mean_nothing(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a target.*'params=0\.5'"):
        Target.parse(text)


# --- the cost model against really pruned models ----------------------------------------------------------------

NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "chain": lambda: (Chain(widths=(24, 32, 16)), torch.zeros(1, 2, 6, 6)),
    "residual": lambda: (Residual(24, 48), torch.zeros(1, 2, 6, 6)),
    "dense": lambda: (Dense(24), torch.zeros(1, 2, 6, 6)),
    "grouped": lambda: (Grouped(), torch.zeros(1, 2, 6, 6)),
    "resnet10t": lambda: (timm.create_model("resnet10t", in_chans=1, num_classes=4), torch.zeros(1, 1, 32, 32)),
    "mobilenetv2_035": lambda: (timm.create_model("mobilenetv2_035", num_classes=4), torch.zeros(1, 3, 32, 32)),
}


@cache
def pruner_of(name: str) -> SInGEPruner:
    torch.manual_seed(0)
    model, example = NETS[name]()
    return SInGEPruner(model, example, tp.importance.MagnitudeImportance(), pace=Pace(verify=False))


def random_plan(layers: list[GroupSpec], seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    return {layer.name: draw.randrange(layer.units) for layer in layers}


@pytest.mark.parametrize("name", NETS)
def test_predicted_costs_are_those_of_the_pruned_model(name: str) -> None:
    pruner = pruner_of(name)
    host = pruner.host()
    costs, layers = host.costs(), host.layers()
    before = count_params(pruner.model), count_macs(pruner.model, pruner.example_inputs)
    assert (costs.cost("params", {}), costs.cost("macs", {})) == before
    for seed in range(3):
        plan = random_plan(layers, seed)
        true = {kind: host.trial(plan, kind) for kind in ("params", "macs")}
        assert costs.cost("params", plan) == true["params"]
        assert costs.cost("macs", plan) == pytest.approx(true["macs"], rel=1e-9)
    assert (count_params(pruner.model), count_macs(pruner.model, pruner.example_inputs)) == before


# --- plans ------------------------------------------------------------------------------------------------------

SMALL, BIG = ("chain", "residual", "dense", "grouped"), ("resnet10t", "mobilenetv2_035")
GRID = [
    (net, f"{kind}={fraction}", ratios, round_to)
    for nets, kind, fractions in (
        (SMALL, "params", (0.2, 0.5, 0.8)), (SMALL, "macs", (0.2, 0.6)), (BIG, "params", (0.5,))
    )
    for net in nets for fraction in fractions
    for ratios in ("uniform", "block", "global") for round_to in (None, 8)
    if net != "mobilenetv2_035" or (ratios == "block" and round_to)
]  # fmt: skip


@pytest.mark.parametrize(("net", "target", "ratios", "round_to"), GRID)
def test_a_plan_meets_its_target_or_names_one_that_it_meets(
    net: str, target: str, ratios: str, round_to: int | None
) -> None:
    pruner = pruner_of(net)
    host = pruner.host()
    before = {"params": count_params(pruner.model), "macs": count_macs(pruner.model, pruner.example_inputs)}
    pruner.target, pruner.pace = Target.parse(target), replace(pruner.pace, ratios=ratios, round_to=round_to)
    try:
        plan, refusal = pruner.plan(), ""
    except BudgetError as error:
        plan, refusal = {}, str(error)
    if refusal:
        assert count_params(pruner.model) == before["params"]  # nothing was removed
        assert target in refusal
        found = re.search(r"nearest[^=]* is ((?:params|macs)=0\.\d+);", refusal)
        assert found, refusal
        assert abs(Target.parse(found[1]).fraction - pruner.target.fraction) > 0.01
        target = found[1]
        pruner.target = Target.parse(target)
        plan = pruner.plan()
    goal = Target.parse(target)
    reached = 1 - host.trial(plan, goal.kind) / before[goal.kind]
    assert abs(reached - goal.fraction) <= 0.01
    for layer in host.layers():
        kept = layer.units - plan[layer.name]
        assert kept >= 1
        assert not round_to or not plan[layer.name] or kept * layer.channels_per_unit % round_to == 0


@pytest.mark.parametrize("round_to", [None, 8])
@pytest.mark.parametrize("fraction", [0.1, 0.2285, 0.35, 0.5, 0.65])
def test_a_target_is_refused_only_if_no_combination_meets_it(fraction: float, round_to: int | None) -> None:
    pruner = pruner_of("residual")
    host = pruner.host()
    layers, costs = Widths(round_to or 1, exact=True).of(host.layers()), host.costs()
    steps = [range(0, layer.units, 8 if round_to else 3) for layer in layers]
    every = [dict(zip((layer.name for layer in layers), c, strict=True)) for c in itertools.product(*steps)]
    least = min(abs(costs.removed_fraction("macs", counts) - fraction) for counts in every)
    target = Target("macs", fraction)
    try:
        plan = plan_removals(layers, costs, target, "block")
    except BudgetError:
        assert least > 0.01
    else:
        assert abs(costs.removed_fraction("macs", plan) - fraction) <= 0.01


@pytest.mark.parametrize("name", ["chain", "residual", "resnet10t"])
def test_fine_widths_need_no_compromise(name: str) -> None:
    pruner = pruner_of(name)
    pruner.target, pruner.pace = Target("params", 0.5), replace(pruner.pace, ratios="block", round_to=None)
    assert sum(pruner.plan().values()) > 0


def toy(blocks: int = 3, per_block: int = 2, units: int = 100, **options: Any) -> tuple[list[GroupSpec], CostModel]:
    """Independent layers of equal cost."""
    layers = [GroupSpec(f"{b}.{i}", units, f"block{b}", **options) for b in range(blocks) for i in range(per_block)]
    return layers, CostModel(tuple(TensorCost((units, 10), ((0, layer.name, 1.0),)) for layer in layers))


def test_one_ratio_per_block_growing_with_depth() -> None:
    layers, cost = toy()
    plan = plan_removals(layers, cost, Target("params", 0.45), "block")
    ratios = [plan[f"{b}.{i}"] / 100 for b in range(3) for i in range(2)]
    assert ratios == pytest.approx([0.3, 0.3, 0.45, 0.45, 0.6, 0.6], abs=0.0101)


def test_uniform_is_one_ratio_for_all() -> None:
    layers, cost = toy()
    assert set(plan_removals(layers, cost, Target("params", 0.45), "uniform").values()) == {45}
    assert set(plan_removals(layers, cost, None, "uniform", pruning_ratio=0.2).values()) == {20}


def test_global_removes_the_lowest_scores_of_all_layers() -> None:
    layers, cost = toy(1, 2, 10)
    scores = {"0.0": torch.arange(10.0), "0.1": torch.arange(10.0) + 4.5}
    plan = plan_removals(layers, cost, Target("params", 0.5), "global", scores=scores)
    assert plan == {"0.0": 7, "0.1": 3}  # 0..6 and 4.5..6.5 are the lowest ten


def test_equal_scores_are_taken_evenly_from_all_layers() -> None:
    layers, cost = toy(2, 2, 10)
    plan = plan_removals(
        layers, cost, Target("params", 0.5), "global", scores={layer.name: torch.ones(10) for layer in layers}
    )
    assert plan == {layer.name: 5 for layer in layers}


def test_ratios_by_name_and_block() -> None:
    layers, cost = toy()
    plan = plan_removals(layers, cost, None, {"block1": 0.5, "1.1": 0.1, "2.0": 0.25})
    assert plan == {"0.0": 0, "0.1": 0, "1.0": 50, "1.1": 10, "2.0": 25, "2.1": 0}


def test_the_largest_ratio_is_respected() -> None:
    layers, cost = toy(max_ratio=0.4)
    for ratios in ("uniform", "block", "global"):
        scores = {layer.name: torch.rand(100) for layer in layers}
        plan = plan_removals(layers, cost, None, ratios, scores=scores, pruning_ratio=0.9)
        assert max(plan.values()) == 40
        with pytest.raises(BudgetError, match=r"params=0\.6 .*nearest.*params=0\.4000; .*max_pruning_ratio"):
            plan_removals(layers, cost, Target("params", 0.6), ratios, scores=scores)
    assert plan_removals(layers, cost, None, {"block0": 0.9})["0.0"] == 40


@pytest.mark.parametrize(("per_unit", "round_to", "quantum"), [(1, 8, 8), (4, 8, 2), (8, 8, 1), (3, 8, 8), (6, 4, 2)])
def test_rounding_counts_channels_not_units(per_unit: int, round_to: int, quantum: int) -> None:
    layer = GroupSpec("a", 48, "a", per_unit, step=round_to)
    assert layer.quantum == quantum
    for kept in range(1, 49):
        rounded = layer.kept_for(kept)
        assert rounded * per_unit % round_to == 0
        assert abs(rounded - kept) <= quantum / 2 or (kept < quantum and rounded == quantum)


def test_a_layer_is_never_emptied() -> None:
    layer = GroupSpec("a", 3, "a")
    assert [layer.kept_for(kept) for kept in (-1, 0, 0.4, 2.6, 9)] == [1, 1, 1, 3, 3]
    assert replace(layer, step=8).kept_for(1) == 3  # narrower than one step: it stays


def test_bad_plans() -> None:
    layers, cost = toy()
    for ratios, options, message in [
        ("even", {}, "unknown ratios 'even'"),
        ("global", {"pruning_ratio": 0.5}, "needs the scores"),
        ("uniform", {}, "pruning_ratio=None"),
        ({"block9": 0.5}, {}, r"\['block9'\], which are no prunable layers or blocks"),
        ({"block0": 1.0}, {}, r"inside \[0, 1\["),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan_removals(layers, cost, None, ratios, **options)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="no layer that can be pruned"):
        plan_removals([], cost, Target("params", 0.5))


def test_macs_of_a_model_that_expands_a_parameter() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.norm, self.fc = nn.Parameter(torch.ones(1, 1, 4)), nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.cat([self.norm(self.token.expand(len(x), -1, -1)), x], 1))

    model = Token()
    assert count_macs(model, torch.ones(2, 5, 4)) == 2 * 6 * 12
    assert all(p.requires_grad for p in model.parameters())
