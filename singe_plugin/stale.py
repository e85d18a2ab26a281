"""An optimizer that nobody named: its momentum has the shapes of before a removal, and that is said where it shows.

Removals cut the state of the optimizers that they know along with the model. Another one over the same parameters would
fail at its next step, deep inside of PyTorch, over two sizes that do not match. From the first removal on, the steps of
all optimizers are therefore looked at (PyTorch's own hook for that): the first one that steps with a state of a former
shape is told what happened, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from singe_plugin.errors import ConfigError

__all__ = ["remember_shapes"]

_former: Any = WeakTensorKeyDictionary()  # parameter -> the shapes that it had
_checked: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()  # -> the removals it was checked after
_removals = 0


def remember_shapes(before: Iterable[tuple[Tensor, torch.Size]]) -> None:
    """Refuse optimizers with a state of one of these shapes from now on: units were removed.

    Args:
        before: parameters with the shapes that they had before.
    """
    global _removals
    for parameter, shape in before:
        if parameter.shape != shape:
            _former.setdefault(parameter, set()).add(shape)
    if not _removals:
        register_optimizer_step_pre_hook(_check)
    _removals += 1


def _check(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if the optimizer's state is of before a removal; looked at once after each removal."""
    if _checked.get(optimizer) == _removals:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            former = _former.get(parameter, ())
            for key, value in optimizer.state.get(parameter, {}).items() if former else ():
                if isinstance(value, Tensor) and value.shape != parameter.shape and value.shape in former:
                    raise ConfigError(
                        f"{type(optimizer).__name__} steps with {key!r} of shape {tuple(value.shape)} for a parameter "
                        f"that has shape {tuple(parameter.shape)} since units were removed, and nobody knew of this "
                        "optimizer; give it to what prunes, SInGEPruner(optimizer=...) or FineTune(optimizer=...), so "
                        "that its state is cut along, or make a new optimizer after the removal"
                    )
    _checked[optimizer] = _removals
