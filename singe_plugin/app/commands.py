"""The commands of ``singe``: their options, and what is printed of what the runs and the demo return.

Options carry timm's names where timm has them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import click

from singe_plugin.app.config import config_option, config_text
from singe_plugin.app.datasets import NO_DATA, TORCHVISION
from singe_plugin.app.models import parse_pairs
from singe_plugin.app.options import (
    DATA,
    FINETUNING,
    MODEL,
    OUTPUT,
    PACE,
    REMOVAL,
    REPAIR,
    SCORING,
    Sectioned,
    generated,
    given_texts,
    is_given,
    objects,
    option,
    stacked,
)  # fmt: skip
from singe_plugin.fields import spellings
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.finetune import FineTune, Recipe
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.target import Target
from singe_plugin.loop.times import Timing
from singe_plugin.method.options import Scoring

__all__ = ["demo", "inspect", "prune", "report"]

_DEMO = [
    ("a minute or two: train, prune by 50 and 75 %, repair, fine-tune, report", "singe demo --output singe_demo"),
    ("a few seconds, to see that everything is installed", "singe demo --quick"),
    ("another seed, and the numbers alone", "singe demo --seed 1 --json > demo.json"),
]
_PRUNE = [
    (
        "half of the multiply-adds of a network that was fine-tuned on a folder of images",
        "singe prune --model resnet18 --checkpoint best.pth --data-dir images --target macs=0.5 --output out",
    ),
    (
        "no training, only the repair; stop before two points of accuracy are lost",
        "singe prune --model resnet18 --checkpoint best.pth --data-dir images --finetune-steps 0 --max-drop 0.02",
    ),
    (
        "nine of ten weights masked, and learned from the unpruned network in between",
        "singe prune --granularity weight --sparsity 0.9 --distill unpruned --model resnet18 --checkpoint best.pth "
        "--data-dir images",
    ),
]
_INSPECT = [
    ("what can be pruned of timm's architecture", "singe inspect --model resnet18"),
    ("what the paper's order would cost", "singe inspect --model resnet18 --order layers --criterion ig"),
    ("for a program to read", "singe inspect --model vit_tiny_patch16_224 --target params=0.3 --json"),
]
_REPORT = [
    ("write report.md and the plots again", "singe report out"),
    ("what is in a folder, as JSON", "singe report out --json"),
    ("write it again, and say nothing", "singe report out --quiet"),
]
_OPTIONS = (Scoring, Pace, FineTune, Recipe, Distill)

_model = stacked(
    option(MODEL, "--model", help="timm's name of the architecture, hf-hub:OWNER/NAME or local-dir:FOLDER."),
    option(MODEL, "--pretrained", is_flag=True, help="Start from timm's pretrained weights."),
    option(
        MODEL,
        "--checkpoint",
        type=click.Path(),
        help="Weights (.safetensors, .pth), or a folder of singe prune to go on from.",
    ),
    option(MODEL, "--num-classes", type=click.IntRange(1), help="Classes; by default the weights' or the data's."),
    option(
        MODEL,
        "--in-chans",
        type=click.Choice(["1", "3"]),
        help="Of the images; by default the weights' or the model's.",
    ),
    option(MODEL, "--model-kwargs", multiple=True, metavar="KEY=VALUE", help="More for timm.create_model; repeatable."),
    option(MODEL, "--img-size", type=click.IntRange(1), help="Image size; by default the model's (digits: 32)."),
    option(MODEL, "--device", help="cpu, cuda, ...; by default CUDA when there is one (inspect: cpu)."),
    option(MODEL, "--seed", default=0, show_default=True, help="Of everything random."),
)
_data = stacked(
    option(DATA, "--dataset", help=f"digits, folder, {', '.join(TORCHVISION)}, hfds/NAME; default: folder."),
    option(DATA, "--data-dir", type=click.Path(), help="Folder of images (train/ and val/ in it, or classes)."),
    option(DATA, "--dataset-download", is_flag=True, help="Let the dataset be downloaded."),
    option(DATA, "--no-aug", is_flag=True, help="No training augmentation."),
    option(DATA, "-b", "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Of fine-tuning."),
    option(DATA, "-j", "--workers", default=0, show_default=True, type=click.IntRange(0), help="Loader processes."),
)
_target = option(
    REMOVAL,
    "--target",
    default="macs=0.5",
    show_default=True,
    help="What to remove: macs=X, params=X, latency=X, or several with commas, which are all met; or none: what a "
    "ratio per layer says (the default with such).",
)
_verify = option(PACE, "--no-verify", is_flag=True, help="Skip the oracles that prove the groups.")
_ignore = option(
    REMOVAL, "--ignore", "ignored_layers", multiple=True, metavar="NAME", help="Leave it whole; repeatable."
)
_weights = stacked(
    option(REMOVAL, "--sparsity", type=float, help="Fraction of the weights to mask; 0.9, or what the pattern needs."),
    option(REMOVAL, "--pattern", metavar="N:M", help="At most N of every M consecutive weights stay, e.g. 2:4."),
)
_OF_WEIGHTS = ("sparsity", "pattern")
_OF_UNITS = ("target", "no_verify")
_output = stacked(
    option(OUTPUT, "--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on stdout."),
    option(OUTPUT, "-q", "--quiet", is_flag=True, help="Print errors only."),
)


def _taught(finetune: FineTune, recipe: Recipe, distill: Distill) -> FineTune:
    """The fine-tuning with its recipe, which learns from its teacher as is said; a usage error if it has none."""
    if recipe != Recipe():
        finetune = replace(finetune, recipe=recipe)
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


@click.command(cls=Sectioned, examples=_DEMO)
@option(OUTPUT, "--output", default="singe_demo", show_default=True, type=click.Path(), help="Folder for the results.")
@option(MODEL, "--seed", default=0, show_default=True, help="Of everything random.")
@option(FINETUNING, "--quick", is_flag=True, help="A few seconds' worth; the accuracies mean nothing.")
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
    given = [name for name in others if is_given(name, context)]
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


def _target_of(options: dict[str, Any], pace: Pace, timing: Timing) -> Target | None:
    """What to remove: nothing is said where ratios per layer say it."""
    target: str = options.pop("target")
    if target.lower() == "none" or (isinstance(pace.ratios, Mapping) and not is_given("target")):
        return None
    return Target.parse(target, None if timing == Timing() else timing)


@click.command(cls=Sectioned, examples=_PRUNE)
@_model
@_data
@option(
    REMOVAL, "--granularity", default="unit", show_default=True, type=click.Choice(["unit", "weight"]),
    help="Whether units (channels, heads) are removed or single weights masked.",
)  # fmt: skip
@_target
@_weights
@_ignore
@_verify
@generated(*_OPTIONS, Repair, Timing)
@option(REPAIR, "--no-repair", is_flag=True, help="Leave the layers that read what is gone as they are.")
@option(
    FINETUNING, "--model-ema", is_flag=True,
    help="End with the moving average of the weights over the fine-tuning: --model-ema-decay 0.998 in short.",
)  # fmt: skip
@option(
    REMOVAL,
    "--max-drop",
    type=float,
    help="Stop when the accuracy on the validation images, in [0, 1], has fallen by more than this after a round: the "
    "round is undone, and the survivors are repaired in every round if nothing is said of that.",
)
@option(SCORING, "--fold", is_flag=True, help="Fold batch-norm for good first, as in the paper.")
@option(OUTPUT, "--no-curves", is_flag=True, help="Leave the plot of gradients along the path out.")
@option(
    OUTPUT, "--output", default="singe_output", show_default=True, type=click.Path(), help="Folder for the results."
)
@option(
    OUTPUT, "--log", multiple=True, type=click.Choice(["tensorboard", "wandb"]),
    help="Log losses, rates, what is left and what is measured there, too (into --output); repeatable.",
)  # fmt: skip
@option(OUTPUT, "--resume", is_flag=True, help="Continue the unfinished run in --output.")
@config_option()
@_output
def prune(
    output: str,
    resume: bool,
    no_curves: bool,
    granularity: str,
    log: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Prune a timm model and fine-tune it on the way; save it with a report.

    Needs data: --data-dir or --dataset. Units (channels, heads) are removed; with --granularity weight, single weights
    are masked.
    """
    from singe_plugin.app.runs import Extras, run_prune
    from singe_plugin.ranks import current, together
    from singe_plugin.run.guards import check_launcher

    _need_model(options)
    if options["dataset"] is None and options["data_dir"] is None:
        raise click.UsageError(NO_DATA)
    average = options.pop("model_ema")
    scoring, pace, finetune, recipe, distill, repair, timing = objects(options, *_OPTIONS, Repair, Timing)
    if average and recipe.ema_decay is None:
        recipe = replace(recipe, ema_decay=0.998)
    options = _for(granularity, options)
    with _stdout_for_json(as_json), together() if granularity == "unit" else contextlib.nullcontext():
        check_launcher()
        quiet, as_json = quiet or not current().main, as_json and current().main
        model = _model_options(options)
        data = {key: options.pop(key) for key in ("dataset", "data_dir", "img_size", "batch_size", "workers")}
        data.update(download=options.pop("dataset_download"), seed=options["seed"], augment=not options.pop("no_aug"))
        if granularity == "unit":
            pace = replace(pace, verify=not options.pop("no_verify"))
            options["target"] = _target_of(options, pace, timing)
        elif timing != Timing():
            raise click.UsageError("--latency-... is not for --granularity weight, whose masks change no latency")
        options |= {"scoring": scoring, "pace": pace, "finetune": _taught(finetune, recipe, distill)}
        options["repair"] = _repair_of(options, repair)
        context = click.get_current_context()
        extras = Extras(config_text(context), log, given_texts(context), curves=not no_curves, progress=not quiet)
        result, values = run_prune(model, data, options, output, resume, _teller(as_json, quiet), granularity, extras)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)


@click.command(cls=Sectioned, examples=_INSPECT)
@_model
@_target
@_ignore
@_verify
@generated(*_OPTIONS, Timing)
@config_option()
@_output
def inspect(as_json: bool, quiet: bool, **options: Any) -> None:
    """Show what can be pruned, what is left whole and why, and what scoring costs."""
    from singe_plugin.app.runs import run_inspect

    with _stdout_for_json(as_json):
        model = _model_options(options)
        options.pop("seed")
        scoring, pace, finetune, recipe, distill, timing = objects(options, *_OPTIONS, Timing)
        pace, finetune = replace(pace, verify=not options.pop("no_verify")), _taught(finetune, recipe, distill)
        asked = {"target": _target_of(options, pace, timing), "scoring": scoring, "pace": pace, "finetune": finetune}
        size, device, ignored = (options.pop(key) for key in ("img_size", "device", "ignored_layers"))
        found, values = run_inspect(model, size, device, **asked, ignored_layers=ignored)
    read = "".join(f", {end}={size} as these have" for end, size in values["from_checkpoint"].items())
    text = f"{values['model']} at {values['img_size']} pixels, {values['weights']} weights{read}\n{found.text()}"
    _finish(values, text, as_json, quiet)


@click.command(cls=Sectioned, examples=_REPORT)
@click.argument("directory", type=click.Path())
@_output
def report(directory: str, as_json: bool, quiet: bool) -> None:
    """Write the report of the result saved in DIRECTORY again, and print its summary."""
    from singe_plugin.app.runs import run_report

    with _stdout_for_json(as_json):
        result, values = run_report(directory)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)


# for commands that are written elsewhere
with_model, with_data, with_ignored, with_verify, with_output = _model, _data, _ignore, _verify, _output
with_fields, fields_given, model_given = generated, objects, _model_options
only_json, finish, teller = _stdout_for_json, _finish, _teller
