r"""The importance criteria of SInGE as pure tensor functions: norms in, scores out.

Notation (paper, §3): :math:`W_l^n` is the weight vector of unit *n* of layer *l*,
:math:`\nabla_{\mu^s W_l^n}F` the gradient of the objective at step *s* of the path
:math:`\mu^s W_l^n \to 0`. All functions take tensors whose last dimension runs over the units; functions
of a path take a leading dimension over its *K* nodes.

==============  =====================================================================  ==========
name            formula                                                                source
==============  =====================================================================  ==========
``l1``, ``l2``  :math:`\|W^n\|_1`, :math:`\|W^n\|_2`                                   Eq. 1
``lp``          :math:`\|W^n\|_p`                                                      Eq. 1
``grad``        :math:`\|\nabla_{W^n}F\|_p`                                            Eq. 2
``norm_grad``   :math:`\|W^n\|_p\,\|\nabla_{W^n}F\|_p`                                 Eq. 3
``sg``          :math:`\sum_s\|\nabla_{\mu^sW^n}F\|_p`                                 §3.2
``ig``          :math:`\sum_s\|\mu^sW^n\|_p\,\|\nabla_{\mu^sW^n}F\|_p`                 Eq. 5
``ig_abs``      :math:`\sum_s|\langle\mu^sW^n,\nabla_{\mu^sW^n}F\rangle|`              beyond
``obs``         what is left to pay when all that read the unit are solved again:      beyond
                :mod:`singe_plugin.method.surgeon`
==============  =====================================================================  ==========
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from singe_plugin.errors import ConfigError

__all__ = [
    "CRITERIA",
    "Criterion",
    "check_degree",
    "get_criterion",
    "gradient_norm",
    "integrated_inner_product",
    "integrated_norm_gradient",
    "magnitude",
    "norm_times_gradient",
    "p_norm",
    "summed_gradient_norms",
]

Measure = Literal["product", "gradient"]


def p_norm(values: Tensor, p: float = 2, dim: int = -1) -> Tensor:
    r"""The norm :math:`\|x\|_p = (\sum_i |x_i|^p)^{1/p}` along ``dim``, for any :math:`p \ge 1` or infinity.

    Args:
        values: any floating tensor.
        p: the degree, at least 1 (``math.inf`` is the largest absolute value).
        dim: the dimension that is summed.

    Raises:
        ConfigError: if ``p`` is below 1.

    Example:
        >>> import torch
        >>> p_norm(torch.tensor([[3.0, 4.0]]), p=2)
        tensor([5.])
    """
    check_degree(p)
    norm: Tensor = torch.linalg.vector_norm(values, ord=p, dim=dim)
    return norm


def check_degree(p: float) -> float:
    """Return ``p`` if it is a norm's degree (a number of at least 1), else raise :class:`ConfigError`."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or math.isnan(p) or p < 1:
        raise ConfigError(f"p={p!r} is not the degree of a norm; give a number of at least 1, e.g. p=2")
    return float(p)


def magnitude(weight_norms: Tensor) -> Tensor:
    r"""Eq. 1: :math:`C_{L^p} = \|W^n\|_p`.

    Args:
        weight_norms: ``[N]``, the norms at the start of the path.

    Example:
        >>> import torch
        >>> magnitude(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    return weight_norms.clone()


def gradient_norm(gradient_norms: Tensor) -> Tensor:
    r"""Eq. 2: :math:`C_{\nabla^p} = \|\nabla_{W^n}F\|_p`.

    Args:
        gradient_norms: ``[N]``, taken at the start of the path.

    Example:
        >>> import torch
        >>> gradient_norm(torch.tensor([0.5, 0.25]))
        tensor([0.5000, 0.2500])
    """
    return gradient_norms.clone()


def norm_times_gradient(weight_norms: Tensor, gradient_norms: Tensor) -> Tensor:
    r"""Eq. 3: :math:`C_{L^p\times\nabla^p} = \|W^n\|_p\,\|\nabla_{W^n}F\|_p`.

    Args:
        weight_norms: ``[N]``.
        gradient_norms: ``[N]``.

    Example:
        >>> import torch
        >>> norm_times_gradient(torch.tensor([2.0]), torch.tensor([3.0]))
        tensor([6.])
    """
    return weight_norms * gradient_norms


def summed_gradient_norms(gradient_norms: Tensor, node_weights: Tensor) -> Tensor:
    r"""§3.2: :math:`C_{SG^p} = \sum_s \omega_s\|\nabla_{\mu^sW^n}F\|_p` (the paper's sum has :math:`\omega_s=1`).

    Args:
        gradient_norms: ``[K, N]``, one row per node of the path.
        node_weights: ``[K]``, the weights :math:`\omega` of the quadrature.

    Example:
        >>> import torch
        >>> summed_gradient_norms(torch.tensor([[1.0], [2.0]]), torch.ones(2))
        tensor([3.])
    """
    return _weighted_sum(gradient_norms, node_weights)


def integrated_norm_gradient(weight_norms: Tensor, gradient_norms: Tensor, node_weights: Tensor) -> Tensor:
    r"""Eq. 5: :math:`C_{IG^p} = \sum_s \omega_s\|\mu^sW^n\|_p\,\|\nabla_{\mu^sW^n}F\|_p`.

    Args:
        weight_norms: ``[K, N]``, the norms of the *decayed* weights :math:`\mu^sW^n`.
        gradient_norms: ``[K, N]``.
        node_weights: ``[K]``; all ones in the paper's sum.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[1.0], [0.5]])
        >>> integrated_norm_gradient(weights, torch.tensor([[2.0], [4.0]]), torch.ones(2))
        tensor([4.])
    """
    return _weighted_sum(weight_norms * gradient_norms, node_weights)


def integrated_inner_product(inner_products: Tensor, node_weights: Tensor) -> Tensor:
    r"""Beyond the paper: :math:`\sum_s \omega_s|\langle\mu^sW^n,\nabla_{\mu^sW^n}F\rangle|`, the path integral
    of Taylor's product.

    Args:
        inner_products: ``[K, N]``, signed.
        node_weights: ``[K]``.

    Example:
        >>> import torch
        >>> integrated_inner_product(torch.tensor([[1.0], [-2.0]]), torch.ones(2))
        tensor([3.])
    """
    return _weighted_sum(inner_products.abs(), node_weights)


def _unavailable() -> Tensor:
    raise ConfigError(
        "the criterion 'obs' is computed from the layers that read units, which are not known here (a group of "
        "torch-pruning's own graph, NNI, single weights); use singe_plugin.prune or SInGEPruner, or another criterion"
    )


def _weighted_sum(values: Tensor, node_weights: Tensor) -> Tensor:
    if values.ndim < 2 or node_weights.ndim != 1 or values.shape[0] != node_weights.shape[0]:
        raise ConfigError(
            f"a path criterion needs values [K, N] and node weights [K], got {tuple(values.shape)} and "
            f"{tuple(node_weights.shape)}"
        )
    total: Tensor = torch.tensordot(node_weights.to(values), values, dims=1)
    return total


@dataclass(frozen=True)
class Criterion:
    """What a criterion needs, and how it turns the quantities measured along the path into scores.

    Attributes:
        name: the name that users type.
        needs_gradient: whether data must be bound (everything but the magnitudes of Eq. 1).
        needs_path: whether the path is walked, or only its start (u = 1) is looked at.
        measure: what a quadrature integrates: ``"product"`` is weighted by the decayed norm (Eq. 5),
            ``"gradient"`` is not (the sum of gradient norms).
        degree: a fixed norm degree (``l1``, ``l2``), or None to use the user's ``p``.
        combine: ``(weight_norms, gradient_norms, inner_products, node_weights) -> scores``; the first
            three are ``[K, N]``. A criterion with a path is a sum over the nodes: its terms can be taken one by one.
        norms, inner: whether it reads the norms of the gradients, and the inner products (what is not read is zeros).
        of_readers: whether it is no function of the layers that produce a unit, but of those that read it
            (:mod:`singe_plugin.loop.readers`); ``combine`` is not called then.
    """

    name: str
    needs_gradient: bool
    needs_path: bool
    measure: Measure
    degree: float | None
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    inner: bool = False
    of_readers: bool = False
    norms: bool = True


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion("l1", False, False, "product", 1.0, lambda w, g, d, q: magnitude(w[0])),
        Criterion("l2", False, False, "product", 2.0, lambda w, g, d, q: magnitude(w[0])),
        Criterion("lp", False, False, "product", None, lambda w, g, d, q: magnitude(w[0])),
        Criterion("grad", True, False, "product", None, lambda w, g, d, q: gradient_norm(g[0])),
        Criterion("norm_grad", True, False, "product", None, lambda w, g, d, q: norm_times_gradient(w[0], g[0])),
        Criterion("sg", True, True, "gradient", None, lambda w, g, d, q: summed_gradient_norms(g, q)),
        Criterion("ig", True, True, "product", None, lambda w, g, d, q: integrated_norm_gradient(w, g, q)),
        Criterion(
            "ig_abs", True, True, "product", None, lambda w, g, d, q: integrated_inner_product(d, q), True, norms=False
        ),
        Criterion("obs", True, False, "product", None, lambda w, g, d, q: _unavailable(), of_readers=True),
    )
}


def get_criterion(name: str) -> Criterion:
    """Look a criterion up by name.

    Raises:
        ConfigError: if there is none of that name; the message lists those there are.

    Example:
        >>> get_criterion("ig").needs_path
        True
    """
    try:
        return CRITERIA[name]
    except (KeyError, TypeError):
        raise ConfigError(f"unknown criterion {name!r}; choose one of {', '.join(CRITERIA)}") from None
