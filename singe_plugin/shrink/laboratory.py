"""A model runs here on other values than its own: random parameters, leaking rectifiers, double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from singe_plugin.axes import AxisGraph
from singe_plugin.axes.substitutes import (
    NormsOfTheRest,
    double_inputs,
    in_double,
    normal,
    random_inputs,
    uniform,
)
from singe_plugin.axes.values import Values
from singe_plugin.errors import is_of_the_machine
from singe_plugin.nested import results_in
from singe_plugin.run.data import few
from singe_plugin.state import plain_layers, preserved

from .holes import Holes, Units, slices_of

__all__ = ["Laboratory", "OpenFunctions"]

_SLOPE = 0.3
_SIDES = (64, 96, 128, 160, 192, 224, 256)  # of images for experiments, if smaller than the example's
_RECTIFIERS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
_CLAMPS = frozenset({"clamp", "clamp_", "clamp_min", "clamp_min_"})
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"hardsigmoid": torch.sigmoid, "hardswish": functional.silu}


class OpenFunctions(TorchFunctionMode):
    """While active, no function is flat anywhere, so that nothing is zero by luck: rectifiers leak.

    Args:
        norms: whether norms over channels only do what they do to a channel alone, ``weight * x``.
    """

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        self.norms = norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        inplace = name.endswith("_") or kwargs.get("inplace") is True or any(a is True for a in args[1:])
        if name in _CLAMPS:
            limits = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
            name = "relu" if limits.get("min") == 0 and limits.get("max") is None else ""
        if name in _RECTIFIERS:
            return functional.leaky_relu(x, _SLOPE, inplace=inplace)
        if name in _GATES:
            return _GATES[name](x)
        if self.norms and name in ("layer_norm", "rms_norm", "group_norm"):
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            if weight is not None and name == "group_norm":
                weight = weight.view(-1, *[1] * (x.ndim - 2))
            return x * (1.0 if weight is None else weight)
        return func(*args, **kwargs)


class Laboratory:
    """Runs a model on other values than its own, and leaves it as it was.

    Args:
        graph: the graph of the model.
        example: what the model is compared on; what is found out about it is found with random numbers.

    Attributes:
        double: whether the model computes in double precision.
        trouble: why nothing can be found out about any unit; None if it can.
        start: what the model computes on the example and on noise.
    """

    def __init__(self, graph: AxisGraph, example: Any) -> None:
        self.graph, self.double = graph, True
        self.trouble: str | None = None
        example = few(example, 1) if _is_image(example) else example
        try:
            start = self.run(example)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            self.double = False  # something in the model insists on single precision
            start = self.run(example)
        noise = random_inputs(example)
        made = self._attempt(noise)
        self.examples = [example] if made is None else [example, noise]
        self.start = [*start, *(made or ())]
        usable = (x for x in _candidates(graph.inputs) if self._attempt(random_inputs(x)) is not None)
        self.inputs: Any = next(usable, None)

    def _attempt(self, inputs: Any) -> list[Tensor] | None:
        """Return what the model makes of other inputs; None if it fails, or does not take them the same way."""
        try:
            with NormsOfTheRest(self.graph, {}) as watch:
                made = self.run(inputs)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            return None
        usable = self.as_traced(watch) and all(bool(t.isfinite().all()) for t in made)
        return made if usable else None

    def as_traced(self, watch: NormsOfTheRest) -> bool:
        """Say whether the operators that take channels together ran as often as in the trace."""
        trace = self.graph.trace
        return all(watch.counts[name] == trace.count(name) for name, _ in trace.mixing)

    def noise(self, seed: int) -> Any:
        """Return random inputs, or the example itself if the model does not run on others."""
        return self.graph.inputs if self.inputs is None else random_inputs(self.inputs, seed)

    def outputs(self) -> list[Tensor]:
        """Return what the model computes now, on the example and on noise."""
        with self.running():
            return [t for x in self.examples for t in self.forward(x)]

    def run(self, inputs: Any) -> list[Tensor]:
        """Return what the model computes in eval mode."""
        with self.running():
            return self.forward(inputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the model in eval mode, and in double precision if it can compute so."""
        model = self.graph.model
        with preserved(model), plain_layers(model), ExitStack() as stack, torch.no_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None  # it would pin the type
            if self.double:
                stack.enter_context(in_double(model))
            yield

    def forward(self, inputs: Any) -> list[Tensor]:
        """Return the floating-point outputs of the model as it is set now; called in :meth:`running`."""
        model = self.graph.model
        with preserved(model):
            self.graph.trace.forget()
            made = self.graph.forward(model, double_inputs(inputs) if self.double else inputs)
            return [t for t in results_in(made) if t.is_floating_point()]

    @contextmanager
    def drawn(self, holes: Holes, seed: int, kept: Units | None = None) -> Iterator[None]:
        """Hold random parameters and statistics, with zeros in the holes; ``kept`` units keep their own values.

        Numbers without dimensions (temperatures) and buffers that are no statistics keep theirs, too.
        """
        generator, model, values = torch.Generator().manual_seed(seed), self.graph.model, Values()
        own: dict[int, Tensor] = {}
        for part, flags in slices_of(kept or {}):
            own[id(part.tensor)] = own[id(part.tensor)] | flags if id(part.tensor) in own else flags
        drawn: list[tuple[Tensor, Tensor]] = []
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                drawn.append((buffer, uniform(buffer, generator)))
            elif name.endswith("running_mean"):
                drawn.append((buffer, 0.2 * normal(buffer, generator)))
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.ndim or not parameter.numel():
                continue
            if parameter.numel() == max(parameter.shape):
                value = uniform(parameter, generator) * normal(parameter, generator).sign()
            else:
                value = normal(parameter, generator) / (parameter.numel() / len(parameter)) ** 0.5
            drawn.append((parameter, value.masked_fill(holes[id(parameter)], 0.0)))
        with preserved(model):
            try:
                for tensor, value in drawn:
                    mine = own.get(id(tensor))
                    values.put(tensor, value if mine is None else torch.where(mine, tensor.data, value))
                yield
            finally:
                values.restore()


def _is_image(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4


def _candidates(inputs: Any) -> Iterator[Any]:
    """Yield several examples at a time, and smaller images first.

    One is not enough: the gradient of a batch-norm in eval mode can be wrong on CPU, and what is off for it may be on.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
        count = 2 if inputs.ndim > 3 else 8
        several = inputs.repeat(-(-count // max(len(inputs), 1)), *[1] * (inputs.ndim - 1))[:count]
        if _is_image(several):
            yield from (several[:, :, :side, :side] for side in _SIDES if side < min(several.shape[2:]))
        yield several
    yield inputs
