"""The algebra of axes: factors, concatenations, labels, and sizes that follow."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from singe_plugin.axes.algebra import concat, expand, fix, fresh, labels, leaves, size_of, split, split_concat, unify
from singe_plugin.axes.tracked import TrackedInt


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


@pytest.mark.parametrize(
    ("size", "value", "places"),
    [
        (lambda a, b: a * b, 24, 2), (lambda a, b: a // b, 6, 2), (lambda a, b: 3 * a // 2, 18, 1),
        (lambda a, b: 36 // a, 3, 1),
    ],
)  # fmt: skip
def test_products_and_quotients_know_their_attributes(size: Any, value: int, places: int) -> None:
    from singe_plugin.axes.tracked import Place, attribute

    made = size(attribute(12, Place(nn.Identity(), "a")), attribute(2, Place(nn.Identity(), "b")))
    assert isinstance(made, TrackedInt)
    assert made == value and len(made.places) == places  # noqa: PT018


def test_what_is_not_exact_is_a_plain_number() -> None:
    from singe_plugin.axes.tracked import Place, attribute

    number = attribute(12, Place(nn.Identity(), "a"))
    assert [type(x) for x in (number // 5, number + 1, number * 2.0, number / 3, -number)] == [
        int,
        int,
        float,
        float,
        int,
    ]
