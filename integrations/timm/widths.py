"""Widths that are kept beside the layers: ``num_features``, ``embed_dim``, ``feature_info`` and their like.

The forward pass does not read them, but ``reset_classifier``, ``forward_intermediates`` and whoever builds a neck on
a backbone do. Each is linked to the axis whose size it is: by its name, the module that has it, and its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from singe_plugin.axes.algebra import Axis, is_fixed, leaves, size_of
from singe_plugin.axes.layers import follow, graph_adapter
from singe_plugin.axes.parameters import ModelAxes
from singe_plugin.axes.places import Place
from singe_plugin.axes.rules.base import OPAQUE

__all__ = ["link_widths"]

_INPUTS = (
    "in_features",
    "in_channels",
    "in_chs",
    "in_dim",
    "input_dim",
    "dim",
    "channels",
    "embed_dim",
    "num_features",
)
_OUTPUTS = ("out_features", "out_channels", "out_chs", "out_dim", "output_dim", "embed_dim", "hidden_size")
_CHANNELS = {2: (1,), 3: (2, 1), 4: (1, 3)}  # where channels are, by the number of dimensions


def _axis(tensors: Iterable[list[Axis]], size: int) -> Axis | None:
    """The first channel axis of that size; None if there is none, or if nothing may be removed from it."""
    for axes in tensors:
        for dim in _CHANNELS.get(len(axes), range(len(axes))):
            if axes[dim] and size_of(axes[dim]) == size and not _is_spatial(axes[dim]):
                return None if is_fixed(axes[dim]) else axes[dim]
    return None


def _is_spatial(axis: Axis) -> bool:
    """Whether an axis runs over positions, not channels: an image can be as wide as a layer."""
    return all((leaf.fixed or "").startswith(OPAQUE) for leaf in leaves(axis))


def _classifiers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    getter = getattr(model, "get_classifier", None)
    try:
        found: Any = getter() if callable(getter) else None
    except Exception:
        return
    for part in found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]:
        layers = [m for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] if part is not None else []
        yield from layers[-1:]


def _feature_infos(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The entries of ``feature_info``, and the way to them."""
    info: Any = model.__dict__.get("feature_info")
    path: tuple[Any, ...] = ()
    if hasattr(info, "info"):
        info, path = info.info, (".info",)
    for number, entry in enumerate(info if isinstance(info, list) else []):
        if isinstance(entry, dict) and "num_chs" in entry:
            yield (*path, number, "num_chs"), entry


@graph_adapter
def link_widths(graph: ModelAxes) -> None:
    """Let every width that timm keeps follow its axis; one that is not found stays as it is."""
    model, trace = graph.model, graph.trace
    modules = dict(model.named_modules())
    image = next(iter(trace.inputs.get(model, [])), [])
    for path, entry in _feature_infos(model):
        size, name = int(entry["num_chs"]), str(entry.get("module", ""))
        module = modules.get(name, modules.get(name.replace(".", "_")))
        axis = _axis(trace.outputs.get(module, []), size) if module is not None else None
        if axis is None and len(image) == 4 and entry.get("reduction"):
            side = size_of(image[2]) // int(entry["reduction"])  # the last feature map of that size and width
            maps = [a for t in trace.outputs.values() for a in t if len(a) == 4 and size_of(a[2]) == side]
            axis = _axis(([a[1]] for a in reversed(maps)), size)
        if axis is None and not name:  # timm does not know the module: the first feature map of that width
            axis = _axis(([a[1]] for t in trace.outputs.values() for a in t if len(a) == 4), size)
        if axis is not None:
            follow(graph, model, "feature_info", axis, path)
    _link_model(graph, model)
    for module in modules.values():
        if module is model:
            continue
        for names, tensors in ((_INPUTS, trace.inputs), (_OUTPUTS, trace.outputs)):
            for name in names:
                _link(graph, module, name, tensors.get(module, []))
        inside = set(module.modules())
        heads = [trace.of(layer.weight)[1:2] for layer in _classifiers(model) if layer in inside]
        _link(graph, module, "num_features", heads)


def _link(graph: ModelAxes, owner: nn.Module, name: str, tensors: list[list[Axis]]) -> None:
    """Link an attribute (or each number of a list) to the first of the axes that has its size."""
    value: Any = owner.__dict__.get(name)
    numbers = enumerate(value) if type(value) in (tuple, list) else [(None, value)]
    for index, number in numbers:
        path = () if index is None else (index,)
        if type(number) is int and number > 1 and Place(owner, name, path) not in graph.trace.links:
            own = tensors[index : index + 1] if index is not None else []
            axis = _axis([*own, *tensors], number)
            if axis is not None:
                follow(graph, owner, name, axis, path)


def _link_model(graph: ModelAxes, model: nn.Module) -> None:
    trace = graph.trace
    heads = [trace.of(layer.weight)[1:2] for layer in _classifiers(model)]
    inner = [tensors for module, tensors in trace.outputs.items() if module is not model]
    late = [axes for tensors in reversed(inner) for axes in tensors]
    early = [axes for tensors in inner for axes in tensors]
    for name in ("head_hidden_size", "num_features"):
        _link(graph, model, name, heads + late)
    several = type(model.__dict__.get("embed_dim")) in (tuple, list)
    _link(graph, model, "embed_dim", heads + late if several else early)
