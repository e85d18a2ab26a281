"""What a model is called with, without its values: written down as plain JSON, and made again at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from singe_plugin.errors import ConfigError
from singe_plugin.nested import examples_in, map_tensors

__all__ = ["are_described", "batched", "describe_inputs", "map_described", "random_inputs", "rows_of", "template_of"]

_LARGEST = 2**28
"""Numbers in one tensor that are made because a record says so."""


def describe_inputs(example: Any) -> Any:
    """Write down the shapes, the types and the nesting of a model's inputs; None if they are more than tensors.

    Of whole numbers (tokens, masks) the smallest and the largest are kept, so that others can be drawn in between. What
    has as many rows as there are examples is marked as *batched*.

    Example:
        >>> describe_inputs(torch.zeros(2, 3))
        {'tensor': [2, 3], 'dtype': 'float32', 'batched': True}
        >>> describe_inputs({"ids": torch.tensor([[4, 7]])})
        {'dict': {'ids': {'tensor': [1, 2], 'dtype': 'int64', 'batched': True, 'low': 4, 'high': 7}}}
    """
    count = examples_in(example)
    try:
        return _described(example, count)
    except _Undescribed:
        return None


class _Undescribed(Exception):
    """Something that plain JSON has no form for."""


def _described(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.numel() > _LARGEST:
            raise _Undescribed
        about = {"tensor": list(value.shape), "dtype": _name(value), "batched": batched(value, count)}
        if not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool and value.numel():
            about |= {"low": int(value.min()), "high": int(value.max())}
        return about
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(part, count) for key, part in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(part, count) for part in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise _Undescribed


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def batched(tensor: Tensor, count: int) -> bool:
    """Whether a tensor of the inputs has a row for each of the examples.

    Example:
        >>> batched(torch.zeros(4, 3), 4), batched(torch.zeros(3), 4), batched(torch.tensor(4.0), 4)
        (True, False, False)
    """
    return tensor.ndim > 0 and tensor.shape[0] == count


def are_described(value: Any) -> bool:
    """Whether a value is what :func:`describe_inputs` writes, and nothing that could not be made.

    Example:
        >>> are_described(describe_inputs((torch.zeros(2, 3), True))), are_described({"tensor": [-1]}), are_described(3)
        (True, False, False)
    """
    return value is None or _is_described(value)


def _is_described(value: Any) -> bool:
    if type(value) is not dict:
        return False
    if set(value) == {"dict"}:
        return type(value["dict"]) is dict and all(map(_is_described, value["dict"].values()))
    if set(value) in ({"tuple"}, {"list"}):
        (parts,) = value.values()
        return type(parts) is list and all(map(_is_described, parts))
    if set(value) == {"value"}:
        return value["value"] is None or type(value["value"]) in (bool, int, float, str)
    if not {"tensor", "dtype", "batched"} <= set(value) <= {"tensor", "dtype", "batched", "low", "high"}:
        return False
    shape, limits = value["tensor"], [value.get("low", 0), value.get("high", 0)]
    right = type(shape) is list and all(type(n) is int and 0 <= n <= _LARGEST for n in shape)
    right = right and math.prod(shape) <= _LARGEST and all(type(n) is int and abs(n) < 2**62 for n in limits)
    return right and limits[0] <= limits[1] and isinstance(getattr(torch, str(value["dtype"]), None), torch.dtype)


def map_described(function: Callable[[dict[str, Any]], Any], described: Any) -> Any:
    """Replace every tensor of described inputs; tuples, lists, mappings and plain values are as they were.

    Example:
        >>> map_described(lambda about: about["tensor"], describe_inputs((torch.zeros(2, 3), {"scale": 0.5})))
        ([2, 3], {'scale': 0.5})
    """
    if "tensor" in described:
        return function(described)
    if "dict" in described:
        return {key: map_described(function, part) for key, part in described["dict"].items()}
    if "tuple" in described:
        return tuple(map_described(function, part) for part in described["tuple"])
    if "list" in described:
        return [map_described(function, part) for part in described["list"]]
    return described["value"]


def random_inputs(described: Any, count: int, seed: int = 0) -> Any:
    """Draw inputs like those that were described: normal ones, and whole numbers between the smallest and largest.

    Args:
        described: by :func:`describe_inputs`.
        count: of examples.
        seed: of the numbers; the caller's random state is left alone.

    Example:
        >>> drawn = random_inputs(describe_inputs({"ids": torch.tensor([[4, 7]])}), 5)
        >>> drawn["ids"].shape, int(drawn["ids"].min()) >= 4
        (torch.Size([5, 2]), True)
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(about: dict[str, Any]) -> Tensor:
        dtype, shape = getattr(torch, about["dtype"]), list(about["tensor"])
        if about["batched"]:
            shape[0] = count
        if dtype.is_floating_point or dtype.is_complex:
            single = torch.complex64 if dtype.is_complex else torch.float32
            return torch.randn(shape, generator=generator, dtype=single).to(dtype)
        low, high = (0, 1) if dtype == torch.bool else (about.get("low", 0), about.get("high", 0))
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)

    return map_described(drawn, described)


def rows_of(example: Any, count: int) -> Any:
    """The first examples of real inputs, from the beginning again if there are too few.

    Example:
        >>> rows_of(torch.arange(2), 3).tolist()
        [0, 1, 0]
    """
    held = examples_in(example)
    if not held:
        raise ConfigError("example_inputs have no tensor with a row for each example; give a batch of at least one")
    index = torch.arange(count) % held
    return map_tensors(
        lambda t: t.detach().cpu()[index].clone() if batched(t, held) else t.detach().cpu().clone(), example
    )


def template_of(value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    """The nesting of inputs with something else in the place of each tensor, and None in that of anything else.

    Example:
        >>> template_of((torch.zeros(1), {"x": 3}), lambda tensor: {0: "batch"})
        ({0: 'batch'}, {'x': None})
    """
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        return {key: template_of(part, of_tensor) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [template_of(part, of_tensor) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return None
