"""Fine-tuning steps by hand, and a stream of batches that can be found again exactly."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.events import Callback, FinetuneStep
from singe_plugin.loop.finetune import FineTune, Recipe, phase_share
from singe_plugin.loop.stream import BatchStream
from singe_plugin.loop.tuner import Tuner
from singe_plugin.state import RngState

from references import Net
from small_nets import Chain, assert_same_values, images, mlp, values_of, vectors

DATA = vectors(3)


class Heard(Callback):
    def __init__(self) -> None:
        self.steps: list[FinetuneStep] = []

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self.steps.append(event)


def take(model: nn.Module, tuning: FineTune | Tuner, steps: int) -> list[FinetuneStep]:
    heard, tuner = Heard(), tuning if isinstance(tuning, Tuner) else Tuner(tuning)
    tuner.prepare(model)
    tuner.run(model, steps, heard)
    return heard.steps


# --- steps by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (10, 4), (7, 7)])
def test_the_learning_rate_is_a_cosine_after_a_warmup(steps: int, warmup: int) -> None:
    heard = take(mlp(), FineTune(DATA, steps, lr=0.2, recipe=Recipe(warmup=warmup)), steps)
    expected = [
        0.2 * 0.5 * (1 + math.cos(math.pi * t / steps)) * (min(1.0, (t + 1) / warmup) if warmup else 1.0)
        for t in range(steps)
    ]
    assert [event.lr for event in heard] == pytest.approx(expected, rel=1e-12)
    assert [(event.step, event.total) for event in heard] == [(t + 1, steps) for t in range(steps)]


def test_the_cosine_restarts_in_each_phase_and_spans_the_pieces_of_one() -> None:
    model, tuning, heard = mlp(), Tuner(FineTune(DATA, 12, lr=0.2)), Heard()
    tuning.prepare(model)
    tuning.run(model, 4, heard)
    tuning.run(model, 2, heard)
    for done in (0, 2, 4):  # one phase of six steps, taken in three pieces
        tuning.run(model, 2, heard, (done, 6))
    shares = [t / 4 for t in range(4)] + [t / 2 for t in range(2)] + [t / 6 for t in range(6)]
    expected = [0.1 * (1 + math.cos(math.pi * share)) for share in shares]
    assert [event.lr for event in heard.steps] == pytest.approx(expected, rel=1e-12)


def test_the_default_step_is_clipped_sgd_on_smoothed_cross_entropy() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    tuning = FineTune(DATA, 5, lr=0.3, momentum=0.8, weight_decay=0.01, label_smoothing=0.2, clip_grad=0.05)
    losses = [event.loss for event in take(model, tuning, 5)]
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(5):
        x, y = DATA[step % 3]
        logs = torch.log_softmax(twin(x), 1)
        smooth = 0.8 * nn.functional.one_hot(y, 3) + 0.2 / 3
        loss = -(smooth * logs).sum(1).mean()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        twin.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters()))  # type: ignore[union-attr]
        assert norm > 0.05  # the clipping is at work
        rate = 0.3 * 0.5 * (1 + math.cos(math.pi * step / 5))
        with torch.no_grad():
            for name, p in twin.named_parameters():
                velocity[name] = 0.8 * velocity[name] + (p.grad * 0.05 / norm + 0.01 * p)  # type: ignore[operator]
                p -= rate * velocity[name]
    for mine, hand in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-4, atol=1e-6)


def test_without_clipping_the_gradient_is_used_as_it_is() -> None:
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    take(model, FineTune(DATA, 1, lr=0.1, momentum=0, weight_decay=0, clip_grad=None, label_smoothing=0), 1)
    nn.functional.cross_entropy(twin(DATA[0][0]), DATA[0][1]).backward()
    for mine, hand in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, hand - 0.1 * hand.grad)


def test_own_loss_and_own_step() -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append((tuple(outputs.shape), targets))
        return (outputs - 1).square().mean()

    def step(model: nn.Module, batch: Any) -> Tensor:
        assert model.training
        assert torch.is_grad_enabled()
        return loss(model(batch[0]), batch[1])

    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    a = take(models[0], FineTune(DATA[:1], 3, loss=loss), 3)
    b = take(models[1], FineTune(DATA[:1], 3, step_fn=step), 3)
    assert [e.loss for e in a] == [e.loss for e in b]
    assert a[0].loss > a[-1].loss
    assert_same_values(*models)
    assert [shape for shape, _ in seen] == [(8, 3)] * 6
    assert torch.equal(seen[1][1], DATA[0][1])


def test_mappings_and_nested_outputs_with_an_own_loss() -> None:
    model = Net(lambda m, pixels, scale: (m.fc(pixels * scale),), fc=nn.Linear(4, 3))
    batches = [{"pixels": x, "scale": torch.tensor(2.0), "labels": y} for x, y in DATA]
    tuning = FineTune(batches, 2, loss=lambda outputs, y: nn.functional.cross_entropy(outputs[0], y))
    assert len(take(model, tuning, 2)) == 2
    with pytest.raises(DataError, match=r"returns tuple, not logits; give FineTune\(loss=...\) or step_fn"):
        take(model, FineTune(batches, 2), 1)


def test_frozen_parameters_and_frozen_modes_are_left_alone() -> None:
    model = Chain().train()
    model.bn2.eval()
    for parameter in (*model.conv1.parameters(), *model.bn3.parameters()):
        parameter.requires_grad_(False)
    before, flags = values_of(model), [p.requires_grad for p in model.parameters()]
    modes = {name: module.training for name, module in model.named_modules()}
    seen: list[dict[str, bool]] = []
    model.register_forward_pre_hook(lambda m, a: seen.append({n: x.training for n, x in m.named_modules()}))
    take(model, FineTune(images(), 4, weight_decay=0.1), 4)
    after = values_of(model)
    for name in ("conv1.weight", "bn3.weight", "bn3.bias"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["conv2.weight"], after["conv2.weight"])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(all(modes.values()) for modes in seen)  # everything trains during the steps ...
    assert {name: module.training for name, module in model.named_modules()} == modes  # ... and goes back afterwards


def test_modes_go_back_after_a_failure_too() -> None:
    model = mlp().eval()

    def fail(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        take(model, FineTune(DATA, 4, step_fn=fail), 4)
    assert not any(module.training for module in model.modules())


def test_an_optimizer_and_a_scheduler_of_ones_own() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.08)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    heard = take(model, FineTune(DATA, 6, optimizer=scheduler), 6)
    assert [e.lr for e in heard] == pytest.approx([0.08, 0.08, 0.04, 0.04, 0.02, 0.02])
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


COURSES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: schedulers.StepLR(o, 2, 0.5),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.2, 6),  # it moves the momentum, too
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 2, 0.5)]),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, 4)], [2]
    ),
    "averaging": lambda o: SWALR(o, 0.01, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", COURSES)
def test_a_scheduler_brings_its_optimizer_and_is_stepped_once_per_step(name: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    mine, by_hand = (torch.optim.SGD(net.parameters(), lr=0.08, momentum=0.5) for net in (model, twin))
    course, its = COURSES[name](mine), COURSES[name](by_hand)
    tuner = Tuner(FineTune(DATA, 6, optimizer=course, clip_grad=None, label_smoothing=0))
    heard, rates = take(model, tuner, 6), []
    assert tuner.optimizer is mine
    for step in range(6):
        x, y = DATA[step % len(DATA)]
        rates.append(by_hand.param_groups[0]["lr"])
        by_hand.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        by_hand.step()
        its.step()
    assert [e.lr for e in heard] == rates
    assert len(set(rates)) > 1
    assert_same_values(model, twin)


def test_an_optimizer_without_a_scheduler_keeps_its_rate_and_a_function_gets_the_cosine() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08)
    assert [e.lr for e in take(model, FineTune(DATA, 3, optimizer=optimizer), 3)] == [0.08] * 3
    given: list[int] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        given.append(len(list(parameters)))
        return torch.optim.SGD(model.parameters(), lr=0.08)

    model[0].requires_grad_(False)
    assert [e.lr for e in take(model, FineTune(DATA, 2, optimizer=make), 2)] == pytest.approx([0.08, 0.04])
    assert given == [4]  # only what can be trained


def test_prepared_again_it_starts_again_also_for_another_model() -> None:
    tuning, models = Tuner(FineTune(DATA, 3)), [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (take(model, tuning, 3) for model in models)
    assert [(e.step, e.loss, e.lr) for e in first] == [(e.step, e.loss, e.lr) for e in second]
    assert_same_values(*models)


def test_bf16_steps_are_near_the_exact_ones() -> None:
    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    exact = take(models[0], FineTune(DATA, 3, amp=None), 3)
    half = take(models[1], FineTune(DATA, 3, amp="bf16"), 3)
    assert [e.loss for e in half] == pytest.approx([e.loss for e in exact], rel=0.02)
    assert [e.loss for e in half] != [e.loss for e in exact]
    assert {p.dtype for p in models[1].parameters()} == {torch.float32}


def test_channels_last_reaches_the_model() -> None:
    model, formats = Chain(), []
    model.register_forward_pre_hook(lambda m, a: formats.append(a[0].is_contiguous(memory_format=torch.channels_last)))
    take(model, FineTune(images(), 2, channels_last=True), 2)
    assert formats == [True, True]


def test_an_average_is_updated_every_step() -> None:
    class Counting(nn.Module):
        seen = 0

        def update(self, model: nn.Module) -> None:
            self.seen += 1

    ema = Counting()
    take(mlp(), FineTune(DATA, 4, ema=ema), 4)
    assert ema.seen == 4


@pytest.mark.parametrize(("tuning", "error", "message"), [
    (lambda m: FineTune([], 2), DataError, "loader is empty"),
    (lambda m: FineTune(DATA, 2, lr=1e30, loss=lambda o, y: o.square().mean()), DataError, "is inf at step 2 of 2"),
    (lambda m: FineTune(DATA, 2, step_fn=lambda m, b: torch.zeros(2)), ConfigError, "must return the loss, a scalar"),
    (lambda m: FineTune([(torch.zeros(2, 9), DATA[0][1][:2])], 2), DataError, "step 1 failed with RuntimeError: .*mat"),
    (lambda m: FineTune(DATA, 2, optimizer=torch.optim.SGD(mlp().parameters())), ConfigError, "holds none of"),
])  # fmt: skip
def test_what_cannot_be_trained_says_why(tuning: Callable[[Any], FineTune], error: type, message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        take(model, tuning(model), 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("phases", [1, 2, 3, 7])
@pytest.mark.parametrize("steps", [0, 1, 5, 1000])
def test_shares_add_up_and_differ_by_at_most_one(steps: int, phases: int) -> None:
    shares = [phase_share(steps, phase, phases) for phase in range(phases)]
    assert sum(shares) == steps
    assert max(shares) - min(shares) <= 1


# --- the stream -------------------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Ten examples, each augmented by draws from all three global generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, float(torch.rand(1)), random.random(), float(np.random.rand())])


class Plain(Noisy):
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class OnTheFly:
    """An iterable that is not a loader, with random batches."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.rand(3) for _ in range(4))


def own_generator(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(9), **options)


def own_sampler() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(9)
    return DataLoader(Noisy(), batch_size=3, sampler=WeightedRandomSampler([1.0] * 10, 10, generator=generator))


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: [torch.tensor([float(n)]) for n in range(4)],
    "on the fly": OnTheFly,
    "in order": lambda: DataLoader(Plain(), batch_size=3),
    "shuffled": lambda: DataLoader(Plain(), batch_size=3, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "own generator": own_generator,
    "own sampler": own_sampler,
    "workers": lambda: DataLoader(Plain(), batch_size=3, shuffle=True, num_workers=2),
    "workers, augmented, own generator": lambda: own_generator(num_workers=2),
}


def draw(stream: BatchStream, count: int) -> list[Tensor]:
    """Take batches while something else draws from the global generators too, as dropout does."""
    found = []
    for _ in range(count):
        found.append(next(stream))
        torch.rand(2)
        random.random()
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_a_position_is_found_again_exactly(source: str) -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    few = "workers" in source  # starting them takes a while
    for taken in (2, 6) if few else (0, 1, 4, 6, 9):
        stream = BatchStream(SOURCES[source]())
        draw(stream, taken)
        position, now = stream.position(), RngState.capture()
        generators = [g.get_state() for g in stream.generators]
        rest = draw(stream, 6)

        torch.rand(1234)  # another process, in another state
        again = BatchStream(SOURCES[source]())
        now.restore()
        again.seek(position)
        assert torch.equal(torch.get_rng_state(), now.torch_cpu)  # seeking leaves the generators as they are
        assert random.getstate() == now.python
        assert [torch.equal(g.get_state(), s) for g, s in zip(again.generators, generators, strict=True)] == (
            [True] * len(generators)
        )
        assert again.position()["taken"] == position["taken"]
        for mine, theirs in zip(draw(again, 6), rest, strict=True):
            assert torch.equal(mine, theirs)


def test_a_new_pass_begins_where_the_last_one_ended() -> None:
    stream = BatchStream([1, 2, 3])
    assert [next(stream) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert BatchStream(iter([1, 2])).batches == [1, 2]  # a one-shot iterator is kept


def test_making_a_stream_draws_nothing_and_starts_nothing() -> None:
    started: list[int] = []

    class Counting:
        def __iter__(self) -> Iterator[int]:
            started.append(1)
            return iter([1])

    state = torch.get_rng_state()
    loader = own_generator()
    own = loader.generator.get_state()
    BatchStream(Counting())
    Tuner(FineTune(loader))
    assert started == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(DataError, match="loader is empty; give at least one batch"):
        next(BatchStream([]))


@pytest.mark.parametrize(("name", "made"), [
    ("adamw", lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1)),
    ("momentum", lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.8, weight_decay=0.1)),
    ("sgd", lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.8, weight_decay=0.1, nesterov=True)),
])  # fmt: skip
def test_an_optimizer_by_its_name_is_timms(name: str, made: Callable[[Any], Any]) -> None:
    found = []
    for optimizer in (name, made):
        torch.manual_seed(0)
        model = mlp()
        tuner = Tuner(FineTune(DATA, 6, optimizer=optimizer, lr=0.01, momentum=0.8, weight_decay=0.1))
        tuner.prepare(model)
        tuner.run(model, 6, Callback())
        found.append(values_of(model))
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match=r"unknown optimizer 'adamv' \(did you mean 'adam\w*'\?\)"):
        FineTune(DATA, 6, optimizer="adamv")
