"""The report of a run: Markdown for people, JSON for programs, plots if matplotlib is there.

Numbers first: pure functions turn a result into plain data (:func:`report_data`) and the data into text
(:func:`markdown`); drawing and writing come last.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ArtifactError
from singe_plugin.files import make_folder, parse, seal, unseal, write_atomically, write_text
from singe_plugin.loop.events import History
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import path_gradient_norms
from singe_plugin.method.units import UnitGroup
from singe_plugin.run.result import Metrics, Result, latency_cells, measured_cells
from singe_plugin.tables import markdown_table

__all__ = [
    "Curves",
    "Point",
    "gradient_curves",
    "history_summary",
    "markdown",
    "read_extras",
    "report_data",
    "write_report",
]

MARKDOWN, DATA = "report.md", "report.json"
UNITS_PLOT, POINTS_PLOT, CURVES_PLOT = "units.png", "accuracy.png", "gradients.png"
FILES = (MARKDOWN, DATA, UNITS_PLOT, POINTS_PLOT, CURVES_PLOT)
NO_PLOTS = 'No plots: matplotlib is not installed (`pip install "singe_plugin[plot]"`).'


@dataclass(frozen=True)
class Point:
    """One network in the plot of accuracy against parameters removed; both are fractions."""

    method: str
    removed: float
    accuracy: float


@dataclass(frozen=True)
class Curves:
    """One panel of Figure 2: the gradient norms of some units of a layer while the layer decays.

    Attributes:
        layer: its name.
        units: which units were drawn.
        norms: per unit, the decayed norms (x axis), largest first.
        grads: per unit, the gradient norms (y axis).
    """

    layer: str
    units: tuple[int, ...]
    norms: tuple[tuple[float, ...], ...]
    grads: tuple[tuple[float, ...], ...]


def gradient_curves(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batches: Iterable[Any],
    units: int = 5,
    seed: int = 0,
    mu: float = 0.8,
    p: float = 2,
) -> list[Curves]:
    r"""The data of the paper's Figure 2: :math:`\|\nabla_{\mu^sW^n}F\|_p` against :math:`\|\mu^sW^n\|_p`.

    Args:
        model: left as it was.
        groups: the layers to draw, one panel each.
        batches: what F is evaluated on.
        units: how many random units per layer.
        seed: of the choice of units.
        mu, p: of the path and the norms; the path is walked down to 1 % of the weights.

    Example:
        >>> from singe_plugin.method.units import Producer, Slot, UnitGroup
        >>> net, rows = torch.nn.Linear(2, 3), torch.arange(3)
        >>> group = UnitGroup("net", 3, (Producer("net", (Slot(net, "weight"),), rows, rows),))
        >>> batch = (torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> [len(c.units) for c in gradient_curves(net, [group], [batch], units=2)]
        [2]
    """
    options = Scoring(criterion="ig", p=p, mu=mu, quadrature="geometric")
    batches = list(batches)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group in groups:
        norms, grads = (t.detach().cpu().double() for t in path_gradient_norms(model, group, batches, options))
        chosen = sorted(torch.randperm(group.size, generator=generator)[:units].tolist())
        curve = [tuple(tuple(t[:, n].tolist()) for n in chosen) for t in (norms, grads)]
        found.append(Curves(group.name, tuple(chosen), curve[0], curve[1]))
    return found


def history_summary(history: History) -> dict[str, Any]:
    """A run in a few numbers.

    Example:
        >>> history = History([{"event": "removed", "layer": "a", "units": [1, 2], "left": 6}])
        >>> history_summary(history)["units_removed"]
        2
    """
    scored, steps, ended = (history.select(kind) for kind in ("layer_scored", "finetune_step", "run_end"))
    return {
        "layers_pruned": len(history.select("layer_done")),
        "scorings": len(scored),
        "seconds_scoring": sum(row["seconds"] for row in scored),
        "units_removed": sum(row.get("count", len(row["units"])) for row in history.select("removed")),
        "finetune_steps": len(steps),
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "seconds": ended[-1]["seconds"] if ended else None,
    }


def report_data(result: Result) -> dict[str, Any]:
    """Everything a report says of a result, as plain values."""
    return {
        "before": asdict(result.before),
        "after": asdict(result.after),
        "removed_params": result.removed_params,
        "removed_macs": result.removed_macs,
        "sparsity": result.sparsity,
        "weight_sparsity": result.weight_sparsity,
        "layers": [asdict(row) for row in result.layers],
        "warnings": list(result.warnings),
        "left_whole": dict(result.left_whole),
        "history": history_summary(result.history),
        "options": dict(result.options),
        "versions": dict(result.versions),
        "builder": None if result.builder is None else asdict(result.builder),
    }


def markdown(
    data: Mapping[str, Any], plots: Sequence[str] = (), title: str = "SInGE pruning", intro: Sequence[str] = ()
) -> str:
    """The report as Markdown.

    Args:
        data: of :func:`report_data`.
        plots: names of the image files beside it.
        title: the first heading.
        intro: lines to put under it.
    """
    parts = [f"# {title}", *(["\n".join(intro)] if intro else [])]
    parts += ["## Before and after", markdown_table(["", "before", "after", "change"], _change_rows(data))]
    if data["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {text}" for text in data["warnings"])]
    if data["builder"]:
        parts.append(f"Architecture: `{data['builder']['name']}` {_code(data['builder']['options'])}".rstrip())
    parts += [f"![{Path(name).stem}]({name})" for name in plots]
    if not plots:
        parts.append(NO_PLOTS)
    rows = [
        (r["name"], r["block"], r["units_before"], r["units_after"], f"{1 - r['units_after'] / r['units_before']:.0%}")
        for r in data["layers"]
    ]
    kind = "units" if data["sparsity"] is None else "weights"
    parts += ["## Layers", markdown_table(["layer", "block", f"{kind} before", "after", "removed"], rows)]
    parts.append("## Left whole")
    parts.append("\n".join(f"- `{k}`: {v}" for k, v in data["left_whole"].items()) or "Nothing.")
    for heading, key in (("## The run", "history"), ("## Options", "options"), ("## Versions", "versions")):
        parts += [heading, markdown_table(["", "value"], [(k, _shown(v)) for k, v in data[key].items()])]
    return "\n\n".join(parts) + "\n"


def write_report(
    result: Result,
    directory: str | Path,
    points: Sequence[Point] = (),
    curves: Sequence[Curves] = (),
    title: str = "SInGE pruning",
    intro: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``report.md``, ``report.json`` and the plots.

    Args:
        result: what was done.
        directory: is made if need be.
        points: several networks, for the plot of accuracy against parameters removed.
        curves: of :func:`gradient_curves`, for the paper's Figure 2.
        title, intro: see :func:`markdown`.
        extra: more plain values for the JSON file.

    Returns:
        the files, the Markdown first.

    Raises:
        ArtifactError: if the folder cannot be written to.
    """
    directory = make_folder(directory)
    data = report_data(result)
    plots = _plots(data, directory, points, curves)
    text = markdown(data, plots, title, intro)
    record = {
        **data,
        "title": title,
        "intro": list(intro),
        "points": [asdict(point) for point in points],
        "curves": [asdict(curve) for curve in curves],
        **(extra or {}),
    }
    write_text(directory / MARKDOWN, text)
    write_text(directory / DATA, json.dumps(seal(record), indent=1) + "\n")
    return [directory / name for name in (MARKDOWN, DATA, *plots)]


_OWN = ("title", "intro", "points", "curves")


def read_extras(directory: str | Path) -> dict[str, Any]:
    """The arguments of :func:`write_report` that an earlier ``report.json`` holds and the result itself does not.

    Raises:
        ArtifactError: if the file is there and damaged.
    """
    path = Path(directory) / DATA
    if not path.is_file():
        return {}
    try:
        record = unseal(parse(path.read_bytes(), path), path)
        return {
            "title": record["title"],
            "intro": record["intro"],
            "points": [Point(**point) for point in record["points"]],
            "curves": [
                Curves(c["layer"], tuple(c["units"]), tuple(map(tuple, c["norms"])), tuple(map(tuple, c["grads"])))
                for c in record["curves"]
            ],
            "extra": {k: v for k, v in record.items() if k not in _OWN and k not in _RESULT_KEYS},
        }
    except (ArtifactError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({type(error).__name__}: {error}); delete it and try again") from error


_RESULT_KEYS = (
    "before", "after", "removed_params", "removed_macs", "sparsity", "weight_sparsity", "layers", "warnings",
    "left_whole", "history", "options", "versions", "builder",
)  # fmt: skip


def _change_rows(data: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    before, after = data["before"], data["after"]
    rows = []
    counts = (
        ("parameters", "params"),
        ("not masked", "nonzero"),
        ("MACs", "macs"),
        ("effective MACs", "effective_macs"),
    )
    for name, key in counts:
        if before[key] is None or after[key] is None:
            continue
        change = f"{100 * (after[key] / max(before[key], 1) - 1):+.1f} %"
        rows.append((name, f"{before[key]:,}", f"{after[key]:,}", change))
    if data["sparsity"] is not None:
        rows.append(("sparsity of the pruned layers", "", f"{data['weight_sparsity']:.2%}", ""))
        rows.append(("sparsity of all parameters", "", f"{data['sparsity']:.2%}", ""))
    if before["accuracy"] is not None and after["accuracy"] is not None:
        points = f"{100 * (after['accuracy'] - before['accuracy']):+.2f} points"
        rows.append(("top-1 accuracy", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}", points))
    rows += measured_cells(Metrics(**before), Metrics(**after))
    if before["latency_ms"] is not None and after["latency_ms"] is not None:
        rows.append(("latency (ms)", *latency_cells(Metrics(**before), Metrics(**after))))
    return rows


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(options: Mapping[str, Any]) -> str:
    return " ".join(f"`{k}={v}`" for k, v in options.items())


# -- plots --------------------------------------------------------------------------------------------------------


def _plots(data: Mapping[str, Any], directory: Path, points: Sequence[Point], curves: Sequence[Curves]) -> list[str]:
    """Draw what there is data for; the names of the files, none without matplotlib."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        return []
    drawings: list[tuple[str, tuple[float, float], Callable[[Any], None]]] = []
    if data["layers"]:
        height = max(2.5, 0.22 * len(data["layers"]) + 1)
        drawings.append((UNITS_PLOT, (7, height), lambda figure: _draw_units(figure, data["layers"])))
    if len(points) > 1:
        drawings.append((POINTS_PLOT, (6, 4), lambda figure: _draw_points(figure, points)))
    if curves:
        drawings.append((CURVES_PLOT, (5 * len(curves), 4), lambda figure: _draw_curves(figure, curves)))
    for name, size, draw in drawings:
        figure = figure_class(figsize=size, layout="constrained")  # no pyplot: its backend and state are the user's
        draw(figure)
        write_atomically(directory / name, partial(figure.savefig, dpi=120, format="png"))
    return [name for name, _, _ in drawings]


def _draw_units(figure: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.add_subplot()
    places = range(len(layers))
    axes.barh(places, [r["units_before"] for r in layers], color="#d0d7de", label="before")
    axes.barh(places, [r["units_after"] for r in layers], color="#1f6feb", height=0.5, label="after")
    axes.set_yticks(places, [r["name"] for r in layers], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("units")
    axes.set_title("Units per layer, in forward order")
    axes.legend()


def _draw_points(figure: Any, points: Sequence[Point]) -> None:
    axes = figure.add_subplot()
    shared = [p for p in points if p.removed == 0]
    for method in dict.fromkeys(p.method for p in points if p.removed):
        mine = sorted([*shared, *(p for p in points if p.method == method and p.removed)], key=lambda p: p.removed)
        axes.plot([100 * p.removed for p in mine], [100 * p.accuracy for p in mine], marker="o", label=method)
    axes.set_xlabel("parameters removed (%)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_curves(figure: Any, curves: Sequence[Curves]) -> None:
    for index, panel in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), index + 1)
        for unit, norms, grads in zip(panel.units, panel.norms, panel.grads, strict=True):
            axes.plot(norms, grads, marker=".", label=f"unit {unit}")
        axes.invert_xaxis()
        axes.set_xlabel(r"$\|\mu^s W^n\|$")
        axes.set_ylabel(r"$\|\nabla_{\mu^s W^n} F\|$")
        axes.set_title(panel.layer)
        axes.legend(fontsize=8)
