"""Distillation in whole runs: the teacher is the network before pruning, the same in a resumed run, and goes again."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from singe_plugin import (
    Callback,
    Distill,
    FineTune,
    Pace,
    Recipe,
    Scoring,
    SInGEImportance,
    SInGEPruner,
    prune,
    prune_weights,
)  # fmt: skip
from singe_plugin.app import commands
from singe_plugin.app.cli import main
from singe_plugin.app.options import generated, objects
from singe_plugin.errors import ArtifactError, ConfigError, DataError, SingeError
from singe_plugin.loop import tuner as tuners
from singe_plugin.loop.distillation import Teacher
from singe_plugin.loop.events import FinetuneStep
from singe_plugin.loop.progress import Progress
from singe_plugin.run.checkpoint import CHECKPOINT

from asked import asked
from killed import assert_same_run
from references import Net
from small_nets import (
    CLASSES,
    Chain,
    Pairs,
    StopAt,
    Trace,
    assert_same_values,
    images,
    mlp,
    seeded,
    vectors,
)  # fmt: skip

DATA, IMAGES = vectors(3), images(3)
INPUTS = [x for x, _ in DATA]


def held(monkeypatch: pytest.MonkeyPatch) -> list[Teacher | None]:
    """The teachers that are found from now on."""
    found: list[Teacher | None] = []
    real = tuners.find_teacher

    def find(*arguments: Any) -> Teacher | None:
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(tuners, "find_teacher", find)
    return found


# --- the teacher ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_teacher_goes_back_into_its_modes() -> None:
    teacher = torch.jit.script(seeded(seed=1))
    teacher[1].eval()  # type: ignore[operator]
    modes = [module.training for module in teacher.modules()]
    prune(seeded(), DATA, target="params=0.5", finetune=FineTune(steps=2, distill=teacher))
    assert [module.training for module in teacher.modules()] == modes


def test_the_unpruned_network_is_copied_once_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    found, model, inside = held(monkeypatch), seeded(), []
    before = copy.deepcopy(model)

    class Look(Callback):
        def on_finetune_step(self, event: FinetuneStep) -> None:
            teacher = found[-1]
            assert teacher is not None
            assert_same_values(teacher.network, before)
            assert not any(module.training for module in teacher.network.modules())
            assert all(not p.requires_grad and p.grad is None for p in teacher.network.parameters())
            inside.append(id(teacher.network))

    tuning = FineTune(steps=6, distill="unpruned")
    result = prune(model, DATA, target="params=0.5", finetune=tuning, callbacks=[Look()], pace=Pace(rounds=3))
    assert len(inside) == 6
    assert len(set(inside)) == 1
    assert result.after.params < result.before.params
    gone = weakref.ref(found.pop().network)  # type: ignore[union-attr]
    assert found == []
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("again", ["plain", "masked"])
def test_the_teacher_of_masked_weights_is_the_network_without_these_masks(
    again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded()
    if again == "masked":
        prune_weights(model, DATA, sparsity=0.3, pace=Pace(rounds=1), finetune=0)
    before, found = copy.deepcopy(model).eval(), held(monkeypatch)
    said: list[tuple[Tensor, Tensor]] = []

    class Look(Callback):
        def on_finetune_step(self, event: FinetuneStep) -> None:
            teacher = found[-1]
            assert teacher is not None
            assert_same_values(teacher.network, before)
            said.append((teacher.network(DATA[0][0]), before(DATA[0][0])))

    prune_weights(
        model, DATA, sparsity=0.8, pace=Pace(rounds=2), finetune=FineTune(steps=4, distill="unpruned"),
        callbacks=[Look()],
    )  # fmt: skip
    assert len(said) == 4
    assert all(torch.equal(a, b) for a, b in said)
    assert len(found) == 1


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_a_failure_rolls_everything_back(weights: bool, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, model, teacher = held(monkeypatch), seeded(Chain), seeded(Chain, 1).train()
    trace, other = Trace(model), Trace(teacher)
    options: dict[str, Any] = {
        "finetune_steps": 6, "distill": teacher if given else "unpruned", "rounds": 2, "nodes": 1,
        "callbacks": [StopAt("finetune_step", 4)],
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        if weights:
            prune_weights(model, IMAGES, **asked(**options))
        else:
            prune(model, IMAGES, **asked(verify=False, **options))
    trace.assert_unchanged()
    other.assert_unchanged()
    (copied,) = [weakref.ref(held.network) for held in found if held is not None and not given] or [None]
    found.clear()
    gc.collect()
    assert copied is None or copied() is None


def test_a_pruner_of_ones_own_takes_the_teacher_before_it_cuts() -> None:
    model = seeded()
    pruner = SInGEPruner(
        model, DATA[0][0], SInGEImportance("l2"), target="params=0.5", batches=DATA,
        finetune=FineTune(DATA, 4, distill="unpruned"), pace=Pace("layers", units_per_step=0.5),
    )  # fmt: skip
    seen: list[int] = []

    class Look(Callback):
        def on_finetune_step(self, event: FinetuneStep) -> None:
            assert pruner.tuner is not None
            assert pruner.tuner.teacher is not None
            seen.append(sum(p.numel() for p in pruner.tuner.teacher.network.parameters()))

    pruner.callbacks = [Look()]
    outcome = pruner.run()
    assert seen == [outcome.params[0]] * 4
    assert pruner.tuner is not None
    assert pruner.tuner.teacher is None
    with pytest.raises(ConfigError, match="the network before pruning, and this run goes on with one that was pruned"):
        pruner.run(Progress({}, next_layer=1))


# --- the same run again -----------------------------------------------------------------------------------------


def whole_or_not(
    folder: Path | None, weights: bool, every: str, order: str, teacher: Any, callbacks: Any = (), **more: Any
) -> Any:
    """A small run with dropout, augmentation and a teacher."""
    net = seeded(lambda: Chain(dropout=0.5))
    loader = DataLoader(Pairs(IMAGES, noise=0.1), batch_size=8, shuffle=True)
    options: dict[str, Any] = {
        "loader": loader, "finetune_steps": 8, "every": every, "distill": teacher, "nodes": 1, "callbacks": callbacks,
    }  # fmt: skip
    options |= {} if folder is None else {"out_dir": folder, "resume": True}
    if weights:
        amount: dict[str, Any] = {"units_per_step": 0.4} if order == "layers" else {"rounds": 3}
        return prune_weights(net, IMAGES, **asked(sparsity=0.8, **amount, **options, **more))
    amount = {"units_per_step": 0.3} if order == "layers" else {"rounds": 3}
    return prune(net, IMAGES, **asked(verify=False, **amount, **options, **more))


@pytest.mark.parametrize(("weights", "every", "order", "stop", "more", "kind"), [
    (False, "layer", "rounds", ("finetune_step", 6), {}, "unpruned"),
    (False, "removal", "layers", ("removed", 4), {}, "unpruned"),
    (False, "layer", "layers", ("finetune_step", 5), {"fold": True}, "auto"),
    (False, "end", "rounds", ("finetune_step", 3), {}, "module"),
    (False, "layer", "rounds", ("finetune_step", 6), {}, None),
    (True, "layer", "rounds", ("finetune_step", 6), {}, "unpruned"),
    (True, "removal", "layers", ("removed", 4), {}, "auto"),
    (True, "end", "rounds", ("finetune_step", 3), {"fold": True}, "unpruned"),
    (True, "layer", "layers", ("finetune_step", 5), {}, "module"),
    (True, "layer", "rounds", ("finetune_step", 6), {}, None),
])  # fmt: skip
def test_resumed_it_is_the_uninterrupted_run_to_the_byte(
    weights: bool, every: str, order: str, stop: tuple[str, int], more: dict[str, Any], kind: str | None, tmp_path: Path
) -> None:
    run = partial(whole_or_not, weights=weights, every=every, order=order, **more)

    def teacher() -> Any:
        return seeded(Chain, 7) if kind == "module" else kind

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, teacher=teacher(), callbacks=[StopAt(*stop)])
    resumed, whole = run(tmp_path, teacher=teacher()), run(None, teacher=teacher())
    assert_same_run(resumed, whole)
    if kind is not None:
        plain = run(None, teacher=None)
        assert [e["loss"] for e in plain.history.select("finetune_step")] != [
            e["loss"] for e in whole.history.select("finetune_step")
        ]


def test_the_record_names_the_teacher_and_the_checkpoint_has_nothing_of_it(tmp_path: Path) -> None:
    names, records = [], []
    for number, teacher in enumerate((None, "unpruned", "auto", seeded(Chain, 7))):
        folder = tmp_path / str(number)
        result = whole_or_not(folder, False, "layer", "rounds", teacher)
        records.append([result.options["finetune"][name] for name in ("distill", "distils")])
        with safe_open(folder / CHECKPOINT, "pt") as file:
            names.append(set(file.keys()))
    how = {"temperature": 4.0, "weight": 0.9, "features": None, "feature_weight": 1.0}
    assert records == [
        [None, None], [{"teacher": "unpruned", **how}, "unpruned"], [{"teacher": "auto", **how}, "unpruned"],
        [{"teacher": "Chain", **how}, "Chain"],
    ]  # fmt: skip
    assert names == names[:1] * 4
    with pytest.raises(ArtifactError, match=r"other options \(teacher: .* use the same teacher with the same weights"):
        whole_or_not(folder, False, "layer", "rounds", seeded(Chain, 8))
    with pytest.raises(ArtifactError, match=r"finetune\.distill\.temperature was 4\.0, now 2\.0\); use the same fine"):
        whole_or_not(folder, False, "layer", "rounds", Distill(seeded(Chain, 7), temperature=2.0))


@pytest.mark.parametrize(("make", "data", "more", "expected"), [
    (mlp, DATA, {}, "unpruned"),
    (mlp, DATA, {"loss": functional.cross_entropy}, "unpruned"),
    (mlp, DATA, {"loss": lambda o, y: o.square().mean()}, None),
    (mlp, DATA, {"steps": 0}, None),
    (mlp, DATA, {"step_fn": lambda m, b: functional.cross_entropy(m(b[0]), b[1])}, None),
    (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)),
     [(x, x[:, :1]) for x in INPUTS], {"loss": functional.mse_loss}, None),
])  # fmt: skip
def test_left_open_it_is_the_unpruned_network_of_a_classifier(
    make: Any, data: Any, more: dict[str, Any], expected: str | None
) -> None:
    tuning = FineTune(**{"steps": 2, "distill": "auto"} | more)
    result = prune(seeded(make), data, target="macs=0.5", scoring="l2", finetune=tuning)
    assert result.options["finetune"]["distils"] == expected
    assert result.options["finetune"]["distill"]["teacher"] == "auto"
    by_f = Scoring(objective=lambda o, y: o.square().mean())
    other = prune(seeded(make), data, target="macs=0.5", scoring=by_f, finetune=FineTune(steps=2, distill="auto"))
    assert other.options["finetune"]["distils"] is None


# --- without labels ---------------------------------------------------------------------------------------------


FORMS: dict[str, Any] = {
    "tensors": INPUTS,
    "tuples of one": [(x,) for x in INPUTS],
    "targets that are None": [(x, None) for x in INPUTS],
    "mappings": [{"input": x} for x in INPUTS],
    "a dataset": TensorDataset(torch.cat(INPUTS)),
    "a loader": DataLoader(TensorDataset(torch.cat(INPUTS)), batch_size=8),
}


@pytest.mark.parametrize("form", FORMS)
def test_without_labels_the_teacher_alone_is_learned_from(form: str, caplog: pytest.LogCaptureFixture) -> None:
    class Named(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = seeded(lambda: Named(*mlp()))
    tuning = FineTune(FORMS[form], 6, distill="unpruned")
    with caplog.at_level(logging.INFO, "singe_plugin"):
        result = prune(model, DATA, target="params=0.5", finetune=tuning, pace=Pace(rounds=1))
    assert caplog.text.count("batches to fine-tune on have no targets: their loss is the distillation alone") == 1
    losses = [event["loss"] for event in result.history.select("finetune_step")]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    weights = prune_weights(seeded(mlp), DATA, finetune=FineTune(INPUTS, 3, distill="unpruned"), pace=Pace(rounds=1))
    assert len(weights.history.select("finetune_step")) == 3


def test_nothing_needs_labels_where_scores_need_none() -> None:
    data = [(x, None) for x in INPUTS]
    tuning = FineTune(steps=4, distill="unpruned")
    result = prune(seeded(), data, target="params=0.5", scoring="l2", finetune=tuning)
    assert len(result.history.select("finetune_step")) == 4
    energy = Scoring(objective=lambda outputs, targets: outputs.square().mean())
    said = FineTune(steps=4, distill="unpruned", loss=functional.cross_entropy)
    assert prune(seeded(), data, target="params=0.5", scoring=energy, finetune=said).after.params < 400


# --- what cannot be ---------------------------------------------------------------------------------------------


class Untouched(Callback):
    """Nothing may be removed."""

    def on_removed(self, event: Any) -> None:
        raise AssertionError("it was to be said before")


def wide() -> nn.Module:
    return nn.Linear(4, CLASSES + 1)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda m: m, ConfigError, r"the teacher \(Sequential\) shares the parameter '0.weight' with the model"),
    (lambda m: nn.Sequential(m[0], nn.ReLU(), nn.Linear(16, CLASSES)), ConfigError, "shares the parameter '0.weight'"),
    (lambda m: wide(), DataError, r"\(Linear\) returns logits of shape \(8, 4\) and the model of shape \(8, 3\)"),
    (lambda m: nn.Linear(9, CLASSES), DataError, r"the teacher \(Linear\) fails on a batch with RuntimeError: .*mat"),
    (lambda m: nn.Linear(4, 1), DataError, "with two classes or more; leave distill out, or distil in a loss of your"),
    (lambda m: nn.LazyLinear(CLASSES), ConfigError, r"\(LazyLinear\) has no values for 'weight' \(it is lazy, or on"),
    (lambda m: wide().to("meta"), ConfigError, r"\(Linear\) has no values for 'weight'"),
    (lambda m: Net(lambda n, x: (n.fc(x),), fc=wide()), DataError, "returns tuple, and distillation is of logits"),
])  # fmt: skip
def test_teachers_that_cannot_be(make: Any, error: type[SingeError], message: str) -> None:
    model = seeded()
    teacher = make(model)
    trace, other = Trace(model), None if message.count("has no values") else Trace(teacher)
    with pytest.raises(error, match=message):
        prune(model, DATA, target="params=0.5", finetune=FineTune(steps=2, distill=teacher), callbacks=[Untouched()])
    trace.assert_unchanged()
    if other is not None:
        other.assert_unchanged()


# --- the command ------------------------------------------------------------------------------------------------


def teaching() -> tuple[click.Command, list[FineTune]]:
    """A command with the options of fine-tuning and distillation, and what was asked for with it."""
    seen: list[FineTune] = []
    command = click.Command(
        "try", params=[],
        callback=lambda **options: seen.append(commands._taught(*objects(options, FineTune, Recipe, Distill))),
    )  # fmt: skip
    return generated(FineTune, Recipe, Distill)(command), seen


def test_the_command_switches_it_on_and_off() -> None:
    command, seen = teaching()
    how = ["--distill-temperature", "2", "--distill-weight", "0.5"]
    for arguments, expected in (
        ([], None), (["--distill", "none"], None), (["--distill", "unpruned"], Distill("unpruned")),
        (["--distill", "auto", *how[:2]], Distill("auto", 2.0)),
        ([*how, "--distill", "unpruned"], Distill("unpruned", 2.0, 0.5)),
    ):  # fmt: skip
        assert CliRunner().invoke(command, arguments).exit_code == 0
        assert seen[-1].distill == expected
    for wrong in (
        ["--distill", "timm"],
        ["--distill", "auto", "--distill-weight", "0"],
        ["--distill-temperature", "0"],
    ):
        assert CliRunner().invoke(command, wrong).exit_code == 2


@pytest.mark.parametrize("start", [["prune", "--dataset", "digits"], ["inspect"]])
@pytest.mark.parametrize("more", [[], ["--distill", "none"]])
def test_the_command_does_not_ignore_how_a_teacher_is_learned_from(start: list[str], more: list[str]) -> None:
    told = CliRunner().invoke(main, [*start, "--model", "resnet18", "--distill-weight", "0.5", *more])
    assert told.exit_code == 2
    expected = "--distill-features and --distill-feature-weight say how a teacher is learned from, and there is none;"
    assert expected in " ".join(told.output.split())
