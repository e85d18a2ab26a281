"""Loaders and accuracy: what a run needs of the data besides iterating over it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from singe_plugin.errors import DataError
from singe_plugin.objective import call_model, materialise, split_batch, to_device
from singe_plugin.state import model_device, preserved

__all__ = ["as_loader", "evaluate", "example_from", "few", "scoring_batches"]


def as_loader(data: Any, batch_size: int, workers: int = 0, shuffle: bool = True, seed: int = 0) -> Iterable[Any]:
    """A map-style dataset becomes a DataLoader; anything that yields batches stays what it is.

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
    if isinstance(data, Dataset):
        if len(data) == 0:  # type: ignore[arg-type]
            raise DataError("the dataset is empty; give one with at least one example")
        generator = torch.Generator().manual_seed(seed) if shuffle else None
        return DataLoader(
            data, batch_size=batch_size, shuffle=shuffle, num_workers=workers, generator=generator, drop_last=False
        )
    return materialise(data)


def scoring_batches(data: Any, loader: Iterable[Any], batch_size: int, count: int, seed: int = 0) -> list[Any]:
    """A few fixed batches to score on: drawn at random from a dataset, the first ones of a loader.

    Args:
        data: what the user gave.
        loader: what :func:`as_loader` made of it.
        batch_size: examples per batch, if ``data`` is a dataset.
        count: number of batches.
        seed: of the draw.

    Raises:
        DataError: if there is no batch.
    """
    if isinstance(data, Dataset):
        total = len(data)  # type: ignore[arg-type]
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        chunks = [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]
        return [_collate(data, chunk) for chunk in chunks if chunk]
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == count:
            break
    if not batches:
        raise DataError("the data is empty: no batch of (inputs, targets) to score on")
    return batches


def _collate(data: Any, chunk: list[int]) -> Any:
    try:
        return default_collate([data[i] for i in chunk])
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"{len(chunk)} examples of the dataset do not make a batch: {error}; give them one shape, or give a "
            "DataLoader with its own collate_fn"
        ) from error


def example_from(batch: Any, device: torch.device, examples: int = 2) -> Any:
    """The inputs of the first few examples of a batch, for tracing."""
    inputs, _ = split_batch(batch)
    return to_device(few(inputs, examples), device)


def few(value: Any, count: int) -> Any:
    """The first ``count`` examples of a batch, in tensors, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value[:count] if value.ndim else value
    if isinstance(value, dict):
        return {k: few(v, count) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(few(v, count) for v in value)
    return value


def evaluate(model: nn.Module, batches: Iterable[Any]) -> float | None:
    """Top-1 accuracy in [0, 1], in eval mode; None if outputs are not class scores or targets not class indices.

    Example:
        >>> evaluate(torch.nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])
        0.5
    """
    device = model_device(model)
    right = total = 0
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in batches:
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
            usable = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.ndim == 2
            if not usable or targets.ndim != 1 or targets.is_floating_point():
                return None
            right += int((outputs.argmax(1) == targets).sum())
            total += len(targets)
    return right / total if total else None
