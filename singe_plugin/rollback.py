"""All or nothing: what a run changed, put back if it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from singe_plugin.axes import AxisGraph, Snapshot, Trackers
from singe_plugin.state import RngState, train_mode_of
from singe_plugin.tuner import Tuner

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(
    model: nn.Module, tuner: Tuner | None, trackers: Trackers, graph: AxisGraph | None = None
) -> Iterator[None]:
    """If the block fails, model, graph, optimizer, EMA, scheduler, loader and random states are as before.

    The modes of the modules are, in any case.

    Args:
        model: the model.
        tuner: the fine-tuning that runs in the block, and is prepared in it: an optimizer that is made there goes.
        trackers: optimizers and averaged copies that change along.
        graph: the groups of the model, if units are removed.
    """
    modes = train_mode_of(model)
    undo = Snapshot(model, graph, trackers=trackers, values=True)
    rewind = None if tuner is None else tuner.rewinder()
    rng = RngState.capture()
    try:
        yield
    except BaseException:
        undo.restore()
        if rewind is not None:
            rewind()
        rng.restore()
        raise
    finally:
        for module, training in modes.items():
            module.training = training
