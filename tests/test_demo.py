"""``singe demo --quick``: the numbers of its table are those of the networks, and its files are all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.app.cli import main
from singe_plugin.app.datasets import data_config, digits
from singe_plugin.app.demo import HONESTY, METHODS, Demo, DemoRow, DemoSettings
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.run.data import evaluate


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    output = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(main, ["demo", "--quick", "--json", "--seed", "2", "--output", str(output)])
    assert result.exit_code == 0, result.stderr
    return output, json.loads(result.stdout), result.stderr


def test_numbers(demo: tuple[Path, dict[str, Any], str]) -> None:
    output, found, _ = demo
    builder = singe_plugin.load(output / "pruned").builder
    network = builder.build()
    network.load_state_dict(load_file(output / "trained.safetensors"))
    splits = digits(data_config(network, DemoSettings.quick().img_size), seed=2)
    validation = DataLoader(splits.val, batch_size=250)
    example = splits.train[0][0][None]
    saved = next(row for row in found["rows"] if row["method"] == "SInGE" and row["target"] == 0.5)
    for model, row in ((network, found["baseline"]), (singe_plugin.load(output / "pruned").model, saved)):
        assert row["params"] == count_params(model)
        assert row["macs"] == count_macs(model, example)
        assert row["accuracy"] == evaluate(model, validation)
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    for row in found["rows"]:  # one budget for all
        assert abs(1 - row["params"] / found["baseline"]["params"] - 0.5) <= 0.01
        assert 0 <= row["accuracy_pruned"] <= 1
        assert 0 <= row["accuracy_repaired"] <= 1
    assert found["reloaded_identically"] is True
    assert found["note"] == HONESTY


def test_files_and_words(demo: tuple[Path, dict[str, Any], str]) -> None:
    output, found, said = demo
    plots = {"units.png", "accuracy.png", "gradients.png"}
    names = {"report.md", "report.html", "report.json", *plots, "pruned", "trained.safetensors"}
    assert {Path(f).name for f in found["files"]} == names
    assert all(Path(f).exists() for f in found["files"])
    text = (output / "report.md").read_text()
    assert HONESTY.capitalize() in text
    page = (output / "report.html").read_text()
    assert HONESTY.capitalize() in page
    assert "singe demo --quick" in page
    for method in METHODS:
        assert f"{method}, -50%" in text
        assert f"{method}, -50%" in page
        assert method in said
    record = json.loads((output / "report.json").read_text())
    assert [len(panel["units"]) for panel in record["curves"]] == [5, 5]
    assert [p["accuracy"] for p in record["points"]] == [
        found["baseline"]["accuracy"],
        *(row["accuracy"] for row in found["rows"]),
    ]


def test_table() -> None:
    row = DemoRow("SInGE", 0.5, 1000, 2000, None, 0.25, 0.5, None)
    lines = Demo(DemoRow("unpruned", 0.0, 2000, 4000, 0.75, 0.75, 0.75, 1.5), [row]).table().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["unpruned", "2,000", "4,000", "75.0%", "75.0%", "75.0%", "1.50"]
    assert cells[3] == ["SInGE, -50%", "1,000", "2,000", "-", "25.0%", "50.0%", "-"]


def test_settings_are_fixed_and_quick_is_smaller() -> None:
    full, quick = DemoSettings(), DemoSettings.quick()
    assert 0.5 in full.targets
    assert 0.5 in quick.targets
    assert quick.train_steps < full.train_steps
