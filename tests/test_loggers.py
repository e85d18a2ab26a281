"""What TensorBoard and Weights & Biases get is what the run's history has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import singe_plugin
from singe_plugin.app.cli import main
from singe_plugin.errors import ConfigError, MissingPackageError
from singe_plugin.integrations.loggers import LOGGERS, Logger, TensorBoardLogger, WandbLogger, make_logger
from singe_plugin.loop.pace import Pace


class Run:
    """What a run of wandb is asked."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


def prune(pace: Pace, loggers: list[Logger]) -> singe_plugin.Result:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
    return singe_plugin.prune(
        net, batches, target="macs=0.5", pace=pace, finetune=4, repair=16, callbacks=loggers,
        val_data=singe_plugin.Evaluate(batches, every="round"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[singe_plugin.Result, Path, Run]:
    pytest.importorskip("tensorboard")
    folder, run = tmp_path_factory.mktemp("board"), Run()
    board = TensorBoardLogger(folder)
    result = prune(Pace(rounds=2), [board, WandbLogger(run)])
    board.close()
    return result, folder, run


def expected(result: singe_plugin.Result) -> dict[str, list[tuple[int, float]]]:
    """Name -> where and what, from the history."""
    steps, rounds = result.history.select("finetune_step"), result.history.select("round_done")
    found = {f"finetune/{name}": [(row["step"], row[name]) for row in steps] for name in ("loss", "lr")}
    found |= {f"round/{name}": [(row["round"], row[name]) for row in rounds] for name in ("removed", "left")}
    for kind in ("units", "params", "macs"):
        found[f"round/share_{kind}"] = [(row["round"], row["shares"][kind]) for row in rounds]
    judged = result.history.select("evaluated")
    found["evaluation/accuracy"] = [(i + 1, row["values"]["accuracy"]) for i, row in enumerate(judged)]
    (repaired,) = result.history.select("repaired")
    found["seconds/repair"] = [(1, 0.0), (2, repaired["seconds"])]
    for name in ("params", "macs", "accuracy", "size_bytes"):
        found[f"measured/{name}"] = [(0, getattr(result.before, name)), (1, getattr(result.after, name))]
    for name in ("latency_ms", "latency_iqr_ms"):  # of both networks in turn, in the end
        found[f"measured/{name}"] = [(1, getattr(result.after, name))]
    found["measured/seconds"] = [(1, result.history.select("run_end")[0]["seconds"])]
    return found


def test_tensorboard_reads_what_happened(logged: tuple[singe_plugin.Result, Path, Run]) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, folder, _ = logged
    board = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name, points in expected(result).items():
        assert [event.step for event in board.Scalars(name)] == [step for step, _ in points], name
        assert [event.value for event in board.Scalars(name)] == pytest.approx([v for _, v in points], rel=1e-6), name
    seconds = sum(event.value for event in board.Scalars("seconds/scoring"))
    assert seconds == pytest.approx(sum(row["seconds"] for row in result.history.select("layer_scored")), rel=1e-5)


def test_wandb_gets_the_same_along_its_axes(logged: tuple[singe_plugin.Result, Path, Run]) -> None:
    result, _, run = logged
    for name, points in expected(result).items():
        axis = run.axes[f"{name.split('/')[0]}/*"]
        assert [(row[axis], row[name]) for row in run.rows if name in row] == points, name
    assert not run.finished  # it is the caller's


def test_layer_by_layer() -> None:
    run = Run()
    result = prune(Pace("layers", units_per_step=4), [WandbLogger(run)])
    rows = [row for row in run.rows if "layer/params" in row]
    done = result.history.select("layer_done")
    assert [(row["layer"], row["layer/params"]) for row in rows] == [(i + 1, r["params"]) for i, r in enumerate(done)]
    removed = sum(len(row["units"]) for row in result.history.select("removed"))
    assert sum(row["layer/removed"] for row in rows) == removed
    assert rows[-1]["layer/share_macs"] == result.after.macs / result.before.macs


def test_missing_packages_and_a_run_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingPackageError, match="pip install tensorboard"):
        make_logger("tensorboard", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="pip install wandb"):
        make_logger("wandb", tmp_path, {})

    class Module:
        given: dict[str, Any]

        def init(self, **options: Any) -> Run:
            self.given = options
            if "dir" not in options:
                raise OSError("api_key not configured")
            return Run()

    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    logger = make_logger("wandb", tmp_path, {"model": "resnet18"})
    assert isinstance(logger, WandbLogger)
    assert module.given == {"dir": str(tmp_path), "config": {"model": "resnet18"}}
    logger.close()
    assert logger.run.finished
    with pytest.raises(ConfigError, match=r"cannot begin a run \(OSError: api_key.*WANDB_MODE=offline"):
        WandbLogger(project="x")


def test_from_the_shell(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["prune", "--model", "resnet18", "--in-chans", "1", "--img-size", "16", "--dataset", "digits"]
    arguments += ["--model-kwargs", "channels=[8, 8, 8, 8]", "--criterion", "l2", "--rounds", "1", "--no-curves"]
    arguments += ["--finetune-steps", "2", "--device", "cpu", "--no-repair", "-q", "--log", "tensorboard"]
    done = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(board.Scalars("finetune/loss")) == 2
    wrong = CliRunner().invoke(main, ["prune", "--log", "nowhere"])
    assert (wrong.exit_code, "'nowhere' is not one of" in wrong.stderr) == (2, True)
    for name in LOGGERS:
        assert f"'{name}'" in wrong.stderr
