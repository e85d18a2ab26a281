"""The algebra of axes: factors, concatenations, labels, and sizes that follow."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from torch import nn

from singe_plugin.axes.algebra import concat, expand, fix, fresh, labels, leaves, size_of, split, split_concat, unify
from singe_plugin.axes.places import Place
from singe_plugin.axes.tracked import OBSERVERS, TrackedInt, attribute


def test_a_view_and_its_inverse_are_the_same_axis() -> None:
    rows, heads, width = fresh(12), fresh(3), fresh(4)
    unify(rows, heads + width, "")
    assert [expand(axis) for axis in split(rows, [3, 4], "")] == [expand(heads), expand(width)]
    assert labels(rows, heads[0].root()).tolist() == [u for u in range(3) for _ in range(4)]
    assert labels(rows, width[0].root()).tolist() == list(range(4)) * 3


def test_finer_factors_are_found_on_both_sides() -> None:
    a, b = fresh(6) + fresh(4), fresh(3) + fresh(8)
    unify(a, b, "")
    assert [atom.size for atom in expand(a)] == [atom.size for atom in expand(b)] == [3, 2, 4]
    assert expand(a) == expand(b)


def test_what_does_not_fit_is_fixed_with_the_reason() -> None:
    a, b = fresh(4) + fresh(6), fresh(6) + fresh(4)
    unify(a, b, "a strange view")
    assert [leaf.fixed for leaf in (*leaves(a), *leaves(b))] == ["a strange view"] * 4


def test_concatenations_are_cut_where_either_is() -> None:
    a = concat([fresh(2), fresh(6)])
    b = concat([fresh(5), fresh(3)])
    unify(a, b, "")
    assert [size_of(part) for part in expand(a)[0].parts or ()] == [2, 3, 3]
    assert leaves(a) == leaves(b)


def test_parts_of_a_product_keep_its_inner_factor() -> None:
    outer, inner = fresh(6), fresh(2)
    first, second = split_concat(outer + inner, [4, 8], "")
    assert (size_of(first), size_of(second)) == (4, 8)
    assert labels(outer + inner, inner[0]).tolist() == [0, 1] * 6
    fix(first, "told apart")
    assert [bool(leaf.fixed) for leaf in leaves(outer + inner)] == [True, False, True]


def test_fixing_reaches_everything_that_is_unified() -> None:
    a, b, c = fresh(8), fresh(8), fresh(8)
    unify(a, b, "")
    unify(b, c, "")
    fix(c, "it is over")
    assert {leaf.fixed for leaf in leaves(a)} == {"it is over"}


def test_a_shrinking_leaf_renumbers_the_positions_behind_it() -> None:
    first, second = fresh(3), fresh(4)
    both = concat([first, second])
    first[0].shrink(1)
    assert labels(both, second[0]).tolist() == [-1, -1, 0, 1, 2, 3]


def test_one_position_of_two_units_is_refused() -> None:
    leaf = fresh(3)
    with pytest.raises(ValueError, match="two units"):
        labels(leaf + leaf, leaf[0])


A, B = Place(nn.Identity(), "a"), Place(nn.Identity(), "b")
Expected = list[tuple[Fraction | int, dict[Place, int]]]


@pytest.mark.parametrize(
    ("size", "value", "terms"),
    [
        (lambda a, b: a * b, 24, [(1, {A: 1, B: 1})]), (lambda a, b: a // b, 6, [(1, {A: 1, B: -1})]),
        (lambda a, b: 3 * a // 2, 18, [(Fraction(3, 2), {A: 1})]), (lambda a, b: 36 // a, 3, [(36, {A: -1})]),
        (lambda a, b: a >> 1, 6, [(Fraction(1, 2), {A: 1})]), (lambda a, b: a << 1, 24, [(2, {A: 1})]),
        (lambda a, b: a + 1, 13, [(1, {A: 1}), (1, {})]), (lambda a, b: 20 - a, 8, [(-1, {A: 1}), (20, {})]),
        (lambda a, b: a - b, 10, [(1, {A: 1}), (-1, {B: 1})]), (lambda a, b: -a, -12, [(-1, {A: 1})]),
        (lambda a, b: (a + b) * 2, 28, [(2, {A: 1}), (2, {B: 1})]), (lambda a, b: a**2, 144, [(1, {A: 2})]),
        (lambda a, b: sum((a, b)), 14, [(1, {A: 1}), (1, {B: 1})]),
        (lambda a, b: math.prod((a, b)), 24, [(1, {A: 1, B: 1})]),
        (lambda a, b: divmod(a, b)[0], 6, [(1, {A: 1, B: -1})]), (lambda a, b: abs(-a), 12, [(1, {A: 1})]),
        (lambda a, b: round(a), 12, [(1, {A: 1})]),
    ],
)  # fmt: skip
def test_sums_products_and_quotients_know_their_attributes(size: Any, value: int, terms: Expected) -> None:
    made = size(attribute(12, A), attribute(2, B))
    assert isinstance(made, TrackedInt)
    assert made == value
    assert made.followed
    assert [(term.factor, dict(term.places)) for term in made.terms] == terms


@pytest.mark.parametrize(
    "size",
    [lambda a: a // 5, lambda a: a % 5, lambda a: 7 // a, lambda a: a & 3, lambda a: a // 5 + 1, lambda a: 5 % a],
)
def test_what_is_not_exact_knows_only_that_it_depends(size: Any) -> None:
    made = size(attribute(12, A))
    assert (made, made.followed) == (size(12), False)
    assert A in {place for term in made.terms for place in term.places}


@pytest.mark.parametrize(
    "leaves",
    [
        lambda a: a * 0.5, lambda a: a / 2, lambda a: 1 / a, lambda a: a**-0.5, lambda a: 2**a, float, int, math.sqrt,
        math.trunc, lambda a: pow(2, a),
    ],
)  # fmt: skip
def test_whoever_takes_a_size_out_of_the_integers_is_noticed(leaves: Any) -> None:
    told: list[TrackedInt] = []
    OBSERVERS.append(told.append)
    try:
        number = leaves(attribute(12, A))
    finally:
        OBSERVERS.pop()
    assert number == leaves(12)
    assert not isinstance(number, TrackedInt)
    assert told == [12]
