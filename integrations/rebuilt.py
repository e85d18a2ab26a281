"""Whether a class that is built anew computes what a pruned model of it computes, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from singe_plugin.axes.grouped import PlainGroups
from singe_plugin.axes.substitutes import double_inputs, in_double, normal, uniform
from singe_plugin.axes.values import Values
from singe_plugin.nested import call_model, map_tensors, relative_change, results_in
from singe_plugin.state import RngState, preserved

__all__ = ["computes_the_same"]

_EXACT, _ROUNDED = 1e-7, 1e-6  # in double precision, with constants in single precision, and in that


def computes_the_same(model: nn.Module, fresh: nn.Module, inputs: Any) -> bool:
    """Whether two models with parameters of the same names and shapes are one function of these and the inputs.

    The weights are random ones, and in double precision if the models run so: those of a model may be so small that a
    scale that is off would hardly show. Both are left as they were.

    Example:
        >>> layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> x, bent = torch.ones(1, 2), nn.Sequential(layer, nn.Tanh())
        >>> computes_the_same(layer, other, x), computes_the_same(bent, nn.Sequential(other), x)
        (True, False)
    """
    values = Values()
    with preserved(model), preserved(fresh), PlainGroups(), torch.no_grad():
        model.eval()
        fresh.eval()
        try:
            generator = torch.Generator().manual_seed(0)
            for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
                small = one.ndim < 2
                data = uniform(one, generator) if small else normal(one, generator) / max(one.shape[-1], 1) ** 0.5
                values.put(one, data)
                values.put(other, data.clone())
            try:
                with in_double(model), in_double(fresh):
                    return _apart(model, fresh, double_inputs(inputs)) < _EXACT
            except RuntimeError:  # they do not run in double precision
                return _apart(model, fresh, inputs) < _ROUNDED
        finally:
            values.restore()


def _apart(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """How far the results of two models are apart, with the same random numbers."""
    start, found = RngState.capture(), []
    for model in (one, other):
        start.restore()
        found.append(list(results_in(call_model(model, map_tensors(torch.clone, inputs)))))
    return relative_change(*found)
