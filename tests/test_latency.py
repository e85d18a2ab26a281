"""Latency: the median and the quartiles of a clock that the test holds, and the model as it was."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from singe_plugin.errors import ConfigError
from singe_plugin.loop.times import Timing
from singe_plugin.run.latency import Stopwatch, latency_of, measure_latency
from singe_plugin.run.result import Metrics, latency_cells

from fingerprint import assert_untouched, fingerprint
from references import Net
from small_nets import Chain, Trace


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """A clock on which the passes take so long, one after the other."""
    ticks = itertools.chain.from_iterable((10.0 * i, 10.0 * i + s) for i, s in enumerate(seconds))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize("repeats", [1, 2, 5, 8])
def test_median_and_quartiles_are_of_what_the_clock_says(monkeypatch: pytest.MonkeyPatch, repeats: int) -> None:
    timed = np.random.default_rng(repeats).gamma(2.0, 0.01, repeats)
    model, example = nn.Linear(3, 2), torch.zeros(4, 3)
    clocked(monkeypatch, list(timed))
    found = latency_of(model, example, repeats=repeats, warmup=2)
    assert found.median_ms == pytest.approx(1000 * np.median(timed))
    assert found.iqr_ms == pytest.approx(1000 * (np.quantile(timed, 0.75) - np.quantile(timed, 0.25)))
    clocked(monkeypatch, list(timed))
    assert measure_latency(model, example, repeats, 2) == found.median_ms


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        ((torch.zeros(3, 2), torch.zeros(3, 3)), 3),
        ([torch.zeros(1, 2), torch.zeros(1, 3)], 1),
        ({"a": torch.zeros(5, 2), "b": torch.zeros(5, 3)}, 5),
        ({"a": torch.zeros(2), "b": torch.zeros(4, 3)}, 2),
    ],
)
def test_what_was_measured_is_named(inputs: Any, batch: int) -> None:
    model = Net(lambda m, a, b: m.one(a) + m.two(b), one=nn.Linear(2, 4), two=nn.Linear(3, 4))
    found = latency_of(model, inputs, repeats=2, warmup=0)
    assert (found.batch, found.threads, found.device) == (batch, torch.get_num_threads(), "cpu")
    assert found.median_ms > 0
    assert found.iqr_ms >= 0


def test_it_is_measured_in_eval_mode_and_leaves_no_trace() -> None:
    model = Chain(dropout=0.5).train()
    seen: list[tuple[bool, bool]] = []
    handle = model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    trace, before = Trace(model), fingerprint(model)
    assert measure_latency(model, torch.zeros(1, 2, 6, 6), repeats=3, warmup=2) > 0
    assert seen == [(False, False)] * 5
    trace.assert_unchanged()
    assert_untouched(before, model)
    handle.remove()


@pytest.mark.parametrize(("faster", "said"), [(0.9, "-10.0 %"), (1.0, "not measurable"), (1.25, "+25.0 %")])
def test_the_change_is_that_of_passes_in_turn(monkeypatch: pytest.MonkeyPatch, faster: float, said: str) -> None:
    """Passes of one network may be further apart than two networks are: a machine that others use, too."""
    drawn, repeats = np.random.default_rng(0), 41
    busy, noise = drawn.uniform(0.01, 0.1, repeats), drawn.uniform(0.97, 1.03, repeats)
    pairs = np.stack([busy, busy * faster * noise], axis=1)
    clocked(monkeypatch, pairs.flatten().tolist())
    monkeypatch.setattr("singe_plugin.run.latency._WARM", 0)
    net = nn.Linear(3, 2)
    watch = Stopwatch(net, torch.zeros(4, 3), Timing(repeats=repeats))
    before, after = watch.compare(net)
    expected = np.quantile(pairs[:, 1] / pairs[:, 0], (0.25, 0.5, 0.75))
    assert watch.quartiles(net) == pytest.approx(expected.tolist())
    assert after.iqr_ms > 20  # and the medians are no more than 25 ms apart
    measured = [
        Metrics(1, 1, latency_ms=found.median_ms, latency_iqr_ms=found.iqr_ms, latency_change=change)
        for found, change in ((before, None), (after, [ratio - 1 for ratio in watch.quartiles(net)]))
    ]
    shown = latency_cells(*measured)[2]
    assert shown == said if faster == 1 else float(shown[:-2]) == pytest.approx(float(said[:-2]), abs=1.5)
    assert latency_cells(measured[0], replace(measured[1], latency_change=None))[2] == "not measurable"


@pytest.mark.parametrize(("options", "message"), [({"repeats": 0}, "repeats=0"), ({"warmup": -1}, "warmup=-1")])
def test_what_measures_nothing_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        latency_of(nn.Linear(1, 1), torch.zeros(1, 1), **options)
