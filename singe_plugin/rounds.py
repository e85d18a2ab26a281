r"""All layers together, in rounds: score them all, decide how many units of each go, remove them, fine-tune.

Algorithm 1 goes through the layers once; here every round goes through all of them, so that units of different layers
can be compared, and a layer is pruned a little in every round. The share of the way to the target that is covered
after round r of R is, by name,

.. math:: \text{linear: } \frac rR \qquad \text{cubic: } 1-\Bigl(1-\frac rR\Bigr)^3

(the second is gradual magnitude pruning's, Zhu and Gupta 2017: much at first, little at the end).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from singe_plugin.algorithm import (
    Choice,
    Host,
    Pause,
    Progress,
    Schedule,
    Scorer,
    finish,
    lowest,
    remove,
    score,
    units_per_removal,
)
from singe_plugin.budget import count_params
from singe_plugin.errors import ConfigError
from singe_plugin.events import Callback, LayerDone, LayerScored, RoundDone, RunStarted

__all__ = [
    "COURSES", "DEFAULTS", "ORDERS", "SCORED_ON", "Allocation", "check_rounds", "covered", "decided", "rounds_of",
    "scored_on",
]  # fmt: skip

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]
"""``(scores of every layer, share of the way) -> units to remove now from each layer``."""

ORDERS = ("rounds", "layers")
DEFAULTS: dict[str, tuple[str, int]] = {"layers": ("block", 1), "rounds": ("per_cost", 4)}
"""Order -> ratios and rounds where none are given: the paper's, and what kept the most in docs/results.md."""

SCORED_ON: dict[str, tuple[int, int]] = {"layers": (5, 1), "rounds": (1, 4)}
"""Order -> nodes of the quadrature and batches where none are given. In rounds images are worth more than nodes, and
one node on four batches is fewer passes than five on one (docs/results.md, more data). The paper scores on one batch.
"""

MOST_ROUNDS = 1000
UNITS_PER_STEP = 0.1
"""Of a layer, between two scorings, where layers go one after the other and nothing else is given."""

COURSES: dict[str, Callable[[float], float]] = {
    "cubic": lambda done: 1 - (1 - done) ** 3,
    "linear": lambda done: done,
}


def covered(course: str, number: int, rounds: int) -> float:
    """The share of the way to the target that is covered after round ``number`` (from 1).

    Example:
        >>> [round(covered("cubic", number, 4), 3) for number in (1, 2, 3, 4)]
        [0.578, 0.875, 0.984, 1.0]
    """
    return COURSES[course](number / rounds)


def decided(
    order: str | None,
    ratios: Any,
    rounds: int | None,
    units_per_step: Any = None,
    default_rounds: int = DEFAULTS["rounds"][1],
    default_units: int | float = UNITS_PER_STEP,
) -> tuple[str, Any, int, Any]:
    """Order, ratios, number of rounds and units between two scorings, where they are None.

    The order is Algorithm 1's where a number of units between two scorings is given, which only that has; else rounds.

    Raises:
        ConfigError: for an unknown order, for what only the other one has, or a number of units that is none.

    Example:
        >>> decided(None, None, None), decided("layers", "global", None), decided(None, None, None, units_per_step=1)
        (('rounds', 'per_cost', 4, None), ('layers', 'global', 1, 0.1), ('layers', 'block', 1, 1))
    """
    if order is None:
        order = "rounds" if units_per_step is None else "layers"
    if order not in ORDERS:
        raise ConfigError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    if order == "rounds" and units_per_step is not None:
        raise ConfigError(
            f"units_per_step={units_per_step!r} is for order='layers' (Algorithm 1); leave it out, or give that order"
        )
    if order == "layers" and rounds not in (None, 1):
        raise ConfigError(f"rounds={rounds!r} is for order='rounds'; leave it out, or give that order")
    default_ratios = DEFAULTS[order][0]
    if order == "layers":
        units_per_step = default_units if units_per_step is None else units_per_step
        units_per_removal(units_per_step, 1)
        default_rounds = DEFAULTS[order][1]
    return (
        order,
        default_ratios if ratios is None else ratios,
        default_rounds if rounds is None else rounds,
        units_per_step,
    )


def scored_on(order: str, nodes: int | None, batches: int | None) -> tuple[int, int]:
    """Nodes of the quadrature and number of scoring batches, where they are None: see ``SCORED_ON``.

    Example:
        >>> scored_on("rounds", None, None), scored_on("layers", None, None), scored_on("rounds", 3, 1)
        ((1, 4), (5, 1), (3, 1))
    """
    default_nodes, default_batches = SCORED_ON[order]
    return default_nodes if nodes is None else nodes, default_batches if batches is None else batches


def check_rounds(rounds: object, course: object) -> None:
    """Raise :class:`ConfigError` for a number of rounds or a course that cannot mean anything."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
        raise ConfigError(
            f"rounds={rounds!r} is not a number of rounds; give a whole number >= 1 (1 is one-shot) and at most "
            f"{MOST_ROUNDS}: every round scores all layers"
        )
    if not isinstance(course, str) or course not in COURSES:
        raise ConfigError(f"unknown schedule {course!r}; choose one of {', '.join(COURSES)}")


def rounds_of(
    host: Host,
    scorer: Scorer,
    allocate: Allocation,
    progress: Progress,
    rounds: int = 1,
    course: str = "cubic",
    schedule: Schedule | None = None,
    callback: Callback | None = None,
    checkpoint: Callable[[Progress], None] | None = None,
    checkpoint_steps: int = 200,
    choose: Choice = lowest,
) -> Iterator[Pause]:
    """Prune in rounds, from where ``progress`` stands; like :func:`~singe_plugin.algorithm.algorithm_1`, a generator.

    Args:
        host, scorer, callback, checkpoint, checkpoint_steps, choose: see there.
        allocate: how many units go now, given all scores and how far the rounds are.
        progress: ``next_layer`` counts the rounds that are done, ``plan`` what they removed.
        rounds, course: how many rounds, and how far each goes: a name of :data:`COURSES`.
        schedule: when to fine-tune: after every round (``"removal"`` or ``"layer"``), or at the end.

    Yields:
        where to fine-tune.
    """
    callback = callback or Callback()
    started = time.perf_counter()
    progress.begin(host.layers())
    for number in range(progress.next_layer, rounds):
        layers = list(host.layers())
        scored = {layer.name: score(scorer, layer.name, layer.units) for layer in layers}
        scores = {name: values for name, (values, _) in scored.items()}
        share = covered(course, number + 1, rounds)
        counts = {name: count for name, count in allocate(scores, share).items() if count > 0}
        if number == 0 and not progress.end_done:
            # what one round would do; later scores may spread it otherwise
            expected = dict(counts) if rounds == 1 else allocate(scores, 1.0)
            callback.on_run_start(RunStarted(expected, schedule.steps if schedule else 0))
        for name, (values, seconds) in scored.items():
            callback.on_layer_scored(LayerScored(name, values, seconds))
        for name, count in counts.items():
            remove(host, progress, name, choose(name, scores[name], count), callback)
            progress.plan[name] = progress.plan.get(name, 0) + count
        if schedule is not None and schedule.every != "end":
            yield Pause(schedule.share(number, rounds))
        left = sum(progress.left(layer.name) for layer in layers)
        callback.on_round_done(RoundDone(number + 1, rounds, sum(counts.values()), left))
        progress.next_layer = number + 1
        if number + 1 == rounds:
            for index, layer in enumerate(layers):
                callback.on_layer_done(LayerDone(layer.name, index, len(layers), count_params(host.model)))
        if checkpoint is not None:
            checkpoint(progress)
    yield from finish(host, progress, schedule, callback, checkpoint, checkpoint_steps, started)
