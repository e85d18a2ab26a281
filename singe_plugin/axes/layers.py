"""Adapters: what a forward pass does not show of a layer, by layer class.

Most layers need none. An adapter is called once for every module of its class (or a subclass), after the trace and
before the groups are made. It may :meth:`unify <singe_plugin.axes.trace.Trace.unify>` axes that have to stay of one
size, fix axes, link attributes to axes, and name the parameters that make up for a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from .algebra import Axis, expand, fix, leaves, size_of, split, unify
from .parameters import ModelAxes
from .places import Place
from .scales import ImpliedScale

__all__ = [
    "ADAPTERS", "GRAPH_ADAPTERS", "adapt", "adapter", "bilinear", "follow", "graph_adapter", "multihead_attention",
    "recurrent",
]  # fmt: skip

ADAPTERS: dict[type[nn.Module], Callable[..., None]] = {}
GRAPH_ADAPTERS: list[Callable[[ModelAxes], None]] = []


def adapter(*layers: type[nn.Module]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register an adapter for layer classes; the last one registered for a class is used.

    Example:
        >>> @adapter(nn.EmbeddingBag)
        ... def keep_whole(graph, layer):
        ...     for axis in graph.trace.of(layer.weight):
        ...         fix(axis, "nn.EmbeddingBag is kept whole")
        >>> _ = ADAPTERS.pop(nn.EmbeddingBag)
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for layer in layers:
            ADAPTERS[layer] = function
        return function

    return register


def graph_adapter(function: Callable[[ModelAxes], None]) -> Callable[[ModelAxes], None]:
    """Register an adapter that is called once for a whole graph, behind those of the layers."""
    GRAPH_ADAPTERS.append(function)
    return function


def adapt(graph: ModelAxes) -> None:
    """Call the adapters of all modules of a graph, then those of graphs.

    Where one says where a size is kept, the code's own size is none of the graph's ``constants`` any more.
    """
    links = graph.trace.links
    known = {place: len(found) for place, found in links.items()}
    for module in graph.model.modules():
        for kind in type(module).__mro__:
            if kind in ADAPTERS:
                ADAPTERS[kind](graph, module)
                break
    for function in GRAPH_ADAPTERS:
        function(graph)
    told = [set(leaves(axis)) for place, found in links.items() for _, axis in found[known.get(place, 0) :]]
    graph.trace.constants = [(axis, why) for axis, why in graph.trace.constants if set(leaves(axis)) not in told]


def follow(graph: ModelAxes, owner: nn.Module, attr: str, axis: Axis, path: tuple[Any, ...] = ()) -> None:
    """Let ``owner.attr`` (or what is found in it along ``path``) be the size of ``axis`` from now on."""
    graph.trace.links.setdefault(Place(owner, attr, path), []).append((Fraction(1), axis))


@adapter(nn.MultiheadAttention)
def multihead_attention(graph: ModelAxes, layer: nn.MultiheadAttention) -> None:
    """Adapt to a layer that is as wide inside as outside, and divides by the square root of its head width."""
    if layer.in_proj_weight is None or layer.bias_k is not None:
        for parameter in layer.parameters():
            for axis in graph.trace.of(parameter):
                fix(axis, "nn.MultiheadAttention with separate q, k, v widths or bias_k is kept whole")
        return
    rows, stream = graph.trace.of(layer.in_proj_weight)
    width = size_of(stream)
    parts, inner = split(rows, [3, width], "nn.MultiheadAttention")
    fix(parts, "q, k and v are told apart")
    unify(inner, stream, "nn.MultiheadAttention is as wide inside as outside")
    heads, dims = split(inner, [layer.num_heads, layer.head_dim], "nn.MultiheadAttention")
    for attr, axis in (("num_heads", heads), ("head_dim", dims), *((n, stream) for n in ("embed_dim", "kdim", "vdim"))):
        follow(graph, layer, attr, axis)
    query = torch.arange(3 * width) < width
    tensors = [attr for attr in ("in_proj_weight", "in_proj_bias") if getattr(layer, attr) is not None]
    graph.scales.append(ImpliedScale(dims, [(layer, attr, query) for attr in tensors]))


@adapter(nn.RNNBase, nn.RNNCellBase)
def recurrent(graph: ModelAxes, layer: nn.RNNBase | nn.RNNCellBase) -> None:
    """Adapt to layers whose results are their own inputs, which a sequence of one step does not show.

    ``hidden_size`` is one number, so unit k of every layer and of both directions goes at once. PyTorch takes a layer
    for one without projections if these are as wide as what they project: a unit more has to stay.
    """
    why = f"{type(layer).__name__} has one hidden size"
    hidden: Axis | None = None
    projected: Axis | None = None
    found: dict[str, Sequence[Axis]] = {
        name: graph.trace.of(parameter)
        for name, parameter in layer._parameters.items()
        if parameter is not None and graph.made_of(layer, name) is None
    }
    found |= {made.weight.attr: made.axes for made in graph.computed if made.weight.layer is layer}
    for name, axes in found.items():
        if name.startswith("weight_hr"):
            projected = projected or axes[0]
            unify(axes[0], projected, why)
            unify(axes[1], hidden or axes[1], why)
        else:
            rows = int(layer.hidden_size)
            gates, units = split(axes[0], [size_of(axes[0]) // rows, rows], why)
            fix(gates, "gates are told apart")
            hidden = hidden or units
            unify(units, hidden, why)
    for axes in (axes for name, axes in found.items() if name.startswith("weight_hh")):
        unify(axes[1], projected or hidden or (), why)
    if projected is not None and hidden is not None:
        graph.at_least.append((hidden, size_of(projected) + 1))
        if len(expand(hidden)) != 1:
            fix(hidden, f"{why}, and a part of it could become as small as its projection")


@adapter(nn.Bilinear)
def bilinear(graph: ModelAxes, layer: nn.Bilinear) -> None:
    """Link its attributes to the sizes of its weight, for nothing in its forward pass does."""
    names = ("out_features", "in1_features", "in2_features")
    for attr, axis in zip(names, graph.trace.of(layer.weight), strict=True):
        follow(graph, layer, attr, axis)
