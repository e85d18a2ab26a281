"""What the commands do, once their options are read: ``prune``, ``inspect`` and ``report`` as functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from singe_plugin.app.cli import typed_command
from singe_plugin.app.config import CONFIG
from singe_plugin.app.curves import Curves
from singe_plugin.app.datasets import DataConfig, Splits, data_config, load_splits
from singe_plugin.app.inspection import Inspection, figure_two, inspect_model
from singe_plugin.app.models import NamedModel, create_model
from singe_plugin.app.report import FILES, read_extras, report_data, write_report
from singe_plugin.app.sources import architecture_of
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.fields import describe, to_plain
from singe_plugin.files import locked, write_text
from singe_plugin.integrations.loggers import Logger, make_logger
from singe_plugin.loop.shown import ProgressBar
from singe_plugin.loop.watch import Evaluate
from singe_plugin.ranks import current
from singe_plugin.run.artifact import MASKS, RECORD, TENSORS, read, save
from singe_plugin.run.checkpoint import CHECKPOINT, is_checkpoint
from singe_plugin.run.data import as_loader
from singe_plugin.run.result import Result
from singe_plugin.run.staging import resolve_device

__all__ = ["RANDOM", "Extras", "prepare", "run_inspect", "run_prune", "run_report"]

Say = Callable[[str], None]
RANDOM = "the weights are random: give --pretrained or --checkpoint to prune a trained model"
_MASKED = "the weights that were masked are zeros to start with, and no longer held there"


@dataclass(frozen=True)
class Extras:
    """What there is besides the pruned network.

    Attributes:
        config: the text of a file that repeats the run, which lies in the folder from the start; None writes none.
        log: where to log, too: names of ``singe_plugin.integrations.loggers.LOGGERS``.
        texts: what the run was asked for, for these.
        curves: whether the gradients along the path are plotted.
        progress: whether it is shown how far it is.
    """

    config: str | None = None
    log: tuple[str, ...] = ()
    texts: Mapping[str, Any] = field(default_factory=dict)
    curves: bool = True
    progress: bool = True


def prepare(model_options: Mapping[str, Any], data_options: Mapping[str, Any]) -> tuple[NamedModel, DataConfig, Splits]:
    """The model and the data that fit each other.

    The number of classes is what ``num_classes`` says, else the trained weights', else the data's.

    Raises:
        ConfigError: if the model has another number of classes than the data.
    """
    named = create_model(**model_options)
    config, splits = _data_for(named, data_options)
    outputs = getattr(named.model, "num_classes", splits.classes)
    if outputs != splits.classes:
        if named.weights == "random" and model_options.get("num_classes") is None:
            named = create_model(**{**model_options, "num_classes": splits.classes})
        elif "num_classes" in named.sizes:
            raise ConfigError(
                f"{model_options['checkpoint']} was trained for {outputs} classes, and {splits.name} has "
                f"{splits.classes}; give the data that it was trained on, or weights for {splits.classes} classes"
            )
        else:
            raise ConfigError(
                f"{named.builder.name} has {outputs} classes and {splits.name} has {splits.classes}; give "
                f"--num-classes {splits.classes} with weights that fit, or the data the weights were trained on"
            )
    return named, config, splits


def _sizes(named: NamedModel) -> str:
    """What was read off the weights, in words."""
    words = {"num_classes": "classes", "in_chans": "input channels"}
    return ", ".join(f"{size} {words[end]}" for end, size in named.sizes.items())


def _data_for(named: NamedModel, options: Mapping[str, Any]) -> tuple[DataConfig, Splits]:
    options = {k: v for k, v in options.items() if k not in ("batch_size", "workers")}
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
    say: Say,
    granularity: str = "unit",
    extras: Extras = Extras(),
) -> tuple[Result, dict[str, Any]]:
    """``singe prune``: prune units or single weights, save the result and its report to a folder.

    Returns:
        the result, and everything that is said of it as plain values. Where a finished run is to be resumed, that is
        the result in the folder (with an empty model), and nothing is done.

    Raises:
        ArtifactError: if the folder holds an unfinished run and ``resume`` is false, or a finished one with other
            options and ``resume`` is true; or if another process is running in it.
    """
    output, ranks, start = Path(output), current(), model_options.get("checkpoint")
    if start is not None and Path(start).is_dir() and Path(start).resolve() == output.resolve():
        raise ConfigError(f"--checkpoint and --output are both {output}; the new result needs a folder of its own")
    with locked(output, run=False) if ranks.main else nullcontext():
        if ranks.main and not resume and is_checkpoint(output / CHECKPOINT):
            raise ArtifactError(
                f"{output} holds an unfinished run; give --resume to continue it, or another --output, or delete "
                f"{output / CHECKPOINT}"
            )
        if resume and ranks.first("the folder", not (output / CHECKPOINT).exists() and (output / RECORD).exists()):
            return _finished(model_options, data_options, prune_options, output, say, granularity)
        kept, config = output / CONFIG, extras.config
        if config is not None and not resume and ranks.main:
            write_text(kept, config)
        found = _prune(model_options, data_options, prune_options, output, resume, say, granularity, extras)
        if config is not None and ranks.main and not kept.exists():  # one of before
            write_text(kept, config)
        if kept.exists():
            found[1]["files"].append(str(kept))
        return found


def _finished(
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
    prune_options: Mapping[str, Any],
    output: Path,
    say: Say,
    granularity: str,
) -> tuple[Result, dict[str, Any]]:
    """What is there of a run that was asked to go on and is over; it must be the one that was meant."""
    result = read(output)
    asked = _asked(prune_options, granularity, result.options) | {"finetune.batch_size": data_options["batch_size"]}
    named = architecture_of(model_options["name"], model_options["checkpoint"])
    mine, theirs = {"model": named, **asked}, {"model": result.builder.name, **_flat(result.options)}
    different = [key for key in mine if mine[key] != theirs.get(key)]
    if different:
        key = different[0]
        raise ArtifactError(
            f"{output} holds the result of a finished run with other options ({', '.join(different)}: {key} was "
            f"{theirs.get(key)!r}, now {mine[key]!r}); nothing is left to resume: leave --resume out, or give another "
            "one"
        )
    say(f"note: the run in {output} is finished; this is its result")
    extras = read_extras(output)
    files = [output / name for name in FILES if (output / name).is_file()]
    return result, {
        **report_data(result),
        **extras.get("extra", {}),
        "files": [str(f) for f in [*files, *_saved(output)]],
    }


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run recorded, in one table."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def _asked(options: Mapping[str, Any], granularity: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a run with these options records, as far as it is known beforehand and was recorded."""
    from singe_plugin.integrations.prune import describe_target, settle_target, usual_every, what_repairs
    from singe_plugin.integrations.unstructured.arguments import DEFAULT_ROUNDS, settle_pace

    weights = granularity == "weight"
    pace = settle_pace(options["pace"], DEFAULT_ROUNDS) if weights else options["pace"].settle()
    target = {}
    if not weights:
        wanted, pace = settle_target(options["target"], pace)
        target = describe_target(wanted)
    settled = options["finetune"].settle("layer" if weights else usual_every(pace))
    judge = _judge(options, "data")
    finetune = {k: v for k, v in describe(settled).items() if k not in ("loader", "loss")}
    repair = what_repairs(options["repair"], settled, judge)
    scoring = options["scoring"].settle(pace.order, weights, repair is not None)
    parts: dict[str, Any] = {"pace": describe(pace), "scoring": describe(scoring), "finetune": finetune}
    parts["repair"] = None if repair is None else describe(repair)
    known = {k: to_plain(parts.get(k, v)) for k, v in {**options, **target}.items() if k in recorded}
    if judge.max_drop is not None or "evaluate" in recorded:
        known["evaluate"] = {"max_drop": judge.max_drop}
    return _flat(known | {"granularity": "weight" if weights else None})


def _judge(options: Mapping[str, Any], by: Any) -> Evaluate:
    """What the network is judged by, and how much worse it may get."""
    return Evaluate(by, max_drop=options.get("max_drop"))


def _prune(
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
    prune_options: Mapping[str, Any],
    output: Path,
    resume: bool,
    say: Say,
    granularity: str,
    extras: Extras,
) -> tuple[Result, dict[str, Any]]:
    from singe_plugin.integrations.prune import prune
    from singe_plugin.integrations.unstructured import prune_weights

    runs: dict[str, Callable[..., Result]] = {"unit": prune, "weight": prune_weights}
    named, _, splits = prepare(model_options, data_options)
    if named.weights == "random":
        say(f"note: {RANDOM}")
    if named.weights.startswith("masked"):
        say(f"note: {_MASKED}")
    if named.sizes:
        say(f"note: {_sizes(named)}, as {model_options['checkpoint']} has")
    seed, batch_size, workers = prune_options["seed"], data_options["batch_size"], data_options["workers"]
    loader = as_loader(splits.train, batch_size, workers, True, seed)
    prune_options = {**prune_options, "finetune": replace(prune_options["finetune"], loader=loader)}
    panels: list[Curves] = []
    main = current().main
    if extras.curves and granularity == "unit" and main:
        named.model.to(resolve_device(prune_options["device"]))
        panels = figure_two(named.model, splits.train, prune_options["scoring"].batch_size, seed)
    if (pattern := prune_options.pop("pattern", None)) is not None:
        prune_options["sparsity"] = pattern, prune_options["sparsity"]
    judge = _judge(prune_options, as_loader(splits.val, batch_size, workers, shuffle=False))
    prune_options.pop("max_drop", None)
    started = time.perf_counter()
    shown: list[ProgressBar | Logger] = [ProgressBar()] if extras.progress and main else []
    try:
        shown += [make_logger(name, output, extras.texts) for name in extras.log if main]
        result: Result = runs[granularity](
            named.model, splits.train, val_data=judge,
            out_dir=output, resume=resume, callbacks=shown, **prune_options,
        )  # fmt: skip
    finally:
        for callback in shown:
            callback.close()  # an error message must not end up in the middle of a bar
    seconds = time.perf_counter() - started
    result.builder = named.builder
    if main:
        save(result, output)
    intro = [f"Weights: {named.weights}. Data: {splits.name}."]
    if named.weights == "random":
        intro.append(f"Note: {RANDOM}.")
    extra = {"weights": named.weights, "data": splits.name, "wall_seconds": seconds, "command": typed_command()}
    files = [*write_report(result, output, curves=panels, intro=intro, extra=extra), *_saved(output)] if main else []
    return result, {**report_data(result), **extra, "files": [str(f) for f in files]}


def run_inspect(
    model_options: Mapping[str, Any],
    img_size: int | None,
    device: str | None,
    **options: Any,
) -> tuple[Inspection, dict[str, Any]]:
    """``singe inspect``: the groups of a model and what pruning it would cost."""

    named = create_model(**model_options)
    config = data_config(named.model, img_size)
    where = resolve_device(device or "cpu")
    example = torch.zeros(2, config.channels, config.size, config.size, device=where)
    found = inspect_model(named.model.to(where), example, **options)
    about = {
        "model": named.builder.name,
        "weights": named.weights,
        "img_size": config.size,
        "from_checkpoint": named.sizes,
    }
    return found, {**about, **found.as_dict()}


def run_report(directory: str | Path) -> tuple[Result, dict[str, Any]]:
    """``singe report``: write the report of a saved result again, from what is in its folder.

    The model is not built, so that no code runs that the folder names; the result has an empty one.

    Raises:
        ArtifactError: if the folder holds no result, or a damaged one.
    """
    directory = Path(directory)
    result = read(directory)
    extras = read_extras(directory)
    files = write_report(result, directory, **extras)
    return result, {**report_data(result), **extras.get("extra", {}), "files": [str(f) for f in files]}


def _saved(output: Path) -> list[Path]:
    return [output / name for name in (TENSORS, MASKS, RECORD) if (output / name).is_file()]
