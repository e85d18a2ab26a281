"""NNI's wrapped model as a plain one: the masked weights are the parameters, and no wrapper is in the way.

A wrapper takes a layer's parameters away and computes ``target * mask`` in every forward pass. The scoring engine
wants parameters that it can put on the path, batch-norm that it can fold, and modules whose names are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from nni.compression.base.apply_method import pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

__all__ = ["StepModel", "masked_target", "plain_view"]


def masked_target(space: PruningTargetSpace) -> Tensor:
    """A parameter as the wrapped model uses it."""
    target: Tensor | None = space.target
    assert target is not None
    with torch.no_grad():
        if space.mask is None:
            return target.detach().clone()
        applied: Tensor = pruning_apply_methods[space.apply_method](target, space)
    return applied.detach()


@contextmanager
def plain_view(wrappers: Mapping[str, ModuleWrapper]) -> Iterator[None]:
    """Take the wrappers out of their modules; on leaving everything is where it was, the same objects.

    Only modules that are wrapped now are touched. Values written into the parameters inside are lost.
    """
    saved: list[tuple[nn.Module, dict[str, dict[str, Any]], Any]] = []
    try:
        for wrapper in wrappers.values():
            module = wrapper.module
            if module._modules.get("_nni_wrapper") is not wrapper:
                continue
            tables = {name: dict(getattr(module, name)) for name in ("_parameters", "_buffers", "_modules")}
            saved.append((module, tables, module.__dict__["forward"]))
            del module._modules["_nni_wrapper"]
            module.__dict__["forward"] = wrapper.module_forward
            spaces = {**wrapper.quantization_target_spaces, **wrapper.pruning_target_spaces}
            for name, space in spaces.items():
                if space.type is TargetType.PARAMETER and isinstance(space.target, nn.Parameter):
                    plain = masked_target(space) if isinstance(space, PruningTargetSpace) else space.target.detach()
                    module._buffers.pop(name, None)
                    module._parameters[name] = nn.Parameter(plain, requires_grad=space.target.requires_grad)
        yield
    finally:
        for module, tables, forward in reversed(saved):
            module.__dict__["forward"] = forward
            for name, table in tables.items():
                live = getattr(module, name)
                live.clear()
                live.update(table)


class StepModel(nn.Module):
    """A model together with somebody's training step, as a module that maps a batch to the loss.

    Args:
        model: the model.
        step: ``(model, batch) -> loss``.
    """

    def __init__(self, model: nn.Module, step: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Any) -> Tensor:
        return self.step(self.model, batch)
