"""The configuration of a diffusers model follows its widths, where the class can say them.

``from_pretrained`` builds the class from its configuration, which has one number for many widths: see
:mod:`singe_plugin.run.rebuilt`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from singe_plugin.run.architecture import is_of_diffusers
from singe_plugin.run.rebuilt import is_the_model, shapes_of, solved
from singe_plugin.state import RngState

__all__ = ["follow_config"]

_Key: TypeAlias = "tuple[str, int | None]"  # of the configuration, and where in a list


def follow_config(model: nn.Module, example_inputs: Any) -> str:
    """Let ``model.config`` say the widths that are left, if its class can be built with them and computes the same.

    Args:
        model: a pruned model of diffusers.
        example_inputs: what it is called with to compare.

    Returns:
        what to save the model with, and why: a sentence. It is empty for a model that is none of diffusers.

    Example:
        >>> import torch
        >>> follow_config(nn.Linear(1, 1), torch.zeros(1, 1))
        ''
    """
    if not is_of_diffusers(model):
        return ""
    rng = RngState.capture()
    try:
        changed, why = _solved(model)
        if not why and not is_the_model(model, _with(model, changed), example_inputs):
            why = "built so, it computes something else: numbers that it makes of them, such as scales and positions"
    finally:
        rng.restore()
    kind = type(model).__name__
    if why:
        return (
            f"the configuration of {kind} cannot say the widths that are left ({why}), so from_pretrained would not "
            "load what save_pretrained writes; use singe_plugin.save, and singe_plugin.load(directory, trust=True)"
        )
    config = _config(model, changed)
    model.register_to_config(**{key: config[key] for key, _ in changed})  # type: ignore[operator]
    said = ", ".join(f"{key}={config[key]}" for key in dict.fromkeys(key for key, _ in changed))
    return f"the configuration of {kind} says the widths that are left ({said or 'as before'}): save_pretrained works"


def _config(model: nn.Module, changed: Mapping[_Key, int]) -> dict[str, Any]:
    """The configuration with other numbers."""
    config: dict[str, Any] = copy.deepcopy(dict(model.config))  # type: ignore[arg-type]
    for (key, index), number in changed.items():
        if index is None:
            config[key] = number
        else:
            config[key] = [number if i == index else value for i, value in enumerate(config[key])]
    if usual := config.get("_use_default_values"):  # of these, diffusers takes its own
        config["_use_default_values"] = [name for name in usual if name not in {key for key, _ in changed}]
    return config


def _with(model: nn.Module, changed: Mapping[_Key, int]) -> nn.Module:
    made: nn.Module = type(model).from_config(_config(model, changed))  # type: ignore[attr-defined]
    return made


def _solved(model: nn.Module) -> tuple[dict[_Key, int], str]:
    """The numbers with which the class has the shapes of the model, or why there are none."""
    numbers: dict[_Key, int] = {}
    for key, value in dict(model.config).items():  # type: ignore[arg-type]
        for index, number in enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]:
            if type(number) is int and number > 1:
                numbers[key, index] = number
    why = ""
    for order in (list(numbers), list(numbers)[::-1]):
        changed, reason = solved(shapes_of(model), numbers, order, partial(_with, model))
        if not reason:
            return {key: changed[key] for key in numbers if key in changed}, ""
        why = why or reason
    return {}, why
