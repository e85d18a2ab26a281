"""SInGE for NNI 3.0: a pruner that obeys NNI's interface, and a shrinking step that works on current PyTorch.

NNI is an optional extra (``pip install nni==3.0``); nothing else in this package imports it, and nothing of
it is patched. What NNI keeps in a registry for its users (which types of layers have which parameters) is added to.
"""

from __future__ import annotations

import importlib.util

from singe_plugin.errors import MissingPackageError
from singe_plugin.shrink import ShrinkResult, shrink, shrink_with_report

if importlib.util.find_spec("nni") is None:
    raise MissingPackageError("NNI is not installed; it is an extra: pip install nni==3.0", name="nni")

from .evaluators import LightningEvaluator, TorchEvaluator, TransformersEvaluator
from .pruner import SInGEPruner

__all__ = [
    "LightningEvaluator",
    "SInGEPruner",
    "ShrinkResult",
    "TorchEvaluator",
    "TransformersEvaluator",
    "shrink",
    "shrink_with_report",
]
