"""Options in a file: what it may say, who wins, and the file that repeats a run bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from singe_plugin.app.cli import main
from singe_plugin.app.config import config_option, config_text, read_config
from singe_plugin.app.options import MODEL, OUTPUT, Sectioned, generated, objects, option
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace


def singe(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


SEEN: list[tuple[dict[str, Any], str]] = []


def _see(**options: Any) -> None:
    pace, finetune = objects(options, Pace, FineTune)
    SEEN.append(({"pace": pace, "finetune": finetune, **options}, config_text(click.get_current_context())))


def try_command() -> Sectioned:
    command = Sectioned("try", params=[], callback=_see)
    for decorate in (
        config_option(), generated(Pace, FineTune), option(OUTPUT, "--output"),
        option(MODEL, "--model", required=True), option(MODEL, "--pair", multiple=True),
        option(MODEL, "--fold", is_flag=True),
        option(MODEL, "--file", type=click.Path()), option(MODEL, "--pattern"), option(MODEL, "--count", type=int),
    ):  # fmt: skip
        command = decorate(command)
    return command


def given(path: Path, text: str, *arguments: str) -> tuple[dict[str, Any], str]:
    path.write_text(text)
    done = CliRunner().invoke(try_command(), ["--config", str(path), *arguments])
    assert done.exit_code == 0, done.output
    return SEEN[-1]


def test_every_kind_of_option(tmp_path: Path) -> None:
    text = """
        model: resnet18
        pair: {layers: [1, 1], stem: deep, names: [a, b], flag: true, empty: null}
        fold: yes
        pattern: 2:4              # a number to YAML 1.1
        ratios: {layer1: 0.25, layer2.0: 0.5}
        finetune_steps: 7         # with underscores, too
        clip-grad: none
        lr: 1e-3                  # a text to YAML 1.1
        distill: unpruned
    """
    found, _ = given(tmp_path / "run.yaml", text)
    assert found["pair"] == ("layers=[1, 1]", "stem=deep", "names=['a', 'b']", "flag=True", "empty=None")
    assert (found["model"], found["fold"], found["pattern"], found["count"]) == ("resnet18", True, "2:4", None)
    assert found["pace"] == Pace(ratios={"layer1": 0.25, "layer2.0": 0.5})
    assert found["finetune"] == FineTune(steps=7, clip_grad=None, lr=1e-3, distill="unpruned")
    assert given(tmp_path / "list.yaml", "model: m\npair: [a=1, b=2]")[0]["pair"] == ("a=1", "b=2")
    assert given(tmp_path / "empty.yaml", "# nothing\n", "--model", "m")[0]["finetune"] == FineTune()


def test_the_command_line_wins(tmp_path: Path) -> None:
    text = "model: resnet18\nfold: true\npair: [a=1]\nlr: 0.5\nclip-grad: 3\n"
    found, written = given(
        tmp_path / "run.yaml", text, "--no-fold", "--lr", "0.25", "--pair", "b=2", "--model", "vit", "--file", "x.pth"
    )
    assert (found["model"], found["fold"], found["pair"]) == ("vit", False, ("b=2",))
    assert found["finetune"] == FineTune(lr=0.25, clip_grad=3.0)
    assert yaml.load(written, yaml.BaseLoader) == {
        "model": "vit", "fold": "false", "pair": ["b=2"], "lr": "0.25", "clip-grad": "3",
        "file": str(Path.cwd() / "x.pth"),
    }  # fmt: skip


def test_what_is_written_says_the_same_again(tmp_path: Path) -> None:
    arguments = ["--model", "a: b # c", "--pair", "x=[1, 'é']", "--pair", "y=", "--fold", "--ratios", "a=0.5,b=0.25"]
    arguments += ["--pattern", "2:4", "--count", "0", "--amp", "none", "--finetune-steps", "0", "--output", "elsewhere"]
    assert CliRunner().invoke(try_command(), arguments).exit_code == 0
    first, written = SEEN[-1]
    assert "elsewhere" not in written
    again, twice = given(tmp_path / "again.yaml", written)
    assert {**first, "output": None} == again
    assert twice == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune-step: 3", "'finetune-step' is no option of 'singe try' (did you mean 'finetune-steps'?)"),
        ("config: other.yaml", "'config' is no option"),
        ("steps: 3", "'steps' is no option"),
        ("[1]: 3", "is no option"),
        ("lr: 1\nlr: 2", "says 'lr' twice"),
        ("clip-grad: 1\nclip_grad: 2", "says 'clip_grad' twice"),
        ("clip-grad:", "'clip-grad' has no value; leave it out, or write none"),
        ("pair: []", "'pair' has no value"),
        ("just text", "holds no options"),
        ("model: [", "cannot be read as YAML: while parsing"),
        ("count: 2.5", "'2.5' is not a valid integer"),
        ("fold: perhaps", "'perhaps' is not a valid boolean"),
        ("lr: -1", "lr=-1.0 is not a learning rate"),
    ],
)
def test_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    done = CliRunner().invoke(try_command(), ["--model", "m", "--config", str(tmp_path / "run.yaml")])
    assert done.exit_code == 2
    assert message in done.stderr
    with pytest.raises(click.UsageError, match=r"nowhere.yaml cannot be read as YAML: .*No such file"):
        read_config(tmp_path / "nowhere.yaml", try_command())


def test_a_runs_file_repeats_it_bit_for_bit(tmp_path: Path) -> None:
    shape = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
    arguments = ["--model", "resnet18", "--in-chans", 1, "--img-size", 16, "--dataset", "digits", "--device", "cpu"]
    arguments += [part for key, value in shape.items() for part in ("--model-kwargs", f"{key}={value}")]
    arguments += ["--target", "params=0.3", "--criterion", "l2", "--rounds", 2, "--finetune-steps", 3, "--seed", 3]
    arguments += ["--no-curves", "--lr", "0.02", "--amp", "none"]
    first = singe("prune", *arguments, "--output", tmp_path / "first", "--json")
    assert first.exit_code == 0, first.output
    kept = tmp_path / "first" / "config.yaml"
    assert str(kept) in json.loads(first.stdout)["files"]
    again = singe("prune", "--config", kept, "--output", tmp_path / "again", "--quiet")
    assert again.exit_code == 0, again.output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "again" / "config.yaml").read_text() == kept.read_text()
    other = singe(
        "prune", "--config", kept, "--output", tmp_path / "other", "--seed", 4, "--finetune-steps", 0, "--json"
    )
    options = json.loads(other.stdout)["options"]
    assert (options["seed"], options["finetune"]["steps"], options["target"]) == (4, 0, "params=0.3")
    wrong = singe("prune", "--config", kept, "--granularity", "weight", "--output", tmp_path / "wrong")
    assert wrong.exit_code == 2
    assert "--target is not for --granularity weight" in wrong.stderr


def test_a_run_that_goes_on_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", "resnet18", "--in-chans", 1, "--img-size", 16, "--dataset", "digits", "--device", "cpu"]
    arguments += [
        "--model-kwargs",
        "channels=[8, 8, 8, 8]",
        "--criterion",
        "l2",
        "--rounds",
        1,
        "--no-curves",
        "--no-repair",
    ]
    arguments += ["--output", tmp_path]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("singe_plugin.loop.tuner.Tuner.run", interrupt)
        assert singe("prune", *arguments, "--finetune-steps", 2).exit_code == 130
    kept = (tmp_path / "config.yaml").read_text()
    assert "finetune-steps: 2" in kept
    assert singe("prune", *arguments, "--finetune-steps", 3, "--resume").exit_code == 1
    assert (tmp_path / "config.yaml").read_text() == kept
    assert singe("prune", "--config", tmp_path / "config.yaml", "--output", tmp_path, "--resume").exit_code == 0
    assert (tmp_path / "config.yaml").read_text() == kept
