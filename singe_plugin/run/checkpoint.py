"""The state of an unfinished run in one file, so that ``kill -9`` at any point loses at most one layer.

Everything that the rest of the run depends on is in it: weights, optimizer, scaler, scheduler and EMA state, all
random generators, the position in the loader, the plan, the removals and the history. safetensors with a JSON
header, written to a temporary file and moved into place. The header has a checksum of itself and of every tensor.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singe_plugin.errors import ArtifactError, SingeError
from singe_plugin.files import describe, parse, seal, unseal, write_atomically
from singe_plugin.loop.events import History
from singe_plugin.loop.finetune import place_state
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.tuner import Tuner
from singe_plugin.masks import named_tensors
from singe_plugin.state import RngState

__all__ = [
    "CHECKPOINT",
    "fitting",
    "forget",
    "is_checkpoint",
    "read_checkpoint",
    "record_progress",
    "restore_progress",
    "restore_run",
    "seed_everything",
    "write_checkpoint",
]

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 2
Tensors = dict[str, Tensor]


def write_checkpoint(
    path: Path,
    model: nn.Module,
    progress: Progress,
    tuner: Tuner | None,
    history: History,
    fingerprint: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write the state of a run, atomically.

    Args:
        path: the file.
        fingerprint: what must be equal for a resumed run to mean the same.
        extra: plain values to keep (metrics of the unpruned model).

    Raises:
        ArtifactError: if something is not plain, or the file cannot be written; the one before is still there then.
    """
    tensors: Tensors = {f"model.{name}": t for name, t in named_tensors(model)}
    record: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "extra": dict(extra),
        "progress": record_progress(progress),
        "history": history.rows,
        "rng": _pack_rng(RngState.capture(), "rng", tensors),
    }
    if tuner is not None:
        record["finetune"] = _pack_finetune(tuner, model, tensors)
    flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        header = json.dumps(seal({**record, "tensors": describe(flat)}))
    except TypeError as error:
        raise ArtifactError(
            f"the run cannot be saved: {error} (an optimizer or scheduler state that is not plain)"
        ) from error
    write_atomically(path, lambda p: save_file(flat, p, metadata={"singe": header}))


def read_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Read a checkpoint and check that it belongs to this run.

    Raises:
        ArtifactError: if it is damaged, or was written by a run with other options, data or another model.
    """
    record, tensors = _read(path)
    old, new = record["fingerprint"], json.loads(json.dumps(dict(fingerprint)))
    names = sorted(old.keys() | new.keys(), key=lambda k: (k in _OWN_WORDS, k))  # an option may change the data, too
    different = [k for k in names if old.get(k, _NOTHING) != new.get(k, _NOTHING)]
    if different:
        name = key = different[0]
        was, now = old.get(key), new.get(key)
        while isinstance(was, dict) and isinstance(now, dict):
            inner = next(k for k in {**was, **now} if was.get(k, _NOTHING) != now.get(k, _NOTHING))
            name, was, now = f"{name}.{inner}", was.get(inner), now.get(inner)
        raise ArtifactError(
            f"{path} was written by a run with other options ({', '.join(different)}: {name} was {was!r}, "
            f"now {now!r}); use the same {_OWN_WORDS.get(key, 'options')}, or start anew in another folder"
        )
    return record, tensors


_NOTHING = object()  # in the place of a key that one of them lacks
_OWN_WORDS = {
    "finetune": "fine-tuning",
    "model": "unpruned model with the same weights",
    "teacher": "teacher with the same weights",
    "data": "data, which must give the same batches for the same seed",
}


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """A checkpoint whose every byte is what was written."""
    damaged = f"{path} is damaged or no checkpoint"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()["singe"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(f"{damaged}: {type(error).__name__}: {error}; {_REMEDY}") from error
    record = parse(header, path, _REMEDY)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        format_ = record.get("format") if isinstance(record, dict) else None
        raise ArtifactError(f"{path} has format {format_!r}, this version reads format {FORMAT}; {_REMEDY}")
    record = unseal(record, path, _REMEDY)
    known = record.get("tensors")
    found = describe(tensors)
    if known != found:
        names = sorted(found.keys() | known.keys() if isinstance(known, dict) else found)
        first = next(n for n in names if not isinstance(known, dict) or known.get(n) != found.get(n))
        raise ArtifactError(f"{damaged}: the checksum of {first!r} is not that of its bytes; {_REMEDY}")
    return record, tensors


_REMEDY = "start anew in another folder, or delete it"


def is_checkpoint(path: Path) -> bool:
    """Whether a run can be continued from a file; a damaged one has nothing to lose."""
    if not path.is_file():
        return False
    try:
        _read(path)
    except ArtifactError:
        return False
    return True


def forget(path: Path) -> None:
    """Delete the checkpoint of a run that is finished, once its result is safe; that of another run stays."""
    if is_checkpoint(path) and _read(path)[0]["progress"]["finished"]:
        path.unlink()


def record_progress(progress: Progress) -> dict[str, Any]:
    """A progress as plain values, for :func:`restore_progress`.

    Example:
        >>> record_progress(Progress({"conv": 1}))["plan"]
        {'conv': 1}
    """
    return {**vars(progress), "removals": [[layer, list(units)] for layer, units in progress.removals]}


def restore_progress(record: Mapping[str, Any], kind: type[Progress] = Progress) -> Progress:
    """The progress that a checkpoint describes."""
    saved = record["progress"]
    removals = [(layer, list(units)) for layer, units in saved["removals"]]
    names = ("plan", "next_layer", "alive", "end_done", "finished", "goal", "before", "stopped")
    return kind(removals=removals, **{name: saved[name] for name in names if name in saved})


@contextmanager
def fitting() -> Iterator[None]:
    """What is read from a checkpoint in here and does not fit is one clear error."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SingeError):
            raise
        raise ArtifactError(
            f"the checkpoint does not fit the run ({type(error).__name__}: {error}); give the same optimizer, "
            "scheduler, ema and loader, or start anew in another folder"
        ) from error


def restore_run(record: Mapping[str, Any], tensors: Tensors, model: nn.Module, tuner: Tuner | None) -> None:
    """Put values, optimizer, random generators and loader position back; the model already has its pruned shape.

    Raises:
        ArtifactError: if the checkpoint does not fit the model or the fine-tuning.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            value = tensors.get(f"model.{name}")
            if value is None or value.shape != tensor.shape or value.dtype != tensor.dtype:
                found = None if value is None else (str(value.dtype), tuple(value.shape))
                raise ArtifactError(
                    f"the checkpoint has {found} for {name!r}, the model {(str(tensor.dtype), tuple(tensor.shape))}: "
                    "it belongs to another model; start anew in another folder"
                )
            tensor.copy_(value)
    with fitting():
        if tuner is not None and record.get("finetune") is not None:
            _unpack_finetune(record["finetune"], tensors, tuner, model)
        _unpack_rng(record["rng"], "rng", tensors).restore()


def _pack_rng(state: RngState, key: str, tensors: Tensors) -> dict[str, Any]:
    tensors[f"{key}.cpu"] = state.torch_cpu
    for i, cuda in enumerate(state.torch_cuda):
        tensors[f"{key}.cuda.{i}"] = cuda
    version, internal, gauss = state.python
    packed: dict[str, Any] = {"cuda": len(state.torch_cuda), "python": [version, list(internal), gauss], "numpy": None}
    if state.numpy is not None:
        name, keys, *rest = state.numpy
        packed["numpy"] = [name, [int(k) for k in keys], *[float(r) if isinstance(r, float) else int(r) for r in rest]]
    return packed


def _unpack_rng(packed: Mapping[str, Any], key: str, tensors: Tensors) -> RngState:
    version, internal, gauss = packed["python"]
    numpy = packed["numpy"]
    if numpy is not None and "numpy" in sys.modules:
        array = sys.modules["numpy"].asarray(numpy[1], dtype="uint32")
        numpy = (numpy[0], array, *numpy[2:])
    else:
        numpy = None
    cuda = [tensors[f"{key}.cuda.{i}"] for i in range(packed["cuda"])]
    return RngState(tensors[f"{key}.cpu"], cuda, (version, tuple(internal), gauss), numpy)


def _pack_finetune(tuner: Tuner, model: nn.Module, tensors: Tensors) -> dict[str, Any]:
    names = {id(p): n for n, p in model.named_parameters()}
    record: dict[str, Any] = {"done": tuner.done, "state": {}, "groups": [], "ema": tuner.options.ema is not None}
    for optimizer in tuner.optimizers:
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                raise ArtifactError("the optimizer holds parameters that are not the model's; the run cannot be saved")
            plain = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                    plain[key] = {"tensor": True}
                else:
                    plain[key] = {"value": value}
            record["state"][name] = plain
        record["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    if tuner.scheduler is not None:
        record["scheduler"] = tuner.scheduler.state_dict()
    if tuner.scaler is not None:
        record["scaler"] = tuner.scaler.state_dict()
    if tuner.options.ema is not None:
        tensors.update({f"ema.{name}": t for name, t in named_tensors(tuner.options.ema)})
    position = tuner.stream.position()
    record["stream"] = {"taken": position["taken"], "loaders": len(position["loaders"]), "rng": None}
    for i, state in enumerate(position["loaders"]):
        tensors[f"stream.loader.{i}"] = state
    if position["start"] is not None:
        record["stream"]["rng"] = _pack_rng(position["start"], "stream.rng", tensors)
    record["generators"] = len(tuner.stream.generators)
    for i, generator in enumerate(tuner.stream.generators):
        tensors[f"stream.now.{i}"] = generator.get_state()
    return record


def _unpack_finetune(record: Mapping[str, Any], tensors: Tensors, tuner: Tuner, model: nn.Module) -> None:
    tuner.done = record["done"]
    parameters = dict(model.named_parameters())
    for optimizer in tuner.optimizers:
        optimizer.state.clear()
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, plain in record["state"].items():
            parameter = parameters[name]
            state = {}
            for key, entry in plain.items():
                if "value" in entry:
                    state[key] = entry["value"]
                else:
                    value = tensors[f"optimizer.{name}.{key}"].clone()
                    state[key] = place_state(parameter, key, value, groups[id(parameter)])
            optimizer.state[parameter] = state
        for live, saved in zip(optimizer.param_groups, record["groups"], strict=True):
            live.update({k: tuple(v) if isinstance(live.get(k), tuple) else v for k, v in saved.items()})
    if tuner.scheduler is not None and "scheduler" in record:
        tuner.scheduler.load_state_dict(record["scheduler"])
    if tuner.scaler is not None and "scaler" in record:
        tuner.scaler.load_state_dict(record["scaler"])
    if tuner.options.ema is not None and record["ema"]:
        with torch.no_grad():
            for name, tensor in named_tensors(tuner.options.ema):
                if tensors[f"ema.{name}"].shape != tensor.shape:
                    raise ValueError(f"the ema has another shape for {name!r}")
                tensor.copy_(tensors[f"ema.{name}"])
    stream = record["stream"]
    start = None if stream["rng"] is None else _unpack_rng(stream["rng"], "stream.rng", tensors)
    loaders = [tensors[f"stream.loader.{i}"] for i in range(stream["loaders"])]
    tuner.stream.seek({"taken": stream["taken"], "start": start, "loaders": loaders})
    for i, generator in enumerate(tuner.stream.generators[: record["generators"]]):
        generator.set_state(tensors[f"stream.now.{i}"])


def seed_everything(seed: int) -> None:
    """Seed torch, python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
