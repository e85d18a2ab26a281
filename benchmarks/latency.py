"""Targets of latency: whether they are reached, and what they keep against targets of MACs that are as fast.

    python benchmarks/latency.py reach                       # four timm networks at 224 pixels, random weights
    python benchmarks/latency.py steps                       # the same, for MACs with ragged and with rounded widths
    python benchmarks/latency.py accuracy --network tf_efficientnet_lite0 --size 64 --weights W --data D
    python benchmarks/latency.py accuracy ... --steps 1000   # and both fine-tuned, with the same budget
    python benchmarks/latency.py write                       # docs/latency.md, from the stored rows

ONNX Runtime on one thread of a CPU, one example at a time. What is reached is measured anew when the run is over: both
networks in turn. Resumable: a row is never computed twice.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin import Pace, Repair, Scoring, Target, Timing
from singe_plugin.run.latency import Stopwatch

from harness import accuracy, fine_tune
from records import append, environment, read
from settings import Setting, load_setting, setting_options

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "latency.jsonl", HERE.parent / "docs" / "latency.md"
NETWORKS = ("resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "vit_tiny_patch16_224")
PASSES = 300
TIMING = Timing(backend="onnxruntime", batch=1, threads=1)
HEAD = """# Targets of latency

`benchmarks/latency.py` wrote this page from `benchmarks/results/latency.jsonl`. ONNX Runtime on one thread of a CPU,
one example at a time; what is reached is measured anew when a run is over, both networks in turn, {passes} passes of
each.

## What is reached

Random weights, pruned by magnitude: the time is that of widths alone. *Seconds* is the whole run, table included.

{reach}

## Widths in steps

Targets of MACs, pruned by magnitude in one round, with widths as they come (`Pace(round_to=1)`) and by default, where
they are multiples of 8 (of less in layers of fewer than 64 channels): the change of the latency, {pairs} pairs of
passes. ONNX Runtime has fast kernels for multiples alone.

{steps}

{kept}Computed on: {where}.
"""
KEPT = """## What is kept

Scored by `Scoring.fast()` and repaired on 512 images; top-1 in percent on all test images, an accuracy for each seed.
*MACs as fast* is the target of multiply-adds whose network is as fast, found by bisection; its widths are in steps,
too. *Steps* are of fine-tuning from the repaired network, in batches of 64, distilled from the unpruned one, at the
library's rate. {finding}

{accuracy}

"""


def reached(first: nn.Module, last: nn.Module, inputs: Any) -> tuple[float, float, float]:
    """The share of the time that went, and both medians in milliseconds."""
    before, after = Stopwatch(first, inputs, replace(TIMING, repeats=PASSES)).compare(last)
    return 1 - after.median_ms / before.median_ms, before.median_ms, after.median_ms


def reach(name: str, fraction: float) -> dict[str, Any]:
    """Prune a network with random weights, by magnitude: where units go is as good as random, and free."""
    torch.manual_seed(0)
    model, images = timm.create_model(name, num_classes=10).eval(), torch.randn(8, 3, 224, 224)
    first = timm.create_model(name, num_classes=10).eval()
    target, start = Target.parse(f"latency={fraction}", TIMING), time.perf_counter()
    result = singe_plugin.prune(
        model, [(images, torch.arange(8))], target=target, scoring="l2", finetune=0, repair=None
    )
    seconds = time.perf_counter() - start
    share, before, after = reached(first, model, images[:1])
    found = {"reached": share, "before_ms": before, "after_ms": after, "removed_macs": result.removed_macs}
    return found | {"seconds": seconds}


def steps(name: str, fraction: float) -> dict[str, Any]:
    """A target of MACs with widths as they come and in steps, as by default: how much faster both are, by backend."""
    found: dict[str, Any] = {}
    for word, step in (("ragged", 1), ("rounded", None)):
        torch.manual_seed(0)
        model, images = timm.create_model(name, num_classes=10).eval(), torch.randn(8, 3, 224, 224)
        first = timm.create_model(name, num_classes=10).eval()
        singe_plugin.prune(
            model, [(images, torch.arange(8))], target=f"macs={fraction}", scoring="l2", finetune=0, repair=None,
            pace=Pace(rounds=1, round_to=step),
        )  # fmt: skip
        for backend in ("torch", "onnxruntime"):
            timing = replace(TIMING, backend=backend, repeats=100)
            found[f"{word}_{backend}"] = 1 - Stopwatch(first, images[:1], timing).ratio(model)
    return found


def pruned(setting: Setting, target: Target, seed: int) -> nn.Module:
    """The network without training: scored by one gradient, repaired on 512 images."""
    result = singe_plugin.prune(
        setting.make(), setting.train, target=target, scoring=Scoring.fast(), finetune=0, repair=Repair(), seed=seed,
        pace=Pace(min_width=4),
    )  # fmt: skip
    return result.model


def as_fast(setting: Setting, share: float, seed: int) -> tuple[nn.Module, float, float]:
    """The network of the target of MACs whose measured latency is nearest to a share: found by bisection."""
    low, high, found = 0.0, 0.95, []
    image = setting.test[0][0][None]
    for _ in range(5):
        middle = (low + high) / 2
        model = pruned(setting, Target("macs", middle), seed)
        here = reached(setting.make(), model, image)[0]
        found.append((abs(here - share), model, middle, here))
        if abs(here - share) <= 0.01:
            break
        low, high = (middle, high) if here < share else (low, middle)
    _, model, macs, here = min(found, key=lambda one: one[0])
    return model, macs, here


def compare(setting: Setting, fraction: float, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """The accuracy on test images of both networks, fine-tuned if asked for, and how fast they are."""
    table = folder / f"{setting.name}.json"  # of the network: the same for all seeds
    model = pruned(setting, Target.parse(f"latency={fraction}", replace(TIMING, table=table)), seed)
    share = reached(setting.make(), model, setting.test[0][0][None])[0]
    other, macs, here = as_fast(setting, share, seed)
    if steps:
        tune(setting, model, steps, seed)
        tune(setting, other, steps, seed)
    return {
        "steps": steps, "reached": share, "accuracy": accuracy("test", setting, model), "macs_target": macs,
        "macs_reached": here, "macs_accuracy": accuracy("test", setting, other),
    }  # fmt: skip


def tune(setting: Setting, model: nn.Module, steps: int, seed: int) -> None:
    """Fine-tune a network, with the library's defaults and the unpruned one as its teacher."""
    torch.manual_seed(seed)
    loader = DataLoader(setting.train, 64, shuffle=True, drop_last=True)
    fine_tune(model, singe_plugin.FineTune(loader, steps, "end", distill=setting.make()))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    setting = None
    if args.command == "accuracy":
        setting = load_setting(args.network, args.weights, args.data, args.test_images, args.size)
    names = NETWORKS if setting is None else (setting.name,)
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name in names:
                for fraction in args.targets:
                    key = f"{args.command} {name} {fraction:g} {seed}" + (f" {args.steps}" if args.steps else "")
                    if key in {row["key"] for row in read(ROWS)}:
                        continue
                    try:
                        if setting is None:
                            found = (steps if args.command == "steps" else reach)(name, fraction)
                        else:
                            found = compare(setting, fraction, seed, Path(folder), args.steps)
                    except singe_plugin.SingeError as error:
                        found = {"error": f"{type(error).__name__}: {error}"}
                    about = {} if setting is None else {"data": setting.data, "weights": setting.weights}
                    row = {"key": key, "kind": args.command, "network": name, "target": fraction, "seed": seed, **found}
                    append(ROWS, row | about | environment())
                    print(key, found, flush=True)


def reach_table(rows: list[dict[str, Any]]) -> str:
    """What was asked for, and what was reached."""
    lines = ["| network at 224 px | target | reached | ms before | ms after | MACs removed | seconds |",
             "| --- | --: | --: | --: | --: | --: | --: |"]  # fmt: skip
    for row in rows:
        cells = [row["network"], f"-{row['target']:.0%}"]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            cells += [f"-{row['reached']:.1%}", f"{row['before_ms']:.2f}", f"{row['after_ms']:.2f}"]
            cells += [f"-{row['removed_macs']:.0%}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table(rows: list[dict[str, Any]]) -> str:
    """What a target of MACs gives with ragged and with rounded widths."""
    lines = ["| network at 224 px | MACs | ragged, torch | rounded, torch | ragged, ONNX | rounded, ONNX |",
             "| --- | --: | --: | --: | --: | --: |"]  # fmt: skip
    for row in rows:
        ends = [f"{-100 * row[f'{w}_{b}']:+.0f} %" for b in ("torch", "onnxruntime") for w in ("ragged", "rounded")]
        lines.append(f"| {row['network']} | -{row['target']:.0%} | {' | '.join(ends)} |")
    return "\n".join(lines)


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """The accuracies of both kinds of targets, seed by seed."""
    lines = ["| network | steps | latency | reached | accuracy (%) | MACs as fast | reached | accuracy (%) |",
             "| --- | --: | --: | --: | --: | --: | --: | --: |"]  # fmt: skip
    for what in sorted({(r["network"], r.get("steps", 0), r["target"]) for r in rows}):
        network, steps, target = what
        some = [r for r in rows if (r["network"], r.get("steps", 0), r["target"]) == what]
        reached, macs, here = (mean(r[k] for r in some) for k in ("reached", "macs_target", "macs_reached"))
        kept, other = (" ".join(f"{100 * r[k]:.1f}" for r in some) for k in ("accuracy", "macs_accuracy"))
        cells = [
            network,
            f"{steps:,}",
            f"-{target:.0%}",
            f"-{reached:.1%}",
            kept,
            f"-{macs:.0%}",
            f"-{here:.1%}",
            other,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finding(rows: list[dict[str, Any]]) -> str:
    """What the rows without fine-tuning say, in a sentence."""
    words = []
    for target in sorted({row["target"] for row in rows}):
        some = [row for row in rows if row["target"] == target and not row.get("steps")]
        if some:
            more = 100 * mean(row["accuracy"] - row["macs_accuracy"] for row in some)
            words.append(f"{more:+.1f} points at -{target:.0%} ({len(some)} seeds)")
    return f"What a target of latency keeps more than one of multiply-adds as fast: {', '.join(words)}."


def write() -> None:
    """The page, from the stored rows."""
    rows = read(ROWS)
    where = "; ".join(dict.fromkeys(f"{r['device']}, commit {r['commit']}, {r['versions']}" for r in rows))
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in ("reach", "steps", "accuracy")}
    right = [r for r in kinds["accuracy"] if "error" not in r]
    kept = KEPT.format(accuracy=accuracy_table(right), finding=finding(right)) if right else ""
    reach, steps = reach_table(kinds["reach"]), steps_table(kinds["steps"])
    PAGE.write_text(HEAD.format(passes=PASSES, pairs=100, where=where, reach=reach, steps=steps, kept=kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("reach", "steps", "accuracy", "write"))
    setting_options(parser, needed=False)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning, for accuracy")
    args = parser.parse_args()
    write() if args.command == "write" else run(args)


if __name__ == "__main__":
    main()
