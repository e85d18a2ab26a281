"""Norms, reductions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from singe_plugin.nested import tensors_in

from ..algebra import expand, size_of, split
from ..trace import Trace
from .base import opaque, rule
from .elements import pointwise

LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")  # of two tensors


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
    for extra in tensors_in(out[1:] if isinstance(out, tuple) else ()):
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
    for extra in tensors_in(extras):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("native_group_norm", "group_norm")
def _group_norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x, groups = args[0], args[6]
    axes = t.of(x)
    for weight in args[1:3]:
        if isinstance(weight, Tensor):
            t.unify(axes[1], t.of(weight)[0])
    width = x.shape[1] // groups
    why = t.why
    for atom in expand(axes[1]):
        if atom.parts is not None:
            sizes = tuple(size_of(part) for part in atom.parts)
            made = t.concatenations.get(sizes, "a concatenation")
            why = f"{why}: no units fit its groups of {width} and the parts {' + '.join(map(str, sizes))} of {made}"
    split(axes[1], [groups, width], why)
    t.mixes(x, range(1, x.ndim))
    t.set(out[0], axes)
    for extra in tensors_in(out[1:]):
        t.set(extra, [opaque(t, s) for s in extra.shape])


@rule("_weight_norm_interface")
def _weight_norm(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Directions and lengths: a row of both goes with a unit. Lengths make up for what directions lose."""
    directions, lengths = t.of(args[0]), t.of(args[1])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].ndim
    t.unify(directions[dim], lengths[dim])
    t.set(out[0], directions)
    t.set(out[1], lengths)


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax", "log_softmax")
def _softmax(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    t.mixes(args[0], [args[1]])
    t.set(out, t.of(args[0]))


@rule(
    "sum", "mean", "amax", "amin", "prod", "logsumexp", "var", "std", "var_mean", "std_mean", "max", "min", "argmax",
    "argmin", "any", "all", "linalg_vector_norm", "norm", "aminmax", "median", "nanmedian", "mode",
)  # fmt: skip
def _reduction(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0]
    if t.operator in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        pointwise(t, args, kwargs, out)
        return
    position = 2 if t.operator in ("linalg_vector_norm", "norm") else 1
    dims: Any = args[position] if len(args) > position else kwargs.get("dim", -1 if t.operator == "mode" else None)
    if dims is None or isinstance(dims, bool):
        dims = range(x.ndim)
    chosen = sorted({d % x.ndim for d in (dims if isinstance(dims, Sequence) else [dims])}) if x.ndim else []
    chosen = chosen or list(range(x.ndim))
    axes = t.of(x)
    if t.operator in ("argmax", "argmin"):
        t.fix(*(axes[d] for d in chosen))
    else:
        t.mixes(x, chosen)
    for result in tensors_in(out):
        kept = [axes[d] if d not in chosen else () for d in range(x.ndim) if d not in chosen or result.ndim == x.ndim]
        t.set(result, kept)
    if t.operator in ("max", "min", "median", "nanmedian", "mode") and isinstance(out, tuple):
        t.numbers_units(out[1], [axes[d] for d in chosen])


@rule(*LOSSES)
def _loss(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Element by element, and then a sum or mean of all."""
    for one, other in zip(t.of(args[0]), t.of(args[1]), strict=True):
        t.unify(one, other)
    if out.ndim == args[0].ndim:
        t.set(out, t.of(args[0]))
    else:
        t.mixes(args[0], range(args[0].ndim))
        t.set(out, [])


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
    for result in tensors_in(out):
        t.set(result, [*axes[: channel + 1], *(opaque(t, s) for s in result.shape[channel + 1 :])])
