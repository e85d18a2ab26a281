"""Checks of single arguments: each says what was given, and what would do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from singe_plugin.errors import ConfigError

__all__ = ["check_choice", "check_count", "check_flag", "check_number", "closest", "is_number"]


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float, and no bool.

    Example:
        >>> is_number(0.5), is_number(True), is_number(float("nan"))
        (True, False, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: Any, least: int, what: str = "count", most: int | None = None, why: str = "") -> None:
    """Raise :class:`ConfigError` unless a value is a whole number between ``least`` and ``most``.

    Args:
        name: of the argument.
        value: what was given for it.
        least, most: the smallest and the largest that can be.
        what: what is counted, for the message.
        why: more to say of the limits.

    Example:
        >>> check_count("rounds", 0, 1, "number of rounds")
        Traceback (most recent call last):
        ...
        singe_plugin.errors.ConfigError: rounds=0 is not a number of rounds; give a whole number >= 1
    """
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not ok:
        limit = "" if most is None else f" and at most {most}"
        raise ConfigError(f"{name}={value!r} is not a {what}; give a whole number >= {least}{limit}{why}")


def check_flag(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless a value is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is neither True nor False")


def check_number(name: str, value: Any, low: float, high: float, ends: str, what: str = "fraction") -> None:
    """Raise :class:`ConfigError` unless a value is a finite number between ``low`` and ``high``.

    Args:
        name: of the argument.
        value: what was given for it.
        low, high: the limits.
        ends: which of them belong to the interval: ``"[]"``, ``"[["``, ``"]]"`` or ``"]["``, as in the notation.
        what: what the number is, for the message.

    Example:
        >>> check_number("ratio", 1.0, 0, 1, "[[")
        Traceback (most recent call last):
        ...
        singe_plugin.errors.ConfigError: ratio=1.0 is not a fraction inside [0, 1[
    """
    ok = is_number(value)
    ok = ok and (value > low or (ends[0] == "[" and value == low))
    ok = ok and (value < high or (ends[1] == "]" and value == high))
    if not ok:
        raise ConfigError(f"{name}={value!r} is not a {what} inside {ends[0]}{low:g}, {high:g}{ends[1]}")


def check_choice(name: str, value: Any, choices: Iterable[Any], otherwise: str = "") -> None:
    """Raise :class:`ConfigError` unless a value is one of some names; the closest is proposed.

    Args:
        name: of the argument.
        value: what was given for it.
        choices: the names, and None where that is one of them.
        otherwise: what else could have been given.

    Example:
        >>> check_choice("order", "round", ["rounds", "layers"])
        Traceback (most recent call last):
        ...
        singe_plugin.errors.ConfigError: unknown order 'round' (did you mean 'rounds'?); choose one of rounds, layers
    """
    choices = list(choices)
    if not any(value is c or (isinstance(c, str) and isinstance(value, str) and value == c) for c in choices):
        names = ", ".join(map(str, choices))
        raise ConfigError(f"unknown {name} {value!r}{closest(value, choices)}; choose one of {names}{otherwise}")


def closest(value: Any, choices: Iterable[Any]) -> str:
    """``" (did you mean 'rounds'?)"``, or nothing where no name is near.

    Example:
        >>> closest("resnet18x", ["resnet18", "vit"]), closest("zzz", ["resnet18"])
        (" (did you mean 'resnet18'?)", '')
    """
    names = [c for c in choices if isinstance(c, str)]
    found = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
    return f" (did you mean {found[0]!r}?)" if found else ""
