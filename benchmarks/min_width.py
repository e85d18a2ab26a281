"""How narrow may a layer become? Evidence for the default of ``min_width``, on a trained ResNet-56.

A row is one pruning to a target with a ``min_width`` (criterion and ratios by default, smaller scoring batches, no
fine-tuning): accuracy right afterwards on held-out training images, the narrowest layer, and the latency as a ratio to
the unpruned network, measured alternately in one process. With one round the scores of the intact network are those of
all rows of a seed, and are computed once. Rows that are stored are not computed again; ``--table`` prints what is
stored.

    python benchmarks/min_width.py --weights resnet56.safetensors --data cifar10.npz
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import singe_plugin
from singe_plugin.integrations.torch_pruning import SInGEImportance
from singe_plugin.method.folding import fold_batchnorm
from singe_plugin.run.data import evaluate
from singe_plugin.tables import markdown_table

from records import append, environment, read
from settings import Setting, load_setting

WIDTHS = (1, 2, 4, 8)
TARGETS = ("macs=0.5", "params=0.5", "macs=0.75", "params=0.75")
KEY = ("target", "min_width", "seed", "scoring_batch_size", "rounds")


def latency_ratio(model: nn.Module, whole: nn.Module, images: Tensor, repeats: int = 15) -> float:
    """The median of the ratios of pairs of forward passes, one of either model."""
    ratios = []
    with torch.no_grad():
        for number in range(repeats + 2):
            seconds = []
            for one in (model, whole):
                start = time.perf_counter()
                one(images)
                seconds.append(time.perf_counter() - start)
            if number >= 2:
                ratios.append(seconds[0] / seconds[1])
    return median(ratios)


def folded(model: nn.Module, batch: Tensor) -> nn.Module:
    """The same function to rounding, in about half the time on a CPU."""
    quick = copy.deepcopy(model)
    fold_batchnorm(quick, batch[:1])
    return quick.to(memory_format=torch.channels_last)


class Remembered(SInGEImportance):
    """Scores of the intact network, computed once."""

    def __init__(self, scores: dict[str, Tensor], nodes: int) -> None:
        super().__init__(nodes=nodes)
        self.scores = scores

    def score_units(self, group: Any, units: Any) -> Tensor:
        name = group.axis_group.name
        if name not in self.scores:
            self.scores[name] = super().score_units(group, units)
        return self.scores[name]


def row_of(setting: Setting, images: Subset[Any], spec: dict[str, Any], scores: dict[str, Tensor]) -> dict[str, Any]:
    """Prune and measure."""
    start = time.perf_counter()
    criterion = Remembered(scores, nodes=1) if spec["rounds"] == 1 else "ig"
    try:
        result = singe_plugin.prune(
            setting.make(), setting.train, target=spec["target"], seed=spec["seed"], finetune=0,
            scoring=singe_plugin.Scoring(criterion, batch_size=spec["scoring_batch_size"]),
            pace=singe_plugin.Pace(rounds=spec["rounds"], min_width=spec["min_width"], round_to=1, verify=False),
        )  # fmt: skip
    except singe_plugin.SingeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    widths = [row.units_after for row in result.layers]
    batch = torch.stack([images[i][0] for i in range(16)])
    return {
        "accuracy": evaluate(folded(result.model, batch), DataLoader(images, 125)),
        "removed_params": result.removed_params, "removed_macs": result.removed_macs, "narrowest": min(widths),
        "under_4": sum(w < 4 for w in widths),
        "latency_ratio": latency_ratio(result.model.eval(), setting.make(), batch),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The mean over the seeds per target and width."""
    lines = []
    for rounds, target, width in itertools.product(sorted({r["rounds"] for r in rows}), TARGETS, WIDTHS):
        same = [r for r in rows if (r["rounds"], r["target"], r["min_width"]) == (rounds, target, width)]
        good = [r for r in same if "accuracy" in r]
        if not same:
            continue
        shown = [
            " ".join(f"{100 * r['accuracy']:.1f}" for r in good), f"{100 * mean(r['accuracy'] for r in good):.1f}",
            f"{mean(r['latency_ratio'] for r in good):.2f}", " ".join(str(r["narrowest"]) for r in good),
            f"{mean(r['under_4'] for r in good):.1f}",
        ] if good else ["cannot be met", "", "", "", ""]  # fmt: skip
        lines.append([f"{target}, {rounds} round(s), min_width={width}", *shown])
    header = ["", "held-out accuracy (%), per seed", "mean", "latency ratio", "narrowest layer", "layers under 4 units"]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1000, help="held-out training images")
    parser.add_argument("--scoring-batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "min_width.jsonl")
    parser.add_argument("--table", action="store_true", help="print what is stored, and compute nothing")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(args.threads)
        setting = load_setting("resnet56", args.weights, args.data)
        images = Subset(setting.held_out, range(args.images))
        about = {"data": f"{setting.data}, {args.images} held-out training images", "weights": setting.weights}
        about |= environment()
        scores: dict[int, dict[str, Tensor]] = {seed: {} for seed in range(args.seeds)}
        for seed, target, width in itertools.product(range(args.seeds), args.targets, args.widths):
            values = (target, width, seed, args.scoring_batch_size, args.rounds)
            spec = dict(zip(KEY, values, strict=True))
            if spec not in [{name: row[name] for name in KEY} for row in read(args.output)]:
                found = row_of(setting, images, spec, scores[seed])
                append(args.output, {**spec, **found, **about})
                print(spec, found, flush=True)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
