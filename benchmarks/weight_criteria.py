"""Which weights to mask: criteria, one shot or rounds, all layers together or the same sparsity for each.

    python benchmarks/weight_criteria.py > benchmarks/results/weight_criteria.md

The demo's residual network on scikit-learn's digits, trained once (seed 0), then masked with and without fine-tuning.
One seed: it says what is far apart, not what is close. Settings are fixed beforehand.
"""

from __future__ import annotations

import copy
import itertools
import sys

import torch

from singe_plugin import FineTune, Pace, prune_weights
from singe_plugin.app.datasets import data_config, digits
from singe_plugin.app.demo import DemoSettings, train
from singe_plugin.run.architecture import Builder
from singe_plugin.run.data import evaluate
from singe_plugin.tables import markdown_table

CRITERIA = ("l1", "grad", "norm_grad", "sg", "ig")
COLUMNS = {
    "global, one shot": Pace(rounds=1),
    "global, 5 rounds": Pace(rounds=5),
    "per layer, 5 rounds": Pace(rounds=5, ratios="uniform"),
}


def main() -> None:
    """Train, then mask a copy for every cell of the table."""
    torch.set_num_threads(1)
    settings = DemoSettings()
    options = {"layers": [1, 1, 1, 1], "channels": list(settings.channels), "stem_type": "deep", "stem_width": 8}
    torch.manual_seed(0)
    network = Builder.timm("resnet18", in_chans=1, num_classes=10, **options).build()
    splits = digits(data_config(network, settings.img_size), seed=0)
    train(network, splits, settings, 0, False)
    validation = list(torch.utils.data.DataLoader(splits.val, batch_size=250))
    print(f"Top-1 accuracy on {splits.name}; {evaluate(network, validation):.1%} before. One seed, fixed settings.\n")
    rows = []
    for sparsity, steps, criterion in itertools.product((0.9, 0.97), (0, 120), CRITERIA):
        cells = []
        for pace in COLUMNS.values():
            result = prune_weights(
                copy.deepcopy(network), splits.train, sparsity=sparsity, scoring=criterion, pace=pace,
                finetune=FineTune(steps=steps, lr=settings.finetune_lr), val_data=validation, device="cpu",
            )  # fmt: skip
            cells.append(f"{result.after.accuracy:.1%}")
        rows.append([f"{sparsity:.0%} masked, {steps} steps, {criterion}", *cells])
        print(rows[-1], file=sys.stderr, flush=True)
    print(markdown_table(["", *COLUMNS], rows))


if __name__ == "__main__":
    main()
