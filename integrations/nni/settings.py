"""Which types of layers NNI may prune, and what is wrong with a config list, in one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from nni.compression.base.config import default_config_schema, select_modules_by_config
from nni.compression.base.setting import PruningSetting
from schema import SchemaError
from torch import nn

from singe_plugin.errors import ConfigError

__all__ = ["check_config", "register_types", "selected_modules"]

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
        active = PruningSetting.default_setting["weight"]
        setting = {attr: deepcopy(active) for attr in own}
        if "weight" in own and "bias" in module._parameters:
            setting["bias"] = deepcopy(_ALIGNED)
        PruningSetting.register(name, setting)


def selected_modules(model: nn.Module, config_list: list[dict[str, Any]]) -> list[dict[str, nn.Module]]:
    """For every entry of a config list, the modules that it selects."""
    return [select_modules_by_config(model, config)[0] for config in config_list]


def check_config(model: nn.Module, config_list: list[dict[str, Any]], keep_at_least: int) -> None:
    """Raise :class:`ConfigError` for a config list that cannot mean anything.

    Checked are NNI's own schema, that every entry selects a layer with parameters, and that no ratio removes all.
    """
    schema = default_config_schema("pruning")
    for number, config in enumerate(config_list):
        try:
            schema.validate(config)
        except SchemaError as error:
            raise ConfigError(
                f"config_list[{number}] is not what NNI's pruners take: {' '.join(str(error).split())}"
            ) from error
        _check_ratios(number, config, keep_at_least)
        for setting in config.get("target_settings", {}).values():
            _check_ratios(number, setting, keep_at_least)
    for number, (config, modules) in enumerate(zip(config_list, selected_modules(model, config_list), strict=True)):
        if not modules:
            raise ConfigError(f"config_list[{number}] selects no layer of {type(model).__name__}{_hint(model, config)}")
        for name, module in modules.items():
            if type(module).__name__ not in PruningSetting.registry:
                raise ConfigError(
                    f"config_list[{number}] selects {name!r}, but {type(module).__name__} has no parameters of its "
                    "own; exclude it (exclude_op_types) or name the layers inside it"
                )


def _check_ratios(number: int, setting: Mapping[str, Any], keep_at_least: int) -> None:
    ratio = setting.get("sparse_ratio")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"config_list[{number}]: sparse_ratio={ratio} is not inside [0, 1[")
    if ratio == 1 and keep_at_least > 0:
        raise ConfigError(
            f"config_list[{number}]: sparse_ratio=1 would leave a layer without a single channel; choose less, or "
            "keep_at_least=0 if that is what you want"
        )
    low, high = setting.get("min_sparse_ratio"), setting.get("max_sparse_ratio")
    if low is not None and high is not None and low > high:
        raise ConfigError(f"config_list[{number}]: min_sparse_ratio={low} is above max_sparse_ratio={high}")


def _hint(model: nn.Module, config: Mapping[str, Any]) -> str:
    types = {type(m).__name__ for m in model.modules()}
    names = {n for n, _ in model.named_modules() if n}
    for key, known in (("op_types", types), ("op_names", names)):
        for given in config.get(key) or ():
            if given not in known:
                near = difflib.get_close_matches(given, sorted(known), 3, 0.5)
                return f": {key} has {given!r}, which is not there" + (
                    f" (did you mean {', '.join(near)}?)" if near else ""
                )
    return ": what it includes is excluded again, or no name matches op_names_re"
