"""How long a forward pass takes, with its spread and what it was measured with."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from singe_plugin.checks import check_count
from singe_plugin.nested import call_model, tensors_in
from singe_plugin.state import model_device, preserved

__all__ = ["Latency", "latency_of", "measure_latency"]


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass; comparable with others of one machine, batch and number of threads only.

    Attributes:
        median_ms: the median over the repeats, in milliseconds.
        iqr_ms: the distance between the quartiles.
        batch: the number of examples.
        threads: what PyTorch was allowed to use on the CPU.
        device: where the model is; a CUDA device with its name.

    Example:
        >>> print(Latency(12.345, 0.678, 16, 2, "cpu"))
        12.35 ms (quartiles 0.68 ms apart; 16 examples, 2 threads, cpu)
    """

    median_ms: float
    iqr_ms: float
    batch: int
    threads: int
    device: str

    def __str__(self) -> str:
        what = f"{self.batch} examples, {self.threads} threads, {self.device}"
        return f"{self.median_ms:.2f} ms (quartiles {self.iqr_ms:.2f} ms apart; {what})"


def latency_of(model: nn.Module, example_inputs: Any, repeats: int = 20, warmup: int = 3) -> Latency:
    """Time the forward pass in eval mode, on the model's device.

    As ``torch.utils.benchmark`` does it, whose import brings setuptools' import hooks and a search for compilers.

    Args:
        model: as it is afterwards, too.
        example_inputs: a tensor, a tuple of arguments or a mapping of keywords.
        repeats: how many passes are timed.
        warmup: how many go before.

    Raises:
        ConfigError: if nothing would be timed.

    Example:
        >>> found = latency_of(torch.nn.Linear(3, 2), torch.zeros(4, 3))
        >>> found.median_ms > 0, found.batch, found.device
        (True, 4, 'cpu')
    """
    check_count("repeats", repeats, 1, "number of passes")
    check_count("warmup", warmup, 0, "number of passes")
    device, threads, times = model_device(model), torch.get_num_threads(), []
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with preserved(model), torch.no_grad(), current:
        model.eval()
        for _ in range(warmup):
            call_model(model, example_inputs)
        for _ in range(repeats):
            start = _now(device)
            call_model(model, example_inputs)
            times.append(1000 * (_now(device) - start))
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    batch = next((len(tensor) for tensor in tensors_in(example_inputs) if tensor.ndim), 1)
    named = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Latency(median, high - low, batch, threads, named)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 20, warmup: int = 3) -> float:
    """The median of :func:`latency_of`, in milliseconds.

    Example:
        >>> measure_latency(torch.nn.Linear(3, 2), torch.zeros(4, 3)) > 0
        True
    """
    return latency_of(model, example_inputs, repeats, warmup).median_ms
