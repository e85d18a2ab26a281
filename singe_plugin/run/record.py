"""What a saved record may say: checked in full before anything is built from it or set.

A checksum finds damage, and not what somebody wrote on purpose. Here every part has its form, and what would be set on
a module has to take the place of a plain value of the same kind: a width of a width, never a method or a layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.axes.blocks import AFTER
from singe_plugin.axes.widths import refresh_widths
from singe_plugin.errors import ArtifactError
from singe_plugin.run.inputs import are_described
from singe_plugin.run.result import Metrics

__all__ = [
    "NOT_STRUCTURE", "OVERLAY", "PREPROCESSING", "allocating_at_most", "check_builder", "check_record",
    "check_structure", "check_tensors", "check_widths", "decode", "encode", "replace_blocks",
]  # fmt: skip

NOT_STRUCTURE = ("training", "pretrained_cfg", "pretrained_model_args", "default_cfg")
_SCALARS = (bool, int, float, str, type(None))
_Check = Callable[[Any], bool]


# -- plain values -------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Turn plain values into those that JSON has, which knows no tuples."""
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: encode(v) for k, v in value.items()}}
    return value


def decode(value: Any) -> Any:
    """Return what :func:`encode` was given.

    Raises:
        ArtifactError: if it has another form.
    """
    if isinstance(value, dict):
        inner = value.get("tuple", value.get("dict"))
        if len(value) == 1 and "tuple" in value and isinstance(inner, list):
            return tuple(decode(v) for v in inner)
        if len(value) == 1 and "dict" in value and isinstance(inner, dict):
            return {k: decode(v) for k, v in inner.items()}
        raise ArtifactError(f"structure has the value {_short(value)}, which is neither a tuple nor a dict")
    return [decode(v) for v in value] if isinstance(value, list) else value


def _is(*kinds: type) -> _Check:
    return lambda value: type(value) in kinds


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value) and value >= 0)


def _real(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _list_of(check: _Check) -> _Check:
    return lambda value: type(value) is list and all(map(check, value))


def _dict_of(check: _Check) -> _Check:
    return lambda value: type(value) is dict and all(map(check, value.values()))


def _form(**parts: _Check) -> _Check:
    """Check for a dictionary with exactly these keys."""
    return lambda value: type(value) is dict and set(value) == set(parts) and all(c(value[k]) for k, c in parts.items())


def _structure(**parts: _Check) -> _Check:
    """Check for a structure; residual blocks that are gone are in it only if there are any."""
    plain, deeper = _form(**parts), _form(**parts, blocks=_dict_of(lambda v: type(v) is str and v in AFTER))
    return lambda value: plain(value) or deeper(value)


def _anything(value: Any) -> bool:
    return True


def _row(value: Any) -> bool:
    right = _form(name=_is(str), block=_is(str), units_before=_count, units_after=_count)(value)
    return right and value["units_after"] <= value["units_before"]


def _pair(value: Any) -> bool:
    return _list_of(_count)(value) and len(value) == 2


# fields that earlier versions did not write
_METRICS_LATER = {"latency_conditions", "latency_change", "size_bytes", "by_layer"}


def _metrics(value: Any) -> bool:
    names = {f.name for f in fields(Metrics)}
    if type(value) is not dict or not names - _METRICS_LATER <= set(value) <= names:
        return False
    change = value.get("latency_change")
    if change is not None and not (_list_of(_real)(change) and len(change) == 3 and None not in change):
        return False
    if not isinstance(value.get("latency_conditions"), (str, type(None))) or not _dict_of(_real)(value["measured"]):
        return False
    if not _dict_of(_pair)(value.get("by_layer", {})):
        return False
    others = ("measured", "by_layer", "latency_conditions", "latency_change")
    if not all(_number(v) for k, v in value.items() if k not in others):
        return False
    counts = [value["params"], value["macs"], *(value.get(k) or 0 for k in ("nonzero", "effective_macs", "size_bytes"))]
    return all(map(_count, counts)) and (value["accuracy"] or 0) <= 1


_FORMS: dict[str, _Check] = {
    "format": _count,
    "builder": _form(kind=_is(str), name=_is(str), options=_dict_of(_anything)),
    "structure": _structure(
        attributes=_dict_of(_dict_of(_anything)),
        folded=_list_of(lambda v: _list_of(_is(str))(v) and len(v) == 2),
        channels_last=_list_of(_is(str)),
        frozen=_list_of(_is(str)),
    ),
    "before": _metrics,
    "after": _metrics,
    "layers": _list_of(_row),
    "left_whole": _dict_of(_is(str)),
    "removals": _dict_of(_list_of(_count)),
    "options": _dict_of(_anything),
    "versions": _dict_of(_is(str)),
    "history": _list_of(lambda v: type(v) is dict and type(v.get("event")) is str),
    "masks": _dict_of(_is(str)),
    "tensors": _dict_of(_is(str)),
    "not_finite": _list_of(_is(str)),
}
_LATER: dict[str, _Check] = {"inputs": are_described}
"""Parts that records of before do not have."""


def check_record(record: Mapping[str, Any]) -> None:
    """Raise :class:`ArtifactError` unless a record has all its parts, no others, and each has its form."""
    forms = _FORMS | {name: check for name, check in _LATER.items() if name in record}
    for what, names in (("lacks", forms.keys() - record.keys()), ("has an unknown", record.keys() - forms.keys())):
        if names:
            raise ArtifactError(f"the record {what} {min(names)!r}; it was not written by save()")
    for name, check in forms.items():
        if not check(record[name]):
            raise ArtifactError(f"the record has {name!r}: {_short(record[name])}, a form that save() never writes")


# -- architectures ------------------------------------------------------------------------------------------------

PREPROCESSING = (
    "num_classes", "input_size", "test_input_size", "min_input_size", "fixed_input_size", "pool_size", "global_pool",
    "crop_pct", "test_crop_pct", "crop_mode", "interpolation", "mean", "std",
)  # fmt: skip
OVERLAY = "pretrained_cfg_overlay"
"""What of timm's ``pretrained_cfg`` says how images become inputs, and names no file."""
_FETCHING = ("pretrained", "checkpoint", "cache_dir", "url", "hf_hub")


def check_builder(kind: str, name: str, options: Mapping[str, Any], is_model: Callable[[str], bool]) -> None:
    """Raise :class:`ArtifactError` unless building it runs timm's own code only, and reads neither files nor networks.

    Args:
        kind, name, options: of the builder.
        is_model: whether timm has a model of a name.
    """
    consent = "pass factory=, which builds the unpruned model, or trust=True if you trust who wrote the folder"
    if kind == "factory":
        raise ArtifactError(f"its architecture is built by {name!r}, code that load() would import and call; {consent}")
    if kind == "transformers":
        raise ArtifactError(
            f"its architecture is built by transformers from a configuration ({name}), which may name files; {consent}"
        )
    if kind != "timm":
        raise ArtifactError(f"unknown kind of builder {kind!r}; choose 'timm', 'transformers' or 'factory'")
    if not is_model(name) or any(mark in name for mark in ":/\\"):
        raise ArtifactError(
            f"its architecture {name!r} is none of timm's own names (hf-hub: and local-dir: read files that somebody "
            f"else wrote); {consent}"
        )
    overlay = options.get(OVERLAY)
    harmless = isinstance(overlay, dict) and set(overlay) <= set(PREPROCESSING)
    fetching = [k for k in options if any(word in k for word in _FETCHING) and not (k == OVERLAY and harmless)]
    if fetching:
        raise ArtifactError(f"its architecture is built with {fetching[0]!r}, which makes timm read files; {consent}")


def replace_blocks(model: nn.Module, blocks: Mapping[str, str]) -> None:
    """Put what is left of residual blocks that are gone in their places.

    Raises:
        ArtifactError: if the architecture has no such module.
    """
    modules = dict(model.named_modules())
    for name, after in blocks.items():
        path, _, attr = name.rpartition(".")
        if name not in modules or attr not in modules[path]._modules:
            raise ArtifactError(f"the architecture has no block {name!r}; it has changed since it was saved")
        modules[path]._modules[attr] = AFTER[after]()


def check_structure(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise :class:`ArtifactError` unless each recorded attribute may take the place of what the module has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in attributes.items():
        if name not in modules:
            raise ArtifactError(f"the architecture has no module {name!r}; it has changed since it was saved")
        module = modules[name]
        for key, value in values.items():
            place = f"{name}.{key}".lstrip(".")
            if key.startswith("_") or not key.isidentifier() or key in NOT_STRUCTURE:
                raise ArtifactError(f"the record sets {place!r}, which is no attribute that a removal changes")
            if key in module._parameters or key in module._buffers or key in module._modules:
                raise ArtifactError(f"the record sets {place!r}, which is a tensor or a layer and no plain value")
            old = module.__dict__.get(key, inspect.getattr_static(type(module), key, None))
            new = decode(value)
            if not _may_follow(new, old):
                raise ArtifactError(
                    f"the record sets {place!r} to {_short(new)}, and the architecture has {_short(old)} there; a "
                    "removal does not make that of it"
                )


def _may_follow(new: Any, old: Any) -> bool:
    """Whether a value is of the kind of the one that it replaces. What was None has no kind yet."""
    if isinstance(new, float) and not math.isfinite(new):
        return False
    if old is None or new is None:
        return _plain(new) and (old is None or _plain(old))
    if isinstance(new, (tuple, list)):
        like = old[-1] if isinstance(old, (tuple, list)) and len(old) else None
        pairs = [(v, old[i] if like is not None and i < len(old) else like) for i, v in enumerate(new)]
        return type(new) is type(old) and all(_may_follow(v, o) for v, o in pairs)
    if isinstance(new, dict):
        return type(old) is dict and all(_may_follow(v, old.get(k)) for k, v in new.items())
    if type(new) is int and type(old) is int:
        return abs(new) < 2**63 and (new >= 1 if old >= 1 else new >= 0 if old == 0 else True)
    if type(old) is float:
        return type(new) in (int, float)
    return type(new) is type(old) and type(new) in _SCALARS


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return type(value) in _SCALARS


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], folded: set[str]) -> None:
    """Raise :class:`ArtifactError` unless every tensor has a place in the architecture that it fits.

    Args:
        model: the unpruned architecture, batch-norms that were folded replaced already.
        tensors: what is to be put into it.
        folded: names of layers that a batch-norm was folded into: they may have got a bias.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    shared: dict[int, str] = {}
    for name, value in tensors.items():
        owner_name, _, attr = name.rpartition(".")
        owner = modules.get(owner_name)
        if owner is None or (attr not in owner._parameters and attr not in owner._buffers):
            raise ArtifactError(f"the architecture has no tensor {name!r}; it has changed since it was saved")
        is_parameter = attr in owner._parameters
        old = owner._parameters[attr] if is_parameter else owner._buffers[attr]
        found = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if old is None:
            weight = owner._parameters.get("weight")
            if is_parameter and not (
                owner_name in folded and attr == "bias" and weight is not None and value.ndim == 1
            ):
                raise ArtifactError(f"{name!r} has a value ({found}), and the architecture has none there")
            continue
        same_kind = value.dtype == old.dtype or (value.is_floating_point() and old.is_floating_point())
        shrunk = value.ndim == old.ndim and all(n <= o for n, o in zip(value.shape, old.shape, strict=True))
        if not same_kind or (is_parameter and (not shrunk or (value.numel() == 0 and old.numel() > 0))):
            raise ArtifactError(
                f"{name!r} is {found}, and the architecture has {str(old.dtype).removeprefix('torch.')} "
                f"{tuple(old.shape)}; pruning does not make that of it"
            )
        first = shared.setdefault(id(old), name)
        if first != name and not (tensors[first].shape == value.shape and bool((tensors[first] == value).all())):
            raise ArtifactError(f"{name!r} and {first!r} are one tensor in the architecture, and have two values")


def check_widths(module: nn.Module, name: str) -> None:
    """Raise :class:`ArtifactError` unless the sizes that a layer states are those of its tensors."""
    groups = getattr(module, "groups", 1)
    stated = dict(module.__dict__)
    try:
        refresh_widths(module)
        now = module.__dict__
        different = [k for k, v in stated.items() if k[0] != "_" and now[k] is not v and now[k] != v]
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"layer {name!r} has tensors that do not fit it: {error}") from error
    finally:
        module.__dict__.update(stated)
    out = getattr(module, "out_channels", groups)
    if different or (isinstance(module, nn.modules.conv._ConvNd) and out % groups):
        key = different[0] if different else "groups"
        raise ArtifactError(
            f"the record sets {f'{name}.{key}'.lstrip('.')!r} to {stated[key]!r}, which does not fit the tensors there"
        )


@contextmanager
def allocating_at_most(size: int, count: int) -> Iterator[None]:
    """Refuse to make tensors of more than ``size`` bytes in all, or more than ``count`` of them.

    Raises:
        ArtifactError: before the memory of the first one that goes over it is asked for.
    """
    with _Counting(size, count):
        yield


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, size: int, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size, self.count = size, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sized = bool(args) and isinstance(args[0], (list, tuple)) and all(isinstance(n, int) for n in args[0])
        if sized or func.__name__.startswith("arange"):
            numbers = args[0] if sized else [max(abs(n) for n in args)]
            self._take(math.prod(numbers) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize)
        found = func(*args, **kwargs)
        if not sized and isinstance(found, Tensor) and func._schema.returns[0].alias_info is None:
            self._take(found.numel() * found.itemsize)
        return found

    def _take(self, size: float) -> None:
        self.size -= int(size)
        self.count -= 1
        if self.size < 0 or self.count < 0:
            raise ArtifactError("its architecture is far larger than what was saved of it; the record is not true")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
