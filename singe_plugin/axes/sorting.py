"""Which of many groups fail a test: together first, then halved, then one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

__all__ = ["Look", "Test", "sorted_out", "taken_apart"]

_T = TypeVar("_T")  # groups, or blocks
Test: TypeAlias = Callable[[Sequence[_T]], str | None]
Look: TypeAlias = Callable[[Sequence[_T]], list[tuple[_T, str]]]
_FEW = 4  # groups, which are halved twice in hardly more tests than a look takes


def sorted_out(test: Test[_T], groups: list[_T], look: Look[_T] | None = None) -> tuple[list[_T], list[tuple[_T, str]]]:
    """Tell the groups that pass a test together from the others, which come with the reason.

    Args:
        test: says why groups are wrong, or None.
        groups: that are tested.
        look: finds wrong ones among many that fail together, faster than the test does.
    """
    return (groups, []) if not groups or test(groups) is None else taken_apart(test, groups, look)


def taken_apart(
    test: Test[_T], groups: list[_T], look: Look[_T] | None = None
) -> tuple[list[_T], list[tuple[_T, str]]]:
    """Tell them apart, as :func:`sorted_out` does, where it is known that they fail together."""
    if look is not None and len(groups) > _FEW and (seen := look(groups)):
        known = {group for group, _ in seen}
        right, wrong = sorted_out(test, [group for group in groups if group not in known])
        return right, [*seen, *wrong]
    right, wrong = _halve(test, groups)
    if len(right) < 2 or (wrong and test(right) is None):
        return right, wrong
    together: list[_T] = []  # each passes alone, but not all of them together
    for group in right:
        reason = test([*together, group])
        if reason is None:
            together.append(group)
        else:
            wrong.append((group, reason))
    return together, wrong


def _halve(test: Test[_T], groups: list[_T]) -> tuple[list[_T], list[tuple[_T, str]]]:
    """Halve groups that fail together until those that fail alone are found."""
    wrong: list[tuple[_T, str]] = []
    if len(groups) == 1:
        return [], [(groups[0], test(groups) or "it fails together with others")]
    middle = len(groups) // 2
    found: list[_T] = []
    for half in (groups[:middle], groups[middle:]):
        if test(half) is None:
            found += half
            continue
        right, failed = _halve(test, half)
        found += right
        wrong += failed
    return found, wrong
