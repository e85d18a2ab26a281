"""The command line: values, exit codes, one-line errors, and kill -9 followed by --resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.app.cli import main
from singe_plugin.app.datasets import data_config, digits
from singe_plugin.app.models import create_model, parse_pairs
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.run.data import evaluate

SHAPE = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}
MODEL = ["--model", "resnet18", "--in-chans", "1", "--num-classes", "10", "--img-size", "16"]
MODEL += [part for key, value in SHAPE.items() for part in ("--model-kwargs", f"{key}={value}")]
DIGITS = ["--dataset", "digits"]
FAST = ["--nodes", "2", "--units-per-step", "0.5", "--device", "cpu", "--target", "params=0.5"]


def singe(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def failed(result: Result, *parts: str) -> None:
    """Exit code 1, one line on stderr that says all of ``parts``, nothing on stdout."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One pruned network for several tests: its folder and what --json said."""
    output = tmp_path_factory.mktemp("cli") / "out"
    result = singe("prune", *MODEL, *DIGITS, *FAST, "--finetune-steps", 6, "--json", "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "note: the weights are random" in result.stderr
    return output, json.loads(result.stdout)


def test_help_is_there_for_every_command() -> None:
    for command in ([], ["demo"], ["prune"], ["inspect"], ["report"]):
        result = singe(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert singe("--version").output.strip().endswith(singe_plugin.__version__)


def test_prune_says_what_is_true_of_the_saved_model(pruned: tuple[Path, dict[str, Any]]) -> None:
    output, said = pruned
    result = singe_plugin.load(output)
    original = create_model("resnet18", num_classes=10, in_chans=1, kwargs=SHAPE).model
    splits = digits(data_config(original, 16))
    example = splits.train[0][0][None]
    for model, numbers in ((original, said["before"]), (result.model, said["after"])):
        assert numbers["params"] == count_params(model)
        assert numbers["macs"] == count_macs(model, example)
        assert numbers["accuracy"] == evaluate(model, DataLoader(splits.val, batch_size=100))
        assert numbers["latency_ms"] > 0
    assert said["removed_params"] == pytest.approx(1 - count_params(result.model) / count_params(original))
    assert abs(said["removed_params"] - 0.5) <= 0.01
    widths = {name: m.out_channels for name, m in result.model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {row["name"]: row["units_after"] for row in said["layers"]}.items() <= widths.items()
    assert said["left_whole"] == {"fc": "it reaches the model's output"}
    assert said["weights"] == "random"
    assert said["options"]["scoring"]["nodes"] == 2
    for file in said["files"]:
        assert Path(file).stat().st_size > 0
    assert {"report.md", "report.html", "report.json", "units.png", "gradients.png"} <= {
        Path(f).name for f in said["files"]
    }


def test_report_rewrites_the_same_report(pruned: tuple[Path, dict[str, Any]]) -> None:
    output, said = pruned
    before = {name: (output / name).read_text() for name in ("report.md", "report.json")}
    for name in before:
        text = (output / name).read_text()
        assert "random" in text
    (output / "report.md").unlink()
    result = singe("report", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert {k: v for k, v in json.loads(result.stdout).items() if k != "files"} == {
        k: v for k, v in said.items() if k != "files"
    }
    assert {name: (output / name).read_text() for name in before} == before
    shown = singe("report", output)
    assert f"{said['after']['params']:,}" in shown.stdout
    assert singe("report", output, "--quiet").output == ""


def test_report_survives_without_report_json(pruned: tuple[Path, dict[str, Any]]) -> None:
    output, _ = pruned
    text = (output / "report.json").read_text()
    (output / "report.json").unlink()
    assert singe("report", output).exit_code == 0
    (output / "report.json").write_text(text)


def test_inspect_counts_what_prune_does(pruned: tuple[Path, dict[str, Any]]) -> None:
    _, said = pruned
    result = singe("inspect", *MODEL, *FAST, "--finetune-steps", 6, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(g["name"], g["units"]) for g in found["groups"]] == [
        (r["name"], r["units_before"]) for r in said["layers"]
    ]
    assert (found["params"], found["macs"]) == (said["before"]["params"], said["before"]["macs"])
    assert found["left_whole"] == said["left_whole"]
    assert found["cost"]["units_removed"] == said["history"]["units_removed"]
    assert found["cost"]["scorings"] == said["history"]["scorings"]
    assert found["cost"]["scoring_passes"] == 2 * said["history"]["scorings"]
    assert found["cost"]["probing_passes"] == 1  # FAST goes layer by layer; no two groups have a layer in common
    assert found["cost"]["total_passes"] == found["cost"]["scoring_passes"] + 1 + 6
    first = next(g for g in found["groups"] if g["name"] == "layer1.0.conv1")
    assert first["producers"] == ["layer1.0.conv1"]
    # 8 filters of 3x3x8, their batch-norm, and the 3x3x8x8 weights of the convolution that reads them
    assert first["params"] == 8 * 8 * 9 + 2 * 8 + 8 * 8 * 9


def test_inspect_neuron_path_and_text() -> None:
    result = singe("inspect", *MODEL, "--path", "neuron", "--units-per-step", "layer", "--min-width", 1, "--json")
    found = json.loads(result.stdout)
    assert found["cost"]["scoring_passes"] == 5 * sum(g["units"] for g in found["groups"])
    text = singe("inspect", *MODEL, "--ratios", "global").stdout
    assert "random weights" in text
    assert "left whole:\n  fc: it reaches the model's output" in text
    assert "fine-tuning steps" in text


def test_ratios_per_layer_need_no_target() -> None:
    """Nor does a target that is none of the ratios' business get in their way."""
    found = json.loads(singe("inspect", *MODEL, "--ratios", "layer1.0.conv1=0.5", "--json").stdout)
    assert found["cost"] is not None, found["problem"]
    (units,) = [g["units"] for g in found["groups"] if g["name"] == "layer1.0.conv1"]
    assert found["cost"]["units_removed"] == units // 2
    assert found["options"]["target"] is None
    both = singe("inspect", *MODEL, "--ratios", "layer1.0.conv1=0.5", "--target", "params=0.5", "--json")
    assert "target=None" in json.loads(both.stdout)["problem"]
    text = singe("inspect", *MODEL, "--target", "none", "--ratios", "layer1.0.conv1=0.5", "--rounds", "3").stdout
    assert "no target in 3 rounds, ratios={'layer1.0.conv1': 0.5}:" in text


def test_inspect_says_what_cannot_be_reached() -> None:
    result = singe("inspect", *MODEL, "--target", "params=0.99", "--max-pruning-ratio", "0.3", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["cost"] is None
    assert "cannot be met" in found["problem"]
    text = singe("inspect", *MODEL, "--target", "macs=0.99", "--max-pruning-ratio", "0.3").stdout
    assert "no cost for macs=0.99: target" in text


def test_checkpoint_folder_of_images_and_plain_text(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for i in range(6):
            image = Image.new("RGB", (20, 20), (40 * i, 10, 200 if label == "a" else 20))
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "images" / label / f"{i}.png")
    weights = timm.create_model("resnet18", num_classes=2, **SHAPE).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "weights.pth")
    save_file(weights, tmp_path / "weights.safetensors")
    shape = MODEL[MODEL.index("--model-kwargs") :]
    runs = []
    for file in ("weights.pth", "weights.safetensors"):
        output = tmp_path / file.replace(".", "-")
        result = singe(
            "prune", "--model", "resnet18", *shape, "--num-classes", 2, "--img-size", 32, "--data-dir",
            tmp_path / "images", "--checkpoint", tmp_path / file, *FAST, "--finetune-steps", 2, "--batch-size", 4,
            "--ratios", "layer4.0.conv1=0.5,layer3.0=0.25", "--target", "params=0.149", "--no-curves",
            "--output", output,
        )  # fmt: skip
        assert result.exit_code in (0, 1), result.output
        if result.exit_code == 1:
            failed(result, "cannot be met within one point", "params=")
            reached = float(result.stderr.split("remove params=")[1].split(";")[0])
            result = singe(
                "prune", "--model", "resnet18", *shape, "--num-classes", 2, "--img-size", 32, "--data-dir",
                tmp_path / "images", "--checkpoint", tmp_path / file, *FAST, "--finetune-steps", 2, "--batch-size", 4,
                "--ratios", "layer4.0.conv1=0.5,layer3.0=0.25", "--target", f"params={reached}", "--no-curves",
                "--output", output,
            )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[0].split() == ["before", "after", "change"]
        assert f"Weights: checkpoint {file}. Data: folder images." in (output / "report.md").read_text()
        runs.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    rows = {
        r["name"]: (r["units_before"], r["units_after"])
        for r in json.loads((output / "report.json").read_text())["layers"]
    }
    assert rows["layer4.0.conv1"] == (16, 8)
    assert rows["layer3.0.conv1"] == (16, 12)
    assert rows["layer2.0.conv1"] == (8, 8)


def _contents(output: Path) -> tuple[bytes, Any]:
    """The saved network's bytes, and its record without what depends on the clock."""
    record = json.loads((output / "singe.json").read_text())
    del record["checksum"]
    for when in ("before", "after"):
        del record[when]["latency_ms"], record[when]["latency_iqr_ms"], record[when]["latency_change"]
    record["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in record["history"]]
    return (output / "model.safetensors").read_bytes(), record


def test_kill_and_resume_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        return ["prune", *MODEL, *DIGITS, *FAST, "--finetune-steps", "30", "--quiet", "--output", str(tmp_path / name)]

    assert singe(*command("whole")).exit_code == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "singe_plugin.app.cli", *command("killed")], env=environment)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    written: set[int] = set()
    deadline = time.monotonic() + 120
    while len(written) < 2 and process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists():
            written.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert not (tmp_path / "killed" / "singe.json").exists()
    failed(singe(*command("killed")), "holds an unfinished run", "--resume", str(checkpoint))
    other = command("killed")
    failed(singe(*other, "--resume", "--lr", "0.5"), "written by a run with other options", "lr was 0.03, now 0.5")
    assert singe(*other, "--resume").exit_code == 0
    assert _contents(tmp_path / "killed") == _contents(tmp_path / "whole")
    assert not checkpoint.exists()
    before = {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()}
    again = singe(*[part for part in other if part != "--quiet"], "--resume")  # it is finished: its result is shown
    assert again.exit_code == 0
    assert "is finished; this is its result" in again.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "killed").iterdir()} == before
    failed(singe(*other, "--resume", "--lr", "0.5"), "finished run with other options", "lr was 0.03, now 0.5")


def test_interrupted_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("singe_plugin.loop.tuner.Tuner.run", interrupt)
    result = singe("prune", *MODEL, *DIGITS, *FAST, "--no-curves", "--output", tmp_path)
    assert result.exit_code == 130
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("interrupted; the same command with --resume continues")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model", "resnet81"], ["no model 'resnet81'", "did you mean 'resnet"]),
        (["--model", "resnet18", "--model-kwargs", "layers"], ["'layers' is not of the form key=value"]),
        (["--model", "resnet18", "--model-kwargs", "colour=red"], ["timm cannot make 'resnet18'", "colour"]),
        (["--model", "resnet18", "--pretrained", "--checkpoint", "x.pth"], ["choose one"]),
        (["--model", "resnet18", "--checkpoint", "nowhere.pth"], ["nowhere.pth does not exist"]),
        ([*MODEL, "--dataset", "imagenet"], ["unknown dataset 'imagenet'"]),
        ([*MODEL, "--data-dir", "nowhere"], ["nowhere is not a folder"]),
        ([*MODEL, "--num-classes", "7"], ["has 7 classes", "has 10", "--num-classes 10"]),
        ([*MODEL, "--target", "half"], ["target='half' is not a target"]),
        ([*MODEL, "--target", "params=0.99", "--max-pruning-ratio", "0.2"], ["cannot be met within one point"]),
        ([*MODEL, "--device", "nonsense"], ["device='nonsense' is not a device"]),
        ([*MODEL, "--ratios", "nolayer=0.5"], ["nolayer"]),
    ],
)
def test_errors_of_prune(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    data = [] if "--data-dir" in arguments else DIGITS
    failed(singe("prune", *data, *arguments, "--no-curves", "--quiet", "--output", tmp_path / "out"), *parts)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["prune"], "Missing option '--model'"),
        (["prune", *MODEL], "there is no data: give what the model was trained on, --data-dir FOLDER"),
        (["prune", *MODEL, "--granularity", "weight"], "--dataset digits is for trying things out"),
        (["prune", *MODEL, *DIGITS, "--min-width", "0"], "min_width=0"),
        (["prune", *MODEL, *DIGITS, "--mu", "1.5"], "mu=1.5"),
        (["prune", *MODEL, *DIGITS, "--norm", "0.5"], "p=0.5"),
        (["prune", *MODEL, *DIGITS, "--lr", "-1"], "lr=-1"),
        (["prune", *MODEL, *DIGITS, "--criterion", "nonsense"], "nonsense"),
        (["prune", *MODEL, *DIGITS, "--units-per-step", "some"], "is not a number of units"),
        (["prune", *MODEL, *DIGITS, "--units-per-step", "0"], "units_per_step=0"),
        (["prune", *MODEL, *DIGITS, "--ratios", "some"], "NAME=RATIO"),
        (["prune", *MODEL, *DIGITS, "--in-chans", "4"], "'4' is not one of"),
        (["nonsense"], "No such command"),
        (["report"], "Missing argument"),
    ],
)
def test_wrong_usage(arguments: list[str], part: str) -> None:
    result = singe(*arguments)
    assert result.exit_code == 2
    assert part in result.stderr


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    weights = timm.create_model("resnet18", num_classes=10, in_chans=1, **SHAPE).state_dict()
    save_file({k: v for k, v in weights.items() if k != "fc.bias"}, tmp_path / "lacks.safetensors")
    save_file({**weights, "fc.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": Path("x")}, tmp_path / "pickle.pth")
    for file, parts in {
        "lacks.safetensors": ["1 tensors are missing", "it lacks 'fc.bias'"],
        "shape.safetensors": ["'fc.bias' has shape (3,), the model's is (10,)"],
        "damaged.safetensors": ["cannot be read as weights"],
        "list.pth": ["holds list"],
        "pickle.pth": ["cannot be read as weights"],
    }.items():
        failed(singe("inspect", *MODEL, "--checkpoint", tmp_path / file), file, *parts)


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.create_model", unreachable)
    failed(singe("inspect", "--model", "resnet18", "--pretrained"), "no route to host", "use --checkpoint FILE")


def test_report_of_a_folder_without_a_result(tmp_path: Path) -> None:
    failed(singe("report", tmp_path), "singe.json does not exist")


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed(singe("prune", *MODEL, *DIGITS, "--output", tmp_path / "file"), "cannot be used as an output folder")


def test_random_weights_follow_the_seed_and_leave_the_caller_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (create_model("resnet18", kwargs=SHAPE, seed=s).model.fc.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_pairs() -> None:
    assert parse_pairs(["a=1", "b=x=y", "c=None", "d=(1, 2)", "e="]) == {
        "a": 1,
        "b": "x=y",
        "c": None,
        "d": (1, 2),
        "e": "",
    }
