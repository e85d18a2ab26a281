"""What a whole run needs around the pruner: device, seeds, data, measurements; and everything put back in the end."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.architecture import Builder, Structure
from singe_plugin.axes import Trackers
from singe_plugin.batches import check_batch, split_batch
from singe_plugin.budget import count_macs, count_params, measure_latency
from singe_plugin.checkpoint import seed_everything
from singe_plugin.data import as_loader, evaluate, example_from, scoring_batches
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.events import Callback, LogCallback, ProgressBar
from singe_plugin.files import digest, locked, sweep
from singe_plugin.finetune import FineTune, loader_generators
from singe_plugin.masks import named_tensors
from singe_plugin.nested import tensors_in, to_device
from singe_plugin.objective import ObjectiveLike
from singe_plugin.result import Metrics
from singe_plugin.rollback import all_or_nothing
from singe_plugin.state import RngState, model_device

from .checks import check_model

__all__ = [
    "Stage",
    "callbacks_of",
    "described",
    "examples_in",
    "fine_tuning",
    "fingerprint_of",
    "fingerprints",
    "measure",
    "resolve_device",
    "staged",
    "text_of",
]


@dataclass
class Stage:
    """What a run works with.

    Attributes:
        loader: batches to fine-tune on.
        batches: fixed batches to score on.
        example: inputs for tracing and counting.
        validation: batches for the accuracy, or None.
        builder: how to build the unpruned architecture, or None.
        structure: the plain attributes of the unpruned model.
    """

    loader: Iterable[Any]
    batches: list[Any]
    example: Any
    validation: Iterable[Any] | None
    builder: Builder | None
    structure: Structure


@contextmanager
def staged(
    model: nn.Module,
    data: Any,
    *,
    val_data: Any,
    example_inputs: Any,
    device: str | torch.device | None,
    seed: int,
    scoring_batch_size: int,
    scoring_batch_count: int,
    batch_size: int,
    workers: int,
    builder: Builder | None,
    out_dir: str | Path | None,
    resume: bool,
    finetune: Any = None,
) -> Iterator[Stage]:
    """Move the model, seed, draw the batches; afterwards put device and random states back.

    What ``finetune`` brings along, the state of an optimizer and an averaged copy, goes where the model goes.

    If the block fails, the model is rolled back too.

    Raises:
        ConfigError, ArtifactError, DataError: for arguments that cannot mean anything; nothing is touched then.
    """
    check_model(model)
    if resume and out_dir is None:
        raise ConfigError("resume=True needs out_dir, the folder of the run to continue")
    sizes = {"scoring_batch_size": scoring_batch_size, "scoring_batch_count": scoring_batch_count}
    check_counts(1, **sizes, batch_size=batch_size)
    check_counts(0, seed=seed, workers=workers)
    if seed >= 2**64:
        raise ConfigError(f"seed={seed} is too large for torch's generators; give a whole number below 2**64")
    if any(t.is_meta for t in tensors_in(example_inputs)):
        raise ConfigError(
            "example_inputs are on meta and have no values; move them to the model's device, or leave them out"
        )
    home = model_device(model)
    where = resolve_device(device, home)
    if builder is not None:
        if not isinstance(builder, Builder):
            raise ConfigError(
                f"builder must be a Builder, got {builder!r}; use Builder.factory('package.module:function', ...) or "
                "Builder.timm(name, ...)"
            )
        builder.check(model)
    if where.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # it has random states from then on
    with nullcontext() if out_dir is None else _alone_in(out_dir):
        rng = RngState.capture()
        generators = [(g, g.get_state()) for source in (data, val_data) for g in loader_generators(source)]
        tune = finetune if isinstance(finetune, FineTune) else None  # anything else is refused later
        try:
            seed_everything(seed)
            _move(model, finetune, where)
            loader = as_loader(data, batch_size, workers, True, seed)
            batches = scoring_batches(data, loader, scoring_batch_size, scoring_batch_count, seed)
            _check_batches(batches, example_inputs)
            example = example_from(batches[0], where) if example_inputs is None else to_device(example_inputs, where)
            validation = None if val_data is None else as_loader(val_data, batch_size, workers, shuffle=False)
            if isinstance(validation, Sized) and not len(validation):
                raise DataError("val_data is empty; give at least one batch, or leave it out")
            builder = builder if builder is not None else Builder.infer(model)
            stage = Stage(loader, batches, example, validation, builder, Structure.of(model))
            with all_or_nothing(model, tune, _trackers(finetune)):
                yield stage
        finally:
            _move(model, finetune, home)
            rng.restore()
            for generator, state in generators:
                generator.set_state(state)


def _check_batches(batches: list[Any], example_inputs: Any) -> None:
    """Raise :class:`DataError` for batches that cannot be scored on or, without example inputs, traced with."""
    for batch in batches:
        check_batch(batch)
    sparse = any(t.layout is not torch.strided for t in tensors_in(split_batch(batches[0])[0]))
    if example_inputs is None and sparse:
        raise DataError("the inputs of a batch are sparse; give tensor.to_dense(), or example_inputs to trace with")


@contextmanager
def _alone_in(out_dir: str | Path) -> Iterator[None]:
    """No other run is in the folder, and what a kill left half-written there is gone."""
    with locked(out_dir):
        sweep(Path(out_dir))
        yield


def _trackers(finetune: Any) -> Trackers:
    """What is trained along with the model, to be rolled back with it."""
    if not isinstance(finetune, FineTune):
        return Trackers()
    return Trackers(list(finetune.optimizers), [finetune.ema] if isinstance(finetune.ema, nn.Module) else [])


def _move(model: nn.Module, finetune: Any, device: torch.device) -> None:
    """A model to a device, and what is trained along with it."""
    start = model_device(model)
    model.to(device)
    if isinstance(finetune, FineTune):
        finetune.follow()
        if isinstance(finetune.ema, nn.Module) and model_device(finetune.ema) == start:
            finetune.ema.to(device)


def fine_tuning(
    stage: Stage,
    finetune: FineTune | None,
    steps: int,
    every: str,
    lr: float,
    amp: str | None,
    channels_last: bool,
    objective: ObjectiveLike,
) -> tuple[FineTune, dict[str, Any]]:
    """The fine-tuning of a run, as it was given or made from the run's options, and what is recorded of it.

    It minimises the objective that is scored with, unless it has a loss of its own.

    What was given and is none is left for the pruner to refuse.
    """
    if finetune is None:
        tune_amp = "auto" if amp is None else amp
        finetune = FineTune(stage.loader, steps, every, lr=lr, amp=tune_amp, channels_last=channels_last)
    if not isinstance(finetune, FineTune):
        return finetune, {}
    finetune.minimise(objective)
    return finetune, finetune.described()


def callbacks_of(given: Iterable[Callback], progress: bool) -> list[Callback]:
    """The callbacks of a run: the user's, a progress bar on request, and the log."""
    if not isinstance(given, Iterable):
        raise ConfigError(f"callbacks must be a list of singe_plugin.Callback objects, got {given!r}")
    return [*given, *([ProgressBar()] if progress else []), LogCallback()]


def check_counts(least: int, **values: Any) -> None:
    """Raise :class:`ConfigError` unless all are whole numbers of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} is not a count; give a whole number >= {least}")


def resolve_device(device: str | torch.device | None, home: torch.device | None = None) -> torch.device:
    """The device to run on; None is the CUDA device that the model is on (``home``), else CUDA when there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    if device is None:
        if home is not None and home.type == "cuda":
            return home
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
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


def described(options: Mapping[str, Any], recorded: Collection[str]) -> dict[str, Any]:
    """The recorded ones of a call's options as plain values that are the same in every process."""
    chosen = {k: v for k, v in options.items() if k in recorded}
    return {k: v if isinstance(v, (bool, int, float, str, type(None))) else text_of(v) for k, v in chosen.items()}


def text_of(value: Any) -> str:
    """A description without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def measure(model: nn.Module, stage: Stage, latency: bool) -> Metrics:
    """Parameters, MACs of one example, accuracy and latency."""
    return Metrics(
        count_params(model),
        count_macs(model, stage.example) // examples_in(stage.example),
        None if stage.validation is None else evaluate(model, stage.validation),
        measure_latency(model, stage.example) if latency else None,
    )


def examples_in(inputs: Any) -> int:
    """The number of examples in a model's inputs."""
    return max(next((len(t) if t.ndim else 1 for t in tensors_in(inputs)), 1), 1)


def fingerprint_of(model: nn.Module) -> str:
    """A checksum of names, values, structure and what is frozen: whether two runs start from the same model.

    It is the same in every process and on every device.
    """
    found = hashlib.sha256()
    for name, tensor in named_tensors(model):
        found.update(f"{name} {digest(tensor)} {tensor.requires_grad}\n".encode())
    plain = Structure.of(model).modules
    for name, module in model.named_modules():
        found.update(f"{name} {type(module).__qualname__} {sorted(plain[name].items())!r}\n".encode())
    return found.hexdigest()[:16]


def fingerprints(model: nn.Module, stage: Stage, finetune: FineTune) -> dict[str, Any]:
    """What must be the same, besides the options, for a resumed run to mean the same: model, data, fine-tuning.

    The data are known by the batches to score on, the example inputs, and by how many there are to fine-tune on.
    """
    batches = hashlib.sha256()
    for tensor in (t for batch in stage.batches for t in tensors_in(batch)):
        batches.update(digest(tensor).encode())
    plain = ("steps", "every", "lr", "momentum", "weight_decay", "warmup", "label_smoothing", "clip_grad", "amp")
    parts = {"optimizer": finetune.made_by, "scheduler": finetune.scheduler, "average": finetune.ema}
    return {
        "model": fingerprint_of(model),
        "data": {
            "scoring": batches.hexdigest()[:16],
            "inputs": [[str(t.dtype), list(t.shape)] for t in tensors_in(stage.example)],
            "batches": _length(finetune.loader),
            "validation": _length(stage.validation),
        },
        "finetune": {
            **{name: getattr(finetune, name) for name in plain},
            **{name: type(part).__qualname__ for name, part in parts.items()},
            **{name: text_of(part) for name, part in (("loss", finetune.loss), ("step_fn", finetune.step_fn))},
        },
    }


def _length(batches: Any) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)
    except TypeError:  # an iterable without a length, or a loader over one
        return None
