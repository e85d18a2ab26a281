"""Products of rows in groups, each group with a matrix of its own: the experts of a mixture, in one operator.

PyTorch's ``_grouped_mm`` takes matrices whose rows begin at multiples of 16 bytes, in single precision or less. What a
mixture computes is tried out in double precision and with any number of units: here it is computed plainly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BYTES", "PlainGroups", "grouped_product"]

BYTES = 16
"""At multiples of so many bytes the rows of an operand of ``_grouped_mm`` begin."""


def grouped_product(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """What ``torch._grouped_mm`` computes, for any widths and any type.

    Args:
        a: ``[S, K]`` with the rows of one group behind those of the other, ``[G, M, K]``, or ``[M, S]``.
        b: ``[G, K, N]``, ``[K, S]`` with the columns in groups, or ``[S, N]``.
        ends: ``[G]``, the first position along S that is behind each group; None where both are ``[G, ...]``.

    Returns:
        ``[S, N]``, ``[M, S]``, or ``[G, M, N]``.

    Example:
        >>> rows, experts = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> grouped_product(rows, experts, torch.tensor([1, 3])).tolist()
        [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    """
    if ends is None:
        return a @ b
    last = ends.tolist()
    groups = [(number, slice(begin, end)) for number, (begin, end) in enumerate(zip([0, *last], last, strict=False))]
    if a.ndim == 2 and b.ndim == 3:
        made = a.new_zeros(a.shape[0], b.shape[2])
        for number, own in groups:
            made[own] = a[own] @ b[number]
    elif a.ndim == 3:
        made = a.new_zeros(a.shape[1], b.shape[1])
        for number, own in groups:
            made[:, own] = a[number] @ b[:, own]
    else:
        made = torch.stack([a[:, own] @ b[own] for _, own in groups])
    return made


class PlainGroups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, ``_grouped_mm`` is computed plainly."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name != "aten::_grouped_mm":
            return func(*args, **kwargs)
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        made = grouped_product(args[0], args[1], ends)
        bias = kwargs.get("bias", args[3] if len(args) > 3 else None)
        made = made if bias is None else made + bias
        dtype = kwargs.get("out_dtype", args[4] if len(args) > 4 else None)
        return made if dtype is None else made.to(dtype)
