"""Choices that a forward pass makes by comparing numbers, made again in the same way where rounding alone would decide.

A detector sorts thousands of scores, and some of them differ by less than double precision tells: two computations of
the same function then choose other boxes, and everything behind is another output. So what was chosen in one run is
chosen again in the other *if the numbers to choose by agree* as closely as outputs have to. Numbers that agree less are
compared anew, and the outputs show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.nested import copied, tensors_in

__all__ = ["Choices", "Repeated"]

_SORTING = frozenset({"topk", "sort", "max", "min", "kthvalue", "median", "mode", "cummax", "cummin"})
_DECIDING = frozenset(
    {"argmax", "argmin", "nms", "gt", "ge", "lt", "le", "eq", "ne", "floor", "ceil", "round", "trunc"}
)


class Choices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, the results of operators that choose are noted, in order, with the numbers that they chose by."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[str, list[Tensor], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _chooses(func, args, out):
            self.made.append((_name(func), copied(list(tensors_in((args, kwargs)))), copied(out)))
        return out


class Repeated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, operators choose as they did before, if the numbers are the same up to rounding.

    Args:
        choices: what was chosen before.
        tolerance: how far the numbers may differ, relative to the largest.

    Example:
        >>> scores = torch.tensor([1.0, 3.0, 2.99])
        >>> with Choices() as choices:
        ...     best = scores.topk(2)
        >>> with Repeated(choices, 0.1):
        ...     again = torch.tensor([1.0, 3.0, 3.01]).topk(2)
        >>> with Repeated(choices, 0.1):
        ...     other = torch.tensor([1.0, 3.0, 4.0]).topk(2)
        >>> best.indices.tolist(), again.indices.tolist(), other.indices.tolist()
        ([1, 2], [1, 2], [2, 1])
    """

    def __init__(self, choices: Choices, tolerance: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.tolerance = choices.made[::-1], tolerance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.left or not _chooses(func, args, out):
            return out
        name, operands, before = self.left.pop()
        now = list(tensors_in((args, kwargs)))
        if name != _name(func):
            self.left.clear()  # the runs part here
            return out
        if len(now) != len(operands) or not all(map(self._agree, now, operands)):
            return out
        if name not in _SORTING:
            return copied(before)
        indices = before[1].clone()  # the values are those of now
        dim = _dim(name, args, kwargs or {})
        kept = indices.unsqueeze(dim) if indices.ndim < now[0].ndim else indices
        values = now[0].gather(dim, kept)
        return type(out)((values.view(indices.shape), indices)) if isinstance(out, tuple) else out

    def _agree(self, now: Tensor, before: Tensor) -> bool:
        if now.shape != before.shape or now.dtype != before.dtype:
            return False
        if not now.is_floating_point():
            return torch.equal(now, before)
        finite = torch.isfinite(before)
        if not torch.equal(now[~finite].nan_to_num(), before[~finite].nan_to_num()):
            return False
        a, b = now[finite], before[finite]
        return not len(a) or float((a - b).abs().max()) <= self.tolerance * float(b.abs().max())


def _name(func: Any) -> str:
    return str(func._schema.name.split("::")[1])


def _chooses(func: Any, args: Any, out: Any) -> bool:
    """Whether an operator makes positions, truths or whole numbers of floating numbers."""
    name = _name(func)
    first = next(tensors_in(args), None)
    if first is None or not first.is_floating_point() or not first.ndim:
        return False
    if name in _SORTING:
        return isinstance(out, (tuple, list)) and len(out) == 2
    if name == "_to_copy":
        return isinstance(out, Tensor) and not out.is_floating_point() and not out.is_complex()
    return name in _DECIDING


def _dim(name: str, args: Any, kwargs: Any) -> int:
    """The dimension along which an operator sorts."""
    numbers = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    position = 1 if name in ("topk", "kthvalue") else 0
    return int(kwargs.get("dim", numbers[position] if len(numbers) > position else -1))
