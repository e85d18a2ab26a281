"""The axes of a model's parameters and buffers, as one forward pass shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from singe_plugin.computed import Computed
from singe_plugin.errors import GroupError, SingeError, is_of_the_machine
from singe_plugin.method.folding import can_fold
from singe_plugin.method.units import UnitGroup
from singe_plugin.nested import call_model
from singe_plugin.state import containers_training

from .algebra import Atom, Axis, contains, fix_all, labels, leaves, size_of, split
from .forward import trace
from .index import Index
from .scales import ImpliedScale, implied_scales
from .trace import Forward, Trace
from .widths import tensor_of

__all__ = ["CONV", "LAYERS", "Held", "Made", "ModelAxes", "UnitSlice", "out_axis"]

CONV = nn.modules.conv._ConvNd
LAYERS = (CONV, nn.Linear)
_LARGE, _SMALLER = 320, (160, 168, 192, 224, 256)  # pixels a side


@dataclass(frozen=True)
class UnitSlice:
    """A dimension of a tensor, with the unit of every position along it.

    Attributes:
        owner: the module that holds the tensor.
        attr: its name there; a parameter or a buffer.
        dim: the dimension.
        units: ``[shape[dim]]`` int64, -1 where a position belongs to no unit of the group.
        reads: whether the positions only read the units (the input columns of a layer) instead of producing them.
        writes: whether it is a layer that writes them: a matrix that reads along another dimension.
    """

    owner: nn.Module
    attr: str
    dim: int
    units: NDArray[np.int64]
    reads: bool
    writes: bool

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        found = tensor_of(self.owner, self.attr)
        return cast(Tensor, getattr(self.owner, self.attr)) if found is None else found

    @property
    def is_parameter(self) -> bool:
        return self.attr in self.owner._parameters

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, or a weight that is computed from some."""
        return self.attr not in self.owner._buffers


@dataclass(frozen=True)
class Held:
    """A parameter or buffer, where it is held, and its axes."""

    owner: nn.Module
    attr: str
    tensor: Tensor
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Made:
    """A weight that a layer computes, its axes, and whether its dimensions only read."""

    weight: Computed
    axes: tuple[Axis, ...]
    reads: tuple[bool, ...]

    def held(self) -> Held:
        """The same as if it were a parameter of the layer."""
        return Held(self.weight.layer, self.weight.attr, self.weight.value(), self.axes)


class ModelAxes:
    """What the dimensions of all parameters and buffers are made of.

    Args:
        model: any module; it is run in eval mode and left as it was.
        inputs: example inputs.
        forward: how the model is called with the inputs.

    Attributes:
        trace: what the forward pass showed.
        held: every parameter and buffer with its axes.
        weights: what is held under the name ``weight``, by the module that holds it.
        names: of the modules.
        scales: the attention layers whose scale follows a width.
        index: what follows a leaf, besides parameters and buffers.
        only_training: ids of the parameters that are read in training mode only.
        shared: id of a tensor -> all places that hold it, the one first that stands for it: no layer if there is
            another (of a table and a classifier that are tied, the table).
        places: leaf -> the dimensions that contain it; see :meth:`find_places`.
        at_least: axes, and how many positions of them have to stay for the model to run.
        computed: the weights that layers compute from parameters.
        unit_groups: what was made of leaves since the last change.
    """

    def __init__(self, model: nn.Module, inputs: Any, forward: Forward = call_model) -> None:
        self.model, self.inputs, self.forward = model, inputs, forward
        self.only_training: set[int] = set()
        self.places: dict[Atom, list[tuple[Held, int]]] = {}
        self.at_least: list[tuple[Axis, int]] = []
        self.unit_groups: dict[Atom, UnitGroup] = {}
        self._slices: dict[Atom, list[UnitSlice]] = {}
        try:
            self.trace: Trace = self._traced()
        except SingeError:
            raise
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise GroupError(
                f"{type(model).__name__} could not be traced: {type(error).__name__}: {error}; check that "
                "model(example_inputs) runs"
            ) from error
        if self.trace.unread():
            self._read_more()
        self.names = {module: name for name, module in model.named_modules()}
        self.held = list(self._held())
        self.computed = [
            Made(w, tuple(axes), tuple(map(self.trace.origins.all_read, dims)))
            for w, axes, dims in self.trace.computed.values()
        ]
        self._made_of = {source: made for made in self.computed for source in made.weight.sources()}
        self.weights = {held.owner: held for held in self.held if held.attr == "weight"}
        self.weights |= {made.weight.layer: made.held() for made in self.computed if made.weight.attr == "weight"}
        self.shared: dict[int, list[Held]] = {}
        for held in sorted(self.held, key=lambda held: isinstance(held.owner, LAYERS)):
            self.shared.setdefault(id(held.tensor), []).append(held)
        self.scales: list[ImpliedScale] = implied_scales(model, self.inputs, self.trace, self.forward)
        self.index = Index(self.trace, self.scales)

    def _traced(self) -> Trace:
        """Trace the example, or a smaller image if the example is large and the model takes one."""
        inputs = self.inputs
        if isinstance(inputs, Tensor) and inputs.ndim == 4 and min(inputs.shape[2:]) > _LARGE:
            for side in _SMALLER:
                try:
                    small = inputs[:2, :, :side, :side].contiguous()
                    found = trace(self.model, small, self.forward)
                except Exception as error:  # not a size for this model
                    if is_of_the_machine(error):
                        raise
                    continue
                self.inputs = small
                return found
        return trace(self.model, inputs, self.forward)

    def _read_more(self) -> None:
        """Trace both modes: some parameters (of auxiliary heads) are only read in training mode."""
        forward = self.forward

        def both(model: nn.Module, inputs: Any) -> Any:
            outputs = [forward(model, inputs)]
            with containers_training(model):
                outputs.append(forward(model, inputs))
            return outputs

        try:
            more = trace(self.model, self.inputs, both)
        except Exception as error:  # it cannot be run so: what is not read stays as it is
            if is_of_the_machine(error):
                raise
            more = self.trace
        if len(more.unread()) < len(self.trace.unread()):
            self.only_training = {id(p) for p in self.trace.unread()} - {id(p) for p in more.unread()}
            self.trace, self.forward = more, both
        for tensor in self.trace.unread():
            fix_all(self.trace.of(tensor), "no forward pass reads it")

    def _held(self) -> Iterator[Held]:
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for attr, tensor in table.items():
                    if tensor is not None:
                        yield Held(module, attr, tensor, tuple(self.trace.of(tensor)))

    def find_places(self) -> None:
        """Note where the leaves are that can lose units; to be called when all that has to stay is fixed.

        A tensor that is held in several places is one, and goes once.
        """
        for held, dim in ((h, d) for h in self.held if self.stands(h) for d in range(len(h.axes))):
            for leaf in dict.fromkeys(leaves(held.axes[dim])):
                if not leaf.fixed:
                    self.places.setdefault(leaf, []).append((held, dim))

    def stands(self, held: Held) -> bool:
        """Whether a place is the only one that holds its tensor, or stands for all that do."""
        return self.shared.get(id(held.tensor), [held])[0] is held

    def outputs_of(self, held: Held) -> list[Axis]:
        """Return the axes of a parameter along which it produces units."""
        if isinstance(held.owner, LAYERS) and held.attr == "weight":
            return [out_axis(held)]
        return [axis for dim, axis in enumerate(held.axes) if not self.reads(held, dim)]

    def reads(self, held: Held, dim: int) -> bool:
        """Whether a dimension of a parameter or buffer only reads units, instead of producing them.

        The slopes of a PReLU and buffers produce nothing, whatever is done with them.
        """
        if held.attr in held.owner._buffers or isinstance(held.owner, nn.PReLU):
            return True
        return self.trace.origins.reads(held.tensor, dim)

    def writes(self, held: Held, dim: int) -> bool:
        """Whether units are written along a dimension of a parameter: it is a matrix that reads along another one."""
        if held.attr not in held.owner._parameters or held.tensor.ndim < 2 or self.reads(held, dim):
            return False
        made = self.made_of(held.owner, held.attr)
        layer, attr = (held.owner, held.attr) if made is None else (made.weight.layer, made.weight.attr)
        if isinstance(layer, LAYERS) and attr == "weight":
            return True  # also where nobody can say what it reads along: it may be standardised first
        return any(self.reads(held, other) for other in range(held.tensor.ndim) if other != dim)

    def made_of(self, owner: nn.Module, attr: str) -> Made | None:
        """Find the weight that is computed from a parameter or buffer."""
        return self._made_of.get((owner, attr))

    def layer_of(self, held: Held) -> nn.Module:
        """The layer that a parameter belongs to: it may be computed from it."""
        made = self.made_of(held.owner, held.attr)
        return held.owner if made is None else made.weight.layer

    def made(self, leaf: Atom) -> list[Made]:
        """The computed weights that have units of a leaf."""
        return [made for made in self.computed if any(contains(axis, leaf) for axis in made.axes)]

    def norm_of(self, layer: nn.Module) -> nn.Module | None:
        """Find the batch-norm that folds into a layer: it reads this layer and nothing else does, and it fits."""
        norm = self.trace.sole_reader(layer)
        tied = any(p is not None and len(self.shared.get(id(p), ())) > 1 for p in layer._parameters.values())
        return norm if norm is not None and not tied and can_fold(layer, norm) else None

    def slices(self, leaf: Atom) -> list[UnitSlice]:
        """Return every dimension of every parameter and buffer that goes with the units of a leaf."""
        leaf = leaf.root()
        if leaf not in self._slices:
            self._slices[leaf] = [
                UnitSlice(
                    held.owner,
                    held.attr,
                    dim,
                    labels(held.axes[dim], leaf),
                    self.reads(held, dim),
                    self.writes(held, dim),
                )
                for held, dim in self.places.get(leaf, [])
            ]
        return self._slices[leaf]

    def plain_slices(self, leaf: Atom) -> list[UnitSlice]:
        """As :meth:`slices`, with the computed weights in the place of what they are computed from."""
        leaf = leaf.root()
        kept = [part for part in self.slices(leaf) if self.made_of(part.owner, part.attr) is None]
        return kept + [
            UnitSlice(
                made.weight.layer, made.weight.attr, dim, labels(axis, leaf), made.reads[dim], not made.reads[dim]
            )
            for made in self.made(leaf)
            for dim, axis in enumerate(made.axes)
            if contains(axis, leaf)
        ]

    def take_out(self, module: nn.Module, after: nn.Module) -> None:
        """Forget everything in a module that is no part of the model any more.

        Args:
            module: what was in the model.
            after: what is in its place, which holds no parameters.
        """
        gone, trace = set(module.modules()), self.trace
        self.held = [held for held in self.held if held.owner not in gone]
        self.places = {leaf: [p for p in places if p[0].owner not in gone] for leaf, places in self.places.items()}
        self.computed = [made for made in self.computed if made.weight.layer not in gone]
        self.weights = {owner: held for owner, held in self.weights.items() if owner not in gone}
        self.scales[:] = [scale for scale in self.scales if not any(owner in gone for owner, _, _ in scale.rows)]
        stays = [owner not in gone for owner in trace.contracted_in]
        trace.contractions = [c for c, kept in zip(trace.contractions, stays, strict=True) if kept]
        trace.contracted_in = [owner for owner in trace.contracted_in if owner not in gone]
        trace.links = {place: found for place, found in trace.links.items() if place.owner not in gone}
        trace.caches = [(owner, attr) for owner, attr in trace.caches if owner not in gone]
        trace.inputs[after], trace.outputs[after] = trace.inputs[module], trace.outputs[module]
        trace.runs[after] = trace.runs[module]
        self.names[after] = self.names[module]
        self.index.forget()
        self.changed()

    def back_in(self) -> Callable[[], None]:
        """Return a function that takes in again whatever is :meth:`taken out <take_out>` from now on."""
        trace, mine = self.trace, ("held", "places", "computed", "weights")
        noted = ("contractions", "contracted_in", "links", "caches")
        saved = [
            (owner, name, getattr(owner, name)) for owner, names in ((self, mine), (trace, noted)) for name in names
        ]
        scales = list(self.scales)

        def rewind() -> None:
            if all(getattr(owner, name) is value for owner, name, value in saved):
                return
            for owner, name, value in saved:
                setattr(owner, name, value)
            self.scales[:] = scales
            self.index.forget()
            self.changed()

        return rewind

    def changed(self) -> None:
        """Compute positions anew from now on: units were removed or put back."""
        self._slices.clear()
        self.unit_groups.clear()


def out_axis(weight: Held) -> Axis:
    """Return the axis of a layer's output channels."""
    owner = weight.owner
    if isinstance(owner, CONV) and owner.transposed:
        if owner.groups == 1:
            return weight.axes[1]
        groups = int(owner.groups)
        outer, _ = split(weight.axes[0], [groups, size_of(weight.axes[0]) // groups], "a transposed convolution")
        return (*outer, *weight.axes[1])
    return weight.axes[0]
