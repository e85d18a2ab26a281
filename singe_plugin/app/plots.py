"""The plots beside ``report.md``, as images, if matplotlib is there."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from singe_plugin.app.curves import Curves
from singe_plugin.files import write_atomically

__all__ = ["PLOTS", "Point", "draw_curves", "draw_plots"]

UNITS_PLOT, POINTS_PLOT, CURVES_PLOT = "units.png", "accuracy.png", "gradients.png"
PLOTS = (UNITS_PLOT, POINTS_PLOT, CURVES_PLOT)


@dataclass(frozen=True)
class Point:
    """One network in the plot of accuracy against parameters removed; both are fractions."""

    method: str
    removed: float
    accuracy: float


def draw_plots(
    layers: Sequence[Mapping[str, Any]], directory: Path, points: Sequence[Point], curves: Sequence[Curves]
) -> list[str]:
    """Draw what there is data for; the names of the files, none without matplotlib."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError:
        return []
    drawings: list[tuple[str, tuple[float, float], Callable[[Any], None]]] = []
    if layers:
        height = max(2.5, 0.22 * len(layers) + 1)
        drawings.append((UNITS_PLOT, (7, height), lambda figure: _draw_units(figure, layers)))
    if len(points) > 1:
        drawings.append((POINTS_PLOT, (6, 4), lambda figure: _draw_points(figure, points)))
    if curves:
        drawings.append((CURVES_PLOT, (5 * len(curves), 4), lambda figure: draw_curves(figure, curves)))
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


def draw_curves(figure: Any, curves: Sequence[Curves]) -> None:
    """The paper's Figure 2, one panel for each layer."""
    for index, panel in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), index + 1)
        for unit, norms, grads in zip(panel.units, panel.norms, panel.grads, strict=True):
            axes.plot(norms, grads, marker=".", label=f"unit {unit}")
        axes.invert_xaxis()
        axes.set_xlabel(r"$\|\mu^s W^n\|$")
        axes.set_ylabel(r"$\|\nabla_{\mu^s W^n} F\|$")
        axes.set_title(panel.layer)
        axes.legend(fontsize=8)
