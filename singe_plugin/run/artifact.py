"""Save and load a pruned model: safetensors and JSON, never pickle.

A directory holds ``model.safetensors`` (every parameter and buffer) and ``singe.json``: how to build the unpruned
architecture, what removals changed in each module, every removal, options, versions, metrics. Loading builds the
architecture, gives each tensor its pruned shape and each module its pruned attributes, and needs neither the data
nor torch-pruning. Where single weights were pruned, ``masks.safetensors`` has their masks, and the weights are saved
with the zeros in them. The record has a checksum of every tensor and of itself; no code runs that the files name, but
timm's own, unless the caller trusts them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.files import REMEDY, describe, parse, seal, unseal, write_atomically, write_text
from singe_plugin.loop.events import History
from singe_plugin.masks import masks_of, named_tensors, plain_tensors
from singe_plugin.method.folding import replace_folded
from singe_plugin.run.architecture import Builder, build_by, remember_origin
from singe_plugin.run.checkpoint import forget
from singe_plugin.run.record import (
    allocating_at_most,
    check_builder,
    check_record,
    check_structure,
    check_tensors,
    check_widths,
    decode,
    replace_blocks,
)  # fmt: skip
from singe_plugin.run.result import GroupRow, Metrics, Result
from singe_plugin.run.standalone import clear_standalone, write_standalone

__all__ = ["FORMAT", "MASKS", "RECORD", "TENSORS", "load", "read", "save"]

FORMAT = 2
TENSORS, RECORD, MASKS = "model.safetensors", "singe.json", "masks.safetensors"


def save(result: Result, directory: str | Path, builder: Builder | None = None, standalone: bool = False) -> Path:
    """Write a result to a directory, without pickle.

    Args:
        result: what :func:`singe_plugin.prune` returned.
        directory: is made if it does not exist; files of an earlier result are replaced.
        builder: how to build the unpruned architecture; by default what the result knows.
        standalone: write a folder ``standalone``, too, which is loaded without this library: by timm, where arguments
            of ``timm.create_model`` give these widths, else as a ``torch.export`` program. Its README.md says how.

    Returns:
        the directory.

    The checkpoint of the run goes, when everything is written: there is nothing to resume any more.

    Raises:
        ArtifactError: if no builder is known (a model that is not from timm): pass
            ``Builder.factory("package.module:function", ...)``; or if the files cannot be written. If the folder
            ``standalone`` alone cannot, the result is saved.
    """
    builder = builder or result.builder
    if builder is None:
        raise ArtifactError(
            f"{type(result.model).__name__} cannot be rebuilt from a timm name alone; say how to build the unpruned "
            "model: save(result, directory, builder=Builder.factory('package.module:function', ...)) or "
            "Builder.timm(name, ...) with its options"
        )
    if not isinstance(builder, Builder):
        raise ConfigError(
            f"builder={builder!r} does not say how to build a model; give Builder.factory('package.module:function', "
            "...) or Builder.timm(name, ...)"
        )
    directory = Path(directory)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in plain_tensors(result.model)}
    masks = {name: t.cpu().contiguous() for name, t in (masks_of(result.model) or result.weight_masks).items()}
    _check_masks(masks, tensors)
    record = {
        "format": FORMAT,
        "builder": asdict(builder),
        "structure": result.structure,
        "before": asdict(result.before),
        "after": asdict(result.after),
        "layers": [asdict(row) for row in result.layers],
        "left_whole": result.left_whole,
        "removals": result.history.removals(),
        "options": result.options,
        "versions": result.versions,
        "history": result.history.rows,
        "masks": describe(masks),
        "tensors": describe(tensors),
        "inputs": result.inputs,
        "not_finite": [name for name, t in tensors.items() if not _is_finite(t)],
    }
    try:
        text = json.dumps(seal(record), indent=1)
    except TypeError as error:
        raise ArtifactError(f"the result holds something that is not plain JSON: {error}") from error
    again = json.loads(text)
    check_record(unseal(again, "the record"))
    _try_out(builder, again, tensors, masks)  # find out now that it cannot be loaded, while the model is still there
    write_atomically(directory / TENSORS, lambda p: save_file(tensors, p))
    if masks:
        write_atomically(directory / MASKS, lambda p: save_file(masks, p))
    write_text(directory / RECORD, text)
    if not masks:
        (directory / MASKS).unlink(missing_ok=True)  # of an earlier result
    remember_origin(result.model, builder, result.structure)
    clear_standalone(directory)
    if standalone:
        write_standalone(result, builder, directory)
    if result.checkpoint is not None:
        forget(result.checkpoint)
    return directory


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _check_masks(masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        fits = name in tensors and mask.dtype == torch.bool and tensors[name].shape == mask.shape
        if not fits or bool(tensors[name][~mask].any()):
            raise ArtifactError(
                f"the mask of {name!r} does not fit its weights: what is masked is not zero; hold the masks while "
                "training (hold_masks), or leave them out (result.weight_masks = {})"
            )


def _try_out(builder: Builder, record: dict[str, Any], tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    try:
        _rebuild(record, tensors, masks, builder.build(), known=True)
    except (*_ODD, ArtifactError) as error:
        raise ArtifactError(
            f"builder {builder.kind}:{builder.name} {builder.options} does not build the unpruned model: {error}; give "
            "the function and options that it was made with"
        ) from error


_ODD = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a record that is in order, and an architecture that is another one, may raise."""


def load(directory: str | Path, factory: Callable[[], nn.Module] | None = None, trust: bool = False) -> Result:
    """Rebuild a saved result; the model is on the CPU, in eval mode, and computes bit for bit what it did.

    Single weights that were pruned are zeros in it; ``hold_masks(result.model, result.weight_masks)`` holds them while
    training goes on.

    The files are data: every byte is checked against its checksum, and everything that is said of the model against the
    architecture, before anything is set. Only an architecture of timm's own is built without being asked. A function
    that the files name (``Builder.factory``), or a model that timm would get from elsewhere (``hf-hub:``), runs code or
    reads files that somebody else chose: give ``factory``, or ``trust=True`` for a folder that you wrote or trust.

    Args:
        directory: where :func:`save` wrote it.
        factory: builds the unpruned architecture, in the place of the recorded builder.
        trust: use the recorded builder, whatever it is.

    Raises:
        ArtifactError: if files are missing or damaged, the architecture has changed since, or it needs your trust.
    """
    directory = Path(directory)
    record, tensors, masks = _read(directory)
    try:
        model = _architecture(record, tensors, factory, trust)
        return _rebuild(record, tensors, masks, model, known=trust or factory is None)
    except ArtifactError as error:
        raise ArtifactError(f"{directory}: {error}") from error
    except _ODD as error:
        raise ArtifactError(
            f"{directory}: the architecture has changed since it was saved: {type(error).__name__}: {error}; use the "
            "versions that the record names, or give factory="
        ) from error


def read(directory: str | Path) -> Result:
    """Read everything of a saved result but the model, which is an empty ``nn.Module``: nothing is built.

    Raises:
        ArtifactError: if files are missing or damaged.
    """
    record, _, masks = _read(Path(directory))
    return _result(nn.Module(), record, masks)


def _architecture(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], factory: Callable[[], nn.Module] | None, trust: bool
) -> nn.Module:
    """Build the unpruned model, by what the caller gives or the record says."""
    if factory is not None:
        return build_by("of the factory that was given", factory)
    builder = Builder(**record["builder"])
    if trust:
        return builder.build()
    known = importlib.import_module("timm").is_model
    check_builder(builder.kind, builder.name, builder.options, known)
    saved = sum(t.numel() * t.itemsize for t in tensors.values())
    with allocating_at_most(max(_LEAST_ROOM, _ROOM * saved), 20 * len(tensors) + 1000):
        return builder.build()


_LEAST_ROOM, _ROOM = 2**32, 1000
"""Bytes that building may take: this many in any case, or a multiple of what was saved. Pruning has its limits."""


def _rebuild(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], masks: dict[str, Tensor], model: nn.Module, known: bool
) -> Result:
    structure = record["structure"]
    for _, norm in structure["folded"]:
        replace_folded(model, norm)
    replace_blocks(model, structure.get("blocks", {}))
    check_structure(model, structure["attributes"])
    check_tensors(model, tensors, {layer for layer, _ in structure["folded"]})
    strange = [name for name, t in tensors.items() if not _is_finite(t) and name not in record["not_finite"]]
    if strange:
        raise ArtifactError(f"{strange[0]!r} has values that are not finite, and had none when it was saved")
    _check_masks(masks, tensors)
    _fill(model, tensors, set(structure["channels_last"]), set(structure["frozen"]))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, attributes in structure["attributes"].items():
        for key, value in attributes.items():
            modules[name].__dict__[key] = decode(value)
    for name in structure["attributes"]:
        check_widths(modules[name], name)
    builder = Builder(**record["builder"]) if known else None  # what a file names is not built before it is trusted
    remember_origin(model, builder, structure)
    return _result(model.eval(), record, masks)


def _result(model: nn.Module, record: Mapping[str, Any], masks: dict[str, Tensor]) -> Result:
    return Result(
        model=model,
        before=Metrics(**record["before"]),
        after=Metrics(**record["after"]),
        layers=[GroupRow(**row) for row in record["layers"]],
        left_whole=record["left_whole"],
        history=History(record["history"]),
        options=record["options"],
        versions=record["versions"],
        builder=Builder(**record["builder"]),
        structure=record["structure"],
        weight_masks=masks,
        inputs=record.get("inputs"),
    )


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read the record and the tensors, every byte of which is what was written."""
    path = directory / RECORD
    for name in (RECORD, TENSORS):
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory / name} does not exist; is {directory} a folder that save() wrote?")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}; give the permission") from error
    record = parse(text, path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ArtifactError(f"{path} has format {found!r}, this version reads format {FORMAT}; save it again")
    record = unseal(record, path)
    try:
        check_record(record)
    except ArtifactError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    tensors = _read_tensors(directory / TENSORS, record["tensors"])
    return record, tensors, _read_tensors(directory / MASKS, record["masks"]) if record["masks"] else {}


def _read_tensors(path: Path, expected: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ArtifactError(f"{path} is damaged or missing: {type(error).__name__}: {error}; {REMEDY}") from error
    found = describe(tensors)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if different:
        raise ArtifactError(
            f"{path} is damaged, or belongs to another result than {RECORD}: {different[0]!r} has another checksum "
            f"there; {REMEDY}"
        )
    return {name: tensors[name] for name in expected}


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], channels_last: set[str], frozen: set[str]) -> None:
    """Give every parameter and buffer its saved value, whatever its shape was."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, value in tensors.items():
        owner_name, _, attr = name.rpartition(".")
        owner = modules[owner_name]
        value = value.clone()  # in memory of its own, aligned as any tensor's: kernels may round differently if not
        if name in channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        if attr in owner._parameters:
            current = owner._parameters[attr]
            if current is None:
                owner._parameters[attr] = nn.Parameter(value)
            else:
                current.data = value
            parameter = owner._parameters[attr]
            assert parameter is not None
            parameter.requires_grad_(name not in frozen and value.is_floating_point())
        else:
            owner._buffers[attr] = value
    missing = [name for name, _ in named_tensors(model) if name not in tensors]
    if missing:
        raise ArtifactError(f"the file lacks {len(missing)} tensors of the architecture, the first is {missing[0]!r}")
