"""An independent reference for removals: the original model with the removed channels' activations zeroed by hooks.

It learns what was removed from a copy of the model whose every element is its own position, and which is cut along
(and rescaled along, where a removal scales rows: a position is a ratio, which no factor changes); it knows nothing of
the package's groups, slices or units. Norms that mix channels are recomputed over the channels
that are left.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LAST = (nn.Linear, nn.LayerNorm, nn.Embedding)  # the channels are the last dimension


class Masked:
    """The original model, and a copy that says which channels are left: give ``tags`` as an EMA to what removes."""

    def __init__(self, model: nn.Module) -> None:
        self.original = copy.deepcopy(model)
        self.tags = copy.deepcopy(model)
        for tensor in (*self.tags.parameters(), *self.tags.buffers()):
            positions = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            tensor.data = torch.complex(positions, torch.ones_like(positions))

    def _left(self, name: str, attr: str, dim: int) -> Tensor:
        """The positions along one dimension of a tensor of the original that are left."""
        full = getattr(self.original.get_submodule(name), attr)
        tags = _positions(getattr(self.tags.get_submodule(name), attr))
        return torch.unravel_index(tags, full.shape)[dim].unique()

    def _channels(self, name: str, module: nn.Module) -> Tensor | None:
        """The output channels of a layer that are left."""
        for attr in ("bias", "running_mean"):
            if getattr(module, attr, None) is not None:
                return self._left(name, attr, 0)
        if getattr(module, "weight", None) is None:
            return None
        if isinstance(module, nn.Embedding):
            return self._left(name, "weight", 1)
        if not getattr(module, "transposed", False):
            return self._left(name, "weight", 0) if module.weight.ndim else None  # type: ignore[union-attr]
        assert isinstance(module, nn.modules.conv._ConvNd)
        tags = _positions(self.tags.get_submodule(name).weight)  # type: ignore[arg-type]
        rows, columns = torch.unravel_index(tags, module.weight.shape)[:2]
        group = rows // (module.in_channels // module.groups)
        return (group * (module.out_channels // module.groups) + columns).unique()

    def model(self) -> nn.Module:
        """A copy of the original in which what was removed is zero: parameters, outputs and what reads them."""
        model = copy.deepcopy(self.original).eval()
        tags = dict(self.tags.named_parameters())
        for name, parameter in model.named_parameters():
            kept = torch.zeros(parameter.numel(), dtype=torch.bool)
            kept[_positions(tags[name]).flatten()] = True
            parameter.data = parameter.data * kept.view(parameter.shape)
        for name, module in model.named_modules():
            if hasattr(module, "taken_over"):
                module.taken_over = self._left(name, "zeros", 0)  # type: ignore[assignment]
            if isinstance(module, (*LAST, nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase)):
                left = self._channels(name, module)
                if left is not None:
                    module.register_forward_hook(_hook(left))
        return model


def _positions(tags: Tensor) -> Tensor:
    return (tags.detach().real / tags.detach().imag).round().to(torch.int64)


def _hook(left: Tensor) -> Any:
    def mask(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        dim = output.ndim - 1 if isinstance(module, LAST) else 1
        kept = output.index_select(dim, left)
        if isinstance(module, nn.LayerNorm):
            affine = [None if p is None else p[left] for p in (module.weight, module.bias)]
            kept = functional.layer_norm(args[0].index_select(dim, left), (len(left),), *affine, module.eps)
        elif isinstance(module, nn.GroupNorm):
            sizes = (left // (output.shape[1] // module.num_groups)).bincount()
            sizes = sizes[sizes > 0]
            assert len(set(sizes.tolist())) == 1, "channels moved to another group of a group norm"
            affine = [None if p is None else p[left] for p in (module.weight, module.bias)]
            kept = functional.group_norm(args[0].index_select(dim, left), len(sizes), *affine, module.eps)
        return torch.zeros_like(output).index_copy(dim, left, kept)

    return mask
