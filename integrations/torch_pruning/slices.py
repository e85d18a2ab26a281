"""What torch-pruning's pruning functions cut out of which tensors.

torch-pruning says "prune output channels 3 and 5 of this layer"; scoring a group of its own dependency graph needs to
know which rows of which tensors that means. One small function per layer type answers; :func:`register_slices` adds
one for a customized pruner. (:class:`~singe_plugin.integrations.torch_pruning.SInGEPruner` finds its groups otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function

from singe_plugin.errors import GroupError
from singe_plugin.units import RowLayout

__all__ = ["ItemSlice", "item_slices", "owner_of_parameter", "register_slices", "tensor_of"]

SliceFunction = Callable[[Any, Sequence[int], int], Iterator["ItemSlice"]]


@dataclass(frozen=True)
class ItemSlice:
    """A tensor that one item of a group cuts.

    Attributes:
        owner: the module that holds the tensor.
        attr: its name there; a parameter or a buffer.
        dim: the dimension that is cut.
        index: for the i-th channel of the item, the positions along ``dim`` that go with it.
        produces: whether these are rows that *write* the channels (scored, decayed, masked) or what only reads them.
        layout: where the rows are, for tensors that produce.
    """

    owner: nn.Module
    attr: str
    dim: int
    index: tuple[tuple[int, ...], ...]
    produces: bool = False
    layout: RowLayout = field(default_factory=RowLayout)


def tensor_of(owner: nn.Module, attr: str) -> Tensor | None:
    """The parameter or buffer ``attr`` of ``owner`` as it is now, or None."""
    for table in (owner._parameters, owner._buffers):
        if attr in table:
            return table[attr]
    return None


def _cut(
    owner: nn.Module, attr: str, dim: int, idxs: Sequence[int], produces: bool = False, blocks: int = 1
) -> Iterator[ItemSlice]:
    tensor = tensor_of(owner, attr)
    if tensor is None:
        if attr in ("weight",) and not hasattr(owner, "normalized_shape") and produces and not _is_norm(owner):
            raise GroupError(
                f"{type(owner).__name__}.{attr} is not a plain parameter (parametrized or weight-normed); remove the "
                "parametrization first"
            )
        return
    width = tensor.shape[dim] // blocks
    index = tuple(tuple(i + b * width for b in range(blocks)) for i in idxs)
    yield ItemSlice(owner, attr, dim % tensor.ndim, index, produces, RowLayout(dim % tensor.ndim, blocks=blocks))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))


def _conv_out(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    if layer.transposed and layer.groups > 1:
        raise GroupError(f"a transposed convolution with groups={layer.groups} cannot be cut by torch-pruning")
    yield from _cut(layer, "weight", 1 if layer.transposed else 0, idxs, produces=True)
    yield from _cut(layer, "bias", 0, idxs, produces=True)


def _conv_in(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    if layer.transposed:
        if layer.groups > 1:
            raise GroupError(f"a transposed convolution with groups={layer.groups} cannot be cut by torch-pruning")
        yield from _cut(layer, "weight", 0, idxs)
    else:
        width = layer.in_channels // layer.groups
        yield from _cut(layer, "weight", 1, [i % width for i in idxs])


def _depthwise(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    if layer.in_channels != layer.out_channels:
        raise GroupError(
            f"a convolution {layer.in_channels} -> {layer.out_channels} with groups={layer.groups} is not depthwise, "
            "but torch-pruning cuts it as if it were"
        )
    yield from _cut(layer, "weight", 0, idxs, produces=True)
    yield from _cut(layer, "bias", 0, idxs, produces=True)


def _linear_out(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    yield from _cut(layer, "weight", 0, idxs, produces=True)
    yield from _cut(layer, "bias", 0, idxs, produces=True)


def _linear_in(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    yield from _cut(layer, "weight", 1, idxs)


def _norm(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    yield from _cut(layer, "weight", 0, idxs, produces=True)
    yield from _cut(layer, "bias", 0, idxs, produces=True)
    yield from _cut(layer, "running_mean", 0, idxs)
    yield from _cut(layer, "running_var", 0, idxs)


def _layer_norm(layer: Any, idxs: Sequence[int], dim: int) -> Iterator[ItemSlice]:
    yield from _cut(layer, "weight", dim, idxs, produces=True)
    yield from _cut(layer, "bias", dim, idxs, produces=True)


def _prelu(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    # the slopes modulate a channel but do not produce it: PReLU(0) = 0 whatever the slope
    if layer.num_parameters > 1:
        yield from _cut(layer, "weight", 0, idxs)


def _embedding(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    yield from _cut(layer, "weight", 1, idxs, produces=True)


def _attention(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    if layer.q_proj_weight is not None or layer.bias_k is not None:
        raise GroupError("nn.MultiheadAttention with separate q, k, v widths or bias_k cannot be cut by torch-pruning")
    yield from _cut(layer.out_proj, "weight", 0, idxs, produces=True)
    yield from _cut(layer.out_proj, "bias", 0, idxs, produces=True)
    yield from _cut(layer.out_proj, "weight", 1, idxs)
    yield from _cut(layer, "in_proj_weight", 0, idxs, produces=True, blocks=3)
    yield from _cut(layer, "in_proj_bias", 0, idxs, produces=True, blocks=3)
    yield from _cut(layer, "in_proj_weight", 1, idxs)


def _unsupported(layer: Any, idxs: Sequence[int], _: int) -> Iterator[ItemSlice]:
    raise GroupError(f"{type(layer).__name__} is not supported")
    yield  # pragma: no cover


_BOX = function.PrunerBox
_OPTYPE = tp.ops.OPTYPE
_SLICES: dict[Any, SliceFunction] = {
    _BOX[_OPTYPE.CONV].prune_out_channels: _conv_out,
    _BOX[_OPTYPE.CONV].prune_in_channels: _conv_in,
    _BOX[_OPTYPE.DEPTHWISE_CONV].prune_out_channels: _depthwise,
    _BOX[_OPTYPE.LINEAR].prune_out_channels: _linear_out,
    _BOX[_OPTYPE.LINEAR].prune_in_channels: _linear_in,
    _BOX[_OPTYPE.BN].prune_out_channels: _norm,
    _BOX[_OPTYPE.IN].prune_out_channels: _norm,
    _BOX[_OPTYPE.GN].prune_out_channels: _norm,
    _BOX[_OPTYPE.LN].prune_out_channels: _layer_norm,
    _BOX[_OPTYPE.PRELU].prune_out_channels: _prelu,
    _BOX[_OPTYPE.EMBED].prune_out_channels: _embedding,
    _BOX[_OPTYPE.MHA].prune_out_channels: _attention,
    _BOX[_OPTYPE.LSTM].prune_out_channels: _unsupported,
    _BOX[_OPTYPE.LSTM].prune_in_channels: _unsupported,
}


def register_slices(pruning_function: Callable[..., Any], slices: SliceFunction) -> None:
    """Teach the plugin what a customized pruning function cuts.

    Args:
        pruning_function: the bound method, as given to torch-pruning's ``customized_pruners``.
        slices: ``(layer, channel indices, pruning_dim) -> iterator of ItemSlice``.
    """
    _SLICES[pruning_function] = slices


def owner_of_parameter(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and attribute of a parameter's qualified name."""
    parent, _, attr = name.rpartition(".")
    return model.get_submodule(parent), attr


def item_slices(graph: Any, dep: Any, idxs: Sequence[int]) -> list[ItemSlice]:
    """The tensors that one item ``(dep, idxs)`` of a group cuts; empty for operations without tensors.

    Raises:
        GroupError: for a layer or pruning function that is not known.
    """
    target, handler = dep.target.module, dep.handler
    if dep.target.type == _OPTYPE.PARAMETER:
        owner, attr = owner_of_parameter(graph.model, graph._param_to_name[target])
        return list(_cut(owner, attr, dep.target.pruning_dim, idxs, produces=True))
    if isinstance(getattr(handler, "__self__", None), tp.ops.DummyPruner):
        return []
    if handler not in _SLICES:
        raise GroupError(
            f"no slices are registered for {getattr(handler, '__qualname__', handler)} on {type(target).__name__}; "
            "use singe_plugin.integrations.torch_pruning.register_slices"
        )
    return list(_SLICES[handler](target, idxs, dep.target.pruning_dim))
