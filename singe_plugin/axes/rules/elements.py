"""Operators that go element by element, and those that make constants."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from singe_plugin.nested import tensors_in

from ..algebra import Axis, fresh, split
from ..trace import Trace
from .base import RULES, opaque, rule

__all__ = ["constant", "pointwise"]


def pointwise(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Operands of one shape up to broadcasting: dimensions that meet are the same."""
    for result in tensors_in(out):
        operands = [x for x in tensors_in((args, kwargs)) if x.ndim <= result.ndim]
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
        "normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_", "complex", "polar",
        "square", "dropout", "dropout_", "where", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "hardtanh",
        "hardtanh_", "floor_divide", "pow", "_prelu_kernel", "prelu", "clamp", "clamp_", "relu6", "gelu",
    ),
    pointwise,
)  # fmt: skip


@rule("glu")
def _glu(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """The halves of a dimension go element by element: each unit is a pair, and there have to stay two halves."""
    axes = t.of(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % args[0].ndim
    halves, axes[dim] = split(axes[dim], [2, out.shape[dim]], t.why)
    t.fix(halves)
    t.set(out, axes)


@rule(
    "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "scalar_tensor", "eye",
    "rand", "randn",
)  # fmt: skip
def _uniform(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """All indices alike (as random numbers are): such a dimension takes on whatever meaning it meets."""
    why = f"it is a constant made by {t.where}" if t.operator == "eye" else None
    t.set(out, [fresh(size, why) for size in out.shape])


@rule(
    "arange", "linspace", "randint", "randperm", "new_tensor", "_local_scalar_dense",
    "empty_strided", "new_empty_strided", "meshgrid", "nonzero", "tril_indices", "triu_indices", "bincount", "nms",
)  # fmt: skip
def constant(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    for tensor in tensors_in((args, kwargs)):
        t.fix(*t.of(tensor))
    for tensor in tensors_in(out):
        t.set(tensor, [opaque(t, size) for size in tensor.shape])


@rule("normal")
def _normal(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Draw from tensors of means or deviations, or of a size."""
    given = [*args, *kwargs.values()]
    (pointwise if any(isinstance(x, Tensor) for x in given) else _uniform)(t, args, kwargs, out)


@rule(
    "equal", "is_same_size", "_assert_async", "_assert_tensor_metadata", "sym_size", "is_nonzero", "allclose",
    "_is_all_true",
)  # fmt: skip
def _question(t: Trace, args: Any, kwargs: Any, out: Any) -> None:
    return
