"""The report: its numbers are the result's, and it is written with and without matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from singe_plugin.app.curves import Curves, gradient_curves, history_summary
from singe_plugin.app.plots import Point
from singe_plugin.app.report import (
    Table,
    markdown,
    read_extras,
    report_data,
    write_report,
)
from singe_plugin.errors import ArtifactError
from singe_plugin.loop.events import History
from singe_plugin.method.units import Producer, Slot, UnitGroup
from singe_plugin.run.architecture import Builder
from singe_plugin.run.result import GroupRow, Metrics, Result
from singe_plugin.tables import markdown_table

POINTS = [Point("unpruned", 0.0, 0.9), Point("a", 0.5, 0.8), Point("a", 0.75, 0.6), Point("b", 0.5, 0.7)]
TABLE = Table("Others", ("", "x"), (("a", "1"), ("b", "2")))
CURVES = [Curves("conv", (0, 2), ((2.0, 1.0), (3.0, 1.5)), ((0.1, 0.2), (0.3, 0.1)))]


@pytest.fixture
def result() -> Result:
    history = History()
    history.rows = [
        {"event": "layer_scored", "layer": "a", "units": 8, "lowest": 0.1, "highest": 0.2, "seconds": 0.5},
        {"event": "removed", "layer": "a", "units": [1, 2], "left": 6},
        {"event": "layer_scored", "layer": "a", "units": 6, "lowest": 0.1, "highest": 0.2, "seconds": 0.25},
        {"event": "removed", "layer": "a", "units": [5], "left": 5},
        {"event": "finetune_step", "step": 1, "loss": 2.0, "lr": 0.1},
        {"event": "finetune_step", "step": 2, "loss": 1.5, "lr": 0.1},
        {"event": "layer_done", "layer": "a", "params": 60},
        {"event": "run_end", "params": 60, "seconds": 3.0},
    ]
    return Result(
        nn.Linear(1, 1),
        Metrics(100, 2000, 0.9, 4.0),
        Metrics(60, 1500, 0.85, 3.0),
        [GroupRow("a", "block", 8, 5), GroupRow("b|c", "block", 4, 4)],
        {"head": "it reaches the model's output"},
        history,
        {"target": "params=0.4", "mu": 0.9},
        {"torch": "1"},
        Builder.timm("resnet18", num_classes=3),
    )


def test_numbers(result: Result) -> None:
    data = report_data(result)
    assert data["removed_params"] == pytest.approx(0.4)
    assert data["removed_macs"] == pytest.approx(0.25)
    assert data["history"] == {
        "layers_pruned": 1,
        "scorings": 2,
        "seconds_scoring": 0.75,
        "units_removed": 3,
        "finetune_steps": 2,
        "first_loss": 2.0,
        "last_loss": 1.5,
        "seconds": 3.0,
    }
    assert data["layers"][0] == {"name": "a", "block": "block", "units_before": 8, "units_after": 5}
    assert data["builder"] == {"kind": "timm", "name": "resnet18", "options": {"num_classes": 3}}


def test_empty_history() -> None:
    assert history_summary(History())["last_loss"] is None


def test_markdown_says_everything(result: Result) -> None:
    text = markdown(report_data(result), ["units.png"], "Title", ["Hello."])
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert text.startswith("# Title\n\nHello.\n")
    assert "|parameters|100|60|-40.0%|" in lines
    assert "|MACs|2,000|1,500|-25.0%|" in lines
    assert "|top-1accuracy|90.00%|85.00%|-5.00points|" in lines
    assert "|latency(ms)|4.00|3.00|-25.0%|" in lines
    assert "|a|block|8|5|38%|" in lines
    assert "|b\\|c|block|4|4|0%|" in lines
    assert "- `head`: it reaches the model's output" in text
    assert "![units](units.png)" in text
    assert "|target|params=0.4|" in lines
    assert "|torch|1|" in lines
    assert "|scorings|2|" in lines


def test_markdown_without_what_was_not_measured(result: Result) -> None:
    result.before, result.after, result.left_whole = Metrics(10, 10), Metrics(5, 5), {}
    text = markdown(report_data(result))
    assert "accuracy" not in text
    assert "latency" not in text
    assert "## Left whole\n\nNothing." in text


def test_table_lines_up() -> None:
    lines = markdown_table(["name", "n"], [["a", 1], ["long name", 1000]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_files_and_round_trip(result: Result, tmp_path: Path) -> None:
    files = write_report(result, tmp_path / "out", POINTS, CURVES, "T", ["I."], [TABLE], {"data": "digits"})
    assert [f.name for f in files] == [
        "report.md", "report.html", "report.json", "units.png", "accuracy.png", "gradients.png",
    ]  # fmt: skip
    for file in files[3:]:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    record = json.loads(files[2].read_text())
    assert {k: record[k] for k in report_data(result)} == json.loads(json.dumps(report_data(result)))
    extras = read_extras(tmp_path / "out")
    assert extras == {
        "title": "T", "intro": ["I."], "tables": [TABLE], "points": POINTS, "curves": CURVES,
        "extra": {"data": "digits"},
    }  # fmt: skip
    before = [f.read_text() for f in files[:3]]
    write_report(result, tmp_path / "out", **extras)
    assert [f.read_text() for f in files[:3]] == before


def test_plots_leave_pyplot_alone(result: Result, tmp_path: Path) -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    write_report(result, tmp_path, POINTS, CURVES)
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_without_matplotlib(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    files = write_report(result, tmp_path, POINTS, CURVES)
    assert [f.name for f in files] == ["report.md", "report.json"]
    assert "No plots: matplotlib is not installed (`pip install matplotlib`)." in files[0].read_text()


def test_no_extras(tmp_path: Path) -> None:
    assert read_extras(tmp_path) == {}


def test_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"title": 1}')
    with pytest.raises(ArtifactError, match=r"report\.json is damaged .*delete it"):
        read_extras(tmp_path)


def test_unwritable_folder(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be used as an output folder"):
        write_report(result, tmp_path / "file")


def test_gradient_curves_are_the_gradients_along_the_path() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    rows = torch.arange(4)
    group = UnitGroup("first", 4, (Producer("0", (Slot(net[0], "weight"),), rows, rows),))
    batch = torch.randn(8, 3), torch.randint(0, 2, (8,))
    (curves,) = gradient_curves(net, [group], [batch], units=2, seed=1, mu=0.5)
    assert curves.layer == "first"
    assert len(set(curves.units)) == 2
    weight = net[0].weight.detach()
    for unit, norms, grads in zip(curves.units, curves.norms, curves.grads, strict=True):
        assert len(norms) == 8  # 0.5**7 is the first below 1 %
        for s, (norm, grad) in enumerate(zip(norms, grads, strict=True)):
            leaf = (weight * 0.5**s).requires_grad_()
            loss = functional.cross_entropy(net[2](torch.tanh(batch[0] @ leaf.T)), batch[1])
            (expected,) = torch.autograd.grad(loss, leaf)
            assert norm == pytest.approx(weight[unit].norm().item() * 0.5**s, rel=1e-5)
            assert grad == pytest.approx(expected[unit].norm().item(), rel=1e-4)
