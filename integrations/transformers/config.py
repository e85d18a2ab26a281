"""The configuration of a transformers model follows its widths, where the class can say them.

``from_pretrained`` builds a model from its configuration, which has one number for all layers and none for many widths
that a removal changes: see :mod:`singe_plugin.run.rebuilt`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from singe_plugin.run.architecture import is_of_transformers
from singe_plugin.run.rebuilt import built, is_the_model, shapes_of, solved
from singe_plugin.state import RngState

__all__ = ["follow_config"]

_WIDTHS = ("size", "dim", "inner", "width", "heads", "d_", "ffn", "rank")  # what may be None, and say a width if not
_UNSAID = ("head_dim",)  # what many classes read with getattr, and divide for if it is not there


def follow_config(model: nn.Module, example_inputs: Any) -> str:
    """Let ``model.config`` say the widths that are left, if its class can be built with them and computes the same.

    Args:
        model: a pruned model of transformers.
        example_inputs: what it is called with to compare.

    Returns:
        what to save the model with, and why: a sentence. It is empty for a model that is none of transformers.

    Example:
        >>> import torch
        >>> follow_config(nn.Linear(1, 1), torch.zeros(1, 1))
        ''
    """
    if not is_of_transformers(model):
        return ""
    rng = RngState.capture()
    try:
        changed, why = _found(model, example_inputs)
    finally:
        rng.restore()
    kind = type(model.config).__name__
    if changed is None:
        return (
            f"{kind} cannot say the widths that are left ({why}), so from_pretrained would not load what "
            "save_pretrained writes; use singe_plugin.save and singe_plugin.load"
        )
    for key, value in changed.items():
        setattr(model.config, key, value)
    said = ", ".join(f"{key}={value}" for key, value in changed.items())
    return f"{kind} says the widths that are left ({said or 'as before'}): save_pretrained and from_pretrained work"


def _found(model: nn.Module, inputs: Any) -> tuple[dict[str, int] | None, str]:
    """The numbers with which the class is the model, or why there are none."""
    values: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    keys = [key for key, value in values.items() if type(value) is int and value > 1]
    keys += [k for k, v in values.items() if v is None and any(part in k for part in _WIDTHS)]
    keys += [key for key in _UNSAID if key not in values]
    why = ""
    for order in (keys, keys[::-1]):  # a product of two numbers may be had by changing either
        changed, why = _solved(model, order, values)
        for attempt in _alike(model, changed, values) if not why else ():
            if is_the_model(model, _with(model, attempt), inputs):
                return attempt, ""
            why = (
                "built so, it computes something else: numbers that it makes of them, such as scales and rotary angles"
            )
    return None, why


def _alike(model: nn.Module, changed: dict[str, int], values: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Numbers that give the same shapes: these, and others of heads, which may divide a width in several ways."""
    yield changed
    known = {key: value for key, value in values.items() if type(value) is int and value > 1 and key not in changed}
    heads = [key for key in known if "head" in key and "dim" not in key]
    for chosen in [[key] for key in heads] + [heads] * (len(heads) > 1):
        most = values[chosen[0]]
        for number in range(most - 1, 0, -1):
            fewer = {key: values[key] * number // most for key in chosen if values[key] * number % most == 0}
            if len(fewer) == len(chosen) and built(partial(_with, model, {**changed, **fewer})) == shapes_of(model):
                yield {**changed, **fewer}


def _solved(model: nn.Module, keys: Sequence[str], values: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """The numbers with which the class has the shapes of the model, or why there are none."""
    known = dict[str, int]()
    for key in keys:  # what every module that has a number of this name says
        told = {m.__dict__[key] for m in model.modules() if type(m.__dict__.get(key)) is int}
        if len(told) == 1 and told != {values.get(key)}:
            known[key] = told.pop()
    return solved(shapes_of(model), {key: values.get(key) for key in keys}, keys, partial(_with, model), known)


def _with(model: nn.Module, changed: Mapping[str, Any]) -> nn.Module:
    config = copy.deepcopy(model.config)
    for key, value in changed.items():
        setattr(config, key, value)
    made: nn.Module = type(model)(config)
    return made
