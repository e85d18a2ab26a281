"""Which arguments of a torch function are sizes of what it returns, and where the parts that it takes begin and end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from singe_plugin.nested import tensors_in

from .algebra import Atom, Axis, fix, is_fixed, size_of, split, split_concat
from .trace import Trace
from .tracked import TrackedInt, dimension, plain, tracked_in

__all__ = ["CUTS", "cut_evenly", "link_sizes"]

_MADE = frozenset({"reshape", "view", "new_zeros", "new_ones", "new_empty", "zeros", "ones", "empty", "rand", "randn"})
_FILLED = frozenset({"full", "new_full"})
_UNDERSTOOD = frozenset({"multi_head_attention_forward"})  # nn.MultiheadAttention has an adapter
_REPEATED = frozenset({"expand", "repeat_interleave"})  # how often is a size that is not there before
_CUT = frozenset({"__getitem__", "__setitem__", "narrow", "split", "split_with_sizes"})
CUTS = frozenset({"chunk", "unsafe_chunk", "tensor_split", "hsplit", "vsplit", "dsplit"})
_Linked = Iterator[tuple[Any, Axis]]


def link_sizes(state: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """Note what the tracked integers among the arguments are sizes of.

    One that is a number to the function (a factor, a shift, a bound of something else) makes what the function
    computes depend on a width: :meth:`~singe_plugin.axes.trace.Trace.spend` says so. A part whose size is no tracked
    integer is as large as the code says, whatever is removed.
    """
    if not tracked_in((args, kwargs)) and name not in _CUT and name not in _REPEATED:
        return
    linked = list(_linked(state, name, args, kwargs, out))
    for size, axis in linked:
        if isinstance(size, TrackedInt):
            state.link(size, axis)
        elif name in _REPEATED:
            fix(axis, f"its size is a constant in {state.where}")
        elif name in _CUT:
            state.constants.append((axis, f"its size is a constant in {state.where}"))
    if name not in _UNDERSTOOD:
        known = {id(size) for size, _ in linked} | {id(s) for s in _bounds(name, args)}
        for number in tracked_in((args, kwargs)):
            if id(number) not in known:
                state.spend(number)


def _linked(state: Trace, name: str, args: Any, kwargs: Any, out: Any) -> _Linked:
    if name == "__setitem__":
        yield from _slices(state, args[0], args[1])
        return
    results = [t for t in tensors_in(out) if t.ndim]
    if not results:
        return
    axes = state.of(results[0])
    if name == "expand":
        sizes, old = _size_arguments(args, kwargs), args[0].shape
        for back in range(1, len(sizes) + 1):
            if back > len(old) or (old[-back] == 1 and axes[-back]) or isinstance(sizes[-back], TrackedInt):
                yield sizes[-back], axes[-back]
    elif name == "repeat_interleave":
        times, dim = _argument(args, kwargs, 1, "repeats", 1), _argument(args, kwargs, 2, "dim", None)
        if dim is not None and isinstance(times, int) and times > 1 and args[0].shape[dim]:
            yield times, split(axes[dim], [args[0].shape[dim], plain(times)], state.why)[1]
    elif name in _MADE or name in _FILLED:
        sizes = _size_arguments(args, kwargs, name in _FILLED)
        if len(sizes) == len(axes):
            yield from zip(sizes, axes, strict=True)
    elif name == "unflatten":
        first = _argument(args, kwargs, 1, "dim", 0) % args[0].ndim
        for offset, size in enumerate(_argument(args, kwargs, 2, "sizes", ())):
            yield size, axes[first + offset]
    elif name in ("repeat", "tile"):
        times = _size_arguments(args, kwargs)
        before = [()] * (len(times) - args[0].ndim) + state.of(args[0])
        if len(times) == len(axes):
            for size, axis, old in zip(times, axes, before, strict=True):
                yield size, axis[: len(axis) - len(old)]
    elif name in ("split", "split_with_sizes"):
        dim = _argument(args, kwargs, 2, "dim", 0)
        sizes = _argument(args, kwargs, 1, "split_size_or_sections", _argument(args, kwargs, 1, "split_size", ()))
        each = sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(results)
        for size, part in zip(each, results, strict=False):
            yield size, state.of(part)[dim]
    elif name == "narrow":
        dim, start, length = (_argument(args, kwargs, i + 1, n, 0) for i, n in enumerate(("dim", "start", "length")))
        rest = dimension(args[0].shape[dim], state.of(args[0])[dim]) - start - length
        yield from _part(state, args[0], dim, start, length, rest)
    elif name == "__getitem__":
        yield from _slices(state, args[0], args[1])
    elif name in ("layer_norm", "rms_norm"):
        shape = _argument(args, kwargs, 1, "normalized_shape", ())
        yield from zip(shape, axes[-len(shape) :], strict=True)
    elif name == "group_norm":
        yield from _groups(state, _argument(args, kwargs, 1, "num_groups", 1), axes[1])
    elif name.startswith("conv") and len(axes) > 1:
        yield from _groups(state, _argument(args, kwargs, 6, "groups", 1), axes[1])


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any) -> Any:
    return kwargs.get(name, args[position] if len(args) > position else default)


def _size_arguments(args: Any, kwargs: Any, filled: bool = False) -> list[Any]:
    rest = args[1:] if args and isinstance(args[0], Tensor) else args
    rest = rest[:1] if filled else rest
    if not rest:
        rest = [kwargs.get("size", ())]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        return list(rest[0])
    return [a for a in rest if isinstance(a, int) or (isinstance(a, Tensor) and not a.ndim)]


def _groups(state: Trace, groups: Any, axis: Axis) -> _Linked:
    if groups > 1:
        outer, _ = split(axis, [plain(groups), size_of(axis) // plain(groups)], state.why)
        yield groups, outer


# -- parts ------------------------------------------------------------------------------------------------------------


def _bounds(name: str, args: Any) -> list[TrackedInt]:
    """The tracked bounds of slices: what they mean is said by the sizes of the parts."""
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return tracked_in([(i.start, i.stop) for i in index if isinstance(i, slice) and not tracked_in(i.step)])
    return tracked_in(args[2:4]) if name == "narrow" else []


def _slices(state: Trace, source: Tensor, index: Any) -> _Linked:
    """The sizes of what a slice leaves out in front and of what it takes."""
    items = index if isinstance(index, tuple) else (index,)
    taken = sum(_dims_of(item) for item in items)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += source.ndim - taken
            continue
        if isinstance(item, slice) and item.step in (None, 1) and (item.start, item.stop) != (None, None):
            whole = dimension(source.shape[dim], state.of(source)[dim])
            start, stop = _bound(item.start, 0), _bound(item.stop, whole)
            start = whole + start if start < 0 else start
            stop = whole + stop if stop < 0 else stop
            yield from _part(state, source, dim, start, stop - start, whole - stop)
        elif isinstance(item, slice):
            for number in tracked_in(item):
                state.spend(number)
        dim += _dims_of(item)


def _bound(bound: Any, default: int) -> int:
    """Where a slice begins or ends; a number in a tensor (a corner of a box) is what it is."""
    if bound is None:
        return default
    return int(bound) if isinstance(bound, Tensor) else bound


def _dims_of(item: Any) -> int:
    """How many dimensions an item of an index is about."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _part(state: Trace, source: Tensor, dim: int, *numbers: Any) -> _Linked:
    """What is in front of a part, the part, and what is behind it, where these numbers are their sizes."""
    axis = state.of(source)[dim]
    sizes = [plain(number) for number in numbers]
    if min(sizes) < 0 or is_fixed(axis):  # beyond the end: whether it is depends on the sizes
        for number in tracked_in(numbers):
            state.spend(number)
        return
    pieces = iter(split_concat(axis, [size for size in sizes if size], state.why))
    for number, size in zip(numbers, sizes, strict=True):
        yield number, next(pieces) if size else (Atom(0, "it is empty"),)


def cut_evenly(state: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """``chunk`` and its like find the parts by dividing: they have to stay equal, and nothing may be left over."""
    sections = _argument(args, kwargs, 1, "chunks", kwargs.get("sections", kwargs.get("indices_or_sections")))
    results = [t for t in tensors_in(out) if t.ndim]
    if not isinstance(sections, int) or not results or len(results) < 2:
        return
    ndim = args[0].ndim
    dim = {"hsplit": 0 if ndim == 1 else 1, "vsplit": 0, "dsplit": 2}.get(name)
    dim = _argument(args, kwargs, 2, "dim", 0) % ndim if dim is None else dim
    axis, sizes = state.of(args[0])[dim], [t.shape[dim] for t in results]
    if len(set(sizes)) > 1 or len(results) != sections:
        fix(axis, f"{name} cuts it into parts that are not equal")
        return
    _, inner = split(axis, [len(sizes), sizes[0]], state.why)
    for result in results:
        if size_of(part := state.of(result)[dim]) == size_of(inner):
            state.unify(part, inner)
