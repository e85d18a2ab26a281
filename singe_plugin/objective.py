"""The objective F: what a batch looks like, how the model is called, and the scalar that is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError, SingeError

__all__ = [
    "Objective",
    "ObjectiveLike",
    "call_model",
    "check_batch",
    "check_classes",
    "cross_entropy",
    "get_objective",
    "split_batch",
    "to_device",
    "true_class_logit",
]

Objective: TypeAlias = Callable[[Any, Any], Tensor]
ObjectiveLike: TypeAlias = str | Objective

MOST_BATCHES, MOST_BYTES = 1024, 4 * 2**30  # of a one-shot iterator, which has to be kept
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    r"""``"loss"``: the mean cross-entropy :math:`F = -\frac1B\sum_b\log p_{y_b}(x_b)`.

    Args:
        outputs: logits ``[B, C, ...]``.
        targets: class indices ``[B, ...]`` or probabilities ``[B, C, ...]``.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    logits = _logits(outputs, "loss")
    check_classes(targets, logits)
    return functional.cross_entropy(logits, targets.to(logits.dtype) if targets.is_floating_point() else targets)


def true_class_logit(outputs: Any, targets: Any) -> Tensor:
    r"""``"logit"``: the mean logit of the true class, :math:`F=\frac1B\sum_b z_{b,y_b}`.

    Args:
        outputs: logits ``[B, C]``.
        targets: class indices ``[B]``, or probabilities ``[B, C]`` (then the expected logit).

    Example:
        >>> import torch
        >>> true_class_logit(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor(5.)
    """
    logits = _logits(outputs, "logit")
    if targets.is_floating_point():
        expected: Tensor = (logits * targets).sum(1).mean()
        return expected
    check_classes(targets, logits, ignored=None)
    return logits.gather(1, targets.unsqueeze(1)).mean()


def check_classes(targets: Any, logits: Tensor, ignored: int | None = -100) -> None:
    """Raise ``IndexError``, as PyTorch does on the CPU, for a class that the logits ``[B, C, ...]`` do not have.

    CUDA would only say so later, and refuse everything from then on. Who calls it adds the layer and the batch.
    Targets that are no class indices are left to the loss.

    Example:
        >>> import torch
        >>> check_classes(torch.tensor([0, 3]), torch.zeros(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        IndexError: Target 3 is out of bounds: the model has 3 classes, 0 to 2; ...
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return
    classes = logits.shape[1] if logits.ndim > 1 else logits.numel()
    outside = (targets < 0) | (targets >= classes)
    if ignored is not None:
        outside &= targets != ignored
    if bool(outside.any()):
        raise IndexError(
            f"Target {int(targets[outside][0])} is out of bounds: the model has {classes} classes, 0 to {classes - 1}; "
            "check the labels, or make the model with more classes"
        )


def _logits(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # half precision would round F
    raise DataError(
        f"objective={name!r} needs a tensor of logits, but the model returns {type(outputs).__name__}; "
        "pass a callable instead, e.g. objective=lambda outputs, targets: cross_entropy(outputs[0], targets)"
    )


OBJECTIVES: dict[str, Objective] = {"loss": cross_entropy, "logit": true_class_logit}


def get_objective(objective: ObjectiveLike) -> Objective:
    """Turn a name or a callable into the callable ``(outputs, targets) -> scalar``.

    Raises:
        ConfigError: if it is neither a known name nor callable.

    Example:
        >>> get_objective("loss") is cross_entropy
        True
    """
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]
    if callable(objective):
        return objective
    raise ConfigError(
        f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)} or pass a callable "
        "(outputs, targets) -> scalar"
    )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Split a batch into inputs and targets.

    A pair ``(inputs, targets)`` is taken as it is; a mapping gives its targets up under one of ``labels``,
    ``label``, ``targets``, ``target``, ``y``, and the rest are the model's keyword arguments.

    Raises:
        DataError: if the batch has neither form.

    Example:
        >>> split_batch(({"pixels": 1}, 2))
        ({'pixels': 1}, 2)
        >>> split_batch({"pixels": 1, "labels": 2})
        ({'pixels': 1}, 2)
    """
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise DataError(
            f"the batch is a mapping with keys {sorted(map(str, batch))}, none of which is a target "
            f"({', '.join(TARGET_KEYS)}); rename one, or yield (inputs, targets)"
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    form = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise DataError(f"a batch must be a pair (inputs, targets) or a mapping with targets, got {form}")


def check_batch(batch: Any) -> None:
    """Raise :class:`DataError` for a batch that cannot be scored on: values that are not there, or no tensors."""
    inputs, targets = split_batch(batch)
    if inputs is None:
        raise DataError("the inputs of a batch are None; give (inputs, targets)")
    for what, value in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors_in(value):
            if tensor.is_meta:
                raise DataError(f"the {what} of a batch are on meta and have no values; load them first")
            if tensor.is_inference():
                raise DataError(
                    f"the {what} of a batch were made under torch.inference_mode(), and nothing can be differentiated "
                    "with them; make them outside of it, or give tensor.clone()"
                )
            if tensor.ndim and not len(tensor):
                raise DataError(f"the {what} of a batch have the shape {tuple(tensor.shape)}: there is no example")
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else [value]
        for part in parts:
            if isinstance(part, (np.ndarray, bytes)):
                raise DataError(
                    f"the {what} of a batch hold a {type(part).__name__}, and models take tensors; convert it "
                    "(torch.from_numpy), or give a Dataset, whose examples are put together and converted"
                )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call the model: a tensor is its one argument, a tuple or list its arguments, a mapping its keywords.

    Example:
        >>> import torch
        >>> call_model(torch.nn.Identity(), torch.ones(1))
        tensor([1.])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments or outputs, in order.

    Example:
        >>> import torch
        >>> [t.item() for t in tensors_in(({"x": torch.tensor(1)}, [torch.tensor(2), "no"]))]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def to_device(value: Any, device: torch.device, channels_last: bool = False) -> Any:
    """Move every tensor in a nested batch to ``device``; 4-D float images to ``channels_last`` on request.

    Of other objects, those with a method ``to`` are moved by it.

    Example:
        >>> import torch
        >>> to_device((torch.zeros(1), {"y": 2}), torch.device("cpu"))
        (tensor([0.]), {'y': 2})
    """
    if isinstance(value, Tensor):
        later = device.type != "cpu"  # what goes to the CPU is read as soon as this returns
        if channels_last and value.ndim == 4 and value.is_floating_point():
            return value.to(device, non_blocking=later, memory_format=torch.channels_last)
        return value.to(device, non_blocking=later)
    if isinstance(value, Mapping):
        return {k: to_device(v, device, channels_last) for k, v in value.items()}
    if callable(move := getattr(value, "to", None)):  # a batch of graphs, a packed sequence
        return move(device)
    if isinstance(value, (tuple, list)):
        moved = [to_device(v, device, channels_last) for v in value]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*moved)
        return tuple(moved) if isinstance(value, tuple) else moved
    return value


def in_memory(batches: Iterable[Any]) -> list[Any]:
    """All batches as a list, as long as they are few enough: a generator may never end.

    Raises:
        DataError: at ``MOST_BATCHES`` batches, or ``MOST_BYTES`` of tensors.
    """
    found, size = [], 0
    for batch in read(batches, "reading the batches"):
        found.append(batch)
        size += sum(t.numel() * t.element_size() for t in tensors_in(batch))
        if len(found) > MOST_BATCHES or size > MOST_BYTES:
            raise DataError(
                f"a {type(batches).__name__} gave {len(found)} batches of {size / 2**30:.1f} GiB in all and goes on, "
                "and it has to be kept to be read more than once; give a DataLoader, or a list of as many batches as "
                "are needed, e.g. list(itertools.islice(batches, 100))"
            )
    return found


def read(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches one by one; what the code behind them raises becomes one error that says where.

    Raises:
        DataError: with the original error as its cause.

    Example:
        >>> list(read([1, 2], "data"))
        [1, 2]
    """
    number, iterator = 0, None
    while True:
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise DataError(
                f"{what} failed at batch {number} with {type(error).__name__}: {error}; see the error above for where"
            ) from error
        yield batch
        number += 1


def materialise(batches: Iterable[Any] | None) -> Iterable[Any]:
    """Make sure that the batches can be iterated more than once (a one-shot iterator becomes a list).

    Raises:
        DataError: if ``batches`` is not an iterable of batches, or is a lone tensor or array, or does not end.
    """
    if isinstance(batches, (Tensor, np.ndarray, str, bytes)) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches must be an iterable of (inputs, targets), e.g. a DataLoader or a list, got "
            f"{type(batches).__name__}"
        )
    if isinstance(batches, Mapping):
        raise DataError("batches is one mapping; wrap a single batch in a list: [batch]")
    if isinstance(batches, Iterator):  # not by calling iter(): a DataLoader would draw a seed and start its workers
        return in_memory(batches)
    return batches
