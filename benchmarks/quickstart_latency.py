"""How much faster the quickstart's network gets: passes of both networks taken in turn, on one thread.

    python benchmarks/quickstart_latency.py

The summary that the quickstart prints compares twenty passes before with twenty after, and on a machine that other
processes share the two moments differ more than the networks do.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import timm
import torch
from min_width import latency_ratio

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart.py"


def main() -> None:
    torch.set_num_threads(1)
    names = runpy.run_path(str(QUICKSTART))
    whole = timm.create_model("resnet18", **names["options"]).eval()
    for examples in (2, 64):
        ratio = latency_ratio(names["model"].eval(), whole, names["images"][:examples], repeats=500)
        print(f"{examples} examples: {100 * (ratio - 1):+.1f} % (median of 500 pairs)")


if __name__ == "__main__":
    main()
