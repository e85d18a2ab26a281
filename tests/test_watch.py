"""The network is judged by the user's own measure; what makes it too bad is undone, and the run stops."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import singe_plugin
from singe_plugin import Builder, Callback, ConfigError, DataError, Evaluate, FineTune, Pace, prune, prune_weights
from singe_plugin.app.cli import main
from singe_plugin.app.report import write_report
from singe_plugin.loop.events import LayerDone, RoundDone

BATCHES = [(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(8) % 4) for n in range(3)]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.BatchNorm2d(40), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4),
    )  # fmt: skip


def _left(model: nn.Module) -> float:
    """A measure that falls with every removal: the weights that are left, in hundreds."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(int((w != 0).sum()) for w in weights) / 100


def _values(function: Any, **options: Any) -> list[float]:
    """The measure before and after every round, where nothing stops the run."""
    run = function(_net(), BATCHES, val_data=Evaluate(_left, every="round"), **options)
    return [_left(_net()), *(row["values"]["_left"] for row in run.history.select("evaluated"))]


class Copies(Callback):
    """A copy of the network after every round or layer."""

    def __init__(self) -> None:
        self.found: list[nn.Module] = []

    def on_model(self, model: nn.Module) -> None:
        self.model = model

    def on_round_done(self, event: RoundDone) -> None:
        self.found.append(copy.deepcopy(self.model))

    def on_layer_done(self, event: LayerDone) -> None:
        self.found.append(copy.deepcopy(self.model))


def _same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_users_own_numbers_are_in_the_result_its_summary_and_report(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def judged(model: nn.Module) -> dict[str, Any]:
        seen.append((model.training, torch.is_grad_enabled()))
        model.train()  # what it does to the modes and the statistics is put back
        model(BATCHES[0][0])
        return {"mAP": torch.tensor(0.5), "width": model[0].out_channels}  # type: ignore[index, union-attr]

    net = _net()
    result = prune(net, BATCHES, target="params=0.5", finetune=0, val_data=judged, out_dir=tmp_path)
    assert seen == [(False, False)] * 2
    assert result.before.measured == {"mAP": 0.5, "width": 40.0}
    width = float(result.model[0].out_channels)
    assert result.after.measured == {"mAP": 0.5, "width": width}
    assert int(result.model[1].num_batches_tracked) == 0
    assert result.after.accuracy is None
    assert f"{width:.4g}" in next(line for line in result.summary().splitlines() if line.startswith("width"))
    folder = singe_plugin.save(result, tmp_path, builder=Builder.factory("test_watch:_net"))
    assert singe_plugin.load(folder, factory=_net).after.measured == result.after.measured
    write_report(result, folder)
    rows = [[cell.strip() for cell in line.split("|")] for line in (folder / "report.md").read_text().splitlines()]
    assert ["", "width", "40", f"{width:.4g}", f"{width - 40:+.4g}", ""] in rows


@pytest.mark.parametrize("every", ["round", "end"])
def test_every_round_is_judged_as_it_is_then(every: str) -> None:
    copies = Copies()
    judge = Evaluate(_left, every=every)
    result = prune(
        _net(), BATCHES, target="params=0.6", pace=Pace(rounds=3), finetune=FineTune(steps=6, every="layer"),
        val_data=judge, callbacks=[copies],
    )  # fmt: skip
    found = [row["values"]["_left"] for row in result.history.select("evaluated")]
    assert found == ([_left(net) for net in copies.found[:3]] if every == "round" else [])
    assert result.stopped is None


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "rounds": (prune, {"target": "params=0.6", "pace": Pace(rounds=4), "finetune": 0}, 4),
    "rounds and fine-tuning in between": (
        prune, {"target": "params=0.6", "pace": Pace(rounds=4), "finetune": FineTune(steps=8, every="layer")}, 4,
    ),
    "layers": (prune, {"target": "params=0.5", "pace": Pace("layers"), "finetune": FineTune(steps=4)}, 2),
    "single weights": (
        prune_weights, {"sparsity": 0.6, "pace": Pace(rounds=4), "finetune": FineTune(steps=8, every="layer")}, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_a_round_that_is_too_bad_is_undone(case: str) -> None:
    function, options, rounds = CASES[case]
    options = options | {"repair": None}
    copies = Copies()
    whole = function(_net(), BATCHES, val_data=Evaluate(_left, every="round"), callbacks=[copies], **options)
    values = _values(function, **options)
    assert len(values) == rounds + 1
    last = rounds - 1  # the round after which it is too bad
    drop = values[0] - (values[last] + values[last + 1]) / 2
    net = _net()
    optimizer = None if not isinstance(options["finetune"], FineTune) else torch.optim.SGD(net.parameters(), 0.03)
    if optimizer is not None:
        options["finetune"] = FineTune(steps=options["finetune"].steps, every="layer", optimizer=optimizer)
        copies = Copies()
        twin = _net()
        other = torch.optim.SGD(twin.parameters(), 0.03)
        again = options | {"finetune": FineTune(steps=options["finetune"].steps, every="layer", optimizer=other)}
        function(twin, BATCHES, val_data=Evaluate(_left, every="round"), callbacks=[copies], **again)
    result = function(net, BATCHES, val_data=Evaluate(_left, max_drop=drop), **options)
    assert "_left went from" in str(result.stopped)
    assert "stopped: _left" in result.summary()
    if function is prune:
        assert _same(result.model, copies.found[last - 1])
        kept = whole.history.removals()
        gone = result.history.removals()
        assert {k: v[: len(gone[k])] for k, v in kept.items() if k in gone} == gone or optimizer is not None
        assert sum(map(len, gone.values())) == sum(r.units_before - r.units_after for r in result.layers)
    else:
        assert _left(result.model) == values[last]
        assert sum(r.units_after for r in result.layers) == sum(
            int(mask.sum()) for mask in result.weight_masks.values()
        )
    assert [row["event"] for row in result.history.rows].count("evaluated") == rounds
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in net.parameters()} <= held
    net(BATCHES[0][0]).sum().backward()


def test_the_repair_and_the_fine_tuning_at_the_end_still_happen() -> None:
    options: dict[str, Any] = {"target": "params=0.6", "pace": Pace(rounds=4), "repair": singe_plugin.Repair(24)}
    values = _values(prune, finetune=0, **options)
    assert values[3] > values[4]
    judge = Evaluate(_left, max_drop=values[0] - values[3])
    result = prune(_net(), BATCHES, finetune=5, val_data=judge, **options)
    assert result.stopped is not None
    assert _left(result.model) == values[3]
    assert len(result.history.select("repaired")) == 1
    assert len(result.history.select("finetune_step")) == 5
    # without a word on the repair, it is in every round that the network is judged
    usual = prune(_net(), BATCHES, target="params=0.6", pace=Pace(rounds=4), finetune=0, val_data=judge)
    assert usual.options["repair"]["every"] == "round"


def test_the_first_round_can_be_undone() -> None:
    net, twin = _net(), _net()
    result = prune(net, BATCHES, target="params=0.5", finetune=0, repair=None, val_data=Evaluate(_left, max_drop=0))
    assert result.stopped is not None
    assert _same(net, twin)
    assert (result.removed_params, result.history.removals()) == (0.0, {})


def test_a_stopped_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_finetune_step(self, event: Any) -> None:
            if event.step == 3:
                raise Killed

    options: dict[str, Any] = {"target": "params=0.6", "pace": Pace(rounds=4), "finetune": 5}
    values = _values(prune, **options)
    options["val_data"] = Evaluate(_left, max_drop=values[0] - values[2])
    whole = prune(_net(), BATCHES, **options)
    with pytest.raises(Killed):
        prune(_net(), BATCHES, out_dir=tmp_path, callbacks=[Kill()], **options)
    result = prune(_net(), BATCHES, out_dir=tmp_path, resume=True, **options)
    assert result.stopped == whole.stopped
    assert result.stopped is not None
    assert _same(result.model, whole.model)


def test_an_error_is_lower_and_better_and_one_number_of_several_is_named() -> None:
    def errors(model: nn.Module) -> dict[str, float]:
        return {"size": 1.0, "error": 10 - _left(model)}

    options: dict[str, Any] = {"target": "params=0.5", "finetune": 0, "repair": None}
    judge = Evaluate(errors, max_drop=1e-3, measure="error", lower_is_better=True)
    assert "error went from" in str(prune(_net(), BATCHES, val_data=judge, **options).stopped)
    judge = Evaluate(errors, max_drop=0.0)
    assert prune(_net(), BATCHES, val_data=judge, **options).stopped is None  # of the first, which stays
    judge = Evaluate(BATCHES, max_drop=1.0)
    result = prune(_net(), BATCHES, val_data=judge, **options)
    assert [set(row["values"]) for row in result.history.select("evaluated")] == [{"accuracy"}] * 4


def _fails(model: nn.Module) -> Tensor:
    raise KeyError("boxes")


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: Evaluate(_left, every="step"), ConfigError, "unknown every 'step'"),
        (lambda: Evaluate(_left, max_drop=-1), ConfigError, "max_drop=-1"),
        (lambda: Evaluate(None), ConfigError, "a dataset, batches, or a function"),
        (lambda: _fails, DataError, "_fails, failed with KeyError: 'boxes'"),
        (lambda: lambda model: "good", DataError, "returned 'good'; it returns a number"),
        (lambda: lambda model: {"a": [1]}, DataError, "a number, or a dictionary of numbers"),
        (lambda: Evaluate(_left, max_drop=1, measure="mAP"), ConfigError, "max_drop is of 'mAP', and what is measured"),
        (lambda: Evaluate(lambda m: float("nan"), max_drop=1), ConfigError, "max_drop is of"),
    ],
)
def test_what_cannot_be_judged_by_is_said_and_the_model_is_left_alone(make: Any, kind: Any, match: str) -> None:
    net, twin = _net(), _net()
    with pytest.raises(kind, match=match):
        prune(net, BATCHES, target="params=0.5", finetune=0, val_data=make())
    assert _same(net, twin)


def test_the_command_stops_too(tmp_path: Path) -> None:
    common = [
        *[
            "prune",
            "--model",
            "resnet18",
            "--in-chans",
            "1",
            "--num-classes",
            "10",
            "--img-size",
            "16",
            "--dataset",
            "digits",
        ]
    ]
    for part in ("layers=[1, 1, 1, 1]", "channels=[8, 16, 16, 16]"):
        common += ["--model-kwargs", part]
    common += [
        *["--target", "params=0.5", "--finetune-steps", "0", "--scoring-batch-size", "8", "--repair-images", "32"]
    ]
    common += ["--quiet", "--no-curves", "--output", str(tmp_path)]
    found = CliRunner().invoke(main, [*common, "--max-drop", "0.9", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["options"]["evaluate"]["max_drop"] == 0.9
    other = CliRunner().invoke(main, [*common, "--max-drop", "0.5", "--resume"])
    assert other.exit_code != 0
    assert "evaluate.max_drop was 0.9, now 0.5" in other.output
