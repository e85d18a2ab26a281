r"""The optimal brain surgeon for units: what a removal costs when the others take over.

A layer reads X through :math:`Y=XW^\top`. Without the features :math:`S_n` of unit n, and with its weights solved again
for what is left, its squared error per row grows in output o by

.. math:: e_{no}=W_{on}\bigl([G^{-1}]_{nn}\bigr)^{-1}W_{on}^\top,\qquad G=\tfrac1R X^\top X

(Hassibi and Stork 1993, for the features of a unit at once), where :math:`[\cdot]_{nn}` are the rows and columns of
:math:`S_n`. It is nothing where a unit can be said by the others: with one feature it is
:math:`w^2 G_{nn}(1-R_n^2)`. The loss grows by about :math:`\tfrac12\sum_o h_o e_{no}`, which makes layers comparable; a
unit costs the sum over all that read it. The h are squared gradients (the empirical Fisher information) of the outputs,
as the gradient for their weights has them: :math:`h_o=\lVert\partial F/\partial W_o\rVert^2/\operatorname{tr}G`. So
errors that all positions of an image share count together, as they do behind a mean over positions.

Units go one after the other, the cheapest first: what the last one leaves is what the next one's cost is counted from
(the inverse and the weights follow by the Sherman-Morrison-Woodbury formula). So two units that say the same cost
nothing and something, where each alone would cost nothing.

G is known from few images, and a unit that the others can say on these may be needed on the next. So G is shrunk
towards :math:`\mu I`, :math:`\mu=\operatorname{tr}(G)/F`, as far as it varies between images (Ledoit and Wolf 2004,
with the :math:`G_i` of N images for their outer products):

.. math:: \rho=\min\Bigl(1,\ \frac{\tfrac1{N^2}\sum_i\lVert G_i-G\rVert_F^2}{\lVert G-\mu I\rVert_F^2}\Bigr),\qquad
          G\leftarrow G+\frac{\rho}{1-\rho}\,\mu I
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEAST", "Reading", "removal_costs", "shrinkage"]

LEAST = 1e-3  # of what is added to a diagonal, relative to its mean
_MOST = 0.999  # rho: beyond, nothing would be left of G
_STEPS = 128  # removals of a group; of larger ones, several units go at once
_LEAST_SHARE, _LEAST_VALUE = 1e-12, 1e-30  # of the eigenvalues of a matrix that is not positive definite
_GONE = 0.25  # of the features: then they are left out of the matrices
_APART = 1e-6  # by how much a unit costs more than the one before, at least


@dataclass
class Reading:
    """How one matrix reads units.

    Attributes:
        gram: G, ``[F, F]``, of the inputs about their mean if that can be made up for.
        weight: W, ``[O, F]``.
        curvature: h, ``[O]``.
        units: ``[F]``, which unit a feature belongs to; -1 for none.
        given: ``[O]``, which unit an output belongs to: it goes together with it, and costs nothing then. -1 for none.
        ridge: what is added to the diagonal of G, relative to its mean; see :func:`shrinkage`.
    """

    gram: Tensor
    weight: Tensor
    curvature: Tensor
    units: Tensor
    given: Tensor
    ridge: float = LEAST


def shrinkage(gram: Tensor, squares: Tensor, examples: int) -> Tensor:
    r"""How much is to be added to the diagonal of Gram matrices, relative to its mean: :math:`\rho/(1-\rho)`.

    Args:
        gram: G, the means over examples, ``[groups, F, F]``.
        squares: :math:`\sum_i\lVert G_i\rVert_F^2`, ``[groups]``.
        examples: N.

    Example:
        >>> shrinkage(torch.diag(torch.tensor([3.0, 1.0]))[None], torch.tensor([24.0]), 2)  # 10, 14 and 10 between
        tensor([1.])
    """
    whole, mean = gram.square().sum((1, 2)), gram.diagonal(dim1=1, dim2=2).mean(1)
    within = (squares / examples - whole).clamp(min=0) / examples
    across = (whole - gram.shape[1] * mean.square()).clamp(min=0)
    share = torch.where(across > 0, within / across.clamp(min=1e-300), torch.ones_like(whole)).clamp(max=_MOST)
    return share / (1 - share)


class _State:
    """A reading while units go."""

    def __init__(self, reading: Reading, size: int) -> None:
        count, outputs = len(reading.units), len(reading.weight)
        where = [(reading.units == unit).nonzero().flatten() for unit in range(size)]
        self.width = max(len(mine) for mine in where)
        gram = reading.gram + reading.ridge * reading.gram.diagonal().mean().clamp(min=1e-300) * torch.eye(
            count, dtype=reading.gram.dtype, device=reading.gram.device
        )
        # units with fewer features than others get some that nobody reads
        self.inverse = torch.eye(count + self.width, dtype=gram.dtype, device=gram.device)
        self.inverse[:count, :count] = _inverse(gram)
        self.weight = torch.cat([reading.weight.t(), reading.weight.new_zeros(self.width, outputs)]).to(gram)
        self.curvature, self.given = reading.curvature.to(gram), reading.given
        added = torch.arange(count, count + self.width, device=gram.device)
        self.where = torch.stack([torch.cat([mine, added[len(mine) :]]) for mine in where])
        self.gone = torch.zeros(count + self.width, dtype=torch.bool, device=gram.device)

    def costs(self, left: Tensor) -> Tensor:
        """What each unit that is left costs now."""
        index = self.where[left]
        weight = self.weight[index]  # [units, features, O]
        curvature = torch.where(self.given == left[:, None], 0.0, self.curvature)
        weighed = (weight * curvature[:, None]) @ weight.transpose(1, 2)
        blocks = self.inverse[index[:, :, None], index[:, None, :]]
        total: Tensor = torch.linalg.solve(blocks, weighed).diagonal(dim1=1, dim2=2).sum(1)
        return 0.5 * total

    def remove(self, units: Tensor) -> None:
        """Let the others take over from some units."""
        self.curvature = torch.where(torch.isin(self.given, units), 0.0, self.curvature)
        index = torch.unique(self.where[units])
        rows = self.inverse[index]
        share = torch.linalg.solve(rows[:, index], rows)
        self.weight.addmm_(share.t(), self.weight[index], alpha=-1)
        self.inverse.addmm_(rows.t(), share, alpha=-1)
        self.inverse[index, index] = 1.0  # they are out: nothing is divided by zero
        self.gone[index] = True
        if int(self.gone.sum()) > _GONE * len(self.gone):
            self._compact()

    def _compact(self) -> None:
        """Leave out the features of the units that are gone."""
        self.gone[-self.width :] = False  # what nobody reads, others may still have
        stays = (~self.gone).nonzero().flatten()
        place = torch.zeros(len(self.gone), dtype=torch.int64, device=stays.device)
        place[stays] = torch.arange(len(stays), device=stays.device)
        self.where = place[self.where]
        self.inverse, self.weight = self.inverse[stays][:, stays], self.weight[stays]
        self.gone = self.gone[stays]


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of a positive definite matrix, at half the cost of any matrix's.

    Features that never change (nothing gets through the layer in front) have a matrix of rounding errors, which may be
    anything: what is not positive of it counts as next to nothing.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed):
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh(gram)
    least = max(float(values[-1]) * _LEAST_SHARE, _LEAST_VALUE)
    inverse: Tensor = (vectors / values.clamp(min=least)) @ vectors.t()
    return inverse


def removal_costs(readings: Sequence[Reading], size: int) -> Tensor:
    r"""What each unit of a group costs when it goes in its turn.

    .. math:: C(n)=\sum_\text{readers}\tfrac12\sum_o h_o\,W_{on}\bigl([G^{-1}]_{nn}\bigr)^{-1}W_{on}^\top

    Args:
        readings: by everything that reads the group.
        size: how many units it has.

    Returns:
        ``[size]`` float64, in the order in which they go; the last unit costs more than any other.

    Example:
        >>> same = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
        >>> weight, h = torch.ones(1, 3).double(), torch.ones(1).double()
        >>> reading = Reading(same, weight, h, units=torch.arange(3), given=torch.tensor([-1]))
        >>> removal_costs([reading], 3).sort().values.round(decimals=2).tolist()  # one of two that are the same
        [0.0, 0.5, 2.0]
    """
    states = [_State(reading, size) for reading in readings]
    device = readings[0].gram.device
    left, found = torch.arange(size, device=device), torch.zeros(size, dtype=torch.float64, device=device)
    chunk, last = -(-size // _STEPS), 0.0
    while len(left):
        costs = torch.stack([state.costs(left).clamp(min=0.0) for state in states]).sum(0)
        order = costs.argsort(stable=True)[:chunk]
        for place in order.tolist():
            last = max(float(costs[place]), last * (1 + _APART))
            found[left[place]] = last
        going = left[order]
        for state in states:
            state.remove(going)
        stays = torch.ones(len(left), dtype=torch.bool, device=device)
        stays[order] = False
        left = left[stays]
    return found
