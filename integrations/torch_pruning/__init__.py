"""SInGE for torch-pruning: an importance, an iterative pruner, and groups that are verified before they are cut."""

from __future__ import annotations

import torch_pruning as tp

from singe_plugin.axes import Trackers

from .graph import AxisDependencyGraph, GroupView
from .groups import register_slots
from .importance import SInGEImportance
from .pruner import PruningOutcome, SInGEPruner

__all__ = [
    "AxisDependencyGraph",
    "GroupView",
    "PruningOutcome",
    "SInGEImportance",
    "SInGEPruner",
    "Trackers",
    "register",
    "register_slots",
]


def register() -> None:
    """Make the names reachable as ``tp.importance.SInGEImportance`` and ``tp.pruner.SInGEPruner``.

    Idempotent; a different object that already has the name is never replaced.
    """
    for namespace, value in ((tp.importance, SInGEImportance), (tp.pruner, SInGEPruner)):
        if not hasattr(namespace, value.__name__):
            setattr(namespace, value.__name__, value)
