"""Runs that a process of its own makes until it is killed, and the same ones from the beginning to the end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.data import DataLoader

from singe_plugin import Builder, Callback, FineTune, Recipe, Result, prune, save
from singe_plugin.errors import ArtifactError
from singe_plugin.files import locked
from singe_plugin.integrations.unstructured import prune_weights
from singe_plugin.run import checkpoint
from singe_plugin.run.result import Metrics

from asked import asked
from small_nets import Chain, Pairs, Trace, assert_same_values, images, untimed

BATCHES = images(4)


def process(body: Callable[..., None], *arguments: Any) -> multiprocessing.context.ForkServerProcess:
    """A process of its own, started; the first of them imports everything, and the others are forks of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    started = context.Process(target=body, args=arguments)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        started.start()
    return started


@dataclass(frozen=True)
class Run:
    """One of the ways to prune a small network."""

    granularity: str
    order: str
    every: str
    clip: bool = True

    def __call__(self, folder: Path | None, *callbacks: Callback, resume: bool = True) -> Result:
        torch.manual_seed(0)
        net = Chain(dropout=0.5)
        steps = 210 if self.every == "end" else 20  # a checkpoint is written after 200 steps at the end
        loader = DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True)
        tuning = FineTune(
            loader, steps, self.every, lr=0.05, recipe=Recipe(warmup=2), clip_grad=0.1 if self.clip else None
        )
        folders: dict[str, Any] = {} if folder is None else {"out_dir": folder, "resume": resume}
        common: dict[str, Any] = {"finetune": tuning, "nodes": 1, "val_data": BATCHES, "callbacks": callbacks} | folders
        if self.granularity == "unit":
            amount = {"units_per_step": 0.3} if self.order == "layers" else {"rounds": 3}
            return prune(net, BATCHES, **asked(verify=False, **amount, **common))
        amount = {"units_per_step": 0.4} if self.order == "layers" else {"rounds": 3}
        return prune_weights(net, BATCHES, **asked(sparsity=0.8, **amount, **common))


RUNS = [Run(g, o, e) for g in ("unit", "weight") for o in ("rounds", "layers") for e in ("layer", "removal", "end")]


@dataclass(frozen=True)
class Kill:
    """Where a process ends: at the n-th event of a kind, at a moment of the n-th writing of a file, or after a time."""

    what: str
    number: float

    def callback(self) -> Callback:
        """The callback for the run; what happens elsewhere in the process is set up, too."""
        heard, left = Callback(), [self.number]

        def count(*_: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                end()

        if self.what == "seconds":
            timer = threading.Timer(self.number, end)
            timer.daemon = True
            timer.start()
        elif self.what.startswith("on_"):
            setattr(heard, self.what, count)
        else:
            _count_writing(self.what, count)
        return heard


def end() -> None:
    """``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def _count_writing(moment: str, count: Callable[..., None]) -> None:
    """Count the checkpoints when they are half written, whole but not moved into place, or in place."""
    save, replace = checkpoint.save_file, os.replace

    def torn(tensors: Any, path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        count()
        path.write_bytes(whole)

    def moved(source: Any, path: Any) -> None:
        if moment == "unmoved":
            count()
        replace(source, path)
        if moment == "moved":
            count()

    if moment == "torn":
        checkpoint.save_file = torn
    else:
        os.replace = moved  # type: ignore[assignment]


def until_killed(run: Run, folder: Path, kill: Kill) -> None:
    """The body of a process."""
    torch.set_num_threads(1)
    run(folder, kill.callback())


def assert_same_run(one: Result, other: Result) -> None:
    """Everything but the times: tensors, masks, history, options, numbers and structure."""
    assert_same_values(one.model, other.model)
    assert_same_values(one.weight_masks, other.weight_masks)
    assert one.history.without_times() == other.history.without_times()
    assert untimed(one) == untimed(other)
    assert one.before.latency_ms is not None
    assert one.after.latency_ms is not None
    for name in ("layers", "left_whole", "options", "versions", "structure"):
        assert getattr(one, name) == getattr(other, name), name


def limited(folder: Path) -> None:
    """The body of a process whose files may have 20,000 bytes: one error, nothing left, nothing changed."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    net = Chain(widths=(16, 64, 16))
    trace = Trace(net)
    for action in (
        lambda: prune(net, BATCHES, **asked(verify=False, nodes=1, finetune_steps=2, rounds=2, out_dir=folder)),
        lambda: prune_weights(net, BATCHES, **asked(rounds=2, nodes=1, finetune_steps=2, out_dir=folder)),
        lambda: save(Result(net, Metrics(1, 1), Metrics(1, 1), builder=WIDE, structure=NOTHING), folder),
    ):
        try:
            action()
        except ArtifactError as error:
            text = str(error)
        assert "cannot be written: " in text
        assert "File too large" in text or "os error 27" in text, text
        assert list(folder.iterdir()) == []
        trace.assert_unchanged()


WIDE = Builder.factory("small_nets:Chain", widths=[16, 64, 16])
NOTHING: dict[str, Any] = {"attributes": {}, "folded": [], "channels_last": [], "frozen": []}


def holding(folder: Path, ready: Any) -> None:
    """The body of a process that has a folder for itself until it is killed."""
    with locked(folder):
        ready.set()
        time.sleep(600)
