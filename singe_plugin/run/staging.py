"""What a whole run needs around the pruner: device, seeds, data, measurements; and everything put back in the end."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.axes import Trackers
from singe_plugin.checks import check_count
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.files import digest, locked, sweep
from singe_plugin.loop.costs import Counted, count_params, own_costs
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.shown import LogCallback, ProgressBar
from singe_plugin.loop.stream import loader_generators
from singe_plugin.loop.survivors import images_of
from singe_plugin.loop.times import Timing
from singe_plugin.loop.tuner import Tuner
from singe_plugin.loop.watch import Evaluate, measured_by
from singe_plugin.masks import named_tensors, plain_tensors
from singe_plugin.method.batches import split_batch
from singe_plugin.method.options import Scoring
from singe_plugin.method.step import BatchObjective, check_form, model_inputs
from singe_plugin.nested import examples_in, tensors_in, to_device
from singe_plugin.ranks import Ranks, current
from singe_plugin.rollback import all_or_nothing
from singe_plugin.run.architecture import Builder, Structure
from singe_plugin.run.checkpoint import CHECKPOINT, seed_everything
from singe_plugin.run.data import as_loader, evaluate, example_from, scoring_batches
from singe_plugin.run.guards import check_model
from singe_plugin.run.latency import Latency, Stopwatch, latency_of
from singe_plugin.run.result import Metrics
from singe_plugin.state import RngState, model_device

__all__ = [
    "Stage",
    "as_judge",
    "count_examples",
    "fingerprint_of",
    "fingerprints",
    "judged",
    "measure",
    "resolve_device",
    "set_stage",
    "timed",
    "with_log",
]  # fmt: skip

_logger = logging.getLogger("singe_plugin")
BATCH = 64  # of a dataset; a loader has its own


@dataclass
class Stage:
    """What a run works with.

    Attributes:
        tuner: the fine-tuning.
        batches: fixed batches to score on.
        example: inputs for tracing and counting.
        counted: the MACs of the model.
        judge: what the network is judged by, or None.
        validation: batches for the accuracy, or None.
        builder: how to build the unpruned architecture, or None.
        structure: the plain attributes of the unpruned model.
        checkpoint: where the state of the run is written, or None.
        images: inputs to repair on.
        watch: times the network against the unpruned one; None if that cannot be copied.
    """

    tuner: Tuner
    batches: list[Any]
    example: Any
    counted: Counted
    judge: Evaluate | None
    validation: Iterable[Any] | None
    builder: Builder | None
    structure: Structure
    checkpoint: Path | None
    images: list[Any] = field(default_factory=list)
    watch: Stopwatch | None = None


@contextmanager
def set_stage(
    model: nn.Module,
    data: Any,
    *,
    scoring: Scoring,
    finetune: FineTune,
    val_data: Any = None,
    example_inputs: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    out_dir: str | Path | None = None,
    resume: bool = False,
    images: int = 0,
    timing: Timing | None = None,
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
    check_count("seed", seed, 0)
    if seed >= 2**64:
        raise ConfigError(f"seed={seed} is too large for torch's generators; give a whole number below 2**64")
    if any(t.is_meta for t in tensors_in(example_inputs)):
        raise ConfigError(
            "example_inputs are on meta and have no values; move them to the model's device, or leave them out"
        )
    home, ranks = model_device(model), current()
    where = _own_device(resolve_device(device, home), finetune, ranks)
    if where.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # it has random states from then on
    ranks.same("the weights", _before(model, ranks), _EQUAL)
    with nullcontext() if out_dir is None or not ranks.main else _alone_in(out_dir):
        rng = RngState.capture()
        generators = [(g, g.get_state()) for source in (data, val_data) for g in loader_generators(source)]
        ema = finetune.ema if isinstance(finetune.ema, nn.Module) else None
        tuner = None
        try:
            seed_everything(seed)
            loader = as_loader(data, BATCH, 0, True, seed)
            trained = loader if finetune.loader is None else as_loader(finetune.loader, BATCH, 0, True, seed)
            tuner = Tuner(finetune, trained)
            _move(model, tuner, ema, where)
            assert scoring.batches is not None
            started = time.perf_counter()
            batches = scoring_batches(data, loader, scoring.batch_size, scoring.batches, seed)
            _note_rates(tuner, batches, time.perf_counter() - started, images)
            _check_batches(batches, example_inputs, scoring.objective)
            example = (
                example_from(batches[0], where, objective=scoring.objective)
                if example_inputs is None
                else to_device(example_inputs, where)
            )
            judge, validation = as_judge(val_data), None
            if judge is not None and not judge.is_function:
                validation = as_loader(judge.by, BATCH, 0, shuffle=False)
            if isinstance(validation, Sized) and not len(validation):
                raise DataError("val_data is empty; give at least one batch, or leave it out")
            checkpoint = None if out_dir is None else Path(out_dir) / CHECKPOINT
            stage = Stage(
                tuner, batches, example, Counted(model, example), judge, validation, Builder.infer(model),
                Structure.of(model), checkpoint, watch=_stopwatch(model, example, timing or Timing()),
            )  # fmt: skip
            if images:
                size = count_examples(model_inputs(model, batches[0], scoring.objective))
                drawn = scoring_batches(data, loader, size, -(-images // size), seed)
                stage.images = images_of(drawn, images, model, scoring.objective)
            with all_or_nothing(model, tuner, Trackers(list(tuner.optimizers), [] if ema is None else [ema])):
                yield stage
                ranks.gather("the result", None)  # no rank keeps what another one has to roll back
        finally:
            if tuner is not None:
                _move(model, tuner, ema, home)
            rng.restore()
            for generator, state in generators:
                generator.set_state(state)


def _stopwatch(model: nn.Module, example: Any, timing: Timing) -> Stopwatch | None:
    try:
        return Stopwatch(model, example, timing)
    except ConfigError as error:
        if timing != Timing():
            raise
        _logger.warning("the latency before and after is not measured in turn: %s", error)
        return None


_EQUAL = (
    "load the same checkpoint in every process, or call torch.manual_seed with the same number before the model is made"
)


def _before(model: nn.Module, ranks: Ranks) -> str | None:
    """A checksum of the model, where there are others to compare it with."""
    return None if ranks.world == 1 else fingerprint_of(model)


def _own_device(device: torch.device, finetune: FineTune, ranks: Ranks) -> torch.device:
    """The device of this rank: where just CUDA is asked for, its accelerator's, or the card of its number here."""
    if device.type != "cuda" or device.index is not None:
        return device
    if finetune.accelerator is not None:
        return torch.device(finetune.accelerator.device)
    return device if ranks.world == 1 else torch.device("cuda", ranks.local % torch.cuda.device_count())


def _note_rates(tuner: Tuner, batches: list[Any], seconds: float, images: int) -> None:
    """Note how much there is to do at once, and how long reading takes where nobody does it beside the rest."""
    rates, loader = tuner.rates, tuner.stream.batches
    rates.scored, rates.repaired = sum(count_examples(batch) for batch in batches), images
    rates.batch = getattr(loader, "batch_size", None) or rates.scored // max(len(batches), 1)
    rates.reading = 0.0 if getattr(loader, "num_workers", 0) else seconds / max(rates.scored, 1)


def _check_batches(batches: list[Any], example_inputs: Any, objective: Any) -> None:
    """Raise :class:`DataError` for batches that cannot be scored on or, without example inputs, traced with."""
    for batch in batches:
        check_form(batch, objective)
    if example_inputs is not None or isinstance(objective, BatchObjective):
        return
    if any(t.layout is not torch.strided for t in tensors_in(split_batch(batches[0])[0])):
        raise DataError("the inputs of a batch are sparse; give tensor.to_dense(), or example_inputs to trace with")


@contextmanager
def _alone_in(out_dir: str | Path) -> Iterator[None]:
    """No other run is in the folder, and what a kill left half-written there is gone."""
    with locked(out_dir):
        sweep(Path(out_dir))
        yield


def _move(model: nn.Module, tuner: Tuner, ema: nn.Module | None, device: torch.device) -> None:
    """A model to a device, and what is trained along with it."""
    start = model_device(model)
    model.to(device)
    tuner.follow()
    if ema is not None and model_device(ema) == start:
        ema.to(device)


def with_log(given: Iterable[Callback]) -> list[Callback]:
    """The callbacks of a run: the user's, and the log. Of several ranks, the first alone shows what is going on."""
    if not isinstance(given, Iterable):
        raise ConfigError(f"callbacks must be a list of singe_plugin.Callback objects, got {given!r}")
    if not current().main:
        return [callback for callback in given if not isinstance(callback, ProgressBar)]
    return [*given, LogCallback()]


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


def as_judge(val_data: Any) -> Evaluate | None:
    """What ``val_data`` stands for: an :class:`~singe_plugin.Evaluate`, or what it would judge by.

    Example:
        >>> as_judge(len).is_function, as_judge([1]).is_function, as_judge(None)
        (True, False, None)
    """
    return val_data if val_data is None or isinstance(val_data, Evaluate) else Evaluate(val_data)


def judged(model: nn.Module, stage: Stage) -> dict[str, float]:
    """What the judge says of the model, by name; nothing if there is none, or outputs are no class scores."""
    if stage.judge is None:
        return {}
    if stage.validation is None:
        return current().first("the judge's numbers", measured_by(stage.judge.by, model))
    accuracy = evaluate(model, stage.validation)
    return {} if accuracy is None else {"accuracy": accuracy}


def measure(model: nn.Module, stage: Stage) -> Metrics:
    """Parameters, MACs of one example, what it is judged by, and size."""
    values = judged(model, stage)
    accuracy = None if stage.validation is None else values.pop("accuracy", None)
    examples = count_examples(stage.example)
    return Metrics(
        count_params(model),
        stage.counted.macs // examples,
        accuracy,
        measured={name: value if math.isfinite(value) else None for name, value in values.items()},
        size_bytes=sum(t.numel() * t.itemsize for _, t in plain_tensors(model)),
        by_layer={
            name: [params, macs // examples]
            for name, (params, macs) in own_costs(model, stage.counted.by_module).items()
        },
    )


def timed(model: nn.Module, stage: Stage, before: Metrics, after: Metrics) -> tuple[Metrics, Metrics]:
    """What was measured before and after, with the latency of both networks, timed in turn.

    That of the unpruned one is not known if it could not be copied.
    """
    if stage.watch is None:
        return before, _with_latency(after, current().first("the latency", latency_of(model, stage.example)))
    first, last = stage.watch.compare(model)
    change = [ratio - 1 for ratio in stage.watch.quartiles(model)]
    return _with_latency(before, first), replace(_with_latency(after, last), latency_change=change)


def _with_latency(metrics: Metrics, found: Latency) -> Metrics:
    return replace(
        metrics, latency_ms=found.median_ms, latency_iqr_ms=found.iqr_ms, latency_conditions=found.conditions
    )


def count_examples(inputs: Any) -> int:
    """The number of examples in a model's inputs."""
    return max(examples_in(inputs), 1)


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


def fingerprints(model: nn.Module, stage: Stage) -> dict[str, Any]:
    """What must be the same, besides the options, for a resumed run to mean the same: the model and the data.

    The data are known by the batches to score on, the example inputs, and by how many there are to fine-tune on. A
    given teacher must be the same, too.
    """
    batches, distill = hashlib.sha256(), stage.tuner.options.distill
    teacher = distill.teacher if isinstance(distill, Distill) else None
    for tensor in (t for batch in stage.batches for t in tensors_in(batch)):
        batches.update(digest(tensor).encode())
    return {
        "model": fingerprint_of(model),
        **({"teacher": fingerprint_of(teacher)} if isinstance(teacher, nn.Module) else {}),
        "data": {
            "scoring": batches.hexdigest()[:16],
            "inputs": [[str(t.dtype), list(t.shape)] for t in tensors_in(stage.example)],
            "batches": _length(stage.tuner.stream.batches),
            "validation": _length(stage.validation),
        },
    }


def _length(batches: Any) -> int | None:
    """How many batches there are, where that is known."""
    try:
        return len(batches)
    except TypeError:  # an iterable without a length, or a loader over one
        return None
