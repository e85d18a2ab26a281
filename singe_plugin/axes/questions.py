"""Questions that a model asks of its sizes, and whose answers have to stay.

Code like ``if a.shape == b.shape: b = b + a`` or ``if self.dim != self.dim_out: x = self.proj(x)`` goes another way
when a removal makes two sizes equal that were not, and computes something else without an error. Which sizes meet by
chance depends on how many units of each group go, so no trial on a few numbers shows it. The forward pass is traced
with integers that know where they come from; what it compares is noted, and before units go the same comparison is made
with the sizes that would be left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from singe_plugin.errors import RemovalError

from .algebra import Atom, leaves, size_of
from .asked import Question, sources
from .groups import Group
from .places import Place
from .tracked import TrackedInt, plain

__all__ = ["Questions"]

_logger = logging.getLogger("singe_plugin")


class Questions:
    """What a model asked, by the leaves that the answers depend on.

    Args:
        asked: the questions.
        sizes: for an attribute, how many times the size of which axis it is; None for one that stays.
    """

    def __init__(self, asked: Mapping[Any, Question], sizes: Callable[[Place], tuple[Any, Any] | None]) -> None:
        self._sizes, self._told = sizes, set[Any]()
        self._by_leaf: dict[Atom, list[Question]] = {}
        for question in asked.values():
            for leaf in self._leaves(question):
                self._by_leaf.setdefault(leaf, []).append(question)

    def _leaves(self, question: Question) -> dict[Atom, None]:
        found: dict[Atom, None] = {}
        for number in (question.left, question.right):
            for source in sources(number):
                linked = self._sizes(source) if isinstance(source, Place) else (1, source)
                if linked is not None:
                    found |= dict.fromkeys(leaf for leaf in leaves(linked[1]) if not leaf.fixed)
        return found

    def check(self, group: Group, count: int) -> None:
        """Raise :class:`RemovalError` if the model would go another way without so many units of a group alone."""
        if (met := self.changed({group.leaf.root(): group.size - count})) is not None:
            most = self.allowed({group: count})[group]
            raise RemovalError(
                f"group {group.name!r}: without {count} of its {group.size} units, {met[0]}; remove {most} of them, or "
                "others along"
            )

    def allowed(self, counts: Mapping[Group, int]) -> dict[Group, int]:
        """How many units of groups may go at once: what was asked for, or less where an answer would change.

        The last of the groups that an answer depends on keeps more, as many as its ``multiple`` at a time.
        """
        found = dict(counts)
        while True:
            going = [group for group, count in found.items() if count > 0]
            met = self.changed({group.leaf.root(): group.size - found[group] for group in going})
            if met is None:
                return found
            question, depends = met
            group = [group for group in going if group.leaf.root() in depends][-1]
            found[group] = max(found[group] - group.multiple, 0)
            if group not in self._told:
                self._told.add(group)
                _logger.info("%s keeps more units than was asked for: %s", group.name, question)

    def changed(self, left: Mapping[Atom, int]) -> tuple[Question, dict[Atom, None]] | None:
        """A question that is answered otherwise when leaves have these sizes, with its leaves; None if there is none.

        Args:
            left: leaf -> its size then.
        """
        asked = {id(q): q for leaf in left for q in self._by_leaf.get(leaf, ())}
        # of others widths meet on the way to the end of this turn, or the module that asked is gone
        asked = {key: q for key, q in asked.items() if self._stays(q)}
        if not asked:
            return None
        before = {leaf: leaf.size for leaf in left}
        try:
            for leaf, size in left.items():
                leaf.resize(size)
            for question in asked.values():
                if not self._stays(question):
                    return question, self._leaves(question)
        finally:
            for leaf, size in before.items():
                leaf.resize(size)
        return None

    def _stays(self, question: Question) -> bool:
        """Whether the answer is what it was, with the sizes that leaves have now."""
        try:
            return bool(question.relation(self._now(question.left), self._now(question.right))) == question.answer
        except ArithmeticError:  # it cannot even be asked
            return False

    def _now(self, number: Any) -> Any:
        """What a number is with the sizes that leaves have."""
        if not isinstance(number, TrackedInt):
            return number
        if number.made is not None:
            operation, operands = number.made
            return operation(*map(self._now, operands))
        (source,) = sources(number)
        if not isinstance(source, Place):
            return size_of(source)
        linked = self._sizes(source)
        return plain(number) if linked is None else int(linked[0] * size_of(linked[1]))
