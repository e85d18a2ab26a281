"""Operators that contract a parameter with an activation, and which parameter that is.

Operators are counted, not layers: a raw parameter that is multiplied, a layer that pads by itself, one that is called
twice are all met here, and the same number means the same operator in a model, in its trace and in its pruned copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["CONTRACTING", "Contraction", "Names"]

CONTRACTING = {"convolution": 0, "addmm": 1, "mm": 0}
"""Operators, and which of their arguments is the activation."""
_TURNS = frozenset({"t", "transpose", "numpy_T", "mT"})
_SAME = frozenset({"alias"})


@dataclass(frozen=True)
class Contraction:
    """An operator that contracts an activation, and has just run.

    Attributes:
        number: how many of :data:`CONTRACTING` ran before.
        weight: the name of the parameter that it contracts with, or None if that is none, or computed from one.
        bias: the name of the parameter that it adds, or None.
        x: the activation: of a convolution ``[N, C, ...]``, else ``[rows, F]``.
        out: the result.
        columns: of products: whether the parameter is ``[F, O]`` instead of ``[O, F]``.
        convolution: ``(stride, padding, dilation, transposed, output padding, groups)``; None for a product.
    """

    number: int
    weight: str | None
    bias: str | None
    x: Tensor
    out: Tensor
    columns: bool = False
    convolution: tuple[Any, ...] | None = None


class Names:
    """Which parameter a tensor is, or is a turned view of."""

    def __init__(self, model: nn.Module) -> None:
        self.made: Any = WeakIdKeyDictionary()
        for name, parameter in model.named_parameters():
            self.made[parameter] = name, False

    def follows(self, name: str, tensor: Tensor, args: Any) -> bool:
        """Whether an operator contracts what is made of a parameter, or turns it."""
        if name in CONTRACTING:
            return args[CONTRACTING[name] + 1] is tensor
        return (name in _TURNS or name in _SAME) and tensor.ndim == 2

    def follow(self, name: str, args: Any, out: Any) -> None:
        """Note what an operator makes of a parameter."""
        if (name in _TURNS or name in _SAME) and args[0] in self.made and args[0].ndim == 2:
            origin, turned = self.made[args[0]]
            self.made[out] = origin, turned != (name in _TURNS)

    def contraction(self, number: int, name: str, args: Any, out: Tensor) -> Contraction:
        """Describe an operator that contracts."""
        position = CONTRACTING[name]
        x, weight = args[position], args[position + 1]
        added = args[2] if name == "convolution" else args[0] if name == "addmm" else None
        origin, turned = self.made.get(weight, (None, False))
        bias, _ = (None, False) if added is None else self.made.get(added, (None, False))
        if added is not None and bias is None:
            origin = None  # what it adds was computed: it is no layer of its own
        if name == "convolution":
            return Contraction(number, origin, bias, x, out, False, tuple(args[3:9]))
        return Contraction(number, origin, bias, x, out, not turned)
