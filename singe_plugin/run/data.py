"""Loaders and accuracy: what a run needs of the data besides iterating over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from singe_plugin.errors import DataError, SingeError
from singe_plugin.method.batches import materialise, read, split_batch
from singe_plugin.method.step import BatchObjective
from singe_plugin.nested import are_images, call_model, map_tensors, tensors_in, to_device
from singe_plugin.ranks import Division, current
from singe_plugin.state import model_device, preserved

__all__ = [
    "as_loader",
    "evaluate",
    "example_from",
    "few",
    "is_dataset",
    "lone_example",
    "right_answers",
    "scoring_batches",
]


def as_loader(data: Any, batch_size: int, workers: int = 0, shuffle: bool = True, seed: int = 0) -> Iterable[Any]:
    """Make a DataLoader of a map-style dataset; anything that yields batches stays what it is.

    A last batch of a single example is left out where batches are shuffled for training: batch-norm cannot train on it.

    Raises:
        DataError: if ``data`` is neither, or is empty.

    Example:
        >>> pairs = [(torch.zeros(3), 0), (torch.ones(3), 1)]
        >>> from torch.utils.data import Dataset
        >>> class Two(Dataset):
        ...     def __len__(self): return 2
        ...     def __getitem__(self, i): return pairs[i]
        >>> [b[1].tolist() for b in as_loader(Two(), batch_size=2, shuffle=False)]
        [[0, 1]]
    """
    if isinstance(data, IterableDataset):
        raise DataError("an IterableDataset has no length and cannot be drawn from; give a DataLoader over it")
    if is_dataset(data):
        if _length(data) == 0:
            raise DataError("the dataset is empty; give one with at least one example")
        generator = torch.Generator().manual_seed(seed) if shuffle else None
        drop = shuffle and len(data) > batch_size > 1 and len(data) % batch_size == 1
        return DataLoader(
            data, batch_size=batch_size, shuffle=shuffle, num_workers=workers, generator=generator, drop_last=drop
        )
    return materialise(data)


def _length(data: Any) -> int:
    try:
        return len(data)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"a {type(data).__name__} says no length ({error}), so nothing can be drawn from it; give it a __len__, or "
            "give a DataLoader over it"
        ) from error


def is_dataset(data: Any) -> bool:
    """Whether examples can be drawn from it: torch's datasets, and whatever else has a length and single examples.

    A list of examples (``(image, class)``, or a dictionary as Hugging Face's datasets give) is told from a list of
    batches by its targets: an example has one class.

    Example:
        >>> is_dataset([(torch.zeros(3), 1)]), is_dataset([(torch.zeros(2, 3), torch.tensor([1, 0]))])
        (True, False)
    """
    if isinstance(data, Dataset):
        return True
    if isinstance(data, (Tensor, np.ndarray, str, bytes, Mapping)):
        return False
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        return False
    try:
        _, target = split_batch(data[0])
    except (DataError, KeyError, IndexError, TypeError):  # no examples by number
        return False
    if isinstance(target, Tensor):
        return target.ndim == 0 and not target.is_floating_point()
    return isinstance(target, (int, np.integer))


def lone_example(loader: Any) -> bool:
    """Whether one of the batches is a single example, as far as that can be told without reading them."""
    if isinstance(loader, DataLoader):
        if loader.batch_size is None or loader.drop_last or isinstance(loader.dataset, IterableDataset):
            return False
        return loader.batch_size == 1 or len(loader.sampler) % loader.batch_size == 1  # type: ignore[arg-type]
    if not isinstance(loader, (list, tuple)):
        return False
    firsts = [next(tensors_in(batch), None) for batch in loader]
    return any(first is not None and first.ndim > 0 and len(first) == 1 for first in firsts)


def scoring_batches(data: Any, loader: Iterable[Any], batch_size: int, count: int, seed: int = 0) -> list[Any]:
    """Take a few fixed batches to score on: drawn at random from a dataset, the first ones of a loader.

    Args:
        data: what the user gave.
        loader: what :func:`as_loader` made of it.
        batch_size: examples per batch, if ``data`` is a dataset.
        count: number of batches.
        seed: of the draw.

    Raises:
        DataError: if there is no batch.
    """
    if is_dataset(data):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        starts = range(0, min(len(order), count * batch_size), batch_size)
        return [_collate(data, order[start : start + batch_size]) for start in starts]
    batches = []
    for batch in read(loader, "reading the data"):
        batches.append(batch)
        if len(batches) == count:
            break
    if not batches:
        raise DataError("the data is empty: no batch of (inputs, targets) to score on")
    return batches


def _example(data: Any, index: int) -> Any:
    try:
        return data[index]
    except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"example {index} of the dataset cannot be read: {type(error).__name__}: {error}; see the error above"
        ) from error


def _collate(data: Any, chunk: list[int]) -> Any:
    examples = [_example(data, i) for i in chunk]
    try:
        return default_collate(examples)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{len(chunk)} examples of the dataset do not make a batch: {error}; give them one shape, or give a "
            "DataLoader with its own collate_fn"
        ) from error


def example_from(batch: Any, device: torch.device, examples: int = 2, objective: Any = None) -> Any:
    """Take the inputs of the first few examples of a batch, for tracing."""
    inputs = objective.inputs_of(batch) if isinstance(objective, BatchObjective) else split_batch(batch)[0]
    return to_device(few(inputs, examples), device)


def few(value: Any, count: int) -> Any:
    """Take the first ``count`` examples of a model's inputs, whatever the tensors are nested in.

    Example:
        >>> len(few(torch.zeros(4, 2), 1)), len(few(([torch.zeros(3, 8, 8)] * 4,), 2)[0])
        (1, 2)
    """

    def cut(value: Any) -> Any:
        return map_tensors(lambda tensor: tensor[:count] if tensor.ndim else tensor, value, some)

    def some(value: Any) -> Any:
        return value[:count] if are_images(value) else None

    return [cut(argument) for argument in value] if type(value) is list else cut(value)


def evaluate(model: nn.Module, batches: Iterable[Any]) -> float | None:
    """Measure top-1 accuracy in [0, 1], in eval mode; None if outputs are no class scores or targets no class indices.

    Of several ranks each takes some of the batches, if all have the same; those of all are counted.

    Scores may also be the ``logits`` of what a model returns, as Transformers' models do: an attribute, or a key. Right
    answers are counted, not averaged over batches, so that the figure is exact.

    Example:
        >>> evaluate(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])
        0.5
    """
    device, ranks, division = model_device(model), current(), Division()
    right, total, usable = 0, 0, True
    with preserved(model), torch.no_grad():
        model.eval()
        for number, batch in enumerate(read(batches, "reading val_data")):
            if not number:
                division = ranks.division(batch)
            if number not in division:
                continue
            inputs, targets = split_batch(to_device(batch, device))
            try:
                outputs = call_model(model, inputs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise DataError(
                    f"the model fails on a batch of val_data with {type(error).__name__}: {error}; give batches of the "
                    "form it was made for"
                ) from error
            counted = right_answers(outputs, targets)
            if counted is None:
                usable = False
                break
            right += counted
            total += len(targets)
    found = ranks.gather("right answers", (right, total, usable))
    right, total = sum(one for one, _, _ in found), sum(one for _, one, _ in found)
    return right / total if total and all(fits for _, _, fits in found) else None


def right_answers(outputs: Any, targets: Any) -> int | None:
    """How many examples of a batch have their class right; None if the outputs are no class scores, or targets none.

    Raises:
        DataError: if there are not as many outputs as targets.

    Example:
        >>> right_answers({"logits": torch.eye(2)}, torch.tensor([0, 0])), right_answers(torch.eye(2), None)
        (1, None)
    """
    outputs = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    usable = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim == 2
    if not usable or targets.ndim != 1 or targets.is_floating_point():
        return None
    if len(outputs) != len(targets):
        raise DataError(
            f"a batch of val_data has {len(targets)} targets, and the model returns {len(outputs)} outputs for "
            "it; give one class for each example"
        )
    return int((outputs.argmax(1) == targets).sum())
