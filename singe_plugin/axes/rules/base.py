"""The table of rules, and how to add one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..algebra import Axis, fresh
from ..trace import Trace

__all__ = ["OPAQUE", "RULES", "Rule", "opaque", "rule"]

OPAQUE = "its indices are made by"  # how the reason begins for positions in space, windows, steps

Rule = Callable[[Trace, Any, Any, Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names without the overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def opaque(t: Trace, size: int) -> Axis:
    """An axis whose indices mean nothing that could be removed."""
    return fresh(size, f"{OPAQUE} {t.where}")
