"""Questions that a model asks of its sizes, and whose answers have to stay.

Code like ``if a.shape == b.shape: b = b + a`` or ``if self.dim != self.dim_out: x = self.proj(x)`` goes another way
when a removal makes two sizes equal that were not, and computes something else without an error. Which sizes meet by
chance depends on how many units of each group go, so no trial on a few numbers shows it. The forward pass is traced
with integers that know where they come from; what it compares is noted, and before units go the same comparison is made
with the sizes that would be left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from singe_plugin.errors import RemovalError

from .algebra import Atom, Axis, size_of
from .asked import Question
from .groups import Group
from .index import Index
from .places import Place
from .trace import Trace

__all__ = ["Questions"]

_logger = logging.getLogger("singe_plugin")


class Questions:
    """What a model asked, and what the answers are when units go.

    Args:
        trace: what the forward pass showed.
        index: the same, by leaves.
    """

    def __init__(self, trace: Trace, index: Index) -> None:
        self.trace, self.index = trace, index
        self._told: set[Group] = set()

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
        # of others widths meet on the way to the end of this turn, or the module that asked is gone
        asked = [question for question in self.index.asked(left) if question.stays(self._size)]
        if not asked:
            return None
        before = {leaf: leaf.size for leaf in left}
        try:
            for leaf, size in left.items():
                leaf.resize(size)
            met = next((question for question in asked if not question.stays(self._size)), None)
        finally:
            for leaf, size in before.items():
                leaf.resize(size)
        return None if met is None else (met, self.trace.depends_on(met))

    def _size(self, source: Place | Axis) -> int:
        """What an attribute is, or the size of an axis, with the sizes that leaves have."""
        if not isinstance(source, Place):
            return size_of(source)
        times, axis = self.trace.follows(source)
        return int(times * size_of(axis))
