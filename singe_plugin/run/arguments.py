"""The arguments of ``timm.create_model`` that make its class what a pruned model of it is, where there are any.

Which argument gives which widths is not known by name: see :mod:`singe_plugin.run.rebuilt`. Whole numbers, the numbers
in a tuple, and ratios of the class's signature are tried, one after the other.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from singe_plugin.run.architecture import Builder, build_by
from singe_plugin.run.rebuilt import Shapes, built, is_the_model, shapes_of, value_of

__all__ = ["timm_arguments"]

Key = tuple[str, "int | None"]
_NO_WIDTH = ("img_size", "in_chans", "num_classes", "depth", "depths", "layers", "output_stride", "patch_size")


def timm_arguments(model: nn.Module, builder: Builder, inputs: Any) -> tuple[dict[str, Any] | None, str]:
    """All arguments that build a pruned model at once, or None, and why there are none.

    Args:
        model: with plain weights.
        builder: of the unpruned one.
        inputs: to compare with, with random weights in double precision.

    Example:
        >>> import timm, torch
        >>> net = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[64, 8, 16, 16])
        >>> timm_arguments(net, Builder.timm("resnet18", layers=[1, 1, 1, 1]), torch.randn(2, 3, 32, 32))[0]
        {'layers': [1, 1, 1, 1], 'channels': [64, 8, 16, 16]}
    """
    if builder.kind != "timm":
        return None, f"its architecture is built by {builder.kind}:{builder.name}, not by timm"
    wanted = shapes_of(model)
    known = _known(type(model), builder)
    tables = {name: list(value) for name, value in known.items() if _is_table(value)}
    changed: dict[Key, Any] = {}

    def make(new: Mapping[Key, Any]) -> nn.Module:
        made: nn.Module = importlib.import_module("timm").create_model(
            builder.name, pretrained=False, **_merged(builder.options, tables, new)
        )
        return made

    base = built(lambda: make(changed))
    if base is None or base.keys() != wanted.keys():
        return None, "the class, built anew, has other tensors"
    for key, default in _keys(known):
        if base == wanted:
            break
        for value in _values(key, default, changed, base, wanted, make):
            now = built(lambda value=value, key=key: make({**changed, key: value}))  # type: ignore[misc]
            if now is not None and _apart(now, wanted) < _apart(base, wanted):
                changed[key], base = value, now
                break
    if base != wanted:
        name = next(name for name in wanted if base[name] != wanted[name])
        return None, f"no argument of timm.create_model gives {name} the shape {wanted[name]}"
    arguments = _merged(builder.options, tables, changed)
    fresh = build_by(f"timm:{builder.name} with {arguments}", lambda: make(changed))
    if not is_the_model(model, fresh, inputs):
        return None, "built with other arguments, it does not compute the same"
    return arguments, ""


def _apart(one: Shapes, other: Shapes) -> int:
    """How many tensors have another shape."""
    return sum(one.get(name) != shape for name, shape in other.items())


def _known(kind: type[nn.Module], builder: Builder) -> dict[str, Any]:
    """The arguments that timm's function of that name gives to the class, as it is built once more, on no device.

    The function has defaults of its own, which nothing tells: they are seen where they arrive.
    """
    signature, seen = inspect.signature(kind.__init__), []
    original = kind.__init__

    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        seen.append(bound.arguments)
        original(self, *args, **kwargs)

    with mock.patch.object(kind, "__init__", recording), torch.device("meta"):
        builder.build()
    return dict(seen[0]) if seen else {}


def _is_table(value: Any) -> bool:
    return type(value) in (tuple, list) and bool(value) and all(type(v) is int for v in value)


def _keys(known: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Everything that may be a width, with what it is: what is said of single layers first."""
    named = {name: value for name, value in known.items() if name not in _NO_WIDTH and not name.endswith("_rate")}
    for name, value in named.items():
        if _is_table(value):
            yield from (((name, i), number) for i, number in enumerate(value))
    for name, value in named.items():
        if type(value) in (int, float) and value > 0:
            yield (name, None), value


def _merged(options: Mapping[str, Any], tables: Mapping[str, list[Any]], new: Mapping[Key, Any]) -> dict[str, Any]:
    merged = dict(options)
    for (name, index), value in new.items():
        if index is None:
            merged[name] = value
        else:
            merged[name] = list(merged.get(name, tables[name]))
            merged[name][index] = value
    return merged


def _values(key: Key, default: Any, changed: Mapping[Key, Any], base: Shapes, wanted: Shapes, make: Any) -> list[Any]:
    """What an argument may have to be; sizes are products that are rounded, so a ratio may be a little more."""
    if type(default) is float:
        ratio = value_of(key, None, changed, base, wanted, make, (1, 2))
        return [] if ratio is None else [float(ratio), float(ratio) + 1e-6]
    number = value_of(key, default, changed, base, wanted, make)
    return [int(number)] if number is not None and number.denominator == 1 else []
