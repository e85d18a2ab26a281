"""Rounds over all layers against a host in plain Python, and what callbacks hear of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

from singe_plugin.errors import ConfigError
from singe_plugin.loop.events import Callbacks, History
from singe_plugin.loop.loop import Loop
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.progress import CountedProgress, Progress
from singe_plugin.loop.shown import LogCallback
from singe_plugin.loop.turns import in_rounds

from memory_host import MemoryHost, MemoryTuner


def half_of_each(scores: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """Of eight units in each layer, four go in the end."""
    return {name: max(0, round(4 * share) - (8 - len(values))) for name, values in scores.items()}


def host() -> MemoryHost:
    return MemoryHost(a=[8, 1, 7, 2, 6, 3, 5, 4], b=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


def taken(
    host: MemoryHost, progress: Progress, rounds: int, tuner: Any = None, callback: Any = None, save: Any = None
) -> None:
    loop = Loop(host, progress, None if tuner is None else tuner.options, callback, save)
    loop.run(in_rounds(loop, Pace(rounds=rounds, course="linear"), half_of_each), tuner)


@pytest.mark.parametrize("every", ["layer", "removal", "end"])
def test_all_layers_are_scored_then_all_are_cut(every: str) -> None:
    numbers, history, progress = host(), History(), Progress({})
    taken(numbers, progress, 2, MemoryTuner(numbers.log, 10, every), history)
    scores = [("score", "a", 8), ("score", "b", 8)]
    again = [("score", "a", 6), ("score", "b", 6)]
    first = [("remove", "a", [1, 2]), ("remove", "b", [0.1, 0.2])]
    second = [("remove", "a", [3, 4]), ("remove", "b", [0.3, 0.4])]
    tuned = [] if every == "end" else [("tune", 5)]
    assert numbers.log == [*scores, *first, *tuned, *again, *second, *tuned, *([("tune", 10)] if not tuned else [])]
    assert progress.plan == {"a": 4, "b": 4}
    assert (progress.finished, progress.next_layer) == (True, 2)
    assert history.removals() == {"a": [1, 3, 5, 7], "b": [0, 1, 2, 3]}
    assert [row["event"] for row in history.rows] == [
        "run_start", "layer_scored", "layer_scored", "removed", "removed", "round_done",
        "layer_scored", "layer_scored", "removed", "removed", "round_done", "layer_done", "layer_done", "run_end",
    ]  # fmt: skip
    assert history.select("run_start")[0]["plan"] == {"a": 4, "b": 4}
    assert [(r["round"], r["rounds"], r["removed"], r["left"]) for r in history.select("round_done")] == [
        (1, 2, 4, 12), (2, 2, 4, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Progress, CountedProgress])
def test_rounds_go_on_where_they_stopped(kind: type[Progress]) -> None:
    whole, parts = host(), host()
    taken(whole, kind({}), 4)
    progress = kind({})

    class Stop(Exception):
        pass

    def stop(state: Progress) -> None:
        if state.next_layer == 2:
            raise Stop

    with pytest.raises(Stop):
        taken(parts, progress, 4, save=stop)
    heard = History()
    taken(parts, progress, 4, callback=heard)
    assert parts.log == whole.log
    assert heard.select("run_start") == []
    assert progress.plan == {"a": 4, "b": 4}


def test_courses() -> None:
    for course in ("cubic", "linear"):
        shares = [Pace(rounds=10, course=course).share_after(number) for number in range(1, 11)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    assert Pace(rounds=10).share_after(1) > Pace(rounds=10, course="linear").share_after(1)
    for rounds in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="is not a number of rounds"):
            Pace(rounds=rounds)
    with pytest.raises(ConfigError, match="unknown course 'step'; choose one of cubic, linear"):
        Pace(course="step")


def test_a_round_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    numbers = host()
    with caplog.at_level(logging.INFO, "singe_plugin"):
        callback = Callbacks([LogCallback()])
        taken(numbers, Progress({}), 2, callback=callback)
    assert [r.message for r in caplog.records if r.message.startswith("round")] == [
        "round 1/2 done: 4 removed, 12 left", "round 2/2 done: 4 removed, 8 left",
    ]  # fmt: skip
