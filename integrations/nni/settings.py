"""Checks of a config list, whose errors say what is wrong with it, and the types of layers that NNI may prune."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

from nni.compression.base.compressor import register_scalers
from nni.compression.base.config import default_config_schema, select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils.scaling import Scaling
from schema import SchemaError
from torch import nn

from singe_plugin.axes import AxisGraph
from singe_plugin.checks import check_number, closest
from singe_plugin.errors import ConfigError
from singe_plugin.method.units import tied_parameters

from .pieces import called, kernel_of

__all__ = [
    "check_called",
    "check_config",
    "check_entries",
    "check_free",
    "check_optimizers",
    "make_scalers",
    "register_types",
    "selected_modules",
    "translated",
]

_ALIGNED = PruningSetting.default_setting["bias"]


def register_types(model: nn.Module) -> None:
    """Tell NNI of every type of layer in a model that has parameters: timm's norms and convolutions, layer scales, ...

    Types that NNI or somebody else has registered stay as they are.
    """
    for module in model.modules():
        name = type(module).__name__
        own = [attr for attr, value in module._parameters.items() if value is not None and value.ndim]
        if name in PruningSetting.registry or not own:
            continue
        ranked = ["weight"] if "weight" in own else own  # a gain beside the weight is ranked by nobody
        setting = {attr: deepcopy(PruningSetting.default_setting["weight"]) for attr in ranked}
        if "weight" in own and "bias" in module._parameters:
            setting["bias"] = deepcopy(_ALIGNED)
        PruningSetting.register(name, setting)


def translated(config_list: Any) -> list[dict[str, Any]]:
    """Return a copy of a config list in today's keys; of a legacy one, entries that only exclude join the others.

    Raises:
        ConfigError: if it is no list of dictionaries.
    """
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(config, Mapping) for config in config_list):
        raise ConfigError(
            "config_list must be a list of dictionaries, e.g. [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}], got "
            f"{type(config_list).__name__}"
        )
    given = [dict(deepcopy(config)) for config in config_list]
    found: list[dict[str, Any]] = trans_legacy_config_list(given)
    if found is given:
        return given
    for config in found:
        for setting in config.get("target_settings", {}).values():
            if "group_id" in setting:  # NNI's translation of total_sparsity makes a key that its schema refuses
                setting["global_group_id"] = setting.pop("group_id")
    return [config for config, old in zip(found, given, strict=True) if "exclude" not in old]


def selected_modules(model: nn.Module, config_list: list[dict[str, Any]]) -> list[dict[str, nn.Module]]:
    """Return the modules that each entry of a config list selects."""
    return [select_modules_by_config(model, config)[0] for config in config_list]


def check_entries(config_list: list[dict[str, Any]], min_width: int) -> None:
    """Raise :class:`ConfigError` for an entry that is not in NNI's form, or whose ratios cannot be."""
    schema = default_config_schema("pruning")
    for number, config in enumerate(config_list):
        for setting in (config, *_settings(config)):
            _check_ratios(number, setting, min_width)
        try:
            schema.validate(config)
        except SchemaError as error:
            raise ConfigError(
                f"config_list[{number}] is not what NNI's pruners take: {' '.join(str(error).split())}"
            ) from error


def check_config(model: nn.Module, config_list: list[dict[str, Any]]) -> None:
    """Raise :class:`ConfigError` if an entry selects nothing, or something that cannot be pruned.

    Args:
        model: the model that is pruned.
        config_list: the entries, in the form that :func:`check_entries` has checked.
    """
    names: dict[int, str] = {}
    ties = tied_parameters(model)
    for number, config in enumerate(config_list):
        modules = _selected(model, number, config)
        if not modules:
            raise ConfigError(
                f"config_list[{number}] selects no layer of {type(model).__name__}{_unknown_types(model, config)}"
            )
        for name, module in sorted(modules.items()):
            _check_targets(number, config, name, module)
            first = names.setdefault(id(module), name)
            if first != name:
                raise ConfigError(
                    f"config_list[{number}]: {first!r} and {name!r} are one module under two names, which NNI cannot "
                    f"wrap twice; exclude one (exclude_op_names=[{max(first, name)!r}])"
                )
            for attr in PruningSetting.get(module, _public(config)):
                others = [n for n in ties.get(id(module._parameters.get(attr)), ()) if n != f"{name}.{attr}"]
                if others:
                    raise ConfigError(
                        f"config_list[{number}]: {name}.{attr} and {', '.join(others)} are one tensor; NNI's wrapper "
                        "would copy it and the layers would drift apart; exclude the layer, or untie them"
                    )


def check_free(model: nn.Module, config_list: list[dict[str, Any]], existed: Mapping[str, ModuleWrapper]) -> None:
    """Raise :class:`ConfigError` if another compressor's wrappers prune what a config list asks for already.

    NNI ignores such settings.
    """
    for config, modules in zip(config_list, selected_modules(model, config_list), strict=True):
        for name, module in modules.items():
            taken = set(existed[name].pruning_target_spaces) if name in existed else set()
            both = taken & set(PruningSetting.get(module, _public(config)))
            if both:
                raise ConfigError(
                    f"{name!r} is pruned already by the compressor that this one is made from; give it to one of them"
                )


def check_called(graph: AxisGraph, config_list: list[dict[str, Any]]) -> None:
    """Raise :class:`ConfigError` for a selected layer whose parameters the model reads without calling the layer.

    NNI's wrapper takes the place of the layer's forward: its mask would have no effect, and the layer would not train.
    """
    for number, modules in enumerate(selected_modules(graph.model, config_list)):
        passed = sorted(name for name, module in modules.items() if not called(graph, module))
        if passed:
            raise ConfigError(
                f"config_list[{number}] selects layers whose parameters {type(graph.model).__name__} uses without "
                f"calling them, so NNI's wrappers can neither mask nor train them; exclude_op_names={passed}"
            )


def check_optimizers(model: nn.Module, evaluator: Any) -> None:
    """Raise :class:`ConfigError` if a ``TorchEvaluator`` was made for another model: it would train nothing."""
    optimizers = getattr(evaluator, "_tmp_optimizers", None)
    held = {id(p) for optimizer in optimizers or () for group in optimizer.param_groups for p in group["params"]}
    if held and not held & {id(p) for p in model.parameters()}:
        raise ConfigError(
            "the evaluator's optimizer holds none of the model's parameters, so training would change nothing; make it "
            "from model.parameters() of this model"
        )


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an entry is not about the choice of layers."""
    return {k: v for k, v in config.items() if not k.startswith(("op_", "exclude_op_"))}


def _settings(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    found = config.get("target_settings")
    return [s for s in found.values() if isinstance(s, Mapping)] if isinstance(found, Mapping) else []


def _selected(model: nn.Module, number: int, config: dict[str, Any]) -> dict[str, nn.Module]:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for given in config.get("op_names", ()):
        if given not in known:
            raise ConfigError(
                f"config_list[{number}]: op_names has {given!r}, which is no layer of {type(model).__name__}"
                f"{closest(given, known)}"
            )
    try:
        return dict(selected_modules(model, [config])[0])
    except re.error as error:
        raise ConfigError(f"config_list[{number}]: {error.pattern!r} is no regular expression ({error})") from error


def _check_targets(number: int, config: dict[str, Any], name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind not in PruningSetting.registry:
        raise ConfigError(
            f"config_list[{number}] selects {name!r}, but {kind} has no parameters of its own; exclude it "
            "(exclude_op_types) or name the layers inside it"
        )
    try:
        targets = PruningSetting.get(module, _public(config))
    except KeyError as error:
        target = str(error.args[0])
        if target.startswith(("_input_", "_output_")):
            raise ConfigError(
                f"config_list[{number}]: inputs and outputs cannot be ranked, only masked along with a layer; say with "
                f"which in target_settings={{{target!r}: {{'align': {{'module_name': ..., 'target_name': 'weight', "
                "'dims': [0]}, 'granularity': 'per_channel', 'apply_method': 'mul'}}"
            ) from error
        known = PruningSetting.registry[kind]
        raise ConfigError(
            f"config_list[{number}]: {kind} has no target {target!r}, only {', '.join(known)}{closest(target, known)}"
        ) from error
    for target in targets:
        if target.startswith(("_input_", "_output_")) or module._parameters.get(target) is not None:
            continue
        if getattr(module, target, "missing") is not None:  # an absent bias is None
            raise ConfigError(
                f"config_list[{number}]: {target!r} of {name!r} ({kind}) is no plain parameter; exclude the layer, or "
                "remove its weight norm or parametrization first"
            )


def _check_ratios(number: int, setting: Mapping[str, Any], min_width: int) -> None:
    found = {key: setting.get(key) for key in ("sparse_ratio", "min_sparse_ratio", "max_sparse_ratio")}
    for key, value in found.items():
        if isinstance(value, (int, float)):
            check_number(f"config_list[{number}]: {key}", value, 0, 1, "[]")
    ratio, low, high = found.values()
    if ratio == 1 and min_width > 0:
        raise ConfigError(
            f"config_list[{number}]: sparse_ratio=1 would leave a layer without a single channel; choose less, or "
            "min_width=0 if that is what you want"
        )
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
        raise ConfigError(f"config_list[{number}]: min_sparse_ratio={low} is above max_sparse_ratio={high}")


def _unknown_types(model: nn.Module, config: Mapping[str, Any]) -> str:
    known = {type(m).__name__ for m in model.modules()}
    for given in config.get("op_types", ()):
        if given not in known:
            return f": op_types has {given!r}, which is not there{closest(given, known)}"
    return ": what it includes is excluded again, or no name matches op_names_re"


def make_scalers(name: str, wrapper: ModuleWrapper, targets: dict[str, PruningTargetSpace], default: Any) -> None:
    """Make NNI's scalers for the targets of one layer, with errors that say what does not fit.

    Args:
        name: the name of the layer.
        wrapper: the wrapper of the layer.
        targets: the target spaces of the layer.
        default: gives the granularity that ``"default"`` means for a target space.
    """
    for target, space in targets.items():
        parameter = space.type is TargetType.PARAMETER
        if not parameter and (space.sparse_ratio is not None or space.sparse_threshold is not None):
            raise ConfigError(
                f"{name}.{target} has a ratio, but only parameters can be ranked (as in NNI's own pruners); "
                f"align it to the layer's weight with target_settings={{{target!r}: {{'align': ...}}}}"
            )
        if parameter and space.granularity == "per_channel":
            raise ConfigError(
                f"{name}.{target}: granularity 'per_channel' is for inputs and outputs; a parameter's is "
                "'out_channel', 'in_channel' or a block such as [4, 1]"
            )
        if not parameter and space.granularity in ("out_channel", "in_channel"):
            raise ConfigError(f"{name}.{target}: the granularity of an input or output is 'per_channel' or a block")
        _make_scaler(name, target, space, default)
    layer = wrapper.module
    if isinstance(layer, nn.modules.conv._ConvTransposeNd) and "weight" in targets:
        _transposed(name, layer, targets)


def _make_scaler(
    name: str, target: str, space: PruningTargetSpace, default: Callable[[PruningTargetSpace], Any]
) -> None:
    shape = None if space.target is None else tuple(space.target.shape)
    try:
        register_scalers({name: {target: space}}, default)
        fits = shape is None or all(k == -1 or (k > 0 and n % k == 0) for k, n in zip(kernel_of(space), shape))
    except (AssertionError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{name}.{target}: granularity {space.granularity!r} does not fit its shape {shape}; give 'out_channel', "
            "'in_channel' or the extents of a block, one per dimension"
        ) from error
    if not fits:
        raise ConfigError(
            f"{name}.{target}: its shape {shape} cannot be divided into blocks of {kernel_of(space)}; choose extents "
            "that divide its sizes, or exclude the layer"
        )


def _transposed(name: str, layer: Any, targets: dict[str, PruningTargetSpace]) -> None:
    """Scale a transposed convolution: its output channels are dimension 1 of its weight, its inputs dimension 0."""
    kernel = {"out_channel": [-1, 1], "in_channel": [1]}.get(str(targets["weight"].granularity))
    if kernel is None:
        return
    if layer.groups > 1 and len(kernel) > 1:
        raise ConfigError(
            f"{name!r}: the output channels of a transposed convolution with groups={layer.groups} cannot be "
            "masked one by one in NNI's form; exclude it"
        )
    targets["weight"]._scaler = Scaling(kernel, kernel_padding_mode="back", kernel_padding_val=-1)
    if "bias" in targets and (targets["bias"].align or {}).get("module_name", "") is None:
        targets["bias"]._setting["align"]["dims"] = [1]
