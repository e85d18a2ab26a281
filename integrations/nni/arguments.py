"""The arguments of NNI's pruner, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from singe_plugin.checks import check_choice, check_count
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.finetune import EVERY
from singe_plugin.loop.pace import Pace
from singe_plugin.method.batches import in_memory, materialise
from singe_plugin.method.options import Scoring
from singe_plugin.method.step import check_form

__all__ = ["batches_of", "check_amounts", "check_without_evaluator", "settle_entwined"]


def check_amounts(every: object, min_width: object, training_steps: object) -> None:
    """Raise :class:`ConfigError` for anything that cannot mean when to train on, or how much stays."""
    check_count("training_steps", training_steps, 1, "number of steps")
    check_count("min_width", min_width, 0, "number of units")
    check_choice("every", every, EVERY)


def settle_entwined(pace: Pace) -> Pace:
    """The pace inside a training loop, with everything decided.

    Raises:
        ConfigError: for what NNI's config list says already, or for rounds.
    """
    if pace.order == "rounds" or pace.rounds is not None:
        raise ConfigError("inside NNI's training loop layers are pruned one after the other; give pace='layers'")
    for name in ("ratios", "max_pruning_ratio", "min_width", "round_to"):
        if getattr(pace, name) is not None:
            instead = "give it to the pruner itself" if name == "min_width" else "the config list says how much goes"
            raise ConfigError(f"pace.{name} is not for NNI's pruner: {instead}")
    if pace.heads != "dims":
        raise ConfigError("pace.heads is not for NNI's pruner: the config list says what goes of which layer")
    return pace.settle(order="layers")


def batches_of(batches: Iterable[Any] | None, objective: Any = None) -> list[Any] | None:
    """The batches to score on, or None; :class:`DataError` if there are none in it."""
    found = None if batches is None else in_memory(materialise(batches))
    if found is not None and not found:
        raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
    for batch in found or ():
        check_form(batch, objective)
    return found


def check_without_evaluator(scoring: Scoring, entwined: bool, batches: list[Any] | None) -> None:
    """Raise :class:`ConfigError` if a pruner without an evaluator has nothing to train with or to score on."""
    if entwined or (scoring.rule.needs_gradient and batches is None):
        raise ConfigError(
            f"criterion {scoring.criterion!r}{' with a pace' if entwined else ''} needs an evaluator; give one of "
            "NNI's (the batches of its training loop are scored on), or batches=[(inputs, targets), ...] for a pruning "
            "without training, or the criterion 'l2'"
        )
