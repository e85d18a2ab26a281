"""Distillation: the loss is the formula, of whatever has logits, and only the student learns."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Callback, Distill, FineTune, Scoring, prune
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.distillation import class_logits, distillation, frozen_copy
from singe_plugin.loop.events import FinetuneStep
from singe_plugin.loop.tuner import Tuner

from references import Net
from small_nets import CLASSES, StopAt, Trace, assert_same_values, images, seeded, values_of, vectors

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
        batches, 4, lr=0.2, momentum=0, weight_decay=0, clip_grad=None, label_smoothing=0.2,
        distill=Distill(teacher, temperature, share),
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
    (loss,) = take(model, FineTune([(x, y)], 1, distill=Distill(teacher, weight=0.5), label_smoothing=0))
    expected = 0.5 * functional.cross_entropy(logits, y).item() + 0.5 * by_hand(logits, theirs, 4.0)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_bf16_is_near() -> None:
    losses = {
        amp: take(seeded(), FineTune(DATA, 3, amp=amp, distill=seeded(seed=1))) for amp in (None, "bf16")
    }  # fmt: skip
    assert losses["bf16"] == pytest.approx(losses[None], rel=0.03)
    assert losses["bf16"] != losses[None]


def test_inputs_that_are_written_into_are_not_shared() -> None:
    def half(model: nn.Module, x: Tensor) -> Tensor:
        return model.fc(x.mul_(0.5))  # type: ignore[operator]

    x, y = DATA[0]
    model, teacher = (seeded(lambda: Net(half, fc=nn.Linear(4, CLASSES)), seed) for seed in (0, 1))
    mine, theirs = (net.fc(x * 0.5) for net in (model, teacher))
    (loss,) = take(model, FineTune([(x.clone(), y)], 1, distill=Distill(teacher, weight=1.0)))
    assert loss == pytest.approx(by_hand(mine.detach(), theirs.detach(), 4.0), rel=1e-5)


# --- without labels ---------------------------------------------------------------------------------------------


def test_the_value_without_labels() -> None:
    model, teacher = seeded(), seeded(seed=1)
    expected = by_hand(model(INPUTS[0]).detach(), teacher(INPUTS[0]).detach(), 3.0)
    (loss,) = take(model, FineTune(INPUTS, 1, distill=Distill(teacher, temperature=3.0, weight=0.2)))
    assert loss == pytest.approx(expected, rel=1e-5)


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


def test_saying_what_the_teacher_says_is_no_error() -> None:
    model = seeded()
    before = copy.deepcopy(model)
    losses = take(model, FineTune(INPUTS, 12, distill="unpruned", weight_decay=0))
    assert losses == pytest.approx([0.0] * 12, abs=1e-6)
    for mine, start in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, start)
    ones = seeded(lambda: Net(lambda m, x: torch.zeros(8, 3) * m.fc(x), fc=nn.Linear(4, 3)))  # no gradient at all
    assert take(ones, FineTune(INPUTS, 12, distill="unpruned")) == [0.0] * 12


def test_models_that_compute_their_own_loss() -> None:
    model, teacher = seeded(Keyed), seeded(Keyed, 1)
    x, y = DATA[0]
    mine, theirs = (net(x, y) for net in (model, teacher))
    soft = by_hand(mine["logits"].detach(), theirs["logits"].detach(), 4.0)
    (both,) = take(copy.deepcopy(model), FineTune([{"pixels": x, "labels": y}], 1, distill=teacher))
    (alone,) = take(copy.deepcopy(model), FineTune([{"pixels": x}], 1, distill=teacher))
    assert both == pytest.approx(0.1 * mine["loss"].item() + 0.9 * soft, rel=1e-5)
    assert alone == pytest.approx(soft, rel=1e-5)
    batches = [{"pixels": x, "labels": y} for x, y in DATA]
    tuning = FineTune([{"pixels": x} for x in INPUTS], 4, distill="unpruned")
    assert prune(model, batches, target="macs=0.5", finetune=tuning).after.params < 131
    plain = seeded(lambda: nn.Sequential(nn.Linear(4, CLASSES)), 1)  # a teacher of another kind, by the same batches
    soft = by_hand(mine["logits"].detach(), plain(x).detach(), 4.0)
    named = Net(lambda m, pixels: m.inner(pixels), inner=plain)
    (other,) = take(copy.deepcopy(seeded(Keyed)), FineTune([{"pixels": x, "labels": y}], 1, distill=named))
    assert other == pytest.approx(0.1 * mine["loss"].item() + 0.9 * soft, rel=1e-5)


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
        tuner, stop = Tuner(FineTune(DATA, steps, distill=teacher)), StopAt("finetune_step", 2 if fails else 99)
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


# --- the copy ---------------------------------------------------------------------------------------------------


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
        (Itself, r"copy of the model \(distill='unpruned' is one\) shares the parameter 'fc.weight' with the model"),
        (Closed, r"copy of Closed, for .* computes with the model's own parameters .* give another module"),
    ):
        model = seeded(make)
        before = values_of(model)
        with pytest.raises(ConfigError, match=message):
            take(model, FineTune(DATA, 2, distill="unpruned"))
        assert_same_values(model, before)
        assert all(p.requires_grad for p in model.parameters())
    with caplog.at_level(logging.WARNING, "singe_plugin"):
        found = take(seeded(Stubborn), FineTune(DATA, 2, distill="auto"))
    assert found == take(seeded(Stubborn), FineTune(DATA, 2))
    assert "goes without a teacher: distill='unpruned' is a copy" in caplog.text


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_a_forward_pass_left_behind_does_not_hinder_the_copy() -> None:
    model = seeded(Remembers)
    model(DATA[0][0])
    made = frozen_copy(model)
    assert torch.equal(made(DATA[1][0]), model(DATA[1][0]))
    norm = torch.nn.utils.weight_norm(nn.Linear(4, CLASSES))  # the old one computes its weight in a hook
    norm(DATA[0][0])
    assert torch.equal(frozen_copy(norm)(DATA[1][0]), norm(DATA[1][0]))


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"distill": "unprund"}, r"unknown teacher 'unprund' \(did you mean 'unpruned'\?\); choose .*, or give a module"),
    ({"distill": nn.Linear}, "unknown teacher <class"),
    ({"distill": 0.9}, "unknown teacher 0.9; choose one of unpruned, auto, or give a module"),
    ({"teacher": None}, "unknown teacher None; choose one of unpruned, auto, or give a module"),
    ({"temperature": 0}, r"temperature=0 is not a temperature: a number inside \]0, inf\["),
    ({"temperature": math.inf}, "temperature=inf is not a temperature"),
    ({"temperature": "4"}, "temperature='4' is not a temperature"),
    ({"weight": 0}, r"weight=0 is not a share of the loss; distill=None has none: a number inside \]0, 1\]"),
    ({"weight": 1.5}, "weight=1.5 is not a share"),
    ({"distill": "unpruned", "step_fn": lambda m, b: m(b[0]).sum()}, "step_fn computes the whole loss"),
    ({"distill": Distill(), "step_fn": lambda m, b: m(b[0]).sum()}, "distill and step_fn were both given"),
    ({"distill": nn.Linear(1, 1), "step_fn": lambda m, b: m(b[0]).sum()}, "teacher would be ignored; leave one out"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTune(DATA, 2, **options) if "distill" in options else Distill(**options)


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
            prune(model, data, scoring=mse, finetune=FineTune(steps=2, distill=given))
        trace.assert_unchanged()
    own = [{"pixels": x, "labels": functional.one_hot(y, CLASSES).float()} for x, y in DATA]
    with pytest.raises(DataError, match=r"its own loss from targets of torch\.float32, .* need not be of classes"):
        take(seeded(Keyed), FineTune(own, 1, distill=seeded(Keyed, 1)))
    with pytest.raises(DataError, match=r"a batch must be a pair \(inputs, targets\) .* got a Tensor"):
        take(seeded(), FineTune(INPUTS, 1, distill=None))  # without a teacher there is nothing to learn
