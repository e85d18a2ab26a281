"""The attributes in which PyTorch's layers keep the shapes of their own tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from singe_plugin.computed import weight_of_layer

__all__ = ["own_widths", "refresh_widths", "tensor_of"]


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """Return the parameter or buffer that a module holds under a name, as it is now."""
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


def own_widths(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Yield ``(attribute, parameter or buffer, dimension)`` of the widths that PyTorch's layers keep.

    Example:
        >>> list(own_widths(nn.Linear(2, 3)))
        [('out_features', 'weight', 0), ('in_features', 'weight', 1)]
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        if not module.transposed:
            yield "out_channels", "weight", 0
        elif module.groups == 1:
            yield "out_channels", "weight", 1
        if module.groups == 1 or module.transposed:
            yield "in_channels", "weight", 0 if module.transposed else 1
    elif isinstance(module, nn.Linear):
        yield from (("out_features", "weight", 0), ("in_features", "weight", 1))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield from (("num_features", "weight", 0), ("num_features", "running_mean", 0))
    elif isinstance(module, nn.GroupNorm):
        yield "num_channels", "weight", 0
    elif isinstance(module, nn.Embedding):
        yield from (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1))
    elif isinstance(module, nn.PReLU):
        yield "num_parameters", "weight", 0
    elif isinstance(module, nn.RNNBase):
        yield from (("hidden_size", "weight_hh_l0", 1), ("input_size", "weight_ih_l0", 1))
        yield from (("hidden_size", "weight_hr_l0", 1), ("proj_size", "weight_hr_l0", 0))  # in this order
    elif isinstance(module, nn.RNNCellBase):
        yield from (("hidden_size", "weight_hh", 1), ("input_size", "weight_ih", 1))


def refresh_widths(module: nn.Module) -> None:
    """Set the attributes in which a layer keeps the shape of its own tensors."""
    for attr, name, dim in own_widths(module):
        tensor = tensor_of(module, name)
        if tensor is None and (computed := weight_of_layer(module, name)) is not None:
            tensor = computed.value()
        if tensor is not None:
            setattr(module, attr, tensor.shape[dim])
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        attr = "out_channels" if module.transposed else "in_channels"
        setattr(module, attr, module.weight.shape[1] * module.groups)
