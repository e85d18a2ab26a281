"""``singe export``: the model of a saved result as a file that runs elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import torch

from singe_plugin.app.datasets import data_config, load_splits
from singe_plugin.app.options import Sectioned
from singe_plugin.errors import ConfigError
from singe_plugin.run.artifact import load
from singe_plugin.run.export import Exported
from singe_plugin.run.formats import FORMATS
from singe_plugin.run.inputs import describe_inputs
from singe_plugin.run.result import Result

__all__ = ["export", "run_export"]

_REAL = 5  # images that the file is compared on
_EXAMPLES = [
    ("ONNX, for any number of images, compared in ONNX Runtime", "singe export out"),
    (
        "a program that torch.export.load runs anywhere, in half precision",
        "singe export out --format torch-export --half",
    ),
    ("compared on real images, too", "singe export out --output net.onnx --data-dir images"),
]


def run_export(
    directory: str | Path,
    output: str | Path | None = None,
    format: str = "onnx",
    *,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    img_size: int | None = None,
    trust: bool = False,
    **options: Any,
) -> Exported:
    """Load a saved result, and export its model.

    Args:
        directory: where the result was saved.
        output: the file; None is ``model`` with the format's ending in that folder.
        format: of the file.
        dataset, data_dir: real images to compare on, see :func:`~singe_plugin.app.datasets.load_splits`.
        img_size: another size than the model was pruned at.
        trust: see :func:`singe_plugin.load`.
        options: more of :func:`singe_plugin.export`.

    Raises:
        ArtifactError: if the folder holds no result, or the file is not what the model is.
        ConfigError: if it is not known what the model is called with.
    """
    result = load(directory, trust=trust)
    path = Path(directory) / f"model{FORMATS[format].suffixes[0]}" if output is None else Path(output)
    size = _size_of(result) if img_size is None else img_size
    if img_size is not None or (result.inputs is None and size is not None):
        config = data_config(result.model, size)
        result.inputs = describe_inputs(torch.zeros(2, config.channels, config.size, config.size))
    if result.inputs is None:
        raise ConfigError(f"{directory} does not say what its model is called with; give --img-size")
    real = None
    if dataset is not None or data_dir is not None:
        images = load_splits(data_config(result.model, size), dataset, data_dir, augment=False).val
        real = torch.stack([images[i][0] for i in range(min(_REAL, len(images)))])  # type: ignore[arg-type]
    return result.export(path, format, example_inputs=real, **options)


def _size_of(result: Result) -> int | None:
    """The size of the images that a model takes, if images are what it takes."""
    shape = (result.inputs or {}).get("tensor", [])
    return int(shape[-1]) if len(shape) == 4 else None


@click.command(cls=Sectioned, examples=_EXAMPLES)
@click.argument("directory", type=click.Path())
@click.option("--format", default="onnx", show_default=True, type=click.Choice(list(FORMATS)), help="Of the file.")
@click.option("--output", type=click.Path(), help="The file; by default model.onnx (.pt2, .pt) in DIRECTORY.")
@click.option("--opset", type=click.IntRange(1), help="Version of ONNX's operators; by default the exporter's.")
@click.option("--half", is_flag=True, help="Half precision; what it costs is measured.")
@click.option("--batch-size", type=click.IntRange(1), help="The one number of images it takes; by default any.")
@click.option("--tolerance", type=float, help="Difference allowed, of the largest output; 1e-4, with --half 2e-2.")
@click.option("--img-size", type=click.IntRange(1), help="Image size; by default the one that was pruned at.")
@click.option("--dataset", help="Compare on real images, too: as for singe prune.")
@click.option("--data-dir", type=click.Path(), help="Folder of real images: as for singe prune.")
@click.option("--trust", is_flag=True, help="Build the architecture by whatever the folder names; only if it is yours.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else, on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def export(directory: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write the model saved in DIRECTORY as ONNX, a torch.export program or TorchScript, and compare it."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        done = run_export(directory, **options)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(done), "path": str(done.path)}, indent=1))
    elif not quiet:
        click.echo(str(done))
