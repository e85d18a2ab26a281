"""What every pruner checks of the model and of the parts that it is given: what was met, and what would do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ConfigError
from singe_plugin.events import Callback
from singe_plugin.finetune import FineTune

__all__ = ["check_model", "check_parts", "parts_of"]


def check_model(model: Any) -> None:
    """Raise :class:`ConfigError` unless this is a plain model that can be changed."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model).__name__ == "OptimizedModule" or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("a compiled or scripted model cannot be pruned; prune the plain model, then compile it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(f"{type(model).__name__} wraps the model; prune model.module, then wrap it again")
    check_devices(model)


def check_devices(model: nn.Module) -> None:
    """Raise :class:`ConfigError` unless all parameters and buffers are on one device, and new tensors on the CPU."""
    if (usual := torch.get_default_device()).type != "cpu":
        raise ConfigError(
            f"torch.set_default_device({str(usual)!r}) is in force, and what is counted here belongs on the CPU; call "
            "this inside `with torch.device('cpu'):`"
        )
    first: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        first.setdefault(tensor.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in first.items())
        raise ConfigError(f"the model is spread over several devices ({places}); move it to one, as model.to('cuda:0')")


def parts_of(model: nn.Module, given: Any, what: str = "ignored_layers") -> list[Any]:
    """What was given as a list, names replaced by their modules; :class:`ConfigError` if it is no list."""
    given = () if given is None else given
    if isinstance(given, (str, nn.Module, torch.Tensor)) or not isinstance(given, Iterable):
        raise ConfigError(f"{what} must be a list of modules or names, got {given!r}; put it in a list")
    by_name = dict(model.named_modules(remove_duplicate=False))
    return [by_name.get(part, part) if isinstance(part, str) else part for part in given]


def check_parts(model: nn.Module, finetune: Any, callbacks: Sequence[Any], ignored: Sequence[Any]) -> None:
    """Raise :class:`ConfigError` for a fine-tuning, a callback or an ignored layer that is none."""
    if finetune is not None and not isinstance(finetune, FineTune):
        raise ConfigError(f"finetune must be a FineTune, got {type(finetune).__name__}; use FineTune(loader, steps)")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks must be singe_plugin.Callback objects, got {callback!r}; derive from it")
    own = {id(part) for part in (*model.modules(), *model.parameters())}
    for layer in ignored:
        if id(layer) not in own:
            raise ConfigError(
                f"ignored_layers: {layer!r} is no module or parameter of the model; give objects of it, e.g. "
                "[model.fc], or names of modules"
            )
