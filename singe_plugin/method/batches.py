"""Batches: what one looks like, what can be scored on, and how they are read, once or again and again."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from singe_plugin.errors import DataError, SingeError
from singe_plugin.nested import tensors_in

__all__ = [
    "MOST_BATCHES", "MOST_BYTES", "TARGET_KEYS", "check_batch", "has_targets", "in_memory", "inputs_for", "inputs_only",
    "materialise", "read", "split_batch",
]  # fmt: skip

MOST_BATCHES, MOST_BYTES = 1024, 4 * 2**30  # of a one-shot iterator, which has to be kept
TARGET_KEYS = ("labels", "label", "targets", "target", "y")


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


def inputs_for(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Split a batch for a model whose loss is wanted: like :func:`split_batch`, but what forward takes stays.

    Where the batch is a mapping and the model's ``forward`` has a parameter of the name that its targets have, they are
    its targets and stay among the keywords, too: such a model computes its own loss from them (see :func:`own_loss`).

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, pixels, labels=None): ...
        >>> inputs_for(Net(), {"pixels": 1, "labels": 2}), inputs_for(Net(), {"pixels": 1, "target": 2})
        (({'pixels': 1, 'labels': 2}, 2), ({'pixels': 1}, 2))
    """
    inputs, targets = split_batch(batch)
    if isinstance(batch, Mapping):
        key = next(key for key in TARGET_KEYS if key in batch)
        try:
            parameters = inspect.signature(model.forward).parameters
        except (TypeError, ValueError):  # a forward that is not written in Python names nothing
            return inputs, targets
        named = parameters.get(key)
        if named is not None and named.kind in (named.POSITIONAL_OR_KEYWORD, named.KEYWORD_ONLY):
            return {**inputs, key: targets}, targets
    return inputs, targets


def has_targets(batch: Any) -> bool:
    """Whether a batch has targets: inputs alone are a tensor, a tuple of one, or a mapping without targets.

    What is none of these is left to :func:`split_batch`. Targets that are None are none.

    Example:
        >>> [has_targets(batch) for batch in (torch.zeros(1), (torch.zeros(1),), {"pixels": 1}, (1, None), (1, 2))]
        [False, False, False, False, True]
    """
    if isinstance(batch, Mapping):
        return any(batch.get(key) is not None for key in TARGET_KEYS)
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        return len(batch) == 2 and batch[1] is not None
    return not isinstance(batch, Tensor)


def inputs_only(batch: Any) -> Any:
    """Return the inputs of a batch that has no targets, see :func:`has_targets`.

    Example:
        >>> inputs_only([{"pixels": 1}]), inputs_only({"pixels": 1, "labels": None})
        ({'pixels': 1}, {'pixels': 1})
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


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


def in_memory(batches: Iterable[Any]) -> list[Any]:
    """Return all batches as a list, as long as they are few enough: a generator may never end.

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
    """Yield the batches one by one; what the code behind them raises becomes one error that says where.

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
