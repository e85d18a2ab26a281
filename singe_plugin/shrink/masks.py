"""Masks in every form that users have become one, module -> parameter -> mask, and are multiplied into the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

from singe_plugin.checks import closest
from singe_plugin.errors import ConfigError
from singe_plugin.masks import LAYERS, fold_masks

__all__ = ["Masks", "apply_masks", "checked_masks", "is_flat", "mask_twin", "read_masks", "take_masks"]

Masks: TypeAlias = Mapping[str, Mapping[str, Tensor]]
_INPUT, _OUTPUT = "_input_", "_output_"
_FORMS = (
    "masks must be {parameter name: tensor}, as prune_weights() and masks_of() give them, or "
    "{module: {parameter: tensor}}, as NNI's compress() returns them"
)


def take_masks(model: nn.Module) -> dict[str, Tensor]:
    """Fold the masks that a model holds into its weights: those of ``hold_masks`` and of ``torch.nn.utils.prune``.

    Args:
        model: the model, which is changed in place; its layers are plain ones afterwards.

    Returns:
        parameter name -> mask.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1))
        >>> _ = prune.l1_unstructured(net[0], "weight", amount=1)
        >>> list(take_masks(net)), [name for name, _ in net.named_parameters()]
        (['0.weight'], ['0.bias', '0.weight'])
    """
    found = fold_masks(model)
    for name, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                attr = str(hook._tensor_name)
                found[f"{name}.{attr}".lstrip(".")] = module.get_buffer(f"{attr}_mask").clone()
                prune.remove(module, attr)  # type: ignore[no-untyped-call]
    return found


def read_masks(path: str | Path) -> Any:
    """Read the dictionaries of masks that ``torch.save`` wrote, or the ``masks.safetensors`` of a saved result.

    Nothing but tensors and dictionaries is unpickled.

    Raises:
        ConfigError: if the file cannot be read, or is no file of masks.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([dict, (_plain_dict, "collections.defaultdict")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"the masks {str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # what is no such file makes the unpickler fail in any way
        raise ConfigError(
            f"{str(path)!r} is not a file of masks ({type(error).__name__}); write one with torch.save(masks, path); "
            f"{_FORMS}"
        ) from error


def _plain_dict(*_: Any) -> dict[str, Any]:
    """Stand for a ``defaultdict``: NNI's masks are one, and PyTorch's safe unpickler fills plain ones only."""
    return {}


def is_flat(masks: Any) -> bool:
    """Say whether masks are given by parameter name, not by module and parameter."""
    return isinstance(masks, Mapping) and all(isinstance(mask, Tensor) for mask in masks.values())


def checked_masks(model: nn.Module, *given: Any) -> dict[str, dict[str, Tensor]]:
    """Return masks as ``{module: {parameter: mask}}``, each on its parameter's device; nothing is changed.

    Args:
        model: the model, whose layers are plain ones.
        given: masks by parameter name, or by module and parameter; what any of them masks is masked.

    Raises:
        ConfigError: for names, parameters, shapes or values that cannot be, with the nearest remedy.
    """
    wrapped = [name for name, m in model.named_modules() if "_nni_wrapper" in m._modules]
    if wrapped:
        raise ConfigError(f"{wrapped[0]!r} is still wrapped by NNI; call pruner.unwrap_model() before shrink()")
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, Tensor]] = {}
    for masks in given:
        for name, targets in _by_module(masks).items():
            if name not in modules:
                near = closest(name, modules)
                raise ConfigError(f"the masks name {name!r}, which is no module of {type(model).__name__}{near}")
            own = found.setdefault(name, {})
            for target, mask in targets.items():
                if mask is not None:
                    fitting = _fitting(modules[name], name, target, mask)
                    own[target] = own[target] * fitting if target in own else fitting
    return found


def _by_module(masks: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(masks, Mapping) or not all(isinstance(name, str) for name in masks):
        raise ConfigError(f"{_FORMS}; got {type(masks).__name__}")
    if not is_flat(masks):
        strange = [name for name, targets in masks.items() if not isinstance(targets, Mapping)]
        if strange:
            raise ConfigError(f"{_FORMS}; {strange[0]!r} has {type(masks[strange[0]]).__name__}")
        return masks
    found: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ConfigError(
                f"the mask of {name!r} has values other than 0 and 1; a mask has 1 or True for what stays and 0 or "
                "False for what is masked (a state dict has weights; the masks of it are {name: weight != 0})"
            )
        module, _, target = name.rpartition(".")
        found.setdefault(module, {})[target] = mask
    return found


def _fitting(module: nn.Module, name: str, target: str, mask: Any) -> Tensor:
    """Return a mask in the shape of its parameter."""
    label, kind = f"{name}.{target}".lstrip("."), type(module).__name__
    if not isinstance(mask, Tensor):
        raise ConfigError(f"the mask of {label} is {type(mask).__name__}, not a tensor")
    if target.startswith((_INPUT, _OUTPUT)):
        return mask.detach()
    parameter = module._parameters.get(target)
    if parameter is None and isinstance(getattr(module, target, None), Tensor):
        raise ConfigError(
            f"the masks name {label}, which is no plain parameter of {kind}: it is a buffer, or computed from other "
            "tensors; remove the parametrization or weight norm first, or leave this mask out"
        )
    if parameter is None:
        near = closest(target, module._parameters)
        raise ConfigError(f"the masks name {label}, but {kind} has no such parameter{near}")
    try:
        wide = mask.detach().to(parameter).expand_as(parameter)
    except RuntimeError as error:
        raise ConfigError(
            f"the mask of {label} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}; "
            "was it made for another model?"
        ) from error
    return wide.clone()


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Multiply the parameters by their masks; masks of inputs and outputs go into the layer's weights.

    Raises:
        ConfigError: for a mask of an input or output that is not one factor per channel of a convolution or linear
            layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, targets in masks.items():
        for target, mask in targets.items():
            module = modules[name]
            if target.startswith((_INPUT, _OUTPUT)):
                _apply_to_layer(module, name, target, mask)
            else:
                parameter = module._parameters[target]
                assert parameter is not None
                parameter.data = parameter.data * mask


def _apply_to_layer(module: nn.Module, name: str, target: str, mask: Tensor) -> None:
    """Multiply the weights of a layer by the mask of its input or output."""
    reads = target.startswith(_INPUT)
    if bool((mask == 1).all()):
        return
    grouped = reads and getattr(module, "groups", 1) > 1
    if not isinstance(module, LAYERS) or grouped or getattr(module, "transposed", False):
        raise ConfigError(
            f"the mask of {name}.{target} cannot be folded into {type(module).__name__}; only plain convolutions and "
            "linear layers have weights for it"
        )
    weight = module.weight
    channels = weight.shape[1 if reads else 0]
    dim = mask.ndim - 1 if isinstance(module, nn.Linear) else mask.ndim - (weight.ndim - 1)
    factors = mask.movedim(dim, 0).reshape(mask.shape[dim], -1) if 0 <= dim < mask.ndim else mask.reshape(1, -1)
    if len(factors) != channels or not bool((factors == factors[:, :1]).all()):
        raise ConfigError(
            f"the mask of {name}.{target} (shape {tuple(mask.shape)}) is not one factor for each of {channels} "
            "channels, so it cannot be folded into the weights"
        )
    one = factors[:, 0].to(weight)
    shape = [1, -1, *[1] * (weight.ndim - 2)] if reads else [-1, *[1] * (weight.ndim - 1)]
    weight.data = weight.data * one.view(shape)
    if not reads and module.bias is not None:
        module.bias.data = module.bias.data * one


def mask_twin(model: nn.Module, masks: Masks) -> nn.Module:
    """Copy a model, with the masks for parameters; what is left of a copy that is cut along fits the smaller model."""
    made = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor) and not v.is_leaf]
    twin = copy.deepcopy(model, {id(v): v.detach() for v in made})  # what a forward pass left: it cannot be copied
    for parameter in twin.parameters():
        parameter.data = torch.ones_like(parameter)
    apply_masks(twin, masks)
    return twin
