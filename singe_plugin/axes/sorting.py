"""Which of many groups fail a test: together first, then halved, then one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .groups import Group

__all__ = ["sorted_out", "taken_apart"]


def sorted_out(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Tell the groups that pass a test together from the others, which come with the reason."""
    return (groups, []) if not groups or test(groups) is None else taken_apart(test, groups)


def taken_apart(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Tell them apart, as :func:`sorted_out` does, where it is known that they fail together."""
    right, wrong = _halve(test, groups)
    if len(right) < 2 or (wrong and test(right) is None):
        return right, wrong
    together: list[Group] = []  # each passes alone, but not all of them together
    for group in right:
        reason = test([*together, group])
        if reason is None:
            together.append(group)
        else:
            wrong.append((group, reason))
    return together, wrong


def _halve(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Halve groups that fail together until those that fail alone are found."""
    wrong: list[tuple[Group, str]] = []
    if len(groups) == 1:
        return [], [(groups[0], test(groups) or "it fails together with others")]
    middle = len(groups) // 2
    found: list[Group] = []
    for half in (groups[:middle], groups[middle:]):
        if test(half) is None:
            found += half
            continue
        right, failed = _halve(test, half)
        found += right
        wrong += failed
    return found, wrong
