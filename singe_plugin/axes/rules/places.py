"""Operators for which it matters where something is: padding, indexing, sorting, patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from singe_plugin.nested import tensors_in

from ..algebra import Axis, concat, fix, is_fixed, size_of, split
from ..trace import Trace
from .base import opaque, rule


@rule("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "pad", "reflection_pad1d", "replication_pad1d")
def _pad(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes, widths = t.of(args[0]), list(args[1])
    for number in range(len(widths) // 2):
        dim, before, after = out.ndim - 1 - number, widths[2 * number], widths[2 * number + 1]
        if not before and not after:
            continue
        if is_fixed(axes[dim]) or t.operator != "constant_pad_nd" or before < 0 or after < 0:
            t.fix(axes[dim])
            axes[dim] = opaque(t, out.shape[dim])
        else:
            padding = [opaque(t, n) if n else None for n in (before, after)]
            axes[dim] = concat([p for p in (padding[0], axes[dim], padding[1]) if p is not None])
    t.set(out, axes)


@rule(
    "roll", "flip", "cumsum", "sort", "topk", "rot90", "argsort", "cumprod", "cummax", "cummin", "logcumsumexp",
    "kthvalue",
)  # fmt: skip
def _along(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The order along some dimensions matters, or how many there are; the others pass."""
    source = args[0]
    position = 2 if t.operator in ("roll", "topk", "kthvalue") else 1
    dims = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("dims", -1))
    dims = {d % source.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    for result in tensors_in(out):
        axes: list[Axis | None] = [*t.of(source)]
        for d in dims:
            t.fix(t.of(source)[d])
            axes[d] = opaque(t, result.shape[d]) if result.ndim == source.ndim else None
        t.set(result, [axis for axis in axes if axis is not None])


@rule("index", "_unsafe_index")
def _index(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    rest, first = _indexed(t, axes, args[1])
    made = [opaque(t, s) for s in out.shape[first : first + out.ndim - len(rest)]]
    t.set(out, [*rest[:first], *made, *rest[first:]])


@rule("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def _index_put(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Other values at some positions: what is not indexed passes, and is what it is of the values."""
    axes, values = t.of(args[0]), args[2]
    rest, first = _indexed(t, axes, args[1])
    new = max((1 if _is_mask(i) else i.ndim for i in args[1] if i is not None), default=0)
    targets: list[Axis | None] = [*rest[:first], *[None] * new, *rest[first:]]
    for size, axis, target in zip(reversed(values.shape), reversed(t.of(values)), reversed(targets), strict=False):
        if target is not None and size == size_of(target):
            t.unify(target, axis)
        else:
            t.fix(axis)
            if target is not None and size > 1:
                t.fix(target)
    t.set(out, axes)


def _indexed(t: Trace, axes: list[Axis], index: Sequence[Any]) -> tuple[list[Axis], int]:
    """Fix the dimensions that are indexed; the axes of the others, and where what is chosen stands among them.

    A mask takes as many dimensions as it has.
    """
    used: list[int] = []
    dim = 0
    for one in index:
        taken = one.ndim if _is_mask(one) else 1
        if one is not None:
            used += range(dim, dim + taken)
            t.fix(*t.of(one))
        dim += taken
    t.fix(*(axes[d] for d in used))
    adjacent = used == list(range(used[0], used[0] + len(used))) if used else False
    return [axis for d, axis in enumerate(axes) if d not in used], used[0] if adjacent else 0


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@rule(
    "index_select", "gather", "take_along_dim", "index_copy", "index_add", "scatter", "scatter_", "scatter_add",
    "index_add_", "index_copy_", "scatter_add_",
)  # fmt: skip
def _gather(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] % max(args[0].ndim, 1)
    axes = t.of(args[0])
    for tensor in tensors_in(args[2:]):
        others = t.of(tensor)
        if t.operator == "index_select" or tensor.ndim != out.ndim:
            t.fix(*others)
            continue
        for d, axis in enumerate(others):
            if d != dim and tensor.shape[d] == out.shape[d]:
                t.unify(axes[d], axis)
            else:
                t.fix(axis)
    t.fix(axes[dim])
    axes[dim] = opaque(t, out.shape[dim])
    for d, size in enumerate(out.shape):
        if size_of(axes[d]) != size:
            t.fix(axes[d])
            axes[d] = opaque(t, size)
    t.set(out, axes)


@rule("embedding")
def _embedding(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    fix(t.of(args[0])[0], "it is the vocabulary of an embedding, which is kept whole")
    t.fix(*t.of(args[1]))
    t.set(out, [*(opaque(t, s) for s in out.shape[:-1]), t.of(args[0])[1]])


@rule("_pack_padded_sequence")
def _pack(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The steps of all sequences one after the other: what is at each step passes."""
    axes = t.of(args[0])
    t.fix(*axes[:2], *t.of(args[1]))
    t.set(out[0], [opaque(t, len(out[0])), *axes[2:]])
    t.set(out[1], [opaque(t, size) for size in out[1].shape])


@rule("unfold")
def _unfold(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes, dim = t.of(args[0]), args[1] % args[0].ndim
    t.fix(axes[dim])
    axes[dim] = opaque(t, out.shape[dim])
    t.set(out, [*axes, opaque(t, out.shape[-1])])


@rule("im2col")
def _im2col(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    patch = math.prod(args[1])
    t.fix(*axes[-2:])
    batch = axes[:1] if args[0].ndim == 4 else []
    t.set(out, [*batch, (*axes[-3], *opaque(t, patch)), opaque(t, out.shape[-1])])


@rule("col2im")
def _col2im(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    channels = out.shape[-3]
    t.fix(axes[-1])
    outer, inner = split(axes[-2], [channels, size_of(axes[-2]) // channels], t.why)
    t.fix(inner)
    batch = axes[:1] if args[0].ndim == 3 else []
    t.set(out, [*batch, outer, opaque(t, out.shape[-2]), opaque(t, out.shape[-1])])


@rule("pixel_shuffle")
def _pixel_shuffle(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    outer, inner = split(axes[-3], [out.shape[-3], args[1] ** 2], t.why)
    t.fix(inner, *axes[-2:])
    t.set(out, [*axes[:-3], outer, opaque(t, out.shape[-2]), opaque(t, out.shape[-1])])


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    made = (*axes[-3], *opaque(t, args[1] ** 2))
    t.fix(*axes[-2:])
    t.set(out, [*axes[:-3], made, opaque(t, out.shape[-2]), opaque(t, out.shape[-1])])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The number of groups stays; what is taken from one is taken from all."""
    axes, groups = t.of(args[0]), int(args[1])
    outer, inner = split(axes[1], [groups, out.shape[1] // groups], t.why)
    t.fix(outer)
    axes[1] = (*inner, *outer)
    t.set(out, axes)


@rule("roi_align", "roi_pool")
def _roi(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Parts of feature maps, cut out for boxes: channels stay what they are."""
    axes = t.of(args[0])
    t.fix(axes[0], *axes[2:], *t.of(args[1]))
    for result in tensors_in(out):
        t.set(result, [opaque(t, len(result)), axes[1], *(opaque(t, size) for size in result.shape[2:])])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fft(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """All positions along some dimensions make up every frequency; the other dimensions pass."""
    axes = t.of(args[0])
    for d in args[1]:
        t.fix(axes[d])
        axes[d] = opaque(t, out.shape[d])
    t.set(out, axes)


@rule("view_as_real")
def _view_as_real(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    t.set(out, [*t.of(args[0]), opaque(t, 2)])


@rule("view_as_complex")
def _view_as_complex(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    axes = t.of(args[0])
    t.fix(axes.pop())
    t.set(out, axes)
