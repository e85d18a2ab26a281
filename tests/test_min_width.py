"""A layer keeps at least ``min_width`` units, whatever plans and removes; and one that lost nearly all is warned of."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from singe_plugin import prune
from singe_plugin.app.report import markdown, report_data
from singe_plugin.errors import BudgetError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.events import History
from singe_plugin.run.result import GroupRow, Metrics, Result

from asked import asked
from small_nets import Chain, Grouped, Residual, images, mlp, vectors

BATCHES = images()
X = BATCHES[0][0][:2]
MAGNITUDE = tp.importance.MagnitudeImportance()
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"ratios": "uniform"},
    "block": {"ratios": "block"},
    "global": {"ratios": "global"},
    "per_cost": {"ratios": "per_cost"},
    "rounds": {"order": "rounds", "rounds": 3},
    "rounds, fixed": {"order": "rounds", "rounds": 3, "ratios": "uniform"},
    "rounds, global": {"order": "rounds", "rounds": 3, "ratios": "global"},
    "one unit at a time": {"units_per_step": 1},
}


def counts(pruner: SInGEPruner) -> dict[str, int]:
    return {group.name: group.size for group in pruner.layers}


@pytest.mark.parametrize("round_to", [None, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("net", [Chain, Residual, Grouped, mlp])
def test_no_plan_goes_below(net: Any, way: str, round_to: int | None) -> None:
    """Against the widths of the model itself, for targets that would empty some layers, with and without a target."""
    example = vectors()[0][0][:2] if net is mlp else X
    for target, ratio in (("params=0.6", 0.5), ("macs=0.6", 0.5), (None, 0.9)):
        torch.manual_seed(1)
        pruner = SInGEPruner(
            net(),
            example,
            MAGNITUDE,
            **asked(target=target, pruning_ratio=ratio, min_width=5, round_to=round_to, **WAYS[way]),
        )
        before = counts(pruner)
        try:
            outcome = pruner.run()
        except BudgetError:
            assert target is not None
            assert counts(pruner) == before
            continue
        after = counts(pruner)
        assert all(after[name] >= min(5, before[name]) for name in before), (before, after)
        if target is not None:
            sizes = outcome.params if target.startswith("params") else outcome.macs
            assert 1 - sizes[1] / sizes[0] == pytest.approx(0.6, abs=0.0101)
        else:
            assert sum(after.values()) < sum(before.values())


def test_ratios_of_a_dictionary_and_of_modules() -> None:
    model = Chain()
    SInGEPruner(model, X, MAGNITUDE, **asked(ratios={"conv1": 0.9, "conv2": 0.5}, min_width=3)).run()
    assert [m.out_channels for m in (model.conv1, model.conv2, model.conv3)] == [3, 6, 8]
    model = Chain()
    pruner = SInGEPruner(
        model, X, MAGNITUDE, **asked(pruning_ratio=0.1, pruning_ratio_dict={model.conv2: 0.9}, min_width=7)
    )
    pruner.run()
    assert [m.out_channels for m in (model.conv1, model.conv2, model.conv3)] == [7, 7, 7]


@pytest.mark.parametrize("options", [{}, {"global_pruning": True}, {"round_to": 4}, {"isomorphic": True}])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_step_obeys(options: dict[str, Any], width: int) -> None:
    torch.manual_seed(0)
    pruner = SInGEPruner(
        Chain(), X, MAGNITUDE, **asked(pruning_ratio=0.9, iterative_steps=3, min_width=width, **options)
    )
    before = counts(pruner)
    for _ in range(3):
        pruner.step()
        assert all(after >= min(width, before[name]) for name, after in counts(pruner).items())
    assert sum(counts(pruner).values()) < sum(before.values())


def test_a_layer_that_has_fewer_is_left_as_it_is() -> None:
    model = Chain(widths=(3, 12, 8))
    result = prune(model, BATCHES, **asked(target="params=0.4", criterion="l2", finetune_steps=0, min_width=4))
    assert {row.name: row.units_after for row in result.layers}["conv1"] == 3
    assert result.removed_params == pytest.approx(0.4, abs=0.01)
    assert result.options["pace"]["min_width"] == 4


def test_the_error_says_what_is_nearest_and_that_the_width_is_in_the_way() -> None:
    model = Chain()
    with pytest.raises(BudgetError, match=r"nearest that these ratios reach is params=0\.\d+.* min_width"):
        SInGEPruner(model, X, MAGNITUDE, **asked(target="params=0.9", ratios="uniform", min_width=6)).run()
    assert model.conv1.out_channels == 8


@pytest.mark.parametrize("units", [1, 3, 4, 5, 16, 64])
@pytest.mark.parametrize("least", [1, 4, 8])
@pytest.mark.parametrize("round_to", [None, 4])
def test_the_units_kept(units: int, least: int, round_to: int | None) -> None:
    """Of all numbers that are allowed, the nearest."""
    spec = GroupSpec("a", units, "a", max_ratio=0.9, min_units=least, step=round_to or 1)
    floor = max(1, min(least, units), 0.1 * units)
    allowed = [k for k in range(1, units) if k >= floor and k % (round_to or 1) == 0] + [units]
    for wanted in range(units + 1):
        kept = spec.kept_for(wanted)
        assert kept in allowed
        if round_to is None:
            assert abs(kept - wanted) == min(abs(k - wanted) for k in allowed)


# --- the warning ------------------------------------------------------------------------------------------------


def result_of(rows: list[GroupRow], **sizes: Any) -> Result:
    return Result(nn.Identity(), Metrics(10, 10, **sizes), Metrics(5, 5, **sizes), rows, history=History())


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [(16, 1, True), (16, 3, True), (16, 4, False), (3, 3, False), (4, 3, True), (100, 9, True), (100, 10, False)],
)
def test_a_layer_left_with_next_to_nothing(before: int, after: int, warned: bool) -> None:
    result = result_of([GroupRow("conv9", "b", before, after), GroupRow("fine", "b", 64, 32)])
    assert len(result.warnings) == warned
    data = json.loads(json.dumps(report_data(result)))
    assert data["warnings"] == result.warnings
    said = f"layer 'conv9' has {after} of {before} units left"
    assert (said in result.summary()) is (said in markdown(data)) is warned
    assert all("min_width" in text for text in result.warnings)


def test_many_warnings_are_few_lines_and_all_in_the_list() -> None:
    result = result_of([GroupRow(f"conv{i}", "b", 16, 1) for i in range(9)])
    assert len(result.warnings) == 9
    assert sum(line.startswith("warning:") for line in result.summary().splitlines()) == 4
    assert "6 more" in result.summary()
    assert markdown(report_data(result)).count("of 16 units left") == 9


def test_masked_weights_have_no_widths() -> None:
    assert result_of([GroupRow("fc", "fc", 100, 2)], nonzero=3).warnings == []


def test_prune_warns() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"criterion": "l2", "finetune_steps": 0, "ratios": {"conv1": 0.9}, "target": None}
    result = prune(Chain(), BATCHES, **asked(min_width=1, **options))
    assert [text for text in result.warnings if "'conv1' has 1 of 8 units" in text]
    assert prune(Chain(), BATCHES, **asked(min_width=4, **options)).warnings == []
