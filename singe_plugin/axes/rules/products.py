"""Matrix products, convolutions, attention and recurrent layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from singe_plugin.nested import tensors_in

from ..algebra import Axis, size_of, split
from ..grouped import BYTES
from ..trace import Trace
from .base import opaque, rule


@rule("mm", "bmm", "matmul", "linalg_matmul")
def _matmul(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    _product(t, args[0], args[1], out)


def _product(t: Trace, one: Tensor, other: Tensor, out: Tensor) -> None:
    a, b = t.of(one), t.of(other)
    t.origins.contract(one, -1, other, -2)
    t.unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        t.unify(x, y)
    t.heads += a[:-2]
    t.set(out, [*a[:-2], a[-2], b[-1]])


@rule("_grouped_mm")
def _grouped(t: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    """Rows in groups, each with a matrix of its own; widths have to stay multiples of some bytes."""
    a, b = t.of(args[0]), t.of(args[1])
    if len(a) != 2 or len(b) != 3:
        t.fix(*a, *b)
        t.set(out, [opaque(t, size) for size in out.shape])
        return
    t.origins.contract(args[0], -1, args[1], -2)
    t.unify(a[-1], b[-2])
    t.fix(a[0], b[0])
    t.set(out, [a[0], b[-1]])
    for axis in (a[-1], b[-1]):
        t.multiples.append((axis, BYTES // args[0].element_size(), t.where))


@rule("addmm", "baddbmm", "addbmm")
def _addmm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    _product(t, args[1], args[2], out)
    bias, made = t.of(args[0]), t.of(out)
    for back in range(1, args[0].ndim + 1):
        if args[0].shape[-back] == out.shape[-back]:
            t.unify(made[-back], bias[-back])


@rule("mv", "dot", "vdot")
def _mv(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    a, b = t.of(args[0]), t.of(args[1])
    t.origins.contract(args[0], -1, args[1], -1)
    t.unify(a[-1], b[-1])
    t.set(out, a[:-1])


@rule("linear")
def _linear(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, w = t.of(args[0]), t.of(args[1])
    t.origins.contract(args[0], -1, args[1], -1)
    t.unify(x[-1], w[-1])
    if len(args) > 2 and args[2] is not None:
        t.unify(w[0], t.of(args[2])[0])
    t.set(out, [*x[:-1], w[0]])


@rule("_trilinear")
def _trilinear(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """What ``nn.Bilinear`` computes: three operands, each without some dimensions, multiplied and summed."""
    summed = set(args[6])
    met: list[Axis | None] = [None] * (out.ndim + len(summed))
    for operand, missing in zip(args[:3], args[3:6], strict=True):
        present = [d for d in range(len(met)) if d not in missing]
        for d, axis in zip(present, t.of(operand), strict=True):
            here = met[d]
            if here is not None:
                t.unify(here, axis)
            met[d] = axis if here is None else here
    for d in summed:
        one, other = [
            (x, d - sum(e < d for e in missing))
            for x, missing in zip(args[:3], args[3:6], strict=True)
            if d not in missing
        ]
        t.origins.contract(*one, *other)
    t.set(out, [axis or () for d, axis in enumerate(met) if d not in summed])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv2d", "conv1d")
def _convolution(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, w, bias = t.of(args[0]), t.of(args[1]), args[2]
    transposed, groups = args[6], args[8]
    channels_in, channels_out = args[0].shape[1], out.shape[1]
    t.origins.contract(args[0], 1, args[1], 0 if transposed else 1)
    t.fix(*w[2:])
    groups_in, inner_in = split(x[1], [groups, channels_in // groups], t.why)
    if transposed:
        group_w, inner = split(w[0], [groups, channels_in // groups], t.why)
        t.unify(inner_in, inner)
        made = (*group_w, *w[1])
    else:
        group_w, _ = split(w[0], [groups, channels_out // groups], t.why)
        t.unify(inner_in, w[1])
        made = w[0]
    t.unify(groups_in, group_w)
    if bias is not None:
        t.unify(made, t.of(bias)[0])
    t.set(out, [x[0], made, *(_slid(t, x[d], args, d, size) for d, size in enumerate(out.shape[2:], 2))])


def _slid(t: Trace, axis: Axis, args: Any, dim: int, size: int) -> Axis:
    """What a kernel that slides along an axis makes of it: a kernel of one position leaves it as it is."""
    stride, padding = (args[i][min(dim - 2, len(args[i]) - 1)] for i in (3, 4))
    if args[1].shape[dim] == 1 and stride == 1 and padding == 0 and size_of(axis) == size:
        return axis
    t.fix(axis)
    return opaque(t, size)


@rule("deform_conv2d")
def _deform_conv2d(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """torchvision's: ``(x, weight, offset, mask, bias, ...)``; the channels of offsets and masks are positions."""
    x, w = t.of(args[0]), t.of(args[1])
    groups, offset_groups = args[11], args[12]
    t.origins.contract(args[0], 1, args[1], 1)
    groups_in, inner = split(x[1], [groups, args[0].shape[1] // groups], t.why)
    groups_out, _ = split(w[0], [groups, out.shape[1] // groups], t.why)
    t.unify(groups_in, groups_out)
    t.unify(inner, w[1])
    if offset_groups > 1:
        blocks, _ = split(x[1], [offset_groups, args[0].shape[1] // offset_groups], t.why)
        t.fix(blocks)
    t.unify(w[0], t.of(args[4])[0])
    for where in map(t.of, args[2:4]):
        if size_of(where[0]) == size_of(x[0]):
            t.unify(x[0], where[0])
        t.fix(*where[1:])
    t.fix(*x[2:], *w[2:])
    t.set(out, [x[0], w[0], *(opaque(t, size) for size in out.shape[2:])])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
)  # fmt: skip
def _attention(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    q, k, v = (t.of(x) for x in args[:3])
    result = out[0] if isinstance(out, tuple) else out
    for other, axes in ((args[1], k), (args[2], v)):
        for d in range(len(q) - 2):
            if args[0].shape[d] == other.shape[d]:
                t.unify(q[d], axes[d])
            elif other.shape[d] > 1:  # grouped queries: so many in a row share a key; else the key is broadcast
                shared, queries = split(q[d], [other.shape[d], args[0].shape[d] // other.shape[d]], t.why)
                t.unify(shared, axes[d])
                t.fix(queries)
    t.heads += q[:-2]
    t.origins.contract(args[0], -1, args[1], -1)
    t.origins.contract(args[0], -2, args[2], -2)
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    mask = kwargs.get("attn_mask", kwargs.get("attn_bias", args[3] if len(args) > 3 else None))
    if isinstance(mask, Tensor):
        shape = [*(result.shape[:-1]), args[1].shape[-2]]
        for back in range(1, mask.ndim + 1):
            if mask.shape[-back] == shape[-back] and mask.shape[-back] > 1:
                t.unify(t.of(mask)[-back], [*q[:-2], q[-2], k[-2]][-back])
    t.set(result, [*q[:-1], v[-1]])
    for extra in tensors_in(out[1:] if isinstance(out, tuple) else ()):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("mkldnn_rnn_layer")
def _lstm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """One direction of one layer; its four gates (three in a GRU) have one unit each per hidden unit."""
    weights = [t.of(w) for w in args[1:5] if w.numel()]
    hidden = weights[1][1]
    width = args[2].shape[1]
    t.origins.contract(args[0], -1, args[1], 1)
    t.origins.contract(args[0], -1, args[2], 1)
    t.unify(t.of(args[0])[-1], weights[0][1])
    t.fix(t.of(args[0])[0])  # the steps come one after the other
    for axes in weights:
        gates, units = split(axes[0], [size_of(axes[0]) // width, width], t.why)
        t.fix(gates)
        t.unify(hidden, units)
    for state in args[5:7]:
        t.unify(hidden, t.of(state)[-1])
    t.set(out[0], [*t.of(args[0])[:-1], hidden])
    for result in out[1:3]:
        t.set(result, [*(opaque(t, s) for s in result.shape[:-1]), hidden])
    for extra in tensors_in(out[3:]):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def _cell(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """One step on CUDA without cuDNN: ``(gates of the input, gates of the state, state, biases)``."""
    batch, hidden = t.of(args[2])
    for number, gates in enumerate(a for a in (*args[:2], *args[3:]) if isinstance(a, Tensor)):
        axes = t.of(gates)
        kind, units = split(axes[-1], [size_of(axes[-1]) // size_of(hidden), size_of(hidden)], t.why)
        t.fix(kind)
        t.unify(hidden, units)
        if number < 2:
            t.unify(batch, axes[0])
    for result in tensors_in(out):
        same = result.shape == args[2].shape  # else what the backward pass needs
        t.set(result, [batch, hidden] if same else [opaque(t, s) for s in result.shape])
