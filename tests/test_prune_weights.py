"""``prune_weights`` and ``singe prune --granularity weight``: what they report is true, they repeat and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin import FineTune, Result, load, prune_weights
from singe_plugin.app.cli import main
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.integrations.unstructured import Pattern
from singe_plugin.run.checkpoint import CHECKPOINT

from asked import asked
from small_nets import Chain, Pairs, StopAt, Trace, assert_same_values, images, untimed

BATCHES = images(4)
FAST: dict[str, Any] = {"nodes": 2, "finetune_steps": 9}
ORDERS: dict[str, dict[str, Any]] = {"rounds": {"rounds": 3}, "layers": {"units_per_step": 0.4}}


def chain(**options: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(**options)


def assert_same_run(one: Result, other: Result) -> None:
    assert_same_values(one.model, other.model)
    assert_same_values(one.weight_masks, other.weight_masks)
    assert one.history.without_times() == other.history.without_times()
    assert untimed(one) == untimed(other)
    assert (one.layers, one.options) == (other.layers, other.options)


@pytest.mark.parametrize("form", ["list", "loader", "dataset", "mappings"])
def test_the_result_is_true_for_every_form_of_data(form: str) -> None:
    forms: dict[str, Any] = {
        "list": BATCHES,
        "loader": DataLoader(Pairs(BATCHES), batch_size=8, shuffle=True),
        "dataset": Pairs(BATCHES),
        "mappings": [{"x": x, "labels": y} for x, y in BATCHES],
    }
    model = chain().train()
    result = prune_weights(
        model, forms[form], **asked(val_data=forms[form], sparsity=0.7, ignored_layers=["fc"], rounds=3, **FAST)
    )
    assert result.model is model
    assert model.training
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    params = sum(p.numel() for p in model.parameters())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights = sum(m.weight.numel() for m in convs)
    kept = {n.rpartition(".")[0]: int(m.sum()) for n, m in result.weight_masks.items()}
    assert sum(kept.values()) == weights - round(0.7 * weights) == sum(int(m.weight.count_nonzero()) for m in convs)
    assert (result.before.params, result.before.nonzero) == (params, params)
    assert (result.after.params, result.after.nonzero) == (params, params - weights + sum(kept.values()))
    dense = weights * 36 + model.fc.weight.numel()
    assert result.before.macs == result.before.effective_macs == result.after.macs == dense
    assert result.after.effective_macs == sum(kept.values()) * 36 + model.fc.weight.numel()
    assert {row.name: row.units_after for row in result.layers} == kept
    assert result.weight_sparsity == pytest.approx(0.7, abs=1e-3)
    assert result.sparsity == pytest.approx(round(0.7 * weights) / params)
    assert result.left_whole == {"fc": "it is in ignored_layers"}
    assert result.options["granularity"] == "weight"
    for line in ("not masked", "effective MACs", "sparsity: 70."):
        assert line in result.summary()
    assert len(result.history.select("finetune_step")) == 9


def test_a_timm_model_with_folding_latency_and_a_pattern(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=4)
    data = [(torch.randn(4, 1, 32, 32), torch.arange(4))]
    result = prune_weights(model, data, **asked(pattern="2:4", fold=True, rounds=1, nodes=1, finetune_steps=2))
    assert result.weight_sparsity == 0.5
    assert result.structure["folded"]
    assert result.after.latency_ms is not None
    again = load(singe_plugin.save(result, tmp_path))
    assert_same_values(again.model, result.model)
    assert Pattern.parse(again.options["pattern"]) == Pattern(2, 4)


@pytest.mark.parametrize("order", ["rounds", "layers"])
@pytest.mark.parametrize("every", ["layer", "removal", "end"])
def test_an_interrupted_run_resumes_to_the_same_bits(every: str, order: str, tmp_path: Path) -> None:
    steps = 210 if every == "end" else 20

    def run(folder: Path | None, **options: Any) -> Result:
        loader = DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True)
        tuning = FineTune(loader, steps, every, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
        settings = ORDERS[order] | {"nodes": 1, "finetune": tuning, "sparsity": 0.8, "pattern": "2:4"}
        return prune_weights(chain(dropout=0.5), BATCHES, **asked(out_dir=folder, **settings, **options))

    whole = run(None)
    stops = {"layer": ("finetune_step", 15), "removal": ("removed", 5), "end": ("finetune_step", 205)}
    for stop in (stops[every], ("layer_scored", 1)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, resume=True, callbacks=[StopAt("finetune_step" if every == "end" else stop[0], stop[1])])
        if every == "end":
            break
    heard = StopAt("finetune_step", 10**9)
    resumed = run(tmp_path, resume=True, callbacks=[heard])
    assert_same_run(resumed, whole)
    assert 10**9 - heard.left < steps
    again = run(tmp_path, resume=True, callbacks=[StopAt("finetune_step", 1)])  # it is finished: nothing is done again
    assert_same_run(again, whole)
    with pytest.raises(ArtifactError, match=r"other options \(pace: pace.max_pruning_ratio was 1.0, now 0.9"):
        run(tmp_path, resume=True, max_pruning_ratio=0.9)


def test_two_runs_are_the_same() -> None:
    one, other = (prune_weights(chain(), BATCHES, **asked(sparsity=0.7, rounds=3, **FAST)) for _ in range(2))
    assert_same_run(one, other)


def test_what_is_not_said_is_ten_rounds_and_units_per_step_means_the_other_order() -> None:
    decided = {name: prune_weights(chain(), BATCHES, **asked(**FAST, **given)).options["pace"] for name, given in {
        "nothing": {}, "units": {"units_per_step": 0.5}, "order": {"order": "layers"},
    }.items()}  # fmt: skip
    named = ("order", "rounds", "units_per_step")
    assert [decided["nothing"][name] for name in named] == ["rounds", 10, None]
    assert [decided["units"][name] for name in named] == ["layers", 1, 0.5]
    assert [decided["order"][name] for name in named] == ["layers", 1, 0.1]


@pytest.mark.parametrize("place", [("removed", 5), ("finetune_step", 4), ("run_end", 1)])
def test_a_failure_leaves_the_model_as_it_was(place: tuple[str, int]) -> None:
    model = chain().train()
    trace = Trace(model)
    with pytest.raises(ValueError, match="mine"):
        prune_weights(
            model, BATCHES, **asked(callbacks=[StopAt(*place, ValueError("mine"))], fold=True, rounds=3, **FAST)
        )
    trace.assert_unchanged()
    for options in ({"sparsity": 2.0}, {"pattern": "5:7"}, {"rounds": 0}, {"criterion": "magic"}, {"seed": -1}):
        with pytest.raises(ConfigError):
            prune_weights(model, BATCHES, **asked(**options))
    trace.assert_unchanged()


# --- the command ------------------------------------------------------------------------------------------------

MODEL = ["--model", "resnet18", "--in-chans", "1", "--num-classes", "10", "--img-size", "16"]
MODEL += ["--model-kwargs", "layers=[1, 1, 1, 1]", "--model-kwargs", "channels=[8, 8, 16, 16]"]
MODEL += ["--model-kwargs", "stem_type=deep", "--model-kwargs", "stem_width=4", "--device", "cpu"]
WEIGHT = ["prune", *MODEL, "--dataset", "digits", "--granularity", "weight", "--nodes", "2", "--finetune-steps", "4"]
ROUNDS = ["--rounds", "2"]


def singe(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command(tmp_path: Path) -> None:
    result = singe(*WEIGHT, *ROUNDS, "--sparsity", "0.9", "--ignore", "fc", "--json", "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["weight_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert said["after"]["effective_macs"] < said["after"]["macs"] == said["before"]["macs"]
    assert said["options"]["scoring"]["mu"] == 0.8
    assert [Path(name).name for name in said["files"]] == [
        "report.md", "report.html", "report.json", "units.png", "model.safetensors", "masks.safetensors", "singe.json",
        "config.yaml",
    ]  # fmt: skip
    loaded = load(tmp_path)
    assert loaded.after.nonzero == said["after"]["nonzero"]
    assert sum(int(m.sum()) for m in loaded.weight_masks.values()) == sum(r["units_after"] for r in said["layers"])
    text = (tmp_path / "report.md").read_text()
    for line in ("effective MACs", "sparsity of the pruned layers", "weights before", "`fc`: it is in ignored_layers"):
        assert line in text
    assert not (tmp_path / CHECKPOINT).exists()  # the result is safe: there is nothing to resume
    shown = singe("report", tmp_path)
    assert "sparsity: 90.0" in shown.output


def test_the_repair_on_the_command_line(tmp_path: Path) -> None:
    for options, count in ((["--repair-images", "8"], 8), ([], 512), (["--no-repair"], None)):
        folder = tmp_path / str(count)
        arguments = [*WEIGHT, "--rounds", "1", "--finetune-every", "end", *options, "--json", "--output", folder]
        said = json.loads(singe(*arguments).stdout)
        assert (said["options"]["repair"] or {}).get("images") == count
        assert json.loads(singe(*arguments, "--resume").stdout)["options"] == said["options"]  # it is finished
    other = singe(
        *WEIGHT, "--rounds", "1", "--finetune-every", "end", "--resume", "--output", folder, "--repair-images", 9
    )
    assert "with other options (repair" in other.stderr


def test_patterns_and_ratios_on_the_command_line(tmp_path: Path) -> None:
    one = singe(*WEIGHT, "--pattern", "2:4", "--order", "layers", "--mu", "0.9", "--json", "--output", tmp_path / "a")
    said = json.loads(one.stdout)
    assert said["weight_sparsity"] == 0.5
    assert (said["options"]["scoring"]["mu"], said["options"]["pace"]["order"]) == (0.9, "layers")
    two = singe(
        *WEIGHT, *ROUNDS, "--ratios", "layer1=0.5,fc=0.9", "--course", "linear", "--json", "--output", tmp_path / "b"
    )
    assert {row["block"] for row in json.loads(two.stdout)["layers"]} == {"layer1.0", "fc"}
    wrong = singe(*WEIGHT, "--sparsity", "1.5", "--quiet", "--output", tmp_path / "c")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: sparsity=1.5 is not a fraction of weights")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--granularity", "weight", "--target", "params=0.5"], "--target is not for --granularity weight"),
        (["--granularity", "weight", "--no-verify"], "--no-verify is not for --granularity weight"),
        (["--sparsity", "0.5"], "--sparsity is not for --granularity unit"),
        (["--granularity", "unit", "--pattern", "2:4"], "--pattern is not for --granularity unit"),
        (["--granularity", "column"], "'column' is not one of"),
        (
            ["--granularity", "weight", "--ratios", "nonsense"],
            "neither one of uniform, block, global, per_cost nor NAME=RATIO",
        ),
    ],
)
def test_options_of_the_other_granularity(arguments: list[str], flag: str) -> None:
    result = singe("prune", *MODEL, "--dataset", "digits", *arguments)
    assert result.exit_code == 2
    assert flag in result.stderr


def test_a_fine_tuning_that_is_none_is_refused_as_in_prune() -> None:
    with pytest.raises(ConfigError, match="finetune must be a FineTune, or its steps, got str"):
        prune_weights(nn.Sequential(nn.Linear(4, 4)), [(torch.zeros(2, 4), torch.tensor([0, 1]))], finetune="no")
