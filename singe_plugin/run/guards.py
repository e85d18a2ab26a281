"""What every pruner checks of the model and of the parts that it is given: what was met, and what would do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.tuner import Tuner
from singe_plugin.nested import call_model
from singe_plugin.ranks import current
from singe_plugin.run.data import few, lone_example
from singe_plugin.state import RngState, preserved

__all__ = ["check_alone", "check_here", "check_launcher", "check_lone", "check_model", "check_parts", "parts_of"]


_PLAIN = "prune the plain float model, then convert it"
_ALONE = "prune in one process, save the result, and load it in all of them, or call singe_plugin.prune in all of them"


def check_here() -> None:
    """Raise :class:`ConfigError` if nothing may be removed here: in one of several processes, or in inference mode."""
    check_alone()
    if torch.is_inference_mode_enabled():
        raise ConfigError(
            "torch.inference_mode() is in force, under which nothing can be differentiated and what is made can never "
            "be trained; call this outside of it (torch.no_grad() is no obstacle)"
        )


def check_alone() -> None:
    """Raise :class:`ConfigError` if this is one of several processes of a process group that do not prune together.

    Each would score on data of its own and remove other units: the networks would no longer be the same.
    """
    group = torch.distributed
    if current().world == 1 and group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise ConfigError(
            f"torch.distributed is initialised and this is process {group.get_rank()} of {group.get_world_size()}; "
            f"each would score on its own data and remove other units; {_ALONE}"
        )


def check_launcher() -> None:
    """As :func:`check_here`, for a command that a launcher (``torchrun``) runs in several processes."""
    check_here()
    count = os.environ.get("WORLD_SIZE", "1")
    if current().world == 1 and count.isdigit() and int(count) > 1:
        raise ConfigError(
            f"WORLD_SIZE={count}: a launcher runs this command in {count} processes, which can prune units together if "
            f"torchrun starts them; else {_ALONE}"
        )


def check_model(model: Any) -> None:
    """Raise :class:`ConfigError` unless this is a plain model that can be changed, in the only process that does it."""
    check_here()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if type(model).__name__ == "OptimizedModule" or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("a compiled or scripted model cannot be pruned; prune the plain model, then compile it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(f"{type(model).__name__} wraps the model; prune model.module, then wrap it again")
    if any(type(part).__name__.startswith(("FullyShardedDataParallel", "FSDP")) for part in model.modules()):
        raise ConfigError(
            "the model is divided among processes (FSDP), and units are removed from whole models; prune the plain "
            "model, save the result, and load it before it is divided"
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{name!r} is scripted (torch.jit), and nothing of it can be seen or cut; put the plain module in its "
                "place, prune, then script it"
            )
    check_devices(model)
    check_parameters(model)


def check_parameters(model: nn.Module) -> None:
    """Raise :class:`ConfigError` unless every parameter has real values that a gradient can be taken for."""
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            layer = name.rpartition(".")[0] or type(model).__name__
            raise ConfigError(f"layer {layer!r} has no weights yet (it is lazy); run the model on a batch first")
        if parameter.is_meta:
            raise ConfigError(f"the model is on the meta device ({name!r}) and has no values; load its weights first")
        if parameter.is_inference():
            raise ConfigError(
                f"{name!r} was made under torch.inference_mode() and can never be differentiated; copy the model "
                "outside of it: model = copy.deepcopy(model)"
            )
        if parameter.is_complex() or parameter.layout is not torch.strided or parameter.is_quantized:
            kind = parameter.layout if parameter.layout is not torch.strided else parameter.dtype
            raise ConfigError(f"{name!r} has values of {kind}, which are not supported; {_PLAIN}")
    if next(model.parameters(), None) is None:
        raise ConfigError(f"{type(model).__name__} has no parameters, so there is nothing to prune; {_PLAIN}")


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


def check_lone(model: nn.Module, tuner: Tuner | None, example: Any) -> None:
    """Raise :class:`DataError` if fine-tuning would meet a batch of one example, and a batch-norm that it stops at."""
    if tuner is None or not tuner.options.steps or tuner.options.step_fn is not None or example is None:
        return
    if not lone_example(tuner.stream.batches):
        return
    rng = RngState.capture()
    try:
        with preserved(model), torch.no_grad():
            model.train()
            call_model(model, few(example, 1))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"a batch of the fine-tuning data has a single example, on which a batch-norm of {type(model).__name__} "
            "cannot train; give the loader drop_last=True, or another batch size"
        ) from error
    finally:
        rng.restore()


def parts_of(model: nn.Module, given: Any, what: str = "ignored_layers") -> list[Any]:
    """What was given as a list, names replaced by their modules; :class:`ConfigError` if it is no list."""
    given = () if given is None else given
    if isinstance(given, (str, nn.Module, torch.Tensor)) or not isinstance(given, Iterable):
        raise ConfigError(f"{what} must be a list of modules or names, got {given!r}; put it in a list")
    by_name = dict(model.named_modules(remove_duplicate=False))
    return [by_name.get(part, part) if isinstance(part, str) else part for part in given]


def check_parts(model: nn.Module, finetune: Any, callbacks: Sequence[Any], ignored: Sequence[Any]) -> None:
    """Raise :class:`ConfigError` for a fine-tuning, a callback or an ignored layer that is none."""
    if finetune is not None and not isinstance(finetune, (FineTune, Tuner)):
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
