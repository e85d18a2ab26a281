"""A model to try things out on: randomised, on random inputs, in the most exact arithmetic that it runs in.

So nothing passes because it is all ones and zeros, and a change of the function is told from rounding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.errors import GroupError, is_of_the_machine
from singe_plugin.nested import map_tensors, results_in, tensors_in
from singe_plugin.state import RngState, casts_forgotten, containers_training, plain_layers, preserved
from singe_plugin.undo import Contents

from .choices import Choices, Repeated
from .graph import AxisGraph
from .grouped import PlainGroups
from .groups import Group, Together
from .removal import remove_units
from .substitutes import SharedNoise, double_inputs, in_double, random_inputs, randomised
from .values import Copies, Values
from .widths import tensor_of

__all__ = ["EXACT", "TOLERANCE", "Bench", "bench_elsewhere", "opened_bench", "own_start", "same_start"]

TOLERANCE = 1e-4  # of the output, in single precision
EXACT = 1e-10  # in double precision
_ROUNDED = 1e-6  # in double precision, but with constants that the model computed and kept in single precision
_SIDES = (96, 112, 128, 160, 192, 224, 256)  # image sizes that verification tries, if smaller than the example


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and notices results and operands in less than double precision.

    A constant that the model makes in single precision is no result: only what is rounded is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.single = self.rounded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[func._schema.name.split("::")[1]] += 1
        operands = list(tensors_in((args, kwargs)))
        if isinstance(out, Tensor) and _is_single(out):
            self.single = self.single or any(t.dtype == torch.float64 for t in operands)
        self.rounded = self.rounded or any(map(_is_single, operands))
        return out


def _is_single(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


class Bench:
    """A randomised model on random inputs, and how exactly it computes.

    What the model is now is what every trial starts from.

    Args:
        graph: the graph of the model.
        inputs: the inputs.
        base: its outputs.
        tolerance: how far outputs that should be the same may differ.
        sources: what the data of parameters are copies of, where they are; by the id of the parameter.
        part: the module that runs, where only a part of the model does; None is all of it.
        groups: that are tried out, where only a part runs; None is all of the graph.
        before: how often operators ran before that part.
        choices: that it made on the way to these outputs.
    """

    def __init__(
        self,
        graph: AxisGraph,
        inputs: Any,
        base: list[Tensor],
        tolerance: float,
        sources: Mapping[int, Tensor],
        part: nn.Module | None = None,
        groups: Sequence[Group] | None = None,
        before: Mapping[str, int] | None = None,
        choices: Choices | None = None,
    ) -> None:
        self.choices = Choices() if choices is None else choices
        self.graph, self.inputs, self.base, self.tolerance, self.sources = graph, inputs, base, tolerance, sources
        self.module, self.before = graph.model if part is None else part, before or {}
        self._start, self._rng = Contents([self.module]), RngState.capture()
        self._rewind = (graph if groups is None else Together(groups)).rewinder()

    def run(self) -> list[Tensor]:
        """Compute the outputs: every run starts from the same state of the model and the same random numbers."""
        try:
            return self._outputs()
        finally:
            self._back()

    def repeating(self, choices: Choices | None = None) -> Repeated:
        """What lets runs choose as in another one, by default that of the base, where rounding would decide."""
        return Repeated(self.choices if choices is None else choices, self.tolerance)

    def run_without(self, rounds: Sequence[Mapping[Group, Sequence[int]]]) -> list[Tensor]:
        """Compute the outputs when units were really removed, and put them back.

        Args:
            rounds: the units of each group that are gone after the first round of removals, after the second, and so
                on.
        """
        values, gone = self.values(), dict[Group, Sequence[int]]()
        try:
            for tensor in self._tensors_of(rounds[-1]):
                values.keep(tensor)
            for chosen in rounds:
                for group, units in chosen.items():
                    remove_units(self.graph, group, _renumbered(units, gone.get(group, ())), undo=False)
                    gone[group] = units
            return self._outputs()
        finally:
            values.restore()
            self._rewind()
            self._back()

    def values(self) -> Values:
        """What replaces the data of tensors for a trial."""
        return Copies(self.sources)

    def _tensors_of(self, groups: Iterable[Group]) -> Iterator[Tensor]:
        """What a removal changes: everything that units are part of, and what makes up for a smaller width."""
        for group in groups:
            yield from (part.tensor for part in group.slices())
            for made in self.graph.made(group.leaf.root()):
                yield from (t for source in made.weight.sources() if (t := tensor_of(*source)) is not None)
            for scale in self.graph.index.widths(group.leaf.root()):
                yield from (owner._parameters[attr] for owner, attr, _ in scale.rows)  # type: ignore[misc]

    def _outputs(self) -> list[Tensor]:
        with casts_forgotten(), own_start(self.graph, self.module), torch.no_grad():
            return list(results_in(self._called()))

    def _called(self) -> Any:
        """What the model returns."""
        return self.graph.forward(self.graph.model, self.inputs)

    def _back(self) -> None:
        self._start.restore()
        self._rng.restore()
        self._start.check()

    def explained(self, error: Exception, done: str) -> str:
        """Say a failure of the forward pass after a change to the model as a reason; one with another cause goes on.

        Raises:
            GroupError: if the model fails without the change, too.
        """
        if is_of_the_machine(error):
            raise error
        try:
            self.run()
        except Exception as again:
            if is_of_the_machine(again):
                raise
            raise GroupError(
                f"the model ran on random inputs, and now it fails with {type(again).__name__}: {again}; its forward "
                "pass must give the same for the same inputs and weights"
            ) from again
        return f"the forward pass fails when its units are {done} ({type(error).__name__}: {error})"


@contextmanager
def opened_bench(graph: AxisGraph, inputs: Any) -> Iterator[Bench]:
    """Open a bench: the randomised model with the most exact arithmetic and the smallest input that it runs on."""
    model = graph.model
    with ExitStack() as stack:
        stack.enter_context(randomised(model))
        with ExitStack() as precise:
            sources = precise.enter_context(in_double(model))
            for candidate in _candidates(inputs):
                noise = double_inputs(random_inputs(candidate))
                outcome = _attempt(graph, noise)
                if isinstance(outcome, tuple) and _same_path(graph, outcome[1]):
                    base, watch, choices = outcome
                    if watch.single:
                        break  # parts of the model compute in single precision: so do the oracles
                    stack.push(precise.pop_all())
                    exact = _ROUNDED if watch.rounded else EXACT
                    yield Bench(graph, noise, _finite(base), exact, sources, choices=choices)
                    return
        noise = random_inputs(inputs)
        outcome = _attempt(graph, noise)
        if not isinstance(outcome, tuple):
            raise GroupError(f"the model does not run on random inputs of the example's shape: {outcome}")
        yield Bench(graph, noise, _finite(outcome[0]), TOLERANCE, {}, choices=outcome[2])


@contextmanager
def bench_elsewhere(bench: Bench, inputs: Any, seed: int = 1) -> Iterator[Bench | None]:
    """Open a bench with other inputs and parameters, another number of examples and pixels, in training mode.

    As far as the model runs so: not every one takes other sizes. Single layers stay in eval mode. What is random
    comes from the seed; beyond the first, rows of the weights change their sign.
    """
    graph = bench.graph
    before = {id(p): p.data_ptr() for p in graph.model.parameters()}
    for mode in (containers_training, nullcontext):
        with randomised(graph.model, seed, bias=0.1, turned=seed > 1), mode(graph.model):
            for candidate in _other_inputs(inputs, bench.inputs):
                noise = random_inputs(candidate, seed)
                noise = double_inputs(noise) if bench.tolerance < TOLERANCE else noise
                outcome = _attempt(graph, noise)
                if isinstance(outcome, str) or not _same_path(graph, outcome[1]):
                    continue
                if all(bool(torch.isfinite(t).all()) for t in outcome[0] if t.is_floating_point()):
                    now = {id(p) for p in graph.model.parameters() if p.data_ptr() == before[id(p)]}
                    sources = {key: source for key, source in bench.sources.items() if key in now}
                    yield Bench(graph, noise, outcome[0], bench.tolerance, sources, choices=outcome[2])
                    return
    yield None


def _other_inputs(inputs: Any, used: Any) -> Iterator[Any]:
    """Yield more examples, of other image sizes first; then as many as before."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point():
        for side in (*_SIDES, min(inputs.shape[2:])):
            if side <= min(inputs.shape[2:]) and side != min(used.shape[2:]):
                yield _repeated(inputs[:, :, :side, :side], 3)
    for count in (3, 4):
        yield _repeated(used, count)
    yield used


def _renumbered(units: Sequence[int], gone: Sequence[int]) -> list[int]:
    """Return the present numbers of units, after those in ``gone`` were removed."""
    before, known = sorted(gone), set(gone)
    return [unit - bisect_left(before, unit) for unit in units if unit not in known]


def _repeated(inputs: Any, count: int) -> Any:
    """Repeat the examples of all tensors until they are as many as asked for."""
    return map_tensors(lambda t: t[torch.arange(count, device=t.device) % len(t)] if t.ndim and len(t) else t, inputs)


def _same_path(graph: AxisGraph, watch: _Watch) -> bool:
    """Whether the operators that mix channels are those of the trace."""
    names = {name for name, _ in graph.trace.mixing}
    return all(watch.counts[name] == graph.trace.count(name) for name in names)


def _finite(outputs: list[Tensor]) -> list[Tensor]:
    if not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
        raise GroupError("the model's output is not finite on random inputs, so groups cannot be verified")
    return outputs


def _attempt(graph: AxisGraph, inputs: Any) -> tuple[list[Tensor], _Watch, Choices] | str:
    watch, choices = _Watch(), Choices()
    try:
        with same_start(graph), torch.no_grad(), choices, watch:
            return list(results_in(graph.forward(graph.model, inputs))), watch, choices
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return f"{type(error).__name__}: {error}"


@contextmanager
def same_start(graph: AxisGraph) -> Iterator[None]:
    """Let a run of the model keep nothing for the next one, and draw the same random numbers for all units."""
    with preserved(graph.model), own_start(graph, graph.model):
        yield


@contextmanager
def own_start(graph: AxisGraph, module: nn.Module) -> Iterator[None]:
    """As :func:`same_start` of a model or a part, where its state is put back by whoever enters this."""
    with plain_layers(module):
        graph.trace.forget()
        with SharedNoise(), PlainGroups():
            yield


def _candidates(inputs: Any) -> Iterator[Any]:
    """Yield inputs to try: smaller images first, where the example is a batch of images."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point():
        for side in _SIDES:
            if side < min(inputs.shape[2:]):
                yield inputs[:2, :, :side, :side]
    yield inputs
