"""What the repair is worth: a network right after pruning, with the survivors solved again, and fine-tuned from both.

    python benchmarks/repair.py run --network resnet56 --weights resnet56.safetensors --data cifar10_jpeg.npz
    python benchmarks/repair.py run --network tf_efficientnet_lite0 --size 64 --kind macs --targets 0.3 0.5 0.7 ...
    python benchmarks/repair.py write            # docs/repair.md from the stored rows

Resumable: a row is never computed twice. One pruning gives both accuracies of a row: the repair follows the last
removal, so nothing before it differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.tuner import Tuner

from harness import BASE, OF_PACE, accuracy, scoring_of, taken
from records import append, environment, peak_mb, read
from settings import Setting, load_setting

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "repair.jsonl", HERE.parent / "docs" / "repair.md"
METHODS = ("ig_abs", "ig", "taylor", "magnitude_l2")


@dataclass(frozen=True)
class Row:
    """What is computed: a network pruned by a method to a target, on test or held-out images."""

    network: str
    method: str
    target: str
    seed: int
    images: int
    steps: int = 0
    lr: float = 0.0
    distilled: bool = False
    split: str = "test"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Kept(singe_plugin.Callback):
    """Remembers which units went."""

    def __init__(self) -> None:
        self.gone: dict[str, set[int]] = {}

    def on_removed(self, event: Any) -> None:
        self.gone.setdefault(event.layer, set()).update(event.units)


def compute(row: Row, setting: Setting) -> dict[str, Any]:
    """Prune, measure, repair, measure; then fine-tune both, if asked for. The method ``none`` is the network before."""
    if row.method == "none":
        return {"unpruned": accuracy(row.split, setting, setting.make())}
    kept, options = Kept(), BASE
    result = singe_plugin.prune(
        setting.make(), setting.train, target=row.target, scoring=scoring_of(row.method, options, setting.classes),
        seed=row.seed, pace=Pace(**taken(options, OF_PACE)), finetune=0, callbacks=[kept], repair=None,
    )  # fmt: skip
    found = {"removed_params": result.removed_params, "removed_macs": result.removed_macs}
    found["pruned"] = accuracy(row.split, setting, result.model)
    torch.manual_seed(row.seed)
    loader = DataLoader(setting.train, 64, shuffle=True)
    left = {
        layer.name: [u for u in range(layer.units_before) if u not in kept.gone.get(layer.name, ())]
        for layer in result.layers
    }
    repaired, original = copy.deepcopy(result.model), setting.make()
    start = time.perf_counter()
    done = singe_plugin.repair(repaired, original, loader, row.images, kept=left, seed=row.seed)
    found |= {"repair_seconds": time.perf_counter() - start, "solved": len(done.better)}
    found["repaired"] = accuracy(row.split, setting, repaired)
    if row.steps:
        for name, model in (("tuned", result.model), ("repaired_tuned", repaired)):
            torch.manual_seed(row.seed)
            teacher = setting.make() if row.distilled else None
            options_ = singe_plugin.FineTune(
                DataLoader(setting.train, 128, shuffle=True, drop_last=True), row.steps, "end", lr=row.lr,
                distill=teacher,
            )  # fmt: skip
            tuner = Tuner(options_)
            tuner.prepare(model)
            tuner.run(model, row.steps, singe_plugin.Callback())
            found[name] = accuracy(row.split, setting, model)
    return found


def wanted(args: argparse.Namespace) -> Iterator[Row]:
    for seed in args.seeds:
        for target in args.targets:
            for method in args.methods:
                steps = (args.steps, args.lr, args.distill) if args.steps else (0, 0.0, False)
                yield Row(args.network, method, f"{args.kind}={target:g}", seed, args.images, *steps, args.split)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    setting = load_setting(args.network, args.weights, args.data, args.test_images, args.size)
    about = {"data": setting.data, "weights": setting.weights, **environment()}
    rows = list(wanted(args))
    for number, row in enumerate(rows):
        if row.key in {stored["key"] for stored in read(args.rows)}:
            continue
        start = time.perf_counter()
        try:
            found = compute(row, setting)
        except singe_plugin.SingeError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found |= {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
        append(args.rows, {"key": row.key, **asdict(row), **found, **about})
        print(f"[{number + 1}/{len(rows)}] {row}: {found}", flush=True)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def page(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    first = rows[0]
    parts = [
        "# Repair\n",
        "`benchmarks/repair.py` wrote this page from `benchmarks/results/repair.jsonl`. Top-1 in percent, the mean and "
        "deviation over seeds; four rounds, ranks per cost, one batch of 64 images to score on. *As pruned* is the "
        "network right after the last removal; *repaired* is the same network with the layers behind solved again on "
        "unlabelled training images ([usage](usage.md)).\n",
    ]
    for title, columns in (
        ("Without training", ("pruned", "repaired")),
        ("Fine-tuned", ("pruned", "repaired", "tuned", "repaired_tuned")),
    ):
        chosen = [r for r in rows if "pruned" in r and bool(r["steps"]) == ("tuned" in columns)]
        if not chosen:
            continue
        heads = {
            "pruned": "as pruned", "repaired": "repaired", "tuned": "as pruned, fine-tuned",
            "repaired_tuned": "repaired, fine-tuned",
        }  # fmt: skip
        parts.append(f"## {title}\n")
        names = ["network, data", "removed", "criterion", "seeds", "images"]
        names += ["steps"] if "tuned" in columns else []
        parts.append("| " + " | ".join([*names, *(heads[c] for c in columns)]) + " |")
        parts.append("|" + "---|" * (len(names) + len(columns)))
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for r in chosen:
            what = (r["network"], r["data"], r["split"], r["target"], r["method"], r["images"], r["steps"], r["lr"])
            groups.setdefault((*what, r["distilled"]), []).append(r)
        for what, found in groups.items():
            network, data, split, target, method, images, steps, lr, distilled = what
            where = f"{network}, {data}" + ("" if split == "test" else ", held-out")
            cells = [where, f"`{target}`", method, str(len(found)), str(images)]
            if "tuned" in columns:
                cells.append(f"{steps} at {lr:g}, {'distilled' if distilled else 'labels'}")
            parts.append("| " + " | ".join([*cells, *(_cell([r[c] for r in found]) for c in columns)]) + " |")
        parts.append("")
    before = [f"{r['network']}, {r['data']}: {_cell([r['unpruned']])}" for r in rows if "unpruned" in r]
    parts.append(f"Unpruned: {'; '.join(before)}.\n")
    parts.append(f"Machine: {first.get('machine', first.get('cpu', ''))}; commits and seconds are in the rows.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    asked = commands.add_parser("run", help="compute the rows that are missing")
    asked.add_argument("--network", default="resnet56")
    asked.add_argument("--weights", help="a safetensors file; default: timm's pretrained weights")
    asked.add_argument("--data", required=True, help="an .npz of JPEG files, torch/cifar10:FOLDER, or an image folder")
    asked.add_argument("--size", type=int, help="resize the images of an .npz")
    asked.add_argument("--kind", default="params", choices=("params", "macs"))
    asked.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    asked.add_argument("--methods", nargs="+", default=list(METHODS))
    asked.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked.add_argument("--images", type=int, default=512, help="to repair on")
    asked.add_argument("--steps", type=int, default=0, help="of fine-tuning in batches of 128")
    asked.add_argument("--lr", type=float, default=0.03)
    asked.add_argument("--distill", action="store_true", help="learn from the unpruned network")
    asked.add_argument("--split", default="test", choices=("test", "held_out"))
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--test-images", type=int, help="fewer, for a rehearsal; not for results")
    asked.add_argument("--rows", type=Path, default=ROWS)
    commands.add_parser("write", help="the page from the stored rows")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        PAGE.write_text(page(read(ROWS)))


if __name__ == "__main__":
    main()
