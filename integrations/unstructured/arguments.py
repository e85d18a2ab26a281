"""How many weights a user may ask to mask: each check says what was given, and what would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from singe_plugin.checks import check_number
from singe_plugin.errors import ConfigError
from singe_plugin.loop.pace import Pace

from .allocation import RATIOS
from .patterns import Pattern

__all__ = ["DEFAULT_ROUNDS", "DEFAULT_SPARSITY", "Sparsity", "settle_pace", "settle_sparsity", "split_sparsity"]

Sparsity = float | str | Pattern | tuple[Any, Any]
"""A fraction, an N:M pattern, or ``(pattern, fraction)``."""

DEFAULT_SPARSITY = 0.9
DEFAULT_ROUNDS = 10


def settle_pace(pace: Pace, rounds: int) -> Pace:
    """The pace of a pruner of single weights, with everything decided.

    Raises:
        ConfigError: for what single weights do not have.
    """
    for name in ("min_width", "round_to"):
        if getattr(pace, name) is not None:
            raise ConfigError(
                f"{name}={getattr(pace, name)!r} is for units (channels, heads), and single weights have no width; "
                "leave it out"
            )
    if pace.heads != "dims":
        raise ConfigError(f"heads={pace.heads!r} is for units; single weights are of no head; leave it out")
    if pace.blocks:
        raise ConfigError("blocks=True is for units: single weights are masked, and no block goes; leave it out")
    if not pace.verify:
        raise ConfigError("verify=False is for units (channels, heads): single weights have no groups; leave it out")
    if isinstance(pace.ratios, str) and pace.ratios not in RATIOS:
        raise ConfigError(
            f"ratios={pace.ratios!r} is for units; for single weights choose one of {', '.join(RATIOS)} or give "
            "{layer: ratio}"
        )
    found = pace.settle(rounds=rounds, ratios="global", max_pruning_ratio=1.0)
    return replace(found, min_width=None)


def split_sparsity(given: Sparsity | None) -> tuple[Any, Pattern | None]:
    """The fraction and the pattern that a sparsity says.

    Raises:
        ConfigError: for what looks like a pattern and is none.

    Example:
        >>> split_sparsity(0.9), split_sparsity("2:4"), split_sparsity(("2:4", 0.75))
        ((0.9, None), (None, Pattern(keep=2, block=4)), (0.75, Pattern(keep=2, block=4)))
    """
    if isinstance(given, (tuple, list)) and len(given) == 2 and not isinstance(given[0], int):
        return given[1], Pattern.parse(given[0])
    return (None, Pattern.parse(given)) if isinstance(given, (str, Pattern, tuple, list)) else (given, None)


def settle_sparsity(sparsity: Any, pace: Pace, pattern: Pattern | None) -> float | None:
    """The fraction of the weights to mask; None is what the pattern, or a ratio per layer, says.

    Raises:
        ConfigError: for a fraction that cannot be.
    """
    ratios: dict[str, Any]
    if isinstance(pace.ratios, Mapping):
        if sparsity is not None:
            raise ConfigError(
                f"sparsity={sparsity!r} and ratios with one for each layer were both given; leave one out"
            )
        ratios = {f"ratios[{name!r}]": ratio for name, ratio in pace.ratios.items()}
    else:
        sparsity = DEFAULT_SPARSITY if sparsity is None and pattern is None else sparsity
        ratios = {} if sparsity is None else {"sparsity": sparsity}
    most = pace.max_pruning_ratio
    assert most is not None
    for name, ratio in ratios.items():
        check_number(name, ratio, 0, 1, "[[", "fraction of weights")
        if pattern is not None and 0 < ratio < pattern.sparsity - 1e-9:
            raise ConfigError(
                f"{name}={ratio:g} is less than the {pattern.sparsity:g} that the pattern {pattern} masks; leave it "
                "out, or give more"
            )
        if pace.ratios != "global" and ratio > most:
            raise ConfigError(f"{name}={ratio:g} is more than max_pruning_ratio={most:g}; raise that")
    return None if sparsity is None else float(sparsity)
