"""Where the integers of a model live that its layers keep."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Where an integer lives: in ``owner.attr``, or in what that holds, along ``path``.

    A step of the path is an index, a key, or ``".name"`` for an attribute.
    """

    owner: nn.Module
    attr: str
    path: tuple[Any, ...] = ()

    def get(self) -> int:
        value = self.owner.__dict__[self.attr]
        for step in self.path:
            value = getattr(value, step[1:]) if _is_attribute(step) else value[step]
        return int.__int__(value)

    def set(self, value: int) -> None:
        """Change the integer; what holds it is replaced, not changed, so that the old one can be put back."""
        self.owner.__dict__[self.attr] = _replaced(self.owner.__dict__[self.attr], self.path, value)


def _is_attribute(step: Any) -> bool:
    return isinstance(step, str) and step.startswith(".")


def _replaced(holder: Any, path: tuple[Any, ...], value: int) -> Any:
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(holder, tuple):
        changed = list(holder)
        changed[step] = _replaced(changed[step], rest, value)
        return type(holder)(changed)
    made = copy(holder)
    if _is_attribute(step):
        setattr(made, step[1:], _replaced(getattr(holder, step[1:]), rest, value))
    else:
        made[step] = _replaced(holder[step], rest, value)
    return made
