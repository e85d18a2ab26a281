"""Integers that remember where they come from: an attribute of a module, or a dimension of a tensor.

``x.reshape(b, n, self.num_heads, c // self.num_heads)`` ties an attribute and a quotient to two dimensions. While a
model is traced, every integer attribute of its modules and every size that it reads off a tensor is an equal ``int``
that knows its origin; products and exact quotients of such integers know theirs. So the trace sees which attributes
have to follow when a dimension becomes smaller, and which dimensions have to stay of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from .algebra import Axis

__all__ = ["Place", "TrackedInt", "attribute", "dimension", "has_tracked", "tracked_attributes"]

OBSERVERS: list[Callable[[TrackedInt], None]] = []  # told when a size becomes a scale: ``head_dim ** -0.5``
_OWN = frozenset({"training"})


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
        return int(value)

    def set(self, value: int) -> None:
        """Change it; what holds it is replaced, not changed, so that the old one can be put back."""
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


class TrackedInt(int):
    """An ``int`` that is a product of powers of attributes and dimensions, times a number (less another such).

    Example:
        >>> heads = TrackedInt(6, places={Place(nn.Module(), "num_heads"): 1})
        >>> width = (heads * 64) // 2
        >>> width, width.factor, list(width.places.values())
        (192, Fraction(32, 1), [1])
    """

    factor: Fraction
    places: Mapping[Place, int]
    axes: tuple[tuple[Axis, int], ...]
    less: TrackedInt | None

    def __new__(
        cls,
        value: int,
        factor: Fraction = Fraction(1),
        places: Mapping[Place, int] | None = None,
        axes: tuple[tuple[Axis, int], ...] = (),
        less: TrackedInt | None = None,
    ) -> TrackedInt:
        made = super().__new__(cls, value)
        made.factor, made.places, made.axes, made.less = factor, places or {}, axes, less
        return made

    def _times(self, other: Any, power: int) -> Any:
        value = int(self) * int(other) if power > 0 else int(self) // int(other)
        if self.less is not None or getattr(other, "less", None) is not None:
            return value
        if not isinstance(other, TrackedInt):
            return TrackedInt(value, self.factor * Fraction(int(other)) ** power, self.places, self.axes)
        places = dict(self.places)
        for place, exponent in other.places.items():
            places[place] = places.get(place, 0) + power * exponent
        axes = (*self.axes, *((axis, power * exponent) for axis, exponent in other.axes))
        return TrackedInt(value, self.factor * other.factor**power, {p: e for p, e in places.items() if e}, axes)

    def __mul__(self, other: Any) -> Any:
        if type(other) is bool or not isinstance(other, int) or not other or not self:
            return int(self) * other
        return self._times(other, 1)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if type(other) is bool or not isinstance(other, int) or not other or int(self) % int(other):
            return int(self) // other
        return self._times(other, -1)

    def __sub__(self, other: Any) -> Any:
        value = int(self) - int(other) if isinstance(other, int) else int(self) - other
        if not isinstance(other, TrackedInt) or self.less is not None or other.less is not None:
            return value
        return TrackedInt(value, self.factor, self.places, self.axes, other)

    def __pow__(self, power: Any, modulus: Any = None) -> Any:
        if isinstance(power, float) and OBSERVERS:
            OBSERVERS[-1](self)
        return int(self) ** power

    def __float__(self) -> float:  # math.sqrt(width)
        if OBSERVERS:
            OBSERVERS[-1](self)
        return float(int(self))

    def __rfloordiv__(self, other: Any) -> Any:
        if type(other) is not int or not self or other % int(self) or self.less is not None:
            return other // int(self)
        inverse = {place: -exponent for place, exponent in self.places.items()}
        axes = tuple((axis, -exponent) for axis, exponent in self.axes)
        return TrackedInt(other // int(self), other / self.factor, inverse, axes)


def attribute(value: int, place: Place) -> TrackedInt:
    """An integer that is an attribute."""
    return TrackedInt(value, places={place: 1})


def dimension(value: int, axis: Axis) -> TrackedInt:
    """An integer that was read off a tensor's shape."""
    return TrackedInt(value, axes=((axis, 1),))


def _plain(value: Any) -> bool:
    return type(value) is int and value > 1


@contextmanager
def tracked_attributes(model: nn.Module) -> Iterator[None]:
    """Every integer attribute (and integers in tuples and lists) of every module, replaced by a tracked one."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for attr, value in list(module.__dict__.items()):
                if attr in _OWN or attr.startswith("_"):
                    continue
                if _plain(value):
                    replacement: Any = attribute(value, Place(module, attr))
                elif type(value) in (tuple, list) and any(_plain(v) for v in value):
                    replacement = type(value)(
                        attribute(v, Place(module, attr, (i,))) if _plain(v) else v for i, v in enumerate(value)
                    )
                else:
                    continue
                saved.append((module, attr, value))
                module.__dict__[attr] = replacement
        yield
    finally:
        for module, attr, value in saved:
            module.__dict__[attr] = value


def has_tracked(value: Any) -> bool:
    """Whether there is a tracked integer among nested arguments."""
    if isinstance(value, TrackedInt):
        return True
    if isinstance(value, (tuple, list)):
        return any(has_tracked(item) for item in value)
    return isinstance(value, slice) and has_tracked((value.start, value.stop))
