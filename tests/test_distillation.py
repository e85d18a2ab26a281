"""Distillation: the loss is the formula, only the student learns, and the teacher is the network before pruning."""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections.abc import Callable
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

from singe_plugin import Callback, FineTune, Pace, Scoring, SInGEImportance, SInGEPruner, prune, prune_weights
from singe_plugin.app import commands
from singe_plugin.errors import ArtifactError, ConfigError, DataError, SingeError
from singe_plugin.loop import tuner as tuners
from singe_plugin.loop.distillation import Teacher, class_logits, distillation, frozen_copy
from singe_plugin.loop.events import FinetuneStep
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.tuner import Tuner
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
    values_of,
    vectors,
)  # fmt: skip

DATA, IMAGES = vectors(3), images(3)
INPUTS = [x for x, _ in DATA]


class Heard(Callback):
    """The losses of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self.losses.append(event.loss)


def take(model: nn.Module, tuning: FineTune) -> list[float]:
    """All steps of a fine-tuning; the losses."""
    heard, tuner = Heard(), Tuner(tuning)
    with tuner.taught(model, DATA[0][0]):
        tuner.prepare(model)
        tuner.run(model, tuning.steps, heard)
    assert tuner.teacher is None
    return heard.losses


def seeded(make: Callable[[], nn.Module] = mlp, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def held(monkeypatch: pytest.MonkeyPatch) -> list[Teacher | None]:
    """The teachers that are found from now on."""
    found: list[Teacher | None] = []
    real = tuners.find_teacher

    def find(*arguments: Any) -> Teacher | None:
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(tuners, "find_teacher", find)
    return found


# --- the loss ---------------------------------------------------------------------------------------------------


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The formula, place after place and class after class."""
    mine, theirs = (z.double().movedim(1, -1).reshape(-1, z.shape[1]).tolist() for z in (student, teacher))
    total = 0.0
    for z, t in zip(mine, theirs, strict=True):
        p, q = ([math.exp(v / temperature) for v in row] for row in (t, z))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return temperature**2 * total / len(mine)


@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (2, 3, 4), (2, 4, 3, 5)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_term_is_the_divergence_of_the_softened_classes(shape: tuple[int, ...], temperature: float) -> None:
    torch.manual_seed(sum(shape))
    student, teacher = torch.randn(shape, dtype=torch.float64), 3 * torch.randn(shape, dtype=torch.float64)
    found = float(distillation(student, teacher, temperature))
    assert found == pytest.approx(by_hand(student, teacher, temperature), rel=1e-12)
    assert float(distillation(teacher, teacher, temperature)) == 0


def test_a_class_that_is_ruled_out_counts_nothing_and_half_precision_is_widened() -> None:
    student, teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3).double()
    ruled = torch.tensor([0.0, -torch.inf, 0.0])
    loss = distillation(student + ruled, teacher + ruled, 2.0)
    assert loss.item() == pytest.approx(by_hand(student.detach()[:, ::2], teacher[:, ::2], 2.0), rel=1e-12)
    loss.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    assert float(student.grad[:, 1].abs().max()) == 0
    assert distillation(student.bfloat16(), teacher.bfloat16(), 2.0).dtype == torch.float32
    one = distillation(student[0].detach(), teacher[0], 2.0)  # no dimension of examples, as cross-entropy takes it
    assert float(one) == pytest.approx(by_hand(student[:1].detach(), teacher[:1], 2.0), rel=1e-12)


@pytest.mark.parametrize(("share", "temperature"), [(0.9, 4.0), (0.3, 1.5), (1.0, 2.0)])
def test_the_steps_are_those_of_the_formula_and_only_the_student_learns(share: float, temperature: float) -> None:
    model, teacher = seeded().double(), seeded(seed=1).double().train()
    batches = [(x.double(), y) for x, y in DATA]
    twin, before = copy.deepcopy(model), values_of(teacher)
    losses = take(model, FineTune(
        batches, 4, lr=0.2, momentum=0, weight_decay=0, clip_grad=None, label_smoothing=0.2, teacher=teacher,
        temperature=temperature, distill_weight=share,
    ))  # fmt: skip
    for step, loss in enumerate(losses):
        x, y = batches[step % 3]
        logits, theirs = twin(x), teacher(x).detach()
        smooth = 0.8 * functional.one_hot(y, CLASSES).double() + 0.2 / CLASSES
        hard = -(smooth * torch.log_softmax(logits, 1)).sum(1).mean()
        soft = functional.kl_div(
            torch.log_softmax(logits / temperature, 1), torch.softmax(theirs / temperature, 1), reduction="batchmean"
        )
        total = (1 - share) * hard + share * temperature**2 * soft
        expected = (1 - share) * hard.item() + share * by_hand(logits.detach(), theirs, temperature)
        assert loss == pytest.approx(expected, rel=1e-9)
        twin.zero_grad()
        total.backward()
        with torch.no_grad():
            for p in twin.parameters():
                p -= 0.1 * (1 + math.cos(math.pi * step / 4)) * p.grad
    for mine, hand in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, hand)
    assert_same_values(teacher, before)
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(module.training for module in teacher.modules())


def test_segmentation_is_learned_place_by_place() -> None:
    model, teacher = seeded(lambda: nn.Conv2d(2, 4, 1)), seeded(lambda: nn.Conv2d(2, 4, 1), 1)
    x, y = IMAGES[0][0], torch.randint(0, 4, (8, 6, 6))
    logits, theirs = model(x), teacher(x)
    (loss,) = take(model, FineTune([(x, y)], 1, teacher=teacher, distill_weight=0.5, label_smoothing=0))
    expected = 0.5 * functional.cross_entropy(logits, y).item() + 0.5 * by_hand(logits, theirs, 4.0)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_bf16_is_near() -> None:
    losses = {
        amp: take(seeded(), FineTune(DATA, 3, amp=amp, teacher=seeded(seed=1))) for amp in (None, "bf16")
    }  # fmt: skip
    assert losses["bf16"] == pytest.approx(losses[None], rel=0.03)
    assert losses["bf16"] != losses[None]


# --- the teacher ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A classifier that counts its calls in a buffer and draws in eval mode, too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen = nn.Linear(4, CLASSES), 0
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return self.fc(x) + 0.01 * torch.rand(CLASSES)


@pytest.mark.parametrize("fails", [False, True])
def test_a_given_teacher_is_put_back_and_draws_nothing(fails: bool) -> None:
    teacher = seeded(Counting, 1)
    trace, kept = Trace(teacher), dict(teacher._buffers)
    modes: list[bool] = []
    teacher.register_forward_hook(lambda module, a, o: modes.append(module.training or torch.is_grad_enabled()))
    heard: list[Any] = []
    model = seeded(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, CLASSES)))

    def listen(steps: int, teacher: Any) -> None:
        torch.manual_seed(3)
        tuner, stop = Tuner(FineTune(DATA, steps, teacher=teacher)), StopAt("finetune_step", 2 if fails else 99)
        twin = copy.deepcopy(model)
        with tuner.taught(twin):
            tuner.prepare(twin)
            try:
                tuner.run(twin, steps, stop)
            finally:
                heard.append(torch.get_rng_state())

    for given in (teacher, None):
        if fails:
            with pytest.raises(KeyboardInterrupt):
                listen(4, given)
        else:
            listen(4, given)
    assert torch.equal(*heard)
    assert modes == [False] * (2 if fails else 4)
    assert teacher.seen == 0
    assert all(teacher._buffers[name] is buffer for name, buffer in kept.items())
    trace.assert_unchanged(ignore=("rng", "hooks"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_teacher_goes_back_into_its_modes() -> None:
    teacher = torch.jit.script(seeded(seed=1))
    teacher[1].eval()  # type: ignore[operator]
    modes = [module.training for module in teacher.modules()]
    prune(seeded(), DATA, target="params=0.5", finetune=FineTune(steps=2, teacher=teacher))
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

    tuning = FineTune(steps=6, teacher="unpruned")
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
        model, DATA, sparsity=0.8, pace=Pace(rounds=2), finetune=FineTune(steps=4, teacher="unpruned"),
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
        "finetune_steps": 6, "teacher": teacher if given else "unpruned", "rounds": 2, "nodes": 1,
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
        finetune=FineTune(DATA, 4, teacher="unpruned"), pace=Pace("layers", units_per_step=0.5),
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


class Closed(nn.Module):
    """A layer calls a function that refers to the model, and not to whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)
        self.run = lambda x: self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a lock cannot be copied")


class Itself(Stubborn):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Remembers(nn.Module):
    """It keeps what it has computed, which belongs to a graph and cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.last = {"features": [self.fc(x)]}
        return self.last["features"][0]


def test_what_cannot_be_copied_says_so_and_goes_without_a_teacher_if_that_is_left_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for make, message in (
        (Stubborn, r"Stubborn cannot be copied \(TypeError: a lock cannot be copied\); give another module"),
        (Itself, r"copy of the model \(teacher='unpruned' is one\) shares the parameter 'fc.weight' with the model"),
        (Closed, r"copy of Closed, for .* computes with the model's own parameters .* give another module"),
    ):
        model = seeded(make)
        before = values_of(model)
        with pytest.raises(ConfigError, match=message):
            take(model, FineTune(DATA, 2, teacher="unpruned"))
        assert_same_values(model, before)
        assert all(p.requires_grad for p in model.parameters())
    with caplog.at_level(logging.WARNING, "singe_plugin"):
        found = take(seeded(Stubborn), FineTune(DATA, 2, teacher="auto"))
    assert found == take(seeded(Stubborn), FineTune(DATA, 2))
    assert "goes without a teacher: teacher='unpruned' is a copy" in caplog.text


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_a_forward_pass_left_behind_does_not_hinder_the_copy() -> None:
    model = seeded(Remembers)
    model(DATA[0][0])
    made = frozen_copy(model)
    assert torch.equal(made(DATA[1][0]), model(DATA[1][0]))
    norm = torch.nn.utils.weight_norm(nn.Linear(4, CLASSES))  # the old one computes its weight in a hook
    norm(DATA[0][0])
    assert torch.equal(frozen_copy(norm)(DATA[1][0]), norm(DATA[1][0]))


def test_inputs_that_are_written_into_are_not_shared() -> None:
    def half(model: nn.Module, x: Tensor) -> Tensor:
        return model.fc(x.mul_(0.5))  # type: ignore[operator]

    x, y = DATA[0]
    model, teacher = (seeded(lambda: Net(half, fc=nn.Linear(4, CLASSES)), seed) for seed in (0, 1))
    mine, theirs = (net.fc(x * 0.5) for net in (model, teacher))
    (loss,) = take(model, FineTune([(x.clone(), y)], 1, teacher=teacher, distill_weight=1.0))
    assert loss == pytest.approx(by_hand(mine.detach(), theirs.detach(), 4.0), rel=1e-5)


# --- the same run again -----------------------------------------------------------------------------------------


def whole_or_not(
    folder: Path | None, weights: bool, every: str, order: str, teacher: Any, callbacks: Any = (), **more: Any
) -> Any:
    """A small run with dropout, augmentation and a teacher."""
    net = seeded(lambda: Chain(dropout=0.5))
    loader = DataLoader(Pairs(IMAGES, noise=0.1), batch_size=8, shuffle=True)
    options: dict[str, Any] = {
        "loader": loader, "finetune_steps": 8, "every": every, "teacher": teacher, "nodes": 1, "callbacks": callbacks,
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
        records.append([result.options["finetune"][name] for name in ("teacher", "distils")])
        with safe_open(folder / CHECKPOINT, "pt") as file:
            names.append(set(file.keys()))
    assert records == [[None, None], ["unpruned", "unpruned"], ["auto", "unpruned"], ["Chain", "Chain"]]
    assert names == names[:1] * 4
    with pytest.raises(ArtifactError, match=r"other options \(teacher: .* use the same teacher with the same weights"):
        whole_or_not(folder, False, "layer", "rounds", seeded(Chain, 8))


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
    tuning = FineTune(**{"steps": 2, "teacher": "auto"} | more)
    result = prune(seeded(make), data, target="macs=0.5", scoring="l2", finetune=tuning)
    assert result.options["finetune"]["distils"] == expected
    assert result.options["finetune"]["teacher"] == "auto"
    by_f = Scoring(objective=lambda o, y: o.square().mean())
    other = prune(seeded(make), data, target="macs=0.5", scoring=by_f, finetune=FineTune(steps=2, teacher="auto"))
    assert other.options["finetune"]["distils"] is None


# --- without labels ---------------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """A classifier by keyword, of logits, as Transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 16), nn.Linear(16, CLASSES)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.fc(torch.relu(self.body(pixels)))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


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
    tuning = FineTune(FORMS[form], 6, teacher="unpruned")
    with caplog.at_level(logging.INFO, "singe_plugin"):
        result = prune(model, DATA, target="params=0.5", finetune=tuning, pace=Pace(rounds=1))
    assert caplog.text.count("batches to fine-tune on have no targets: their loss is the distillation alone") == 1
    losses = [event["loss"] for event in result.history.select("finetune_step")]
    assert len(losses) == 6
    assert all(loss > 0 for loss in losses)
    weights = prune_weights(seeded(mlp), DATA, finetune=FineTune(INPUTS, 3, teacher="unpruned"), pace=Pace(rounds=1))
    assert len(weights.history.select("finetune_step")) == 3


def test_the_value_without_labels() -> None:
    model, teacher = seeded(), seeded(seed=1)
    expected = by_hand(model(INPUTS[0]).detach(), teacher(INPUTS[0]).detach(), 3.0)
    (loss,) = take(model, FineTune(INPUTS, 1, teacher=teacher, temperature=3.0, distill_weight=0.2))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_nothing_needs_labels_where_scores_need_none() -> None:
    data = [(x, None) for x in INPUTS]
    tuning = FineTune(steps=4, teacher="unpruned")
    result = prune(seeded(), data, target="params=0.5", scoring="l2", finetune=tuning)
    assert len(result.history.select("finetune_step")) == 4
    energy = Scoring(objective=lambda outputs, targets: outputs.square().mean())
    said = FineTune(steps=4, teacher="unpruned", loss=functional.cross_entropy)
    assert prune(seeded(), data, target="params=0.5", scoring=energy, finetune=said).after.params < 400


def test_saying_what_the_teacher_says_is_no_error() -> None:
    model = seeded()
    before = copy.deepcopy(model)
    losses = take(model, FineTune(INPUTS, 12, teacher="unpruned", weight_decay=0))
    assert losses == pytest.approx([0.0] * 12, abs=1e-6)
    for mine, start in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, start)
    ones = seeded(lambda: Net(lambda m, x: torch.zeros(8, 3) * m.fc(x), fc=nn.Linear(4, 3)))  # no gradient at all
    assert take(ones, FineTune(INPUTS, 12, teacher="unpruned")) == [0.0] * 12


def test_models_that_compute_their_own_loss() -> None:
    model, teacher = seeded(Keyed), seeded(Keyed, 1)
    x, y = DATA[0]
    mine, theirs = (net(x, y) for net in (model, teacher))
    soft = by_hand(mine["logits"].detach(), theirs["logits"].detach(), 4.0)
    (both,) = take(copy.deepcopy(model), FineTune([{"pixels": x, "labels": y}], 1, teacher=teacher))
    (alone,) = take(copy.deepcopy(model), FineTune([{"pixels": x}], 1, teacher=teacher))
    assert both == pytest.approx(0.1 * mine["loss"].item() + 0.9 * soft, rel=1e-5)
    assert alone == pytest.approx(soft, rel=1e-5)
    batches = [{"pixels": x, "labels": y} for x, y in DATA]
    tuning = FineTune([{"pixels": x} for x in INPUTS], 4, teacher="unpruned")
    assert prune(model, batches, target="macs=0.5", finetune=tuning).after.params < 131
    plain = seeded(lambda: nn.Sequential(nn.Linear(4, CLASSES)), 1)  # a teacher of another kind, by the same batches
    soft = by_hand(mine["logits"].detach(), plain(x).detach(), 4.0)
    named = Net(lambda m, pixels: m.inner(pixels), inner=plain)
    (other,) = take(copy.deepcopy(seeded(Keyed)), FineTune([{"pixels": x, "labels": y}], 1, teacher=named))
    assert other == pytest.approx(0.1 * mine["loss"].item() + 0.9 * soft, rel=1e-5)


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": "unprund"}, r"unknown teacher 'unprund' \(did you mean 'unpruned'\?\); choose .*, or give a module"),
    ({"teacher": nn.Linear}, "unknown teacher <class"),
    ({"temperature": 0}, r"temperature=0 is not a temperature: a number inside \]0, inf\["),
    ({"temperature": math.inf}, "temperature=inf is not a temperature"),
    ({"temperature": "4"}, "temperature='4' is not a temperature"),
    ({"distill_weight": 0}, r"distill_weight=0 is not a share; teacher=None has none: a number inside \]0, 1\]"),
    ({"distill_weight": 1.5}, "distill_weight=1.5 is not a share"),
    ({"teacher": "unpruned", "step_fn": lambda m, b: m(b[0]).sum()}, "step_fn computes the whole loss"),
    ({"teacher": nn.Linear(1, 1), "step_fn": lambda m, b: m(b[0]).sum()}, "teacher would be ignored; leave one out"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTune(DATA, 2, **options)


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
    (lambda m: nn.Linear(4, 1), DataError, "with two classes or more; leave teacher out, or distil in a loss of your"),
    (lambda m: nn.LazyLinear(CLASSES), ConfigError, r"\(LazyLinear\) has no values for 'weight' \(it is lazy, or on"),
    (lambda m: wide().to("meta"), ConfigError, r"\(Linear\) has no values for 'weight'"),
    (lambda m: Net(lambda n, x: (n.fc(x),), fc=wide()), DataError, "returns tuple, and distillation is of logits"),
])  # fmt: skip
def test_teachers_that_cannot_be(make: Any, error: type[SingeError], message: str) -> None:
    model = seeded()
    teacher = make(model)
    trace, other = Trace(model), None if message.count("has no values") else Trace(teacher)
    with pytest.raises(error, match=message):
        prune(model, DATA, target="params=0.5", finetune=FineTune(steps=2, teacher=teacher), callbacks=[Untouched()])
    trace.assert_unchanged()
    if other is not None:
        other.assert_unchanged()


@pytest.mark.parametrize(("outputs", "message"), [
    ({"logits": torch.zeros(2, 5, 3)}, "only of .examples, classes. it is known where the classes are"),
    ({"loss": torch.zeros(())}, "returns dict, and distillation is of logits"),
    (torch.zeros(2, 3, dtype=torch.int64), r"returns torch.int64 of shape \(2, 3\)"),
    (torch.zeros(()), r"of shape \(\), and distillation is of logits"),
    (torch.zeros(2, 0), "with two classes or more"),
])  # fmt: skip
def test_outputs_that_are_no_logits(outputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_logits(outputs, "the model")


def test_what_is_no_classification_is_refused() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    data = [(x, x[:, :2]) for x in INPUTS]
    mse = Scoring(objective=functional.mse_loss)
    other = seeded(lambda: nn.Linear(4, 2))
    trace = Trace(model)
    for given in ("unpruned", other):
        with pytest.raises(ConfigError, match="what is minimised is mse_loss, whose outputs need not be any; say"):
            prune(model, data, scoring=mse, finetune=FineTune(steps=2, teacher=given))
        trace.assert_unchanged()
    own = [{"pixels": x, "labels": functional.one_hot(y, CLASSES).float()} for x, y in DATA]
    with pytest.raises(DataError, match=r"its own loss from targets of torch\.float32, .* need not be of classes"):
        take(seeded(Keyed), FineTune(own, 1, teacher=seeded(Keyed, 1)))
    with pytest.raises(DataError, match=r"a batch must be a pair \(inputs, targets\) .* got a Tensor"):
        take(seeded(), FineTune(INPUTS, 1, teacher=None))  # without a teacher there is nothing to learn


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_switches_it_on_and_off() -> None:
    seen: list[FineTune] = []
    command = click.Command(
        "try", params=[], callback=lambda **options: seen.extend(commands._objects(options, FineTune))
    )
    command = commands._generated(FineTune)(command)
    for arguments, expected in (
        ([], (FineTune().teacher, 4.0, 0.9)), (["--distill", "unpruned"], ("unpruned", 4.0, 0.9)),
        (["--distill", "none", "--temperature", "2"], (None, 2.0, 0.9)),
        (["--distill", "auto", "--distill-weight", "0.5"], ("auto", 4.0, 0.5)),
    ):  # fmt: skip
        assert CliRunner().invoke(command, arguments).exit_code == 0
        assert (seen[-1].teacher, seen[-1].temperature, seen[-1].distill_weight) == expected
    assert CliRunner().invoke(command, ["--distill", "timm"]).exit_code == 2
    assert CliRunner().invoke(command, ["--temperature", "0"]).exit_code == 2
