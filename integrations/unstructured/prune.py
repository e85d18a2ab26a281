"""``singe_plugin.prune_weights``: data in, a sparse model out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.fields import as_options, describe
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.method.folding import fold_batchnorm
from singe_plugin.method.options import Scoring
from singe_plugin.run.result import Result
from singe_plugin.run.run import carry_through
from singe_plugin.run.staging import as_judge, set_stage, with_log
from singe_plugin.state import model_device

from ..prune import what_repairs
from .arguments import DEFAULT_ROUNDS, Sparsity, settle_pace, split_sparsity
from .pruner import UnstructuredPruner

__all__ = ["prune_weights"]


def prune_weights(
    model: nn.Module,
    data: Any,
    *,
    sparsity: Sparsity | None = None,
    scoring: Scoring | str | None = None,
    pace: Pace | str | None = None,
    finetune: FineTune | int | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    val_data: Any = None,
    example_inputs: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    fold: bool = False,
    repair: Repair | int | str | None = "auto",
    callbacks: Iterable[Callback] = (),
    out_dir: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Prune the single weights of a trained model, with entwined fine-tuning: :func:`singe_plugin.prune`'s sibling.

    The result's model is an ordinary one, with zeros in its weights. ``hold_masks(result.model, result.weight_masks)``
    holds them when training goes on.

    Args:
        model, data: see :func:`singe_plugin.prune`, as for everything that is not named here.
        sparsity, scoring, pace: see :class:`UnstructuredPruner`; there are 10 rounds, if nothing is said.
        ignored_layers: modules or names of layers that stay dense.
        fold: fold *batch-norm* for good first, as in the paper's experiments.
        repair: as in :func:`singe_plugin.prune`; the fine-tuning is entwined with the removals, if nothing is said.

    Raises:
        SingeError: one clear error; the model is as it was before.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> result = prune_weights(net, batches, sparsity=0.75, pace=Pace(rounds=2), finetune=4)
        >>> result.after.params, result.after.nonzero, result.after.macs, result.after.effective_macs
        (114, 42, 96, 24)
    """
    pace = settle_pace(as_options(Pace, pace, "pace", "order"), DEFAULT_ROUNDS)
    assert pace.order is not None
    scoring = as_options(Scoring, scoring, "scoring", "criterion").settle(pace.order, weights=True)
    finetune = as_options(FineTune, finetune, "finetune", "steps")
    judge = as_judge(val_data)
    mended = what_repairs(repair, finetune.settle("layer"), judge)
    fraction, pattern = split_sparsity(sparsity)
    options = {
        "granularity": "weight", "sparsity": fraction, "pattern": None if pattern is None else str(pattern),
        "scoring": describe(scoring), "pace": describe(pace.named(model)), "seed": seed, "fold": fold,
        "repair": None if mended is None else describe(mended),
    }  # fmt: skip
    with set_stage(
        model, data, scoring=scoring, finetune=finetune, val_data=judge,
        example_inputs=example_inputs, device=device, seed=seed, out_dir=out_dir, resume=resume,
        images=0 if mended is None else mended.images,
    ) as stage:  # fmt: skip
        folded = list(fold_batchnorm(model, stage.example).folded) if fold else []
        pruner = UnstructuredPruner(
            model, stage.batches, sparsity=sparsity, ignored_layers=ignored_layers, pace=pace,
            finetune=stage.tuner, callbacks=with_log(callbacks), example_inputs=stage.example, scoring=scoring,
        )  # fmt: skip
        if mended is not None:
            pruner.repair_with(mended, stage.images, seed, needed=repair != "auto")
        result = carry_through(pruner, stage, options, folded, resume)
    result.weight_masks = {name: mask.to(model_device(model)) for name, mask in result.weight_masks.items()}
    return result
