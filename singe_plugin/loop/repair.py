"""Whether and how the survivors of a removal take over: what can be said about it, and what is said of each layer."""

from __future__ import annotations

from dataclasses import dataclass

from singe_plugin.checks import check_choice, check_count, check_number
from singe_plugin.fields import documented, option

__all__ = ["Repair", "Solved"]

EVERY = ("round", "end")
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@documented
class Repair:
    """How layers are solved again after a removal. A number stands for the repair with that many images.

    Every layer that gets other inputs than in the unpruned network is solved again, in forward order, so that it gives
    the unpruned network's outputs from what is left: a ridge regression, without labels and without training (see
    :mod:`singe_plugin.loop.repairer`).

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> Repair(256).ridges
        (0.0001, 0.001, 0.01, 0.1, 1.0)
    """

    images: int = option(
        default=512, text="How many images of the data, without their labels, it is solved on.", flag="--repair-images"
    )
    every: str = option(
        default="end",
        text="When it happens: once, after the last removals, at the ``end``, or after those of every ``round`` (in "
        "Algorithm 1: of every layer); in any case before what is fine-tuned then.",
        choices=EVERY,
        flag="--repair-every",
    )
    ridge: float | None = option(
        default=None,
        text="The weight of staying close to the present weights, relative to the mean square of a layer's inputs. By "
        "default every layer has the best on held-out positions of 1e-4, 1e-3, 1e-2, 1e-1 and 1.",
    )
    positions: int = option(
        default=32,
        text="How many positions of an image, drawn at random, a layer is solved on at most.",
        flag="--repair-positions",
    )

    def __post_init__(self) -> None:
        check_count("images", self.images, 2, "number of images")
        check_count("positions", self.positions, 1, "number of positions")
        check_choice("every", self.every, EVERY)
        if self.ridge is not None:
            check_number("ridge", self.ridge, 0, 1e6, "][", "weight: a number")

    @property
    def ridges(self) -> tuple[float, ...]:
        """Those that are tried."""
        return RIDGES if self.ridge is None else (self.ridge,)


@dataclass(frozen=True)
class Solved:
    """What became of one layer.

    Attributes:
        name: its parameter.
        before, after: the error of its results on held-out positions, against the unpruned network's and relative to
            them; NaN if it could not be solved.
        ridge: the one that was best; None if the layer keeps its weights.
        reason: why it could not be solved, or None.
    """

    name: str
    before: float = float("nan")
    after: float = float("nan")
    ridge: float | None = None
    reason: str | None = None
