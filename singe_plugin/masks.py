"""Masks on single weights, held by a parametrization: whatever an optimizer does, a masked weight is zero.

A mask is a buffer (``bool``, of the weight's shape) of ``layer.parametrizations.weight[0]``; the parameter itself is
``layer.parametrizations.weight.original``, the *same object* as before, so that optimizers keep their hold of it.
:func:`fold_masks` makes the masks permanent and gives the plain layers back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from singe_plugin.errors import ConfigError

__all__ = [
    "LAYERS",
    "WeightMask",
    "fold_masks",
    "hold_mask",
    "hold_masks",
    "mask_module",
    "masks_of",
    "named_tensors",
    "plain_tensors",
    "plain_types",
    "plain_weights",
    "weight_of",
    "weight_slot",
]


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)  # whose single weights, inputs and outputs can be masked


class WeightMask(nn.Module):
    """The parametrization: the weight where the mask is true, zero elsewhere.

    Args:
        mask: ``bool``, of the weight's shape.

    Example:
        >>> WeightMask(torch.tensor([True, False]))(torch.tensor([2.0, 3.0]))
        tensor([2., 0.])
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order: tuple[str, ...] = ()

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; its gradient is zero where it is masked."""
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What an assignment to the layer's weight stores."""
        return weight


def mask_module(layer: nn.Module) -> WeightMask | None:
    """The mask that a layer's weight has, or None. (A weight that is computed in other ways, too, has none.)"""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    steps = list(_list_of(layer))
    return steps[0] if len(steps) == 1 and isinstance(steps[0], WeightMask) else None


def _list_of(layer: nn.Module) -> nn.ModuleList:
    """The list of parametrizations of a layer's weight, which holds the parameter."""
    return cast(nn.ModuleList, cast(nn.ModuleDict, layer.parametrizations)["weight"])


def hold_mask(layer: nn.Module, mask: Tensor | None = None) -> WeightMask:
    """Put a mask on a layer's weight, or set the one that it has; what is masked becomes zero.

    Args:
        layer: with a plain parameter ``weight``, or a masked one.
        mask: ``bool``, of its shape; None masks nothing, or leaves the mask that is there.

    Returns:
        the parametrization.
    """
    held = mask_module(layer)
    if held is None:
        weight = layer._parameters["weight"]
        assert weight is not None
        order = tuple(layer._parameters)
        held = WeightMask(torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        held.order = order
        parametrize.register_parametrization(layer, "weight", held)
    if mask is not None:
        with torch.no_grad():
            held.mask.copy_(mask)
            cast(nn.Parameter, weight_of(layer)).masked_fill_(~held.mask, 0.0)
    return held


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put masks on weights, so that training goes on with them.

    Args:
        model: changed in place; parameter objects stay.
        masks: parameter name (``"conv1.weight"``) -> ``bool`` of its shape, as :func:`masks_of` gives them.

    Raises:
        ConfigError: if a name, a shape or a dtype does not fit; nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> hold_masks(net, {"0.weight": torch.tensor([[True, False]])})
        >>> net[0].weight.ne(0).tolist(), type(net[0]).__name__
        ([[True, False]], 'ParametrizedLinear')
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name, mask in masks.items():
        owner, _, attr = name.rpartition(".")
        layer = modules.get(owner)
        weight = None if layer is None or attr != "weight" else weight_of(layer)
        if layer is None or weight is None:
            raise ConfigError(
                f"masks: the model has no weight {name!r} that is a plain or a masked parameter; give the masks that "
                "were made for this architecture"
            )
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ConfigError(
                f"masks: {name!r} has a mask of {mask.dtype} {tuple(mask.shape)}, and the weight has the shape "
                f"{tuple(weight.shape)}; give torch.bool of that shape"
            )
        found.append((layer, mask.to(weight.device)))
    for layer, mask in found:
        hold_mask(layer, mask)


def weight_slot(layer: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that holds the parameter behind a layer's plain or masked weight, and its name there.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight
        >>> _ = hold_mask(layer)
        >>> owner, attr = weight_slot(layer)
        >>> attr, owner._parameters[attr] is before
        ('original', True)
    """
    if mask_module(layer) is not None:
        return _list_of(layer), "original"
    return (layer, "weight") if layer._parameters.get("weight") is not None else None


def weight_of(layer: nn.Module) -> nn.Parameter | None:
    """The parameter behind a layer's plain or masked weight."""
    slot = weight_slot(layer)
    return None if slot is None else slot[0]._parameters[slot[1]]


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a model's weights have: parameter name -> ``bool``, copies.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1))
        >>> hold_masks(net, {"0.weight": torch.tensor([[True, False]])})
        >>> masks_of(net)
        {'0.weight': tensor([[ True, False]])}
    """
    found = {}
    for name, module in model.named_modules():
        held = mask_module(module)
        if held is not None:
            found[f"{name}.weight".lstrip(".")] = held.mask.clone()
    return found


def fold_masks(model: nn.Module) -> dict[str, Tensor]:
    """Make all masks permanent: zeros in the weights, and the layers are plain ones again.

    Outputs are the same bits as before; parameter objects, their order and their memory stay.

    Returns:
        the masks, for :func:`hold_masks`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> hold_masks(net, {"0.weight": torch.tensor([[True, False]])})
        >>> masks = fold_masks(net)
        >>> type(net[0]).__name__, net[0].weight.ne(0).tolist(), list(masks)
        ('Linear', [[True, False]], ['0.weight'])
    """
    masks = masks_of(model)
    for module in list(model.modules()):
        held = mask_module(module)
        if held is None:
            continue
        with torch.no_grad():
            cast(nn.Parameter, weight_of(module)).masked_fill_(~held.mask, 0.0)
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        table = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({name: table.pop(name) for name in held.order if name in table} | table)
    return masks


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let masked layers be plain ones in here, whose parameters are the masked weights.

    Afterwards the same masks are back: what the parameters have become in here is kept where it is not masked, and what
    lay behind the masks is as it was.

    Yields:
        the masks: parameter name -> ``bool``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> hold_masks(net, {"0.weight": torch.tensor([[True, False]])})
        >>> with plain_weights(net) as masks, torch.no_grad():
        ...     print(type(net[0]).__name__, list(masks))
        ...     _ = net[0].weight.fill_(3.0)
        Linear ['0.weight']
        >>> type(net[0]).__name__, net[0].weight.tolist()
        ('ParametrizedLinear', [[3.0, 0.0]])
    """
    masks = {}
    with ExitStack() as stack:
        for name, module in list(model.named_modules()):
            held = mask_module(module)
            if held is not None:
                masks[f"{name}.weight".lstrip(".")] = held.mask
                stack.enter_context(_plain(module, held))
        yield masks


@contextmanager
def _plain(module: nn.Module, held: WeightMask) -> Iterator[None]:
    """Take a mask off in here; the objects that hold it are put back."""
    weight, lists = cast(nn.Parameter, weight_of(module)), cast(nn.ModuleDict, module.parametrizations)
    behind, cls = weight.detach().clone(), type(module)
    tables = [(t, dict(t)) for t in (module._parameters, module._modules, lists._modules)]
    weight.data.masked_fill_(~held.mask, 0.0)
    if len(lists) == 1:
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
    else:  # the others stay
        _own_class(module)
        delattr(type(module), "weight")
        del lists._modules["weight"]
    table = {**module._parameters, "weight": weight}
    module._parameters.clear()
    module._parameters.update({name: table.pop(name) for name in held.order if name in table} | table)
    try:
        yield
    finally:
        module.__class__ = cls
        for now, before in tables:
            now.clear()
            now.update(before)  # type: ignore[arg-type]
        weight.data.copy_(torch.where(held.mask, weight.detach(), behind))


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own: copies share one, and what is removed from it is gone for all."""
    cls = type(module)
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, own)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by qualified name, those that ``state_dict`` leaves out included."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def plain_types(model: nn.Module) -> Iterator[tuple[str, type]]:
    """Every module's name and the type that it has once the masks are folded."""
    masked = [module for module in model.modules() if mask_module(module) is not None]
    inside = {id(part) for module in masked for part in cast(nn.Module, module.parametrizations).modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            yield name, parametrize.type_before_parametrizations(module) if module in masked else type(module)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under the name and with the value that it has once the masks are folded."""
    inside = {id(part) for m in model.modules() if mask_module(m) is not None for part in _list_of(m).modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside:
            continue
        table: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        if mask_module(module) is not None:
            flag = cast(nn.Parameter, weight_of(module)).requires_grad
            table["weight"] = nn.Parameter(cast(Tensor, module.weight).detach(), flag)
        for attr, tensor in table.items():
            if tensor is not None:
                yield f"{name}.{attr}".lstrip("."), tensor
