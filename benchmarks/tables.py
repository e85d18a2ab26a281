"""The paper's tables on a real network, and the comparison with torch-pruning's importances.

    python benchmarks/tables.py run one_shot tuned --weights resnet56.safetensors --data cifar10_jpeg.npz
    python benchmarks/tables.py write            # docs/results.md from the stored rows

Resumable: a row is never computed twice, whichever tables share it. Several processes may share the work
(``--shard 0/2`` and ``--shard 1/2``). Choices are read in the ablation, which only sees held-out training images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from harness import DATA_FREE, OURS, PEERS, Spec, run_rows
from settings import load_setting

HERE = Path(__file__).parent
ROWS = HERE / "results" / "tables.jsonl"
TARGETS = (0.75, 0.85, 0.9)
PEER_TARGETS = (0.5, 0.75, 0.9)
DEPTHWISE_TARGETS = (0.3, 0.4, 0.5)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
WEIGHT_METHODS = ("l1", "norm_grad", "ig")

# one choice at a time, on ResNet-56 with 75 % of the parameters gone; {} is the base
ABLATION: list[dict[str, Any]] = [
    {}, {"units_per_step": 0.25}, {"units_per_step": 0.1}, {"objective": "logit"}, {"scoring_batch_size": 32},
    {"scoring_batch_size": 256}, {"scoring_batch_count": 4}, {"group_reduction": "mean"}, {"group_reduction": "max"},
    {"nodes": 3}, {"nodes": 8}, {"quadrature": "geometric"}, {"mu": 0.9}, {"mu": 0.8}, {"p": 1},
    {"ratios": "uniform"}, {"ratios": "global"}, {"fold": True}, {"path": "neuron", "nodes": 3},
]  # fmt: skip


def one_shot(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """Table 1, right after pruning, and the peers."""
    for seed in seeds:
        for target in (0.3, 0.5, *TARGETS):
            for method in (*OURS, *PEERS):
                if seed == seeds[0] or method not in DATA_FREE:
                    yield Spec(network, method, target, seed)


def tuned(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """Table 1 and the peers after fine-tuning, the most telling target first."""
    for target in (0.9, 0.75, 0.85, 0.5):
        for seed in seeds:
            for method in (*OURS, *PEERS):
                yield Spec(network, method, target, seed, steps)


def entwined(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """Table 2."""
    for target in (0.9, 0.85):
        for seed in seeds:
            for every in ("post", "layer", "removal"):
                options = {"units_per_step": 0.25} if every == "removal" else {}
                yield Spec(network, "ig", target, seed, steps, every, options)


def weights(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """Table 6's form: single weights, at once, all layers ranked together; and 2:4."""
    for seed in seeds:
        for method in WEIGHT_METHODS:
            if seed != seeds[0] and method in DATA_FREE:
                continue
            for target in SPARSITIES:
                yield Spec(network, method, target, seed, 0, "post", {"rounds": 1}, "test", "weight")
            yield Spec(network, method, 0.5, seed, 0, "post", {"rounds": 1, "pattern": "2:4"}, "test", "weight")


def depthwise(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """Table 5's form, right after pruning and after fine-tuning."""
    for target in reversed(DEPTHWISE_TARGETS):
        for seed in seeds:
            for method in (*OURS, *PEERS):
                yield Spec(network, method, target, seed, steps)


def ablation(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """What the choices are worth, on held-out images."""
    for seed in seeds:
        for options in ABLATION:
            yield Spec(network, "ig", 0.75, seed, steps, "post", options, "held_out")


def baseline(network: str, seeds: list[int], steps: int) -> Iterator[Spec]:
    """The network as it is, on test and on held-out images."""
    for split in ("test", "held_out"):
        yield Spec(network, "none", 0.0, 0, split=split)


TABLES: dict[str, Callable[[str, list[int], int], Iterator[Spec]]] = {
    "baseline": baseline, "one_shot": one_shot, "tuned": tuned, "entwined": entwined, "weights": weights,
    "depthwise": depthwise, "ablation": ablation,
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
    wanted = [
        spec for table in args.tables for spec in TABLES[table](args.network, args.seeds, args.steps)
        if (not args.methods or spec.method in args.methods) and (not args.targets or spec.target in args.targets)
        and (not args.every or spec.every in args.every)
    ]  # fmt: skip
    number, shards = (int(part) for part in args.shard.split("/"))
    run_rows(wanted[number::shards], setting, args.rows)


if __name__ == "__main__":
    main()
