"""Removing channels without breaking what surrounds the model.

torch-pruning makes new ``nn.Parameter`` objects, so that optimizers go stale and frozen parameters thaw. Here the
old objects stay and only get smaller data: optimizer, scheduler, hooks and ``requires_grad`` live on. Optimizer
state and an EMA copy are cut along; a failure puts everything back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Group

from singe_plugin.errors import GroupError, RemovalError

from .groups import group_name
from .slices import item_slices, keep_index, owner_of_parameter, tensor_of

__all__ = ["PreservingGroup", "Snapshot", "Trackers", "remove_channels"]

_SCALARS = (bool, int, float, str, tuple, type(None))


@dataclass
class Trackers:
    """What has to be cut along with the model.

    Attributes:
        optimizers: any ``torch.optim`` optimizers over the model's parameters.
        emas: models with the same module names (or wrappers with a ``.module``, such as timm's ``ModelEmaV3``).
    """

    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    emas: list[nn.Module] = field(default_factory=list)

    def ema_models(self) -> list[nn.Module]:
        """The averaged models themselves, out of their wrappers."""
        inner = [getattr(e, "module", e) for e in self.emas]
        return [m if isinstance(m, nn.Module) else e for m, e in zip(inner, self.emas, strict=True)]


def _real_modules(group: Any) -> list[nn.Module]:
    """The model's own modules that a group cuts (not torch-pruning's stand-ins for operations)."""
    graph, found = group._DG, {}
    for number in range(len(group)):
        target = group[number].dep.target
        if target.type == tp.ops.OPTYPE.PARAMETER:
            owner, _ = owner_of_parameter(graph.model, graph._param_to_name[target.module])
            found[id(owner)] = owner
        elif target.module in graph._module2name and isinstance(target.module, nn.Module):
            for module in target.module.modules():
                found[id(module)] = module
    return list(found.values())


class Snapshot:
    """The structure (and on request the values) of a model, its graph and its trackers, to go back to.

    Args:
        graph: torch-pruning's dependency graph.
        modules: the modules that may change; None means the whole model.
        trackers: optimizers and EMA copies that may change.
        values: also copy the values, so that training steps can be undone too.
    """

    def __init__(
        self,
        graph: Any,
        modules: Sequence[nn.Module] | None = None,
        trackers: Trackers | None = None,
        values: bool = False,
    ) -> None:
        self.graph = graph
        self.values = values
        trackers = trackers or Trackers()
        chosen = list(graph.model.modules()) if modules is None else list(modules)
        for ema in trackers.ema_models():
            chosen += list(ema.modules())
        self.modules = [(m, _frozen_dict(m)) for m in chosen]
        tensors: dict[int, Tensor] = {}
        for module in chosen:
            for table in (module._parameters, module._buffers):
                tensors.update({id(t): t for t in table.values() if t is not None})
        self.tensors = [
            (t, t.data, t.data.clone() if values else None, t.grad, t.requires_grad) for t in tensors.values()
        ]
        self.optimizers = [(o, _copy_state(o, values)) for o in trackers.optimizers]
        self.stand_ins = [
            (n.module, {k: list(v) if isinstance(v, list) else v for k, v in n.module.__dict__.items()})
            for n in graph.module2node.values()
            if isinstance(n.module, nn.Module) and n.module not in graph._module2name
        ]
        self.nodes = [(node, module) for module, node in graph.module2node.items()]
        self.names = dict(graph._param_to_name)
        self.history = len(graph._pruning_history)

    def restore(self) -> None:
        """Put everything back."""
        for module, saved in self.modules:
            module.__dict__.clear()
            module.__dict__.update(_frozen_copy(saved))
        with torch.no_grad():
            for tensor, data, value, grad, flag in self.tensors:
                tensor.grad = None
                if tensor.data is not data:
                    _swap_data(tensor, data)
                if value is not None:
                    tensor.data.copy_(value)
                tensor.grad = grad
                tensor.requires_grad_(flag)
        for optimizer, (state, groups) in self.optimizers:
            optimizer.state.clear()
            optimizer.state.update({p: dict(s) for p, s in state.items()})
            for live, old in zip(optimizer.param_groups, groups, strict=True):
                live.update(old)
        for module, saved in self.stand_ins:
            module.__dict__.clear()
            module.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in saved.items()})
        self.graph.module2node.clear()
        for node, module in self.nodes:
            node.module = module
            self.graph.module2node[module] = node
        self.graph._param_to_name.clear()
        self.graph._param_to_name.update(self.names)
        del self.graph._pruning_history[self.history :]


def _frozen_dict(module: nn.Module) -> dict[str, Any]:
    return _frozen_copy(module.__dict__)


def _frozen_copy(table: dict[str, Any]) -> dict[str, Any]:
    """A copy that later changes of parameters, buffers, submodules or hooks do not reach."""
    return {k: v.copy() if isinstance(v, dict) else v for k, v in table.items()}


def _copy_state(
    optimizer: torch.optim.Optimizer, values: bool
) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    state = {
        p: {k: v.clone() if values and isinstance(v, Tensor) else v for k, v in s.items()}
        for p, s in optimizer.state.items()
    }
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return state, groups


def _swap_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape.

    Autograd caches the shape of a leaf in its gradient accumulator, which torch-pruning's graph keeps alive; going
    through another dtype makes it drop the cache.
    """
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


class PreservingGroup(Group):  # type: ignore[misc]
    """A group whose ``prune()`` keeps parameter objects, cuts optimizer and EMA state, and rolls back on failure."""

    def __init__(self, group: Any, trackers: Trackers | None = None) -> None:
        super().__init__()
        self._group = list(group.items)
        self._DG = group._DG
        self._trackers = trackers or Trackers()

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's channels (or those of its root given by ``idxs``) from every coupled layer.

        Raises:
            RemovalError: if torch-pruning fails, or would leave a layer empty; the model is as before.
        """
        group: Any = self
        if idxs is not None:
            dep = self._group[0].dep
            group = self._DG.get_pruning_group(dep.target.module, dep.handler, list(idxs))
        _prune_preserving(group, self._trackers, record_history)


def remove_channels(graph: Any, module: nn.Module, pruning_fn: Any, idxs: Sequence[int], trackers: Trackers) -> None:
    """Remove root channels ``idxs`` and all that depends on them (see :class:`PreservingGroup`)."""
    _prune_preserving(graph.get_pruning_group(module, pruning_fn, list(idxs)), trackers, True)


def _prune_preserving(group: Any, trackers: Trackers, record_history: bool) -> None:
    graph = group._DG
    if not graph.check_pruning_group(group):
        raise RemovalError(
            f"group {group_name(group)!r}: removing {len(group[0].idxs)} channels would leave a layer without any; "
            "lower the ratio"
        )
    modules = _real_modules(group)
    undo = Snapshot(graph, modules, trackers)
    try:
        tracked = bool(trackers.optimizers or trackers.emas)
        cuts = _cuts(group, strict=tracked)
        before = {
            (m, attr): (tensor, tensor.data)
            for m in modules
            for attr, tensor in m._parameters.items()
            if tensor is not None
        }
        Group.prune(group, record_history=record_history)
        _refresh_splits(graph)
        _reinstall(graph, before, trackers, cuts)
        _cut_emas(graph, modules, cuts, trackers)
    except BaseException as error:
        undo.restore()
        if isinstance(error, Exception) and not isinstance(error, RemovalError):
            raise RemovalError(
                f"group {group_name(group)!r}: torch-pruning failed with {type(error).__name__}: {error}; the model is "
                "as it was before"
            ) from error
        raise


def _refresh_splits(graph: Any) -> None:
    """torch-pruning keeps the sizes of a split up to date, but not the offsets that its index mapping reads."""
    for node in graph.module2node.values():
        sizes = getattr(node.module, "split_sizes", None)
        if node.type == tp.ops.OPTYPE.SPLIT and sizes is not None:
            node.module.offsets = [0, *itertools.accumulate(sizes)]


def _cuts(group: Any, strict: bool) -> dict[tuple[nn.Module, str], list[tuple[int, list[int]]]]:
    """For every tensor of the group, the dimensions and positions that will be cut.

    Layers whose slices are not known raise :class:`GroupError` if ``strict``, and are left to torch-pruning if not.
    """
    cuts: dict[tuple[nn.Module, str], list[tuple[int, list[int]]]] = {}
    for number in range(len(group)):
        try:
            parts = item_slices(group._DG, group[number].dep, list(group[number].idxs))
        except GroupError:
            if strict:
                raise
            continue
        for part in parts:
            positions = sorted({p for row in part.index for p in row})
            cuts.setdefault((part.owner, part.attr), []).append((part.dim, positions))
    return cuts


def _select(tensor: Tensor, cuts: list[tuple[int, list[int]]]) -> Tensor:
    for dim, positions in cuts:
        tensor = tensor.index_select(dim, keep_index(tensor.shape[dim], positions, tensor.device))
    return tensor


def _reinstall(graph: Any, before: dict[Any, Any], trackers: Trackers, cuts: dict[Any, Any]) -> None:
    """Put the old parameter objects back with the new data, and cut the optimizers' state."""
    moved: dict[int, nn.Parameter] = {}
    for (module, attr), (old, data) in before.items():
        new = module._parameters.get(attr)
        if new is None or new is old:
            continue
        if id(old) in moved:
            module._parameters[attr] = old
            continue
        fresh, grad, shape = new.data, new.grad, data.shape
        if (module, attr) in cuts:
            # torch-pruning's own cut of a layer norm does not always keep the order of its channels
            fresh = _select(data, cuts[module, attr])
            grad = None if old.grad is None else _select(old.grad, cuts[module, attr])
            if fresh.shape != new.shape:
                raise GroupError(
                    f"torch-pruning cut {type(module).__name__}.{attr} to {tuple(new.shape)}, expected "
                    f"{tuple(fresh.shape)}"
                )
        if data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last) and not data.is_contiguous():
            fresh = fresh.contiguous(memory_format=torch.channels_last)
        old.grad = None
        _swap_data(old, fresh)
        old.grad = grad
        module._parameters[attr] = old
        moved[id(old)] = old
        if new in graph.module2node:
            graph.module2node[old] = graph.module2node.pop(new)
            graph.module2node[old].module = old
            graph._param_to_name[old] = graph._param_to_name.pop(new)
        for optimizer in trackers.optimizers:
            state = optimizer.state.get(old)
            if not state:
                continue
            if (module, attr) not in cuts:
                raise GroupError(
                    f"{type(module).__name__}.{attr} was cut in an unknown way; its optimizer state is lost"
                )
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = _select(value, cuts[module, attr])


def _cut_emas(graph: Any, modules: list[nn.Module], cuts: dict[Any, Any], trackers: Trackers) -> None:
    names = {module: name for name, module in graph.model.named_modules()}
    for ema in trackers.ema_models():
        for (owner, attr), todo in cuts.items():
            twin = ema.get_submodule(names[owner])
            tensor, live = tensor_of(twin, attr), tensor_of(owner, attr)
            if tensor is None or live is None:
                continue
            cut = _select(tensor.data, todo)
            if cut.shape != live.shape:
                raise RemovalError(
                    f"the EMA of {names[owner]}.{attr} has shape {tuple(tensor.shape)} and cannot be cut"
                )
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
                _swap_data(tensor, cut)
            else:
                twin._buffers[attr] = cut
        for module in modules:
            twin = ema.get_submodule(names[module])
            for key, value in module.__dict__.items():
                if key != "training" and isinstance(value, _SCALARS) and key in twin.__dict__:
                    twin.__dict__[key] = value
