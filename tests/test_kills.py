"""``kill -9`` at events, inside of file writes, at any time: the resumed run is the uninterrupted one to the byte."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from singe_plugin import Result
from singe_plugin.run.checkpoint import CHECKPOINT

from killed import RUNS, Kill, Run, assert_same_run, process, until_killed

EVENTS = ("layer_scored", "removed", "finetune_step", "layer_done", "run_end")
WRITES = ("torn", "unmoved", "moved")


@cache
def uninterrupted(run: Run) -> Result:
    return run(None)


def killed(run: Run, folder: Path, kill: Kill) -> int | None:
    """Run in a process of its own; its exit code."""
    started = process(until_killed, run, folder, kill)
    started.join()
    return started.exitcode


def check(run: Run, kills: Sequence[Kill], folder: Path) -> None:
    for number, kill in enumerate(kills):
        code = killed(run, folder, kill)
        over = number > 0 or kill.what == "seconds"  # it may come too late: the run is over
        assert code == -signal.SIGKILL or (over and code == 0), (code, kill)
    assert {p.name for p in folder.iterdir() if p.name[0] != "."} <= {CHECKPOINT, "run.lock"}
    assert_same_run(run(folder), uninterrupted(run))
    assert {p.name for p in folder.iterdir()} == {CHECKPOINT}


def drawn(seed: int) -> tuple[Run, list[Kill]]:
    """A way to prune, in turn, and one or two places to be killed at."""
    draw, run = random.Random(seed), RUNS[seed % len(RUNS)]
    history = uninterrupted(run).history

    def one(share: float) -> Kill:
        kind = draw.choice(["event", "event", "write", "seconds"])
        if kind == "seconds":
            return Kill("seconds", draw.uniform(0.02, 1.5))
        if kind == "write":
            return Kill(draw.choice(WRITES), draw.randint(1, 2))
        event = draw.choice(EVENTS)
        most = len(history.select(event))
        return Kill(f"on_{event}", draw.randint(1, max(1, round(share * most))))

    return run, [one(1.0)] if draw.random() < 0.6 else [one(0.7), one(0.4)]


FEW = [
    (RUNS[0], [Kill("on_finetune_step", 15)]),
    (RUNS[5], [Kill("on_removed", 4), Kill("torn", 1)]),
    (RUNS[6], [Kill("on_finetune_step", 12)]),
    (RUNS[7], [Kill("unmoved", 2)]),
    (RUNS[8], [Kill("on_finetune_step", 203)]),
    (RUNS[9], [Kill("moved", 1), Kill("on_removed", 2)]),
]


@pytest.mark.parametrize("number", range(len(FEW)))
def test_killed_and_resumed(number: int, tmp_path: Path) -> None:
    check(*FEW[number], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_killed_anywhere(seed: int, tmp_path: Path) -> None:
    check(*drawn(seed), tmp_path)
