"""What the commands do, once their options are read: ``prune``, ``inspect`` and ``report`` as functions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from singe_plugin.artifact import load, save
from singe_plugin.checkpoint import CHECKPOINT
from singe_plugin.datasets import DataConfig, Splits, data_config, load_splits
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.events import ProgressBar
from singe_plugin.inspection import Inspection, figure_two, inspect_model
from singe_plugin.models import NamedModel, create_model
from singe_plugin.report import Curves, read_extras, report_data, write_report
from singe_plugin.result import Result
from singe_plugin.scoring import ScoringOptions

__all__ = ["prepare", "run_inspect", "run_prune", "run_report"]

Say = Callable[[str], None]
_RANDOM = "the weights are random: give --pretrained or --checkpoint to prune a trained model"


def prepare(model_options: Mapping[str, Any], data_options: Mapping[str, Any]) -> tuple[NamedModel, DataConfig, Splits]:
    """The model and the data that fit each other.

    The classes of the data are the model's, unless ``num_classes`` says so or the weights are trained ones.

    Raises:
        ConfigError: if the model has another number of classes than the data.
    """
    named = create_model(**model_options)
    config, splits = _data_for(named, data_options)
    outputs = getattr(named.model, "num_classes", splits.classes)
    if outputs != splits.classes:
        if named.weights == "random" and model_options.get("num_classes") is None:
            named = create_model(**{**model_options, "num_classes": splits.classes})
        else:
            raise ConfigError(
                f"{named.builder.name} has {outputs} classes and {splits.name} has {splits.classes}; give "
                f"--num-classes {splits.classes} with weights that fit, or the data the weights were trained on"
            )
    return named, config, splits


def _data_for(named: NamedModel, options: Mapping[str, Any]) -> tuple[DataConfig, Splits]:
    options = dict(options)
    size = options.pop("img_size", None)
    if size is None and options["dataset"] == "digits":
        fixed = (getattr(named.model, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
        size = None if fixed else 32
    config = data_config(named.model, size)
    return config, load_splits(config, **options)


def run_prune(
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
    prune_options: Mapping[str, Any],
    output: str | Path,
    resume: bool,
    curves: bool,
    progress: bool,
    say: Say,
    granularity: str = "unit",
) -> tuple[Result, dict[str, Any]]:
    """``singe prune``: prune units or single weights, save the result and its report to a folder.

    Returns:
        the result, and everything that is said of it as plain values.

    Raises:
        ArtifactError: if the folder holds an unfinished run and ``resume`` is false.
    """
    from singe_plugin.integrations.prune import prune
    from singe_plugin.integrations.staging import check_out_dir, resolve_device
    from singe_plugin.integrations.unstructured import prune_weights

    run = {"unit": prune, "weight": prune_weights}[granularity]
    output = Path(output)
    check_out_dir(output)
    if not resume and _unfinished(output / CHECKPOINT):
        raise ArtifactError(
            f"{output} holds an unfinished run; give --resume to continue it, or another --output, or delete "
            f"{output / CHECKPOINT}"
        )
    named, _, splits = prepare(model_options, data_options)
    if named.weights == "random":
        say(f"note: {_RANDOM}")
    seed, batch_size = prune_options["seed"], prune_options["scoring_batch_size"]
    panels: list[Curves] = []
    if curves and granularity == "unit":
        named.model.to(resolve_device(prune_options["device"]))
        panels = figure_two(named.model, splits.train, batch_size, seed)
    started = time.perf_counter()
    bar = ProgressBar() if progress else None
    try:
        result: Result = run(
            named.model, splits.train, val_data=splits.val, out_dir=output, resume=resume, builder=named.builder,
            callbacks=() if bar is None else (bar,), **prune_options,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()  # an error message must not end up in the middle of it
    seconds = time.perf_counter() - started
    save(result, output)
    intro = [f"Weights: {named.weights}. Data: {splits.name}."]
    if named.weights == "random":
        intro.append(f"Note: {_RANDOM}.")
    extra = {"weights": named.weights, "data": splits.name, "wall_seconds": seconds}
    files = write_report(result, output, curves=panels, intro=intro, extra=extra)
    return result, {**report_data(result), **extra, "files": [str(f) for f in [*files, *_saved(output)]]}


def run_inspect(
    model_options: Mapping[str, Any],
    img_size: int | None,
    scoring: ScoringOptions,
    device: str | None,
    **options: Any,
) -> tuple[Inspection, dict[str, Any]]:
    """``singe inspect``: the groups of a model and what pruning it would cost."""
    from singe_plugin.integrations.staging import resolve_device

    named = create_model(**model_options)
    config = data_config(named.model, img_size)
    where = resolve_device(device or "cpu")
    example = torch.zeros(2, config.channels, config.size, config.size, device=where)
    found = inspect_model(named.model.to(where), example, scoring=scoring, **options)
    about = {"model": named.builder.name, "weights": named.weights, "img_size": config.size}
    return found, {**about, **found.as_dict()}


def run_report(directory: str | Path) -> tuple[Result, dict[str, Any]]:
    """``singe report``: write the report of a saved result again, from what is in its folder.

    Raises:
        ArtifactError: if the folder holds no result.
    """
    directory = Path(directory)
    result = load(directory)
    extras = read_extras(directory)
    files = write_report(result, directory, **extras)
    return result, {**report_data(result), **extras.get("extra", {}), "files": [str(f) for f in files]}


def _unfinished(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return not json.loads(file.metadata()["singe"])["progress"]["finished"]
    except Exception:
        return False  # damaged: nothing in it could be resumed


def _saved(output: Path) -> list[Path]:
    names = ("model.safetensors", "masks.safetensors", "singe.json")
    return [output / name for name in names if (output / name).is_file()]
