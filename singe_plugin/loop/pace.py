r"""How a network is pruned: in which order, how fast, and how far a layer may go.

In rounds, the share of the way to the target that is covered after round r of R is, by name of the course,

.. math:: \text{linear: } \frac rR \qquad \text{cubic: } 1-\Bigl(1-\frac rR\Bigr)^3

(the second is gradual magnitude pruning's, Zhu and Gupta 2017: much at first, little at the end).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from singe_plugin.checks import check_choice, check_count, check_flag, check_number, is_number
from singe_plugin.errors import ConfigError
from singe_plugin.fields import documented, option

__all__ = [
    "AUTO", "BY_SCORE", "COURSES", "ORDERS", "RATIOS", "WIDE", "Pace", "read_ratios", "read_step", "read_units",
    "units_per_turn",
]  # fmt: skip

AUTO, WIDE = "auto", 8  # a step of widths, and what it is where nothing is known of the device
HEADS = ("dims", "whole", "keep")
ORDERS = ("rounds", "layers")
BY_SCORE = ("global", "per_cost")
RATIOS = ("uniform", "block", *BY_SCORE)
MOST_ROUNDS = 1000
COURSES: dict[str, Callable[[float], float]] = {
    "cubic": lambda done: 1 - (1 - done) ** 3,
    "linear": lambda done: done,
}


def units_per_turn(units_per_step: int | float | str, units: int) -> int:
    """How many units go between two scorings of a layer that has ``units``.

    Args:
        units_per_step: a whole number, a fraction of the layer inside ]0, 1[, or ``"layer"`` (all at once).
        units: the units of the unpruned layer.

    Raises:
        ConfigError: for anything else.

    Example:
        >>> units_per_turn(1, 64), units_per_turn(0.25, 64), units_per_turn("layer", 64)
        (1, 16, 64)
    """
    if units_per_step == "layer":
        return units
    if isinstance(units_per_step, int) and not isinstance(units_per_step, bool) and units_per_step >= 1:
        return units_per_step
    if isinstance(units_per_step, float) and 0 < units_per_step < 1:
        return max(1, round(units_per_step * units))
    raise ConfigError(
        f"units_per_step={units_per_step!r} is not a number of units; give a whole number >= 1, a fraction inside "
        "]0, 1[ or 'layer'"
    )


def read_units(text: str) -> int | float | str:
    """A number of units, a fraction of the layer or ``layer``, from a text.

    Example:
        >>> read_units("3"), read_units("0.1"), read_units("layer")
        (3, 0.1, 'layer')
    """
    if text == "layer" or text.isdigit():
        return int(text) if text.isdigit() else text
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a number of units, a fraction or 'layer'") from error


def read_step(text: str) -> int | str:
    """A number of channels, or ``auto``, from a text.

    Example:
        >>> read_step("8"), read_step("auto")
        (8, 'auto')
    """
    if text == AUTO or text.isdigit():
        return int(text) if text.isdigit() else text
    raise ConfigError(f"{text!r} is no number of channels and not {AUTO!r}")


def read_ratios(text: str) -> str | dict[str, float]:
    """One of :data:`RATIOS`, or ``name=ratio,name=ratio``, from a text.

    Example:
        >>> read_ratios("block"), read_ratios("layer1=0.5,fc=0.1")
        ('block', {'layer1': 0.5, 'fc': 0.1})
    """
    if text in RATIOS:
        return text
    try:
        return {name.strip(): float(ratio) for name, ratio in (part.rsplit("=", 1) for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"{text!r} is neither one of {', '.join(RATIOS)} nor NAME=RATIO,NAME=RATIO") from error


@documented
class Pace:
    """In which order units go, how fast, and how far a layer may go. A name stands for the pace of that order.

    Raises:
        ConfigError: for a value that cannot mean anything, or that the order does not have.

    Example:
        >>> Pace(rounds=8).settle().ratios, Pace("layers").settle().units_per_step
        ('per_cost', 0.1)
    """

    order: str | None = option(
        default=None,
        text="``rounds`` scores all layers, then removes units of all of them, several times; ``layers`` is the "
        "paper's Algorithm 1, one layer after the other. By default rounds, or Algorithm 1 where "
        "units_per_step is given.",
        choices=ORDERS,
    )
    rounds: int | None = option(
        default=None,
        text="How many rounds there are; 1 scores the intact model only. By default 4 for units and 10 for single "
        "weights.",
    )
    course: str = option(default="cubic", text="How fast the rounds approach the target.", choices=COURSES)
    units_per_step: int | float | str | None = option(
        default=None,
        text="How many units of a layer go between two scorings of Algorithm 1: a number, a fraction of the layer "
        "inside ]0, 1[, or ``layer``; 1 is Algorithm 1 to the letter. By default a tenth of the layer.",
        read=read_units,
        metavar="N|FRACTION|layer",
    )
    ratios: str | Mapping[Any, float] | None = option(
        default=None,
        text="How the target is spread over the layers: ``uniform``, ``block`` (one ratio for each block, §3.3), "
        "``global`` (by score), ``per_cost`` (by score per parameter or MAC), or a ratio for each layer or "
        "block. By default per_cost in rounds and block in layers; for single weights global.",
        read=read_ratios,
        metavar="|".join([*RATIOS, "NAME=RATIO,..."]),
    )
    max_pruning_ratio: float | None = option(
        default=None,
        text="The largest fraction of a layer that goes. By default 0.95, and for single weights 1, of which one "
        "stays.",
    )
    min_width: int | None = option(
        default=None,
        text="How many units of a layer stay at least; a layer that has no more is left as it is. By default 4; "
        "single weights have no width.",
    )
    round_to: int | str | None = option(
        default=None,
        text="Channels that are kept are a multiple of this. ``auto`` is what the latency table says that the device "
        "likes, or 8 where there is none; less for layers of fewer than eight times as many channels, and where no "
        "such widths meet the target. By default auto for targets of MACs and latency, and 1 for others.",
        read=read_step,
        metavar="N|auto",
    )
    heads: str = option(
        default="dims",
        text="What goes of attention: ``dims``, the dimensions of all heads; ``whole`` heads, whose dimensions stay, "
        "as most configurations of transformers can say; or ``keep``, nothing.",
        choices=HEADS,
    )
    blocks: bool = option(
        default=False,
        text="Whether whole residual blocks may go, too, where the shortcut is an identity: each is one unit, ranked "
        "among the others by score. Only in rounds, with ratios by score.",
    )
    verify: bool = option(
        default=True,
        text="Whether every group is proved before anything of it is removed (see docs/backbones.md); without that, a "
        "wrong removal is the caller's own risk.",
        command=False,
    )

    def __post_init__(self) -> None:
        if self.order is not None:
            check_choice("order", self.order, ORDERS)
        check_choice("course", self.course, COURSES)
        check_choice("heads", self.heads, HEADS)
        check_flag("blocks", self.blocks)
        check_flag("verify", self.verify)
        if self.rounds is not None:
            why = ": every round scores all layers"
            check_count("rounds", self.rounds, 1, "number of rounds", MOST_ROUNDS, why)
        if self.units_per_step is not None:
            units_per_turn(self.units_per_step, 1)
        if self.order != "layers" and self.order is not None and self.units_per_step is not None:
            raise ConfigError(
                f"units_per_step={self.units_per_step!r} is for order='layers' (Algorithm 1); leave it out, or give "
                "that order"
            )
        layers = self.order == "layers" or (self.order is None and self.units_per_step is not None)
        if layers and self.rounds not in (None, 1):
            raise ConfigError(f"rounds={self.rounds!r} is for order='rounds'; leave it out, or give Pace('rounds')")
        if layers and self.course != "cubic":
            raise ConfigError(f"course={self.course!r} is for order='rounds'; leave it out, or give Pace('rounds')")
        if self.blocks and layers:
            raise ConfigError(
                "blocks=True is for order='rounds', where blocks and channels are compared; give that order"
            )
        if self.blocks and self.ratios is not None and self.ratios not in BY_SCORE:
            raise ConfigError(
                f"blocks=True is for ratios by score ({' or '.join(BY_SCORE)}), got ratios={self.ratios!r}: a block "
                "goes or stays; leave one of them out"
            )
        if isinstance(self.ratios, Mapping):
            for name, ratio in self.ratios.items():
                if not is_number(ratio) or not 0 <= ratio < 1:
                    raise ConfigError(f"ratios must be inside [0, 1[, got {ratio!r} for {name!r}")
        elif self.ratios is not None:
            check_choice("ratios", self.ratios, RATIOS, " or give a dict")
        if self.max_pruning_ratio is not None:
            check_number("max_pruning_ratio", self.max_pruning_ratio, 0, 1, "]]")
        for name, what in (("min_width", "number of units"), ("round_to", "number of channels")):
            if (value := getattr(self, name)) is not None and (name, value) != ("round_to", AUTO):
                check_count(name, value, 1, what, why=", or None")

    def settle(self, **defaults: Any) -> Pace:
        """This pace with everything decided.

        Args:
            defaults: what the fields are, if they are None, in the place of what :func:`singe_plugin.prune` takes.
        """
        usual = {"order": "rounds", "rounds": 4, "units_per_step": 0.1, "max_pruning_ratio": 0.95, "min_width": 4}
        found = {**usual, **defaults}
        order = self.order or ("layers" if self.units_per_step is not None else found["order"])
        if self.order is None and (self.rounds not in (None, 1) or self.course != "cubic" or self.blocks):
            order = "rounds"
        found |= {"order": order, "ratios": defaults.get("ratios", "per_cost" if order == "rounds" else "block")}
        found["rounds"] = 1 if order == "layers" else found["rounds"]
        found["units_per_step"] = found["units_per_step"] if order == "layers" else None
        return replace(self, **{name: value for name, value in found.items() if getattr(self, name) is None})

    def named(self, model: nn.Module) -> Pace:
        """This pace with ratios by names instead of by modules: what is recorded."""
        if not isinstance(self.ratios, Mapping):
            return self
        names = {module: name for name, module in model.named_modules()}
        return replace(self, ratios={names.get(key, key): ratio for key, ratio in self.ratios.items()})

    def share_after(self, number: int) -> float:
        """The share of the way to the target that is covered after round ``number`` (from 1).

        Example:
            >>> [round(Pace(rounds=4).share_after(number), 3) for number in (1, 2, 3, 4)]
            [0.578, 0.875, 0.984, 1.0]
        """
        assert self.rounds is not None
        return COURSES[self.course](number / self.rounds)
