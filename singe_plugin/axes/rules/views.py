"""Operators that change the shape, take parts, or put tensors together."""

from __future__ import annotations

from typing import Any

from ..algebra import Axis, concat, fresh, is_fixed, split, split_concat
from ..trace import Trace
from .base import opaque, rule
from .elements import constant


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "flatten")
def _view(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The order of elements stays: blocks of dimensions with equal products are described by the same atoms."""
    source = args[0]
    axes, before, after = t.of(source), list(source.shape), list(out.shape)
    made: list[Axis] = []
    if 0 in before:
        t.set(out, [opaque(t, size) for size in after])
        return
    i = j = 0
    while i < len(before) or j < len(after):
        block: list[Axis] = []
        sizes: list[int] = []
        left = right = 1
        while True:
            if left == right and (block or sizes) and left > 1:
                break
            if left <= right and i < len(before):
                left *= before[i]
                block.append(axes[i])
                i += 1
            elif j < len(after):
                right *= after[j]
                sizes.append(after[j])
                j += 1
            elif i < len(before):
                left *= before[i]
                block.append(axes[i])
                i += 1
            else:
                break
        merged = tuple(atom for axis in block for atom in axis)
        made += split(merged, sizes, t.why)
    t.set(out, made)


@rule("permute")
def _permute(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    t.set(out, [axes[d] for d in args[1]])


@rule("transpose", "transpose_", "t", "t_", "swapaxes", "adjoint", "mT")
def _transpose(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    if len(axes) > 1:
        a, b = (args[1], args[2]) if len(args) > 2 else (-2, -1)
        axes[a], axes[b] = axes[b], axes[a]
    t.set(out, axes)


@rule("expand")
def _expand(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    source = args[0]
    axes = t.of(source)
    new = out.ndim - source.ndim
    made = [fresh(size) for size in out.shape[:new]]
    for axis, old, size in zip(axes, source.shape, out.shape[new:], strict=True):
        made.append(axis if old == size else fresh(size))
    t.set(out, made)


@rule("repeat")
def _repeat(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    source, times = args[0], list(args[1])
    axes = [()] * (len(times) - source.ndim) + t.of(source)
    t.set(out, [(*(opaque(t, n) if axis else fresh(n)), *axis) for n, axis in zip(times, axes, strict=True)])


@rule("repeat_interleave")
def _repeat_interleave(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None or not isinstance(args[1], int):
        constant(t, args, kwargs, out)
        return
    axes = t.of(args[0])
    axes[dim] = (*axes[dim], *(opaque(t, args[1]) if axes[dim] else fresh(args[1])))
    t.set(out, axes)


@rule("slice")
def _slice(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    source = args[0]
    dim = (args[1] if len(args) > 1 else 0) % source.ndim
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else kwargs.get("step", 1)
    size, length = source.shape[dim], out.shape[dim]
    start = max(start + size, 0) if start < 0 else min(start, size)
    axes = t.of(source)
    axes[dim] = _part(t, axes[dim], size, start, length, step)
    t.set(out, axes)


def _part(t: Trace, axis: Axis, size: int, start: int, length: int, step: int) -> Axis:
    """The positions ``start, start + step, ...`` of an axis, ``length`` of them."""
    if length == size:
        return axis
    if is_fixed(axis) or not length:
        return opaque(t, length)
    if step == 1:
        sizes = [s for s in (start, length, size - start - length) if s]
        return split_concat(axis, sizes, t.why)[1 if start else 0]
    if size % step == 0 and length == size // step:
        outer, inner = split(axis, [length, step], t.why)
        t.fix(inner)
        return outer
    t.fix(axis)
    return opaque(t, length)


@rule("narrow")
def _narrow(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    _slice(t, (args[0], args[1], args[2], args[2] + args[3]), {}, out)


@rule("select")
def _select(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """One position: it stays if somebody reads it. (``x[:, :, -1].shape`` reads none.)"""
    axes = t.of(args[0])
    taken = axes.pop(args[1] % args[0].ndim)
    t.set(out, axes)
    t.takes(out, taken)


@rule("unbind")
def _unbind(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % args[0].ndim
    axes = t.of(args[0])
    t.fix(axes.pop(dim))
    for part in out:
        t.set(part, axes)


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def _split(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
    axes = t.of(args[0])
    sizes = [part.shape[dim] for part in out]
    if t.operator != "split_with_sizes" and len(set(sizes)) == 1 and len(sizes) > 1:
        # equal parts are found by dividing: they have to stay equal
        outer, inner = split(axes[dim], [len(sizes), sizes[0]], t.why)
        t.fix(outer)
        parts = [inner] * len(sizes)
    else:
        parts = split_concat(axes[dim], sizes, t.why)
    for tensor, part in zip(out, parts, strict=True):
        t.set(tensor, [*axes[:dim], part, *axes[dim + 1 :]])


@rule("cat", "concat")
def _cat(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    operands = [x for x in args[0] if x.numel() or x.ndim == out.ndim]
    every = [t.of(x) for x in operands]
    axes = every[0]
    for other in every[1:]:
        for d in range(out.ndim):
            if d != dim:
                t.unify(axes[d], other[d])
    parts = [a[dim] for a in every]
    t.concatenations[tuple(x.shape[dim] for x in operands)] = t.why
    axes[dim] = opaque(t, out.shape[dim]) if all(map(is_fixed, parts)) else concat(parts)
    t.set(out, axes)


@rule("stack")
def _stack(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    every = [t.of(x) for x in args[0]]
    for other in every[1:]:
        for a, b in zip(every[0], other, strict=True):
            t.unify(a, b)
    axes = every[0]
    axes.insert(dim, opaque(t, out.shape[dim]))
    t.set(out, axes)


@rule("as_strided_", "as_strided")
def _as_strided(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """A change of the memory format only, or too much to follow."""
    if list(args[0].shape) == list(out.shape):
        t.set(out, t.of(args[0]))
    else:
        t.fix(*t.of(args[0]))
        t.set(out, [opaque(t, s) for s in out.shape])
