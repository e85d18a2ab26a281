"""What is recorded of a learning rate is in force; momentum of a former shape, and arguments that step() ignores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from singe_plugin import Callback, FineTune, Pace, prune, prune_weights
from singe_plugin.errors import ConfigError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.tuner import Tuner

from asked import asked
from small_nets import StopAt, Trace, mlp, vectors

DATA = vectors(3)
X, Y = DATA[0]
MAGNITUDE = tp.importance.MagnitudeImportance()


# --- the rate in force -------------------------------------------------------------------------------------------

SGD = torch.optim.SGD
TUNINGS: dict[str, tuple[Callable[[nn.Module], FineTune], Any, str]] = {
    "a number": (lambda m: FineTune(DATA, 6, lr=0.02), 0.02, "cosine"),
    "a function": (lambda m: FineTune(DATA, 6, optimizer=lambda p: torch.optim.AdamW(p, lr=0.004)), 0.004, "cosine"),
    "a class": (lambda m: FineTune(DATA, 6, optimizer=torch.optim.Adam), 0.001, "cosine"),
    "an instance with a past": (
        lambda m: FineTune(DATA, 6, optimizer=SGD([{"params": list(m.parameters()), "initial_lr": 3.0}], 0.06)),
        0.06, "constant",
    ),
    "an instance": (lambda m: FineTune(DATA, 6, optimizer=SGD(m.parameters(), 0.07)), 0.07, "constant"),
    "groups": (
        lambda m: FineTune(
            DATA, 6, optimizer=SGD([{"params": m[0].parameters(), "lr": 0.5}, {"params": m[2:].parameters()}], 0.05)
        ),
        [0.5, 0.05], "constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", [prune, prune_weights])
@pytest.mark.parametrize("name", TUNINGS)
def test_the_recorded_rate_is_the_one_of_the_first_step(name: str, run: Any) -> None:
    make, rate, course = TUNINGS[name]
    model = mlp()
    result = run(model, DATA, **asked(criterion="l2", rounds=2, finetune=make(model)))
    first = result.history.select("finetune_step")[0]["lr"]
    assert result.options["finetune"]["lr"] == rate
    assert first == (rate[0] if isinstance(rate, list) else rate)
    assert result.options["finetune"]["schedule"] == course
    rates = {row["lr"] for row in result.history.select("finetune_step")}
    assert (len(rates) == 1) == (course == "constant")


def test_a_scheduler_is_recorded_by_its_name() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.08)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    result = prune(model, DATA, **asked(criterion="l2", finetune=FineTune(DATA, 6, optimizer=scheduler)))
    tuned = result.options["finetune"]
    assert (tuned["lr"], tuned["schedule"], tuned["optimizer"]) == (0.08, "StepLR", "SGD")


def test_that_there_is_no_cosine_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "singe_plugin"):
        for optimizer in (None, SGD, lambda p: SGD(p, 0.1)):
            Tuner(FineTune(DATA, 2, optimizer=optimizer)).prepare(mlp())
        assert not caplog.messages
        model = mlp()
        Tuner(FineTune(DATA, 2, optimizer=SGD(model.parameters(), 0.1))).prepare(model)
    assert caplog.messages == [
        "fine-tuning at the constant learning rate of the given SGD; give a function that makes it, for the cosine, or "
        "its scheduler in its place"
    ]


def test_resuming_with_the_object_of_the_run_that_was_stopped(tmp_path: Any) -> None:
    """A function has made its optimizer by then; the options are still those of the first call."""
    torch.manual_seed(0)
    tuning = FineTune(DATA, 6, optimizer=lambda p: SGD(p, 0.01))
    state = mlp().state_dict()

    def run(**options: Any) -> Any:
        model = mlp()
        model.load_state_dict(state)
        given = {"finetune": tuning, "out_dir": tmp_path, **options}
        return prune(model, DATA, **asked(criterion="l2", rounds=3, target="params=0.4", **given))

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[StopAt("round_done", 2)])
    resumed = run(resume=True)
    whole = run(out_dir=None, finetune=FineTune(DATA, 6, optimizer=lambda p: SGD(p, 0.01)))
    assert resumed.history.without_times() == whole.history.without_times()
    assert resumed.options == whole.options


# --- an optimizer that nobody named ------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.001),
    "one by one": lambda p: torch.optim.Adam(p, 0.001, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def pruner(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> SInGEPruner:
    options = asked(pruning_ratio=0.5, iterative_steps=2, verify=False, **options)
    return SInGEPruner(model, X, MAGNITUDE, optimizer=optimizer, **options)


def interactive(model: nn.Module) -> None:
    for group in pruner(model).step(interactive=True):
        group.prune()


REMOVALS: dict[str, Callable[[nn.Module], Any]] = {
    "step": lambda m: pruner(m).step(),
    "interactive": interactive,
    "run": lambda m: SInGEPruner(m, X, MAGNITUDE, target="params=0.3", pace=Pace(verify=False)).run(),
    "prune": lambda m: prune(m, DATA, **asked(criterion="l2", finetune_steps=0, verify=False)),
}


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_nobody_named_is_told(name: str, removal: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    REMOVALS[removal](model)
    for _ in range(2):  # it is told as long as it is so
        with pytest.raises(ConfigError, match=r"of shape \(16.*SInGEPruner\(optimizer=...\).*make a new optimizer"):
            train(model, optimizer)
    train(model, OPTIMIZERS[name](model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_optimizers_and_others_step_on(name: str) -> None:
    model, other = mlp(), mlp()
    optimizer, foreign = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    made = pruner(model, optimizer=optimizer)
    for _ in range(2):
        train(model, optimizer)
        train(other, foreign)
        made.step()
    train(model, optimizer)
    train(other, foreign)
    late = OPTIMIZERS[name](model.parameters())
    train(model, late)
    train(model, late)


def test_a_removal_that_was_rolled_back_changes_nothing_for_an_optimizer() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    train(model, optimizer)
    stop = StopAt("run_end", 1)
    failing = SInGEPruner(model, X, MAGNITUDE, target="params=0.3", pace=Pace(verify=False), callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        failing.run()
    train(model, optimizer)


# --- step() obeys or refuses -------------------------------------------------------------------------------------

ONLY_RUN: dict[str, Any] = {
    "target": "params=0.5", "ratios": "uniform", "units_per_step": 2, "order": "rounds", "rounds": 1,
    "course": "linear", "finetune": FineTune(DATA, 2), "callbacks": [Callback()],
}  # fmt: skip


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("name", ONLY_RUN)
def test_step_refuses_what_it_would_ignore(name: str, interactive: bool) -> None:
    model = mlp()
    made = pruner(model, **{name: ONLY_RUN[name]})
    trace = Trace(model)
    said = rf"pace\.{name}" if hasattr(Pace, name) else name
    with pytest.raises(ConfigError, match=rf"step\(\) prunes by .* would ignore {said}; call run\(\)"):
        made.step(interactive)
    trace.assert_unchanged()
    assert made.current_step == 0


def test_step_takes_defaults_that_are_given() -> None:
    model = mlp()
    pruner(
        model, target=None, ratios=None, units_per_step=None, order="layers", rounds=None, course="cubic",
        finetune=None, callbacks=[],
    ).step()  # fmt: skip
    assert model[0].out_features == 12
