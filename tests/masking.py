"""An independent reference for removals: the original model with the removed channels' activations zeroed by hooks.

It knows what was removed only from torch-pruning's own groups (layer, channel numbers), and nothing of the package's
slices, units or rows. Norms that mix channels are recomputed over the channels that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional
from torch_pruning.dependency import Group

LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)  # the channels are the last dimension


class Masked:
    """Which channels of which layers are left, and the original model with all others masked."""

    def __init__(self, model: nn.Module) -> None:
        self.original = copy.deepcopy(model)
        self.left: dict[str, list[int]] = {}  # by name of the layer or parameter, in the original numbering
        self.dims: dict[str, int] = {}

    def note(self, group: Any) -> None:
        """Follow one removal, from the group that torch-pruning is about to prune."""
        graph = group._DG
        for dep, idxs in group.items:
            target = dep.target
            if target.type == tp.ops.OPTYPE.PARAMETER:
                name, width = graph._param_to_name[target.module], target.module.shape[target.pruning_dim]
                self.dims[name] = target.pruning_dim
            elif target.module in graph._module2name and graph.is_out_channel_pruning_fn(dep.handler):
                name, width = graph._module2name[target.module], graph.get_out_channels(target.module)
            else:
                continue
            if width is not None:  # None: one slope for all channels
                gone, left = set(idxs), self.left.setdefault(name, list(range(width)))
                assert len(left) == width, f"{name} has {width} channels, but {len(left)} were left"
                self.left[name] = [channel for i, channel in enumerate(left) if i not in gone]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Note every removal that happens inside."""
        prune = Group.prune

        def spy(group: Any, *args: Any, **kwargs: Any) -> None:
            self.note(group)
            prune(group, *args, **kwargs)

        Group.prune = spy
        try:
            yield
        finally:
            Group.prune = prune

    def model(self) -> nn.Module:
        """A copy of the original with the removed channels masked, in eval mode."""
        model = copy.deepcopy(self.original).eval()
        modules = dict(model.named_modules())
        for name, left in self.left.items():
            if name in self.dims:
                parent, _, attr = name.rpartition(".")
                parameter = getattr(modules[parent], attr)
                kept = torch.zeros(parameter.shape[self.dims[name]], dtype=torch.bool)
                kept[left] = True
                shape = [1] * parameter.ndim
                shape[self.dims[name]] = -1
                parameter.data = parameter.data * kept.view(shape)
            else:
                modules[name].register_forward_hook(_hook(torch.tensor(left)))
        return model


def _hook(left: Tensor) -> Any:
    def mask(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (mask(module, args, output[0]), *output[1:])
        dim = output.ndim - 1 if isinstance(module, LAST) else 1
        kept = output.index_select(dim, left)
        if isinstance(module, nn.LayerNorm):
            affine = [None if p is None else p[left] for p in (module.weight, module.bias)]
            kept = functional.layer_norm(args[0].index_select(dim, left), (len(left),), *affine, module.eps)
        elif isinstance(module, nn.GroupNorm):
            groups = left // (output.shape[1] // module.num_groups)
            assert len(set(groups.bincount().tolist())) == 1, "channels moved to another group of a group norm"
            affine = [None if p is None else p[left] for p in (module.weight, module.bias)]
            kept = functional.group_norm(args[0].index_select(dim, left), module.num_groups, *affine, module.eps)
        return torch.zeros_like(output).index_copy(dim, left, kept)

    return mask
