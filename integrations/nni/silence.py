"""Which masked units nobody can miss, whatever the values of the parameters that are not masked.

A unit that happens to be silent on some inputs (a rectifier that is off, a branch that was initialised with zeros) must
stay. So little is concluded from the model's own values: all that is not masked is drawn at random, rectifiers let both
signs pass, and a unit is *silent* if none of its parameters moves the outputs then. Removing it has to change nothing,
neither then nor for the model's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from singe_plugin.axes import AxisGraph, Group, Snapshot, UnitSlice, remove_units
from singe_plugin.axes.algebra import labels
from singe_plugin.axes.oracles import relative_change, sorted_out
from singe_plugin.axes.substitutes import NormsOfTheRest, Values, double_inputs, in_double, masked, random_inputs
from singe_plugin.errors import GroupError, SingeError
from singe_plugin.objective import tensors_in
from singe_plugin.state import caches_preserved, preserved

__all__ = [
    "Holes", "Laboratory", "OpenFunctions", "Trials", "Units", "change_of", "few", "holes_of", "masked_along",
    "touched", "with_units",
]  # fmt: skip

Holes = dict[int, Tensor]  # id of a parameter -> where it is masked
Units = Mapping[Group, Tensor]  # [N] bool

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_DRAWS, _SLOPE = 3, 0.3
_SIDES = (64, 96, 128, 160, 192, 224, 256)  # of images for experiments, if smaller than the example's
_SINGLE, _SINGLE_DRAWN = 1e-5, 1e-4  # what rounding may change in single precision
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


# -- masks and units ------------------------------------------------------------------------------------------------


def holes_of(model: nn.Module, twin: nn.Module) -> Holes:
    """Where the parameters of a model are masked, by a copy of it whose parameters are the masks."""
    masks = dict(twin.named_parameters())
    return {id(p): masks[name].detach() == 0 for name, p in model.named_parameters()}


def with_units(holes: Holes, chosen: Units) -> Holes:
    """Holes, and every slice of some units."""
    found = dict(holes)
    for part, flags in _parts(chosen):
        if part.is_parameter:
            found[id(part.tensor)] = found[id(part.tensor)] | flags
    return found


def _parts(chosen: Units) -> Iterator[tuple[UnitSlice, Tensor]]:
    """The slices of some units: where they are, shaped to fit the tensor they are of."""
    for group, units in chosen.items():
        for part in group.slices():
            unit_of = torch.from_numpy(part.units)
            flags = (unit_of >= 0) & units[unit_of.clamp(min=0)]
            tensor = part.tensor
            yield part, flags.to(tensor.device).view(-1, *[1] * (tensor.ndim - part.dim - 1)).expand_as(tensor)


def touched(graph: AxisGraph, holes: Holes) -> tuple[dict[Group, Tensor], dict[Group, Tensor]]:
    """The units of which a mask covers everything in some dimension of some parameter, and of these the unwritten ones.

    All that writes an unwritten unit is masked, biases and norms included: it is zero, whatever the rest is.
    """
    lines: dict[tuple[int, int], Tensor] = {}
    some, all_of = {}, {}
    for group in graph.groups.values():
        some[group] = torch.zeros(group.size, dtype=torch.bool)
        all_of[group] = torch.ones(group.size, dtype=torch.bool)
        for part in group.slices():
            if part.is_parameter:
                key = id(part.tensor), part.dim
                if key not in lines:
                    lines[key] = _along(~holes[key[0]], part.dim)
                there = _units_at(torch.ones_like(lines[key]), part.units, group.size)
                mine = there & ~_units_at(lines[key], part.units, group.size)
                some[group] |= mine
                if not part.reads:
                    all_of[group] &= mine | ~there
    return some, {group: units & some[group] for group, units in all_of.items()}


def masked_along(part: UnitSlice, holes: Holes, size: int) -> Tensor:
    """The units that a parameter has positions of, all of them masked: ``[N]`` bool."""
    there = _units_at(torch.ones(len(part.units), dtype=torch.bool), part.units, size)
    return there & ~_units_at(_along(~holes[id(part.tensor)], part.dim), part.units, size)


def _along(flags: Tensor, dim: int) -> Tensor:
    """Whether anything is set at each position along a dimension."""
    return (flags.movedim(dim, 0).flatten(1).any(1) if flags.ndim > 1 else flags).cpu()


def _units_at(positions: Tensor, unit_of: Any, size: int) -> Tensor:
    """The units that flagged positions belong to."""
    owner = torch.from_numpy(unit_of)
    found = torch.zeros(size, dtype=torch.bool)
    found[owner[positions & (owner >= 0)]] = True
    return found


# -- experiments ----------------------------------------------------------------------------------------------------


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
        except Exception:  # something in the model insists on single precision
            self.double = False
            start = self.run(example)
        noise = random_inputs(example)
        made = self._attempt(noise)
        self.examples = [example] if made is None else [example, noise]
        self.start = [*start, *(made or ())]
        self.inputs = next(
            (x for x in _candidates(graph.inputs) if self._attempt(random_inputs(x)) is not None), graph.inputs
        )

    def _attempt(self, inputs: Any) -> list[Tensor] | None:
        """What the model makes of other inputs; None if it fails, or does not take them the same way."""
        try:
            with NormsOfTheRest(self.graph, {}) as watch:
                made = self.run(inputs)
        except Exception:
            return None
        usable = _as_traced(watch, self.graph) and all(bool(t.isfinite().all()) for t in made)
        return made if usable else None

    def outputs(self) -> list[Tensor]:
        """What the model computes now, on the example and on noise."""
        return [t for x in self.examples for t in self.run(x)]

    def run(self, inputs: Any) -> list[Tensor]:
        """What the model computes in eval mode."""
        with self.running():
            return self._forward(inputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The model in eval mode, and in double precision if it can."""
        model = self.graph.model
        with preserved(model), ExitStack() as stack, torch.no_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None  # it would pin the type
            if self.double:
                stack.enter_context(in_double(model))
            yield

    def _forward(self, inputs: Any) -> list[Tensor]:
        model = self.graph.model
        with caches_preserved(model):
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
        for part, flags in _parts(kept or {}):
            own[id(part.tensor)] = own[id(part.tensor)] | flags if id(part.tensor) in own else flags
        drawn: list[tuple[Tensor, Tensor]] = []
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                drawn.append((buffer, _uniform(buffer, generator)))
            elif name.endswith("running_mean"):
                drawn.append((buffer, 0.2 * _normal(buffer, generator)))
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.ndim or not parameter.numel():
                continue
            if parameter.numel() == max(parameter.shape):
                value = _uniform(parameter, generator) * _normal(parameter, generator).sign()
            else:
                value = _normal(parameter, generator) / (parameter.numel() / len(parameter)) ** 0.5
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
                except Exception as error:
                    self.trouble = f"its gradient cannot be taken ({type(error).__name__}: {error})"
                    return {g: torch.zeros_like(units) for g, units in found.items()}
                flags: dict[tuple[int, int], Tensor] = {}
                for group, units in found.items():
                    for part in group.slices():
                        key = id(part.tensor), part.dim
                        if part.is_parameter and key[0] in moving:
                            if key not in flags:
                                flags[key] = _along(moving[key[0]], part.dim)
                            units &= ~_units_at(flags[key], part.units, group.size)
        return found

    def _moving(self, seed: int, norms: bool) -> dict[int, Tensor]:
        """Per parameter, the entries that are not zero and have a gradient."""
        parameters = [p for p in self.graph.model.parameters() if p.is_floating_point() and p.numel()]
        with torch.enable_grad(), OpenFunctions(norms):
            for parameter in parameters:
                parameter.requires_grad_(True)
            outputs = self._forward(random_inputs(self.inputs, seed))
            total: Any = sum((t * _normal(t, torch.Generator().manual_seed(seed))).sum() for t in outputs)
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {id(p): (g != 0) & (p.detach() != 0) for p, g in zip(parameters, found, strict=True) if g is not None}

    def constant(self, holes: Holes) -> dict[Group, Tensor]:
        """The units of which every reader sees the same, whatever the model's inputs are.

        Only convolutions and linear layers that are called as modules are watched; what others read is not constant.
        """
        first, second = random_inputs(self.inputs, 0), _moved_on(random_inputs(self.inputs, 1000))
        groups = list(self.graph.groups.values())
        if all(torch.equal(a, b) for a, b in zip(tensors_in(first), tensors_in(second), strict=True)):
            return {group: torch.zeros(group.size, dtype=torch.bool) for group in groups}
        found = {group: torch.ones(group.size, dtype=torch.bool) for group in groups}
        for seed in range(_DRAWS):
            with self.drawn(holes, seed), self.running(), OpenFunctions():
                one, other = (self._seen(x, _projected) for x in (first, second))
            differ = {
                module: torch.stack([a != b for a, b in zip(calls, other[module], strict=True)]).any(0)
                for module, calls in one.items()
            }
            for group, units in found.items():
                units &= ~self._heard(group, differ, holes)
        return found

    def loud(self, holes: Holes) -> dict[Group, Tensor]:
        """The units of which a reader sees anything but zeros, for the model's own values."""
        with self.running():
            seen = self._seen(self.inputs, _largest)
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
            used = _units_at(_along(~holes[id(part.tensor)], part.dim), part.units, group.size)
            mine, axes = flags.get(part.owner), self.graph.trace.inputs.get(part.owner)
            if mine is not None and axes:
                unit_of = labels(axes[0][_channel_dim(part.owner, len(axes[0]))], group.leaf.root())
                if len(unit_of) == len(mine):
                    used &= _units_at(mine, unit_of, group.size)
            heard |= used
        return heard if readers else torch.ones_like(heard)


@dataclass
class Trials:
    """Removes units and puts them back, to see what that changes.

    Attributes:
        lab: runs the model.
        holes: where the model is masked.
        closed: the same, and all slices of units that pass zeros or a constant on.
        quiet: the units that pass zeros on, for their own values.
        zeroed: the units that pass a constant on, which is given up.
        tolerance: how far the outputs may be from the masked model's, relative to their size.
    """

    lab: Laboratory
    holes: Holes
    closed: Holes
    quiet: Units
    zeroed: Units
    tolerance: float

    def __post_init__(self) -> None:
        self._expected: dict[tuple[bool, int], list[Tensor]] = {}

    def sorted(
        self, gone: Mapping[Group, Sequence[int]], base: Sequence[Group] = (), rest: bool = False
    ) -> tuple[list[Group], list[tuple[Group, str]]]:
        """The groups whose units can be removed together without changing the outputs, the others with the reason.

        Args:
            gone: the units of each group.
            base: groups among them that pass.
            rest: compare with a model whose norms over channels leave the units out.
        """
        right, wrong = [group for group in gone if group not in base], []
        for own in (False, True):  # random values first: smaller inputs do for them
            right, failed = sorted_out(lambda some: self._why({g: gone[g] for g in (*base, *some)}, own, rest), right)  # noqa: B023
            wrong += failed
        return right, wrong

    def _why(self, gone: Mapping[Group, Sequence[int]], own: bool, rest: bool) -> str | None:
        """Why removing some units changes the outputs; None if it does not."""
        for number, (values, functions) in enumerate(self._settings(own)):
            with values:
                try:
                    if rest:
                        expected = self._of_the_rest(gone, functions, own)
                    else:
                        if (own, number) not in self._expected:
                            as_given = own and not any(bool(units.any()) for units in self.zeroed.values())
                            self._expected[own, number] = self.lab.start if as_given else self._run(functions, own)
                        expected = self._expected[own, number]
                    made = self._removed(gone, functions, own)
                except SingeError as error:
                    return str(error)
                except Exception as error:
                    return f"the forward pass fails without them ({type(error).__name__}: {error})"
            limit = self.tolerance if self.lab.double else max(self.tolerance, _SINGLE if own else _SINGLE_DRAWN)
            change = change_of(expected, made)
            if change > limit:
                where = "" if own else " on random values of the other parameters"
                return f"the outputs change by {change:.2g} without them{where}"
        return None

    def _settings(self, own: bool) -> Iterator[tuple[AbstractContextManager[None], bool]]:
        """The values to try, and whether functions are open then."""
        if own:
            yield masked(_lists(self.zeroed)), False
            return
        yield self.lab.drawn(self.closed, 100), True
        if any(bool(units.any()) for units in self.quiet.values()):
            yield self.lab.drawn(with_units(self.holes, self.zeroed), 101, self.quiet), False

    def _run(self, functions: bool, own: bool) -> list[Tensor]:
        with OpenFunctions() if functions else nullcontext():
            return self.lab.outputs() if own else self.lab.run(random_inputs(self.lab.inputs, 7))

    def _removed(self, gone: Mapping[Group, Sequence[int]], functions: bool, own: bool) -> list[Tensor]:
        undo = Snapshot(self.lab.graph.model, self.lab.graph)
        try:
            for group, units in gone.items():
                remove_units(self.lab.graph, group, units)
            return self._run(functions, own)
        finally:
            undo.restore()

    def _of_the_rest(self, gone: Mapping[Group, Sequence[int]], functions: bool, own: bool) -> list[Tensor]:
        made: list[Tensor] = []
        graph = self.lab.graph
        with masked(gone):
            for inputs in self.lab.examples if own else [random_inputs(self.lab.inputs, 7)]:
                with OpenFunctions() if functions else nullcontext(), NormsOfTheRest(graph, gone) as norms:
                    made += self.lab.run(inputs)
                if not _as_traced(norms, graph):
                    raise GroupError("the norms of the model cannot be followed on these inputs")
        return made


def change_of(expected: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """The largest change, relative to the size of the outputs; inf for other shapes, NaN, or infinities elsewhere."""
    if [t.shape for t in expected] != [t.shape for t in made]:
        return float("inf")
    pairs = list(zip(expected, made, strict=True))
    if any(bool(a.isnan().any()) or not torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs):
        return float("inf")
    zero = {"posinf": 0.0, "neginf": 0.0}
    return relative_change([a.nan_to_num(**zero) for a, _ in pairs], [b.nan_to_num(**zero) for _, b in pairs])


def few(inputs: Any, count: int) -> Any:
    """The first examples of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[:count] if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {k: few(v, count) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(few(v, count) for v in inputs)
    return inputs


def _is_image(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim == 4


def _candidates(inputs: Any) -> Iterator[Any]:
    """Two examples (the gradient of a batch-norm in eval mode can be wrong on CPU for one), of smaller images first."""
    two = inputs
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1 and len(inputs) == 1:
        two = torch.cat([inputs, inputs])
    if _is_image(two):
        yield from (two[:2, :, :side, :side] for side in _SIDES if side < min(two.shape[2:]))
    yield from (two, inputs)


def _as_traced(watch: NormsOfTheRest, graph: AxisGraph) -> bool:
    """Whether the operators that take channels together ran as often as in the trace."""
    return all(watch.counts[name] == graph.trace.count(name) for name, _ in graph.trace.mixing)


def _lists(units: Units) -> dict[Group, list[int]]:
    return {group: flags.nonzero().flatten().tolist() for group, flags in units.items()}


def _channel_dim(layer: nn.Module, ndim: int) -> int:
    """Where the input channels of a convolution or linear layer are."""
    weight = layer._parameters.get("weight")
    return ndim - 1 if weight is None or isinstance(layer, nn.Linear) else ndim - weight.ndim + 1


def _projected(x: Tensor, dim: int) -> Tensor:
    """A random projection of each channel: two that are equal bit for bit come from equal channels."""
    probe = _uniform(x, torch.Generator().manual_seed(0))
    return (x * probe).movedim(dim, 0).flatten(1).sum(1)


def _largest(x: Tensor, dim: int) -> Tensor:
    return x.abs().movedim(dim, 0).flatten(1).amax(1).nan_to_num(nan=1.0)


def _moved_on(inputs: Any) -> Any:
    """Whole numbers (ids, attention masks) moved on by one place, all alike."""
    if isinstance(inputs, Tensor):
        return inputs if inputs.is_floating_point() or not inputs.ndim else inputs.roll(1, -1)
    if isinstance(inputs, Mapping):
        return {k: _moved_on(v) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [_moved_on(v) for v in inputs]
    return inputs


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) + 0.5).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
