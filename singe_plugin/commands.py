"""The commands of ``singe``: their options, and what is printed of what :mod:`singe_plugin.runs` and the demo return.

Options carry timm's names where timm has them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from singe_plugin.algorithm import units_per_removal
from singe_plugin.budget import MIN_WIDTH, RATIOS
from singe_plugin.criteria import CRITERIA
from singe_plugin.datasets import NO_DATA, TORCHVISION
from singe_plugin.errors import SingeError
from singe_plugin.finetune import SCHEDULES
from singe_plugin.models import parse_pairs
from singe_plugin.objective import OBJECTIVES
from singe_plugin.path import QUADRATURES
from singe_plugin.reduction import REDUCTIONS
from singe_plugin.rounds import COURSES, ORDERS, decided, scored_on
from singe_plugin.scoring import PATHS, ScoringOptions

__all__ = ["demo", "inspect", "prune", "report"]

Command = TypeVar("Command", bound=Callable[..., Any])
_SCORING = ("criterion", "p", "mu", "steps", "quadrature", "nodes", "path", "objective", "group_reduction")


def _units_per_step(ctx: Any, param: Any, value: str | None) -> Any:
    """A number of units, a fraction of the layer, or ``layer``; anything else is a usage error."""
    if value is None:
        return None
    try:
        number: Any = value if value == "layer" else int(value) if value.isdigit() else float(value)
        units_per_removal(number, 100)
    except SingeError as error:
        raise click.BadParameter(str(error)) from error
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a number of units, a fraction or 'layer'") from error
    return number


def _one_of_or_ratios(known: Sequence[str]) -> Callable[[Any, Any, str], Any]:
    """One of some names, or ``name=ratio,name=ratio``; anything else is a usage error."""

    def read(ctx: Any, param: Any, value: str | None) -> Any:
        if value is None or value in known:
            return value
        try:
            return {name.strip(): float(ratio) for name, ratio in (part.rsplit("=", 1) for part in value.split(","))}
        except ValueError as error:
            text = f"{value!r} is neither one of {', '.join(known)} nor NAME=RATIO,NAME=RATIO"
            raise click.BadParameter(text) from error

    return read


def _stacked(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_model = _stacked(
    click.option("--model", required=True, help="timm's name of the architecture."),
    click.option("--pretrained", is_flag=True, help="Start from timm's pretrained weights."),
    click.option("--checkpoint", type=click.Path(), help="Start from the weights in this .safetensors or .pth file."),
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
    click.option("--amp", is_flag=True, help="Mixed precision in scoring too (fine-tuning on CUDA: always)."),
    click.option("--amp-dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16"])),
    click.option("--channels-last", is_flag=True, help="Channels-last memory format."),
)
_pruning = _stacked(
    click.option(
        "--target",
        default="params=0.5",
        show_default=True,
        help="What to remove: params=X, macs=X, or none: what a ratio per layer says (the default with such).",
    ),
    click.option(
        "--ratios",
        callback=_one_of_or_ratios(RATIOS),
        metavar="|".join([*RATIOS, "NAME=RATIO,..."]),
        help="How it is spread over layers; by default block, in rounds per_cost.",
    ),
    click.option(
        "--units-per-step",
        callback=_units_per_step,
        metavar="N|FRACTION|layer",
        help="How many units go between two scorings, layer after layer; by default 0.1.",
    ),
    click.option(
        "--order",
        type=click.Choice(ORDERS),
        help="All layers in rounds (default), or one after the other: Algorithm 1.",
    ),
    click.option("--rounds", type=click.IntRange(1), help="1 is one-shot; by default 4 for units, 10 for weights."),
    click.option("--schedule", default="cubic", show_default=True, type=click.Choice(list(COURSES)), help="Of rounds."),
    click.option("--round-to", type=click.IntRange(1), help="Keep multiples of this many channels."),
    click.option("--max-pruning-ratio", default=0.95, show_default=True, type=float, help="Of one layer."),
    click.option(
        "--min-width",
        default=MIN_WIDTH,
        show_default=True,
        type=click.IntRange(1),
        help="Units that a layer keeps at least.",
    ),
    click.option("--criterion", default="ig", show_default=True, type=click.Choice(list(CRITERIA))),
    click.option("-p", "--norm", "p", default=2.0, show_default=True, type=float, help="Degree of the norms."),
    click.option("--mu", default=0.9, show_default=True, type=float, help="Decay rate of the path (weights: 0.8)."),
    click.option("--steps", type=click.IntRange(0), help="S; by default down to 1 % of the weights (gauss: to zero)."),
    click.option("--quadrature", default="gauss", show_default=True, type=click.Choice(QUADRATURES)),
    click.option(
        "--nodes", type=click.IntRange(1), help="Of the gauss quadrature; by default 1 in rounds of units, else 5."
    ),
    click.option("--path", default="layer", show_default=True, type=click.Choice(PATHS), help="What decays together."),
    click.option("--objective", default="loss", show_default=True, type=click.Choice(list(OBJECTIVES))),
    click.option("--group-reduction", default="sum", show_default=True, type=click.Choice(list(REDUCTIONS))),
    click.option(
        "--scoring-batch-count",
        type=click.IntRange(1),
        help="Batches that a scoring reads; by default 4 in rounds of units, else 1.",
    ),
    click.option("--finetune-steps", default=1000, show_default=True, type=click.IntRange(0), help="In all."),
    click.option("--no-verify", is_flag=True, help="Skip the two oracles that check the groups."),
)
_SCOPES = ("global", "layer")
_weights = _stacked(
    click.option("--sparsity", type=float, help="Fraction of the weights to mask; 0.9, or what the pattern needs."),
    click.option(
        "--scope",
        default="global",
        show_default=True,
        callback=_one_of_or_ratios(_SCOPES),
        metavar="|".join([*_SCOPES, "NAME=RATIO,..."]),
        help="Weights ranked over all layers, the same sparsity for each, or its own.",
    ),
    click.option("--pattern", metavar="N:M", help="At most N of every M consecutive weights stay, e.g. 2:4."),
    click.option("--max-sparsity", default=1.0, show_default=True, type=float, help="Of one layer."),
    click.option("--ignore", "ignored_layers", multiple=True, metavar="NAME", help="Layer to leave dense; repeatable."),
)
_DECIDED = ("order", "ratios", "rounds", "units_per_step")
_OF_WEIGHTS = ("sparsity", "scope", "pattern", "max_sparsity", "ignored_layers")
_OF_UNITS = ("target", "ratios", "round_to", "max_pruning_ratio", "min_width", "group_reduction", "no_verify")
_output = _stacked(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
)


def _model_options(options: dict[str, Any]) -> dict[str, Any]:
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
    """Train a small network on real digits and prune it three ways; a minute or two, offline."""
    from singe_plugin.demo import HONESTY, run_demo

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
    if granularity == "weight" and context.get_parameter_source("mu") is not ParameterSource.COMMANDLINE:
        from singe_plugin.integrations.unstructured.arguments import PAPER_MU

        options["mu"] = PAPER_MU
    return {name: value for name, value in _decided(options).items() if name not in others}


def _decided(options: dict[str, Any]) -> dict[str, Any]:
    """Without those that the library decides; no target where ratios per layer say what goes."""
    given = click.get_current_context().get_parameter_source("target") is ParameterSource.COMMANDLINE
    if options["target"].lower() == "none" or (isinstance(options["ratios"], dict) and not given):
        options["target"] = None
    return {k: v for k, v in options.items() if not (k in (*_DECIDED, "nodes", "scoring_batch_count") and v is None)}


@click.command()
@_model
@_data
@click.option("--granularity", default="unit", show_default=True, type=click.Choice(["unit", "weight"]))
@_pruning
@_weights
@click.option("--finetune-every", default="layer", show_default=True, type=click.Choice(SCHEDULES))
@click.option("--lr", default=0.03, show_default=True, type=float, help="Of the fine-tuning.")
@click.option("--scoring-batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--fold", is_flag=True, help="Fold batch-norm for good first, as in the paper.")
@click.option("--latency", is_flag=True, help="Measure the latency too.")
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
    from singe_plugin.integrations.checks import check_launcher
    from singe_plugin.runs import run_prune

    if options["dataset"] is None and options["data_dir"] is None:
        raise click.UsageError(NO_DATA)
    check_launcher()
    options = _for(granularity, options)
    with _stdout_for_json(as_json):
        model = _model_options(options)
        data = {key: options.pop(key) for key in ("dataset", "data_dir", "img_size")}
        data.update(download=options.pop("dataset_download"), seed=options["seed"], augment=not options.pop("no_aug"))
        dtype = {"bfloat16": "bf16", "float16": "fp16"}[options.pop("amp_dtype")]
        options["amp"] = dtype if options["amp"] else None
        if granularity == "unit":
            options["verify"] = not options.pop("no_verify")
        say, curves = _teller(as_json, quiet), not no_curves
        result, values = run_prune(model, data, options, output, resume, curves, not quiet, say, granularity)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)


@click.command()
@_model
@_pruning
@_output
def inspect(as_json: bool, quiet: bool, **options: Any) -> None:
    """Show what can be pruned, what is left whole and why, and what scoring costs."""
    from singe_plugin.runs import run_inspect

    with _stdout_for_json(as_json):
        model = _model_options(options)
        options.pop("seed")
        options["verify"] = not options.pop("no_verify")
        order, *_ = decided(*(options[key] for key in _DECIDED))
        options["nodes"], _ = scored_on(order, options["nodes"], None)  # how many batches, the inspection decides
        scoring = ScoringOptions(**{key: options.pop(key) for key in _SCORING})
        found, values = run_inspect(model, options.pop("img_size"), scoring, options.pop("device"), **_decided(options))
    text = f"{values['model']} at {values['img_size']} pixels, {values['weights']} weights\n{found.text()}"
    _finish(values, text, as_json, quiet)


@click.command()
@click.argument("directory", type=click.Path())
@_output
def report(directory: str, as_json: bool, quiet: bool) -> None:
    """Write the report of the result saved in DIRECTORY again, and print its summary."""
    from singe_plugin.runs import run_report

    with _stdout_for_json(as_json):
        result, values = run_report(directory)
    files = "\n".join(f"  {path}" for path in values["files"])
    _finish(values, f"{result.summary()}\nfiles:\n{files}", as_json, quiet)
