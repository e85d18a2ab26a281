"""What a user may pass to the pruner: each check says what was given, and what would do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.checks import check_count, check_number
from singe_plugin.errors import ConfigError
from singe_plugin.loop.pace import Pace
from singe_plugin.nested import call_model
from singe_plugin.run.guards import check_model
from singe_plugin.state import model_device

__all__ = ["base_options", "check_arguments", "forward_of", "settle_with"]

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


def base_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What was given of ``BasePruner``'s arguments behind the first three, and the defaults of the others.

    Raises:
        ConfigError: for a value that cannot mean anything.
        TypeError: for an argument that ``BasePruner`` does not have.
    """
    bound = inspect.signature(tp.pruner.BasePruner.__init__).bind(None, None, None, None, *args, **kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    options = dict(bound.arguments) | {"given": given}
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
    check_number("pruning_ratio", kwargs.get("pruning_ratio", 0.5), 0, 1, "[[", "fraction of units")
    if kwargs.get("round_to") is not None:
        check_count("round_to", kwargs["round_to"], 1, "number of channels")
    check_count("iterative_steps", kwargs.get("iterative_steps", 1), 1, "number of steps", _MOST_STEPS)
    check_number("max_pruning_ratio", kwargs.get("max_pruning_ratio", 1.0), 0, 1, "]]")


def settle_with(pace: Pace, options: dict[str, Any]) -> Pace:
    """The pace of a pruner with everything decided, and ``BasePruner``'s options that are the same thing set to it.

    Raises:
        ConfigError: if such an option was given twice, and differently.
    """
    if pace.heads != "dims":
        for name, chosen in (("prune_num_heads", pace.heads == "whole"), ("prune_head_dims", False)):
            if name in options["given"] and options[name] != chosen:
                raise ConfigError(
                    f"{name}={options[name]!r} and pace.heads={pace.heads!r} were both given; leave one out"
                )
            options[name] = chosen
    names = ("max_pruning_ratio", "round_to")
    for name in names:
        mine, theirs = getattr(pace, name), options[name]
        if mine is not None and name in options["given"] and mine != theirs:
            raise ConfigError(f"{name}={theirs!r} and pace.{name}={mine!r} were both given; leave one out")
    shared = {name: options[name] for name in names}
    found = pace.settle(order="layers", units_per_step=1, min_width=1, **shared)
    options |= {name: getattr(found, name) for name in names}
    return found
