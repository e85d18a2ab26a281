"""NNI's masks: reading, checking, and folding them into the weights of a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError

__all__ = ["checked_masks", "fold_masks"]

_INPUT, _OUTPUT = "_input_", "_output_"
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def checked_masks(model: nn.Module, masks: Any) -> dict[str, dict[str, Tensor]]:
    """Masks as ``{module: {target: tensor}}``, each on its parameter's device; what was given is not changed.

    Args:
        model: the unwrapped model.
        masks: what NNI's pruners return, or the path of a file that ``torch.save`` wrote.

    Raises:
        ConfigError: for names, targets or shapes that the model does not have, with the nearest remedy.
    """
    if isinstance(masks, (str, Path)):
        masks = _loaded(masks)
    if not isinstance(masks, Mapping) or not all(isinstance(m, Mapping) for m in masks.values()):
        raise ConfigError("masks must be {module: {parameter: tensor}}, as compress() returns them")
    wrapped = [name for name, m in model.named_modules() if "_nni_wrapper" in m._modules]
    if wrapped:
        raise ConfigError(f"{wrapped[0]!r} is still wrapped by NNI; call pruner.unwrap_model() before shrink()")
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        if name not in modules:
            raise ConfigError(f"the masks name {name!r}, which is no module of {type(model).__name__}")
        for target, mask in targets.items():
            if mask is not None:
                found.setdefault(name, {})[target] = _checked(modules[name], name, target, mask)
    return found


def _loaded(path: str | Path) -> Any:
    """What ``torch.save`` wrote, if that is dictionaries of tensors; nothing else is unpickled."""
    try:
        with torch.serialization.safe_globals([dict, (_plain_dict, "collections.defaultdict")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"the masks {str(path)!r} cannot be read: {error}") from error
    except Exception as error:  # what is no such file makes the unpickler fail in any way
        raise ConfigError(
            f"{str(path)!r} is not a file of masks ({type(error).__name__}); write one with torch.save(masks, path), "
            "where masks is what compress() returned: {module: {parameter: tensor}}"
        ) from error


def _plain_dict(*_: Any) -> dict[str, Any]:
    """What stands for a ``defaultdict``: NNI's masks are one, and PyTorch's safe unpickler fills plain ones only."""
    return {}


def _checked(module: nn.Module, name: str, target: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ConfigError(f"the mask of {name}.{target} is {type(mask).__name__}, not a tensor")
    if target.startswith((_INPUT, _OUTPUT)):
        return mask.detach()
    parameter = module._parameters.get(target)
    if parameter is None:
        raise ConfigError(f"the masks name {name}.{target}, but {type(module).__name__} has no such parameter")
    try:
        wide = mask.detach().to(parameter).expand_as(parameter)
    except RuntimeError as error:
        raise ConfigError(
            f"the mask of {name}.{target} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}; "
            "was it made for another model?"
        ) from error
    return wide.clone()


@torch.no_grad()
def fold_masks(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
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
                _fold_activation(module, name, target, mask)
            else:
                parameter = module._parameters[target]
                assert parameter is not None
                parameter.data = parameter.data * mask


def _fold_activation(module: nn.Module, name: str, target: str, mask: Tensor) -> None:
    reads = target.startswith(_INPUT)
    if bool((mask == 1).all()):
        return
    if (
        not isinstance(module, _LAYERS)
        or (reads and getattr(module, "groups", 1) > 1)
        or getattr(module, "transposed", 0)
    ):
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
