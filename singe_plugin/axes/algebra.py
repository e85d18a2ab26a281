"""What a tensor's dimension is made of: products and concatenations of *atoms*, equated where the model equates them.

An **axis** describes one dimension as a product of atoms in row-major order: a ``qkv`` projection of 3 x 6 heads of
64 writes a dimension with the axis ``(3, 6, 64)``. An **atom** is a leaf (its indices are units that could be
removed one by one), a product of other atoms, or a concatenation of axes. Two axes that the model adds, multiplies
or contracts with each other are :func:`unified <unify>`: from then on their leaves are the same, so that what is
removed from one is removed from all. A view splits leaves, ``torch.cat`` joins axes, ``torch.split`` cuts leaves.

Where two descriptions cannot be brought together, all their leaves are *fixed*, with the reason: nothing is ever
removed from a fixed leaf. That makes every unknown safe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Atom", "Axis", "concat", "contains", "expand", "fix", "fix_all", "fresh", "is_fixed", "labels", "leaves",
    "size_of", "split", "split_concat", "unify",
]  # fmt: skip

_TOLD_APART = "its indices are told apart"


class Atom:
    """A factor of an axis. After :func:`unify`, several objects may stand for one: compare them by :meth:`root`."""

    __slots__ = ("_factors", "_members", "_parent", "_parts", "_size", "fixed")
    changes = 0  # of the structure of any atom, so that what was derived from it can be kept until the next

    def __init__(self, size: int, fixed: str | None = None) -> None:
        self._size = size
        self._parent: Atom | None = None
        self._members: tuple[int, frozenset[Atom]] = (-1, frozenset())
        self.fixed = fixed
        self._factors: Axis | None = None
        self._parts: tuple[Axis, ...] | None = None

    @property
    def factors(self) -> Axis | None:
        """The atoms that it is a product of, if it is one."""
        return self._factors

    @factors.setter
    def factors(self, value: Axis | None) -> None:
        self._factors = value
        Atom.changes += 1

    @property
    def parts(self) -> tuple[Axis, ...] | None:
        """The axes that it is a concatenation of, if it is one."""
        return self._parts

    @parts.setter
    def parts(self, value: tuple[Axis, ...] | None) -> None:
        self._parts = value
        Atom.changes += 1

    def members(self) -> frozenset[Atom]:
        """All leaves in it."""
        root = self.root()
        if root._members[0] != Atom.changes:
            root._members = (Atom.changes, frozenset(leaves((root,))))
        return root._members[1]

    def root(self) -> Atom:
        """The atom that stands for this one."""
        atom = self
        while atom._parent is not None:
            if atom._parent._parent is not None:
                atom._parent = atom._parent._parent
            atom = atom._parent
        return atom

    @property
    def is_leaf(self) -> bool:
        return self.factors is None and self.parts is None

    @property
    def size(self) -> int:
        """The number of indices, now: removals make it smaller."""
        if self.factors is not None:
            return size_of(self.factors)
        if self.parts is not None:
            return sum(size_of(part) for part in self.parts)
        return self._size

    def shrink(self, count: int) -> None:
        """Take ``count`` units off a leaf."""
        self._size -= count

    def resize(self, size: int) -> None:
        """Set the number of units of a leaf."""
        self._size = size

    def __repr__(self) -> str:
        root = self.root()
        if root.parts is not None:
            return "[" + " + ".join(map(repr, root.parts)) + "]"
        if root.factors is not None:
            return repr(root.factors)
        return f"{'!' if root.fixed else ''}{root.size}"


Axis = tuple[Atom, ...]


def fresh(size: int, fixed: str | None = None) -> Axis:
    """The axis of a dimension about which nothing is known yet; a dimension of size 1 has no atoms.

    Example:
        >>> fresh(8), fresh(1)
        ((8,), ())
    """
    return () if size == 1 else (Atom(size, fixed),)


def size_of(axis: Axis) -> int:
    """The number of positions along the axis."""
    return math.prod(atom.root().size for atom in axis)


def expand(axis: Axis) -> list[Atom]:
    """The axis as a product of leaves and concatenations."""
    found: list[Atom] = []
    for atom in axis:
        root = atom.root()
        if root.factors is not None:
            found += expand(root.factors)
        else:
            found.append(root)
    return found


def leaves(axis: Axis) -> list[Atom]:
    """Every leaf of the axis, in order, repeated as often as it occurs."""
    found: list[Atom] = []
    for atom in expand(axis):
        if atom.parts is None:
            found.append(atom)
        else:
            for part in atom.parts:
                found += leaves(part)
    return found


def contains(axis: Axis, leaf: Atom) -> bool:
    """Whether a leaf is part of the axis."""
    return any(leaf in atom.members() for atom in axis)


def fix(axis: Axis, why: str) -> None:
    """Nothing may be removed from this axis any more."""
    for leaf in leaves(axis):
        leaf.fixed = leaf.fixed or why


def is_fixed(axis: Axis) -> bool:
    """Whether nothing may be removed from any part of this axis."""
    return all(leaf.fixed for leaf in leaves(axis))


def unify(a: Axis, b: Axis, why: str) -> None:
    """Make two axes of equal size the same; what cannot be brought together is fixed.

    Example:
        >>> rows, heads, width = fresh(12), fresh(3), fresh(4)
        >>> unify(rows, heads + width, "a view")
        >>> rows
        ((3, 4),)
    """
    left, right = expand(a)[::-1], expand(b)[::-1]
    while left and right:
        x, y = left.pop().root(), right.pop().root()
        if x is not y and (x.factors is not None or y.factors is not None):  # since they were listed
            left += expand((x,))[::-1]
            right += expand((y,))[::-1]
            continue
        if x is y:
            continue
        if x.size == y.size:
            _join(x, y, why)
            continue
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        if y.size == 0 or x.size % y.size:
            fix((x, y, *left, *right), why)
            return
        outer, inner = _factor(x, y.size, x.size // y.size, why)
        left += [*expand(inner)[::-1], *expand(outer)[::-1]]
        right.append(y.root())
    fix((*left, *right), why)  # empty, unless the sizes differ


def _join(x: Atom, y: Atom, why: str) -> None:
    """Unify two roots of equal size."""
    if y.parts is not None and x.parts is None:
        x, y = y, x
    if y.parts is None:
        y._parent = x
        Atom.changes += 1
        if y.fixed:
            fix((x,), y.fixed)
        return  # a leaf, which from now on is x
    assert x.parts is not None
    first, second = list(x.parts), list(y.parts)
    done: list[Axis] = []
    while first and second:
        a, b = first.pop(0), second.pop(0)
        if size_of(a) > size_of(b):
            a, *rest = split_concat(a, [size_of(b), size_of(a) - size_of(b)], why)
            first[:0] = rest
        elif size_of(b) > size_of(a):
            b, *rest = split_concat(b, [size_of(a), size_of(b) - size_of(a)], why)
            second[:0] = rest
        unify(a, b, why)
        done.append(a)
    if x.root() is x and y.root() is y and x is not y:
        y._parent, x.parts = x, tuple(done)


def _factor(atom: Atom, outer: int, inner: int, why: str) -> tuple[Axis, Axis]:
    """An atom as ``outer x inner``."""
    if outer == 1 or inner == 1:
        return ((), (atom,)) if outer == 1 else ((atom,), ())
    if atom.is_leaf:
        atom.factors = (*fresh(outer, atom.fixed), *fresh(inner, atom.fixed))
        return atom.factors[:1], atom.factors[1:]
    assert atom.parts is not None
    if all(size_of(part) % inner == 0 for part in atom.parts):
        halves = [split(part, [size_of(part) // inner, inner], why) for part in atom.parts]
        for _, tail in halves[1:]:
            unify(halves[0][1], tail, why)
        pair = (concat([head for head, _ in halves]), halves[0][1])
    else:
        rows = _pieces(atom.parts, inner, why)
        if not rows:
            fix((atom,), why)
            return fresh(outer, why), fresh(inner, why)
        for row in rows[1:]:
            unify(rows[0], row, why)
        pair = (fresh(outer, _TOLD_APART), rows[0])
    atom.parts, atom.factors = None, (*pair[0], *pair[1])
    return pair


def _pieces(parts: Sequence[Axis], width: int, why: str) -> list[Axis]:
    """The pieces of ``width`` of a concatenation: consecutive parts, or blocks of the largest size that fits all.

    Pieces of 12 over parts of 64 and 32 are 3 blocks of 4, which shrink in step. There are none if nothing fits.
    """
    row, rows = list[Axis](), list[Axis]()
    for part in parts:
        row.append(part)
        if sum(map(size_of, row)) >= width:
            rows.append(concat(row))
            row = []
    if not row and all(size_of(piece) == width for piece in rows):
        return rows
    block = math.gcd(width, *map(size_of, parts))
    blocks = [split(part, [size_of(part) // block, block], why) for part in parts] if block > 1 else []
    for outer, inner in blocks:
        fix(outer, _TOLD_APART)
        unify(blocks[0][1], inner, why)
    return [(*fresh(width // block, _TOLD_APART), *blocks[0][1])] if blocks else []


def split(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """An axis as a product of axes of the given sizes (what ``view`` does to one dimension).

    Example:
        >>> split(fresh(12), [3, 1, 4], "a view")
        [(3,), (), (4,)]
    """
    todo = expand(axis)[::-1]
    found: list[Axis] = []
    for size in sizes:
        mine: list[Atom] = []
        need = size
        while need > 1 and todo:
            atom = todo.pop().root()
            if atom.factors is not None:
                todo += expand(atom.factors)[::-1]
            elif need % atom.size == 0 and atom.size:
                mine.append(atom)
                need //= atom.size
            elif atom.size and atom.size % need == 0:
                outer, inner = _factor(atom, need, atom.size // need, why)
                mine += expand(outer)
                todo += expand(inner)[::-1]
                need = 1
            else:
                need = -1
        if need != 1:
            fix(axis, why)
            return [fresh(s, why) for s in sizes]
        found.append(tuple(mine))
    return found


def concat(parts: Sequence[Axis]) -> Axis:
    """The axis of a concatenation.

    Example:
        >>> concat([fresh(3), fresh(4)])
        ([(3,) + (4,)],)
    """
    parts = [part for part in parts if size_of(part)]
    if len(parts) == 1:
        return parts[0]
    atom = Atom(0)
    atom.parts = tuple(parts)
    return (atom,)


def split_concat(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """An axis as a concatenation of axes of the given sizes (what ``torch.split`` does).

    Example:
        >>> stream = fresh(8)
        >>> split_concat(stream, [3, 5], "a split"), stream
        ([(3,), (5,)], ([(3,) + (5,)],))
    """
    atoms = expand(axis)
    if len(sizes) == 1:
        return [axis]
    if not atoms or any(s == 0 for s in sizes):
        fix(axis, why)
        return [fresh(s, why) for s in sizes]
    first, rest = atoms[0], tuple(atoms[1:])
    inner = size_of(rest)
    if any(s % inner for s in sizes):
        fix(axis, why)
        return [fresh(s, why) for s in sizes]
    outer = [s // inner for s in sizes]
    if first.is_leaf:
        first.parts = tuple(fresh(s, first.fixed) for s in outer)
        pieces = list(first.parts)
    else:
        assert first.parts is not None
        left, pieces = list(first.parts), []
        for size in outer:
            mine: list[Axis] = []
            while (need := size - sum(size_of(p) for p in mine)) > 0:
                part = left.pop(0)
                if size_of(part) > need:
                    part, remainder = split_concat(part, [need, size_of(part) - need], why)
                    left.insert(0, remainder)
                mine.append(part)
            pieces.append(concat(mine))
    return [piece + rest for piece in pieces]


def labels(axis: Axis, leaf: Atom) -> NDArray[np.int64]:
    """The unit of ``leaf`` that each position along the axis belongs to, or -1.

    Raises:
        ValueError: if a position belongs to two units of it.

    Example:
        >>> heads, width = fresh(2), fresh(3)
        >>> labels(heads + width, heads[0]).tolist(), labels(heads + width, width[0]).tolist()
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    """
    found: NDArray[np.int64] | None = None
    before = 1
    for atom in expand(axis):
        size = atom.size
        if leaf not in atom.members():
            before *= size
            found = None if found is None else np.repeat(found, size)
            continue
        if found is not None:
            raise ValueError("a position belongs to two units")
        found = np.tile(_labels(atom, leaf, size), before)
    return np.full(before, -1, dtype=np.int64) if found is None else found


def _labels(atom: Atom, leaf: Atom, size: int) -> NDArray[np.int64]:
    """Label the positions of one atom that contains the leaf, as :func:`labels` does."""
    if atom is leaf:
        return np.arange(size, dtype=np.int64)
    found = np.full(size, -1, dtype=np.int64)
    start = 0
    for part in atom.parts or ():
        end = start + size_of(part)
        if contains(part, leaf):
            found[start:end] = labels(part, leaf)
        start = end
    return found


def fix_all(axes: Iterable[Axis], why: str) -> None:
    """Fix several axes."""
    for axis in axes:
        fix(axis, why)
