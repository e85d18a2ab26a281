"""Single weights: SInGE's criterion and algorithm with masks held by ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from singe_plugin.masks import fold_masks, hold_masks, masks_of

from .patterns import Pattern
from .prune import prune_weights
from .pruner import LayerSparsity, SparseOutcome, UnstructuredPruner
from .semi_structured import SparseKernels, use_sparse_kernels

__all__ = [
    "LayerSparsity",
    "Pattern",
    "SparseKernels",
    "SparseOutcome",
    "UnstructuredPruner",
    "fold_masks",
    "hold_masks",
    "masks_of",
    "prune_weights",
    "use_sparse_kernels",
]
