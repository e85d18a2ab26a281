"""From one score per layer to one score per unit: the reduction over a group's layers, and the normaliser.

The names are torch-pruning's (``group_reduction``, ``normalizer``), the arithmetic is guarded: nothing here
turns a group of zero scores into NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from singe_plugin.errors import ConfigError

__all__ = ["REDUCTIONS", "NormalizerLike", "check_normalizer", "check_reduction", "normalize", "reduce_layers"]

REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate")
NormalizerLike: TypeAlias = str | Callable[[Tensor], Tensor] | None
_EPS = 1e-8


def check_reduction(reduction: str) -> str:
    """Return the name if it is known, else raise :class:`ConfigError`."""
    if reduction not in REDUCTIONS:
        raise ConfigError(f"unknown group_reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    return reduction


def reduce_layers(scores: Sequence[Tensor], covered: Sequence[Tensor], reduction: str) -> Tensor:
    r"""Reduce the scores that a unit has in each layer of its group to one.

    ``sum``, ``mean``, ``max`` and ``prod`` run over the layers that *have* the unit (a layer behind a split has
    only some of them); ``first`` takes the root layer, ``gate`` the last one.

    Args:
        scores: per layer ``[N]``.
        covered: per layer ``[N]`` bool, whether the layer has the unit.
        reduction: one of :data:`REDUCTIONS`.

    Returns:
        ``[N]``.

    Example:
        >>> import torch
        >>> both = torch.tensor([True, True])
        >>> reduce_layers([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], [both, both], "mean")
        tensor([2., 3.])
    """
    check_reduction(reduction)
    if not scores:
        raise ConfigError("a group without producing layers has no scores to reduce")
    if len(scores) == 1 and bool(covered[0].all()):
        return scores[0]  # whatever the reduction
    stacked, mask = torch.stack(list(scores)), torch.stack(list(covered))
    if reduction == "first":
        return stacked[0]
    if reduction == "gate":
        return stacked[-1]
    if reduction == "max":
        best = stacked.masked_fill(~mask, -torch.inf).amax(0)
        return torch.where(mask.any(0), best, torch.zeros_like(best))
    if reduction == "prod":
        return torch.where(mask.any(0), stacked.masked_fill(~mask, 1.0).prod(0), torch.zeros_like(stacked[0]))
    total = stacked.masked_fill(~mask, 0.0).sum(0)
    return total if reduction == "sum" else total / mask.sum(0).clamp(min=1)


def check_normalizer(normalizer: NormalizerLike) -> NormalizerLike:
    """Return the normaliser if it is known, else raise :class:`ConfigError`."""
    if normalizer is None or callable(normalizer) or (isinstance(normalizer, str) and normalizer in _NORMALIZERS):
        return normalizer
    if isinstance(normalizer, str) and normalizer.startswith("sentinel_"):
        try:
            if 0 <= float(normalizer.split("_", 1)[1]) < 1:
                return normalizer
        except ValueError:
            pass
    raise ConfigError(
        f"unknown normalizer {normalizer!r}; choose one of {', '.join(_NORMALIZERS)}, 'sentinel_<share in [0, 1[>', "
        "None or a callable"
    )


def normalize(scores: Tensor, normalizer: NormalizerLike) -> Tensor:
    r"""Normalise the scores of one group, so that groups can be compared.

    ``sum``, ``mean`` and ``max`` divide by it; ``standarization`` (torch-pruning's spelling) maps to [0, 1];
    ``gaussian`` to zero mean and unit deviation; ``sentinel_q`` divides by the q-quantile element; ``lamp`` is
    :math:`x_i / \sum_{j\ge i} x_j` over ascending scores (arXiv 2010.07611). Zero denominators give zeros.

    Example:
        >>> import torch
        >>> normalize(torch.tensor([1.0, 3.0]), "sum"), normalize(torch.zeros(2), "mean")
        (tensor([0.2500, 0.7500]), tensor([0., 0.]))
    """
    check_normalizer(normalizer)
    if normalizer is None:
        return scores
    if callable(normalizer):
        return normalizer(scores)
    if normalizer.startswith("sentinel_"):
        rank = int(float(normalizer.split("_", 1)[1]) * len(scores))
        return _divide(scores, scores.sort().values[rank])
    return _NORMALIZERS[normalizer](scores)


def _divide(scores: Tensor, by: Tensor) -> Tensor:
    return torch.where(by.abs() > 0, scores / torch.where(by.abs() > 0, by, torch.ones_like(by)), scores * 0)


def _lamp(scores: Tensor) -> Tensor:
    ordered, index = scores.sort()
    tail = ordered.flip(0).cumsum(0).flip(0)
    out = torch.empty_like(scores)
    out[index] = _divide(ordered, tail)
    return out


_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: _divide(x, x.sum()),
    "mean": lambda x: _divide(x, x.mean()),
    "max": lambda x: _divide(x, x.max()),
    "standarization": lambda x: (x - x.min()) / (x.max() - x.min() + _EPS),
    "gaussian": lambda x: (x - x.mean()) / (x.std(unbiased=len(x) > 1) + _EPS),
    "lamp": _lamp,
}
