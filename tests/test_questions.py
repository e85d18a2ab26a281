"""A model that compares its widths goes the same way before and after a pruning, whatever numbers of units go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import singe_plugin
from singe_plugin import Builder, Pace
from singe_plugin.axes import AxisGraph, remove_units
from singe_plugin.errors import RemovalError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.events import Callback, Removed, RoundDone
from singe_plugin.rollback import Trackers
from singe_plugin.shrink import shrink_with_report

from masking import Masked

X = torch.randn(2, 3, 6, 6)
Way = Callable[[Any, Tensor, Tensor], Tensor]


class Asking(nn.Module):
    """Two layers, 16 and 24 wide, and a way to go on that compares their widths."""

    def __init__(self, way: Way, first: int = 16, second: int = 24) -> None:
        super().__init__()
        self.way, self.narrow, self.wide = way, first, second
        self.a, self.b = nn.Conv2d(3, first, 3, padding=1), nn.Conv2d(first, second, 3, padding=1)
        self.head = nn.Linear(second, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x)).flatten(2)
        b = torch.relu(self.b(a.view(len(x), -1, *x.shape[2:]))).flatten(2)
        made: Tensor = self.head(self.way(self, a, b).mean(2))
        return made


def attributes(net: Any, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.view(len(a), net.narrow, -1), b.view(len(b), net.wide, -1)
    return b + a if net.narrow == net.wide else b


def multiples_only(net: Any, a: Tensor, b: Tensor) -> Tensor:
    if b.shape[1] % 4:
        raise ValueError("widths are multiples of 4")
    return b


WAYS: dict[str, Way] = {
    "equal": lambda net, a, b: b + a if a.shape[1] == b.shape[1] else b,
    "not equal": lambda net, a, b: b if a.size(1) != b.size(1) else b * a,
    "shapes": lambda net, a, b: b + a if a.shape == b.shape else b,
    "attributes": attributes,
    "less": lambda net, a, b: b * 2 if b.shape[1] < 13 else b,
    "more": lambda net, a, b: b if b.shape[1] > a.shape[1] else b * 3,
    "a constant": lambda net, a, b: b * 2 if b.shape[1] in (12, 17) else b,
    "a multiple": lambda net, a, b: b - 1 if 2 * b.shape[1] == a.shape[1] * 5 else b,
    "the largest": lambda net, a, b: b * 3 if max(a.shape[1], b.shape[1]) == a.shape[1] else b,
    "divisible": lambda net, a, b: b * 2 if b.shape[1] % 4 == 0 else b,
    "refused": multiples_only,
    "a quotient": lambda net, a, b: b * 2 if 60 // (b.shape[1] - 20) > 20 else b,
    "odd": lambda net, a, b: b if not b.shape[1] % 2 else b * 2,
}


def made(way: str = "equal") -> Asking:
    torch.manual_seed(0)
    return Asking(WAYS[way]).eval()


@pytest.mark.parametrize("way", WAYS)
def test_whatever_number_goes_the_network_is_the_masked_one(way: str) -> None:
    for first in (0, 3, 8):
        for second in range(0, 22):
            model = made(way)
            masked = Masked(model)
            graph = AxisGraph(model, X)
            groups = {
                graph.groups[name]: count for name, count in (("a", first), ("b", second)) if name in graph.groups
            }
            for group, count in graph.allowed(groups).items():
                assert 0 <= count <= groups[group]
                remove_units(graph, group, range(count), Trackers([], [masked.tags]), settled=True)
            assert torch.allclose(masked.model()(X), model(X), atol=1e-5), (way, first, second)


def test_the_last_layer_keeps_more_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    graph = AxisGraph(made("equal"), X)
    a, b = graph.groups["a"], graph.groups["b"]
    with caplog.at_level(logging.INFO, "singe_plugin"):
        assert graph.allowed({b: 8}) == {b: 7}  # 16 beside 16
        assert graph.allowed({b: 8, a: 1}) == {b: 8, a: 1}
        assert graph.allowed({a: 4, b: 12}) == {a: 4, b: 11}
        assert graph.allowed({b: 12, a: 4}) == {b: 12, a: 3}
    (told,) = {r.getMessage() for r in caplog.records if r.getMessage().startswith("b ")}
    asks = "Asking asks whether a size of 16 is equal to 24, and would go another way"
    assert told == f"b keeps more units than was asked for: {asks}"


def test_widths_may_meet_on_the_way_to_others() -> None:
    """Two layers lose units one after the other; what counts is what is left of both."""
    model = made("equal")
    result = singe_plugin.prune(
        model, [(X, torch.arange(2))], target=None, pace=Pace(rounds=1, ratios={"a": 0.5, "b": 1 / 3}, round_to=1),
        scoring="l2", finetune=0, repair=None, example_inputs=X,
    )  # fmt: skip
    assert (model.a.out_channels, model.b.out_channels) == (8, 16)
    assert {row.name: row.units_after for row in result.layers} == {"a": 8, "b": 16}


@pytest.mark.parametrize("way", ["equal", "attributes", "less"])
def test_a_run_and_a_step_of_torch_pruning_keep_the_way(way: str) -> None:
    for half in ("run", "step"):
        model = made(way)
        masked = Masked(model)
        pruner = SInGEPruner(
            model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.0, ema=masked.tags,
            pruning_ratio_dict={model.b: 1 / 3 if way != "less" else 0.5},
        )  # fmt: skip
        pruner.run() if half == "run" else pruner.step()
        assert (model.a.out_channels, model.b.out_channels) == (16, 13 if way == "less" else 17)
        assert torch.allclose(masked.model()(X), model(X), atol=1e-5)


@pytest.mark.parametrize("units", [1, 3, "layer"])
def test_algorithm_1_gets_past_a_width_that_it_may_not_stop_at(units: int | str) -> None:
    """24 -> 10 beside 16, a unit at a time: 17 waits for 15."""
    model = made("equal")
    masked, widths = Masked(model), []

    class Watch(Callback):
        def on_removed(self, event: Removed) -> None:
            widths.append(event.left)

    pruner = SInGEPruner(
        model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.0, pruning_ratio_dict={model.b: 14 / 24},
        ema=masked.tags, pace=Pace("layers", units_per_step=units), callbacks=[Watch()],
    )  # fmt: skip
    pruner.run()
    assert model.b.out_channels == 10
    assert 16 not in widths
    assert torch.allclose(masked.model()(X), model(X), atol=1e-5)


def test_rounds_write_down_what_went() -> None:
    model = made("equal")
    rounds: list[RoundDone] = []

    class Watch(Callback):
        def on_round_done(self, event: RoundDone) -> None:
            rounds.append(event)

    pace = Pace(rounds=2, course="linear", ratios={"b": 2 / 3}, round_to=1)
    singe_plugin.prune(
        model, [(X, torch.arange(2))], target=None, pace=pace, scoring="l2", finetune=0, repair=None, example_inputs=X,
        callbacks=[Watch()],
    )  # fmt: skip
    assert [(event.removed, event.left) for event in rounds] == [(7, 33), (9, 24)]  # 24 -> 17 (not 16) -> 8, and 16
    assert model.b.out_channels == 8


def test_a_removal_by_hand_is_refused() -> None:
    model = made("equal")
    pruner = SInGEPruner(model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    group = pruner.DG.get_pruning_group(model.b, tp.prune_conv_out_channels, list(range(8)))
    with pytest.raises(
        RemovalError, match=r"'b': without 8 of its 24 units, Asking asks .* equal .*; remove 7 of them"
    ):
        group.prune()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pruner.DG.get_pruning_group(model.b, tp.prune_conv_out_channels, list(range(7))).prune()
    assert model.b.out_channels == 17


def test_a_host_removes_what_it_was_asked_about_or_what_may_go_alone() -> None:
    model = made("equal")
    host = SInGEPruner(model, X, tp.importance.MagnitudeImportance(), pruning_ratio=0.5).host()
    with pytest.raises(RemovalError, match="without 8 of its 24 units"):
        host.remove("b", range(8))
    assert host.allowed({"b": 8, "a": 4}) == {"b": 8, "a": 4}
    host.remove("b", range(8))
    host.remove("a", range(4))
    assert (model.a.out_channels, model.b.out_channels) == (12, 16)
    with pytest.raises(RemovalError, match="without 4 of its 16 units"):
        host.remove("b", range(4))


def test_masks_that_would_make_widths_meet_leave_a_unit() -> None:
    model = made("equal")
    masks = {"b": {"weight": torch.ones_like(model.b.weight), "bias": torch.ones(24)}}
    masks["b"]["weight"][:8], masks["b"]["bias"][:8] = 0, 0
    with torch.no_grad():
        model.b.weight[:8], model.b.bias[:8] = 0, 0
    expected = model(X)
    shrunk = shrink_with_report(model, masks, X)
    assert model.b.out_channels == 17
    assert torch.allclose(model(X), expected, atol=1e-5)
    assert "1 of its masked units stay: the model compares widths" in shrunk.still_masked["b"]


def test_a_result_whose_widths_met_on_the_way_comes_back(tmp_path: Path) -> None:
    model = made("equal")
    result = singe_plugin.prune(
        model, [(X, torch.arange(2))], target=None, pace=Pace(rounds=1, ratios={"a": 0.5, "b": 1 / 3}, round_to=1),
        scoring="l2", finetune=0, repair=None, example_inputs=X,
    )  # fmt: skip
    folder = singe_plugin.save(result, tmp_path / "out", Builder.factory("test_questions:made"))
    loaded = singe_plugin.load(folder, factory=made).model
    assert torch.equal(loaded(X), result.model(X))
