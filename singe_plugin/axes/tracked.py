"""Integers that remember where they come from: an attribute of a module, or a dimension of a tensor.

``x.reshape(b, n, self.num_heads, c // self.num_heads)`` ties an attribute and a quotient to two dimensions. While a
model is traced, every integer attribute of its modules and every size that it reads off a tensor is an equal ``int``
that knows its origin, and so is whatever is computed from them. So the trace sees which attributes have to follow when
a dimension becomes smaller, which dimensions have to stay of one size, and which numbers depend on a width in a way
that nothing can follow: a quotient with a remainder, a logarithm, an ``int(0.3 * c)``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from singe_plugin.nested import leaves_in

from .algebra import Axis
from .places import Place

__all__ = [
    "ASKED", "COMPARED", "OBSERVERS", "Term", "TrackedInt", "attribute", "dimension", "is_width", "plain",
    "tracked_attributes", "tracked_in",
]  # fmt: skip

OBSERVERS: list[Callable[[TrackedInt], None]] = []  # told when a size leaves the integers: ``head_dim ** -0.5``
COMPARED: list[Callable[[TrackedInt, TrackedInt], None]] = []  # told of two that were found to be equal
# told of other comparisons: what was compared with what, how, and the answer
ASKED: list[Callable[[TrackedInt, Any, Callable[[Any, Any], bool], bool], None]] = []
_OWN = frozenset({"training"})


@dataclass(frozen=True)
class Term:
    """A number times powers of attributes and dimensions."""

    factor: Fraction = Fraction(1)
    places: Mapping[Place, int] = field(default_factory=dict)
    axes: tuple[tuple[Axis, int], ...] = ()

    def times(self, other: Term, power: int = 1) -> Term:
        """The product with a power of another term."""
        places = dict(self.places)
        for place, exponent in other.places.items():
            places[place] = places.get(place, 0) + power * exponent
        axes = (*self.axes, *((axis, power * exponent) for axis, exponent in other.axes))
        return Term(self.factor * other.factor**power, {p: e for p, e in places.items() if e}, axes)


class TrackedInt(int):
    """An ``int`` that is a sum of products of attributes and dimensions.

    Attributes:
        terms: what it is the sum of.
        followed: whether it *is* that sum; False for what depends on it in another way.
        quotients: the quotients in it, each the sum of its terms: none had a remainder, and none may get one.
        made: the operation that it is the result of, and what that was of; None for an attribute or a dimension.

    Example:
        >>> heads = TrackedInt(6, (Term(places={Place(nn.Module(), "num_heads"): 1}),))
        >>> width = (heads * 64) // 2
        >>> width, width.terms[0].factor, width.followed, (width // 5).followed
        (192, Fraction(32, 1), True, False)
    """

    terms: tuple[Term, ...]
    followed: bool
    quotients: tuple[tuple[Term, ...], ...]
    made: tuple[Callable[..., Any], tuple[Any, ...]] | None

    def __new__(
        cls,
        value: int,
        terms: tuple[Term, ...] = (),
        followed: bool = True,
        quotients: tuple[tuple[Term, ...], ...] = (),
        made: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
    ) -> TrackedInt:
        number = super().__new__(cls, value)
        number.terms, number.followed, number.quotients, number.made = terms, followed, quotients, made
        return number

    def place(self) -> Place | None:
        """The attribute that it is, if it is one and nothing else."""
        if len(self.terms) != 1 or not self.followed:
            return None
        (term,) = self.terms
        alone = term.factor == 1 and not term.axes and list(term.places.values()) == [1]
        return next(iter(term.places)) if alone else None

    def axis(self) -> Axis | None:
        """The axis whose size it is, if it is one and nothing else."""
        if len(self.terms) != 1 or not self.followed:
            return None
        (term,) = self.terms
        alone = term.factor == 1 and not term.places and [power for _, power in term.axes] == [1]
        return term.axes[0][0] if alone else None

    @staticmethod
    def _combined(operation: Callable[..., int], operands: tuple[int, ...], terms: tuple[Term, ...]) -> TrackedInt:
        every = [number for number in operands if isinstance(number, TrackedInt)]
        quotients = tuple(q for number in every for q in number.quotients)
        value = operation(*map(plain, operands))
        return TrackedInt(value, terms, all(n.followed for n in every), quotients, (operation, operands))

    @staticmethod
    def _depends(operation: Callable[..., Any], *operands: Any) -> Any:
        """A number that is made of these, in a way that is not followed."""
        value = operation(*(plain(n) if isinstance(n, int) else n for n in operands))
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        terms = tuple(term for n in operands if isinstance(n, TrackedInt) for term in n.terms)
        return TrackedInt(value, terms, False, (), (operation, operands))

    # -- sums and products ----------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._leaves(other, lambda a, b: a + b)
        return self._combined(operator.add, (self, other), self.terms + _terms(other))

    __radd__ = __add__

    def __neg__(self) -> Any:
        return self._combined(operator.neg, (self,), tuple(t.times(Term(Fraction(-1))) for t in self.terms))

    def __pos__(self) -> Any:
        return self

    def __sub__(self, other: Any) -> Any:
        return self + -other if isinstance(other, int) else self._leaves(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return -self + other if isinstance(other, int) else self._leaves(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)):
            return plain(self) * other
        if not isinstance(other, int):
            return self._leaves(other, lambda a, b: a * b)
        terms = tuple(a.times(b) for a in self.terms for b in _terms(other))
        return self._combined(operator.mul, (self, other), terms)

    __rmul__ = __mul__

    def __pow__(self, power: Any, modulus: Any = None) -> Any:
        if type(power) is int and 0 < power < 5 and modulus is None:
            made: Any = self
            for _ in range(power - 1):
                made = made * self
            return made
        return self._leaves(power, lambda a, b: a**b)

    # -- quotients ------------------------------------------------------------------------------------------------

    def __floordiv__(self, other: Any) -> Any:
        return _divided(self, other) if isinstance(other, int) else self._leaves(other, lambda a, b: a // b)

    def __rfloordiv__(self, other: Any) -> Any:
        return _divided(other, self) if isinstance(other, int) else self._leaves(other, lambda a, b: b // a)

    def __mod__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._leaves(other, lambda a, b: a % b)
        return self._depends(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return other % plain(self) if isinstance(other, str) else self._leaves(other, lambda a, b: b % a)
        return self._depends(operator.mod, other, self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << other) if type(other) is int else self._depends(operator.rshift, self, other)

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << other) if type(other) is int else self._depends(operator.lshift, self, other)

    def __rrshift__(self, other: Any) -> Any:
        return self._depends(operator.rshift, other, self)

    def __rlshift__(self, other: Any) -> Any:
        return self._depends(operator.lshift, other, self)

    def __abs__(self) -> Any:
        return self if plain(self) >= 0 else -self

    def __round__(self, digits: Any = None) -> Any:
        return self

    __floor__ = __ceil__ = __round__

    def __and__(self, other: Any) -> Any:
        return self._depends(operator.and_, self, other)

    def __or__(self, other: Any) -> Any:
        return self._depends(operator.or_, self, other)

    def __xor__(self, other: Any) -> Any:
        return self._depends(operator.xor, self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def bit_length(self) -> Any:
        return self._depends(int.bit_length, self)

    def bit_count(self) -> Any:
        return self._depends(int.bit_count, self)

    # -- comparisons ----------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self._compared(other)

    def __ne__(self, other: object) -> bool:
        return not self._compared(other)

    __hash__ = int.__hash__

    def _compared(self, other: object) -> bool:
        """Whether both are one number, as ``x.shape[-1] != self.d_model`` asks: then one may follow the other."""
        if not isinstance(other, (int, float, complex)):
            return False
        same = plain(self) == (plain(other) if isinstance(other, int) else other)
        if same and COMPARED and isinstance(other, TrackedInt):
            COMPARED[-1](self, other)
        if ASKED and (not same or self._is_remainder):  # else a number of its own: every removal changes the answer
            ASKED[-1](self, other, operator.eq, same)
        return same

    @property
    def _is_remainder(self) -> bool:
        return self.made is not None and self.made[0] is operator.mod

    def __bool__(self) -> bool:
        return not self._compared(0)

    def __lt__(self, other: Any) -> Any:
        return self._ordered(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._ordered(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._ordered(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._ordered(other, operator.ge)

    def _ordered(self, other: Any, relation: Callable[[Any, Any], bool]) -> Any:
        """Which is larger, as ``width > 64`` asks: it must not be otherwise when units are gone."""
        if not isinstance(other, (int, float)):
            return NotImplemented
        answer = relation(plain(self), plain(other) if isinstance(other, int) else other)
        if ASKED:
            ASKED[-1](self, other, relation, answer)
        return answer

    # -- out of the integers --------------------------------------------------------------------------------------

    def _leaves(self, other: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """What it makes together with something that is no integer."""
        if isinstance(other, Tensor):
            return NotImplemented  # so that the tensor's own operator sees where the number comes from
        if not isinstance(other, (int, float, complex)):
            return NotImplemented
        self._tell()
        return combine(plain(self), other)

    def _tell(self) -> None:
        if OBSERVERS:
            OBSERVERS[-1](self)

    def __truediv__(self, other: Any) -> Any:
        return self._leaves(other, lambda a, b: a / b)

    def __rtruediv__(self, other: Any) -> Any:
        return self._leaves(other, lambda a, b: b / a)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        return self._leaves(other, lambda a, b: b**a)

    def __float__(self) -> float:  # math.sqrt(width)
        self._tell()
        return float(plain(self))

    def __int__(self) -> int:  # from here on, nobody knows where it comes from
        self._tell()
        return plain(self)

    __trunc__ = __int__


def plain(number: int) -> int:
    """Turn it into an ordinary integer, without telling anybody."""
    return int.__int__(number)


def _terms(number: int) -> tuple[Term, ...]:
    if isinstance(number, TrackedInt):
        return number.terms
    return (Term(Fraction(number)),) if number else ()


def _divided(above: int, below: int) -> Any:
    """Make a quotient, which is followed if nothing is left over and what it is divided by is one product."""
    _, rest = divmod(plain(above), plain(below))
    if rest or len(_terms(below)) != 1 or isinstance(above, bool):
        return TrackedInt._depends(operator.floordiv, above, below)
    (divisor,) = _terms(below)
    terms = tuple(term.times(divisor, -1) for term in _terms(above))
    made = TrackedInt._combined(operator.floordiv, (above, below), terms)
    made.quotients = (*made.quotients, terms)
    return made


def attribute(value: int, place: Place) -> TrackedInt:
    """Make an integer that is an attribute."""
    return TrackedInt(value, (Term(places={place: 1}),))


def dimension(value: int, axis: Axis) -> TrackedInt:
    """Make an integer that was read off a tensor's shape."""
    return TrackedInt(value, (Term(axes=((axis, 1),)),))


def is_width(value: Any) -> bool:
    """Whether an attribute is tracked: an integer that may be the size of something."""
    return type(value) is int and value > 1


@contextmanager
def tracked_attributes(model: nn.Module) -> Iterator[None]:
    """Replace every integer attribute (and integers in tuples and lists) of every module by a tracked one."""
    saved: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for attr, value in list(module.__dict__.items()):
                if attr in _OWN or attr.startswith("_"):
                    continue
                if is_width(value):
                    replacement: Any = attribute(value, Place(module, attr))
                elif type(value) in (tuple, list) and any(is_width(v) for v in value):
                    replacement = type(value)(
                        attribute(v, Place(module, attr, (i,))) if is_width(v) else v for i, v in enumerate(value)
                    )
                else:
                    continue
                saved.append((module, attr, value))
                module.__dict__[attr] = replacement
        yield
    finally:
        for module, attr, value in saved:
            module.__dict__[attr] = value


def tracked_in(value: Any) -> list[TrackedInt]:
    """List the tracked integers among nested arguments."""
    found: list[TrackedInt] = []
    for leaf in leaves_in(value):
        if isinstance(leaf, slice):
            found += tracked_in((leaf.start, leaf.stop, leaf.step))
        elif isinstance(leaf, TrackedInt):
            found.append(leaf)
    return found
