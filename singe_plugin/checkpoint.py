"""The state of an unfinished run in one file, so that ``kill -9`` at any point loses at most one layer.

Everything that the rest of the run depends on is in it: weights, optimizer, scaler, scheduler and EMA state, all
random generators, the position in the loader, the plan, the removals and the history. safetensors with a JSON
header, written to a temporary file and moved into place.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from singe_plugin.algorithm import Progress
from singe_plugin.artifact import named_tensors, write_atomically
from singe_plugin.errors import ArtifactError
from singe_plugin.events import History
from singe_plugin.finetune import FineTune, beside
from singe_plugin.state import RngState

__all__ = ["CHECKPOINT", "read_checkpoint", "restore_run", "write_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 1
Tensors = dict[str, Tensor]


def write_checkpoint(
    path: Path,
    model: nn.Module,
    progress: Progress,
    finetune: FineTune | None,
    history: History,
    fingerprint: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> None:
    """Write the state of a run, atomically.

    Args:
        path: the file.
        fingerprint: what must be equal for a resumed run to mean the same.
        extra: plain values to keep (metrics of the unpruned model).
    """
    tensors: Tensors = {f"model.{name}": t for name, t in named_tensors(model)}
    record: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": dict(fingerprint),
        "extra": dict(extra),
        "progress": {
            "plan": progress.plan,
            "next_layer": progress.next_layer,
            "removals": [[layer, units] for layer, units in progress.removals],
            "alive": progress.alive,
            "end_done": progress.end_done,
            "finished": progress.finished,
            "goal": progress.goal,
            "before": progress.before,
        },
        "history": history.rows,
        "rng": _pack_rng(RngState.capture(), "rng", tensors),
    }
    if finetune is not None:
        record["finetune"] = _pack_finetune(finetune, model, tensors)
    try:
        header = json.dumps(record)
    except TypeError as error:
        raise ArtifactError(
            f"the run cannot be saved: {error} (an optimizer or scheduler state that is not plain)"
        ) from error
    flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_atomically(path, lambda p: save_file(flat, p, metadata={"singe": header}))


def read_checkpoint(path: Path, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Read a checkpoint and check that it belongs to this run.

    Raises:
        ArtifactError: if it is damaged, or was written by a run with other options.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["singe"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(f"{path} is damaged or no checkpoint: {type(error).__name__}: {error}") from error
    if record.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {record.get('format')}, this version reads format {FORMAT}")
    old, new = record["fingerprint"], json.loads(json.dumps(dict(fingerprint)))
    different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if different:
        key = different[0]
        raise ArtifactError(
            f"{path} was written by a run with other options ({', '.join(different)}: {key} was {old.get(key)!r}, now "
            f"{new.get(key)!r}); use the same options, or start anew in another folder"
        )
    return record, tensors


def restore_progress(record: Mapping[str, Any], kind: type[Progress] = Progress) -> Progress:
    """The progress that a checkpoint describes."""
    saved = record["progress"]
    removals = [(layer, list(units)) for layer, units in saved["removals"]]
    names = ("plan", "next_layer", "alive", "end_done", "finished", "goal", "before")
    return kind(removals=removals, **{name: saved[name] for name in names if name in saved})


def restore_run(record: Mapping[str, Any], tensors: Tensors, model: nn.Module, finetune: FineTune | None) -> None:
    """Put values, optimizer, random generators and loader position back; the model already has its pruned shape."""
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            value = tensors.get(f"model.{name}")
            if value is None or value.shape != tensor.shape:
                shape = None if value is None else tuple(value.shape)
                raise ArtifactError(
                    f"the checkpoint has shape {shape} for {name!r}, the model {tuple(tensor.shape)}: it belongs to "
                    "another model"
                )
            tensor.copy_(value)
    if finetune is not None and record.get("finetune") is not None:
        _unpack_finetune(record["finetune"], tensors, finetune, model)
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


def _pack_finetune(finetune: FineTune, model: nn.Module, tensors: Tensors) -> dict[str, Any]:
    names = {id(p): n for n, p in model.named_parameters()}
    record: dict[str, Any] = {"done": finetune.done, "state": {}, "groups": [], "ema": finetune.ema is not None}
    for optimizer in finetune.optimizers:
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
    if finetune.scheduler is not None:
        record["scheduler"] = finetune.scheduler.state_dict()
    if finetune.scaler is not None:
        record["scaler"] = finetune.scaler.state_dict()
    if finetune.ema is not None:
        tensors.update({f"ema.{name}": t for name, t in named_tensors(finetune.ema)})
    position = finetune.stream.position()
    record["stream"] = {"taken": position["taken"], "loaders": len(position["loaders"]), "rng": None}
    for i, state in enumerate(position["loaders"]):
        tensors[f"stream.loader.{i}"] = state
    if position["start"] is not None:
        record["stream"]["rng"] = _pack_rng(position["start"], "stream.rng", tensors)
    record["generators"] = len(finetune.stream.generators)
    for i, generator in enumerate(finetune.stream.generators):
        tensors[f"stream.now.{i}"] = generator.get_state()
    return record


def _unpack_finetune(record: Mapping[str, Any], tensors: Tensors, finetune: FineTune, model: nn.Module) -> None:
    finetune.done = record["done"]
    parameters = dict(model.named_parameters())
    for optimizer in finetune.optimizers:
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
                    state[key] = beside(parameter, key, value, groups[id(parameter)])
            optimizer.state[parameter] = state
        for live, saved in zip(optimizer.param_groups, record["groups"], strict=True):
            live.update({k: tuple(v) if isinstance(live.get(k), tuple) else v for k, v in saved.items()})
    if finetune.scheduler is not None and "scheduler" in record:
        finetune.scheduler.load_state_dict(record["scheduler"])
    if finetune.scaler is not None and "scaler" in record:
        finetune.scaler.load_state_dict(record["scaler"])
    if finetune.ema is not None and record["ema"]:
        with torch.no_grad():
            for name, tensor in named_tensors(finetune.ema):
                tensor.copy_(tensors[f"ema.{name}"])
    stream = record["stream"]
    start = None if stream["rng"] is None else _unpack_rng(stream["rng"], "stream.rng", tensors)
    loaders = [tensors[f"stream.loader.{i}"] for i in range(stream["loaders"])]
    finetune.stream.seek({"taken": stream["taken"], "start": start, "loaders": loaders})
    for i, generator in enumerate(finetune.stream.generators[: record["generators"]]):
        generator.set_state(tensors[f"stream.now.{i}"])


def seed_everything(seed: int) -> None:
    """Seed torch, python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
