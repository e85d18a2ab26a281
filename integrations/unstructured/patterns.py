"""N:M patterns: at most N weights of every M consecutive ones are not zero.

Consecutive means along the *inputs* of a layer: along dimension 1 of a linear weight ``[out, in]``, as
``torch.sparse.to_sparse_semi_structured`` wants it, and along the input channels of a convolution's
``[out, in, kh, kw]``, for every output channel and kernel position by itself, as sparse tensor cores read it (apex's
ASP and TensorRT). A transposed convolution has its inputs in dimension 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from singe_plugin.errors import ConfigError

from .layers import WeightGroup

__all__ = ["Pattern"]


@dataclass(frozen=True)
class Pattern:
    """At most ``keep`` of every ``block`` consecutive weights stay.

    Example:
        >>> Pattern.parse("2:4").sparsity, Pattern.parse((1, 4)).sparsity
        (0.5, 0.75)
    """

    keep: int
    block: int

    @classmethod
    def parse(cls, value: object) -> Pattern:
        """Read ``"2:4"`` or ``(2, 4)``.

        Raises:
            ConfigError: for another form, or numbers that make no pattern.
        """
        if isinstance(value, Pattern):
            return value
        text = ":".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        try:
            keep, block = map(int, text.split(":") if isinstance(text, str) else ())
        except ValueError:
            keep = block = 0
        if not 0 < keep < block:
            raise ConfigError(
                f"sparsity={value!r} is neither a fraction of weights nor a pattern; give a number inside [0, 1[, or "
                "how many of how many consecutive weights stay, e.g. '2:4' or (2, 4)"
            )
        return cls(keep, block)

    @property
    def sparsity(self) -> float:
        """The fraction that goes."""
        return 1 - self.keep / self.block

    def __str__(self) -> str:
        return f"{self.keep}:{self.block}"

    def misfit(self, layer: WeightGroup) -> str | None:
        """Why a layer cannot have the pattern, or None."""
        _, inputs = layer.inputs
        if inputs % self.block == 0:
            return None
        what = "inputs" if layer.weight.ndim == 2 else "input channels per group"
        return f"its {inputs} {what} are no multiple of {self.block}, so it cannot have the pattern {self}"

    def blocks(self, tensor: Tensor, layer: WeightGroup) -> Tensor:
        """A tensor of a weight's shape as ``[blocks, M]``."""
        dim, _ = layer.inputs
        return tensor.movedim(dim, -1).reshape(-1, self.block)

    def counts(self, mask: Tensor, layer: WeightGroup) -> Tensor:
        """How many weights every block has, ``[blocks]``."""
        return self.blocks(mask, layer).sum(1)

    def protected(self, scores: Tensor, layer: WeightGroup) -> Tensor:
        """Of every block, the ``keep`` weights with the highest scores; of equal ones, the first.

        Args:
            scores: of the weight's shape; ``-inf`` for weights that are gone.

        Returns:
            ``bool``, of the weight's shape.
        """
        dim, _ = layer.inputs
        blocks = self.blocks(scores, layer)
        best = blocks.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, best, True)
        return chosen.view(scores.movedim(dim, -1).shape).movedim(-1, dim)
