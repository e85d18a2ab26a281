"""``singe_plugin.prune``: the one call that most people need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ConfigError
from singe_plugin.fields import as_options, describe, to_plain
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.method.folding import fold_batchnorm
from singe_plugin.method.options import Scoring
from singe_plugin.run.result import Result
from singe_plugin.run.run import carry_through
from singe_plugin.run.staging import set_stage, with_log

from .torch_pruning.importance import SInGEImportance
from .torch_pruning.pruner import SInGEPruner

__all__ = ["Result", "prune"]


def prune(
    model: nn.Module,
    data: Any,
    *,
    target: str | None = "macs=0.5",
    scoring: Scoring | str | Callable[..., Any] | None = None,
    pace: Pace | str | None = None,
    finetune: FineTune | int | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    val_data: Any = None,
    example_inputs: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    fold: bool = False,
    verify: bool = True,
    callbacks: Iterable[Callback] = (),
    out_dir: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Prune a trained model with SInGE and entwined fine-tuning.

    Units of all layers go in rounds, ranked by score per MAC (or parameter): what kept the most on a trained ResNet-56
    (docs/results.md). ``pace="layers"`` is the paper's Algorithm 1, one layer after the other.

    Args:
        model: changed in place (it is also ``result.model``); back on its device and in its modes afterwards.
        data: a dataset, a DataLoader, or a list of batches ``(inputs, targets)``. Example inputs, scoring batches
            and fine-tuning batches are taken from it.
        target: the fraction to remove, ``"macs=0.5"`` or ``"params=0.5"``. With a ratio per layer give None, or
            what the ratios come to; with other ratios None removes half of the units.
        scoring: a :class:`~singe_plugin.Scoring`, the name of a criterion, or any torch-pruning importance (in the
            place of the criterion: ``Scoring(importance, objective=...)``).
        pace: a :class:`~singe_plugin.Pace`, or the name of an order.
        finetune: a :class:`~singe_plugin.FineTune`, or a number of steps; 1000 steps, if nothing is said. It minimises
            the objective of the scoring, unless it has a ``loss`` or ``step_fn``.
        ignored_layers: modules or names of layers that stay whole, with what is inside of them.
        val_data: a dataset or batches for the accuracy before and after; None measures none.
        example_inputs: in the place of two examples from the data.
        device: where to run; None is the CUDA device that the model is on, else CUDA when there is one, else the CPU.
        seed: of everything random; the caller's random state is left alone.
        fold: fold batch-norm for good first, as in the paper's experiments.
        verify: prove every group before anything of it is removed (see docs/backbones.md); without that, a wrong
            removal is the caller's own risk.
        callbacks: see :mod:`singe_plugin.loop.events`; a :class:`~singe_plugin.loop.events.ProgressBar` shows a bar.
        out_dir: a folder for the checkpoint, written after every round (with ``pace="layers"``: every layer), and
            while it is fine-tuned at the end.
        resume: continue from the checkpoint in ``out_dir``, if there is one; ``model`` must be the unpruned model.

    Returns:
        the pruned model and everything measured.

    Raises:
        SingeError: one clear error; the model is as it was before.

    Example:
        >>> import torch, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> result = singe_plugin.prune(net, batches, target="params=0.5", finetune=4)
        >>> result.before.params, result.after.params
        (114, 58)
    """
    pace = as_options(Pace, pace, "pace", "order").settle()
    scoring = as_options(Scoring, scoring, "scoring", "criterion")
    importance = None if isinstance(scoring.criterion, str) else scoring.criterion
    if isinstance(importance, SInGEImportance):
        scoring = _of_importance(scoring, importance)
    assert pace.order is not None
    scoring = scoring.settle(pace.order)
    options = {
        "target": to_plain(target), "scoring": describe(scoring), "pace": describe(pace), "seed": seed, "fold": fold,
        "verify": verify,
    }  # fmt: skip
    with set_stage(
        model, data, scoring=scoring, finetune=as_options(FineTune, finetune, "finetune", "steps"), val_data=val_data,
        example_inputs=example_inputs, device=device, seed=seed, out_dir=out_dir, resume=resume,
    ) as stage:  # fmt: skip
        folded = list(fold_batchnorm(model, stage.example).folded) if fold else []
        if importance is None:
            importance = SInGEImportance(**vars(scoring))
        if isinstance(importance, SInGEImportance) and importance.model is None:
            importance.bind(model, stage.batches)
        pruner = SInGEPruner(
            model, stage.example, importance, target=target, pace=pace, finetune=stage.tuner,
            callbacks=with_log(callbacks), batches=stage.batches, verify=verify, ignored_layers=ignored_layers,
        )  # fmt: skip
        pruner.objective = scoring.objective or "loss"
        return carry_through(pruner, stage, options, folded, resume)


def _of_importance(scoring: Scoring, importance: SInGEImportance) -> Scoring:
    """The scoring of a ready importance, on the batches that were asked for."""
    own = importance.scoring
    if scoring.objective not in (None, own.objective):
        raise ConfigError(
            f"objective={to_plain(scoring.objective)!r} was given beside an importance whose F is "
            f"{to_plain(own.objective)!r}; give it to the importance alone"
        )
    batches = own.batches if scoring.batches is None else scoring.batches
    return Scoring(**{**vars(own), "batches": batches, "batch_size": scoring.batch_size})
