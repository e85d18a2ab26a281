"""The configuration of a diffusers model follows its widths, where the class can say them.

``from_pretrained`` builds the class from its configuration, which has one number for many widths. Which number gives
which widths is not known by name: the class is built once more with another number, on no device, and what has another
shape then depends on it. Then the class is built with the numbers found and gets the pruned weights: only if that
computes the same does the configuration change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import nn

from singe_plugin.errors import is_of_the_machine
from singe_plugin.run.architecture import is_of_diffusers
from singe_plugin.state import RngState

from ..rebuilt import computes_the_same

__all__ = ["follow_config"]

_Key: TypeAlias = "tuple[str, int | None]"  # of the configuration, and where in a list
_Shapes: TypeAlias = "dict[str, tuple[int, ...]]"


def follow_config(model: nn.Module, example_inputs: Any) -> str:
    """Let ``model.config`` say the widths that are left, if its class can be built with them and computes the same.

    Args:
        model: a pruned model of diffusers.
        example_inputs: what it is called with to compare.

    Returns:
        what to save the model with, and why: a sentence. It is empty for a model that is none of diffusers.

    Example:
        >>> follow_config(nn.Linear(1, 1), torch.zeros(1, 1))
        ''
    """
    if not is_of_diffusers(model):
        return ""
    rng = RngState.capture()
    try:
        changed, why = _solved(model)
        if not why and not _is_the_model(model, changed, example_inputs):
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
    return config


def _with(model: nn.Module, changed: Mapping[_Key, int]) -> nn.Module:
    made: nn.Module = type(model).from_config(_config(model, changed))  # type: ignore[attr-defined]
    return made


def _shapes(model: nn.Module) -> _Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _built(model: nn.Module, changed: Mapping[_Key, int]) -> _Shapes | None:
    """The shapes of the class with other numbers; None if it cannot be built with them."""
    try:
        with torch.device("meta"):
            return _shapes(_with(model, changed))
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return None


def _solved(model: nn.Module) -> tuple[dict[_Key, int], str]:
    """The numbers with which the class has the shapes of the model, or why there are none."""
    wanted = _shapes(model)
    numbers: dict[_Key, int] = {}
    for key, value in dict(model.config).items():  # type: ignore[arg-type]
        for index, number in enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]:
            if type(number) is int and number > 1:
                numbers[key, index] = number
    why = ""
    for order in (list(numbers), list(numbers)[::-1]):  # a product of two numbers may be had by changing either
        changed, base = dict[_Key, int](), _built(model, {})
        for one in order:
            if base is None or base == wanted:
                break
            found = _value_of(model, one, numbers[one], changed, base, wanted)
            if found is not None:
                changed[one] = found
                base = _built(model, changed)
        if base == wanted:
            return changed, ""
        made = base or {}
        name = next(name for name in {**wanted, **made} if made.get(name) != wanted.get(name))
        why = why or f"{name} has the shape {wanted.get(name)}, and would have {made.get(name)}"
    return {}, why


def _value_of(
    model: nn.Module, key: _Key, number: int, changed: Mapping[_Key, int], base: _Shapes, wanted: _Shapes
) -> int | None:
    """The number with which all that depends on it has the wanted shape, or None if there is none."""
    other = _built(model, {**changed, key: 2 * number})
    if other is None or not other.keys() == base.keys() == wanted.keys():
        return None
    found: set[Fraction] = set()
    for name, shape in base.items():
        if not len(shape) == len(other[name]) == len(wanted[name]):
            return None
        for one, two, target in zip(shape, other[name], wanted[name], strict=True):
            if one != two:  # the size is a straight line in the number
                found.add(number + Fraction((target - one) * number, two - one))
    if len(found) != 1:
        return None
    (value,) = found
    return int(value) if value.denominator == 1 and 0 < value != number else None


def _is_the_model(model: nn.Module, changed: Mapping[_Key, int], inputs: Any) -> bool:
    """Whether the class, with other numbers and the model's weights, gives what the model gives."""
    first = next(model.parameters())
    fresh = _with(model, changed).to(device=first.device, dtype=first.dtype)
    fresh.load_state_dict(model.state_dict())
    return computes_the_same(model, fresh, inputs)
