"""F on one batch, and what is said where that fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from singe_plugin.errors import ScoringError
from singe_plugin.method.options import AMP_DTYPES, Scoring

__all__ = ["all_finite", "detached", "evaluate", "evaluation_failed"]


def evaluate(run: Callable[[], Any], targets: Any, options: Scoring, device: torch.device) -> Tensor:
    """Compute F, the objective of what ``run()`` gives, as a scalar.

    Raises:
        ScoringError: if the objective returns anything but one number.

    Example:
        >>> evaluate(lambda: torch.zeros(1, 2), torch.tensor([0]), Scoring(), torch.device("cpu"))
        tensor(0.6931)
    """
    context = torch.autocast(device.type, dtype=AMP_DTYPES[options.amp]) if options.amp else nullcontext()
    with context:
        value = options.function(run(), targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ScoringError(
            f"the objective must return one number (a scalar tensor), got {shape}; reduce it, e.g. with .mean()"
        )
    return value.reshape(())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values are, at the cost of one number that is asked for.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor([1.0, math.nan])])
        False
    """
    some = [t.detach() for t in tensors if t.numel()]
    if not some:
        return True
    largest = [norm.to(some[0].device, torch.float64) for norm in torch._foreach_norm(some, math.inf)]
    return bool(torch.isfinite(torch.stack(largest)).all())


def evaluation_failed(who: str, index: int, inputs: Any, error: Exception) -> ScoringError:
    """Return what is raised where F cannot be evaluated on a batch."""
    return ScoringError(
        f"{who}: evaluating F on batch {index} (inputs {_shapes(inputs)}) failed with {type(error).__name__}: {error}"
    )


def detached(who: str) -> ScoringError:
    """Return what is raised where F has no gradient."""
    return ScoringError(
        f"{who}: F does not depend on its weights through autograd (an objective that is constant or leaves a part of "
        "the output out, a detached output, or torch.no_grad() inside the forward); it cannot be scored by gradients: "
        "give an objective that depends on it, put its layer in ignored_layers, or use the criterion 'l2'"
    )


def _shapes(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return str(tuple(inputs.shape))
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{k}: {_shapes(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(_shapes(v) for v in inputs) + ")"
    return type(inputs).__name__
