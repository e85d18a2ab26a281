"""Charts for the pages: matplotlib draws them as SVG, whose colours are the page's and whose numbers show on hovering.

No script is needed for either. Colours are placeholders that become CSS variables, so that one drawing is right on
light and on dark ground; an element that carries a number gets a ``<title>``, which browsers show under the pointer.
Every chart is drawn twice, for wide and for narrow windows, and the page shows one of them.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

__all__ = ["Chart", "Ink", "bars", "lines", "short", "spread", "steps"]

INKS = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303", "before": "#040404", "after": "#050505", "bad": "#060606",
    "s1": "#0a0a01", "s2": "#0a0a02", "s3": "#0a0a03", "s4": "#0a0a04", "s5": "#0a0a05", "s6": "#0a0a06",
}  # fmt: skip
SERIES = [name for name in INKS if name[0] == "s"]
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_POINT = 1 / 72


@dataclass(frozen=True)
class Chart:
    """A chart: what it shows, in a sentence, and its SVG for wide and for narrow windows."""

    label: str
    wide: str
    narrow: str


class Ink:
    """What a drawing function draws with.

    Attributes:
        axes: matplotlib's.
        narrow: whether it is for a narrow window.
    """

    def __init__(self, axes: Any, narrow: bool) -> None:
        self.axes, self.narrow = axes, narrow
        self.tips: dict[str, tuple[str, ...]] = {}

    def tip(self, artist: Any, *texts: str) -> None:
        """Let a text show when the pointer is over an element; of a collection, one for each of its parts."""
        artist.set_gid(f"tip{len(self.tips)}")
        self.tips[artist.get_gid()] = texts

    def bands(self, edges: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
        """Let texts show when the pointer is in parts of the x axis, however small what is drawn there."""
        low, high = self.axes.get_ylim()
        self.axes.set_ylim(low, high)
        made = self.boxes([(left, right, low, high) for left, right in edges], INKS["grid"], alpha=0)
        self.tip(made, *texts)

    def boxes(self, corners: Sequence[tuple[float, float, float, float]], color: str, **more: Any) -> Any:
        """Rectangles (left, right, bottom, top), all in one: hundreds of single ones take seconds."""
        collections = importlib.import_module("matplotlib.collections")
        shapes = [[(x0, y0), (x0, y1), (x1, y1), (x1, y0)] for x0, x1, y0, y1 in corners]
        return self.axes.add_collection(collections.PolyCollection(shapes, facecolors=color, linewidths=0, **more))


def spread(label: str, draw: Callable[[Ink], None], height: float = 2.9, narrow_height: float | None = None) -> Chart:
    """Draw a chart in both sizes.

    Args:
        label: what it shows, for those who do not see it.
        draw: draws on the axes.
        height, narrow_height: in inches.
    """
    sizes = ((10.2, height), (4.0, narrow_height or height))
    wide, narrow = (_svg(draw, size, narrow, label) for narrow, size in enumerate(sizes))
    return Chart(label, wide, narrow)


def _svg(draw: Callable[[Ink], None], size: tuple[float, float], narrow: int, label: str) -> str:
    matplotlib = importlib.import_module("matplotlib")
    figure_class = importlib.import_module("matplotlib.figure").Figure
    canvas = importlib.import_module("matplotlib.backends.backend_svg").FigureCanvasSVG
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{label} {narrow}", "font.size": 9}):
        figure = figure_class(figsize=size, layout="constrained")  # no pyplot: its backend and state are the user's
        axes = figure.add_subplot()
        for ground in (figure.patch, axes.patch):
            ground.set_visible(False)  # it is the page's
        _plain_axes(axes)
        ink = Ink(axes, bool(narrow))
        draw(ink)
        buffer = io.StringIO()
        canvas(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), ink.tips, label)


def _plain_axes(axes: Any) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INKS["grid"])
    axes.tick_params(colors=INKS["muted"], length=0, pad=4)
    axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INKS["muted"])


def _themed(drawn: str, tips: Mapping[str, Sequence[str]], label: str) -> str:
    """The SVG with hover texts, the page's colours and fonts, and no names that another SVG of the page could have."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(drawn[drawn.index("<svg") :])
    for unused in [child for child in root if child.tag.endswith("metadata")]:
        root.remove(unused)
    used = {value for e in root.iter() for value in e.attrib.values() if "#" in value}
    for element in root.iter():
        name = element.attrib.get("id", "")
        if name in tips:
            element.set("class", "tip")
            parts = [e for e in element.iter() if e.tag.rpartition("}")[2] in ("path", "use")]
            several = len(tips[name]) > 1
            for part, text in zip(parts if several else [element], tips[name], strict=True):
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = text
                part.insert(0, title)
        if name and not any(f"#{name}" in value for value in used):
            del element.attrib["id"]
    for key in ("width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    found = ElementTree.tostring(root, encoding="unicode")
    for ink, color in INKS.items():
        found = found.replace(color, f"var(--{ink})")
    return found


def short(name: str, most: int = 26) -> str:
    """A name that fits an axis: its end, which says the most.

    Example:
        >>> short("blocks.0.0.conv"), short("features.denseblock1.denselayer1.conv1", 16)
        ('blocks.0.0.conv', '…enselayer1.conv1')
    """
    clean = "".join(c if c.isprintable() else "?" for c in name)
    return clean if len(clean) <= most else f"…{clean[-most:]}"


def bars(ink: Ink, rows: Sequence[tuple[str, float, float, str]], what: str) -> None:
    """Bars in a row: before as a shade, after in front of it.

    Args:
        ink: what is drawn with.
        rows: name, before, after, and the text that shows on hovering.
        what: is counted.
    """
    for name, heights in (("before", [row[1] for row in rows]), ("after", [row[2] for row in rows])):
        ink.boxes([(n - 0.42, n + 0.42, 0.0, height) for n, height in enumerate(heights)], INKS[name], label=name)
    ink.axes.set_ylim(0, 1.05 * max(max(row[1:3]) for row in rows) or 1)
    ink.bands([(n - 0.5, n + 0.5) for n in range(len(rows))], [row[3] for row in rows])
    ink.axes.set_xlim(-0.6, len(rows) - 0.4)
    ink.axes.set_ylabel(what)
    _compact(ink.axes.yaxis)
    if len(rows) <= (18 if ink.narrow else 44):
        names = [short(r[0], 22) for r in rows]
        ink.axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7.5, parse_math=False)
    else:
        ink.axes.set_xlabel(f"{len(rows)} layers, in network order")
        ink.axes.set_xticks([])
    _legend(ink, 2)


def lines(
    ink: Ink,
    series: Sequence[tuple[str, Sequence[float], Sequence[float], str]],
    x_label: str,
    y_label: str,
    highlighted: int = 6,
) -> None:
    """Lines, each with a text that shows on hovering; the first few have a colour and a place in the legend.

    Args:
        ink: what is drawn with.
        series: name, x, y, and the text.
        x_label, y_label: of the axes.
        highlighted: how many have a colour.
    """
    for number, (name, x, y, text) in reversed(list(enumerate(series))):
        named = number < highlighted
        style = {"color": INKS[SERIES[number % len(SERIES)]], "linewidth": 2.0, "marker": "o", "markersize": 4}
        (line,) = ink.axes.plot(
            x, y, label=short(name) if named else None, **(style if named else {"color": INKS["muted"], "alpha": 0.35})
        )
        ink.tip(line, text)
    ink.axes.set_xlabel(x_label)
    ink.axes.set_ylabel(y_label)
    if len(series) > 1:
        _legend(ink, 2 if ink.narrow else 3, turned=True)


def steps(
    ink: Ink, windows: Sequence[tuple[float, float, float]], marks: Mapping[float, str], x_label: str, y_label: str
) -> None:
    """A line over the steps of a run, with marks where something happened.

    Args:
        ink: what is drawn with.
        windows: first step, last step, and the mean between them.
        marks: step -> what happened in front of the next one.
        x_label, y_label: of the axes.
    """
    middle = [(first + last) / 2 for first, last, _ in windows]
    ink.axes.plot(middle, [value for _, _, value in windows], color=INKS["after"], linewidth=1.8)
    size = math.ceil(len(windows) / 60)
    edges, texts = [], []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        mean = sum(value for _, _, value in part) / len(part)
        span = f"step {part[0][0]:g}" if part[0][0] == part[-1][1] else f"steps {part[0][0]:g} to {part[-1][1]:g}"
        edges.append((part[0][0] - 0.5, part[-1][1] + 0.5))
        texts.append(f"{span}: {y_label} {mean:.4g}")
    ink.bands(edges, texts)
    for number, (step, text) in enumerate(marks.items()):
        line = ink.axes.axvline(
            step + 0.5,
            color=INKS["bad"],
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label=None if number else "units removed",
        )
        ink.tip(line, text)
    ink.axes.set_xlabel(x_label)
    ink.axes.set_ylabel(y_label)
    if marks:
        _legend(ink, 1)


def _compact(axis: Any) -> None:
    """Thousands and millions as 10k and 10M."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.set_major_locator(ticker.MaxNLocator(5, integer=True))


def _legend(ink: Ink, columns: int, turned: bool = False) -> None:
    handles, labels = ink.axes.get_legend_handles_labels()
    if turned:
        handles, labels = handles[::-1], labels[::-1]
    legend = ink.axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=columns, frameon=False, fontsize=8.5,
        borderaxespad=0.2, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INKS["ink"])
        text.set_parse_math(False)
