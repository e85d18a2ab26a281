"""Tables as text: Markdown whose columns line up, so that it reads without being rendered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["markdown_table"]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns line up as plain text; all but the first are set right.

    Example:
        >>> print(markdown_table(["layer", "units"], [["conv1", 64]]))
        | layer | units |
        |:------|------:|
        | conv1 |    64 |
    """
    cells = [[str(c).replace("|", "\\|") for c in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = []
    for first, *rest in cells:
        row = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(row)} |")
    rule = "|".join("-" * (w + 1) + ":" if i else ":" + "-" * (w + 1) for i, w in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])
