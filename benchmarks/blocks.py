"""What removing whole residual blocks is worth: the same target with channels alone, and with blocks among them.

    python benchmarks/blocks.py run --network resnet56 --weights resnet56.safetensors --data cifar10_jpeg.npz
    python benchmarks/blocks.py write            # the table of the stored rows

Training-free: pruned in four rounds, repaired on 512 images, top-1 on all test images. Latencies are passes of the
pruned and the unpruned network in turn, on 64 images and one thread. A row is never computed twice.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from min_width import latency_ratio

import singe_plugin

from harness import BASE, accuracy, pace_of, scoring_of
from records import append, environment, read
from settings import Setting, load_setting, setting_options

ROWS = Path(__file__).parent / "results" / "blocks.jsonl"
NAMES = ("network", "method", "target", "seed", "blocks")


def compute(setting: Setting, method: str, target: str, seed: int, blocks: bool) -> dict[str, Any]:
    """Prune, repair, measure."""
    options = BASE | {"nodes": 1, "scoring_batch_count": 4}  # as the library does in rounds
    start = time.perf_counter()
    result = singe_plugin.prune(
        setting.make(), setting.train, target=target, scoring=scoring_of(method, options, setting.classes), seed=seed,
        pace=replace(pace_of(options), blocks=blocks), finetune=0, repair=512,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    model, images = result.model.eval(), torch.stack([setting.test[index][0] for index in range(64)])
    return {
        "top1": accuracy("test", setting, model), "removed_macs": result.removed_macs,
        "removed_params": result.removed_params, "removed_blocks": result.removed_blocks, "seconds": seconds,
        "latency": latency_ratio(model, setting.make(), images, repeats=40),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    setting = load_setting(args.network, args.weights, args.data, args.test_images, args.size)
    stored = {tuple(row[name] for name in NAMES) for row in read(args.rows)}
    for seed in args.seeds:
        for target in (f"macs={value:g}" for value in args.targets):
            for method in args.methods:
                for blocks in (False, True):
                    key = args.network, method, target, seed, blocks
                    if key in stored:
                        continue
                    found = compute(setting, method, target, seed, blocks)
                    about = {"data": setting.data, "weights": setting.weights, **environment()}
                    append(args.rows, {**dict(zip(NAMES, key, strict=True)), **found, **about})
                    print(key, found, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, means over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (f"{row['network']}, {row['data']}", row["target"], row["method"], row["blocks"])
        groups.setdefault(key, []).append(row)
    lines = [
        "| network, data | removed | criterion | what may go | seeds | blocks gone | top-1 | parameters | latency |"
    ]
    lines.append("|" + "---|" * 9)
    for (network, target, method, blocks), mine in sorted(groups.items()):
        gone = mean(len(row["removed_blocks"]) for row in mine)
        what, params = "channels and blocks" if blocks else "channels", mean(row["removed_params"] for row in mine)
        lines.append(
            f"| {network} | `{target}` | {method} | {what} | {len(mine)} | {gone:g} | "
            f"{100 * mean(row['top1'] for row in mine):.1f} | {-100 * params:.0f} % | "
            f"{100 * (mean(row['latency'] for row in mine) - 1):+.0f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    asked = commands.add_parser("run", help="compute the rows that are missing")
    setting_options(asked)
    asked.add_argument("--targets", nargs="+", type=float, default=[0.3, 0.5])
    asked.add_argument("--methods", nargs="+", default=["fast", "obs"])
    asked.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--rows", type=Path, default=ROWS)
    commands.add_parser("write", help="the table of the stored rows")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        print(table(read(ROWS)))


if __name__ == "__main__":
    main()
