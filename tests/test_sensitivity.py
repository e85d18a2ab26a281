"""Sensitivity: every point is that of a network masked by hand, the model is untouched, and ratios feed a pruning."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
from singe_plugin import Evaluate, Pace, Sensitivity
from singe_plugin.app.cli import main
from singe_plugin.app.datasets import data_config, digits
from singe_plugin.app.models import create_model
from singe_plugin.axes import Trackers, remove_units
from singe_plugin.errors import ArtifactError, ConfigError, DataError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.run.sensitivity import LayerSensitivity, SensitivityPoint

from masking import Masked
from references import randomise_norms
from small_nets import Chain, Residual, Trace, images, mlp, seeded, vectors

RATIOS = (0.25, 0.5, 0.8)


def relevance(group: Any) -> Tensor:
    """Scores that no weight decides: which unit goes first is known to the test."""
    count = len(group[0].idxs)
    return torch.tensor([float((7 * i + 3) % 11) + i / 100 for i in range(count)])


def first(units: int, count: int) -> list[int]:
    """The units that go first by :func:`relevance`, of as many."""
    return sorted(range(units), key=lambda i: float((7 * i + 3) % 11) + i / 100)[:count]


def literal(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """F and accuracy, example by example in double precision."""
    model = copy.deepcopy(model).eval().double()
    losses, right = [], []
    with torch.no_grad():
        for inputs, targets in batches:
            for x, y in zip(inputs, targets, strict=True):
                logits = model(x[None].double())[0]
                losses.append(float(torch.logsumexp(logits, 0) - logits[y]))
                right.append(float(logits.argmax() == y))
    return sum(losses) / len(losses), sum(right) / len(right)


def zeroed(model: nn.Module, names: list[str], units: list[int]) -> nn.Module:
    """A copy whose rows of some tensors are zero: what writes the units, norms included."""
    made = copy.deepcopy(model)
    tensors = dict(made.named_parameters())
    with torch.no_grad():
        for name in names:
            tensors[name][units] = 0.0
    return made


def agree(found: Sensitivity, layer: str, reference: Callable[[list[int]], nn.Module], batches: Any) -> None:
    """Every point of a layer is what the reference without the units that go first is worth."""
    row = next(row for row in found.layers if row.name == layer)
    assert [p.ratio for p in row.points] == list(RATIOS)
    for point in row.points:
        assert point.removed == round(row.units * point.ratio)
        loss, accuracy = literal(reference(first(row.units, point.removed)), batches)
        assert point.values["loss"] == pytest.approx(loss, rel=2e-5)
        assert point.values["accuracy"] == pytest.approx(accuracy)


def test_points_of_a_plain_network() -> None:
    batches, net = images(3, examples=7), randomise_norms(seeded(Chain))
    found = singe_plugin.sensitivity(net, batches, ratios=RATIOS, scoring=relevance, val_data=batches)
    assert [(row.name, row.units) for row in found.layers] == [("conv1", 8), ("conv2", 12), ("conv3", 8)]
    assert found.whole["loss"], found.whole["accuracy"] == pytest.approx(literal(net, batches))
    for k in (1, 2, 3):
        rows = [f"conv{k}.weight", f"bn{k}.weight", f"bn{k}.bias"]
        agree(found, f"conv{k}", lambda units, rows=rows: zeroed(net, rows, units), batches)


def test_points_of_a_residual_network() -> None:
    batches, net = images(2), randomise_norms(seeded(Residual))
    found = singe_plugin.sensitivity(net, batches, ratios=RATIOS, scoring=relevance, val_data=batches)
    assert [row.name for row in found.layers] == ["stem", "blocks.0.0", "blocks.1.0"]
    stream = [f"{layer}.{kind}" for layer in ("stem", "blocks.0.3", "blocks.1.3") for kind in ("weight", "bias")]
    agree(found, "stem", lambda units: zeroed(net, stream, units), batches)
    for k in (0, 1):
        inner = [f"blocks.{k}.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
        agree(found, f"blocks.{k}.0", lambda units, inner=inner: zeroed(net, inner, units), batches)


def vit() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (0.5 if parameter.ndim == 1 else 0)
    return net


def test_points_of_a_transformer() -> None:
    """Norms over the channels of the stream are taken over those that are left, as in the masked reference."""
    generator, net = torch.Generator().manual_seed(0), vit()
    batches = [(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4))]
    found = singe_plugin.sensitivity(net, batches, ratios=RATIOS, scoring=relevance)
    assert {row.name for row in found.layers} >= {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc1"}
    hidden = ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"]
    agree(found, "blocks.1.mlp.fc1", lambda units: zeroed(net, hidden, units), batches)
    for row in found.layers:
        if row.name == "blocks.1.mlp.fc1":
            continue
        for point in row.points:
            made = copy.deepcopy(net)
            reference = Masked(made)
            pruner = SInGEPruner(made, batches[0][0][:2], relevance)
            least = pruner.host().score([row.name])[row.name].argsort(stable=True)[: point.removed]
            remove_units(pruner.graph, pruner.graph.groups[row.name], least.tolist(), Trackers(emas=[reference.tags]))
            assert point.values["loss"] == pytest.approx(literal(reference.model(), batches)[0], rel=2e-5)


def test_the_readers_are_repaired_on_request() -> None:
    batches, net = images(4, examples=16), randomise_norms(seeded(Chain))
    plain = singe_plugin.sensitivity(net, batches, ratios=[0.5], scoring=relevance)
    mended = singe_plugin.sensitivity(net, batches, ratios=[0.5], scoring=relevance, repair=64)
    for before, after in zip(plain.layers, mended.layers, strict=True):
        smaller = copy.deepcopy(net)
        pruner = SInGEPruner(smaller, batches[0][0][:2], relevance)
        group = pruner.graph.groups[before.name]
        remove_units(pruner.graph, group, first(before.units, before.units // 2))
        kept = {before.name: group.left}
        singe_plugin.repair(smaller, net.eval(), [x for x, _ in batches], 64, kept=kept)
        assert after.points[0].removed == before.points[0].removed
        assert after.points[0].values["loss"] == pytest.approx(literal(smaller, batches)[0], rel=1e-4)
        assert after.points[0].values["loss"] != before.points[0].values["loss"]


@pytest.mark.parametrize("repair", [None, 16])
def test_the_model_is_untouched(repair: int | None) -> None:
    net = seeded(Chain).train()
    net.bn2.eval()
    net.conv1.weight.requires_grad_(False)
    net(images()[0][0]).sum().backward()
    trace = Trace(net)
    singe_plugin.sensitivity(net, images(), ratios=[0.5], repair=repair)
    trace.assert_unchanged()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
def test_the_model_is_untouched_by_a_failure(error: BaseException) -> None:
    net = seeded(Chain).train()
    trace, calls = Trace(net), []

    def judge(model: nn.Module) -> float:
        calls.append(model.conv1.out_channels)
        if len(calls) == 3:
            assert calls == [8, 6, 4]
            raise error
        return 1.0

    with pytest.raises((KeyboardInterrupt, DataError)):
        singe_plugin.sensitivity(net, images(), ratios=[0.25, 0.5], val_data=judge)
    trace.assert_unchanged()


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path, options = tmp_path / "s.json", {"ratios": RATIOS, "seed": 3}
    whole = singe_plugin.sensitivity(seeded(Chain), images(), **options)

    def stop(layer: str, point: SensitivityPoint, done: int, total: int) -> None:
        assert total == 9
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        singe_plugin.sensitivity(seeded(Chain), images(), path=path, on_point=stop, **options)
    part = Sensitivity.load(path)
    assert [len(row.points) for row in part.layers] == [3, 1, 0]
    assert not part.finished
    done: list[int] = []
    rest = singe_plugin.sensitivity(
        seeded(Chain), images(), path=path, resume=True, on_point=lambda *told: done.append(told[2]), **options
    )
    assert done == [5, 6, 7, 8, 9]
    assert rest == whole == Sensitivity.load(path)
    more = singe_plugin.sensitivity(seeded(Chain), images(), path=path, resume=True, ratios=[0.4], seed=3)
    assert [p.ratio for p in more.layers[2].points] == [0.25, 0.4, 0.5, 0.8]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": seeded(Chain, 1)}, "model"),
        ({"data": images(seed=1)}, "data"),
        ({"scoring": "l2"}, "scoring"),
        ({"repair": 16}, "repair"),
    ],
)
def test_another_run_is_not_continued(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "s.json"
    given = {"model": seeded(Chain), "data": images(), "ratios": [0.5], "path": path}
    singe_plugin.sensitivity(**given)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=rf"curves of another run \(.*{named}.* differ\); give another path"):
        singe_plugin.sensitivity(**given | change, resume=True)
    assert path.read_bytes() == before


def curves() -> Sensitivity:
    a = [(0.25, 2, 0.9, 1.0), (0.5, 4, 0.85, 1.2), (0.75, 6, 0.88, None)]
    b = [(0.25, 1, 0.5, 4.0), (0.5, 2, 0.4, 5.0)]
    rows = [
        LayerSensitivity(
            name, "block", units, tuple(SensitivityPoint(r, n, {"accuracy": x, "loss": y}) for r, n, x, y in p)
        )
        for name, units, p in (("a|a", 8, a), ("b", 4, b))
    ]
    return Sensitivity({"loss": 1.0, "accuracy": 0.9}, tuple(rows))


def test_ratios_are_the_largest_that_are_good_enough() -> None:
    found = curves()
    assert found.ratios(max_drop=0.0) == {"a|a": 0.25, "b": 0.0}
    assert found.ratios(max_drop=0.03) == {"a|a": 0.75, "b": 0.0}
    assert found.ratios(max_drop=0.4, measure="accuracy") == {"a|a": 0.75, "b": 0.25}
    assert found.ratios(max_drop=0.2, measure="loss") == {"a|a": 0.5, "b": 0.0}  # what is not finite is not good
    assert found.ratios(max_drop=9, measure="accuracy", lower_is_better=True) == {"a|a": 0.75, "b": 0.5}
    with pytest.raises(ConfigError, match="unknown measure 'mAP'; choose one of loss, accuracy"):
        found.ratios(measure="mAP")
    with pytest.raises(ConfigError, match="max_drop=-1"):
        found.ratios(max_drop=-1)


def test_table() -> None:
    lines = [line.replace(" ", "") for line in curves().table("loss").splitlines()]
    assert lines[0] == "|layer|units|25%|50%|75%|"
    assert lines[2:] == ["|a\\|a|8|1|1.2|notfinite|", "|b|4|4|5||"]
    assert "90.0 %" in curves().table()


def test_ratios_feed_a_pruning() -> None:
    net, batches = randomise_norms(seeded(Chain)), images()
    found = singe_plugin.sensitivity(net, batches, ratios=RATIOS)
    rises = sorted(p.values["loss"] - found.whole["loss"] for row in found.layers for p in row.points)
    wanted = found.ratios(max_drop=max(rises[4], 0.0), measure="loss")
    assert set(wanted) == {"conv1", "conv2", "conv3"}
    assert len(set(wanted.values())) > 1
    removed = {r.name: next((p.removed for p in r.points if p.ratio == wanted[r.name]), 0) for r in found.layers}
    pace = Pace(ratios=wanted, rounds=1, min_width=1)
    result = singe_plugin.prune(net, batches, target=None, pace=pace, finetune=0, repair=None)
    assert {row.name: row.units_before - row.units_after for row in result.layers} == removed


def test_a_function_judges_beside_the_loss() -> None:
    found = singe_plugin.sensitivity(
        seeded(mlp), vectors(), ratios=[0.5], val_data=lambda model: {"width": model[0].out_features}
    )
    assert found.whole["width"] == 16
    assert [row.points[0].values["width"] for row in found.layers] == [8, 16]
    assert found.ratios(max_drop=1, measure="width") == {"0": 0.0, "2": 0.5}


def test_an_objective_of_the_users_is_the_loss() -> None:
    net = seeded(mlp)
    batches = [(x, functional.one_hot(y, 3).float()) for x, y in vectors()]
    scoring = singe_plugin.Scoring(objective=functional.mse_loss)
    found = singe_plugin.sensitivity(net, batches, ratios=[0.5], scoring=scoring)
    expected = torch.stack([functional.mse_loss(net(x), y) for x, y in batches]).mean().detach()
    assert found.whole == {"loss": pytest.approx(float(expected), rel=1e-5)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratios": []}, "ratios is empty"),
        ({"ratios": [0.5, 1.0]}, r"inside \]0, 1\[, got 1.0"),
        ({"resume": True}, "resume=True needs path"),
        ({"val_data": Evaluate(len, max_drop=0.1)}, "give max_drop to Sensitivity.ratios"),
        ({"heads": "half"}, "unknown heads 'half'"),
    ],
)
def test_bad_arguments(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        singe_plugin.sensitivity(seeded(mlp), vectors(), **given)


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be read: .*run singe sensitivity first"):
        Sensitivity.load(tmp_path / "none.json")
    saved = curves().save(tmp_path / "s.json")
    assert Sensitivity.load(saved) == curves()
    saved.write_text(saved.read_text().replace("0.85", "0.86"))
    with pytest.raises(ArtifactError, match="is damaged"):
        Sensitivity.load(saved)


# -- the command --------------------------------------------------------------------------------------------------

SHAPE = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4}
ASKED = ["--model", "resnet18", "--in-chans", "1", "--img-size", "16", "--dataset", "digits", "--no-verify"]
ASKED += [part for key, value in SHAPE.items() for part in ("--model-kwargs", f"{key}={value}")]
ASKED += ["--images", "60", "--criterion", "l2", "--device", "cpu"]


def test_the_command(tmp_path: Path) -> None:
    arguments = ["sensitivity", *ASKED, "--ratios", "0.5", "--output", str(tmp_path), "--json"]
    said = CliRunner().invoke(main, arguments)
    assert said.exit_code == 0, said.stderr
    assert "note: the weights are random" in said.stderr
    assert "judged on 60 validation images of digits" in said.stderr
    found, values = Sensitivity.load(tmp_path / "sensitivity.json"), json.loads(said.stdout)
    assert {k: values[k] for k in found.as_dict()} == json.loads(json.dumps(found.as_dict()))
    assert values["ratios"] == found.ratios(0.01)
    assert [Path(f).name for f in values["files"]] == ["sensitivity.json", "sensitivity.html"]
    net = create_model("resnet18", num_classes=10, in_chans=1, kwargs=SHAPE).model
    splits = digits(data_config(net, 16))
    chosen = sorted(torch.randperm(len(splits.val), generator=torch.Generator().manual_seed(0))[:60].tolist())
    batch = torch.stack([splits.val[i][0] for i in chosen]), torch.tensor([int(splits.val[i][1]) for i in chosen])
    loss, accuracy = literal(net, [batch])
    assert found.whole == {"loss": pytest.approx(loss, rel=1e-5), "accuracy": pytest.approx(accuracy)}
    assert "singe sensitivity --model resnet18" in (tmp_path / "sensitivity.html").read_text()
    more = CliRunner().invoke(main, [*arguments[:-1], "--resume", "--ratios", "0.25", "--max-drop", "0.5", "-q"])
    assert (more.exit_code, more.output) == (0, "")
    again = Sensitivity.load(tmp_path / "sensitivity.json")
    assert again.ratios_asked == [0.25, 0.5]
    assert [row.points[1] for row in again.layers] == [row.points[0] for row in found.layers]


def test_an_unfinished_run_is_not_overwritten_by_the_command(tmp_path: Path) -> None:
    replace(curves(), finished=False).save(tmp_path / "sensitivity.json")
    before = (tmp_path / "sensitivity.json").read_bytes()
    said = CliRunner().invoke(main, ["sensitivity", *ASKED, "--output", str(tmp_path)])
    assert said.exit_code == 1
    assert "is unfinished; give --resume to continue" in said.stderr
    other = CliRunner().invoke(main, ["sensitivity", *ASKED, "--output", str(tmp_path), "--resume"])
    assert other.exit_code == 1
    assert "holds curves of another run" in other.stderr
    assert (tmp_path / "sensitivity.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--ratios", "half"], "no list of fractions"), (["--max-drop", "-1"], "is not in the range")],
)
def test_wrong_usage_of_the_command(given: list[str], said: str) -> None:
    found = CliRunner().invoke(main, ["sensitivity", *ASKED, *given])
    assert found.exit_code == 2
    assert said in found.stderr
