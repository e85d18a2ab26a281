"""A pruning from its checks to its end, whoever prunes: all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Trackers
from singe_plugin.loop.events import Callback, Callbacks, History
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.loop import Host, Loop, Turn
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.tuner import Tuner
from singe_plugin.loop.watch import Watch
from singe_plugin.method.objective import ObjectiveLike
from singe_plugin.rollback import all_or_nothing, remembered
from singe_plugin.run.guards import check_here, check_lone
from singe_plugin.run.result import GroupRow

__all__ = ["Job", "Save", "carry_out", "make_tuner"]

Save = Callable[[Progress], None]


class Job(Protocol):
    """What there is to do: a pruner of units or of single weights.

    Attributes:
        model: the model.
        tuner: the fine-tuning, or None.
        callbacks: see every event.
        example_inputs: for tracing and counting, or None.
        graph: the groups of the model, if units are removed.
        objective: F, which is fine-tuned for, too.
        kind: the class of its progress.
        left_whole: what is not pruned, and why.
        watch: looks at the network after every round, or None.
    """

    kind: type[Progress]
    model: nn.Module
    tuner: Tuner | None
    callbacks: Sequence[Callback]
    example_inputs: Any
    watch: Watch | None

    @property
    def goal(self) -> float | None:
        """The share of the multiply-adds that is left in the end, as far as that is known."""

    @property
    def graph(self) -> AxisGraph | None: ...

    @property
    def left_whole(self) -> dict[str, str]: ...

    @property
    def objective(self) -> ObjectiveLike: ...

    def check(self) -> None:
        """Say before anything is pruned that F does not fit the outputs, or does not depend on a layer."""

    def host(self) -> Host:
        """The layers, as they are now."""

    def trackers(self) -> Trackers:
        """Optimizers and averaged copies that change along."""

    def start(self, host: Any) -> Progress:
        """Nothing done: with the plan, or with what the turns need."""

    def turns(self, loop: Loop) -> Iterator[Turn]:
        """What is scored and removed, in the order that was asked for; it may tell the loop how to choose."""

    def run(self, progress: Progress | None = None, checkpoint: Save | None = None, history: Any = None) -> Any:
        """Do all of it: see :func:`carry_out`."""

    def rows(self) -> list[GroupRow]:
        """The layers, with the units they had and have."""

    def numbers(self) -> dict[str, Any]:
        """Fields of :class:`~singe_plugin.run.result.Metrics` that only this kind of pruning has."""

    def fold(self) -> dict[str, Tensor]:
        """Make permanent what is only held so far; the masks."""


@contextmanager
def carry_out(
    job: Job, progress: Progress | None, save: Save | None, history: History
) -> Iterator[tuple[Any, Progress]]:
    """Do a job to its end: its host and its progress. If that fails, or the block, everything is rolled back.

    Args:
        job: what to do.
        progress: where to continue; None starts at the beginning.
        save: called with the progress whenever it can be continued from there.
        history: gets every event.
    """
    check_here()
    check_lone(job.model, job.tuner, job.example_inputs)
    if job.tuner is not None:
        job.tuner.objective = job.objective
    with all_or_nothing(job.model, job.tuner, job.trackers(), job.graph), _taught(job, progress):
        if progress is None:
            job.check()
        if job.tuner is not None and (progress is None or job.tuner.optimizer is None):
            job.tuner.prepare(job.model)
        host: Any = job.host()
        if progress is None:
            progress = job.start(host)
        if not progress.finished:
            schedule = None if job.tuner is None else job.tuner.options
            if job.watch is not None:
                parts = host if job.graph is None else job.graph, job.tuner, host.unpruned
                job.watch.remember = lambda: remembered(job.model, job.trackers(), parts)
            loop = Loop(host, progress, schedule, Callbacks([history, *job.callbacks]), save, watch=job.watch)
            if job.tuner is not None:
                loop.rates = job.tuner.rates
            loop.goal, unpruned = job.goal, host.unpruned
            loop.repairs_every = None if unpruned is None else unpruned.options.every
            loop.run(job.turns(loop), job.tuner)
        if job.tuner is not None:
            job.tuner.finish(job.model)
        yield host, progress


def _taught(job: Job, progress: Progress | None) -> AbstractContextManager[None]:
    """The network before pruning is held in here, if there is to be a teacher."""
    if job.tuner is None or (progress is not None and progress.finished):
        return nullcontext()
    begun = progress is not None and bool(progress.next_layer or progress.removals or progress.end_done)
    return job.tuner.taught(job.model, job.example_inputs, begun, job.graph)


def make_tuner(finetune: FineTune | Tuner | None, model: nn.Module) -> Tuner | None:
    """The fine-tuning of a model's pruner, as it was given or to be begun; with the average that it asks for."""
    tuner = Tuner(finetune) if isinstance(finetune, FineTune) else finetune
    if tuner is not None:
        tuner.begin_average(model)
    return tuner
