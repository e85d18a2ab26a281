"""A comparison of sizes that a model made while it was traced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .algebra import Axis
from .places import Place
from .tracked import TrackedInt, plain

__all__ = ["Question"]

_WORDS = {
    operator.eq: "equal to", operator.lt: "less than", operator.le: "at most", operator.gt: "greater than",
    operator.ge: "at least",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A comparison of two numbers, one of which depends on sizes.

    Attributes:
        left, right: what was compared.
        relation: how.
        answer: what it said.
        where: the class of the module that asked.
    """

    left: TrackedInt
    right: Any
    relation: Callable[[Any, Any], bool]
    answer: bool
    where: str

    def __str__(self) -> str:
        asked = f"a size of {plain(self.left)} is {_WORDS[self.relation]} {self.right}"
        return f"{self.where} asks whether {asked}, and would go another way"

    @property
    def key(self) -> Any:
        """Equal for questions that ask the same."""
        return self.relation, _shape(self.left), _shape(self.right)

    def sources(self) -> Iterator[Place | Axis]:
        """The attributes and axes that both numbers are made of."""
        yield from _sources(self.left)
        yield from _sources(self.right)

    def stays(self, size: Callable[[Place | Axis], int]) -> bool:
        """Whether the answer is what it was.

        Args:
            size: what an attribute is, or the size of an axis.
        """
        try:
            return bool(self.relation(_now(self.left, size), _now(self.right, size))) == self.answer
        except ArithmeticError:  # it cannot even be asked
            return False


def _shape(number: Any) -> Any:
    """A number as what it is made of."""
    if not isinstance(number, TrackedInt):
        return number
    if number.made is not None:
        return number.made[0], *map(_shape, number.made[1])
    return tuple((tuple(term.places.items()), term.axes) for term in number.terms)


def _sources(number: Any) -> Iterator[Place | Axis]:
    if isinstance(number, TrackedInt):
        for operand in () if number.made is None else number.made[1]:
            yield from _sources(operand)
        for term in number.terms if number.made is None else ():
            yield from term.places
            yield from (axis for axis, _ in term.axes)


def _now(number: Any, size: Callable[[Place | Axis], int]) -> Any:
    """What a number is with other sizes."""
    if not isinstance(number, TrackedInt):
        return number
    if number.made is not None:
        operation, operands = number.made
        return operation(*(_now(operand, size) for operand in operands))
    (source,) = _sources(number)
    return size(source)
