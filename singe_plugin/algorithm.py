r"""Algorithm 1 of the paper, written once.

.. code-block:: text

    for l in 1..L                            # forward order
        while pruning_rate(W_l) <= rho_l
            M <- C(W_l, F, D)                # score
            n <- argmin M;  remove W_l^n     # one unit, or units_per_step of them
            fine-tune                        # here (every="removal"), or after the loop (every="layer")

A *host* knows where units live and how to remove them; a *scorer* turns a layer's name into one score per unit.
The algorithm asks nothing else of either.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from singe_plugin.budget import CostModel, LayerSpec, count_params
from singe_plugin.errors import ConfigError, ScoringError
from singe_plugin.events import Callback, LayerDone, LayerScored, Removed, RunEnded, RunStarted
from singe_plugin.finetune import FineTune
from singe_plugin.units import UnitGroup

__all__ = [
    "Choice",
    "CountedProgress",
    "Host",
    "Pause",
    "Progress",
    "Schedule",
    "Scorer",
    "algorithm_1",
    "finish",
    "lowest",
    "prune_layers",
    "remove",
    "score",
    "tune",
    "units_per_removal",
]

Scorer = Callable[[str], Tensor]
Choice = Callable[[str, Tensor, int], Tensor]
"""``(layer, scores, count) -> positions``: which units go, in ascending order."""


class Host(Protocol):
    """What the algorithm needs of the library that prunes: layers, slices, removal, cost."""

    model: nn.Module

    def layers(self) -> Sequence[LayerSpec]:
        """The prunable layers in forward order, with the units they have now."""

    def units(self, layer: str) -> UnitGroup:
        """The slices of the parameters that make up each unit of a layer, as it is now."""

    def remove(self, layer: str, units: Sequence[int]) -> None:
        """Remove units, in the current numbering."""

    def costs(self) -> CostModel:
        """What removing units costs, in parameters and MACs."""


class Schedule(Protocol):
    """When to fine-tune, and for how long (:class:`~singe_plugin.FineTune` is one)."""

    every: str
    steps: int

    def share(self, phase: int, phases: int) -> int:
        """How many of the steps phase number ``phase`` of ``phases`` gets."""


@dataclass(frozen=True)
class Pause:
    """The algorithm waits for fine-tuning.

    Attributes:
        steps: how many optimisation steps to take; may be none.
        phase: ``(steps of this phase that are behind, its length)``; None if the phase is these steps.
    """

    steps: int
    phase: tuple[int, int] | None = None


@dataclass
class Progress:
    """How far a run is; what a checkpoint stores next to the tensors.

    Attributes:
        plan: layer -> units to remove.
        next_layer: the position of the first layer that is not done.
        removals: ``(layer, units)`` in the numbering that was current then, in order.
        alive: layer -> the original numbers of its remaining units.
        end_done: steps of the final fine-tuning phase that are done.
        finished: whether the run is over.
        goal: for rounds: layer -> units to remove in all, where that is fixed from the start.
        before: for rounds: the sizes of the model before the first.
    """

    plan: dict[str, int]
    next_layer: int = 0
    removals: list[tuple[str, list[int]]] = field(default_factory=list)
    alive: dict[str, list[int]] = field(default_factory=dict)
    end_done: int = 0
    finished: bool = False
    goal: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)

    def begin(self, layers: Sequence[LayerSpec]) -> None:
        """Take over what the host has now, if nothing is known of it yet."""
        if not self.alive:
            self.alive = {layer.name: list(range(layer.units)) for layer in layers}

    def left(self, layer: str) -> int:
        """How many units remain."""
        return len(self.alive[layer])

    def original(self, layer: str) -> int:
        """How many units there were."""
        return self.left(layer) + sum(len(units) for name, units in self.removals if name == layer)

    def remove(self, layer: str, chosen: Sequence[int]) -> tuple[int, ...]:
        """Write a removal down; the original numbers of the units."""
        alive, gone = self.alive[layer], set(chosen)
        names = tuple(alive[i] for i in chosen)
        self.alive[layer] = [unit for i, unit in enumerate(alive) if i not in gone]
        self.removals.append((layer, list(chosen)))
        return names


@dataclass
class CountedProgress(Progress):
    """The progress of a host with millions of units, whose masks say which are gone: only their number is kept."""

    counts: dict[str, int] = field(default_factory=dict)
    originals: dict[str, int] = field(default_factory=dict)

    def begin(self, layers: Sequence[LayerSpec]) -> None:
        self.counts = {layer.name: layer.units for layer in layers}
        done = [layer.name for layer in layers if self.plan.get(layer.name, 0) > 0][: self.next_layer]
        self.originals = {n: count + (self.plan[n] if n in done else 0) for n, count in self.counts.items()}

    def left(self, layer: str) -> int:
        return self.counts[layer]

    def original(self, layer: str) -> int:
        return self.originals[layer]

    def remove(self, layer: str, chosen: Sequence[int]) -> tuple[int, ...]:
        self.counts[layer] -= len(chosen)
        return ()


def lowest(layer: str, scores: Tensor, count: int) -> Tensor:
    """The positions of the ``count`` lowest scores, in ascending order; of equal ones, the first.

    Example:
        >>> lowest("conv", torch.tensor([2.0, 3.0, 1.0]), 2)
        tensor([0, 2])
    """
    if count <= 0:
        return torch.zeros(0, dtype=torch.int64)
    if count >= len(scores):
        return torch.arange(len(scores))
    cut = scores.kthvalue(count).values  # a layer may have millions of units: no sorting
    chosen, ties = scores < cut, (scores == cut).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


def units_per_removal(units_per_step: int | float | str, units: int) -> int:
    """How many units go between two scorings of a layer that has ``units``.

    Args:
        units_per_step: a whole number, a fraction of the layer inside ]0, 1[, or ``"layer"`` (all at once).
        units: the units of the unpruned layer.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> units_per_removal(1, 64), units_per_removal(0.25, 64), units_per_removal("layer", 64)
        (1, 16, 64)
    """
    if units_per_step == "layer":
        return units
    if isinstance(units_per_step, int) and not isinstance(units_per_step, bool) and units_per_step >= 1:
        return units_per_step
    if isinstance(units_per_step, float) and 0 < units_per_step < 1:
        return max(1, round(units_per_step * units))
    raise ConfigError(
        f"units_per_step={units_per_step!r} is not a number of units; give a whole number >= 1, a fraction inside "
        "]0, 1[ or 'layer'"
    )


def prune_layers(
    host: Host,
    scorer: Scorer,
    progress: Progress,
    *,
    units_per_step: int | float | str = 1,
    finetune: FineTune | None = None,
    callback: Callback | None = None,
    checkpoint: Callable[[Progress], None] | None = None,
    checkpoint_steps: int = 200,
    choose: Choice = lowest,
) -> Progress:
    """Run Algorithm 1 from where ``progress`` stands to the end, fine-tuning where it pauses.

    Args:
        host: the model and its layers.
        scorer: layer name -> one score per unit, lower is removed first.
        progress: the plan and what is done of it; updated in place.
        units_per_step: removals between two scorings (see :func:`units_per_removal`).
        finetune: the steps in between, or None.
        callback: sees every event.
        checkpoint: called after every layer, and every ``checkpoint_steps`` steps of the final phase.
        checkpoint_steps: see there.
        choose: which units go, given their scores; the lowest.

    Raises:
        ScoringError: if the scorer's answer does not fit the layer.
    """
    callback = callback or Callback()
    pauses = algorithm_1(
        host, scorer, progress, units_per_step, finetune, callback, checkpoint, checkpoint_steps, choose
    )
    tune(host, pauses, finetune, callback)
    return progress


def tune(host: Host, pauses: Iterator[Pause], finetune: FineTune | None, callback: Callback) -> None:
    """Let an algorithm run to its end, and fine-tune wherever it pauses."""
    for pause in pauses:
        assert finetune is not None
        finetune.run(host.model, pause.steps, callback, pause.phase)


def algorithm_1(
    host: Host,
    scorer: Scorer,
    progress: Progress,
    units_per_step: int | float | str = 1,
    schedule: Schedule | None = None,
    callback: Callback | None = None,
    checkpoint: Callable[[Progress], None] | None = None,
    checkpoint_steps: int = 200,
    choose: Choice = lowest,
) -> Iterator[Pause]:
    """Algorithm 1 for somebody else's training loop: it goes on whenever the next pause is asked for.

    Arguments are those of :func:`prune_layers`; ``schedule`` says when to pause and for how long.

    Yields:
        where to fine-tune. The steps are expected to have been taken when the next pause is asked for.
    """
    callback = callback or Callback()
    started = time.perf_counter()
    layers = list(host.layers())
    todo = [layer for layer in layers if progress.plan.get(layer.name, 0) > 0]
    progress.begin(layers)
    chunks = {layer.name: units_per_removal(units_per_step, progress.original(layer.name)) for layer in layers}
    phases = _phases(todo, progress.plan, chunks, schedule)
    if not progress.removals and not progress.next_layer and not progress.end_done:
        callback.on_run_start(RunStarted(dict(progress.plan), schedule.steps if schedule else 0))
    for index in range(progress.next_layer, len(todo)):
        layer = todo[index]
        first_phase = phases.first[index]
        removed = 0
        while removed < progress.plan[layer.name]:
            scores, seconds = score(scorer, layer.name, progress.left(layer.name))
            callback.on_layer_scored(LayerScored(layer.name, scores, seconds))
            count = min(chunks[layer.name], progress.plan[layer.name] - removed)
            remove(host, progress, layer.name, choose(layer.name, scores, count), callback)
            if schedule is not None and schedule.every == "removal":
                phase = first_phase + math.ceil(removed / chunks[layer.name])
                yield Pause(schedule.share(phase, phases.total))
            removed += count
        if schedule is not None and schedule.every == "layer":
            yield Pause(schedule.share(index, phases.total))
        callback.on_layer_done(LayerDone(layer.name, index, len(todo), count_params(host.model)))
        progress.next_layer = index + 1
        if checkpoint is not None:
            checkpoint(progress)
    yield from finish(host, progress, schedule, callback, checkpoint, checkpoint_steps, started)


@dataclass(frozen=True)
class _Phases:
    first: list[int]
    total: int


def _phases(
    todo: Sequence[LayerSpec], plan: dict[str, int], chunks: dict[str, int], schedule: Schedule | None
) -> _Phases:
    """The number of fine-tuning phases, and the one each layer begins with."""
    if schedule is None or schedule.every != "removal":
        return _Phases([0] * len(todo), max(len(todo), 1))
    counts = [math.ceil(plan[layer.name] / chunks[layer.name]) for layer in todo]
    return _Phases([sum(counts[:i]) for i in range(len(counts))], max(sum(counts), 1))


def finish(
    host: Host,
    progress: Progress,
    schedule: Schedule | None,
    callback: Callback,
    checkpoint: Callable[[Progress], None] | None,
    checkpoint_steps: int,
    started: float,
) -> Iterator[Pause]:
    """What comes after all removals: fine-tuning in pieces between which the state is written, then the end of the run.

    Args:
        started: when the run began (``time.perf_counter()``).
    """
    while schedule is not None and schedule.every == "end" and progress.end_done < schedule.steps:
        steps = min(checkpoint_steps, schedule.steps - progress.end_done)
        yield Pause(steps, (progress.end_done, schedule.steps))
        progress.end_done += steps
        if checkpoint is not None:
            checkpoint(progress)
    callback.on_run_end(RunEnded(count_params(host.model), time.perf_counter() - started))
    progress.finished = True
    if checkpoint is not None:
        checkpoint(progress)


def remove(host: Host, progress: Progress, layer: str, chosen: Tensor, callback: Callback) -> None:
    """Remove the units at some positions, write it down and tell."""
    positions = array("q", chosen.to(torch.int64).numpy().tobytes())
    host.remove(layer, positions)
    names = progress.remove(layer, positions)
    callback.on_removed(Removed(layer, names, progress.left(layer), len(positions)))


def score(scorer: Scorer, layer: str, units: int) -> tuple[Tensor, float]:
    """The scores of a layer on the CPU, and the seconds that they took.

    Raises:
        ScoringError: if they do not fit the layer.
    """
    start = time.perf_counter()
    scores = scorer(layer)
    if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) != units:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ScoringError(f"layer {layer!r} has {units} units, but the importance returned {got}")
    scores = scores.detach().float().cpu()
    if bool(torch.isnan(scores).any()):
        raise ScoringError(f"layer {layer!r}: the importance returned NaN; nothing can be ranked by it")
    return scores, time.perf_counter() - start
