"""How good the network still is: before, after and on the way, in the user's own measure; and when to stop."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from singe_plugin.checks import check_choice, check_number
from singe_plugin.errors import ConfigError, DataError, SingeError
from singe_plugin.loop.events import Callback, Evaluated, Stopped
from singe_plugin.loop.progress import Progress
from singe_plugin.state import preserved

__all__ = ["Evaluate", "Watch", "measured_by"]

EVERY = ("end", "round")
Values = dict[str, float]
_logger = logging.getLogger("singe_plugin")


@dataclass(frozen=True)
class Evaluate:
    """What a network is judged by, how often, and how much worse it may get.

    Args:
        by: a dataset or batches, for the top-1 accuracy; or a function of the model that returns a number or a
            dictionary of numbers (``{"mAP50": 0.52, "mAP": 0.37}``). It gets the model in eval mode, without gradients,
            and what it changes of modes and buffers is put back; weights it leaves alone.
        every: ``end`` is before and after; ``round`` also after every round (in Algorithm 1: every layer), repaired if
            that is repaired, and fine-tuned if the fine-tuning is entwined.
        max_drop: how much worse than before pruning it may be after a round, in units of the measure. A round after
            which it is worse is undone, and the run ends with the network as it was before that round; what was to
            happen at the end, the repair and the fine-tuning, still does. It implies ``every="round"``, and that
            the survivors are repaired in every round if nothing is said of the repair.
        measure: the name of the number that ``max_drop`` is of; None is ``accuracy``, or the first one.
        lower_is_better: whether that is an error or a loss.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> Evaluate(lambda model: 0.5, max_drop=0.02).every
        'round'
    """

    by: Any
    every: str = "end"
    max_drop: float | None = None
    measure: str | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        check_choice("every", self.every, EVERY)
        if self.max_drop is not None:
            check_number("max_drop", self.max_drop, 0, math.inf, "[[", "distance in the measure's units: a number")
            object.__setattr__(self, "every", "round")
        if self.by is None:
            raise ConfigError("Evaluate needs what to judge by: a dataset, batches, or a function of the model")

    @property
    def is_function(self) -> bool:
        """Whether the user's own function measures."""
        return callable(self.by) and not hasattr(self.by, "__getitem__") and not hasattr(self.by, "__iter__")

    def describe(self) -> dict[str, Any]:
        """The options as plain values: what a run records.

        Example:
            >>> Evaluate(len, max_drop=0.1).describe()["by"]
            'len'
        """
        return {**vars(self), "by": getattr(self.by, "__name__", type(self.by).__name__)}


def measured_by(function: Callable[[nn.Module], Any], model: nn.Module) -> Values:
    """What the user's function says of a model, by name; the model is left as it was.

    Raises:
        DataError: if that is neither a number nor a dictionary of numbers, or the function fails.

    Example:
        >>> measured_by(lambda model: {"weights": model.weight.numel()}, nn.Linear(2, 3))
        {'weights': 6.0}
    """
    name = getattr(function, "__name__", type(function).__name__)
    name = "value" if name == "<lambda>" else name
    with preserved(model), torch.no_grad():
        model.eval()
        try:
            found = function(model)
        except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"the function that judges the model, {name}, failed with {type(error).__name__}: {error}; it gets the "
                "model and returns a number, or a dictionary of numbers"
            ) from error
    values = found if isinstance(found, Mapping) else {name: found}
    try:
        return {str(key): float(value) for key, value in values.items()}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the function that judges the model, {name}, returned {found!r}; it returns a number, or a dictionary of "
            "numbers"
        ) from error


class Watch:
    """Looks at the network after every round, and stops the run when it got too bad.

    Args:
        options: how.
        values: measures the network.
        before: what it was before pruning.
    """

    def __init__(self, options: Evaluate, values: Callable[[], Values], before: Values) -> None:
        self.options, self.values, self.before = options, values, before
        self.remember: Callable[[], Callable[[], None]] | None = None
        self._undo: Callable[[], None] | None = None
        if options.max_drop is not None:
            self.measure = self._chosen()

    def _chosen(self) -> str:
        usual = "accuracy" if "accuracy" in self.before else next(iter(self.before), None)
        chosen = self.options.measure or usual
        if chosen is None or chosen not in self.before:
            names = ", ".join(map(repr, self.before)) or "nothing: the outputs are no class scores"
            raise ConfigError(
                f"max_drop is of {self.options.measure or 'the accuracy'!r}, and what is measured is {names}; name one "
                "of these with measure=, or give a function of the model that returns it"
            )
        if not math.isfinite(self.before[chosen]):
            raise ConfigError(
                f"max_drop is of {chosen!r}, which is {self.before[chosen]} before pruning: nothing can be compared "
                "with it"
            )
        return chosen

    def before_turn(self, progress: Progress) -> None:
        """Remember what there is, if it may have to be put back."""
        if self.options.max_drop is None or self._undo is not None or self.remember is None:
            return
        undo, state = self.remember(), copy.deepcopy(vars(progress))

        def back() -> None:
            undo()
            vars(progress).update(state)

        self._undo = back

    def after_round(self, progress: Progress, callback: Callback) -> bool:
        """Measure and tell; whether the round was undone and nothing more is to be removed."""
        values = self.values()
        callback.on_evaluated(Evaluated(values))
        undo, self._undo = self._undo, None
        if self.options.max_drop is None or undo is None:
            return False
        before, now = self.before[self.measure], values.get(self.measure, math.nan)
        drop = now - before if self.options.lower_is_better else before - now
        if drop <= self.options.max_drop:
            return False
        undo()
        progress.stopped = (
            f"{self.measure} went from {before:.4g} to {now:.4g}, which is worse by more than max_drop="
            f"{self.options.max_drop:g}: the last round was undone"
        )
        _logger.warning("stopped: %s", progress.stopped)
        callback.on_stopped(Stopped(progress.stopped))
        return True
