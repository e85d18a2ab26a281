"""The widths that layers end with where a target is one of speed."""

from __future__ import annotations

import itertools
import logging

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

import singe_plugin
from singe_plugin import Pace
from singe_plugin.errors import BudgetError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.budget import GroupSpec, plan_removals
from singe_plugin.loop.costs import CostModel, TensorCost
from singe_plugin.loop.target import Target
from singe_plugin.loop.widths import Widths

BATCHES = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
NETWORKS = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=4, channels=[16, 32, 64, 96], layers=[1, 1, 1, 1]),
    "depthwise": lambda: timm.create_model("lcnet_050", num_classes=4),
    "attention": lambda: timm.create_model("test_vit", num_classes=4, img_size=32),
    "grouped": lambda: timm.create_model("test_resnet", num_classes=4),
}


def step_by_hand(channels: int) -> int:
    """8 from 64 channels on, half of that for every half of these."""
    return 8 if channels >= 64 else 4 if channels >= 32 else 2 if channels >= 16 else 1


def pruned(name: str, target: str, pace: Pace | None = None) -> singe_plugin.Result:
    return singe_plugin.prune(
        made(name), BATCHES, target=target, scoring="l2", finetune=0, repair=None, pace=pace or Pace(rounds=3)
    )


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def ragged(name: str, result: singe_plugin.Result) -> list[str]:
    """The sides of matrices that have become smaller, and are no multiple of their step."""
    after, found = dict(result.model.named_parameters()), []
    for key, before in made(name).named_parameters():
        for dim, (first, now) in enumerate(zip(before.shape[:2], after[key].shape, strict=False)):
            if before.ndim > 1 and now < first and now % step_by_hand(first):
                found.append(f"{key}, dimension {dim}: {first} -> {now}")
    return found


@pytest.mark.parametrize("target", ["macs=0.3", "macs=0.5", "macs=0.4,params=0.3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_widths_are_multiples_where_multiply_adds_are_counted(name: str, target: str) -> None:
    result = pruned(name, target)
    assert result.removed_params
    assert not ragged(name, result)
    if target != "macs=0.4,params=0.3":
        assert result.removed_macs == pytest.approx(float(target[5:]), abs=0.01)


@pytest.mark.parametrize(("target", "pace"), [("params=0.5", None), ("macs=0.5", Pace(round_to=1))])
def test_elsewhere_they_are_as_they_come(target: str, pace: Pace | None) -> None:
    assert ragged("depthwise", pruned("depthwise", target, pace))


@pytest.mark.parametrize(
    "pace", [Pace(rounds=1), Pace("layers", units_per_step="layer"), Pace("layers", ratios="uniform")]
)
def test_one_round_and_algorithm_1_have_the_same_widths(pace: Pace) -> None:
    assert not ragged("resnet", pruned("resnet", "macs=0.5", pace))


def test_a_number_holds_for_every_layer() -> None:
    result = pruned("resnet", "macs=0.5", Pace(rounds=1, round_to=16))
    changed = [row.units_after for row in result.layers if row.units_after < row.units_before]
    assert changed
    assert all(width % 16 == 0 for width in changed)


def test_where_no_multiples_meet_the_target_smaller_ones_do(caplog: pytest.LogCaptureFixture) -> None:
    def pruner(round_to: int | None = None) -> SInGEPruner:
        net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 1), nn.Flatten())
        pace = Pace("rounds", rounds=1, ratios="uniform", round_to=round_to)
        return SInGEPruner(net, torch.randn(1, 3, 3, 3), tp.importance.MagnitudeImportance(), target=TARGET, pace=pace)

    TARGET = "macs=0.2"  # 12.8 units of 64: neither 8, 12, 14 nor 16 are within a point
    with caplog.at_level(logging.INFO, "singe_plugin"):
        automatic = pruner()
        assert automatic.plan() == {"0": 13}
        assert automatic.run().macs == (64 * 37, 51 * 37)
    said = [
        f"no multiples of {step} channels meet the target; multiples of {step // 2} are tried" for step in (8, 4, 2)
    ]
    assert all(text in caplog.text for text in said)
    with pytest.raises(BudgetError, match=r"cannot be met within one point.*relax round_to"):
        pruner(8).plan()


@pytest.mark.parametrize(("given", "channels", "step"), [
    (Widths(8), 7, 1), (Widths(8), 16, 2), (Widths(8), 63, 4), (Widths(8), 64, 8), (Widths(16), 127, 8),
    (Widths(16), 128, 16), (Widths(1), 640, 1), (Widths(8, exact=True), 7, 8), (Widths(12, exact=True), 640, 12),
])  # fmt: skip
def test_the_step_of_a_layer(given: Widths, channels: int, step: int) -> None:
    assert given.step_of(channels) == step
    (layer,) = given.of([GroupSpec("a", channels, "a")])
    (narrowed,) = given.of([GroupSpec("a", channels // 2, "a")], lambda _: channels)
    assert layer.step == narrowed.step == step  # of what it had before pruning


def chain(widths: list[int]) -> CostModel:
    """Multiply-adds of a chain of 3 x 3 convolutions on one pixel."""
    names, sizes = [None, *map(str, range(len(widths))), None], [3, *widths, 10]
    tensors = []
    for (i, read), (o, name) in itertools.pairwise(zip(sizes, names, strict=True)):
        links = tuple((dim, n, 1.0) for dim, n in ((0, name), (1, read)) if n is not None)
        tensors.append(TensorCost((o, i, 9), links, 9.0 * o * i))
    return CostModel(tuple(tensors), 0, sum(t.macs for t in tensors))


@pytest.mark.parametrize("seed", range(12))
def test_no_layer_goes_further_than_to_its_next_step_where_that_meets_the_target(seed: int) -> None:
    """Held against a look at every way of rounding up and down."""
    drawn = torch.Generator().manual_seed(seed)
    widths = (16 * torch.randint(4, 9, (5,), generator=drawn)).tolist()
    scores = {
        str(i): torch.rand(w, generator=drawn) * 10 ** float(torch.rand((), generator=drawn))
        for i, w in enumerate(widths)
    }
    costs, target = chain(widths), Target("macs", 0.3 + 0.05 * (seed % 6))
    layers = [GroupSpec(str(i), w, str(i), 1, 0.95, 4) for i, w in enumerate(widths)]
    smooth = plan_removals(layers, costs, target, "per_cost", scores)
    plan = plan_removals(Widths(8).of(layers), costs, target, "per_cost", scores)
    assert all(count % 8 == 0 for count in plan.values())
    both = [{count // 8 * 8, min(-(-count // 8) * 8, widths[int(name)] - 8)} for name, count in smooth.items()]
    ways = [dict(zip(smooth, counts, strict=True)) for counts in itertools.product(*both)]
    nearest = min(abs(costs.removed_fraction("macs", way) - target.fraction) for way in ways)
    assert abs(costs.removed_fraction("macs", plan) - target.fraction) <= 0.01
    if nearest <= 0.0025:
        assert all(abs(plan[name] - count) < 8 for name, count in smooth.items())
