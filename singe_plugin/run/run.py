"""A whole run: stage, replay or measure, loop, measure, result. One for every kind of pruning."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from singe_plugin.loop.events import Callbacks, History
from singe_plugin.loop.outlook import Measured, Rates
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.watch import Watch
from singe_plugin.ranks import current
from singe_plugin.run.architecture import describe_structure, remember_origin
from singe_plugin.run.checkpoint import (
    fitting,
    read_checkpoint,
    restore_progress,
    restore_run,
    write_checkpoint,
)  # fmt: skip
from singe_plugin.run.inputs import describe_inputs
from singe_plugin.run.job import Job
from singe_plugin.run.result import Metrics, Result, package_versions
from singe_plugin.run.staging import Stage, fingerprints, judged, measure, timed

__all__ = ["carry_through"]

PACKAGES = ("singe_plugin", "torch", "torch-pruning", "timm", "torchvision", "numpy")


def carry_through(
    job: Job, stage: Stage, options: Mapping[str, Any], folded: Iterable[tuple[str, str]], resume: bool
) -> Result:
    """Do a job on a stage, from the beginning or from its checkpoint.

    Args:
        job: the pruner, with the stage's fine-tuning.
        stage: model, data, measurements.
        options: what was asked for, as plain values; with the job's fine-tuning it is recorded.
        folded: the batch-norms that were folded before, with the layers they went into.
        resume: continue from the checkpoint, if there is one.

    Raises:
        ArtifactError: if the checkpoint is damaged, or of another run.
    """
    stage.tuner.objective = job.objective
    with stage.tuner.taught(job.model, stage.example, graph=job.graph):  # first of all: what follows masks or cuts
        return _carried(job, stage, options, folded, resume)


def _carried(
    job: Job, stage: Stage, options: Mapping[str, Any], folded: Iterable[tuple[str, str]], resume: bool
) -> Result:
    model, tuner, checkpoint = job.model, stage.tuner, stage.checkpoint
    judge = stage.judge
    asked = {**options, "finetune": tuner.describe()}
    if judge is not None and (judge.every == "round" or judge.is_function):
        asked["evaluate"] = judge.describe()
    history, progress = History(), None
    fingerprint = {
        **asked,
        "layers": [row.name for row in job.rows()],
        **({} if checkpoint is None else fingerprints(model, stage)),
    }
    if (found := _found(checkpoint if resume else None, fingerprint)) is not None:
        record, tensors = found
        with fitting():
            before = Metrics(**record["extra"]["before"])
            rates = Rates(**record["extra"].get("rates", {}))  # batches are read, and the loss is tried, only once
            tuner.rates.trial, tuner.rates.closing = rates.trial, rates.closing
            progress, history = restore_progress(record, job.kind), History(list(record["history"]))
        job.host()  # before the optimizer is made, as it was in the run that is continued: a mask moves its weight
        tuner.prepare(model)  # behind the bias, and the norm of all gradients is summed in that order
        host = job.host()
        for layer, units in progress.removals:
            host.remove(layer, units)
        restore_run(record, tensors, model, tuner)
    else:
        started = time.perf_counter()
        plain = measure(model, stage)  # before the masks, which take time, are put on to be counted
        before = replace(plain, **job.numbers())
        tuner.rates.closing = time.perf_counter() - started
    callbacks = Callbacks(job.callbacks)
    callbacks.on_measured(Measured(before.known(), tuner.rates.closing, last=False))
    if judge is not None and judge.every == "round":
        known = {name: value for name, value in before.measured.items() if value is not None}
        start = known if before.accuracy is None else {"accuracy": before.accuracy}
        job.watch = Watch(judge, partial(judged, model, stage), start)

    def write(state: Progress) -> None:
        assert checkpoint is not None
        if current().main:
            extra = {"before": vars(before), "rates": vars(tuner.rates)}
            write_checkpoint(checkpoint, model, state, tuner, history, fingerprint, extra)
        current().gather("the checkpoint", None)  # nobody is ahead of what could be continued

    job.run(progress, write if checkpoint is not None else None, history)
    rows, numbers, masks = job.rows(), job.numbers(), job.fold()
    started = time.perf_counter()
    structure = describe_structure(model, stage.structure, list(folded))
    before, after = timed(model, stage, before, replace(measure(model, stage), **numbers))
    callbacks.on_measured(Measured(after.known(), time.perf_counter() - started, last=True))
    remember_origin(model, stage.builder, structure)
    return Result(
        model, before, after, rows, dict(job.left_whole), history, {**asked, "finetune": tuner.describe()},
        package_versions(PACKAGES), stage.builder, structure, masks, checkpoint, describe_inputs(stage.example),
    )  # fmt: skip


def _found(checkpoint: Path | None, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What is to be continued, if anything: rank 0 reads it for all, whose folders need not be one."""
    found = None
    if checkpoint is not None and current().main and checkpoint.exists():
        found = read_checkpoint(checkpoint, fingerprint)
    return None if checkpoint is None else current().first("the checkpoint", found)
