"""Which masked units nobody can miss, whatever the values of the parameters that are not masked.

A unit that happens to be silent on some inputs (a rectifier that is off, a branch that was initialised with zeros) must
stay. So little is concluded from the model's own values: all that is not masked is drawn at random, rectifiers let both
signs pass, and a unit is *silent* if none of its parameters moves the outputs then. Removing it has to change nothing,
neither then nor for the model's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from singe_plugin.axes import AxisGraph, Group
from singe_plugin.axes.algebra import labels
from singe_plugin.axes.substitutes import (
    NormsOfTheRest,
    Values,
    double_inputs,
    in_double,
    normal,
    random_inputs,
    uniform,
)
from singe_plugin.data import few
from singe_plugin.nested import tensors_in
from singe_plugin.state import plain_layers, preserved

from .holes import Holes, Units, line_of, slices_of, units_at

__all__ = ["Laboratory", "OpenFunctions"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_DRAWS, _SLOPE = 3, 0.3
_SIDES = (64, 96, 128, 160, 192, 224, 256)  # of images for experiments, if smaller than the example's
_RECTIFIERS = frozenset({"relu", "relu_", "relu6", "hardtanh", "hardtanh_"})
_CLAMPS = frozenset({"clamp", "clamp_", "clamp_min", "clamp_min_"})
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"hardsigmoid": torch.sigmoid, "hardswish": functional.silu}


class OpenFunctions(TorchFunctionMode):
    """While active, no function is flat anywhere, so that nothing is zero by luck: rectifiers leak.

    Args:
        norms: also take norms over channels for what they do to a channel alone, ``weight * x``.
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
        trouble: why nothing can be found out; None if it can.
        start: what the model computes on the example and on noise.
    """

    def __init__(self, graph: AxisGraph, example: Any) -> None:
        self.graph, self.double = graph, True
        self.trouble: str | None = None
        example = few(example, 1) if _is_image(example) else example
        try:
            start = self.run(example)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception:  # something in the model insists on single precision
            self.double = False
            start = self.run(example)
        noise = random_inputs(example)
        made = self._attempt(noise)
        self.examples = [example] if made is None else [example, noise]
        self.start = [*start, *(made or ())]
        usable = (x for x in _candidates(graph.inputs) if self._attempt(random_inputs(x)) is not None)
        self.inputs: Any = next(usable, None)

    def _attempt(self, inputs: Any) -> list[Tensor] | None:
        """What the model makes of other inputs; None if it fails, or does not take them the same way."""
        try:
            with NormsOfTheRest(self.graph, {}) as watch:
                made = self.run(inputs)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception:
            return None
        usable = self.as_traced(watch) and all(bool(t.isfinite().all()) for t in made)
        return made if usable else None

    def as_traced(self, watch: NormsOfTheRest) -> bool:
        """Whether the operators that take channels together ran as often as in the trace."""
        trace = self.graph.trace
        return all(watch.counts[name] == trace.count(name) for name, _ in trace.mixing)

    def noise(self, seed: int) -> Any:
        """Random inputs; the example itself, if the model does not run on others."""
        return self.graph.inputs if self.inputs is None else random_inputs(self.inputs, seed)

    def outputs(self) -> list[Tensor]:
        """What the model computes now, on the example and on noise."""
        with self.running():
            return [t for x in self.examples for t in self._forward(x)]

    def run(self, inputs: Any) -> list[Tensor]:
        """What the model computes in eval mode."""
        with self.running():
            return self._forward(inputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model in eval mode, and in double precision if it can."""
        model = self.graph.model
        with preserved(model), plain_layers(model), ExitStack() as stack, torch.no_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None  # it would pin the type
            if self.double:
                stack.enter_context(in_double(model))
            yield

    def _forward(self, inputs: Any) -> list[Tensor]:
        model = self.graph.model
        with preserved(model):
            self.graph.trace.forget()
            made = self.graph.forward(model, double_inputs(inputs) if self.double else inputs)
            return [t for t in tensors_in(made) if t.is_floating_point()]

    @contextmanager
    def drawn(self, holes: Holes, seed: int, kept: Units | None = None) -> Iterator[None]:
        """Random parameters and statistics, with zeros in the holes; ``kept`` units have their own values everywhere.

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

    def silent(self, holes: Holes, norms: bool = False) -> dict[Group, Tensor]:
        """The units through which no parameter moves the outputs, for random values of all that is not in a hole."""
        found = {g: torch.ones(g.size, dtype=torch.bool) for g in self.graph.groups.values()}
        for seed in range(_DRAWS):
            with self.drawn(holes, seed), self.running():
                try:
                    moving = self._moving(seed, norms)
                except (MemoryError, torch.cuda.OutOfMemoryError):
                    raise
                except Exception as error:
                    self.trouble = f"its gradient cannot be taken ({type(error).__name__}: {error})"
                    return {g: torch.zeros_like(units) for g, units in found.items()}
                flags: dict[tuple[int, int], Tensor] = {}
                for group, units in found.items():
                    for part in group.slices():
                        key = id(part.tensor), part.dim
                        if part.is_parameter and key[0] in moving:
                            if key not in flags:
                                flags[key] = line_of(moving[key[0]], part.dim)
                            units &= ~units_at(flags[key], part.units, group.size)
        return found

    def _moving(self, seed: int, norms: bool) -> dict[int, Tensor]:
        """Per parameter, the entries that are not zero and have a gradient."""
        parameters = [p for p in self.graph.model.parameters() if p.is_floating_point() and p.numel()]
        with torch.enable_grad(), OpenFunctions(norms):
            for parameter in parameters:
                parameter.requires_grad_(True)
            outputs = self._forward(self.noise(seed))
            total: Any = sum((t * normal(t, torch.Generator().manual_seed(seed))).sum() for t in outputs)
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {id(p): (g != 0) & (p.detach() != 0) for p, g in zip(parameters, found, strict=True) if g is not None}

    def constant(self, holes: Holes) -> dict[Group, Tensor]:
        """The units of which every reader sees the same, whatever the model's inputs are.

        Only convolutions and linear layers that are called as modules are watched; what others read is not constant.
        """
        first, second = self.noise(0), _moved_on(self.noise(1000))
        groups = list(self.graph.groups.values())
        if all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(second), strict=True)):
            return {group: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        found = {group: torch.ones(group.size, dtype=torch.bool) for group in groups}
        for seed in range(_DRAWS):
            with self.drawn(holes, seed), OpenFunctions():
                try:
                    with self.running():
                        one = self._seen(first, _projected)
                    with _other_words(self.graph.model), self.running():
                        other = self._seen(second, _projected)
                except (MemoryError, torch.cuda.OutOfMemoryError):
                    raise
                except Exception:  # the model takes no other inputs
                    one, other = {}, {}
            differ = {
                module: torch.stack([a != b for a, b in zip(calls, other[module], strict=True)]).any(0)
                for module, calls in one.items()
                if len(calls) == len(other.get(module, ()))
            }
            for group, units in found.items():
                units &= ~self._heard(group, differ, holes)
        return found

    def loud(self, holes: Holes) -> dict[Group, Tensor]:
        """The units of which a reader sees anything but zeros, for the model's own values."""
        with self.running():
            seen = self._seen(self.graph.inputs, _largest)
        flags = {module: torch.stack(calls).amax(0) != 0 for module, calls in seen.items()}
        return {group: self._heard(group, flags, holes) for group in self.graph.groups.values()}

    def _seen(self, inputs: Any, summary: Callable[[Tensor, int], Tensor]) -> dict[nn.Module, list[Tensor]]:
        """A number per input channel for every call of every layer."""
        found: dict[nn.Module, list[Tensor]] = {}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                found.setdefault(module, []).append(summary(args[0], _channel_dim(module, args[0].ndim)).cpu())

        handles = [m.register_forward_pre_hook(note) for m in self.graph.model.modules() if isinstance(m, _LAYERS)]
        try:
            self._forward(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _heard(self, group: Group, flags: Mapping[nn.Module, Tensor], holes: Holes) -> Tensor:
        """The units that a layer with weights for them has a flag for; of layers without flags, all."""
        heard = torch.zeros(group.size, dtype=torch.bool)
        readers = [p for p in group.slices() if p.is_parameter and p.reads and not isinstance(p.owner, nn.PReLU)]
        for part in readers:
            used = units_at(line_of(~holes[id(part.tensor)], part.dim), part.units, group.size)
            mine, axes = flags.get(part.owner), self.graph.trace.inputs.get(part.owner)
            if mine is not None and axes:
                unit_of = labels(axes[0][_channel_dim(part.owner, len(axes[0]))], group.leaf.root())
                if len(unit_of) == len(mine):
                    used &= units_at(mine, unit_of, group.size)
            heard |= used
        return heard if readers else torch.ones_like(heard)


def _is_image(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4


def _candidates(inputs: Any) -> Iterator[Any]:
    """Several examples, and smaller images first.

    One is not enough: the gradient of a batch-norm in eval mode can be wrong on CPU, and what is off for it may be on.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
        count = 2 if inputs.ndim > 3 else 8
        several = inputs.repeat(-(-count // max(len(inputs), 1)), *[1] * (inputs.ndim - 1))[:count]
        if _is_image(several):
            yield from (several[:, :, :side, :side] for side in _SIDES if side < min(several.shape[2:]))
        yield several
    yield inputs


def _channel_dim(layer: nn.Module, ndim: int) -> int:
    """Where the input channels of a convolution or linear layer are."""
    weight = layer._parameters.get("weight")
    return ndim - 1 if weight is None or isinstance(layer, nn.Linear) else ndim - weight.ndim + 1


def _projected(x: Tensor, dim: int) -> Tensor:
    """A random projection of each channel: two that are equal bit for bit come from equal channels."""
    probe = uniform(x, torch.Generator().manual_seed(0))
    return (x * probe).movedim(dim, 0).flatten(1).sum(1)


def _largest(x: Tensor, dim: int) -> Tensor:
    return x.abs().movedim(dim, 0).flatten(1).amax(1).nan_to_num(nan=1.0)


def _moved_on(inputs: Any) -> Any:
    """Other whole numbers (ids, attention masks) that are as valid: the first twice, the last not at all."""
    if isinstance(inputs, Tensor):
        flat = inputs.flatten()
        return inputs if inputs.is_floating_point() else torch.cat([flat[:1], flat[:-1]]).view_as(inputs)
    if isinstance(inputs, Mapping):
        return {k: _moved_on(v) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [_moved_on(v) for v in inputs]
    return inputs


@contextmanager
def _other_words(model: nn.Module) -> Iterator[None]:
    """Every id stands for another word, so that what is made of words is no constant, whatever the ids."""
    values = Values()
    try:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                values.put(module.weight, module.weight.data.roll(1, 0))
        yield
    finally:
        values.restore()
