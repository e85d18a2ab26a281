"""Nested arguments and outputs: the tensors in them, the same with other tensors, and the call of a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "are_images", "call_model", "copied", "examples_in", "leaves_in", "map_tensors", "relative_change", "results_in",
    "tensors_in", "to_device",
]  # fmt: skip

_STATES = ("hidden_state", "hidden_states", "attentions", "past_key_values", "model_output")


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call the model: a tensor is its one argument, a tuple or list its arguments, a mapping its keywords.

    A packed sequence is one argument, too.

    Example:
        >>> import torch
        >>> call_model(torch.nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def leaves_in(value: Any) -> Iterator[Any]:
    """Yield everything in nested arguments or outputs that is no tuple, list or mapping, in order.

    Example:
        >>> list(leaves_in(({"x": 1}, [2, "no"])))
        [1, 2, 'no']
    """
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):  # first: it is what is met most
            yield value
        elif isinstance(value, (tuple, list)):
            stack.extend(reversed(value))
        elif isinstance(value, Mapping):
            stack.extend(reversed([*value.values()]))
        else:
            yield value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested arguments or outputs, in order.

    Example:
        >>> import torch
        >>> [t.item() for t in tensors_in(({"x": torch.tensor(1)}, [torch.tensor(2), "no"]))]
        [1, 2]
    """
    return (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def results_in(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors that a model was asked for.

    In a mapping with logits that are all but its inner states, as transformers' outputs name them (the hidden states,
    keys and attention maps that led to the logits): how wide these are is the model's own affair.

    Example:
        >>> import torch
        >>> outputs = {"logits": torch.tensor(1), "encoder_last_hidden_state": torch.tensor(2)}
        >>> [t.item() for t in results_in(outputs)]
        [1]
        >>> [t.item() for t in results_in({"last_hidden_state": torch.tensor(2)})]
        [2]
        >>> towers = {"logits_per_text": torch.tensor(1), "text_model_output": (torch.tensor(2),)}
        >>> [t.item() for t in results_in(towers)]
        [1]
    """
    if isinstance(outputs, Mapping) and any("logits" in str(key) for key in outputs):
        outputs = {key: value for key, value in outputs.items() if not str(key).endswith(_STATES)}
    return tensors_in(outputs)


def examples_in(inputs: Any) -> int:
    """How many examples a model's inputs are of: the length of the first tensor that has one; 0 if there is none.

    A list of tensors of three dimensions *in* the inputs is a list of images, as detectors take them: it is counted.

    Example:
        >>> import torch
        >>> examples_in({"scale": torch.tensor(2.0), "pixels": torch.zeros(4, 3)}), examples_in(None)
        (4, 0)
        >>> examples_in(([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)],))
        2
    """
    for value in _arguments(inputs):
        if are_images(value):
            return len(value)
        for tensor in tensors_in(value):
            if tensor.ndim:
                return len(tensor)
    return 0


def _arguments(inputs: Any) -> list[Any]:
    """The arguments that a model is called with."""
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]


def are_images(argument: Any) -> bool:
    """Whether an argument is a list of images, one for each example: tensors of three dimensions."""
    return type(argument) is list and bool(argument) and all(isinstance(t, Tensor) and t.ndim == 3 for t in argument)


def map_tensors(function: Callable[[Tensor], Any], value: Any, others: Callable[[Any], Any] | None = None) -> Any:
    """Replace every tensor in nested arguments; tuples, lists, mappings and dataclasses keep their classes.

    Args:
        function: what a tensor is replaced by.
        value: the arguments.
        others: what any other object, mappings apart, is replaced by; None if it is to be looked into, or stays.

    Example:
        >>> import torch
        >>> from collections import OrderedDict
        >>> list(map_tensors(lambda t: t.item() + 1, OrderedDict(a=[torch.tensor(1)], b=2)).items())
        [('a', [2]), ('b', 2)]
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _mapping_like(value, {k: map_tensors(function, v, others) for k, v in value.items()})
    if others is not None and (found := others(value)) is not None:
        return found
    if isinstance(value, (tuple, list)):
        moved = [map_tensors(function, v, others) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*moved)
        return tuple(moved) if isinstance(value, tuple) else moved
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for name in (f.name for f in dataclasses.fields(value) if hasattr(value, f.name)):
            object.__setattr__(made, name, map_tensors(function, getattr(value, name), others))
        return made
    return value


def copied(value: Any) -> Any:
    """Copy all tensors in a nested value, without their graph: who is given it may write into it.

    Example:
        >>> import torch
        >>> [t.requires_grad for t in copied([torch.ones(1, requires_grad=True)])]
        [False]
    """
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Put items into a dictionary of the same class, with its attributes; other mappings become plain dictionaries."""
    if type(value) is dict or not isinstance(value, dict):
        return items
    made = type(value).__new__(type(value))
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    for key, item in items.items():
        base.__setitem__(made, key, item)  # its own method may refuse, or do more
    vars(made).update({key: items.get(key, held) for key, held in vars(value).items()})
    return made


def to_device(value: Any, device: torch.device, channels_last: bool = False) -> Any:
    """Move every tensor in a nested batch to ``device``; 4-D float images to ``channels_last`` on request.

    Of other objects, those with a method ``to`` are moved by it: a batch of graphs, a packed sequence.

    Example:
        >>> import torch
        >>> to_device((torch.zeros(1), {"y": 2}), torch.device("cpu"))
        (tensor([0.]), {'y': 2})
    """
    later = device.type != "cpu"  # what goes to the CPU is read as soon as this returns

    def moved(tensor: Tensor) -> Tensor:
        if channels_last and tensor.ndim == 4 and tensor.is_floating_point():
            return tensor.to(device, non_blocking=later, memory_format=torch.channels_last)
        return tensor.to(device, non_blocking=later)

    def by_itself(other: Any) -> Any:
        return move(device) if callable(move := getattr(other, "to", None)) else None

    return map_tensors(moved, value, by_itself)


def relative_change(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the largest change between two outputs, relative to the first's size.

    It is infinite if shapes differ or something is not finite.
    """
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            if not bool(torch.isfinite(y).all()):
                return float("inf")
            change = float((x - y).abs().max() / x.abs().max().clamp(min=1e-12))
            if not math.isfinite(change):
                return float("inf")
            worst = max(worst, change)
    return worst
