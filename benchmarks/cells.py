"""Stored rows as the cells of tables: which rows a cell is made of, and what it says."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from harness import DATA_FREE

__all__ = [
    "PAPER_BATCH", "Row", "Rows", "cell", "common_batch", "macs_gone", "measured", "on_cpu", "one_shot_cell",
    "scoring_seconds", "values",
]  # fmt: skip

Row = dict[str, Any]
PAPER_BATCH = 128  # §4.1: of the fine-tuning


def measured(rows: Iterable[Row], stage: str, batch: int | None = None) -> list[Row]:
    """One row a seed: the first that was stored; of fine-tuning in one batch size, the one with the most seeds.

    Args:
        rows: of one criterion, target and setting.
        stage: ``"pruned"`` or ``"tuned"``.
        batch: only fine-tuning with this one.
    """
    found: dict[int, dict[int, Row]] = {}
    for row in rows:
        if stage in row:
            found.setdefault(row["batch"] if stage == "tuned" else 0, {}).setdefault(row["seed"], row)
    if stage == "tuned" and batch is not None:
        return list(found.get(batch, {}).values())
    most = max(found, key=lambda size: (len(found[size]), size), default=None)
    return [] if most is None else list(found[most].values())


def values(rows: Iterable[Row], stage: str, batch: int | None = None) -> list[float]:
    """The accuracies in percent, one a seed."""
    return [100 * row[stage] for row in measured(rows, stage, batch)]


def common_batch(cells: Iterable[Iterable[Row]]) -> int:
    """The batch size of fine-tuning that most of some cells have; the larger one of two."""
    found = Counter(batch for rows in cells for batch in {row["batch"] for row in rows if "tuned" in row})
    return max(found, key=lambda batch: (found[batch], batch), default=PAPER_BATCH)


def cell(rows: Sequence[Row], stage: str, batch: int | None = None) -> str:
    """Mean and standard deviation over the seeds; their number if it is not three; the batch if it is not the paper's.

    A row whose fine-tuning failed is an error there, not before.
    """
    seen = measured(rows, stage, batch)
    if not seen:
        failed = [row["error"] for row in rows if "error" in row]
        return failed[0].split(":")[0] if failed else "not run"
    found = [100 * row[stage] for row in seen]
    batch = seen[0]["batch"] if stage == "tuned" else 0
    end = f", b{batch}" if batch not in (0, PAPER_BATCH) else ""
    if len(found) == 1:
        return f"{found[0]:.1f} (1 seed{end})"
    count = f" ({len(found)} seeds{end})" if len(found) != 3 else f" ({end[2:]})" if end else ""
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}{count}"


def one_shot_cell(rows: Sequence[Row], method: str) -> str:
    """As :func:`cell`; a criterion that reads no data has one value, but for the rounding of devices."""
    found = values(rows, "pruned")
    one = method in DATA_FREE and found and max(found) - min(found) < 0.1
    return f"{found[0]:.1f}" if one else cell(rows, "pruned")


class Rows:
    """The stored rows, asked by their spec."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def of(self, **wanted: Any) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[k] == v for k, v in wanted.items())]

    def at_once(self, network: str, method: str, target: float, options: dict[str, Any] | None = None) -> list[Row]:
        """Rows in which everything was pruned before any fine-tuning."""
        return self.of(network=network, method=method, target=target, every="post", options=options or {}, split="test",
                       granularity="channel")  # fmt: skip

    def tuned(
        self, network: str, method: str, target: float, steps: int, options: dict[str, Any] | None = None
    ) -> list[Row]:
        """Those that were fine-tuned for so long; in rounds where no options are given."""
        return [row for row in self.at_once(network, method, target, options) if row["steps"] == steps]

    def between(self, network: str, method: str, target: float) -> list[Row]:
        """Rows of eight rounds with fine-tuning between them."""
        return self.of(network=network, method=method, target=target, every="layer", options={"rounds": 8},
                       split="test", steps=1000)  # fmt: skip


def on_cpu(row: Row) -> bool:
    return bool(row["device"].startswith("CPU"))


def scoring_seconds(rows: Iterable[Row]) -> float | None:
    """The median on a core of its own; the rows of a GPU shared it with twenty others."""
    found = [row["scoring_seconds"] for row in rows if "scoring_seconds" in row and on_cpu(row)]
    return statistics.median(found) if found else None


def macs_gone(rows: Iterable[Row]) -> str:
    """The mean share of the multiply-adds; a row that failed has none."""
    gone = [row["removed_macs"] for row in rows if "removed_macs" in row]
    return f"{statistics.mean(gone):.0%}" if gone else "not run"
