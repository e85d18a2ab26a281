r"""Ridge regression of layers that read more features than there are rows: in the space of the rows.

The Gram matrix of F features is F x F, that of n rows n x n, and with R = Y - X'W_0ᵀ and :math:`\lambda` as in
:mod:`singe_plugin.method.ridge`

.. math:: (X'^\top X'+\lambda I)^{-1}X'^\top R=X'^\top(X'X'^\top+\lambda I)^{-1}R

is the same solution (X' and R centred where there is a bias). So what is kept is the rows themselves, as they came.
Where some weights have to stay zero, each row of W has features of its own, and is solved in the smaller of the two
spaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from singe_plugin.ranks import Ranks

from .ridge import exact, regularised

__all__ = ["Rows"]

_BLOCK = 4096  # features that are in double precision at a time


@dataclass
class Rows:
    """Rows of inputs and targets, for the same regression as from :class:`~singe_plugin.method.ridge.Moments`.

    Attributes:
        parts: rows ``[groups, rows, F]`` of inputs and ``[groups, rows, O]`` of targets.

    Example:
        >>> from singe_plugin.method.ridge import solve
        >>> x, w = torch.randn(1, 4, 9), torch.randn(1, 2, 9)
        >>> rows = Rows.of(x, x @ w.transpose(1, 2))
        >>> solve(torch.zeros(1, 2, 9), None, rows, rows, [1e-9]).after < 1e-6
        True
    """

    parts: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Rows:
        """Of rows of inputs and targets."""
        return cls([(x.clone(), y.clone())])  # what they are views of need not stay

    def include(self, x: Tensor, y: Tensor) -> None:
        """Count more rows in."""
        self.parts.append((x.clone(), y.clone()))

    def of_all(self, ranks: Ranks, empty: bool) -> Rows:
        """The rows of all ranks; this one has none if ``empty``."""
        if ranks.world == 1:
            return self
        device = self.parts[0][0].device
        found = ranks.gather("rows", [] if empty else [(x.cpu(), y.cpu()) for x, y in self.parts])
        return Rows([(x.to(device), y.to(device)) for parts in found for x, y in parts])

    def joined(self, other: Rows) -> Rows:
        """All rows of both."""
        return Rows([*self.parts, *other.parts])

    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(bool(torch.isfinite(part).all()) for pair in self.parts for part in pair)

    def squares(self) -> Tensor:
        """The sums of squares of the targets, ``[groups, O]``."""
        return self._targets().square().sum(1)

    def error(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> float:
        """The squared error of a layer; see :meth:`singe_plugin.method.ridge.Moments.error`."""
        off = self._results(weight) - self._targets()
        off = off if bias is None else off + bias[:, None]
        return float((off if scale is None else off * scale[:, None]).square().sum())

    def solutions(
        self, weight: Tensor, bias: Tensor | None, ridges: Sequence[float], kept: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the layer for one ridge after the other; see :func:`singe_plugin.method.ridge.solve`."""
        centred, y = bias is not None, self._targets()
        right = y - self._results(weight)
        if centred:
            right = right - right.mean(1, keepdim=True)
        means: list[Tensor] = []
        gram = y.new_zeros(len(y), y.shape[1], y.shape[1])
        for block in self._blocks(centred, means):
            gram += block @ block.transpose(1, 2)
        spread = gram.diagonal(dim1=1, dim2=2).sum(1) / weight.shape[2]
        for ridge in ridges:
            added = (ridge * spread).clamp(min=1e-300)
            if kept is None:
                inner = regularised(gram, added, right)
                change = torch.cat([block.transpose(1, 2) @ inner for block in self._blocks(centred)], 1)
                solved = weight + change.transpose(1, 2)
            else:
                solved = self._masked(weight, right, added, kept, centred)
            yield solved, None if bias is None else y.mean(1) - (solved @ torch.cat(means, 1)[:, :, None])[:, :, 0]

    def _masked(self, weight: Tensor, right: Tensor, added: Tensor, kept: Tensor, centred: bool) -> Tensor:
        solved = weight.clone()
        for group, one in enumerate(kept):
            for row, mine in enumerate(one):
                x = torch.cat([exact(x[group][:, mine.to(x.device)]) for x, _ in self.parts])
                x = (x - x.mean(0) if centred else x)[None]
                turned, target = x.transpose(1, 2), right[None, group, :, row, None]
                if x.shape[1] < x.shape[2]:
                    change = turned @ regularised(x @ turned, added[group : group + 1], target)
                else:
                    change = regularised(turned @ x, added[group : group + 1], turned @ target)
                solved[group, row, mine] += change[0, :, 0]
        return solved

    def _targets(self) -> Tensor:
        return torch.cat([exact(y) for _, y in self.parts], 1)

    def _results(self, weight: Tensor) -> Tensor:
        """What weights give for the rows, ``[groups, rows, O]``."""
        found = weight.new_zeros(())
        for number, block in enumerate(self._blocks(False)):
            columns = weight[:, :, number * _BLOCK : (number + 1) * _BLOCK]
            found = found + block @ columns.transpose(1, 2)
        return found

    def _blocks(self, centred: bool, means: list[Tensor] | None = None) -> Iterator[Tensor]:
        """Yield the inputs of all rows, some features at a time; their means are noted."""
        for start in range(0, self.parts[0][0].shape[2], _BLOCK):
            block = torch.cat([exact(x[:, :, start : start + _BLOCK]) for x, _ in self.parts], 1)
            mean = block.mean(1)
            if means is not None:
                means.append(mean)
            yield block - mean[:, None] if centred else block
