"""What a contraction regresses on: rows of inputs and of results, and its weights as a matrix for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .contractions import Contraction

__all__ = ["drawn", "inputs_at", "matrix_of", "positions_of", "results_at", "weights_of"]


def positions_of(contraction: Contraction) -> int:
    """How many positions a result has: pixels of one example, or rows of a product."""
    if contraction.convolution is None:
        return len(contraction.out)
    return math.prod(contraction.out.shape[2:])


def drawn(count: int, most: int, seed: int, device: torch.device) -> Tensor:
    """Some of so many positions, in order: at most as many as wanted, drawn at random.

    Example:
        >>> drawn(3, 5, 0, torch.device("cpu"))
        tensor([0, 1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort().values.to(device)


def matrix_of(contraction: Contraction, weight: Tensor) -> Tensor:
    """The weights of a contraction as ``[groups, O, F]``."""
    if contraction.convolution is None:
        return (weight.t() if contraction.columns else weight)[None]
    groups, transposed = contraction.convolution[5], contraction.convolution[3]
    if not transposed:
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return split.transpose(1, 2).reshape(groups, weight.shape[1], -1)


def weights_of(contraction: Contraction, matrix: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`matrix_of`, for weights of a shape."""
    if contraction.convolution is None:
        return matrix[0].t() if contraction.columns else matrix[0]
    if not contraction.convolution[3]:
        return matrix.reshape(shape)
    groups = contraction.convolution[5]
    split = matrix.reshape(groups, shape[1], shape[0] // groups, -1)
    return split.transpose(1, 2).reshape(shape)


def results_at(contraction: Contraction, out: Tensor, chosen: Tensor) -> Tensor:
    """The results at some positions as ``[rows, O]``; of a convolution the same pixels of every example."""
    if contraction.convolution is None:
        return out[chosen]
    return out.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)


def inputs_at(contraction: Contraction, kernel: torch.Size, chosen: Tensor) -> Tensor:
    """What a contraction contracts with its weights at some positions, as ``[groups, rows, F]``.

    Args:
        contraction: the contraction.
        kernel: of a convolution.
        chosen: positions, as for :func:`results_at`.
    """
    x = contraction.x
    if contraction.convolution is None:
        return x[chosen][None]
    groups = contraction.convolution[5]
    index, inside = _patches(contraction, kernel, chosen)
    found = x.flatten(2)[:, :, index.flatten()].reshape(*x.shape[:2], *index.shape)
    if not bool(inside.all()):
        found = found * inside
    split = found.reshape(len(x), groups, x.shape[1] // groups, *index.shape)
    return split.permute(1, 0, 3, 2, 4).reshape(groups, len(x) * len(chosen), -1)


def _patches(contraction: Contraction, kernel: torch.Size, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels meet which weights of the kernel: flat indices ``[positions, kernel]``, and whether they exist."""
    assert contraction.convolution is not None
    stride, padding, dilation, transposed = contraction.convolution[:4]
    sizes, results = contraction.x.shape[2:], contraction.out.shape[2:]
    index = torch.zeros(len(chosen), 1, dtype=torch.int64, device=chosen.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for dim, (at, size, width) in enumerate(zip(torch.unravel_index(chosen, results), sizes, kernel, strict=True)):
        tap = torch.arange(width, device=chosen.device) * _at(dilation, dim)
        if transposed:
            scaled = at[:, None] + _at(padding, dim) - tap
            here, fits = scaled.div(_at(stride, dim), rounding_mode="floor"), scaled % _at(stride, dim) == 0
        else:
            here = at[:, None] * _at(stride, dim) - _at(padding, dim) + tap
            fits = torch.ones_like(here, dtype=torch.bool)
        fits = fits & (here >= 0) & (here < size)
        index = (index[:, :, None] * size + here.clamp(0, size - 1)[:, None, :]).flatten(1)
        inside = (inside[:, :, None] & fits[:, None, :]).flatten(1)
    return index, inside


def _at(setting: Any, dim: int) -> int:
    """A setting of a convolution in one dimension; one number may stand for all."""
    return int(setting[dim] if len(setting) > 1 else setting[0])
