"""The paper's Figure 2: the gradient norm along the path, for five random units of an early and a late layer.

python benchmarks/figure_2.py --network resnet56 --weights resnet56.safetensors --data cifar10_jpeg.npz
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from singe_plugin.app.inspection import figure_two

from records import append, environment
from settings import load_setting

ROWS = Path(__file__).parent / "results" / "figure_2.jsonl"


def main() -> None:
    """Store the curves; ``tables.py write`` draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    setting = load_setting(args.network, args.weights, args.data)
    panels = figure_two(setting.make(), setting.train, seed=args.seed)
    row = {"network": args.network, "data": setting.data, "seed": args.seed}
    append(ROWS, {**row, "panels": [asdict(panel) for panel in panels], **environment()})


if __name__ == "__main__":
    main()
