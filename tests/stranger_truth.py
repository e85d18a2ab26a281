"""What a pruned network must compute: the untouched original in which everything that did not survive is zero.

It knows nothing of groups, slices or units. Every element of a copy is its own position; the copy is cut along, as
an EMA is, and tells which elements survived. In the original the others are set to zero, so that nothing that
survived reads anything that did not. Where an operator takes channels together, zeros are not removal: such operators
stand in modules of their own (:class:`OverRest`, layer and group norms) and are computed over the channels left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

_DIRECTIONS = {"weight_v": "", "parametrizations.weight.original1": "parametrizations.weight"}  # of weight norm


class OverRest(nn.Module):
    """A function that takes the positions along a dimension together.

    Args:
        function: of the input.
        width: positions along the dimension.
        dim: the dimension.
        spread: whether the result has a position for each of the input's.
        fill: instead of leaving positions out, fill them with this number (for functions that need all places).
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        width: int,
        dim: int = 1,
        spread: bool = False,
        fill: float | None = None,
    ) -> None:
        super().__init__()
        self.function, self.dim, self.spread, self.fill = function, dim, spread, fill
        self.taken_over: Tensor | None = None
        self.register_buffer("zeros", torch.zeros(width))  # cut along with the positions

    def forward(self, x: Tensor) -> Tensor:
        behind = x.ndim - 1 - self.dim % x.ndim
        x = x + self.zeros.view(-1, *[1] * behind)
        if self.taken_over is None:
            return self.function(x)
        if self.fill is not None:
            gone = torch.ones(x.shape[self.dim], dtype=torch.bool).index_fill(0, self.taken_over, False)
            return self.function(x.masked_fill(gone.view(-1, *[1] * behind), self.fill)).clamp(min=-1e30)
        found = self.function(x.index_select(self.dim, self.taken_over))
        return torch.zeros_like(x).index_copy(self.dim, self.taken_over, found) if self.spread else found


class Truth:
    """The original model, and a copy whose elements are their positions: give ``tags`` as an EMA to what removes."""

    def __init__(self, model: nn.Module) -> None:
        self.original = copy.deepcopy(model)
        self.tags = copy.deepcopy(model)
        for tensor in (*self.tags.parameters(), *self.tags.buffers()):
            positions = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            tensor.data = torch.complex(positions, torch.ones_like(positions))  # a ratio, which no factor changes

    def survived(self, name: str) -> Tensor:
        """Which elements of a parameter or buffer of the original are left."""
        full, tags = _tensor(self.original, name), _tensor(self.tags, name).detach()
        left = torch.zeros(full.numel(), dtype=torch.bool)
        left[(tags.real / tags.imag).round().to(torch.int64).flatten()] = True
        return left.view(full.shape)

    def model(self) -> nn.Module:
        """The masked original."""
        model = copy.deepcopy(self.original).eval()
        for name, parameter in model.named_parameters():
            left = self.survived(name)
            ending = next((ending for ending in _DIRECTIONS if name.endswith(ending)), None)
            if ending is None:
                parameter.data = parameter.data * left
            else:  # the weight is zero where it is gone, and the rest of it is as it was
                _zero_weight(model.get_submodule((name[: -len(ending)] + _DIRECTIONS[ending]).strip(".")), left)
        for name, module in model.named_modules():
            if isinstance(module, OverRest):
                module.taken_over = self._positions(f"{name}.zeros")
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
                module.register_forward_hook(_norm_of(self._positions(f"{name}.weight")))
        return model

    def _positions(self, name: str) -> Tensor:
        return self.survived(name).nonzero().flatten()


def _zero_weight(module: nn.Module, left: Tensor) -> None:
    if isinstance(module, parametrize.ParametrizationList):
        module.register_forward_hook(lambda m, args, weight: weight * left)
    else:
        module.register_forward_pre_hook(lambda m, args: setattr(m, "weight", m.weight * left))


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attr = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), attr)
    assert isinstance(tensor, Tensor)
    return tensor


def _norm_of(left: Tensor) -> Any:
    def again(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        dim = output.ndim - 1 if isinstance(module, nn.LayerNorm) else 1
        kept, weight, bias = args[0].index_select(dim, left), module.weight[left], module.bias[left]
        if isinstance(module, nn.LayerNorm):
            found = functional.layer_norm(kept, (len(left),), weight, bias, module.eps)
        else:
            sizes = (left // (output.shape[1] // module.num_groups)).bincount()
            sizes = sizes[sizes > 0]
            if len(set(sizes.tolist())) != 1:
                return torch.full_like(output, torch.nan)  # channels moved to another group: nothing is right
            found = functional.group_norm(kept, len(sizes), weight, bias, module.eps)
        return torch.zeros_like(output).index_copy(dim, left, found)

    return again
