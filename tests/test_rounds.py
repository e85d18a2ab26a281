"""Rounds over all layers against a host in plain Python, and what callbacks hear of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singe_plugin.algorithm import tune
from singe_plugin.budget import CostModel, LayerSpec
from singe_plugin.errors import ConfigError
from singe_plugin.events import Callbacks, History, LogCallback, ProgressBar, Removed, RunStarted
from singe_plugin.finetune import FineTune
from singe_plugin.progress import CountedProgress, Progress
from singe_plugin.rounds import check_rounds, covered, rounds_of
from singe_plugin.units import UnitGroup


class Numbers:
    """Layers that are lists of numbers; a unit's score is its number, and falls a little whenever it is asked for."""

    def __init__(self, **layers: Sequence[float]) -> None:
        self.model: nn.Module = nn.Linear(1, 1)
        self.scores = {name: list(values) for name, values in layers.items()}
        self.log: list[Any] = []

    def layers(self) -> list[LayerSpec]:
        return [LayerSpec(name, len(values), name) for name, values in self.scores.items()]

    def units(self, layer: str) -> UnitGroup:
        raise AssertionError("rounds have no need of the slices")

    def costs(self) -> CostModel:
        raise AssertionError("nor of the costs")

    def remove(self, layer: str, units: Sequence[int]) -> None:
        self.log.append(("remove", layer, [self.scores[layer][u] for u in units]))
        for unit in sorted(units, reverse=True):
            del self.scores[layer][unit]

    def score(self, layer: str) -> Tensor:
        self.log.append(("score", layer))
        return torch.tensor(self.scores[layer])


def half_of_each(scores: Mapping[str, Tensor], share: float) -> dict[str, int]:
    """Of eight units in each layer, four go in the end."""
    return {name: max(0, round(4 * share) - (8 - len(values))) for name, values in scores.items()}


class Tuning(FineTune):
    """Takes no steps, but writes down how many it was asked for."""

    def __init__(self, log: list[Any], steps: int, every: str) -> None:
        super().__init__([(torch.zeros(1, 1), torch.zeros(1))], steps, every)
        self.log = log

    def run(self, model: nn.Module, steps: int, callback: Any, phase: tuple[int, int] | None = None) -> None:
        self.log.append(("tune", steps))


def host() -> Numbers:
    return Numbers(a=[8, 1, 7, 2, 6, 3, 5, 4], b=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize("every", ["layer", "removal", "end"])
def test_all_layers_are_scored_then_all_are_cut(every: str) -> None:
    numbers, history, progress = host(), History(), Progress({})
    tuning = Tuning(numbers.log, 10, every)
    pauses = rounds_of(numbers, numbers.score, half_of_each, progress, 2, "linear", tuning, history)
    tune(numbers, pauses, tuning, history)
    scores = [("score", "a"), ("score", "b")]
    first = [("remove", "a", [1, 2]), ("remove", "b", [0.1, 0.2])]
    second = [("remove", "a", [3, 4]), ("remove", "b", [0.3, 0.4])]
    tuned = [] if every == "end" else [("tune", 5)]
    assert numbers.log == [*scores, *first, *tuned, *scores, *second, *tuned, *([("tune", 10)] if not tuned else [])]
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
    tune(whole, rounds_of(whole, whole.score, half_of_each, kind({}), 4, "linear"), None, History())
    progress = kind({})

    class Stop(Exception):
        pass

    def stop(state: Progress) -> None:
        if state.next_layer == 2:
            raise Stop

    with pytest.raises(Stop):
        tune(
            parts, rounds_of(parts, parts.score, half_of_each, progress, 4, "linear", None, None, stop), None, History()
        )
    heard = History()
    tune(parts, rounds_of(parts, parts.score, half_of_each, progress, 4, "linear", None, heard), None, heard)
    assert parts.log == whole.log
    assert heard.select("run_start") == []
    assert progress.plan == {"a": 4, "b": 4}


def test_courses() -> None:
    for course in ("cubic", "linear"):
        shares = [covered(course, number, 10) for number in range(1, 11)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    assert covered("cubic", 1, 10) > covered("linear", 1, 10)
    for rounds in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="is not a number of rounds"):
            check_rounds(rounds, "cubic")
    with pytest.raises(ConfigError, match="unknown schedule 'step'; choose one of cubic, linear"):
        check_rounds(1, "step")


def test_a_bar_of_millions_of_removals_leaves_room_for_the_steps() -> None:
    bar = ProgressBar()
    bar.on_run_start(RunStarted({"a": 3_000_000}, 500))
    assert bar.bar.total == 1500
    for _ in range(3):
        bar.on_removed(Removed("a", (), 0, 1_000_000))
    assert bar.bar.n == 1000
    bar.close()
    bar = ProgressBar()
    bar.on_run_start(RunStarted({"a": 30}, 5))
    bar.on_removed(Removed("a", (1, 2, 3), 27))
    assert (bar.bar.total, bar.bar.n) == (35, 3)
    bar.close()


def test_a_round_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    numbers = host()
    with caplog.at_level(logging.INFO, "singe_plugin"):
        callback = Callbacks([LogCallback()])
        tune(
            numbers,
            rounds_of(numbers, numbers.score, half_of_each, Progress({}), 2, "linear", None, callback),
            None,
            callback,
        )
    assert [r.message for r in caplog.records if r.message.startswith("round")] == [
        "round 1/2 done: 4 removed, 12 left", "round 2/2 done: 4 removed, 8 left",
    ]  # fmt: skip
