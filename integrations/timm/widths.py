"""Widths that are kept beside the layers: ``num_features``, ``embed_dim``, ``feature_info`` and their like.

The forward pass does not read them, but ``reset_classifier``, ``forward_intermediates`` and whoever builds a neck on
a backbone do. Each is linked to the axis whose size it is: by its name, the module that has it, and its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from singe_plugin.axes.algebra import Axis, is_fixed, size_of
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.layers import follow, graph_adapter
from singe_plugin.axes.tracked import Place

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


def _axis(tensors: Iterable[list[Axis]], size: int) -> Axis | None:
    """The axis of that size along which something may be removed."""
    for axes in tensors:
        for axis in axes:
            if axis and size_of(axis) == size and not is_fixed(axis):
                return axis
    return None


def _classifiers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    getter = getattr(model, "get_classifier", None)
    try:
        found: Any = getter() if callable(getter) else None
    except Exception:
        return
    for part in found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]:
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            yield part


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
def link_widths(graph: AxisGraph) -> None:
    """Let every width that timm keeps follow its axis; one that is not found stays as it is."""
    model, trace = graph.model, graph.trace
    modules = dict(model.named_modules())
    for path, entry in _feature_infos(model):
        module = modules.get(str(entry.get("module", "")), modules.get(str(entry.get("module", "")).replace(".", "_")))
        axis = _axis(trace.outputs.get(module, []), int(entry["num_chs"])) if module is not None else None
        if axis is not None:
            follow(graph, model, "feature_info", axis, path)
    _link_model(graph, model)
    for module in modules.values():
        if module is model:
            continue
        for names, tensors in ((_INPUTS, trace.inputs), (_OUTPUTS, trace.outputs)):
            for name in names:
                value = module.__dict__.get(name)
                if type(value) is int and value > 1 and Place(module, name) not in trace.links:
                    axis = _axis(tensors.get(module, []), value)
                    if axis is not None:
                        follow(graph, module, name, axis)


def _link_model(graph: AxisGraph, model: nn.Module) -> None:
    trace = graph.trace
    heads = [axes for layer in _classifiers(model) for axes in [trace.of(layer.weight)[1:2]]]
    inner = [tensors for module, tensors in trace.outputs.items() if module is not model]
    late = [axes for tensors in reversed(inner) for axes in tensors]
    early = [axes for tensors in inner for axes in tensors]
    for name, places in (("head_hidden_size", heads + late), ("num_features", heads + late), ("embed_dim", early)):
        value = model.__dict__.get(name)
        if type(value) is int and Place(model, name) not in trace.links:
            axis = _axis(places, value)
            if axis is not None:
                follow(graph, model, name, axis)
