r"""Which widths layers may have: multiples of what hardware is quick with.

Kernels work on channels in blocks of 8 or so, and a layer of 43 channels takes the time of 48, or falls back to a slow
kernel. With a step of its own, every layer could end only at multiples of 8; but a layer of 16 channels would have one
choice besides the one it has. So a step that is not asked for is halved for a layer until it has enough of them:

.. math:: \text{step}(c) = \max\{s \in \{s_0, s_0/2, \dots, 1\} : c \ge F s\}

where c is the number of the layer's channels before pruning, s₀ the step of wide layers and F :data:`FEWEST`. And where
no such widths meet a target, all steps are halved until some do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from singe_plugin.errors import BudgetError
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.pace import AUTO, Pace
from singe_plugin.loop.target import Target

__all__ = ["FEWEST", "Widths", "with_step"]

FEWEST = 8  # widths that a layer has to choose from, if its step is found by itself

_logger = logging.getLogger("singe_plugin")
T = TypeVar("T")


def with_step(pace: Pace, target: Target | None) -> Pace:
    """A pace that says what widths are rounded to: to what hardware likes, if the network is to become faster.

    Example:
        >>> with_step(Pace(), Target("macs", 0.3)).round_to, with_step(Pace(), Target("params", 0.3)).round_to
        ('auto', None)
    """
    fast = target is not None and target.is_of_speed
    return replace(pace, round_to=AUTO) if fast and pace.round_to is None else pace


@dataclass(frozen=True)
class Widths:
    """The widths that the layers of a network may have.

    Attributes:
        step: the channels that stay are a multiple of this.
        exact: whether that holds for every layer, whatever its width; otherwise the step is that of wide layers.

    Example:
        >>> [Widths(8).step_of(channels) for channels in (6, 12, 24, 64)], Widths(8, exact=True).step_of(6)
        ([1, 1, 2, 8], 8)
    """

    step: int = 1
    exact: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are tried one after the other, until a target is met."""
        found = [self.step]
        while not self.exact and found[-1] > 1:
            found.append(found[-1] // 2)
        return tuple(found)

    def step_of(self, channels: int) -> int:
        """The step of a layer that has this many channels before pruning."""
        return next((step for step in self.steps if self.exact or channels >= FEWEST * step), 1)

    def of(self, layers: Sequence[GroupSpec], units: Callable[[GroupSpec], int] | None = None) -> list[GroupSpec]:
        """The layers with their steps.

        Args:
            layers: as they are.
            units: how many units a layer has before pruning; by default what it has now.
        """
        counted = units or (lambda layer: layer.units)
        return [
            layer if layer.is_block else replace(layer, step=self.step_of(counted(layer) * layer.channels_per_unit))
            for layer in layers
        ]

    def finest(self, layers: Sequence[GroupSpec]) -> list[GroupSpec]:
        """Layers that have their steps, with the smallest that are allowed."""
        return _at_most(layers, self.steps[-1])

    def plan(self, layers: Sequence[GroupSpec], plan: Callable[[list[GroupSpec]], T]) -> T:
        """What a function makes of layers that have their steps; of finer ones, where it cannot meet its target.

        Raises:
            BudgetError: the function's, where no step helps.
        """
        for step in self.steps:
            try:
                return plan(_at_most(layers, step))
            except BudgetError:
                if step == self.steps[-1]:
                    raise
                _logger.info("no multiples of %d channels meet the target; multiples of %d are tried", step, step // 2)
        raise AssertionError("there is at least one step")


def _at_most(layers: Sequence[GroupSpec], step: int) -> list[GroupSpec]:
    return [replace(layer, step=min(layer.step, step)) for layer in layers]
