"""``singe sensitivity``: the command, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from singe_plugin.app.cli import typed_command
from singe_plugin.app.commands import (
    fields_given,
    finish,
    model_given,
    only_json,
    teller,
    with_data,
    with_fields,
    with_ignored,
    with_model,
    with_output,
    with_verify,
)
from singe_plugin.app.options import DATA, OUTPUT, REMOVAL, REPAIR, Sectioned, option
from singe_plugin.app.page import missing_for_pages, sensitivity_page
from singe_plugin.app.report import SENSITIVITY
from singe_plugin.app.runs import RANDOM, prepare
from singe_plugin.errors import ArtifactError
from singe_plugin.files import locked, write_text
from singe_plugin.integrations.sensitivity import RATIOS
from singe_plugin.integrations.sensitivity import sensitivity as measure_sensitivity
from singe_plugin.loop.repair import Repair
from singe_plugin.method.options import Scoring
from singe_plugin.run.sensitivity import Sensitivity, SensitivityPoint

__all__ = ["run_sensitivity", "sensitivity"]

PAGE = "sensitivity.html"
_EXAMPLES = [
    (
        "what each layer of a network that was fine-tuned on a folder of images can lose",
        "singe sensitivity --model resnet18 --checkpoint best.pth --data-dir images --output out",
    ),
    (
        "the same with the survivors repaired, at three ratios",
        "singe sensitivity --model resnet18 --checkpoint best.pth --data-dir images --ratios 0.25,0.5,0.75 "
        "--repair-images 512",
    ),
    (
        "the ratios that cost at most two points each, for singe prune --ratios",
        "singe sensitivity --model resnet18 --checkpoint best.pth --data-dir images --max-drop 0.02 --json",
    ),
]


def run_sensitivity(
    model_options: Mapping[str, Any],
    data_options: Mapping[str, Any],
    output: str | Path,
    images: int,
    resume: bool,
    progress: bool,
    say: Callable[[str], None],
    **options: Any,
) -> tuple[Sensitivity, list[Path]]:
    """Measure the sensitivity of a timm model; write every point when it is there, and the page in the end.

    Args:
        model_options, data_options: as :func:`~singe_plugin.app.runs.prepare` takes them.
        output: the folder for ``sensitivity.json`` and ``sensitivity.html``.
        images: how many of the validation images the network is judged on, drawn at random.
        resume: go on with what is in the folder.
        progress: show a bar.
        say: gets one line of text at a time.
        options: further arguments of :func:`singe_plugin.sensitivity`.

    Returns:
        the curves, and the files.

    Raises:
        ArtifactError: if the folder holds an unfinished run and ``resume`` is false.
    """
    output = Path(output)
    path = output / SENSITIVITY
    with locked(output):
        if not resume and path.is_file() and not Sensitivity.load(path).finished:
            raise ArtifactError(
                f"{path} is unfinished; give --resume to continue it, or another --output, or delete it"
            )
        named, _, splits = prepare(model_options, data_options)
        if named.weights == "random":
            say(f"note: {RANDOM}")
        judged = _some(splits.val, images, options["seed"])
        say(f"judged on {len(judged)} validation images of {splits.name}")  # type: ignore[arg-type]
        bar = tqdm(total=None, unit="point", dynamic_ncols=True, desc="sensitivity", disable=not progress)
        try:
            found = measure_sensitivity(
                named.model, splits.train, val_data=judged, path=path, resume=resume, on_point=partial(_show, bar),
                **options,
            )  # fmt: skip
        finally:
            bar.close()
        files = [path]
        missing = missing_for_pages()
        if missing:
            say(f"note: there is no {output / PAGE}: pip install {' '.join(missing)}")
        else:
            write_text(output / PAGE, sensitivity_page(found.as_dict(), typed_command()))
            files.append(output / PAGE)
    return found, files


def _some(data: Dataset[Any], count: int, seed: int) -> Dataset[Any]:
    """At most as many examples, drawn at random."""
    size = len(data)  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(data, sorted(order.tolist())) if count < size else data


def _show(bar: Any, layer: str, point: SensitivityPoint, done: int, total: int) -> None:
    bar.total = total
    bar.set_postfix({"layer": layer, "gone": f"{point.ratio:.0%}"}, refresh=False)
    bar.update(done - bar.n)


def _fractions(context: Any, param: Any, value: str | None) -> tuple[float, ...]:
    try:
        return RATIOS if value is None else tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of fractions like 0.25,0.5,0.75") from error


@click.command(cls=Sectioned, examples=_EXAMPLES)
@with_model
@with_data
@with_ignored
@with_verify
@with_fields(Scoring)
@option(
    REMOVAL, "--ratios", callback=_fractions, metavar="R,R,...", help="Fractions of a layer's units; 0.1,0.2,...,0.9."
)
@option(REPAIR, "--repair-images", type=click.IntRange(2), help="Solve the readers again each time, on these.")
@option(DATA, "--images", default=1024, show_default=True, type=click.IntRange(1), help="Of the validation data.")
@option(
    OUTPUT, "--max-drop", default=0.01, show_default=True, type=click.FloatRange(0),
    help="What a printed ratio may cost.",
)  # fmt: skip
@option(OUTPUT, "--measure", type=click.Choice(["accuracy", "loss"]), help="What --max-drop is of; accuracy.")
@option(OUTPUT, "--output", default="singe_output", show_default=True, type=click.Path(), help="Folder for it.")
@option(OUTPUT, "--resume", is_flag=True, help="Continue the unfinished run in --output.")
@with_output
def sensitivity(
    output: str, resume: bool, max_drop: float, measure: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Measure what every layer alone can lose: loss and accuracy without 10 to 90 % of its units."""
    with only_json(as_json):
        model = model_given(options)
        data = {key: options.pop(key) for key in ("dataset", "data_dir", "img_size", "batch_size", "workers")}
        data.update(download=options.pop("dataset_download"), seed=options["seed"], augment=not options.pop("no_aug"))
        (scoring,) = fields_given(options, Scoring)
        images = options.pop("repair_images")
        found, files = run_sensitivity(
            model, data, output, options.pop("images"), resume, not quiet, teller(as_json, quiet),
            scoring=scoring, repair=None if images is None else Repair(images), verify=not options.pop("no_verify"),
            **options,
        )  # fmt: skip
        kept = found.ratios(max_drop, measure)
    name = found.measure(measure)
    listed = ",".join(f"{layer}={ratio:g}" for layer, ratio in kept.items())
    text = f"{name}, when units of one layer are removed\n{found.table(measure)}\n\n"
    text += f"each costs at most {max_drop:g} of {name}: --ratios {listed}\nfiles:\n" + "\n".join(
        f"  {f}" for f in files
    )
    finish({**found.as_dict(), "ratios": kept, "files": [str(f) for f in files]}, text, as_json, quiet)
