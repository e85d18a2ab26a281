"""What every operator does to the axes of its operands: one small function per family of operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .algebra import Axis, concat, fresh, is_fixed, size_of, split, split_concat
from .trace import Trace, _tensors

__all__ = ["RULES", "pointwise"]

Rule = Callable[[Trace, Any, Any, Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by their names without the overload."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def opaque(t: Trace, size: int) -> Axis:
    """An axis whose indices mean nothing that could be removed."""
    return fresh(size, f"its indices are made by {t.why}")


# -- element by element --------------------------------------------------------------------------------------------


def pointwise(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Operands of one shape up to broadcasting: dimensions that meet are the same."""
    for result in _tensors(out):
        operands = [x for x in _tensors((args, kwargs)) if x.ndim <= result.ndim]
        axes: list[Axis] = []
        for back in range(result.ndim, 0, -1):
            size = result.shape[-back]
            mine = [t.of(x)[-back] for x in operands if x.ndim >= back and x.shape[-back] == size and size != 1]
            for other in mine[1:]:
                t.unify(mine[0], other)
            axes.append(mine[0] if mine else fresh(size))
        t.set(result, axes)


RULES |= dict.fromkeys(
    (
        "clone", "detach", "detach_", "alias", "_to_copy", "contiguous", "lift_fresh", "bernoulli", "bernoulli_",
        "zeros_like", "ones_like", "empty_like", "full_like", "fill_", "zero_", "masked_fill", "masked_fill_", "copy",
        "copy_", "native_dropout", "rand_like", "randn_like", "positive", "_conj", "resolve_conj", "triu", "tril",
        "square", "dropout", "dropout_", "where", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh",
        "hardtanh_", "floor_divide", "pow", "_prelu_kernel", "prelu", "clamp", "clamp_", "relu6", "gelu",
    ),
    pointwise,
)  # fmt: skip


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "scalar_tensor", "eye")
def _uniform(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """All indices alike: such a dimension takes on whatever meaning it meets."""
    why = f"it is a constant made by {t.why}" if t.operator == "eye" else None
    t.set(out, [fresh(size, why) for size in out.shape])


@rule(
    "arange", "linspace", "rand", "randn", "randint", "normal", "randperm", "new_tensor", "_local_scalar_dense",
    "empty_strided", "new_empty_strided", "meshgrid", "nonzero", "tril_indices", "triu_indices", "bincount",
)  # fmt: skip
def _constant(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    for tensor in _tensors((args, kwargs)):
        t.fix(*t.of(tensor))
    for tensor in _tensors(out):
        t.set(tensor, [opaque(t, size) for size in tensor.shape])


@rule("mkldnn_rnn_layer")
def _lstm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """One direction of one layer; its four gates (three in a GRU) have one unit each per hidden unit."""
    weights = [t.of(w) for w in args[1:5] if w.numel()]
    hidden = weights[1][1]
    width = args[2].shape[1]
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
    for extra in _tensors(out[3:]):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("equal", "is_same_size", "_assert_async", "_assert_tensor_metadata", "sym_size", "is_nonzero", "allclose")
def _question(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    return


# -- views ---------------------------------------------------------------------------------------------------------


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
    t.set(out, [(*fresh(n), *axis) for n, axis in zip(times, axes, strict=True)])


@rule("repeat_interleave")
def _repeat_interleave(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if dim is None or not isinstance(args[1], int):
        _constant(t, args, kwargs, out)
        return
    axes = t.of(args[0])
    axes[dim] = (*axes[dim], *fresh(args[1]))
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
    if is_fixed(axis):
        return opaque(t, length)
    if step == 1:
        sizes = [s for s in (start, length, size - start - length) if s]
        return split_concat(axis, sizes, t.why)[1 if start else 0] if length else ()
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
    axes = t.of(args[0])
    t.fix(axes.pop(args[1] % args[0].ndim))
    t.set(out, axes)


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


@rule("roll", "flip", "cumsum", "sort", "topk", "rot90", "argsort", "cumprod", "cummax")
def _along(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The order along some dimensions matters; the others pass."""
    source = args[0]
    position = 2 if t.operator in ("roll", "topk") else 1
    dims = args[position] if len(args) > position else kwargs.get("dim", kwargs.get("dims", -1))
    dims = {d % source.ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    for result in _tensors(out):
        axes = t.of(source)
        for d in dims:
            t.fix(axes[d])
            axes[d] = opaque(t, result.shape[d])
        t.set(result, axes)


@rule("index", "_unsafe_index")
def _index(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    source, index = args[0], list(args[1])
    axes = t.of(source)
    used = [d for d, i in enumerate(index) if i is not None]
    for d in used:
        t.fix(axes[d])
    for i in index:
        if i is not None:
            t.fix(*t.of(i))
    rest = [axis for d, axis in enumerate(axes) if d not in used]
    new = out.ndim - len(rest)
    adjacent = used == list(range(used[0], used[0] + len(used)))
    first = used[0] if adjacent else 0
    made = [opaque(t, s) for s in out.shape[first : first + new]]
    t.set(out, [*rest[:first], *made, *rest[first:]])


@rule("index_select", "gather", "take_along_dim", "index_copy", "index_add", "scatter", "scatter_", "scatter_add")
def _gather(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] % max(args[0].ndim, 1)
    axes = t.of(args[0])
    for tensor in _tensors(args[2:]):
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
    t.fix(t.of(args[0])[0], *t.of(args[1]))
    t.set(out, [*(opaque(t, s) for s in out.shape[:-1]), t.of(args[0])[1]])


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


# -- products ------------------------------------------------------------------------------------------------------


@rule("mm", "bmm", "matmul", "linalg_matmul")
def _matmul(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    _product(t, t.of(args[0]), t.of(args[1]), out)


def _product(t: Trace, a: list[Axis], b: list[Axis], out: Tensor) -> None:
    t.unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        t.unify(x, y)
    t.heads += a[:-2]
    t.set(out, [*a[:-2], a[-2], b[-1]])


@rule("addmm", "baddbmm", "addbmm")
def _addmm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    _product(t, t.of(args[1]), t.of(args[2]), out)
    bias, made = t.of(args[0]), t.of(out)
    for back in range(1, args[0].ndim + 1):
        if args[0].shape[-back] == out.shape[-back]:
            t.unify(made[-back], bias[-back])


@rule("mv", "dot", "vdot")
def _mv(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    a, b = t.of(args[0]), t.of(args[1])
    t.unify(a[-1], b[-1])
    t.set(out, a[:-1])


@rule("linear")
def _linear(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, w = t.of(args[0]), t.of(args[1])
    t.unify(x[-1], w[-1])
    if len(args) > 2 and args[2] is not None:
        t.unify(w[0], t.of(args[2])[0])
    t.set(out, [*x[:-1], w[0]])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "conv2d", "conv1d")
def _convolution(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, w, bias = t.of(args[0]), t.of(args[1]), args[2]
    transposed, groups = args[6], args[8]
    channels_in, channels_out = args[0].shape[1], out.shape[1]
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
            if args[0].shape[d] == other.shape[d]:  # else it is broadcast
                t.unify(q[d], axes[d])
    t.heads += q[:-2]
    t.unify(q[-1], k[-1])
    t.unify(k[-2], v[-2])
    mask = kwargs.get("attn_mask", kwargs.get("attn_bias", args[3] if len(args) > 3 else None))
    if isinstance(mask, Tensor):
        shape = [*(result.shape[:-1]), args[1].shape[-2]]
        for back in range(1, mask.ndim + 1):
            if mask.shape[-back] == shape[-back] and mask.shape[-back] > 1:
                t.unify(t.of(mask)[-back], [*q[:-2], q[-2], k[-2]][-back])
    t.set(result, [*q[:-1], v[-1]])
    for extra in _tensors(out[1:] if isinstance(out, tuple) else ()):
        t.set(extra, [opaque(t, s) for s in extra.shape])


# -- norms, reductions, pooling ------------------------------------------------------------------------------------


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
)  # fmt: skip
def _batch_norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    axes = t.of(x)
    for other in args[1:5]:
        if isinstance(other, Tensor):
            t.unify(axes[1], t.of(other)[0])
    if not isinstance(args[3], Tensor):
        t.mixes(x, [d for d in range(x.ndim) if d != 1])
    result = out[0] if isinstance(out, tuple) else out
    t.set(result, axes)
    for extra in _tensors(out[1:] if isinstance(out, tuple) else ()):
        t.set(extra, [axes[1]] if extra.ndim == 1 and len(extra) == x.shape[1] else [opaque(t, s) for s in extra.shape])


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, dims = args[0], len(args[1])
    axes = t.of(x)
    for weight in args[2:4]:
        if isinstance(weight, Tensor):
            for axis, mine in zip(t.of(weight), axes[-dims:], strict=True):
                t.unify(mine, axis)
    t.mixes(x, range(x.ndim - dims, x.ndim))
    result, extras = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
    t.set(result, axes)
    for extra in _tensors(extras):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("native_group_norm", "group_norm")
def _group_norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, groups = args[0], args[6]
    axes = t.of(x)
    for weight in args[1:3]:
        if isinstance(weight, Tensor):
            t.unify(axes[1], t.of(weight)[0])
    split(axes[1], [groups, x.shape[1] // groups], t.why)
    t.mixes(x, range(1, x.ndim))
    t.set(out[0], axes)
    for extra in _tensors(out[1:]):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax", "log_softmax")
def _softmax(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    t.mixes(args[0], [args[1]])
    t.set(out, t.of(args[0]))


@rule(
    "sum", "mean", "amax", "amin", "prod", "logsumexp", "var", "std", "var_mean", "std_mean", "max", "min", "argmax",
    "argmin", "any", "all", "linalg_vector_norm", "norm", "aminmax", "median",
)  # fmt: skip
def _reduction(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    if t.operator in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        pointwise(t, args, kwargs, out)
        return
    position = 2 if t.operator in ("linalg_vector_norm", "norm") else 1
    dims: Any = args[position] if len(args) > position else kwargs.get("dim")
    if dims is None or isinstance(dims, bool):
        dims = range(x.ndim)
    chosen = sorted({d % x.ndim for d in (dims if isinstance(dims, Sequence) else [dims])}) if x.ndim else []
    chosen = chosen or list(range(x.ndim))
    axes = t.of(x)
    if t.operator in ("argmax", "argmin"):
        t.fix(*(axes[d] for d in chosen))
    else:
        t.mixes(x, chosen)
    for result in _tensors(out):
        kept = [axes[d] if d not in chosen else () for d in range(x.ndim) if d not in chosen or result.ndim == x.ndim]
        t.set(result, kept)


@rule(
    "max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "avg_pool3d",
    "_upsample_bicubic2d_aa", "adaptive_avg_pool2d", "grid_sampler_2d", "max_pool3d_with_indices",
    "adaptive_avg_pool1d", "_adaptive_avg_pool3d",
    "upsample_nearest1d", "upsample_linear1d", "mkldnn_max_pool2d", "_upsample_nearest_exact2d",
)  # fmt: skip
def _pool(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    axes = t.of(x)
    channel = 1 if not (x.ndim == 3 and "2d" in t.operator) else 0
    t.fix(*axes[channel + 1 :])
    for result in _tensors(out):
        t.set(result, [*axes[: channel + 1], *(opaque(t, s) for s in result.shape[channel + 1 :])])


@rule("as_strided_", "as_strided")
def _as_strided(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """A change of the memory format only, or too much to follow."""
    if list(args[0].shape) == list(out.shape):
        t.set(out, t.of(args[0]))
    else:
        t.fix(*t.of(args[0]))
        t.set(out, [opaque(t, s) for s in out.shape])
