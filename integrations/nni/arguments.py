"""The arguments of NNI's pruner, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from singe_plugin.algorithm import units_per_removal
from singe_plugin.batches import check_batch, in_memory, materialise
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.finetune import SCHEDULES

__all__ = ["MODES", "batches_of", "check_schedule", "check_without_evaluator"]

MODES = ("one_shot", "entwined")


def check_schedule(
    schedule: object,
    every: object,
    units_per_step: int | float | str,
    keep_at_least: object,
    training_steps: object,
    scoring_batches: object,
) -> None:
    """Raise :class:`ConfigError` for anything that cannot mean when to prune, or how much."""
    for name, value in (("training_steps", training_steps), ("scoring_batches", scoring_batches)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r} is not a number of steps; give a whole number >= 1")
    if isinstance(keep_at_least, bool) or not isinstance(keep_at_least, int) or keep_at_least < 0:
        raise ConfigError(f"keep_at_least={keep_at_least!r} is not a number of units; give a whole number >= 0")
    if schedule not in MODES:
        raise ConfigError(f"unknown schedule {schedule!r}; choose one of {', '.join(MODES)}")
    units_per_removal(units_per_step, 1)
    if every not in SCHEDULES:
        raise ConfigError(f"unknown every {every!r}; choose one of {', '.join(SCHEDULES)}")


def batches_of(batches: Iterable[Any] | None) -> list[Any] | None:
    """The batches to score on, or None; :class:`DataError` if there are none in it."""
    found = None if batches is None else in_memory(materialise(batches))
    if found is not None and not found:
        raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
    for batch in found or ():
        check_batch(batch)
    return found


def check_without_evaluator(criterion: str, schedule: str, needs_gradient: bool, batches: list[Any] | None) -> None:
    """Raise :class:`ConfigError` if a pruner without an evaluator has nothing to train with or to score on."""
    if schedule == "entwined" or (needs_gradient and batches is None):
        raise ConfigError(
            f"criterion {criterion!r} with schedule {schedule!r} needs an evaluator; give one of NNI's (the batches of "
            "its training loop are scored on), or batches=[(inputs, targets), ...] for a one_shot pruning without "
            "training, or criterion='l2'"
        )
