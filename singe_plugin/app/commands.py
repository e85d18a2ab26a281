"""The commands of ``singe``: their options, and what is printed of what the runs and the demo return.

Options carry timm's names where timm has them.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from singe_plugin.app.datasets import NO_DATA, TORCHVISION
from singe_plugin.app.models import parse_pairs
from singe_plugin.errors import SingeError
from singe_plugin.fields import Spelling, spellings
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.method.options import Scoring

__all__ = ["demo", "inspect", "prune", "report"]

Command = TypeVar("Command", bound=Callable[..., Any])
_OPTIONS = (Scoring, Pace, FineTune, Distill)


def _stacked(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_model = _stacked(
    click.option("--model", help="timm's name of the architecture, hf-hub:OWNER/NAME or local-dir:FOLDER."),
    click.option("--pretrained", is_flag=True, help="Start from timm's pretrained weights."),
    click.option(
        "--checkpoint",
        type=click.Path(),
        help="Weights (.safetensors, .pth), or a folder of singe prune to go on from.",
    ),
    click.option("--num-classes", type=click.IntRange(1), help="Classes; by default the model's or the data's."),
    click.option("--in-chans", type=click.Choice(["1", "3"]), help="Channels of the images."),
    click.option("--model-kwargs", multiple=True, metavar="KEY=VALUE", help="More for timm.create_model; repeatable."),
    click.option("--img-size", type=click.IntRange(1), help="Image size; by default the model's (digits: 32)."),
    click.option("--device", help="cpu, cuda, ...; by default CUDA when there is one (inspect: cpu)."),
    click.option("--seed", default=0, show_default=True, help="Of everything random."),
)
_data = _stacked(
    click.option("--dataset", help=f"digits, folder, {', '.join(TORCHVISION)}, hfds/NAME; default: folder."),
    click.option("--data-dir", type=click.Path(), help="Folder of images (train/ and val/ in it, or classes)."),
    click.option("--dataset-download", is_flag=True, help="Let the dataset be downloaded."),
    click.option("--no-aug", is_flag=True, help="No training augmentation."),
    click.option("-b", "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Of fine-tuning."),
    click.option("-j", "--workers", default=0, show_default=True, type=click.IntRange(0), help="Loader processes."),
)
_target = click.option(
    "--target",
    default="macs=0.5",
    show_default=True,
    help="What to remove: macs=X, params=X, or none: what a ratio per layer says (the default with such).",
)
_verify = click.option("--no-verify", is_flag=True, help="Skip the oracles that prove the groups.")
_ignore = click.option("--ignore", "ignored_layers", multiple=True, metavar="NAME", help="Leave it whole; repeatable.")
_weights = _stacked(
    click.option("--sparsity", type=float, help="Fraction of the weights to mask; 0.9, or what the pattern needs."),
    click.option("--pattern", metavar="N:M", help="At most N of every M consecutive weights stay, e.g. 2:4."),
)
_OF_WEIGHTS = ("sparsity", "pattern")
_OF_UNITS = ("target", "no_verify")
_output = _stacked(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
)


def _generated(*classes: type) -> Callable[[Command], Command]:
    """A command's options for the fields of some options classes, as these say."""
    made = []
    for spelling in spellings(*classes):
        text = spelling.text if spelling.default in (None, False) else f"{spelling.text} [default: {spelling.default}]"
        text = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")
        about: dict[str, Any] = {"help": text, "metavar": spelling.metavar}
        if spelling.kind is bool:
            about["is_flag"] = True
        else:
            about["type"] = click.Choice(spelling.choices) if spelling.choices else spelling.kind
        if spelling.none:
            about["type"] = str
            about["metavar"] = "|".join([*(spelling.choices or [spelling.kind.__name__.upper()]), "none"])
            about["callback"] = partial(_or_none, spelling)
        if spelling.read is not None:
            about |= {"type": str, "callback": partial(_converted, spelling.read)}
        made.append(click.option(*spelling.flags, spelling.name, **about))
    return _stacked(*made)


def _or_none(spelling: Spelling, context: Any, param: Any, value: str | None) -> Any:
    """A value, or what says that there is to be none."""
    if value is None or value == "none":
        return value
    kind = click.Choice(spelling.choices) if spelling.choices else click.types.convert_type(spelling.kind)
    return kind.convert(value, param, context)


def _converted(read: Callable[[str], Any], context: Any, param: Any, value: str | None) -> Any:
    try:
        return None if value is None else read(value)
    except SingeError as error:
        raise click.BadParameter(str(error)) from error


def _objects(options: dict[str, Any], *classes: type) -> list[Any]:
    """Take the generated options out of a command's, as objects; a usage error for a value that cannot be."""
    fields: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for spelling in spellings(*classes):
        value = options.pop(spelling.name)
        if value is not None and value is not False:
            for cls, field in spelling.targets:
                fields[cls][field] = None if spelling.none and value == "none" else value
    try:
        return [cls(**fields[cls]) for cls in classes]
    except SingeError as error:
        raise click.UsageError(str(error)) from error


def _taught(finetune: FineTune, distill: Distill) -> FineTune:
    """The fine-tuning that learns from its teacher as is said beside it; a usage error if it has none."""
    if isinstance(finetune.distill, Distill):
        return replace(finetune, distill=replace(distill, teacher=finetune.distill.teacher))
    if distill != Distill():
        *others, last = [flag for spelling in spellings(Distill) for flag in spelling.flags]
        raise click.UsageError(
            f"{', '.join(others)} and {last} say how a teacher is learned from, and there is none; give --distill, too"
        )
    return finetune


def _need_model(options: Mapping[str, Any]) -> None:
    """A usage error if nothing says which model; a checkpoint that is a folder may."""
    if options["model"] is None and options["checkpoint"] is None:
        raise click.UsageError("Missing option '--model'.")


def _model_options(options: dict[str, Any]) -> dict[str, Any]:
    _need_model(options)
    in_chans = options.pop("in_chans")
    kwargs = parse_pairs(options.pop("model_kwargs"))
    found = {k: options.pop(k) for k in ("pretrained", "checkpoint", "num_classes")}
    chans = None if in_chans is None else int(in_chans)
    return {"name": options.pop("model"), **found, "in_chans": chans, "kwargs": kwargs, "seed": options["seed"]}


@contextlib.contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """Under ``--json``, whatever libraries print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def _finish(values: dict[str, Any], text: str, as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps(values, indent=1))
    elif not quiet:
        click.echo(text)


def _teller(as_json: bool, quiet: bool) -> Callable[[str], None]:
    return lambda line: None if quiet else click.echo(line, err=as_json)


@click.command()
@click.option("--output", default="singe_demo", show_default=True, type=click.Path(), help="Folder for the results.")
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="A few seconds' worth; the accuracies mean nothing.")
@_output
def demo(output: str, seed: int, quick: bool, as_json: bool, quiet: bool) -> None:
    """Train a small network on real digits and prune it four ways; a minute or two, offline."""
    from singe_plugin.app.demo import HONESTY, run_demo

    with _stdout_for_json(as_json):
        found = run_demo(output, seed, quick, _teller(as_json, quiet), progress=not quiet)
    files = "\n".join(f"  {path}" for path in found.files)
    text = f"\n{found.table()}\n\n{HONESTY}; {found.seconds:.0f} s\nreloaded bit for bit; files:\n{files}"
    _finish(found.as_dict(), text, as_json, quiet)


def _for(granularity: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a granularity has; a usage error if one of the other's was given."""
    context = click.get_current_context()
    mine, others = (_OF_UNITS, _OF_WEIGHTS) if granularity == "unit" else (_OF_WEIGHTS, _OF_UNITS)
    given = [name for name in others if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        flag = next(p.opts[0] for p in context.command.params if p.name == given[0])
        instead = ", ".join(p.opts[0] for p in context.command.params if p.name in mine)
        raise click.UsageError(f"{flag} is not for --granularity {granularity}, which has {instead}")
    return {name: value for name, value in options.items() if name not in others}


def _repair_of(options: dict[str, Any], repair: Repair) -> Repair | str | None:
    """How the survivors take over: decided by the run, if nothing is said."""
    if options.pop("no_repair"):
        return None
    return "auto" if repair == Repair() else repair


def _target_of(options: dict[str, Any], pace: Pace) -> str | None:
    """What to remove: nothing is said where ratios per layer say it."""
    given = click.get_current_context().get_parameter_source("target") is ParameterSource.COMMANDLINE
    target: str = options.pop("target")
    return None if target.lower() == "none" or (isinstance(pace.ratios, Mapping) and not given) else target


@click.command()
@_model
@_data
@click.option("--granularity", default="unit", show_default=True, type=click.Choice(["unit", "weight"]))
@_target
@_weights
@_ignore
@_verify
@_generated(*_OPTIONS, Repair)
@click.option("--no-repair", is_flag=True, help="Leave the layers that read what is gone as they are.")
@click.option(
    "--max-drop",
    type=float,
    help="Stop when the accuracy on the validation images, in [0, 1], has fallen by more than this after a round: the "
    "round is undone, and the survivors are repaired in every round if nothing is said of that.",
)
@click.option("--fold", is_flag=True, help="Fold batch-norm for good first, as in the paper.")
@click.option("--no-curves", is_flag=True, help="Leave the plot of gradients along the path out.")
@click.option("--output", default="singe_output", show_default=True, type=click.Path(), help="Folder for the results.")
@click.option("--resume", is_flag=True, help="Continue the unfinished run in --output.")
@_output
def prune(
    output: str, resume: bool, no_curves: bool, granularity: str, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Prune a timm model and fine-tune it on the way; save it with a report.

    Needs data: --data-dir or --dataset. Units (channels, heads) are removed; with --granularity weight, single weights
    are masked.
    """
    from singe_plugin.app.runs import run_prune
    from singe_plugin.run.guards import check_launcher

    _need_model(options)
    if options["dataset"] is None and options["data_dir"] is None:
        raise click.UsageError(NO_DATA)
    check_launcher()
    scoring, pace, finetune, distill, repair = _objects(options, *_OPTIONS, Repair)
    options = _for(granularity, options)
    with _stdout_for_json(as_json):
        model = _model_options(options)
        data = {key: options.pop(key) for key in ("dataset", "data_dir", "img_size", "batch_size", "workers")}
        data.update(download=options.pop("dataset_download"), seed=options["seed"], augment=not options.pop("no_aug"))
        if granularity == "unit":
            pace = replace(pace, verify=not options.pop("no_verify"))
            options["target"] = _target_of(options, pace)
        options |= {"scoring": scoring, "pace": pace, "finetune": _taught(finetune, distill)}
        options["repair"] = _repair_of(options, repair)
        say, curves = _teller(as_json, quiet), not no_curves
        result, values = run_prune(model, data, options, output, resume, curves, not quiet, say, granularity)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)


@click.command()
@_model
@_target
@_ignore
@_verify
@_generated(*_OPTIONS)
@_output
def inspect(as_json: bool, quiet: bool, **options: Any) -> None:
    """Show what can be pruned, what is left whole and why, and what scoring costs."""
    from singe_plugin.app.runs import run_inspect

    with _stdout_for_json(as_json):
        model = _model_options(options)
        options.pop("seed")
        scoring, pace, finetune, distill = _objects(options, *_OPTIONS)
        pace, finetune = replace(pace, verify=not options.pop("no_verify")), _taught(finetune, distill)
        asked = {"target": _target_of(options, pace), "scoring": scoring, "pace": pace, "finetune": finetune}
        size, device, ignored = (options.pop(key) for key in ("img_size", "device", "ignored_layers"))
        found, values = run_inspect(model, size, device, **asked, ignored_layers=ignored)
    text = f"{values['model']} at {values['img_size']} pixels, {values['weights']} weights\n{found.text()}"
    _finish(values, text, as_json, quiet)


@click.command()
@click.argument("directory", type=click.Path())
@_output
def report(directory: str, as_json: bool, quiet: bool) -> None:
    """Write the report of the result saved in DIRECTORY again, and print its summary."""
    from singe_plugin.app.runs import run_report

    with _stdout_for_json(as_json):
        result, values = run_report(directory)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)
