"""What a user may pass to the pruner: each check says what was given, and what would do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.budget import RATIOS
from singe_plugin.errors import ConfigError
from singe_plugin.nested import call_model
from singe_plugin.state import model_device

from ..checks import check_model

_MOST_STEPS = 100_000


def check_arguments(model: Any, example_inputs: Any, importance: Any) -> None:
    check_model(model)
    if not callable(importance):
        raise ConfigError(f"importance must be callable (group -> scores), got {type(importance).__name__}")
    if not isinstance(example_inputs, (Tensor, tuple, list, dict)):
        raise ConfigError(
            f"example_inputs must be a tensor, a tuple of arguments or a dict of keywords, got "
            f"{type(example_inputs).__name__}"
        )
    device = model_device(model)
    flat = example_inputs.values() if isinstance(example_inputs, dict) else example_inputs
    tensors = [example_inputs] if isinstance(example_inputs, Tensor) else [t for t in flat if isinstance(t, Tensor)]
    for tensor in tensors:
        if tensor.ndim and not len(tensor):
            raise ConfigError(
                f"example_inputs have the shape {tuple(tensor.shape)}: there is no example in them, and nothing could "
                "be verified with it; give two examples"
            )
        if tensor.device != device:
            raise ConfigError(
                f"example_inputs are on {tensor.device} but the model is on {device}; move one to the other"
            )


def check_ratios(ratios: Any) -> Any:
    if isinstance(ratios, Mapping):
        for name, ratio in ratios.items():
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
                raise ConfigError(f"ratios must be inside [0, 1[, got {ratio!r} for {name!r}")
        return ratios
    if isinstance(ratios, str) and ratios in RATIOS:
        return ratios
    raise ConfigError(f"unknown ratios {ratios!r}; choose one of {', '.join(RATIOS)} or give a dict")


def check_min_width(width: Any) -> int:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ConfigError(f"min_width={width!r} is not a number of units; give a whole number >= 1 (1 is no limit)")
    return width


def base_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What was given of ``BasePruner``'s arguments behind the first three, and the defaults of the others.

    Raises:
        ConfigError: for a value that cannot mean anything.
        TypeError: for an argument that ``BasePruner`` does not have.
    """
    bound = inspect.signature(tp.pruner.BasePruner.__init__).bind(None, None, None, None, *args, **kwargs)
    bound.apply_defaults()
    options = dict(bound.arguments)
    for old, new in (("ch_sparsity", "pruning_ratio"), ("ch_sparsity_dict", "pruning_ratio_dict")):
        if options[old] is not None:
            options[new] = options[old]
    check_base_arguments(options)
    return options


def forward_of(options: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How the model is called: ``forward_fn`` and ``output_transform``, if they are given."""
    forward, transform = options["forward_fn"] or call_model, options["output_transform"]
    if transform is None:
        return forward
    return lambda model, inputs: transform(forward(model, inputs))


def check_base_arguments(kwargs: dict[str, Any]) -> None:
    ratio = kwargs.get("pruning_ratio", 0.5)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ConfigError(f"pruning_ratio={ratio!r} is not a fraction of units inside [0, 1[")
    round_to = kwargs.get("round_to")
    if round_to is not None and (isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1):
        raise ConfigError(f"round_to={round_to!r} is not a number of channels; give a whole number >= 1, or None")
    steps = kwargs.get("iterative_steps", 1)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
        raise ConfigError(
            f"iterative_steps={steps!r} is not a number of steps; give a whole number >= 1 and at most {_MOST_STEPS}"
        )
    top = kwargs.get("max_pruning_ratio", 1.0)
    if isinstance(top, bool) or not isinstance(top, (int, float)) or not 0 < top <= 1:
        raise ConfigError(f"max_pruning_ratio={top!r} is not a fraction inside ]0, 1]")
