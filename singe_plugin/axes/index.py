"""What a trace noted about axes, found by the leaves in them: nobody looks through all of it for each group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from .algebra import Atom, Axis, leaves
from .asked import Question
from .places import Place
from .scales import ImpliedScale
from .trace import Trace

__all__ = ["Index"]


class Index:
    """Attributes, operators, scales and comparisons by the leaves that they depend on.

    It is made when it is first asked, and again when axes were unified or something was noted since.

    Args:
        trace: what the forward pass showed.
        scales: the attention layers whose scale follows a width.
    """

    def __init__(self, trace: Trace, scales: list[ImpliedScale]) -> None:
        self.trace, self.scales = trace, scales
        self._made: tuple[int, ...] = ()
        self._places: dict[Atom, list[Place]] = {}
        self._mixing: dict[Atom, list[tuple[str, int]]] = {}
        self._widths: dict[Atom, list[ImpliedScale]] = {}
        self._rows: dict[nn.Module, list[ImpliedScale]] = {}
        self._asked: dict[Atom, list[Question]] = {}

    def places(self, leaf: Atom) -> list[Place]:
        """The attributes that follow axes with the leaf in them."""
        self._refresh()
        return self._places.get(leaf, [])

    def mixing(self, found: Iterable[Atom]) -> Iterator[tuple[str, int]]:
        """The operators that take all units of one of these leaves together, each once."""
        self._refresh()
        yield from dict.fromkeys(key for leaf in found for key in self._mixing.get(leaf, []))

    def widths(self, leaf: Atom) -> list[ImpliedScale]:
        """The scales that follow a width with the leaf in it."""
        self._refresh()
        return self._widths.get(leaf, [])

    def rows(self, owners: Iterable[nn.Module]) -> list[ImpliedScale]:
        """The scales that rows of parameters of these modules make up for."""
        self._refresh()
        return list({id(s): s for owner in dict.fromkeys(owners) for s in self._rows.get(owner, [])}.values())

    def asked(self, found: Iterable[Atom]) -> list[Question]:
        """The comparisons whose answers depend on one of these leaves, each once."""
        self._refresh()
        return list({id(q): q for leaf in found for q in self._asked.get(leaf, [])}.values())

    def forget(self) -> None:
        """Make all of it again when it is next asked: something that was noted is gone, or there again."""
        self._made = ()

    def _refresh(self) -> None:
        trace = self.trace
        now = (Atom.changes, len(trace.links), len(trace.mixing), len(trace.asked), len(self.scales))
        if now == self._made:
            return
        self._made = now
        for table in (self._places, self._mixing, self._widths, self._rows, self._asked):
            table.clear()
        for place, found in trace.links.items():
            for leaf in _once(found[0][1]):
                self._places.setdefault(leaf, []).append(place)
        for key, dims in trace.mixing.items():
            for leaf in dict.fromkeys(leaf for _, axis in dims for leaf in leaves(axis)):
                self._mixing.setdefault(leaf, []).append(key)
        for question in trace.asked.values():
            for leaf in trace.depends_on(question):
                self._asked.setdefault(leaf, []).append(question)
        for scale in self.scales:
            for leaf in _once(scale.width):
                self._widths.setdefault(leaf, []).append(scale)
            for owner in dict.fromkeys(owner for owner, _, _ in scale.rows):
                self._rows.setdefault(owner, []).append(scale)


def _once(axis: Axis) -> dict[Atom, None]:
    return dict.fromkeys(leaves(axis))
