"""``report.html`` and ``sensitivity.html``: one file each that opens anywhere, with nothing to load and no script.

What they say is what is in ``report.json`` and ``sensitivity.json``; here it is only put into words, charts
(:mod:`singe_plugin.app.charts`) and the templates, which escape every value.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from singe_plugin.app.charts import Chart, Ink, bars, lines, short, spread, steps
from singe_plugin.errors import MissingPackageError
from singe_plugin.run.sensitivity import shown

__all__ = ["missing_for_pages", "report_page", "sensitivity_page"]

PACKAGES = ("jinja2", "matplotlib")
MINUS = "\N{MINUS SIGN}"
SMALL = 0.002
"""The share of all parameters or multiply-adds from which on a layer has a bar of its own."""
Plain = Mapping[str, Any]


def missing_for_pages() -> list[str]:
    """What a page needs and is not installed."""
    missing = []
    for package in PACKAGES:
        try:
            importlib.import_module(package if package == "jinja2" else f"{package}.figure")
        except ImportError:
            missing.append(package)
    return missing


def report_page(record: Plain, sensitivity: Plain | None = None) -> str:
    """The report as a page.

    Args:
        record: what ``report.json`` has.
        sensitivity: what ``sensitivity.json`` has, if there is one.

    Raises:
        MissingPackageError: without jinja2 or matplotlib.
    """
    _check_packages()
    weights = record["sparsity"] is not None
    return _filled(
        "report.html",
        record=record,
        kind="weights" if weights else "units",
        gained=_gained(record),
        lost=_lost(record),
        changes=[[row[0], *(cell.replace("-", MINUS) for cell in row[1:])] for row in record["changes"]],
        tiles=_tiles(record["changes"]),
        small=f"{SMALL:.1%}",
        layers=_layer_rows(record),
        parts=_part_rows(record),
        left_whole=_by_reason(record["left_whole"]),
        charts=_charts(record),
        options=_flat(record["options"]),
        curves=None if sensitivity is None else _curves(sensitivity),
    )


def sensitivity_page(record: Plain, command: str | None = None) -> str:
    """The sensitivity curves as a page of their own.

    Args:
        record: what ``sensitivity.json`` has.
        command: what made it.

    Raises:
        MissingPackageError: without jinja2 or matplotlib.
    """
    _check_packages()
    return _filled(
        "sensitivity.html",
        record=record,
        command=command,
        curves=_curves(record),
        left_whole=_by_reason(record["left_whole"]),
        options=_flat(record["options"]),
    )


def _check_packages() -> None:
    missing = missing_for_pages()
    if missing:
        raise MissingPackageError(f"a page needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _filled(template: str, **values: Any) -> str:
    jinja2 = importlib.import_module("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("singe_plugin.app", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return str(environment.get_template(template).render(values))


# -- in words -----------------------------------------------------------------------------------------------------


def _gained(record: Plain) -> str:
    """What was gained, as a headline."""
    before, after = record["before"], record["after"]
    if record["sparsity"] is not None:
        return f"{record['weight_sparsity']:.1%} of the pruned layers' weights are masked"
    shares = [
        (1 - after[key] / before[key], name)
        for key, name in (("macs", "multiply-adds"), ("params", "parameters"))
        if before[key]
    ]
    words = [f"{abs(share):.1%} {'fewer' if share >= 0 else 'more'} {name}" for share, name in sorted(shares)[::-1]]
    return " and ".join(words).replace("%", "\N{NO-BREAK SPACE}%")


def _lost(record: Plain) -> str:
    """What was lost, or that nobody knows."""
    before, after = record["before"], record["after"]
    if before["accuracy"] is not None and after["accuracy"] is not None:
        points = 100 * (after["accuracy"] - before["accuracy"])
        went = f"{points:+.2f} points".replace("-", MINUS)
        return f"top-1 accuracy {before['accuracy']:.2%} → {after['accuracy']:.2%} ({went})"
    for name, old in before["measured"].items():
        new = after["measured"].get(name)
        if old is not None and new is not None:
            return f"{name} {old:.4g} → {new:.4g} ({new - old:+.4g})".replace("-", MINUS)
    return "what was lost was not measured: give val_data"


_TILES = ("MACs", "parameters", "file size", "latency (ms)", "top-1 accuracy")


def _tiles(changes: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The most important rows of the table before/after."""
    known = {row[0]: row for row in changes}
    counts = ("not masked", "effective MACs", "sparsity of the pruned layers", "sparsity of all parameters")
    own = [name for name in known if name not in (*_TILES, *counts)]
    return [
        {"name": name, "before": known[name][1], "after": known[name][2], "change": known[name][3].replace("-", MINUS)}
        for name in (*_TILES, *own[:3])
        if name in known
    ]


def _percent(before: float, after: float) -> str:
    if before == after:
        return "0 %"
    return "" if not before else f"{100 * (after / before - 1):+.1f} %".replace("-", MINUS)


def _layer_rows(record: Plain) -> list[dict[str, Any]]:
    """A row for every group of layers, with the length of its bars."""
    costs = [record[when].get("by_layer", {}) for when in ("before", "after")]
    found = []
    for row in record["layers"]:
        before, after = row["units_before"], row["units_after"]
        params, macs = ([c[row["name"]][i] if row["name"] in c else None for c in costs] for i in (0, 1))
        found.append(
            {
                **row,
                "change": _percent(before, after),
                "params": params,
                "macs": macs,
                "share": 100 * after / max(before, 1),
            }
        )
    return found


def _part_rows(record: Plain) -> list[dict[str, Any]]:
    """A row for every module that has parameters or MACs of its own."""
    before, after = (record[when].get("by_layer", {}) for when in ("before", "after"))
    rows = []
    for name, (params, macs) in before.items():
        params_left, macs_left = after.get(name, (0, 0))
        rows.append(
            {
                "name": name or "the model itself", "params": params, "params_left": params_left, "macs": macs,
                "macs_left": macs_left, "params_change": _percent(params, params_left),
                "macs_change": _percent(macs, macs_left),
            }
        )  # fmt: skip
    return rows


def _by_reason(left_whole: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """The names of what stayed whole, by the reason for it."""
    found: dict[str, list[str]] = {}
    for name, reason in left_whole.items():
        found.setdefault(reason, []).append(name)
    return list(found.items())


def _flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Options as rows, those inside of others with both names."""
    rows = []
    for key, value in options.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:g}" if isinstance(value, float) else str(value)))
    return rows


# -- charts -------------------------------------------------------------------------------------------------------


def _charts(record: Plain) -> dict[str, Chart]:
    """What there is to draw, by the name that the template has for it."""
    weights = record["sparsity"] is not None
    kind, run, found = ("weights" if weights else "units"), record["run"], dict[str, Chart]()
    if record["layers"]:
        rows = [
            (row["name"], row["units_before"], row["units_after"], _layer_tip(row, kind)) for row in _layer_rows(record)
        ]
        found["widths"] = spread(f"{kind} of every layer before and after", partial(bars, rows=rows, what=kind), 3.2)
    for key, what in (("params", "parameters"), ("macs", "multiply-adds")):
        parts = _part_rows(record)
        least = SMALL * sum(part[key] for part in parts)
        drawn = [(p["name"], p[key], p[f"{key}_left"], _part_tip(p, key, what)) for p in parts if p[key] > least]
        if drawn:
            found[key] = spread(f"{what} of every layer before and after", partial(bars, rows=drawn, what=what), 3.0)
    if run["losses"]:
        windows = [(w["first"], w["last"], w["loss"]) for w in run["losses"]]
        marks = {m["step"]: f"{m['units']:,} {kind} of {m['layers']} layers removed" for m in run["removals"]}
        found["loss"] = spread(
            "the training loss over the fine-tuning",
            partial(steps, windows=windows, marks=marks, x_label="fine-tuning step", y_label="loss"),
        )
    for name in dict.fromkeys(name for r in run["rounds"] for name in r["values"]):
        judged = [(number, r["values"][name]) for number, r in enumerate(run["rounds"], 1) if name in r["values"]]
        start = record["before"]["accuracy"] if name == "accuracy" else record["before"]["measured"].get(name)
        judged = ([] if start is None else [(0, start)]) + judged
        found[f"judged {name}"] = spread(f"{name} after every round", partial(_judged, values=judged, name=name))
    if len(record["points"]) > 1:
        found["points"] = spread("accuracy against parameters removed", lambda ink: _points(ink, record["points"]), 3.4)
    return found


def _layer_tip(row: Plain, kind: str) -> str:
    text = f"{row['name']}\n{kind} {row['units_before']:,} → {row['units_after']:,} ({row['change']})"
    for key, name in (("params", "parameters"), ("macs", "MACs")):
        before, after = row[key]
        if before is not None and after is not None:
            text += f"\n{name} {before:,} → {after:,}"
    return text


def _part_tip(part: Plain, key: str, what: str) -> str:
    return f"{part['name']}\n{what} {part[key]:,} → {part[f'{key}_left']:,} ({part[f'{key}_change']})"


def _judged(ink: Ink, values: Sequence[tuple[int, float]], name: str) -> None:
    text = "\n".join(f"{'before' if not number else f'round {number}'}: {value:.4g}" for number, value in values)
    lines(ink, [(name, [v[0] for v in values], [v[1] for v in values], text)], "round", name)
    shown_numbers = [v[0] for v in values][:: max(1, len(values) // 12)]
    ink.axes.set_xticks(shown_numbers, [str(number) if number else "before" for number in shown_numbers])
    texts = [f"{'before' if not number else f'round {number}'}: {value:.4g}" for number, value in values]
    ink.bands([(number - 0.5, number + 0.5) for number, _ in values], texts)


def _points(ink: Ink, points: Sequence[Plain]) -> None:
    shared = [p for p in points if p["removed"] == 0]
    series = []
    for method in dict.fromkeys(p["method"] for p in points if p["removed"]):
        mine = [*shared, *(p for p in points if p["method"] == method and p["removed"])]
        mine = sorted(mine, key=lambda p: float(p["removed"]))
        text = "\n".join([method, *(f"{MINUS}{p['removed']:.0%} parameters: {p['accuracy']:.1%}" for p in mine)])
        series.append((method, [100 * p["removed"] for p in mine], [100 * p["accuracy"] for p in mine], text))
    lines(ink, series, "parameters removed (%)", "top-1 accuracy (%)")


# -- sensitivity --------------------------------------------------------------------------------------------------


def _curves(record: Plain) -> list[dict[str, Any]]:
    """For each measure: its chart, its table, and what is most remarkable about it."""
    names = ["accuracy", *(n for n in record["whole"] if n != "accuracy")] if "accuracy" in record["whole"] else None
    return [found for name in names or record["whole"] if (found := _curve(record, name)) is not None]


def _curve(record: Plain, name: str) -> dict[str, Any] | None:
    start, asked = record["whole"][name], sorted({p["ratio"] for row in record["layers"] for p in row["points"]})
    if start is None or not asked:
        return None
    worse = partial(_worse, start=start, name=name)
    found = [worse(p["values"].get(name)) for row in record["layers"] for p in row["points"]]
    most = max((value for value in found if value < LOST), default=0.0) or 1.0
    rows = []
    for row in record["layers"]:
        points = {p["ratio"]: p for p in row["points"]}
        cells = []
        for ratio in asked:
            point = points.get(ratio)
            if point is None:
                cells.append({"text": "", "heat": 0.0, "tip": ""})
                continue
            value = point["values"].get(name)
            tip = f"{row['name']}: {point['removed']} of {row['units']} units removed"
            text, heat = shown(value, name).removesuffix(" %"), min(100 * worse(value) / most, 100.0)
            cells.append({"text": text, "heat": heat, "tip": tip})
        mean = sum(worse(p["values"].get(name)) for p in row["points"]) / max(len(row["points"]), 1)
        rows.append({"name": row["name"], "units": row["units"], "cells": cells, "worse": mean})
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["worse"])
    series = [_series(record["layers"][i], name, start) for i in order]
    scale = " (%)" if name == "accuracy" else ""
    chart = spread(
        f"{name} when units of one layer are removed",
        partial(lines, series=series, x_label="units of the layer removed (%)", y_label=f"{name}{scale}"), 3.8, 4.4,
    )  # fmt: skip
    return {
        "name": name, "start": shown(start, name), "ratios": [f"{100 * r:g} %" for r in asked], "rows": rows,
        "chart": chart, "most": rows[order[0]]["name"], "least": rows[order[-1]]["name"],
        "moves": rows[order[0]]["worse"] > 0,
    }  # fmt: skip


LOST = 1e30
"""How much worse a network is whose value is not finite."""


def _worse(value: float | None, start: float, name: str) -> float:
    """How much worse a value is than at the start; of a number that somebody else measures, how far away.

    Example:
        >>> _worse(0.75, 0.875, "accuracy"), _worse(0.75, 0.875, "loss"), _worse(0.75, 0.875, "mAP")
        (0.125, 0.0, 0.125)
    """
    if value is None:
        return LOST
    if name in ("loss", "accuracy"):
        return max(value - start if name == "loss" else start - value, 0.0)
    return abs(value - start)


def _series(row: Plain, name: str, start: float) -> tuple[str, list[float], list[float], str]:
    scale = 100 if name == "accuracy" else 1
    points = [(0.0, start), *((p["ratio"], p["values"].get(name)) for p in row["points"])]
    finite = [(100 * ratio, scale * value) for ratio, value in points if value is not None]
    text = "\n".join([row["name"], *(f"{100 * ratio:g} %: {shown(value, name)}" for ratio, value in points)])
    return short(row["name"]), [x for x, _ in finite], [y for _, y in finite], text
