"""How long a run still takes: against runs whose every second is made up, on a fake clock; and what is shown of it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import singe_plugin
from singe_plugin.loop.events import (
    Callback,
    Callbacks,
    Evaluated,
    FinetuneStep,
    LayerDone,
    LayerScored,
    Removed,
    Repaired,
    RoundDone,
    RunEnded,
    Stopped,
)  # fmt: skip
from singe_plugin.loop.outlook import Ahead, Measured, Outlook, Rates, plan
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.shown import ProgressBar, as_time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# What a made-up run takes: (seconds, event). The network shrinks with the cubic course, and its work does with it, but
# in another way than the outlook thinks: to the power `law` of the size.
def made_up(
    rounds: int, steps: int, goal: float, *, scoring: float, repair: float, step: float, closing: float, law: float,
    begin: int = 0, steps_done: int = 0, every: str = "end", watched: bool = False,
) -> Iterator[tuple[float, str, object]]:  # fmt: skip
    pace = Pace(rounds=rounds).settle()
    sizes = [1 - (1 - goal) * pace.share_after(number) for number in range(rounds + 1)]
    taken = steps_done
    for number in range(begin, rounds):
        seconds = scoring * sizes[number] ** law
        for layer in range(5):
            yield (seconds if layer == 0 else 0.0), "on_layer_scored", LayerScored(str(layer), torch.ones(1), 0.0)
        yield 0.0, "on_removed", Removed("0", (1,), 3)
        size = sizes[number + 1]
        if number == rounds - 1 and repair:
            yield repair * size**law, "on_repaired", Repaired((), 0.0)
        if every == "layer":
            for _ in range(steps // rounds):
                taken += 1
                yield step * size**law, "on_finetune_step", FinetuneStep(taken, steps, 1.0, 0.1)
        if watched:
            yield closing * size**law, "on_evaluated", Evaluated({"accuracy": 0.5})
        yield 0.01, "on_round_done", RoundDone(number + 1, rounds, 1, 3, {"macs": size})
    while every == "end" and taken < steps:
        taken += 1
        warm = 5.0 if taken == steps_done + 1 else 1.0
        yield warm * step * goal**law, "on_finetune_step", FinetuneStep(taken, steps, 1.0, 0.1)
    yield 0.0, "on_run_end", RunEnded(1, 0.0)
    yield closing * goal**law, "on_measured", Measured({}, 1.0, last=True)


CASES = {
    "mostly fine-tuning": {"scoring": 10.0, "repair": 12.0, "step": 0.5, "closing": 5.0, "steps": 400},
    "mostly scoring": {"scoring": 100.0, "repair": 40.0, "step": 0.1, "closing": 5.0, "steps": 50},
    "no fine-tuning": {"scoring": 60.0, "repair": 30.0, "step": 0.1, "closing": 20.0, "steps": 0},
    "entwined": {"scoring": 20.0, "repair": 0.0, "step": 0.5, "closing": 5.0, "steps": 400, "every": "layer"},
    "judged": {"scoring": 20.0, "repair": 0.0, "step": 0.5, "closing": 25.0, "steps": 100, "watched": True},
    "resumed": {"scoring": 20.0, "repair": 10.0, "step": 0.5, "closing": 5.0, "steps": 200, "begin": 2},
    "resumed in the end": {
        "scoring": 20.0, "repair": 10.0, "step": 0.5, "closing": 5.0, "steps": 400, "begin": 4, "steps_done": 150,
    },
}  # fmt: skip


@pytest.mark.parametrize("law", [0.7, 1.0])
@pytest.mark.parametrize("guess", [0.85, 1.15])
@pytest.mark.parametrize("case", CASES)
def test_it_is_right_within_a_factor_of_one_and_a_half(case: str, guess: float, law: float) -> None:
    """From a tenth of the run on, at every moment, with first guesses that are 15 % too low or too high.

    What is left near the end is little, and may be wrong by more, but by no more than 5 % of the run.
    """
    about = {"rounds": 4, "goal": 0.5, "law": law, **CASES[case]}
    rates = Rates(batch=1, scored=1, repaired=1, closing=about["closing"] * guess, trial=1.0)
    wanted = {kind: about[kind] * guess for kind in ("step", "scoring", "repair")}
    rates.guesses = lambda: wanted | {"closing": about["closing"] * guess, "evaluation": about["closing"] * guess}  # type: ignore[method-assign]
    events = list(made_up(**about))  # type: ignore[arg-type]
    whole = sum(seconds for seconds, *_ in events)
    clock = Clock()
    bar = ProgressBar(io.StringIO(), clock=clock, beats=False)
    bar.on_measured(Measured({}, 1.0, last=False))
    begin, every = about.get("begin", 0), about.get("every", "end")
    way = [Pace(rounds=4).settle().share_after(number) for number in range(begin, 4)]
    repairs = "end" if about["repair"] else None
    steps = about["steps"] - about.get("steps_done", 0)
    bar.on_ahead(plan(way, 0.5, repairs, about.get("watched", False), steps, every == "end", rates))
    worst, gone = 1.0, 0.0
    for seconds, name, event in events:
        for part in (0.25, 0.25, 0.25, 0.25):  # in the middle of the work, too
            left, true = bar.outlook.left(), whole - gone
            assert left is not None
            if gone > whole / 10 and abs(left - true) > whole / 20:
                worst = max(worst, left / true, true / max(left, 1e-9))
            clock.now, gone = clock.now + part * seconds, gone + part * seconds
        getattr(bar, name)(event)
    assert worst < 1.5


def test_what_is_ahead_and_what_is_not_known() -> None:
    ahead = plan([0.0, 0.5, 0.8], 0.4, "round", True, 7, False, Rates())
    assert ahead.sizes == pytest.approx((1.0, 0.7, 0.52))
    assert (ahead.repairs, ahead.evaluations, ahead.steps, ahead.goal) == (3, 3, 7, 0.4)
    assert plan([0.0, 0.5], None, None, False, 0, True, Rates()) == Ahead((1.0, 1.0), at_end=True)
    assert plan([], 0.4, "end", False, 7, True, Rates()).repairs == 0
    outlook = Outlook(Clock())
    outlook.begin(Ahead((1.0,), steps=2))
    assert outlook.left() is None
    assert as_time(outlook.left()) == "unknown"
    guesses = Rates(trial=0.5, reading=0.25, batch=4, scored=2, repaired=10).guesses()
    assert guesses == {"step": 3.0, "scoring": 6.0, "repair": 15.0}
    assert Rates().guesses() == {}


def test_without_fine_tuning_a_scoring_tells_how_long_a_repair_is() -> None:
    """No pass is timed there: a scoring is six passes of its images, a repair three of its own."""
    clock = Clock()
    outlook = Outlook(clock)
    outlook.begin(Ahead((1.0, 1.0), repairs=1, goal=1.0, rates=Rates(scored=100, repaired=400)))
    assert outlook.left() is None
    clock.now += 12.0
    outlook.done("scoring")
    assert outlook.left() == pytest.approx(12.0 + 12.0 / 6 / 100 * 3 * 400)
    clock.now += 12.0
    outlook.done("scoring")
    clock.now += 10.0
    outlook.done("repair")
    assert outlook.left() == 0


def test_a_stop_and_the_time_between_events() -> None:
    clock = Clock()
    outlook = Outlook(clock)
    outlook.begin(plan([0.0, 0.5], 1.0, None, True, 10, True, Rates(trial=1.0, batch=1, scored=1, closing=2.0)))
    assert outlook.left() == pytest.approx(2 * 6 + 2 * 2 + 10)
    clock.now += 4
    assert outlook.left() == pytest.approx(2 * 6 + 2 * 2 + 10 - 4)
    clock.now += 100  # it takes longer than was guessed, so the next one will, too
    assert outlook.left() == pytest.approx(104 + 2 * 2 + 10)
    outlook.done("scoring")
    assert outlook.one("scoring") == 104
    outlook.stop()
    assert outlook.left() == pytest.approx(10)


def lines(stream: io.StringIO) -> list[str]:
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_file_gets_plain_lines_every_thirty_seconds_and_one_for_every_round() -> None:
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(stream, clock=clock, beats=False)
    bar.on_ahead(Ahead((1.0,), steps=100, goal=1.0, at_end=True, rates=Rates(trial=10.0, batch=1, scored=1)))
    clock.now += 60
    bar.on_layer_scored(LayerScored("a", torch.ones(3), 0.0))
    bar.on_removed(Removed("a", (1,), 3))
    bar.on_round_done(RoundDone(1, 1, 5, 15, {"units": 0.75, "macs": 0.5}))
    for step in range(1, 13):
        clock.now += 5
        bar.on_finetune_step(FinetuneStep(step, 100, 1.25, 0.1))
    bar.on_layer_done(LayerDone("a", 0, 1, 7))
    bar.on_run_end(RunEnded(1, 1.0))
    first, done, second, third = lines(stream)
    assert re.fullmatch(r"pruning: \d+ % done, 1 min 0 s gone, 16 min 40 s left, scoring", first)
    assert done == "round 1/1 done: 5 removed, 15 left (75.0 % of the units, 50.0 % of the MACs)"
    assert second == "pruning: 16 % done, 1 min 30 s gone, 7 min 50 s left, fine-tuning step 6/100, loss 1.250"
    assert third.startswith("pruning: 21 % done, 2 min 0 s gone, ")


def test_layer_by_layer_there_is_a_line_for_every_layer() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream, clock=Clock(), beats=False)
    bar.on_finetune_step(FinetuneStep(1, 2, 0.5, 0.1))
    bar.on_layer_done(LayerDone("conv1", 0, 2, 70, {"params": 0.7}))
    bar.on_stopped(Stopped("it was enough"))
    assert lines(stream) == [
        "1/2 conv1 done: 70 parameters left (70.0 % of the parameters), loss 0.5000", "stopped: it was enough",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar_in_seconds() -> None:
    clock, stream = Clock(), Terminal()
    bar = ProgressBar(stream, clock=clock, beats=False)
    bar.on_ahead(Ahead((), steps=10, goal=1.0, at_end=True, rates=Rates(trial=2.0, batch=1)))
    clock.now += 2
    bar.on_finetune_step(FinetuneStep(1, 10, 1.25, 0.1))
    assert (bar.bar.n, bar.bar.total) == pytest.approx((2, 20))
    assert "18 s left, fine-tuning step 1/10, loss 1.250" in stream.getvalue()
    bar.on_run_end(RunEnded(1, 1.0))
    assert bar.bar is None


class Heard(Callback):
    def __init__(self, stop: int | None = None) -> None:
        self.ahead: list[Ahead] = []
        self.measured: list[Measured] = []
        self.rounds: list[RoundDone] = []
        self.stop = stop

    def on_ahead(self, event: Ahead) -> None:
        self.ahead.append(event)

    def on_measured(self, event: Measured) -> None:
        self.measured.append(event)

    def on_round_done(self, event: RoundDone) -> None:
        self.rounds.append(event)

    def on_finetune_step(self, event: FinetuneStep) -> None:
        if event.step == self.stop:
            raise KeyboardInterrupt


def test_a_run_tells_what_is_ahead_also_when_it_goes_on(tmp_path: Path) -> None:
    def run(heard: Heard, resume: bool = False) -> singe_plugin.Result:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        images = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        batches = [(images, torch.arange(32) % 2)]
        return singe_plugin.prune(
            net, batches, target="macs=0.5", pace=Pace(rounds=3), finetune=singe_plugin.FineTune(steps=450),
            val_data=batches, callbacks=[heard], out_dir=tmp_path, resume=resume,
        )  # fmt: skip

    first = Heard(stop=401)
    with pytest.raises(KeyboardInterrupt):
        run(first)
    (ahead,) = first.ahead
    assert (len(ahead.sizes), ahead.repairs, ahead.evaluations, ahead.steps) == (3, 1, 0, 450)
    assert (ahead.goal, ahead.at_end, ahead.rates.scored, ahead.rates.batch) == (0.5, True, 32, 32)
    assert set(ahead.rates.guesses()) == {"step", "scoring", "repair", "closing", "evaluation"}
    (before,) = first.measured
    assert before.last is False
    assert before.values["accuracy"] <= 1
    second = Heard()
    result = run(second, resume=True)
    (ahead,) = second.ahead
    assert (ahead.sizes, ahead.repairs, ahead.steps) == ((), 0, 50)  # the last checkpoint was after 400
    assert ahead.rates.guesses()["step"] > 0
    assert [m.last for m in second.measured] == [False, True]
    assert second.measured[1].values["macs"] == result.after.macs
    shares = first.rounds[-1].shares
    assert shares["macs"] == result.after.macs / result.before.macs
    assert shares["params"] == result.after.params / result.before.params
    units = sum(row.units_after for row in result.layers) / sum(row.units_before for row in result.layers)
    assert shares["units"] == units
    assert result.history.select("round_done")[-1]["shares"] == shares


def test_layers_and_weights_tell_it_too() -> None:
    batches = [(torch.randn(8, 4), torch.arange(8) % 2)]
    for call, options in (
        (singe_plugin.prune, {"pace": Pace("layers", units_per_step=4), "target": "params=0.5"}),
        (singe_plugin.prune_weights, {"pace": Pace(rounds=2), "sparsity": 0.5}),
    ):
        heard = Heard()
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        result = call(net, batches, finetune=4, callbacks=[heard, Callbacks()], **options)  # type: ignore[operator]
        (ahead,) = heard.ahead
        turns = result.history.select("layer_scored") if call is singe_plugin.prune else heard.rounds
        assert len(ahead.sizes) == len(turns)
        assert ahead.steps == 4
        if call is singe_plugin.prune:
            last = result.history.select("layer_done")[-1]
            assert last["shares"]["params"] == result.after.params / result.before.params
        else:
            weights = [(row.units_after, row.units_before) for row in result.layers]
            assert heard.rounds[-1].shares == {"units": sum(w[0] for w in weights) / sum(w[1] for w in weights)}


def test_the_command_writes_no_carriage_returns_into_a_file(tmp_path: Path) -> None:
    arguments = ["prune", "--model", "resnet18", "--in-chans", "1", "--img-size", "16", "--dataset", "digits"]
    arguments += ["--model-kwargs", "channels=[8, 8, 8, 8]", "--criterion", "l2", "--rounds", "2", "--no-curves"]
    arguments += ["--finetune-steps", "3", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "singe_plugin.app.cli", *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stderr + done.stdout
    told = [line for line in done.stderr.decode().splitlines() if line.startswith("round")]
    assert len(told) == 2
    assert re.fullmatch(
        r"round 2/2 done: \d+ removed, \d+ left \([\d.]+ % of the parameters, [\d.]+ % of the MACs, [\d.]+ % of the "
        r"units\)",
        told[1],
    )
