"""The paper's tables on a real network, and the comparison with torch-pruning's importances.

    python benchmarks/tables.py run one_shot tuned --weights resnet56.safetensors --data cifar10_jpeg.npz
    python benchmarks/tables.py write            # docs/results.md from the stored rows

Resumable: a row is never computed twice, whichever tables share it. Several processes may share the work
(``--shard 0/2`` and ``--shard 1/2``). Choices are read in the ablation, which only sees held-out training images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import (
    COMPARED,
    CROSSED,
    DATA_FREE,
    DEPTHWISE_TARGETS,
    HIGHER_RATE,
    LAYERS,
    MORE_DATA,
    NETWORKS,
    OURS,
    PEER_TARGETS,
    PEERS,
    RATED,
    RATES,
    Spec,
    run_rows,
)
from settings import load_setting

HERE = Path(__file__).parent
ROWS = HERE / "results" / "tables.jsonl"
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
WEIGHT_METHODS = ("l1", "norm_grad", "ig")
CHOICES = (0.5, 0.75)  # where the ablation looks: beyond them nothing is left right after pruning

# one choice at a time; {} is the base
ABLATION: list[dict[str, Any]] = [
    {"ratios": "block"}, {"rounds": 1}, {}, {**LAYERS}, {"ratios": "global"}, {"nodes": 5}, {"rounds": 8},
    {**LAYERS, "units_per_step": 0.25}, {"scoring_batch_count": 4}, {"schedule": "linear"}, {"objective": "logit"},
    {"group_reduction": "mean"},
    {"nodes": 1}, {"scoring_batch_size": 32}, {"scoring_batch_size": 256}, {"mu": 0.9}, {"p": 1}, {"rounds": 2},
    {"fold": True}, {"ratios": "uniform"}, {"group_reduction": "max"},
    {"scoring_batch_size": 16, "scoring_batch_count": 4}, {"nodes": 1, "scoring_batch_count": 3},
    {"steps": 13},  # walks half of the way
]  # fmt: skip
# 30 and 40 times the passes, so with fewer images, and their base
LONG_ABLATION: list[dict[str, Any]] = [
    {"scoring_batch_size": 16, **options} for options in ({}, {"quadrature": "geometric"}, {"path": "neuron"})
]
MOST_TELLING_FIRST = tuple(dict.fromkeys(("ig_abs", "taylor", "l2", "ig", "random", *OURS, *PEERS)))
SMALL_CUTS = (0.3, 0.4, 0.2)
LEADING = ("ig_abs", "taylor", "magnitude_l2", "l2", "ig")
# what only fine-tuning shows, at 90 %: how small a layer may become, and ranks without costs
TUNED_ABLATION: list[tuple[str, dict[str, Any]]] = [
    (method, {**base, **options})
    for options in ({"max_pruning_ratio": 1.0}, {}, {"max_pruning_ratio": 0.85}, {"ratios": "global"})
    for method, base in (("ig_abs", {"nodes": 1}), ("taylor", {}))
]
CRITERIA = ("norm_grad", "sg", "ig", "ig_abs", "taylor")
# scoring more data helps most; how much is a question of its cost
DATA: list[tuple[str, dict[str, Any]]] = [
    ("taylor", {}), ("taylor", {"scoring_batch_count": 4}), ("taylor", {"scoring_batch_count": 16}),
    ("ig", {}), ("ig", {"scoring_batch_count": 4}),
    ("ig", {"nodes": 1, "scoring_batch_count": 4}), ("ig_abs", {"nodes": 1, "scoring_batch_count": 4}),
    ("ig_abs", {"nodes": 1, "scoring_batch_size": 16, "scoring_batch_count": 16}),
]  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What the command asks for."""

    network: str
    seeds: list[int]
    steps: int
    batch: int


def baseline(w: Wanted) -> Iterator[Spec]:
    """The network as it is, on test and on held-out images."""
    for split in ("test", "held_out"):
        yield Spec(w.network, "none", 0.0, 0, split=split)


def one_shot(w: Wanted, targets: Sequence[float] = (*PEER_TARGETS, 0.85), **options: Any) -> Iterator[Spec]:
    """Every criterion right after pruning."""
    for target in targets:
        for seed in w.seeds:
            for method in (*OURS, *PEERS):
                if seed == w.seeds[0] or method not in DATA_FREE:
                    yield Spec(w.network, method, target, seed, options=options)


def paper_order(w: Wanted) -> Iterator[Spec]:
    """The same, one layer after the other, as in the paper's Table 1."""
    return one_shot(w, **LAYERS)


def tuned(w: Wanted, targets: Sequence[float] = (0.9, 0.75, 0.5, 0.85)) -> Iterator[Spec]:
    """Every criterion right after pruning and after fine-tuning, the most telling first."""
    for target in targets:
        for seed in w.seeds:
            for method in MOST_TELLING_FIRST:
                yield Spec(w.network, method, target, seed, w.steps, batch=w.batch)


def leading(w: Wanted) -> Iterator[Spec]:
    """Of these the criteria that the table of leads is about."""
    return (spec for spec in tuned(w, (0.75, 0.9, 0.5)) if spec.method in LEADING)


def small_cuts(w: Wanted) -> Iterator[Spec]:
    """Of these, where little is removed, for Table 3."""
    return (spec for spec in tuned(w, SMALL_CUTS) if spec.method in LEADING)


def paper_order_tuned(w: Wanted) -> Iterator[Spec]:
    """The paper's Table 1 after fine-tuning, in its order of layers."""
    for target in (0.9, 0.75, 0.85):
        for seed in w.seeds:
            for method in OURS:
                yield Spec(w.network, method, target, seed, w.steps, options=LAYERS, batch=w.batch)


def more_data(w: Wanted, steps: int = 0) -> Iterator[Spec]:
    """The criteria that gain from more images, with as many as the ablation says."""
    for target in NETWORKS.get(w.network, PEER_TARGETS):
        for seed in w.seeds:
            for method, options in MORE_DATA.items():
                yield Spec(w.network, method, target, seed, steps, options=options, batch=w.batch if steps else 0)


def more_data_tuned(w: Wanted) -> Iterator[Spec]:
    """The same, and after fine-tuning."""
    return more_data(w, w.steps)


def entwined(w: Wanted, lengths: Sequence[int] = ()) -> Iterator[Spec]:
    """Table 2, in the paper's order."""
    for seed in w.seeds:
        for steps in lengths or (w.steps,):
            for target in (0.9, 0.85):
                for every in ("post", "layer", "removal"):
                    options = {**LAYERS, "units_per_step": 0.25} if every == "removal" else LAYERS
                    yield Spec(w.network, "ig", target, seed, steps, every, options, batch=w.batch)


def entwined_long(w: Wanted) -> Iterator[Spec]:
    """Its rows of twice and five times the steps."""
    return entwined(w, (2 * w.steps, 5 * w.steps))


def entwined_rounds(w: Wanted) -> Iterator[Spec]:
    """Eight rounds with an eighth of the fine-tuning after each."""
    for target in (0.9, 0.75, 0.5):
        for seed in w.seeds:
            for method in MOST_TELLING_FIRST:
                yield Spec(w.network, method, target, seed, w.steps, "layer", {"rounds": 8}, batch=w.batch)


def widths(w: Wanted) -> Iterator[Spec]:
    """The same widths, but other units: what the choice of units is worth once something is fine-tuned."""
    for target in (0.9, 0.75):
        for seed in w.seeds:
            for units in CROSSED.values():
                for method, options in units.items():
                    yield Spec(w.network, method, target, seed, w.steps, options=options, batch=w.batch)


def weights(w: Wanted) -> Iterator[Spec]:
    """Table 6's form: single weights, at once, all layers ranked together; and 2:4."""
    for target, pattern in [*((s, {}) for s in SPARSITIES), (0.5, {"pattern": "2:4"})]:
        for seed in w.seeds:
            for method in WEIGHT_METHODS:
                if seed == w.seeds[0] or method not in DATA_FREE:
                    options = {"rounds": 1, **pattern}
                    yield Spec(w.network, method, target, seed, options=options, granularity="weight")


def weights_rounds(w: Wanted) -> Iterator[Spec]:
    """The same in four rounds, which magnitudes do not see."""
    for target in SPARSITIES:
        for seed in w.seeds:
            for method in WEIGHT_METHODS:
                if method not in DATA_FREE:
                    yield Spec(w.network, method, target, seed, options={"rounds": 4}, granularity="weight")


def depthwise(w: Wanted) -> Iterator[Spec]:
    """Table 5's form: right after pruning, and after fine-tuning."""
    yield from tuned(w, (*PEER_TARGETS, 0.4, 0.3))


def depthwise_one_shot(w: Wanted) -> Iterator[Spec]:
    """Table 5's form, right after pruning."""
    return one_shot(w, DEPTHWISE_TARGETS)


def ablation(w: Wanted) -> Iterator[Spec]:
    """What the choices are worth, on held-out images."""
    for seed in w.seeds:
        for target in CHOICES:
            for options in ABLATION:
                yield Spec(w.network, "ig_abs", target, seed, options=options, split="held_out")
            for method in CRITERIA:
                yield Spec(w.network, method, target, seed, split="held_out")
            for method, options in DATA:
                yield Spec(w.network, method, target, seed, options=options, split="held_out")


def ablation_long(w: Wanted) -> Iterator[Spec]:
    """The choices that take ten minutes of a core and more each."""
    for seed in w.seeds:
        for target in CHOICES:
            for options in LONG_ABLATION:
                yield Spec(w.network, "ig_abs", target, seed, options=options, split="held_out")


def ablation_tuned(w: Wanted) -> Iterator[Spec]:
    """What choices are worth after fine-tuning, on held-out images."""
    for seed in w.seeds:
        for method, options in TUNED_ABLATION:
            yield Spec(w.network, method, 0.9, seed, w.steps, options=options, split="held_out", batch=w.batch)


def rates(w: Wanted) -> Iterator[Spec]:
    """The learning rate of the fine-tuning, on held-out images."""
    for seed in w.seeds:
        for lr in RATES:
            for method, target, every, options in RATED.values():
                given = {**options, "lr": lr}
                yield Spec(w.network, method, target, seed, w.steps, every, given, "held_out", batch=w.batch)


def higher_rate(w: Wanted) -> Iterator[Spec]:
    """The leads, and entwined against after pruning, at the learning rate that :func:`rates` says."""
    for seed in w.seeds:
        for method, target, every, options in COMPARED:
            yield Spec(w.network, method, target, seed, w.steps, every, {**options, "lr": HIGHER_RATE}, batch=w.batch)


TABLES: dict[str, Callable[[Wanted], Iterator[Spec]]] = {
    "baseline": baseline, "one_shot": one_shot, "paper_order": paper_order, "tuned": tuned, "entwined": entwined,
    "entwined_long": entwined_long, "leading": leading, "paper_order_tuned": paper_order_tuned,
    "small_cuts": small_cuts, "entwined_rounds": entwined_rounds, "more_data": more_data,
    "more_data_tuned": more_data_tuned, "widths": widths, "weights": weights, "weights_rounds": weights_rounds,
    "depthwise": depthwise, "depthwise_one_shot": depthwise_one_shot, "ablation": ablation,
    "ablation_long": ablation_long, "ablation_tuned": ablation_tuned, "rates": rates, "higher_rate": higher_rate,
}  # fmt: skip


def main() -> None:
    """``run`` computes rows, ``write`` the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="compute the rows that are missing")
    run.add_argument("tables", nargs="+", choices=TABLES)
    run.add_argument("--network", default="resnet56")
    run.add_argument("--weights", help="a safetensors file; default: timm's pretrained weights")
    run.add_argument("--data", required=True, help="an .npz of JPEG files, torch/cifar10:FOLDER, or an image folder")
    run.add_argument("--methods", nargs="+", choices=(*OURS, *PEERS), help="only these")
    run.add_argument("--targets", nargs="+", type=float, help="only these")
    run.add_argument("--every", nargs="+", choices=("post", "layer", "removal"), help="only these")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--steps", type=int, default=1000, help="of fine-tuning, where there is some")
    run.add_argument("--batch", type=int, default=128, help="of the fine-tuning")
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--shard", default="0/1", help="this process's part of the rows: number/of how many")
    run.add_argument("--images", type=int, help="fewer test images, for a rehearsal; not for results")
    run.add_argument("--rows", type=Path, default=ROWS)
    commands.add_parser("write", help="docs/results.md from the stored rows")
    args = parser.parse_args()
    if args.action == "write":
        from results_page import write

        write(ROWS)
        return
    torch.set_num_threads(args.threads)
    setting = load_setting(args.network, args.weights, args.data, args.images)
    asked = Wanted(args.network, args.seeds, args.steps, args.batch)
    wanted = [
        spec for table in args.tables for spec in TABLES[table](asked)
        if (not args.methods or spec.method in args.methods) and (not args.targets or spec.target in args.targets)
        and (not args.every or spec.every in args.every)
    ]  # fmt: skip
    number, shards = (int(part) for part in args.shard.split("/"))
    different = list({spec.key: spec for spec in wanted}.values())
    run_rows(different[number::shards], setting, args.rows)


if __name__ == "__main__":
    main()
