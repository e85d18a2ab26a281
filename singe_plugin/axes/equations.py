"""Sizes that a model computes, and what that asks of its axes.

Code like ``x[:, : c // 2]`` or ``x.view(b, self.heads, c // self.heads)`` computes sizes from attributes and from other
sizes. Each time the result is the size of an axis, that is an equation, and it has to hold after every removal. Both
sides are polynomials in the sizes of leaves: where they are the same polynomial, it always holds. Else the axes are
brought together so that they are (the halves of ``x[:, : c // 2]`` shrink in step), and where that cannot be done,
nothing is removed from them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TypeAlias

from .algebra import Atom, Axis, concat, expand, fix, fix_all, fresh, is_fixed, size_of, split, unify
from .places import Place
from .trace import Trace
from .tracked import Term, TrackedInt

__all__ = ["solve"]

_Monomial: TypeAlias = frozenset[tuple[Atom, int]]
_Polynomial: TypeAlias = dict[_Monomial, Fraction]

_FROM_THE_OTHER = "the model computes one size from the other"


def solve(trace: Trace) -> None:
    """Unify what has to stay of one size, note which attributes follow which axes, fix what cannot be followed."""
    rest: list[tuple[TrackedInt, Axis]] = []
    for size, axis in trace.equations:
        place = size.place()
        if place is None:
            rest.append((size, axis))
        else:
            trace.links.setdefault(place, []).append((Fraction(1), axis))
    for found in trace.links.values():
        for times, axis in found[1:]:
            if times == found[0][0]:
                _same_size(found[0][1], axis, "one attribute gives both sizes")
    for size, axis in rest:
        _follow(trace, size, axis)
    _follow_compared(trace)
    for size, axis in rest:
        _enforce(trace, size, axis)
    spent = [*trace.spent, *((size, _FROM_THE_OTHER) for size, _ in rest if not size.followed)]
    for number, why in spent:
        fix_all(_axes_of(trace, number.terms), why)
    for number, why in trace.scales:
        _fix_scale(trace, number, why)
    unsettled = True
    while unsettled:  # what is fixed is a number, which other equations have to agree with
        unsettled = False
        for size, axis in rest:
            involved = [*_axes_of(trace, size.terms), axis]
            if not all(map(is_fixed, involved)) and not _holds(trace, size, axis):
                fix_all(involved, f"{_FROM_THE_OTHER} in a way that no removal keeps")
                unsettled = True
    trace.equations.clear()


# -- polynomials ------------------------------------------------------------------------------------------------------


def _holds(trace: Trace, size: TrackedInt, axis: Axis) -> bool:
    """Whether the equation holds for all sizes that the leaves can have."""
    whole = all(_is_whole(_polynomial(trace, terms)) for terms in size.quotients)
    return size.followed and whole and _polynomial(trace, size.terms) == _of_axis(axis)


def _is_whole(polynomial: _Polynomial) -> bool:
    """Whether it is a whole number for all sizes of the leaves."""
    return all(
        coefficient.denominator == 1 and all(exponent > 0 for _, exponent in monomial)
        for monomial, coefficient in polynomial.items()
    )


def _of_axis(axis: Axis) -> _Polynomial:
    """The size of an axis as a polynomial in the sizes of its leaves; a fixed leaf is a number."""
    product: _Polynomial = {frozenset(): Fraction(1)}
    for atom in expand(axis):
        if atom.parts is not None:
            factor = _sum(_of_axis(part) for part in atom.parts)
        elif atom.fixed:
            factor = {frozenset(): Fraction(atom.size)} if atom.size else {}
        else:
            factor = {frozenset({(atom, 1)}): Fraction(1)}
        product = _product(product, factor)
    return product


def _polynomial(trace: Trace, terms: Sequence[Term]) -> _Polynomial:
    """A sum of terms; an attribute that follows nothing is a number."""
    return _sum(_of_term(trace, term) for term in terms)


def _of_term(trace: Trace, term: Term) -> _Polynomial:
    number, above, below = _sides(trace, term)
    product = _product({frozenset(): number}, _of_axis(tuple(above)))
    for atom in below:
        if atom.parts is not None:
            return {frozenset({(Atom(0), 1)}): Fraction(1)}  # a quotient of sums: equal to nothing
        product = _product(product, {frozenset({(atom, -1)}): Fraction(1)})
    return product


def _sum(polynomials: Iterable[_Polynomial]) -> _Polynomial:
    total: _Polynomial = {}
    for polynomial in polynomials:
        for monomial, coefficient in polynomial.items():
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
    return {m: c for m, c in total.items() if c}


def _product(a: _Polynomial, b: _Polynomial) -> _Polynomial:
    made: list[_Polynomial] = []
    for one, first in a.items():
        for other, second in b.items():
            exponents = Counter(dict(one))
            for atom, exponent in other:
                exponents[atom] += exponent
            made.append({frozenset((x, e) for x, e in exponents.items() if e): first * second})
    return _sum(made)


# -- attributes and axes ----------------------------------------------------------------------------------------------


def _followed(trace: Trace, place: Place) -> tuple[Fraction, Axis]:
    """What an attribute is: a number times the size of an axis (which has no atoms if it follows none)."""
    found = trace.links.get(place)
    return found[0] if found else (Fraction(place.get()), ())


def _axes_of(trace: Trace, terms: Iterable[Term]) -> list[Axis]:
    """Every axis that a number depends on."""
    found: list[Axis] = []
    for term in terms:
        found += [axis for axis, _ in term.axes]
        found += [_followed(trace, place)[1] for place in term.places]
    return found


def _fix_scale(trace: Trace, number: TrackedInt, why: str) -> None:
    for term in number.terms:
        factors = [*term.axes, *((_followed(trace, place)[1], e) for place, e in term.places.items())]
        above = [atom for axis, e in factors if e > 0 for atom in expand(axis)]
        for atom in (atom for axis, e in factors if e < 0 for atom in expand(axis)):
            if atom in above:  # channels // heads is the width of a head
                above.remove(atom)
        fix_all([(atom,) for atom in above], why)


def _same_size(a: Axis, b: Axis, why: str) -> None:
    """Make sure that two axes stay of one size; products of the same atoms do, in whatever order."""
    if is_fixed(a) and is_fixed(b):
        return
    if Counter(map(id, expand(a))) != Counter(map(id, expand(b))):
        unify(a, b, why)


def _follow(trace: Trace, size: TrackedInt, axis: Axis) -> None:
    """Find out which axes the attributes follow that are only seen in products and quotients."""
    if not size.followed or not size.terms:  # without terms it is zero, whatever goes
        return
    if len(size.terms) > 1:
        _follow_sum(trace, size, axis)
        return
    (term,) = size.terms
    unknown = {place: e for place, e in term.places.items() if place not in trace.links}
    known = [*term.axes, *((_followed(trace, p)[1], e) for p, e in term.places.items() if p in trace.links)]
    factor = term.factor
    for place, exponent in term.places.items():
        if place in trace.links:
            factor *= _followed(trace, place)[0] ** exponent
    if sum(e == 1 for e in unknown.values()) == 1:
        # what it is divided by (a number of paths or heads that follows nothing) is a constant
        times, target = 1 / factor, expand(axis)
        for other, exponent in known:
            for atom in expand(other):
                if exponent == -1:
                    target.append(atom)
                elif exponent == 1 and atom in target:
                    target.remove(atom)
                else:
                    return
        for place, exponent in unknown.items():
            times *= Fraction(place.get()) ** -exponent if exponent != 1 else 1
        place = next(p for p, e in unknown.items() if e == 1)
        if times * size_of(tuple(target)) == place.get():
            trace.links.setdefault(place, []).append((times, tuple(target)))
    elif not known and factor == 1 and set(unknown.values()) == {1}:
        atoms = expand(axis)  # num_keys * head_dim: one attribute per factor
        for order in itertools.permutations(unknown):
            if [place.get() for place in order] == [atom.size for atom in atoms]:
                for place, atom in zip(order, atoms, strict=True):
                    trace.links.setdefault(place, []).append((Fraction(1), (atom,)))
                break


def _follow_compared(trace: Trace) -> None:
    """Let attributes that give no size, but are checked against some (``x.shape[-1] != self.d_model``), follow these.

    One that gives a size already follows that, whatever it is compared with: the code may ask which of two it is.
    """
    found: dict[Place, list[Axis]] = {}
    for size, other in (turned for pair in trace.compared for turned in (pair, pair[::-1])):
        place, axis = size.place(), other.axis()
        if place is not None and axis is not None and place not in trace.links:
            found.setdefault(place, []).append(axis)
    for place, (first, *others) in found.items():
        trace.links[place] = [(Fraction(1), first)]
        for axis in others:
            _same_size(first, axis, "both sizes are checked against one attribute")
    trace.compared.clear()


def _follow_sum(trace: Trace, size: TrackedInt, axis: Axis) -> None:
    """``a - b == axis``: the attribute a is the size of b and axis together."""
    places = [term for term in size.terms if any(place not in trace.links for place in term.places)]
    others = [_sides(trace, term) for term in size.terms if term not in places]
    place = TrackedInt(0, tuple(places)).place()
    if place is not None and all(factor == -1 and not below for factor, _, below in others):
        target = concat([*(tuple(above) for _, above, _ in others), axis])
        if size_of(target) == place.get():
            trace.links.setdefault(place, []).append((Fraction(1), target))


def _enforce(trace: Trace, size: TrackedInt, axis: Axis) -> None:
    """Bring axes together so that the equation holds; what does not come together is fixed later."""
    if not size.followed or _holds(trace, size, axis):
        return
    for terms in size.quotients:
        for term in terms:
            _in_blocks(trace, term)
    if _holds(trace, size, axis):
        return
    collected: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Fraction, list[Atom], list[Atom]]] = {}
    for term in size.terms:
        factor, above, below = _sides(trace, term)
        key = (tuple(sorted(map(id, above))), tuple(sorted(map(id, below))))
        collected[key] = (collected[key][0] + factor if key in collected else factor, above, below)
    sums = [(factor, above, below) for factor, above, below in collected.values() if factor]
    if any(below for _, _, below in sums):
        if len(sums) == 1 and sums[0][0] == 1:
            _same_size(tuple(sums[0][1]), (*sums[0][2], *axis), _FROM_THE_OTHER)
        return
    left = [_multiple(factor, tuple(above)) for factor, above, _ in sums if factor > 0]
    right = [_multiple(-factor, tuple(above)) for factor, above, _ in sums if factor < 0]
    a, b = concat(left), concat([*right, axis])
    if size_of(a) == size_of(b):
        unify(a, b, _FROM_THE_OTHER)


def _sides(trace: Trace, term: Term) -> tuple[Fraction, list[Atom], list[Atom]]:
    """A term as a number, the atoms that it is multiplied with, and those that it is divided by."""
    factor, above, below = term.factor, list[Atom](), list[Atom]()
    factors = list(term.axes)
    for place, exponent in term.places.items():
        times, axis = _followed(trace, place)
        factor *= times**exponent
        factors.append((axis, exponent))
    for axis, exponent in factors:
        for atom in expand(axis):
            if is_fixed((atom,)):
                factor *= Fraction(atom.size) ** exponent
            else:
                (above if exponent > 0 else below).extend([atom] * abs(exponent))
    for atom in list(below):
        if atom in above:
            above.remove(atom)
            below.remove(atom)
    return factor, above, below


def _in_blocks(trace: Trace, term: Term) -> None:
    """What is divided by a number has to stay divisible: the axis is that many blocks, which shrink in step."""
    factor, above, below = _sides(trace, term)
    if not below and factor.denominator > 1:
        _multiple(factor, tuple(above))


def _multiple(factor: Fraction, axis: Axis) -> Axis:
    """An axis of ``factor`` times the size: for ``p/q``, of ``p`` of its ``q`` blocks."""
    blocks = factor.denominator
    if blocks > 1:
        if size_of(axis) % blocks:
            fix(axis, _FROM_THE_OTHER)
            return fresh(math.floor(factor * size_of(axis)), _FROM_THE_OTHER)
        outer, axis = split(axis, [blocks, size_of(axis) // blocks], _FROM_THE_OTHER)
        fix(outer, "its parts are told apart by a size that is computed")
    return axis if factor.numerator == 1 else (*fresh(factor.numerator, _FROM_THE_OTHER), *axis)
