r"""The decay path :math:`\mu^sW \to 0`: its scales, how many are needed, and the quadrature over them.

Substituting :math:`u=\mu^s` turns Eq. 5 into an integral over :math:`u\in[0,1]`. With
:math:`h(u)=\|W\|\,\|\nabla_{uW}F\|`,

.. math::

    \sum_{s=0}^{S} \mu^s h(\mu^s) \;\approx\; M\int_0^1 h(u)\,du, \qquad
    M=\sum_{s=0}^{S}\mu^s=\frac{1-\mu^{S+1}}{1-\mu},

with equality when the gradient is constant along the path. The *geometric* rule is the paper's sum, to the
letter; the *gauss* rule evaluates the right-hand side with *k* Gauss-Legendre nodes, 10-30 times fewer passes.
Where *S* is given the walk stops short of zero, and the integral is the one that the sum is a Riemann sum of,

.. math:: \frac1{1-\mu}\int_{\mu^{S+1}}^1 h(u)\,du

The sum of gradient norms (``sg``) has no factor :math:`\mu^s`; there, gauss integrates over *s* in [0, S].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from singe_plugin.errors import ConfigError
from singe_plugin.method.criteria import Measure

__all__ = ["QUADRATURES", "DecayPath", "decay_path", "default_steps"]

QUADRATURES = ("geometric", "gauss")


def default_steps(mu: float, floor: float = 0.01) -> int:
    r"""The smallest *S* with :math:`\mu^S \le` ``floor``: how many decays bring the weights to 1 %.

    Args:
        mu: the update rate, strictly between 0 and 1.
        floor: what is left of the weights at the end of the path.

    Raises:
        ConfigError: if ``mu`` or ``floor`` is not inside ]0, 1[.

    Example:
        >>> default_steps(0.9), default_steps(0.95), default_steps(0.8)
        (44, 90, 21)
    """
    check_rate(mu)
    if not 0 < floor < 1:
        raise ConfigError(f"floor={floor!r} is not inside ]0, 1[; 0.01 leaves 1 % of the weights")
    steps = max(1, math.ceil(math.log(floor) / math.log(mu) - 1e-12))
    while mu**steps > floor:
        steps += 1
    while steps > 1 and mu ** (steps - 1) <= floor:
        steps -= 1
    return steps


def check_rate(mu: float) -> float:
    """Return ``mu`` if it is inside ]0, 1[, else raise :class:`ConfigError`."""
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 < mu < 1:
        raise ConfigError(f"mu={mu!r} is not inside ]0, 1[; the paper uses 0.9 (ImageNet) and 0.95 (CIFAR-10)")
    return float(mu)


@dataclass(frozen=True)
class DecayPath:
    """The nodes of one path.

    Attributes:
        scales: ``[K]`` float64, the factors u that the weights are multiplied with, largest first.
        weights: ``[K]`` float64, what the integrand at each node is multiplied with.
        mu: the update rate.
        steps: S of Eq. 5.
        quadrature: the rule's name.
        nodes: K.
        measure: what the rule integrates (see :class:`~singe_plugin.method.criteria.Criterion`).
        end: the u at which gauss's integral over u stops; 0 where S was not given.

    Example:
        >>> path = decay_path(mu=0.5, steps=2, quadrature="geometric")
        >>> path.scales.tolist(), path.weights.tolist()
        ([1.0, 0.5, 0.25], [1.0, 1.0, 1.0])
    """

    scales: Tensor
    weights: Tensor
    mu: float
    steps: int
    quadrature: str
    measure: Measure
    end: float = 0.0

    @property
    def is_start(self) -> bool:
        """Whether the path is its start, u = 1, alone."""
        return self.scales.tolist() == [1.0]

    @property
    def nodes(self) -> int:
        """The number of nodes, each one forward and backward pass per batch."""
        return len(self.scales)

    def refined(self) -> DecayPath:
        r"""A finer rule of the *same* integral with about twice the nodes, for an error estimate.

        The geometric sum is refined to :math:`\sqrt\mu` and weighted so that a constant gradient keeps its
        value; gauss goes from k to 2k+1 nodes. ``|Q - Q_refined|`` is the estimate.

        Example:
            >>> path = decay_path(mu=0.9, quadrature="gauss", nodes=3)
            >>> path.refined().nodes
            7
        """
        if self.quadrature == "gauss":
            return _gauss(self.mu, self.steps, 2 * self.nodes + 1, self.measure, self.end)
        fine = decay_path(math.sqrt(self.mu), 2 * self.steps + 1, "geometric", measure=self.measure)
        # what a constant gradient adds up to: compared by the weights in use, so that refining twice works too
        scale = float(self._constant() / fine._constant())
        return DecayPath(fine.scales, fine.weights * scale, fine.mu, fine.steps, "geometric", self.measure)

    def _constant(self) -> Tensor:
        return (self.weights * self.scales).sum() if self.measure == "product" else self.weights.sum()


MOST_NODES, MOST_STEPS = 1000, 100_000  # every one is a forward and backward pass for each layer and batch


def _mass(mu: float, steps: int) -> float:
    """The geometric sum, i.e. what the path adds up to when the gradient is constant."""
    return (1 - mu ** (steps + 1)) / (1 - mu)


def decay_path(
    mu: float = 0.9,
    steps: int | None = None,
    quadrature: str = "geometric",
    nodes: int = 5,
    measure: Measure = "product",
) -> DecayPath:
    """Build the path of Eq. 5 or its Gauss-Legendre equivalent.

    Args:
        mu: the update rate, inside ]0, 1[.
        steps: S, how far to walk; None means :func:`default_steps`, and for gauss all the way to zero.
        quadrature: ``"geometric"`` (S+1 nodes) or ``"gauss"`` (``nodes`` nodes).
        nodes: how many nodes gauss uses.
        measure: ``"product"`` for criteria weighted by the decayed norm, ``"gradient"`` for ``sg``.

    Raises:
        ConfigError: on an unknown rule, a ``mu`` outside ]0, 1[, or a count that is not a whole number.

    Example:
        >>> path = decay_path(mu=0.9, quadrature="gauss", nodes=3)
        >>> round(float((path.scales * path.weights).sum()), 6) == round((1 - 0.9**45) / 0.1, 6)
        True
    """
    mu = check_rate(mu)
    to_zero = steps is None
    if steps is None:
        steps = default_steps(mu)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps={steps!r} is not a number of decays; give a whole number >= 0 and at most {MOST_STEPS}, or None"
        )
    if quadrature not in QUADRATURES:
        raise ConfigError(f"unknown quadrature {quadrature!r}; choose one of {', '.join(QUADRATURES)}")
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= MOST_NODES:
        raise ConfigError(
            f"nodes={nodes!r} is not a number of quadrature nodes; give a whole number >= 1 and at most {MOST_NODES} "
            "(5 are close to the exact integral)"
        )
    if quadrature == "geometric":
        scales = torch.tensor([mu**s for s in range(steps + 1)], dtype=torch.float64)
        return DecayPath(scales, torch.ones_like(scales), mu, steps, quadrature, measure)
    return _gauss(mu, steps, nodes, measure, 0.0 if to_zero else mu ** (steps + 1))


def _gauss(mu: float, steps: int, nodes: int, measure: Measure, end: float) -> DecayPath:
    """Gauss-Legendre over u in [end, 1], or over s in [0, S]."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    unit, share = (points + 1) / 2, weights / 2
    order = np.argsort(-unit if measure == "product" else unit)
    unit, share = unit[order].copy(), share[order].copy()
    if measure == "product":
        scales = torch.from_numpy(end + (1 - end) * unit)
        node_weights = torch.from_numpy(share) * _mass(mu, steps) / scales
    else:
        scales = torch.from_numpy(mu ** (steps * unit))
        node_weights = torch.from_numpy(share) * (steps + 1)
    return DecayPath(scales, node_weights, mu, steps, "gauss", measure, end)
