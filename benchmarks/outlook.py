"""Whether the time that is said to be left is the time that is left: on this machine's clock, for runs of five kinds.

    python benchmarks/outlook.py         # a few minutes; nothing else should run
    python benchmarks/speed.py write     # its table is in docs/performance.md

While a run goes on, what its progress bar says is noted ten times a second. When it is over, each of these is held
against what was left: 1.0 is right, 2.0 is twice as long as it took. Resumable: a row is never computed twice.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import singe_plugin
from singe_plugin import FineTune, Pace
from singe_plugin.integrations.prune import prune
from singe_plugin.loop.shown import ProgressBar

from records import append, environment, read

ROWS = Path(__file__).parent / "results" / "outlook.jsonl"
MARKS = (0.1, 0.25, 0.5, 0.75)
SIZE = 64
GIVEN: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [16, 32, 64, 128]}, "resnet10t": {"channels": [16, 32, 64, 128]},
    "vit_tiny_patch16_224": {"img_size": SIZE, "embed_dim": 96, "depth": 6},
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet18: obs, repair": ("resnet18", {"target": "macs=0.5"}, 0),
    "resnet18: obs, repair, 100 steps": ("resnet18", {"target": "macs=0.5"}, 100),
    "mobilenetv3_small: fast, 60 steps in rounds": (
        "mobilenetv3_small_100", {"target": "macs=0.3", "scoring": singe_plugin.Scoring.fast()}, -60,
    ),
    "vit_tiny: obs, repair, 60 steps": ("vit_tiny_patch16_224", {"target": "macs=0.3"}, 60),
    "resnet10t: Algorithm 1, 60 steps": (
        "resnet10t", {"target": "params=0.5", "pace": Pace("layers", units_per_step=0.25), "repair": None}, 60,
    ),
}  # fmt: skip


class Noted(ProgressBar):
    """A bar whose predictions are noted: seconds since the beginning, and seconds that are said to be left."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), beats=False)
        self.notes: list[tuple[float, float | None]] = []
        self.over = threading.Event()
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            self.notes.append((self.outlook.elapsed(), self.outlook.left()))


def compute(name: str) -> dict[str, Any]:
    """A run, and what its bar said at each of :data:`MARKS` of the time it took."""
    network, options, steps = RUNS[name]
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=10, **GIVEN.get(network, {}))
    data = TensorDataset(torch.randn(1024, 3, SIZE, SIZE), torch.randint(0, 10, (1024,)))
    tuning = FineTune(DataLoader(data, 32, shuffle=True), abs(steps), "layer" if steps < 0 else "end") if steps else 0
    bar = Noted()
    bar.watch.start()
    try:
        prune(model, DataLoader(data, 64), finetune=tuning, val_data=DataLoader(data, 128), callbacks=[bar], **options)
    finally:
        bar.over.set()
        bar.watch.join()
    whole = bar.outlook.elapsed()
    said = {}
    for mark in MARKS:
        gone, left = min(bar.notes, key=lambda note: abs(note[0] - mark * whole))
        said[f"{mark:g}"] = None if left is None else left / (whole - gone)
    return {"seconds": whole, "said": said}


def run() -> None:
    torch.set_num_threads(1)
    for name in RUNS:
        if name in {row["key"] for row in read(ROWS)}:
            continue
        start = time.perf_counter()
        row = {"key": name, **compute(name), "wall": time.perf_counter() - start, **environment()}
        append(ROWS, row)
        print(name, f"{row['seconds']:.0f} s", row["said"], flush=True)


def page() -> list[str]:
    """Lines of Markdown: what was said at each mark, as a multiple of what was left."""
    rows = read(ROWS)
    lines = [
        "## The time that is left", "",
        "What the progress bar said, divided by what it then took, at a share of the run (`benchmarks/outlook.py`): 1 "
        "is right, 2 is twice too long. Random weights and images, 64 px, narrower networks than the names' own.", "",
    ]  # fmt: skip
    lines += ["| run | seconds | " + " | ".join(f"at {mark:.0%}" for mark in MARKS) + " |",
             "| --- | --: |" + " --: |" * len(MARKS)]  # fmt: skip
    for row in rows:
        cells = ["unknown" if row["said"][f"{m:g}"] is None else f"{row['said'][f'{m:g}']:.2f}" for m in MARKS]
        lines.append(f"| {row['key']} | {row['seconds']:.0f} | {' | '.join(cells)} |")
    where = dict.fromkeys(f"{row['device']}, commit {row['commit']}, {row['versions']}" for row in rows)
    return [*lines, "", f"Computed on: {'; '.join(where)}."]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    run()
