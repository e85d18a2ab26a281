r"""Ridge regression towards present weights, from moments that are summed over batches.

A layer that reads X' where it read X is solved again so that it gives the Y it gave, at most as far from its present
weights as pays:

.. math:: \min_{W,b}\ \lVert X'W^\top+b-Y\rVert_F^2+\lambda\,\lVert W-W_0\rVert_F^2,\qquad
          \lambda=r\cdot\tfrac1F\operatorname{tr}(X'^\top X')

(X' centred where there is a bias). With R = Y - X'W_0ᵀ this is :math:`(X'^\top X'+\lambda I)(W-W_0)^\top=X'^\top R`:
the rows of W share one matrix. Where some weights have to stay zero (masks), each row has its own part of it: that is
factorised if it is small, and the other rows are solved together by conjugate gradients; so is a matrix that is too
large to be factorised. Layers that read
more features than :data:`LARGEST` are solved from their rows (:mod:`singe_plugin.method.dual`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from singe_plugin.ranks import Ranks

__all__ = ["LARGEST", "Moments", "Solution", "exact", "regularised", "solve"]

LARGEST = 8192  # features, or rows; a larger matrix is neither kept nor factorised
_ITERATIONS, _ENOUGH = 200, 1e-7  # of conjugate gradients, and the residual, relative to the right side
_SMALL = 300  # k^3 / F^2 of a row that keeps k of F weights: below, factorising takes less than some 50 iterations


def exact(tensor: Tensor) -> Tensor:
    """A tensor in double precision, on the CPU if its device has none.

    Example:
        >>> exact(torch.ones(1)).dtype
        torch.float64
    """
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


class Known(Protocol):
    """What is known of rows of inputs and targets."""

    def joined(self: K, other: K) -> K:
        """What is known of the rows of both; it may take the place of this one."""

    def squares(self) -> Tensor:
        """The sums of squares of the targets, ``[groups, O]``."""

    def error(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> float:
        """The squared error of a layer."""

    def solutions(
        self, weight: Tensor, bias: Tensor | None, ridges: Sequence[float], kept: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the layer for one ridge after the other."""


K = TypeVar("K", bound=Known)


@dataclass
class Moments:
    r"""Sums over rows of inputs and targets, in double precision: what a regression needs to know of them.

    Attributes:
        count: the number of rows.
        x: the sum of the inputs, ``[groups, F]``.
        y: the sum of the targets, ``[groups, O]``.
        xx: the Gram matrices :math:`X^\top X`, ``[groups, F, F]``.
        xy: :math:`X^\top Y`, ``[groups, F, O]``.
        yy: the sums of squares of the targets, ``[groups, O]``.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Of rows ``[groups, rows, F]`` of inputs and ``[groups, rows, O]`` of targets.

        Example:
            >>> Moments.of(torch.ones(1, 3, 2), torch.ones(1, 3, 1)).xx.tolist()
            [[[3.0, 3.0], [3.0, 3.0]]]
        """
        x, y = exact(x), exact(y)
        turned = x.transpose(1, 2)
        return cls(x.shape[1], x.sum(1), y.sum(1), turned @ x, turned @ y, y.square().sum(1))

    def include(self, x: Tensor, y: Tensor) -> None:
        """Count more rows in."""
        x, y = exact(x), exact(y)
        turned = x.transpose(1, 2)
        self.count += x.shape[1]
        for total, more in ((self.x, x.sum(1)), (self.y, y.sum(1)), (self.yy, y.square().sum(1))):
            total.add_(more)
        self.xx.baddbmm_(turned, x)  # the largest there are: no second one beside them
        self.xy.baddbmm_(turned, y)

    def joined(self, other: Moments) -> Moments:
        """Of the rows of both; in the place of this one, as it is large."""
        self.count += other.count
        for name in ("x", "y", "xx", "xy", "yy"):
            getattr(self, name).add_(getattr(other, name))
        return self

    def of_all(self, ranks: Ranks, empty: bool) -> Moments:
        """Of the rows of all ranks; this one's do not count if ``empty``."""
        count = torch.tensor(float(self.count), dtype=torch.float64, device=self.x.device)
        mine = [count, self.x, self.y, self.xx, self.xy, self.yy]
        summed = ranks.add_up("moments", [torch.zeros_like(t) for t in mine] if empty else mine)
        return Moments(round(float(summed[0])), *summed[1:])

    def finite(self) -> bool:
        """Whether all numbers are."""
        return bool(torch.isfinite(self.xx).all() & torch.isfinite(self.xy).all())

    def squares(self) -> Tensor:
        """The sums of squares of the targets, ``[groups, O]``."""
        return self.yy

    def centred(self) -> Moments:
        """The moments about the means; the sums stay."""
        n = max(self.count, 1)
        return Moments(
            self.count, self.x, self.y,
            torch.baddbmm(self.xx, self.x[:, :, None], self.x[:, None, :], alpha=-1 / n),
            torch.baddbmm(self.xy, self.x[:, :, None], self.y[:, None, :], alpha=-1 / n),
            self.yy - self.y.square() / n,
        )  # fmt: skip

    def error(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> float:
        r"""The squared error of a layer, :math:`\lVert (XW^\top+b-Y)\,\mathrm{diag}(s)\rVert_F^2`.

        Args:
            weight: ``[groups, O, F]``.
            bias: ``[groups, O]``, or None.
            scale: s, ``[groups, O]``: what comes of each output; None is one.
        """
        w = weight.transpose(1, 2)
        squared = (w * (self.xx @ w)).sum(1) - 2 * (w * self.xy).sum(1) + self.yy
        if bias is not None:
            mean = (weight @ self.x[:, :, None])[:, :, 0] - self.y
            squared = squared + 2 * bias * mean + self.count * bias.square()
        return max(float((squared if scale is None else squared * scale.square()).sum()), 0.0)

    def solutions(
        self, weight: Tensor, bias: Tensor | None, ridges: Sequence[float], kept: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the layer for one ridge after the other; see :func:`solve`."""
        n, mean = max(self.count, 1), None if bias is None else self.x / max(self.count, 1) ** 0.5
        w = weight.transpose(1, 2)
        right, squares = self.xy - self.xx @ w, self.xx.diagonal(dim1=1, dim2=2)
        if mean is not None:  # about the means: less their outer product
            right = right - mean[:, :, None] * (self.y / n**0.5 - (weight @ mean[:, :, None])[:, :, 0])[:, None, :]
            squares = squares - mean.square()
        spread, turned = squares.mean(1), None if kept is None else kept.transpose(1, 2)
        for ridge in ridges:
            change = regularised(self.xx, (ridge * spread).clamp(min=1e-300), right, turned, mean)
            solved = weight + change.transpose(1, 2)
            yield solved, None if bias is None else self.y / n - (solved @ (self.x / n)[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Solution:
    """A layer that was solved again.

    Attributes:
        weight: ``[groups, O, F]``; the one that was given, if none is better.
        bias: ``[groups, O]``, or None if it has none.
        ridge: r, of those that were tried; None if the given weight stays.
        before, after: the root of the squared error on the rows that are held out, relative to the targets'.
    """

    weight: Tensor
    bias: Tensor | None
    ridge: float | None
    before: float
    after: float


def solve(
    weight: Tensor,
    bias: Tensor | None,
    fitted: K,
    held: K,
    ridges: Sequence[float],
    kept: Tensor | None = None,
    scale: Tensor | None = None,
) -> Solution:
    """Solve a layer again; the ridge is chosen on held-out rows, and the layer stays as it is if none helps there.

    Args:
        weight: the present weights W_0, ``[groups, O, F]``.
        bias: the present bias, ``[groups, O]``; None if there is none and none can be made.
        fitted: of the rows to solve on; with the chosen ridge all rows are solved on, and this is used up.
        held: of the rows that are held out.
        ridges: the r to choose from, relative to the mean of the Gram matrix's diagonal.
        kept: which weights may be other than zero, ``[groups, O, F]``; None is all of them.
        scale: what comes of each output, ``[groups, O]``: errors are compared behind it; None is one.

    Example:
        >>> x, w = torch.randn(1, 64, 3), torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> rows = Moments.of(x, x @ w.transpose(1, 2))
        >>> found = solve(torch.zeros(1, 1, 3), None, rows, rows, [1e-9])
        >>> bool(torch.allclose(found.weight.float(), w, atol=1e-4)), round(found.before, 3)
        (True, 1.0)
    """
    weight, bias = exact(weight), None if bias is None else exact(bias)
    squares = held.squares()
    size = max(float((squares if scale is None else squares * scale.square()).sum()), 1e-300)
    start = held.error(weight, bias, scale)
    best, chosen, least = (weight, bias), None, start
    for ridge, found in zip(ridges, fitted.solutions(weight, bias, ridges, kept), strict=True):
        error = held.error(*found, scale)
        if error < least:
            best, chosen, least = found, ridge, error
    if chosen is not None:
        (best,) = fitted.joined(held).solutions(weight, bias, [chosen], kept)
    return Solution(*best, chosen, (start / size) ** 0.5, (least / size) ** 0.5)


def regularised(
    matrix: Tensor, added: Tensor, right: Tensor, kept: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """Solve ``(matrix - mean meanᵀ + added I) d = right``, factorised where that is possible.

    Args:
        matrix: ``[groups, F, F]``, symmetric; what is solved with is not negative.
        added: ``[groups]``.
        right: ``[groups, F, O]``.
        kept: which of ``d`` may be other than zero, ``[groups, F, O]``; None is all.
        mean: ``[groups, F]``; None is zero.

    Example:
        >>> regularised(torch.eye(2)[None], torch.ones(1), torch.tensor([[[4.0], [6.0]]])).flatten().round(decimals=4)
        tensor([2., 3.])
    """
    if kept is None and matrix.shape[-1] <= LARGEST:
        whole = matrix.clone().mT  # as LAPACK has it, so that it is factorised in place: no second one is made
        if mean is not None:
            whole.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-1)
        whole.diagonal(dim1=1, dim2=2).add_(added[:, None])
        info = torch.empty(len(whole), dtype=torch.int32, device=whole.device)
        factor, failed = torch.linalg.cholesky_ex(whole, out=(whole, info))
        if not bool(failed.any()):
            half = torch.linalg.solve_triangular(factor, right, upper=False)
            solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
            return solved
        del whole, factor
    if kept is None:
        return _conjugate_gradients(matrix, added, right, None, mean)
    found, small = torch.zeros_like(right), kept.sum(1).double() ** 3 < _SMALL * matrix.shape[-1] ** 2
    for group, column in small.nonzero().tolist():
        mine = kept[group, :, column].nonzero().flatten()
        part = matrix[group][mine][:, mine]
        if mean is not None:
            part.addr_(mean[group, mine], mean[group, mine], alpha=-1)
        part.diagonal().add_(added[group])
        factor, failed = torch.linalg.cholesky_ex(part)
        if bool(failed):
            small[group, column] = False
        else:
            found[group, mine, column] = torch.cholesky_solve(right[group, mine, column, None], factor)[:, 0]
    if not bool(small.all()):
        found += _conjugate_gradients(matrix, added, right, kept & ~small[:, None], mean)
    return found


def _conjugate_gradients(
    matrix: Tensor, added: Tensor, right: Tensor, kept: Tensor | None, mean: Tensor | None
) -> Tensor:
    """Solve ``(matrix - mean meanᵀ + added I) d = right`` for all columns, each on the features it keeps."""
    keep = 1.0 if kept is None else kept.to(right.dtype)
    scaling = matrix.diagonal(dim1=1, dim2=2)[:, :, None] + added[:, None, None]
    column = None if mean is None else mean[:, :, None]
    if column is not None:
        scaling = scaling - column.square()
    found, residual = torch.zeros_like(right), right * keep
    direction = residual / scaling
    product = (residual * direction).sum(1, keepdim=True)
    enough = _ENOUGH * float(residual.norm())
    for _ in range(_ITERATIONS):
        if float(residual.norm()) <= enough:
            break
        moved = matrix @ direction + added[:, None, None] * direction
        if column is not None:
            moved -= column @ (column.transpose(1, 2) @ direction)
        moved = moved * keep
        step = product / (direction * moved).sum(1, keepdim=True).clamp(min=1e-300)
        found, residual = found + step * direction, residual - step * moved
        scaled = residual / scaling
        last, product = product, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + product / last.clamp(min=1e-300) * direction
    return found
