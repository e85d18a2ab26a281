"""A latency target: on a device whose times are written down here, so that what is reached can be worked out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import singe_plugin
from singe_plugin import BudgetError, ConfigError, Evaluate, LatencyTable, Pace, Target, Timing
from singe_plugin.app.report import write_report
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.run import latency

from written_device import Device, install, layer_ms, whole_ms

BATCHES = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(4)) for i in range(2)]


class Block(nn.Module):
    """A residual block with a narrow middle."""

    def __init__(self, width: int, middle: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, middle, 1), nn.Conv2d(middle, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


def net() -> nn.Module:
    torch.manual_seed(0)
    stem, last = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 96, 3)
    return nn.Sequential(stem, Block(64, 128), Block(64, 80), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(96, 10))  # fmt: skip


class Killed(Exception):
    """The power went."""


class KilledAfter(singe_plugin.Callback):
    """Ends a run when so many rounds are done."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def on_round_done(self, event: Any) -> None:
        if not self.left:
            raise Killed
        self.left -= 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return install(monkeypatch, 8)


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5])
@pytest.mark.parametrize("pace", [Pace(), Pace(rounds=1, ratios="uniform"), Pace("layers", ratios="block")])
def test_the_whole_network_is_as_much_faster_as_was_asked_for(device: Device, fraction: float, pace: Pace) -> None:
    result = singe_plugin.prune(net(), BATCHES, target=f"latency={fraction}", pace=pace, finetune=0, scoring="l2")
    assert 1 - whole_ms(result.model) / whole_ms(net()) == pytest.approx(fraction, abs=0.03)
    assert result.before.latency_ms == pytest.approx(whole_ms(net()))
    assert result.after.latency_ms == pytest.approx(whole_ms(result.model))
    assert "2 examples" in str(result.after.latency_conditions)
    assert "float32, written down" in result.summary()
    for row in result.layers:
        assert row.units_after == row.units_before or row.units_after % 8 == 0


def test_the_reports_say_what_was_measured(device: Device, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    target = Target.parse("latency=0.3", Timing(batch=7, threads=1))
    result = singe_plugin.prune(net(), BATCHES, target=target, finetune=0, scoring="l2")
    write_report(result, tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "7 examples, 1 thread, cpu, float32, written down" in text, name
        assert f"{result.after.latency_ms:.2f}" in text


def test_layers_are_timed_with_the_threads_that_were_asked_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen, spread = torch.get_num_threads() + 1, set(), device.spread

    def watched(*arguments: Any) -> dict[str, float]:
        seen.add(torch.get_num_threads())
        return spread(*arguments)

    monkeypatch.setattr(device, "spread", watched)
    target = Target.parse("latency=0.3", Timing(threads=asked))
    singe_plugin.prune(net(), BATCHES, target=target, finetune=0, scoring="l2")
    assert seen == {asked}


@pytest.mark.parametrize("step", [1, 4, 8, 16])
def test_the_step_that_a_device_likes_is_found(monkeypatch: pytest.MonkeyPatch, step: int, tmp_path: Path) -> None:
    install(monkeypatch, step)
    timing = Timing(table=tmp_path / "table.json")
    singe_plugin.prune(net(), BATCHES, target=Target.parse("latency=0.3", timing), finetune=0, scoring="l2")
    assert LatencyTable.load(tmp_path / "table.json").step in {1: (1, 4), 4: (4,), 8: (8,), 16: (16, 8)}[step]


def test_the_table_predicts_every_layer(device: Device, tmp_path: Path) -> None:
    timing = Timing(table=tmp_path / "table.json")
    singe_plugin.prune(net(), BATCHES, target=Target.parse("latency=0.3", timing), finetune=0, scoring="l2")
    table, model = LatencyTable.load(tmp_path / "table.json"), net()
    assert table.whole_ms == pytest.approx(whole_ms(model))
    for name, (a, b, c, d) in table.factors.items():
        conv = model.get_submodule(name)
        assert a + b + c + d == pytest.approx(layer_ms(conv, 8), rel=0.02)
        weight = conv.weight
        assert isinstance(weight, Tensor)
        if weight.shape[0] > 10 and weight.shape[1] > 3:
            half = nn.Conv2d(weight.shape[1] // 2, weight.shape[0] // 2, weight.shape[2:])  # type: ignore[arg-type]
            assert a + (b + c) / 2 + d / 4 == pytest.approx(layer_ms(half, 8), rel=0.1)


@pytest.mark.parametrize(
    "text", ["latency=0.3,params=0.5", "params=0.2,latency=0.4", "macs=0.4,latency=0.1,params=0.3"]
)
def test_several_targets_are_all_met_and_one_of_them_exactly(device: Device, text: str) -> None:
    first, example = net(), BATCHES[0][0][:1]
    model = singe_plugin.prune(net(), BATCHES, target=text, finetune=0, scoring="l2").model
    reached = {
        "params": 1 - count_params(model) / count_params(first),
        "macs": 1 - count_macs(model, example) / count_macs(first, example),
        "latency": 1 - whole_ms(model) / whole_ms(first),
    }
    over = {part.kind: reached[part.kind] - part.fraction for part in Target.parse(text).parts}
    assert all(more >= -0.03 for more in over.values()), over
    assert min(abs(more) for more in over.values()) <= 0.03, over


@pytest.mark.parametrize("text", ["macs=0.3,params=0.5", "params=0.3,macs=0.5"])
def test_targets_that_are_counted_are_met_together_to_the_point(text: str) -> None:
    first, example = net(), BATCHES[0][0][:1]
    model = singe_plugin.prune(net(), BATCHES, target=text, finetune=0, scoring="l2").model
    reached = {
        "params": 1 - count_params(model) / count_params(first),
        "macs": 1 - count_macs(model, example) / count_macs(first, example),
    }
    over = [reached[part.kind] - part.fraction for part in Target.parse(text).parts]
    assert min(over) == pytest.approx(0, abs=0.017)  # a point of the larger fraction


def test_units_are_ranked_by_what_they_cost_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one layer is slow, the units of this one go."""
    made = install(monkeypatch, 1)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def slow(model: nn.Module, name: str) -> float:
        return model.get_submodule(name).weight.numel() * (1.0 if name == "0" else 1e-6)  # type: ignore[union-attr,operator,return-value]

    monkeypatch.setattr(
        made, "spread", lambda model, inputs, layers, threads: {name: slow(model, name) for name in layers}
    )
    monkeypatch.setattr(
        made, "runner", lambda model, *_: lambda: setattr(
            made, "seconds", made.seconds + sum(slow(model, n) for n in "024") / 1000)
    )  # fmt: skip
    batches = [(torch.randn(4, 3), torch.arange(4))]
    result = singe_plugin.prune(model, batches, target="latency=0.5", finetune=0, scoring="l2")
    assert {row.name: row.units_after for row in result.layers} == {"0": 32, "2": 64}


def test_a_table_of_another_device_is_planned_by_and_nothing_is_timed(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phone.json"
    singe_plugin.prune(net(), BATCHES, target=Target.parse("latency=0.3", Timing(table=path)), finetune=0, scoring="l2")
    record = json.loads(path.read_text())
    record["about"]["device"] = "a phone"
    path.write_text(json.dumps(record))
    device.spreads = 0
    monkeypatch.setattr(device, "step", 1)  # whatever this device takes is of no account
    monkeypatch.setattr(
        latency.Stopwatch,
        "ratio",
        lambda *_: pytest.fail("the network was timed here"),  # pragma: no cover
    )
    with caplog.at_level(logging.WARNING, "singe_plugin"):
        result = singe_plugin.prune(
            net(), BATCHES, target=Target.parse("latency=0.3", Timing(table=LatencyTable.load(path))), finetune=0,
            scoring="l2",
        )  # fmt: skip
    assert "another device (a phone)" in caplog.text
    assert device.spreads == 0
    assert 1 - whole_ms(result.model, 8) / whole_ms(net(), 8) == pytest.approx(0.3, abs=0.04)


def test_a_run_that_goes_on_reads_the_table_of_its_folder(device: Device, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "latency=0.4", "finetune": 0, "scoring": "l2"}
    whole = singe_plugin.prune(net(), BATCHES, out_dir=tmp_path / "whole", **options)
    device.spreads = 0
    with pytest.raises(Killed):
        singe_plugin.prune(net(), BATCHES, out_dir=tmp_path / "killed", callbacks=[KilledAfter(2)], **options)
    spreads = device.spreads
    again = singe_plugin.prune(net(), BATCHES, out_dir=tmp_path / "killed", resume=True, **options)
    assert spreads
    assert device.spreads == spreads
    assert [row.units_after for row in again.layers] == [row.units_after for row in whole.layers]


def test_what_cannot_be_reached_is_refused_with_the_nearest(device: Device) -> None:
    model, pace = net(), Pace(max_pruning_ratio=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BudgetError, match=r"target latency=0.95 cannot be met within 3 points: .*latency=0\.\d{4}"):
        singe_plugin.prune(model, BATCHES, target="latency=0.95", finetune=0, scoring="l2", pace=pace)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["full"].pop("0"), "does not have layer '0'"),
        (lambda record: record["full"].update({"0": [3, 3]}), r"layer '0' is \(3, 3\), and here it is \(64, 3\)"),
        (lambda record: record.pop("whole_ms"), "is damaged"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(device: Device, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "table.json"
    target = Target.parse("latency=0.3", Timing(table=path))
    singe_plugin.prune(net(), BATCHES, target=target, finetune=0, scoring="l2")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(singe_plugin.SingeError, match=message):
        singe_plugin.prune(net(), BATCHES, target=target, finetune=0, scoring="l2")


@pytest.mark.parametrize(
    ("timing", "message"),
    [({"batch": 3}, r"inputs \[\[2, 3, 8, 8\]\], and \[\[3, 3, 8, 8\]\]"), ({"threads": 9}, "threads 1, and 9")],
)
def test_a_table_is_of_what_is_asked_for(device: Device, tmp_path: Path, timing: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.json"
    singe_plugin.prune(
        net(), BATCHES, target=Target.parse("latency=0.3", Timing(table=path, threads=1)), finetune=0, scoring="l2"
    )
    other = Target.parse("latency=0.3", Timing(table=path, **{"threads": 1, **timing}))
    with pytest.raises(ConfigError, match=message):
        singe_plugin.prune(net(), BATCHES, target=other, finetune=0, scoring="l2")


@pytest.mark.parametrize("text", ["latency=0.3,latency=0.5", "latency=1.5", "latency", "macs=0.5;params=0.3", ""])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="target"):
        Target.parse(text)


def test_targets_read_and_write_alike() -> None:
    for text in ("macs=0.5", "latency=0.3,params=0.5"):
        target = Target.parse(text)
        assert str(target) == text
        assert Target.parse(target) == target
        assert Target.parse(target, Timing(batch=3)) == replace(target, timing=Timing(batch=3))


def test_rounds_that_are_judged_can_be_undone(device: Device) -> None:
    accuracies = iter([0.9, 0.8, 0.1, 0.8, 0.8])
    result = singe_plugin.prune(
        net(), BATCHES, target="latency=0.5", finetune=0, scoring="l2",
        val_data=Evaluate(lambda _: next(accuracies), every="round", max_drop=0.3),
    )  # fmt: skip
    assert result.stopped is not None
    assert 0 < 1 - whole_ms(result.model) / whole_ms(net()) < 0.45
