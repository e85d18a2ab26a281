"""The report of a run: a page and Markdown for people, JSON for programs, plots if matplotlib is there.

Numbers first: pure functions turn a result into plain data (:func:`report_data`), and the data into Markdown
(:func:`markdown`) and a page (:mod:`singe_plugin.app.page`); drawing and writing come last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from singe_plugin.app.curves import Curves, history_summary, run_curves
from singe_plugin.app.page import missing_for_pages, report_page
from singe_plugin.app.plots import PLOTS, Point, draw_plots
from singe_plugin.errors import ArtifactError
from singe_plugin.files import make_folder, parse, seal, unseal, write_text
from singe_plugin.run.result import Result, latency_cells, measured_cells
from singe_plugin.run.sensitivity import Sensitivity
from singe_plugin.tables import markdown_table

__all__ = ["FILES", "Table", "markdown", "read_extras", "report_data", "write_report"]

MARKDOWN, PAGE, DATA = "report.md", "report.html", "report.json"
SENSITIVITY = "sensitivity.json"
FILES = (MARKDOWN, PAGE, DATA, *PLOTS)
NO_PLOTS = "No plots: matplotlib is not installed (`pip install matplotlib`)."
_logger = logging.getLogger("singe_plugin")


@dataclass(frozen=True)
class Table:
    """A table of whoever made the report; its cells are text, the first of a row names it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def report_data(result: Result) -> dict[str, Any]:
    """Everything a report says of a result, as plain values."""
    before, after = asdict(result.before), asdict(result.after)
    return {
        "before": before,
        "after": after,
        "changes": _change_rows(result),
        "removed_params": result.removed_params,
        "removed_macs": result.removed_macs,
        "sparsity": result.sparsity,
        "weight_sparsity": result.weight_sparsity,
        "layers": [asdict(row) for row in result.layers],
        "warnings": list(result.warnings),
        "left_whole": dict(result.left_whole),
        "stopped": result.stopped,
        "history": history_summary(result.history),
        "run": run_curves(result.history),
        "options": dict(result.options),
        "versions": dict(result.versions),
        "builder": None if result.builder is None else asdict(result.builder),
    }


def markdown(
    data: Mapping[str, Any],
    plots: Sequence[str] = (),
    title: str = "SInGE pruning",
    intro: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> str:
    """The report as Markdown.

    Args:
        data: of :func:`report_data`.
        plots: names of the image files beside it.
        title: the first heading.
        intro: lines to put under it.
        tables: to put under these.
    """
    parts = [f"# {title}", *(["\n".join(intro)] if intro else [])]
    for table in tables:
        parts += [f"## {table.title}", markdown_table(table.header, table.rows)]
    parts += ["## Before and after", markdown_table(["", "before", "after", "change"], data["changes"])]
    if conditions := data["after"].get("latency_conditions"):
        parts.append(
            f"Latency: {conditions}; medians of passes in turn, with half of the distance between the quartiles; "
            "the change is the median of the pairs of passes."
        )
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
    tables: Sequence[Table] = (),
    extra: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``report.json`` and the plots.

    The page has the curves of a ``sensitivity.json`` that lies in the folder. Where what draws it is not installed,
    it is left out, and the log says what to install.

    Args:
        result: what was done.
        directory: is made if need be.
        points: several networks, for the plot of accuracy against parameters removed.
        curves: of :func:`~singe_plugin.app.curves.gradient_curves`, for the paper's Figure 2.
        title, intro, tables: see :func:`markdown`.
        extra: more plain values for the JSON file.

    Returns:
        the files, the Markdown first.

    Raises:
        ArtifactError: if the folder cannot be written to, or the curves in it are damaged.
    """
    directory = make_folder(directory)
    data = report_data(result)
    record = {
        **data,
        "title": title,
        "intro": list(intro),
        "tables": [asdict(table) for table in tables],
        "points": [asdict(point) for point in points],
        "curves": [asdict(curve) for curve in curves],
        **(extra or {}),
    }
    plots = draw_plots(data["layers"], directory, points, curves)
    write_text(directory / MARKDOWN, markdown(data, plots, title, intro, tables))
    write_text(directory / DATA, json.dumps(seal(record), indent=1) + "\n")
    missing = missing_for_pages()
    if missing:
        _logger.warning("there is no %s: pip install %s", directory / PAGE, " ".join(missing))
    else:
        beside = directory / SENSITIVITY
        found = Sensitivity.load(beside).as_dict() if beside.is_file() else None
        write_text(directory / PAGE, report_page(record, found))
    return [directory / name for name in (MARKDOWN, *(() if missing else (PAGE,)), DATA, *plots)]


_OWN = ("title", "intro", "tables", "points", "curves")


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
            "tables": [
                Table(t["title"], tuple(t["header"]), tuple(map(tuple, t["rows"]))) for t in record.get("tables", [])
            ],
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
    "before", "after", "changes", "removed_params", "removed_macs", "sparsity", "weight_sparsity", "layers", "warnings",
    "left_whole", "stopped", "history", "run", "options", "versions", "builder",
)  # fmt: skip


def _change_rows(result: Result) -> list[list[str]]:
    """The table before/after, as text."""
    before, after = result.before, result.after
    rows: list[tuple[str, str, str, str]] = []
    counts = (
        ("parameters", before.params, after.params, "{:,}".format),
        ("not masked", before.nonzero, after.nonzero, "{:,}".format),
        ("MACs", before.macs, after.macs, "{:,}".format),
        ("effective MACs", before.effective_macs, after.effective_macs, "{:,}".format),
        ("file size", before.size_bytes, after.size_bytes, size_text),
    )
    for name, old, new, form in counts:
        if old is not None and new is not None:
            rows.append((name, form(old), form(new), f"{100 * (new / max(old, 1) - 1):+.1f} %"))
    if result.sparsity is not None:
        rows.append(("sparsity of the pruned layers", "", f"{result.weight_sparsity:.2%}", ""))
        rows.append(("sparsity of all parameters", "", f"{result.sparsity:.2%}", ""))
    if before.accuracy is not None and after.accuracy is not None:
        points = f"{100 * (after.accuracy - before.accuracy):+.2f} points"
        rows.append(("top-1 accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", points))
    rows += measured_cells(before, after)
    if before.latency_ms is not None and after.latency_ms is not None:
        rows.append(("latency (ms)", *latency_cells(before, after)))
    return [list(row) for row in rows]


def size_text(size: int) -> str:
    """A number of bytes, in decimal units.

    Example:
        >>> size_text(999), size_text(936_360), size_text(44_700_000)
        ('999 B', '936.4 kB', '44.7 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(options: Mapping[str, Any]) -> str:
    return " ".join(f"`{k}={v}`" for k, v in options.items())
