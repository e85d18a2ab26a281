"""``singe_plugin.prune``: the one call that most people need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.algorithm import Progress
from singe_plugin.architecture import Builder, describe_structure
from singe_plugin.budget import MIN_WIDTH
from singe_plugin.checkpoint import (
    CHECKPOINT,
    fitting,
    read_checkpoint,
    restore_progress,
    restore_run,
    write_checkpoint,
)  # fmt: skip
from singe_plugin.errors import ConfigError
from singe_plugin.events import Callback, History
from singe_plugin.finetune import FineTune
from singe_plugin.folding import fold_batchnorm
from singe_plugin.objective import ObjectiveLike
from singe_plugin.result import LayerRow, Metrics, Result, package_versions
from singe_plugin.rounds import decided, scored_on

from .staging import Stage, callbacks_of, described, fine_tuning, fingerprints, measure, staged, text_of
from .torch_pruning.importance import SInGEImportance
from .torch_pruning.pruner import SInGEPruner

__all__ = ["Result", "prune"]

_PACKAGES = ("singe_plugin", "torch", "torch-pruning", "timm", "torchvision", "numpy")


def prune(
    model: nn.Module,
    data: Any,
    *,
    target: str | None = "params=0.5",
    finetune_steps: int = 1000,
    finetune_every: str = "layer",
    lr: float = 0.03,
    finetune: FineTune | None = None,
    ratios: str | Mapping[Any, float] | None = None,
    units_per_step: int | float | str | None = None,
    order: str | None = None,
    rounds: int | None = None,
    schedule: str = "cubic",
    round_to: int | None = None,
    max_pruning_ratio: float = 0.95,
    min_width: int = MIN_WIDTH,
    ignored_layers: Iterable[nn.Module | str] = (),
    criterion: str = "ig",
    p: float = 2,
    mu: float = 0.9,
    steps: int | None = None,
    quadrature: str = "gauss",
    nodes: int | None = None,
    path: str = "layer",
    objective: ObjectiveLike = "loss",
    group_reduction: str = "sum",
    importance: Callable[..., Any] | None = None,
    scoring_batch_size: int = 64,
    scoring_batch_count: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    val_data: Any = None,
    example_inputs: Any = None,
    amp: str | None = None,
    channels_last: bool = False,
    device: str | torch.device | None = None,
    seed: int = 0,
    fold: bool = False,
    verify: bool = True,
    latency: bool = False,
    callbacks: Iterable[Callback] = (),
    progress: bool = False,
    out_dir: str | Path | None = None,
    resume: bool = False,
    builder: Builder | None = None,
) -> Result:
    """Prune a trained model with SInGE and entwined fine-tuning.

    Units of all layers go in rounds, ranked by score per parameter (or MAC): what kept the most on a trained ResNet-56
    (docs/results.md). ``order="layers"``, or a number of ``units_per_step``, is the paper's Algorithm 1, one layer
    after the other.

    Args:
        model: changed in place (it is also ``result.model``); back on its device and in its modes afterwards.
        data: a dataset, a DataLoader, or a list of batches ``(inputs, targets)``. Example inputs, scoring batches
            and fine-tuning batches are taken from it.
        target: the fraction to remove, ``"params=0.5"`` or ``"macs=0.5"``. With a ratio per layer give None, or
            what the ratios come to; with other ratios None removes half of the units.
        finetune_steps, finetune_every, lr: see :class:`~singe_plugin.FineTune`; or give a ready one as ``finetune``.
            What is minimised is ``objective``, unless the ready one has a ``loss`` or ``step_fn``.
        ratios, units_per_step, order, rounds, schedule, round_to, max_pruning_ratio, min_width, ignored_layers, verify:
            see :class:`~singe_plugin.integrations.torch_pruning.SInGEPruner`. With ``order="layers"`` a tenth of a
            layer goes between two scorings; ``units_per_step=1`` is Algorithm 1 to the letter.
        criterion, p, mu, steps, quadrature, nodes, path, objective, group_reduction: see
            :class:`~singe_plugin.integrations.torch_pruning.SInGEImportance`; or give any torch-pruning importance.
            ``objective`` is F for these, too: ``"loss"`` (cross-entropy, or the loss that the model computes itself
            from labels among its keywords), ``"logit"``, or a function of outputs and targets. It is what fine-tuning
            minimises (``"loss"`` with label smoothing 0.1, ``"logit"`` as ``"loss"``).
            ``nodes`` is 1 in rounds and 5 with ``order="layers"``, if not given.
        scoring_batch_size, scoring_batch_count: how much of a dataset every scoring reads, drawn once (64 and 1 in the
            paper, and 1 here with ``order="layers"``; 4 in rounds); the batches of a loader or list are taken as they
            are. Each takes ``nodes`` passes a layer.
        batch_size, workers: of the loaders made from datasets.
        val_data: dataset or batches for the accuracy before and after; None measures none.
        example_inputs: in the place of two examples from the data.
        amp, channels_last: mixed precision and memory format, for scoring and fine-tuning. Without ``amp``, scoring is
            in full precision (or as a surrounding ``torch.autocast`` has it), and fine-tuning on CUDA in bf16
            (``finetune=FineTune(..., amp=None)`` switches that off).
        device: where to run; None is the CUDA device that the model is on, else CUDA when there is one, else the CPU.
        seed: of everything random; the caller's random state is left alone.
        fold: fold batch-norm for good first, as in the paper's experiments.
        latency: measure the latency before and after.
        callbacks, progress: see :mod:`singe_plugin.events`; ``progress`` shows a bar.
        out_dir: a folder for the checkpoint, written after every round (with ``order="layers"``: every layer), and
            while it is fine-tuned at the end.
        resume: continue from the checkpoint in ``out_dir``, if there is one; ``model`` must be the unpruned model.
        builder: how to build the unpruned architecture, for saving; inferred for plain timm models.

    Returns:
        the pruned model and everything measured.

    Raises:
        SingeError: one clear error; the model is as it was before.

    Example:
        >>> import torch, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> result = singe_plugin.prune(net, batches, target="params=0.5", finetune_steps=4)
        >>> result.before.params, result.after.params
        (114, 58)
    """
    order, ratios, rounds, units_per_step = decided(order, ratios, rounds, units_per_step)
    nodes, scoring_batch_count = scored_on(order, nodes, scoring_batch_count)
    options = described(locals(), _RECORDED)
    with staged(
        model, data, val_data=val_data, example_inputs=example_inputs, device=device, seed=seed,
        scoring_batch_size=scoring_batch_size, scoring_batch_count=scoring_batch_count, batch_size=batch_size,
        workers=workers, builder=builder, out_dir=out_dir, resume=resume,
        finetune=finetune,
    ) as stage:  # fmt: skip
        pairs = list(fold_batchnorm(model, stage.example).folded) if fold else []
        if importance is None:
            importance = SInGEImportance(
                criterion, p, mu, steps, quadrature, path, objective, group_reduction, None, nodes,
                amp=amp, channels_last=channels_last,
            )  # fmt: skip
        elif isinstance(importance, SInGEImportance) and objective not in ("loss", importance.options.objective):
            raise ConfigError(
                f"objective={text_of(objective)} was given beside an importance whose F is "
                f"{text_of(importance.options.objective)}; give it to the importance alone"
            )
        if isinstance(importance, SInGEImportance) and importance.model is None:
            importance.bind(model, stage.batches)
        if isinstance(importance, SInGEImportance):
            objective = importance.options.objective
        options |= described({"objective": objective}, ("objective",))
        finetune, in_force = fine_tuning(
            stage, finetune, finetune_steps, finetune_every, lr, amp, channels_last, objective
        )
        options |= in_force
        pruner = SInGEPruner(
            model, stage.example, importance, target=target, ratios=ratios, units_per_step=units_per_step,
            order=order, rounds=rounds, schedule=schedule, finetune=finetune,
            callbacks=callbacks_of(callbacks, progress), batches=stage.batches, verify=verify, round_to=round_to,
            max_pruning_ratio=max_pruning_ratio, min_width=min_width, ignored_layers=ignored_layers,
        )  # fmt: skip
        pruner.objective = objective
        checkpoint = None if out_dir is None else Path(out_dir) / CHECKPOINT
        return _run(pruner, stage, pairs, latency, checkpoint, resume, options)


_RECORDED = frozenset(
    {
        "target",
        "finetune_steps",
        "finetune_every",
        "lr",
        "ratios",
        "units_per_step",
        "order",
        "rounds",
        "schedule",
        "round_to",
        "max_pruning_ratio",
        "min_width",
        "criterion",
        "p",
        "mu",
        "steps",
        "quadrature",
        "nodes",
        "path",
        "objective",
        "group_reduction",
        "scoring_batch_size",
        "scoring_batch_count",
        "batch_size",
        "amp",
        "channels_last",
        "seed",
        "fold",
        "verify",
    }
)


def _run(
    pruner: SInGEPruner,
    stage: Stage,
    folded: list[tuple[str, str]],
    latency: bool,
    checkpoint: Path | None,
    resume: bool,
    options: dict[str, Any],
) -> Result:
    model, finetune = pruner.model, pruner.finetune
    assert finetune is not None
    units_before = {spec.name: (spec.block, spec.units) for spec in pruner.host().layers()}
    history, progress = History(), None
    fingerprint = {
        **options,
        "importance": text_of(pruner.importance),
        "layers": list(units_before),
        **({} if checkpoint is None else fingerprints(model, stage, finetune)),
    }
    record = None
    if resume and checkpoint is not None and checkpoint.exists():
        record, tensors = read_checkpoint(checkpoint, fingerprint)
        with fitting():
            before = Metrics(**record["extra"]["before"])
            progress, history = restore_progress(record), History(list(record["history"]))
        finetune.prepare(model)
        host = pruner.host()
        for layer, units in progress.removals:
            host.remove(layer, units)
        restore_run(record, tensors, model, finetune)
    else:
        before = measure(model, stage, latency)

    def write(state: Progress) -> None:
        assert checkpoint is not None
        write_checkpoint(checkpoint, model, state, finetune, history, fingerprint, {"before": vars(before)})

    outcome = pruner.run(progress, write if checkpoint is not None else None, history)
    options["lr"] = finetune.rate()  # a function has made the optimizer by now
    after = measure(model, stage, latency)
    rows = [
        LayerRow(name, block, units, units - outcome.plan.get(name, 0)) for name, (block, units) in units_before.items()
    ]
    return Result(
        model, before, after, rows, outcome.left_whole, history, options, package_versions(_PACKAGES), stage.builder,
        describe_structure(model, stage.structure, folded), checkpoint=checkpoint,
    )  # fmt: skip
