r"""The loop of the paper, written once: score, choose, remove, repair, fine-tune, tell.

.. code-block:: text

    for turn in turns                        # Algorithm 1, rounds, or anybody's
        scores <- C(W_l, F, D)               # of the layers of this turn
        remove the units with the lowest     # as many as the turn says
        repair                               # if the host can
        fine-tune                            # as many steps as the turn says

A *turn* says which layers are scored now, and how many units of each go. Algorithm 1 and rounds
(:mod:`singe_plugin.loop.turns`) are two generators of turns; what stands behind a ``yield`` in them happens when the
turn is over. A *host* knows where units live, what they are worth and how to remove them; the loop asks nothing else of
it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from singe_plugin.errors import ScoringError
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.events import (
    Callback,
    LayerScored,
    Removed,
    Repaired,
    RunEnded,
)
from singe_plugin.loop.finetune import phase_share
from singe_plugin.loop.outlook import Rates, plan, shares_of
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.tuner import Tuner
from singe_plugin.loop.watch import Watch
from singe_plugin.ranks import current

__all__ = [
    "Allocation", "Choice", "Host", "Loop", "Pause", "Repairing", "Schedule", "Turn", "lowest", "score_layers",
]  # fmt: skip

_APART = "give all ranks the same model, options and versions of PyTorch, and callbacks that leave scores as they are"
Scores = Mapping[str, Tensor]
Allocation = Callable[[Scores, float], Mapping[str, int]]
"""``(scores of every layer, share of the way) -> units to remove now from each layer``."""
Choice = Callable[[str, Tensor, int], Tensor]
"""``(layer, scores, count) -> positions``: which units go, in ascending order."""


class Host(Protocol):
    """What the loop needs of whatever holds the network: layers, scores, removal."""

    model: nn.Module

    def layers(self) -> Sequence[GroupSpec]:
        """The prunable layers in forward order, with the units they have now."""

    def score(self, layers: Sequence[str]) -> Scores:
        """One score per unit of each of these layers; the lowest go first."""

    def remove(self, layer: str, units: Sequence[int]) -> None:
        """Remove units, in the current numbering."""

    def params(self) -> int:
        """How many parameters are left, for those who watch."""


@runtime_checkable
class Repairing(Protocol):
    """A host that lets the survivors take over from what was removed."""

    def repair(self, last: bool) -> Repaired | None:
        """Called when a layer or a round has lost its units, before fine-tuning.

        Args:
            last: whether nothing else will be removed.

        Returns:
            what was done, or None if there was nothing to do.
        """


@runtime_checkable
class Bounded(Protocol):
    """A host that knows of numbers of units that must not go together."""

    def allowed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """How many units of layers may go in one turn: at most as many as is asked for."""


@runtime_checkable
class Sized(Protocol):
    """A host that says how large the network is: units of the prunable layers, and what targets count."""

    def sizes(self, *kinds: str) -> dict[str, Any]: ...


class Schedule(Protocol):
    """When to fine-tune, and for how long (:class:`~singe_plugin.FineTune` says so)."""

    @property
    def every(self) -> str | None:
        """``"removal"``, ``"layer"`` or ``"end"``; None is ``"layer"``."""

    @property
    def steps(self) -> int:
        """How many steps there are in all."""


@dataclass(frozen=True)
class Turn:
    """What is scored now, and how many units of each layer go.

    Attributes:
        layers: the names of the layers to score.
        allocate: how many units go, given their scores; called once.
        steps: how many steps of fine-tuning follow.
        closing: whether a layer or a round has lost its units then, so that the survivors may take over.
        last: whether it is the last turn.
    """

    layers: Sequence[str]
    allocate: Callable[[Scores], Mapping[str, int]]
    steps: int = 0
    closing: bool = True
    last: bool = False


@dataclass(frozen=True)
class Pause:
    """The loop waits for fine-tuning.

    Attributes:
        steps: how many optimisation steps to take, at least one.
        phase: ``(steps of this phase that are behind, its length)``; None if the phase is these steps.
    """

    steps: int
    phase: tuple[int, int] | None = None


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


class Loop:
    """Takes turns, from where ``progress`` stands to the end.

    Args:
        host: the network and its layers.
        progress: what is done; updated in place.
        schedule: when fine-tuning happens and how much of it, or None.
        callback: sees every event.
        save: called with the progress whenever it can be continued from there, and every ``save_steps`` steps of a
            final fine-tuning; or None.
        choose: which units go, given their scores; the lowest.
        save_steps: see ``save``.
        watch: looks at the network after every layer or round, and may end the run; or None.
    """

    def __init__(
        self,
        host: Host,
        progress: Progress,
        schedule: Schedule | None = None,
        callback: Callback | None = None,
        save: Callable[[Progress], None] | None = None,
        choose: Choice = lowest,
        save_steps: int = 200,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch
        self.host, self.progress, self.schedule = host, progress, schedule
        self.callback = callback or Callback()
        self.save = save or (lambda _: None)
        self.choose, self.save_steps = choose, save_steps
        self.every = "end" if schedule is None else schedule.every or "layer"
        self.steps = 0 if schedule is None else schedule.steps
        self.rates = Rates()  # this and the next are for the outlook
        self.goal: float | None = None
        self.repairs_every: str | None = "end"

    def run(self, turns: Iterator[Turn], tuner: Tuner | None = None) -> Progress:
        """Take all turns, and fine-tune at every pause.

        Raises:
            ScoringError: if the host's scores do not fit a layer.
        """
        for pause in self.pauses(turns):
            assert tuner is not None
            tuner.run(self.host.model, pause.steps, self.callback, pause.phase)
        return self.progress

    def pauses(self, turns: Iterator[Turn]) -> Iterator[Pause]:
        """Take all turns inside somebody else's training loop: it goes on whenever the next pause is asked for.

        Yields:
            where to fine-tune. The steps are expected to have been taken when the next pause is asked for.
        """
        started = time.perf_counter()
        self.callback.on_model(self.host.model)
        progress, watch = self.progress, self.watch
        if progress.stopped is not None:
            self.look_ahead((), 0, 1)
        for turn in turns if progress.stopped is None else ():
            if watch is not None:
                watch.before_turn(progress)
            self.take(turn)
            if turn.steps:
                yield Pause(turn.steps)
            if watch is not None and turn.closing and watch.after_round(progress, self.callback):
                self._repair(last=True)
                self.save(progress)
                break
        while self.every == "end" and progress.end_done < self.steps:
            steps = min(self.save_steps, self.steps - progress.end_done)
            yield Pause(steps, (progress.end_done, self.steps))
            progress.end_done += steps
            self.save(progress)
        self.callback.on_run_end(RunEnded(self.host.params(), time.perf_counter() - started))
        progress.finished = True
        self.save(progress)

    def take(self, turn: Turn) -> None:
        """Score, choose, remove and repair."""
        chosen = self.choose_units(turn)
        going = {layer: (self.progress.left(layer), positions.tolist()) for layer, positions in chosen.items()}
        current().same("the units to remove", going, _APART)
        for layer, positions in chosen.items():
            self.remove(layer, positions)
        if turn.closing:
            self._repair(turn.last)

    def _repair(self, last: bool) -> None:
        if isinstance(self.host, Repairing):
            done = self.host.repair(last)
            if done is not None:
                self.callback.on_repaired(done)

    def choose_units(self, turn: Turn, missing: bool = False) -> dict[str, Tensor]:
        """The positions of the units that go in a turn, by layer; nothing is removed.

        Args:
            turn: the turn.
            missing: whether the host may have no scores for a layer, which is then left as it is.
        """
        start = time.perf_counter()
        scores = score_layers(self.host, {name: self.progress.left(name) for name in turn.layers}, missing)
        seconds = time.perf_counter() - start
        counts = turn.allocate(scores)
        if isinstance(self.host, Bounded):
            counts = self.host.allowed(counts)
        for name, values in scores.items():
            self.callback.on_layer_scored(LayerScored(name, values, seconds / len(scores)))
        return {name: self.choose(name, scores[name], count) for name, count in counts.items() if count > 0}

    def remove(self, layer: str, chosen: Tensor) -> None:
        """Remove the units at some positions, write it down and tell."""
        positions = array("q", chosen.to(torch.int64).numpy().tobytes())
        self.host.remove(layer, positions)
        names = self.progress.remove(layer, positions)
        self.callback.on_removed(Removed(layer, names, self.progress.left(layer), len(positions)))

    def look_ahead(self, way: Sequence[float], done: int, phases: int) -> None:
        """Tell what is to be done: see :func:`~singe_plugin.loop.outlook.plan`."""
        behind = self.progress.end_done if self.every == "end" else done * self.steps // max(phases, 1)
        repairs = self.repairs_every if isinstance(self.host, Repairing) else None
        steps = self.steps - behind, self.every == "end"
        self.callback.on_ahead(plan(way, self.goal, repairs, self.watch is not None, *steps, self.rates))

    def shares(self) -> dict[str, float]:
        """What is left of what the progress says was there before, in [0, 1]."""
        return shares_of(self.host.sizes, self.progress.before) if isinstance(self.host, Sized) else {}

    def share(self, phase: int, phases: int) -> int:
        """How many steps of fine-tuning phase number ``phase`` of ``phases`` has."""
        return phase_share(self.steps, phase, max(phases, 1))


def score_layers(host: Host, units: Mapping[str, int], missing: bool = False) -> dict[str, Tensor]:
    """The scores of some layers on the CPU.

    Args:
        host: the host.
        units: layer -> the units it has.
        missing: whether the host may have no scores for a layer, which is then left out.

    Raises:
        ScoringError: if they do not fit a layer, or cannot be ranked.
    """
    given, found = host.score(list(units)), {}
    for layer, count in units.items():
        scores = given.get(layer)
        if scores is None and missing:
            continue
        if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) != count:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(f"layer {layer!r} has {count} units, but the importance returned {got}")
        found[layer] = scores.detach().float().cpu()
        if bool(torch.isnan(found[layer]).any()):
            raise ScoringError(f"layer {layer!r}: the importance returned NaN; nothing can be ranked by it")
    return found
