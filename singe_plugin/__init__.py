"""SInGE pruning (NeurIPS 2022): rank a neuron by integrating its gradient along the path that walks it to zero.

Importing this package registers ``tp.importance.SInGEImportance`` and ``tp.pruner.SInGEPruner`` when
torch-pruning is installed. timm, scikit-learn, matplotlib and NNI are imported only by what needs them.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from singe_plugin.errors import SingeError
from singe_plugin.events import Callback, History
from singe_plugin.finetune import FineTune
from singe_plugin.folding import fold_batchnorm
from singe_plugin.scoring import ScoringOptions, score_error, score_units

if TYPE_CHECKING:
    from singe_plugin.architecture import Builder
    from singe_plugin.artifact import load, save
    from singe_plugin.integrations.prune import Result, prune
    from singe_plugin.integrations.unstructured import UnstructuredPruner, prune_weights
    from singe_plugin.masks import hold_masks

__version__ = "0.1.0"

__all__ = [
    "Builder",
    "Callback",
    "FineTune",
    "History",
    "Result",
    "ScoringOptions",
    "SingeError",
    "UnstructuredPruner",
    "fold_batchnorm",
    "hold_masks",
    "load",
    "prune",
    "prune_weights",
    "save",
    "score_error",
    "score_units",
]

_LAZY = {
    "Builder": "singe_plugin.architecture",
    "Result": "singe_plugin.integrations.prune",
    "UnstructuredPruner": "singe_plugin.integrations.unstructured",
    "hold_masks": "singe_plugin.masks",
    "load": "singe_plugin.artifact",
    "prune": "singe_plugin.integrations.prune",
    "prune_weights": "singe_plugin.integrations.unstructured",
    "save": "singe_plugin.artifact",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'singe_plugin' has no attribute {name!r}")


if importlib.util.find_spec("torch_pruning") is not None:
    from singe_plugin.integrations.torch_pruning import register

    register()
