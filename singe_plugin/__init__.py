"""SInGE pruning (NeurIPS 2022): rank a neuron by integrating its gradient along the path that walks it to zero.

With this package imported, torch-pruning has ``tp.importance.SInGEImportance`` and ``tp.pruner.SInGEPruner``, in
whatever order the two are imported. Names are imported when they are used, and PyTorch, torch-pruning, timm,
scikit-learn, matplotlib and NNI by what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from singe_plugin.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    DataError,
    FoldingError,
    GroupError,
    MissingPackageError,
    RankError,
    RemovalError,
    ScoringError,
    SingeError,
    TiedParameterError,
)
from singe_plugin.registration import register_with_torch_pruning
from singe_plugin.version import __version__  # noqa: F401 - of the package

if TYPE_CHECKING:
    from singe_plugin.integrations.prune import prune
    from singe_plugin.integrations.sensitivity import sensitivity
    from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
    from singe_plugin.integrations.unstructured import UnstructuredPruner, prune_weights
    from singe_plugin.loop.distill import Distill
    from singe_plugin.loop.events import Callback, History
    from singe_plugin.loop.finetune import FineTune, Recipe
    from singe_plugin.loop.pace import Pace
    from singe_plugin.loop.repair import Repair
    from singe_plugin.loop.shown import ProgressBar
    from singe_plugin.loop.survivors import repair
    from singe_plugin.loop.target import Target
    from singe_plugin.loop.times import LatencyTable, Timing
    from singe_plugin.loop.watch import Evaluate
    from singe_plugin.masks import hold_masks
    from singe_plugin.method.folding import fold_batchnorm
    from singe_plugin.method.options import Scoring
    from singe_plugin.method.scoring import score_error, score_units
    from singe_plugin.method.step import BatchObjective
    from singe_plugin.run.architecture import Builder
    from singe_plugin.run.artifact import load, save
    from singe_plugin.run.export import Exported, export
    from singe_plugin.run.result import Result
    from singe_plugin.run.sensitivity import Sensitivity


__all__ = [
    "ArtifactError",
    "BatchObjective",
    "BudgetError",
    "Builder",
    "Callback",
    "ConfigError",
    "DataError",
    "Distill",
    "Evaluate",
    "Exported",
    "FineTune",
    "FoldingError",
    "GroupError",
    "History",
    "LatencyTable",
    "MissingPackageError",
    "Pace",
    "ProgressBar",
    "RankError",
    "Recipe",
    "RemovalError",
    "Repair",
    "Result",
    "SInGEImportance",
    "SInGEPruner",
    "Scoring",
    "ScoringError",
    "Sensitivity",
    "SingeError",
    "Target",
    "TiedParameterError",
    "Timing",
    "UnstructuredPruner",
    "export",
    "fold_batchnorm",
    "hold_masks",
    "load",
    "prune",
    "prune_weights",
    "repair",
    "save",
    "score_error",
    "score_units",
    "sensitivity",
]

_LAZY = {
    "run.architecture": ("Builder",),
    "run.artifact": ("load", "save"),
    "loop.target": ("Target",),
    "loop.times": ("LatencyTable", "Timing"),
    "run.export": ("Exported", "export"),
    "loop.events": ("Callback", "History"),
    "loop.shown": ("ProgressBar",),
    "loop.distill": ("Distill",),
    "loop.finetune": ("FineTune", "Recipe"),
    "method.folding": ("fold_batchnorm",),
    "integrations.prune": ("Result", "prune"),
    "integrations.sensitivity": ("sensitivity",),
    "integrations.torch_pruning": ("SInGEImportance", "SInGEPruner"),
    "integrations.unstructured": ("UnstructuredPruner", "prune_weights"),
    "masks": ("hold_masks",),
    "method.options": ("Scoring",),
    "loop.pace": ("Pace",),
    "loop.repair": ("Repair",),
    "loop.survivors": ("repair",),
    "loop.watch": ("Evaluate",),
    "method.scoring": ("score_error", "score_units"),
    "method.step": ("BatchObjective",),
    "run.sensitivity": ("Sensitivity",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _LAZY.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'singe_plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(f"singe_plugin.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_torch_pruning()
