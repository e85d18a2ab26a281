"""``singe_plugin.prune``: the one call that most people need."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.algorithm import Progress
from singe_plugin.artifact import Builder, Structure, describe_structure
from singe_plugin.axes import Snapshot
from singe_plugin.budget import count_macs, count_params, measure_latency
from singe_plugin.checkpoint import (
    CHECKPOINT,
    read_checkpoint,
    restore_progress,
    restore_run,
    seed_everything,
    write_checkpoint,
)
from singe_plugin.data import as_loader, evaluate, example_from, scoring_batches
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.events import Callback, History, LogCallback, ProgressBar
from singe_plugin.finetune import FineTune, loader_generators
from singe_plugin.folding import fold_batchnorm
from singe_plugin.objective import ObjectiveLike
from singe_plugin.result import LayerRow, Metrics, Result, package_versions
from singe_plugin.state import RngState, model_device

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
    lr: float = 0.01,
    finetune: FineTune | None = None,
    ratios: str | Mapping[Any, float] = "block",
    units_per_step: int | float | str = 0.1,
    round_to: int | None = None,
    max_pruning_ratio: float = 0.95,
    ignored_layers: Iterable[nn.Module] = (),
    criterion: str = "ig",
    p: float = 2,
    mu: float = 0.9,
    steps: int | None = None,
    quadrature: str = "gauss",
    nodes: int = 5,
    path: str = "layer",
    objective: ObjectiveLike = "loss",
    group_reduction: str = "sum",
    importance: Callable[..., Any] | None = None,
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
    verify: bool = True,
    latency: bool = False,
    callbacks: Iterable[Callback] = (),
    progress: bool = False,
    out_dir: str | Path | None = None,
    resume: bool = False,
    builder: Builder | None = None,
) -> Result:
    """Prune a trained model with SInGE and entwined fine-tuning (Algorithm 1).

    Args:
        model: changed in place (it is also ``result.model``); back on its device and in its modes afterwards.
        data: a dataset, a DataLoader, or a list of batches ``(inputs, targets)``. Example inputs, scoring batches
            and fine-tuning batches are taken from it.
        target: the fraction to remove, ``"params=0.5"`` or ``"macs=0.5"``.
        finetune_steps, finetune_every, lr: see :class:`~singe_plugin.FineTune`; or give a ready one as ``finetune``.
        ratios, units_per_step, round_to, max_pruning_ratio, ignored_layers, verify: see
            :class:`~singe_plugin.integrations.torch_pruning.SInGEPruner`. The default removes a tenth of a layer
            between two scorings; ``units_per_step=1`` is Algorithm 1 to the letter.
        criterion, p, mu, steps, quadrature, nodes, path, objective, group_reduction: see
            :class:`~singe_plugin.integrations.torch_pruning.SInGEImportance`; or give any torch-pruning importance.
        scoring_batch_size, scoring_batch_count: how much data every scoring reads, drawn once (64 and 1 in the paper).
        batch_size, workers: of the loaders made from datasets.
        val_data: dataset or batches for the accuracy before and after; None measures none.
        example_inputs: in the place of two examples from the data.
        amp, channels_last: mixed precision and memory format, for scoring and fine-tuning.
        device: where to run; None is CUDA when there is one.
        seed: of everything random; the caller's random state is left alone.
        fold: fold batch-norm for good first, as in the paper's experiments.
        latency: measure the latency before and after.
        callbacks, progress: see :mod:`singe_plugin.events`; ``progress`` shows a bar.
        out_dir: a folder for the checkpoint, written after every layer.
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
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if resume and out_dir is None:
        raise ConfigError("resume=True needs out_dir, the folder of the run to continue")
    for name, value in (
        ("scoring_batch_size", scoring_batch_size),
        ("scoring_batch_count", scoring_batch_count),
        ("batch_size", batch_size),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} is not a count; give a whole number >= 1")
    for name, value in (("seed", seed), ("workers", workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name}={value!r} is not a count; give a whole number >= 0")
    options = {k: v for k, v in locals().items() if k in _RECORDED}
    options = {k: v if isinstance(v, (bool, int, float, str, type(None))) else _text(v) for k, v in options.items()}
    home, where = model_device(model), resolve_device(device)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ConfigError("the model is on the meta device and has no values; load its weights first")
    if out_dir is not None:
        check_out_dir(out_dir)
    if builder is not None:
        builder.check(model)
    rng = RngState.capture()
    generators = [(g, g.get_state()) for source in (data, val_data) for g in loader_generators(source)]
    try:
        seed_everything(seed)
        model.to(where)
        loader = as_loader(data, batch_size, workers, True, seed)
        batches = scoring_batches(data, loader, scoring_batch_size, scoring_batch_count, seed)
        example = example_from(batches[0], where) if example_inputs is None else example_inputs
        builder = builder if builder is not None else Builder.infer(model)
        undo = Structure.of(model)
        pairs: list[tuple[str, str]] = []
        rollback = Snapshot(model, values=True)
        try:
            if fold:
                pairs = list(fold_batchnorm(model, example).folded)
            if importance is None:
                importance = SInGEImportance(
                    criterion, p, mu, steps, quadrature, path, objective, group_reduction, None, nodes,
                    amp=amp, channels_last=channels_last,
                )  # fmt: skip
            if isinstance(importance, SInGEImportance) and importance.model is None:
                importance.bind(model, batches)
            if finetune is None:
                tune_amp = "auto" if amp is None else amp
                finetune = FineTune(
                    loader, finetune_steps, finetune_every, lr=lr, amp=tune_amp, channels_last=channels_last
                )
            if isinstance(finetune, FineTune):
                options |= {"finetune_steps": finetune.steps, "finetune_every": finetune.every, "lr": finetune.lr}
            extra_callbacks = [*callbacks, *([ProgressBar()] if progress else []), LogCallback()]
            pruner = SInGEPruner(
                model, example, importance, target=target, ratios=ratios, units_per_step=units_per_step,
                finetune=finetune, callbacks=extra_callbacks, batches=batches, verify=verify,
                round_to=round_to, max_pruning_ratio=max_pruning_ratio, ignored_layers=list(ignored_layers),
            )  # fmt: skip
            return _run(
                pruner, undo, pairs, val_data, batch_size, workers, latency, example,
                None if out_dir is None else Path(out_dir) / CHECKPOINT, resume, options, builder,
            )  # fmt: skip
        except BaseException:
            rollback.restore()
            raise
    finally:
        model.to(home)
        rng.restore()
        for generator, state in generators:
            generator.set_state(state)


_RECORDED = frozenset(
    {
        "target",
        "finetune_steps",
        "finetune_every",
        "lr",
        "ratios",
        "units_per_step",
        "round_to",
        "max_pruning_ratio",
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


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on; None is CUDA when there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a device: {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(device)!r} was asked for, but CUDA is not available; use device='cpu'")
    if chosen.type == "meta":
        raise ConfigError("device='meta' keeps no values; use device='cpu'")
    try:
        torch.empty(0, device=chosen)
    except Exception as error:
        raise ConfigError(f"device={str(device)!r} cannot be used: {error}; use device='cpu'") from error
    return chosen


def _text(value: Any) -> str:
    """A description that is the same in every process: without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _run(
    pruner: SInGEPruner,
    structure: Structure,
    folded: list[tuple[str, str]],
    val_data: Any,
    batch_size: int,
    workers: int,
    latency: bool,
    example: Any,
    checkpoint: Path | None,
    resume: bool,
    options: dict[str, Any],
    builder: Builder | None,
) -> Result:
    model, finetune = pruner.model, pruner.finetune
    assert finetune is not None
    units_before = {spec.name: (spec.block, spec.units) for spec in pruner.host().layers()}
    history, progress = History(), None
    validation = None if val_data is None else as_loader(val_data, batch_size, workers, shuffle=False)
    fingerprint = {
        **options,
        "model": _fingerprint(model),
        "importance": _text(pruner.importance),
        "layers": list(units_before),
        "finetune": [finetune.steps, finetune.every],
    }
    record = None
    if resume and checkpoint is not None and checkpoint.exists():
        record, tensors = read_checkpoint(checkpoint, fingerprint)
        before = Metrics(**record["extra"]["before"])
        progress, history = restore_progress(record), History(record["history"])
        finetune.prepare(model)
        host = pruner.host()
        for layer, units in progress.removals:
            host.remove(layer, units)
        restore_run(record, tensors, model, finetune)
    else:
        before = _measure(model, example, validation, latency)

    def write(state: Progress) -> None:
        assert checkpoint is not None
        write_checkpoint(checkpoint, model, state, finetune, history, fingerprint, {"before": vars(before)})

    outcome = pruner.run(progress, write if checkpoint is not None else None, history)
    after = _measure(model, example, validation, latency)
    rows = [
        LayerRow(name, block, units, units - outcome.plan.get(name, 0)) for name, (block, units) in units_before.items()
    ]
    return Result(
        model, before, after, rows, outcome.left_whole, history, options, package_versions(_PACKAGES), builder,
        describe_structure(model, structure, folded),
    )  # fmt: skip


def _measure(model: nn.Module, example: Any, validation: Iterable[Any] | None, latency: bool) -> Metrics:
    examples = _leading(example)
    return Metrics(
        count_params(model),
        count_macs(model, example) // max(examples, 1),
        None if validation is None else evaluate(model, validation),
        measure_latency(model, example) if latency else None,
    )


def _leading(example: Any) -> int:
    """The number of examples in the example inputs."""
    if isinstance(example, torch.Tensor):
        return len(example) if example.ndim else 1
    values = list(example.values()) if isinstance(example, dict) else list(example)
    return _leading(values[0]) if values else 1


def _fingerprint(model: nn.Module) -> str:
    """Names, shapes and a checksum of the values: whether two runs start from the same model."""
    total = sum(float(t.detach().double().sum()) for t in model.parameters())
    shapes = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}:{len(list(model.parameters()))}:{shapes}:{total:.10g}"


def check_out_dir(out_dir: str | Path) -> Path:
    """A folder that can be written to, made if need be.

    Raises:
        ArtifactError: if it is a file, or cannot be made.
    """
    path = Path(out_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be used as an output folder: {error}") from error
    return path
