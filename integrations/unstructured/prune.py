"""``singe_plugin.prune_weights``: data in, a sparse model out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.algorithm import CountedProgress, Progress
from singe_plugin.architecture import Builder, describe_structure
from singe_plugin.checkpoint import (
    CHECKPOINT,
    fitting,
    read_checkpoint,
    restore_progress,
    restore_run,
    write_checkpoint,
)  # fmt: skip
from singe_plugin.events import Callback, History
from singe_plugin.finetune import FineTune
from singe_plugin.folding import fold_batchnorm
from singe_plugin.objective import ObjectiveLike
from singe_plugin.result import LayerRow, Metrics, Result, package_versions
from singe_plugin.rounds import decided
from singe_plugin.scoring import ScoringOptions
from singe_plugin.state import model_device

from ..staging import Stage, callbacks_of, described, fine_tuning, fingerprints, measure, staged, text_of
from ..torch_pruning.host import block_of
from .allocation import Scope
from .arguments import DEFAULT_ROUNDS, PAPER_MU
from .patterns import Pattern
from .pruner import UnstructuredPruner

__all__ = ["prune_weights"]

_PACKAGES = ("singe_plugin", "torch", "timm", "torchvision", "numpy")


def prune_weights(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float | None = None,
    scope: Scope = "global",
    pattern: str | tuple[int, int] | Pattern | None = None,
    layers: Iterable[nn.Module | str] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    order: str | None = None,
    rounds: int | None = None,
    schedule: str = "cubic",
    units_per_step: int | float | str | None = None,
    max_sparsity: float = 1.0,
    finetune_steps: int = 1000,
    finetune_every: str = "layer",
    lr: float = 0.03,
    finetune: FineTune | None = None,
    criterion: str = "ig",
    p: float = 2,
    mu: float = PAPER_MU,
    steps: int | None = None,
    quadrature: str = "gauss",
    nodes: int = 5,
    path: str = "layer",
    objective: ObjectiveLike = "loss",
    scoring_batch_size: int = 64,
    scoring_batch_count: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    val_data: Any = None,
    example_inputs: Any = None,
    amp: str | None = None,
    channels_last: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    fold: bool = False,
    latency: bool = False,
    callbacks: Iterable[Callback] = (),
    progress: bool = False,
    out_dir: str | Path | None = None,
    resume: bool = False,
    builder: Builder | None = None,
) -> Result:
    """Prune the single weights of a trained model, with entwined fine-tuning: :func:`singe_plugin.prune`'s sibling.

    The result's model is an ordinary one, with zeros in its weights. ``hold_masks(result.model, result.weight_masks)``
    holds them when training goes on.

    Args:
        model, data: see :func:`singe_plugin.prune`, as for everything that is not named here (``objective`` among it).
        sparsity, scope, pattern, layers, ignored_layers, order, schedule, units_per_step, max_sparsity: see
            :class:`UnstructuredPruner`. The layers that are ignored are dense in the result.
        rounds: between two rounds all layers are scored again and fine-tuned; 1 is one-shot, None is 10.
        mu: of the path; the paper's for single weights (§4.1).
        fold: fold *batch-norm* for good first, as in the paper's experiments.

    Raises:
        SingeError: one clear error; the model is as it was before.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> result = prune_weights(net, batches, sparsity=0.75, rounds=2, finetune_steps=4)
        >>> result.after.params, result.after.nonzero, result.after.macs, result.after.effective_macs
        (114, 42, 96, 24)
    """
    order, _, rounds, units_per_step = decided(order, None, rounds, units_per_step, DEFAULT_ROUNDS)
    options = described(locals(), _RECORDED) | {"granularity": "weight"}
    with staged(
        model, data, val_data=val_data, example_inputs=example_inputs, device=device, seed=seed,
        scoring_batch_size=scoring_batch_size, scoring_batch_count=scoring_batch_count, batch_size=batch_size,
        workers=workers, builder=builder, out_dir=out_dir, resume=resume,
        finetune=finetune,
    ) as stage:  # fmt: skip
        pairs = list(fold_batchnorm(model, stage.example).folded) if fold else []
        scoring = ScoringOptions(
            criterion, p, mu, steps, quadrature, nodes, path, objective, amp=amp, channels_last=channels_last
        )
        finetune, in_force = fine_tuning(
            stage, finetune, finetune_steps, finetune_every, lr, amp, channels_last, objective
        )
        options |= in_force
        pruner = UnstructuredPruner(
            model, stage.batches, sparsity=sparsity, scope=scope, pattern=pattern, layers=layers,
            ignored_layers=ignored_layers, order=order, rounds=rounds, schedule=schedule,
            units_per_step=units_per_step, max_sparsity=max_sparsity, finetune=finetune,
            callbacks=callbacks_of(callbacks, progress),
            example_inputs=stage.example, scoring=scoring,
        )  # fmt: skip
        checkpoint = None if out_dir is None else Path(out_dir) / CHECKPOINT
        result = _run(pruner, stage, pairs, latency, checkpoint, resume, options)
    result.weight_masks = {name: mask.to(model_device(model)) for name, mask in result.weight_masks.items()}
    return result


_RECORDED = frozenset(
    {
        "sparsity",
        "scope",
        "pattern",
        "order",
        "rounds",
        "schedule",
        "units_per_step",
        "max_sparsity",
        "finetune_steps",
        "finetune_every",
        "lr",
        "criterion",
        "p",
        "mu",
        "steps",
        "quadrature",
        "nodes",
        "path",
        "objective",
        "scoring_batch_size",
        "scoring_batch_count",
        "batch_size",
        "amp",
        "channels_last",
        "seed",
        "fold",
    }
)


def _run(
    pruner: UnstructuredPruner,
    stage: Stage,
    folded: list[tuple[str, str]],
    latency: bool,
    checkpoint: Path | None,
    resume: bool,
    options: dict[str, Any],
) -> Result:
    model, finetune = pruner.model, pruner.finetune
    assert finetune is not None
    history, progress = History(), None
    fingerprint = {
        **options,
        "objective": text_of(pruner.scoring.objective),
        "layers": [layer.name for layer in pruner.layers],
        **({} if checkpoint is None else fingerprints(model, stage, finetune)),
    }
    if resume and checkpoint is not None and checkpoint.exists():
        record, tensors = read_checkpoint(checkpoint, fingerprint)
        with fitting():
            before = Metrics(**record["extra"]["before"])
            progress, history = restore_progress(record, CountedProgress), History(list(record["history"]))
        host = pruner.host()  # before the optimizer is made, as it was in the run that is continued: a mask moves its
        finetune.prepare(model)  # weight behind the bias, and the norm of all gradients is summed in that order
        restore_run(record, tensors, model, finetune)
    else:
        plain = measure(model, stage, latency)
        host = pruner.host()
        before = replace(plain, nonzero=host.nonzero(), effective_macs=host.effective_macs())

    def write(state: Progress) -> None:
        assert checkpoint is not None
        write_checkpoint(checkpoint, model, state, finetune, history, fingerprint, {"before": vars(before)})

    outcome = pruner.run(progress, write if checkpoint is not None else None, history)
    options["lr"] = finetune.rate()  # a function has made the optimizer by now
    masks = pruner.fold()
    after = replace(measure(model, stage, latency), nonzero=outcome.nonzero, effective_macs=outcome.effective_macs)
    rows = [LayerRow(row.name, block_of(row.name), row.weights, row.nonzero) for row in outcome.layers]
    return Result(
        model, before, after, rows, outcome.left_whole, history, options, package_versions(_PACKAGES), stage.builder,
        describe_structure(model, stage.structure, folded), masks, checkpoint,
    )  # fmt: skip
