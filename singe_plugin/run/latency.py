"""How long a forward pass takes, with its spread and what it was measured with; and two networks against each other.

Two are timed in turn, pass by pass, so that whatever else a machine does happens to both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from singe_plugin.checks import check_count
from singe_plugin.errors import ConfigError
from singe_plugin.loop.costs import structure_of
from singe_plugin.loop.distillation import frozen_copy
from singe_plugin.loop.times import Timing
from singe_plugin.nested import are_images, examples_in, map_tensors, tensors_in
from singe_plugin.ranks import current
from singe_plugin.run.backends import Runner, find_backend, now
from singe_plugin.state import model_device, preserved

__all__ = [
    "Latency", "Stopwatch", "dtype_of", "latency_of", "measure_latency", "threads_of", "timed_inputs",
]  # fmt: skip

FEWEST, MOST, SECONDS = 30, 300, 2.0  # passes of each of two networks, and how long those of one may take
_WARM = 3


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass; comparable with others of one machine, batch and number of threads only.

    Attributes:
        median_ms: the median over the repeats, in milliseconds.
        iqr_ms: the distance between the quartiles.
        batch: the number of examples.
        threads: what the backend was allowed to use on the CPU.
        device: where the model is; a CUDA device with its name.
        dtype: of its weights.
        backend: what ran it, with its version.

    Example:
        >>> print(Latency(12.345, 0.678, 16, 2, "cpu", "float32", "torch 2.9"))
        12.35 ms (quartiles 0.68 ms apart; 16 examples, 2 threads, cpu, float32, torch 2.9)
    """

    median_ms: float
    iqr_ms: float
    batch: int
    threads: int
    device: str
    dtype: str = ""
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ms (quartiles {self.iqr_ms:.2f} ms apart; {self.conditions})"

    @property
    def conditions(self) -> str:
        """What it was measured with."""
        examples, threads = (f"{n} {what}{'' if n == 1 else 's'}" for n, what in
                             ((self.batch, "example"), (self.threads, "thread")))  # fmt: skip
        return ", ".join(filter(None, (examples, threads, self.device, self.dtype, self.backend)))


def latency_of(
    model: nn.Module, example_inputs: Any, repeats: int = 20, warmup: int = _WARM, timing: Timing | None = None
) -> Latency:
    """Time the forward pass in eval mode, on the model's device.

    As ``torch.utils.benchmark`` does it, whose import brings setuptools' import hooks and a search for compilers.

    Args:
        model: as it is afterwards, too.
        example_inputs: a tensor, a tuple of arguments or a mapping of keywords.
        repeats: how many passes are timed.
        warmup: how many go before.
        timing: the backend, batch and threads; by default PyTorch, the inputs as they are, and its threads.

    Raises:
        ConfigError: if nothing would be timed.

    Example:
        >>> found = latency_of(torch.nn.Linear(3, 2), torch.zeros(4, 3))
        >>> found.median_ms > 0, found.batch, found.device
        (True, 4, 'cpu')
    """
    check_count("repeats", repeats, 1, "number of passes")
    check_count("warmup", warmup, 0, "number of passes")
    timing = timing or Timing()
    inputs = timed_inputs(example_inputs, timing.batch)
    device = model_device(model)
    with _quiet(model, timing) as threads:
        run = find_backend(timing.backend).runner(model, inputs, threads)
        (times,) = _in_turn([run], device, repeats, warmup)
    return _latency(times, model, inputs, threads, timing)


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 20, warmup: int = _WARM) -> float:
    """The median of :func:`latency_of`, in milliseconds.

    Example:
        >>> measure_latency(torch.nn.Linear(3, 2), torch.zeros(4, 3)) > 0
        True
    """
    return latency_of(model, example_inputs, repeats, warmup).median_ms


def timed_inputs(example_inputs: Any, batch: int | None) -> Any:
    """The inputs that are timed: as they are, or their first example so many times.

    Raises:
        ConfigError: if the inputs are no batch of examples.

    Example:
        >>> timed_inputs({"x": torch.zeros(2, 3), "scale": torch.ones(())}, 5)["x"].shape
        torch.Size([5, 3])
    """
    if batch is None:
        return example_inputs
    size = examples_in(example_inputs)
    given = list(example_inputs) if isinstance(example_inputs, (tuple, list)) else [example_inputs]
    if not size or any(map(are_images, given)):
        raise ConfigError(
            f"latency batch={batch} was asked for, but the example inputs are no batch; leave it out, and give the "
            "inputs that are to be timed as example_inputs"
        )

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim or len(tensor) != size:
            return tensor
        return tensor[:1].expand(batch, *tensor.shape[1:]).contiguous()

    return map_tensors(repeated, example_inputs)


@contextmanager
def _quiet(model: nn.Module, timing: Timing) -> Iterator[int]:
    """Eval mode, no gradients, the model's device, and the threads that were asked for: their number."""
    before, device = torch.get_num_threads(), model_device(model)
    threads = threads_of(timing)
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    torch.set_num_threads(threads)
    try:
        with preserved(model), torch.no_grad(), current:
            model.eval()
            yield threads
    finally:
        torch.set_num_threads(before)


def _in_turn(runners: list[Runner], device: torch.device, repeats: int | None, warmup: int) -> list[list[float]]:
    """The milliseconds of every pass of each, one after the other in every repeat."""
    found: list[list[float]] = [[] for _ in runners]
    for run in runners:
        for _ in range(warmup):
            run()
    if repeats is None:
        start = now(device)
        runners[0]()
        repeats = round(min(max(SECONDS / max(now(device) - start, 1e-9), FEWEST), MOST))
    for _ in range(repeats):
        for times, run in zip(found, runners, strict=True):
            start = now(device)
            run()
            times.append(1000 * (now(device) - start))
    return found


def _latency(times: list[float], model: nn.Module, inputs: Any, threads: int, timing: Timing) -> Latency:
    device = model_device(model)
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    batch = next((len(tensor) for tensor in tensors_in(inputs) if tensor.ndim), 1)
    named = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Latency(median, high - low, batch, threads, named, dtype_of(model), find_backend(timing.backend).version())


def threads_of(timing: Timing) -> int:
    """How many threads a backend may use on the CPU."""
    return torch.get_num_threads() if timing.threads is None else timing.threads


def dtype_of(model: nn.Module) -> str:
    """The precision of a model's weights, in a word.

    Example:
        >>> dtype_of(nn.Linear(1, 1)), dtype_of(nn.ReLU())
        ('float32', '')
    """
    return next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "")


class Stopwatch:
    """Times a network against what it was when this was made.

    Every structure is timed once: asked again of the same widths, the answer is the same.

    Args:
        model: the network that others are held against; it is copied, or exported.
        example_inputs: what it is called with.
        timing: the backend, batch, threads and repeats.

    Raises:
        ConfigError: if the model cannot be copied or exported.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> watch = Stopwatch(net, torch.zeros(4, 3), Timing(repeats=3))
        >>> before, after = watch.compare(net)
        >>> before.conditions == after.conditions, watch.ratio(net) == watch.ratio(net)
        (True, True)
    """

    def __init__(self, model: nn.Module, example_inputs: Any, timing: Timing) -> None:
        self.timing, self.inputs = timing, timed_inputs(example_inputs, timing.batch)
        copy = frozen_copy(model, "timing it against the pruned one needs", "give another model")
        self._first = copy.cpu()  # where memory is scarce, it is needed for moments only
        self._found: dict[Any, tuple[Latency, Latency, list[float]]] = {}
        self._runner: Runner | None = None

    def compare(self, model: nn.Module) -> tuple[Latency, Latency]:
        """The time of the first network and of this one, measured in turn; by rank 0, of several."""
        before, after, _ = self._of(model)
        return before, after

    def ratio(self, model: nn.Module) -> float:
        """The time of this network, as a fraction of the first one's: the median over the pairs of passes.

        What a machine does besides for longer than a pass is in both of a pair, and in no ratio.
        """
        return self.quartiles(model)[1]

    def quartiles(self, model: nn.Module) -> list[float]:
        """The lower quartile, the median and the upper quartile of :meth:`ratio` over the pairs of passes."""
        return self._of(model)[2]

    def spread(self, model: nn.Module, layers: Collection[str]) -> dict[str, float]:
        """How this network's time is spread over layers, see :class:`~singe_plugin.run.backends.Backend`; rank 0's."""
        ranks, found = current(), {}
        if ranks.main:
            with _quiet(model, self.timing) as threads:
                found = find_backend(self.timing.backend).spread(model, self.inputs, layers, threads)
        return ranks.first("the latency of the layers", found)

    def _of(self, model: nn.Module) -> tuple[Latency, Latency, list[float]]:
        structure = structure_of(model)
        if structure not in self._found:
            ranks = current()
            self._found[structure] = ranks.first("the latency", self._compare(model) if ranks.main else None)  # type: ignore[assignment]
        return self._found[structure]

    def _compare(self, model: nn.Module) -> tuple[Latency, Latency, list[float]]:
        device, backend = model_device(model), find_backend(self.timing.backend)
        if model_device(self._first) != device:
            self._first.to(device)
            self._runner = None
        with _quiet(self._first, self.timing), _quiet(model, self.timing) as threads:
            if self._runner is None or self.timing.backend == "compile":
                self._runner = backend.runner(self._first, self.inputs, threads)
            runners = [self._runner, backend.runner(model, self.inputs, threads)]
            first, this = _in_turn(runners, device, self.timing.repeats, _WARM)
        return (
            _latency(first, self._first, self.inputs, threads, self.timing),
            _latency(this, model, self.inputs, threads, self.timing),
            np.percentile(np.divide(this, np.maximum(first, 1e-9)), (25, 50, 75)).tolist(),  # a clock may stand still
        )
