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
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.removal import remove_units
from singe_plugin.loop.pace import read_step
from singe_plugin.state import model_device

from graphs import graphed_loss
from harness import BASE, accuracy, fine_tune, pace_of, scoring_of
from records import append, environment, peak_mb, read
from settings import Setting, load_setting, setting_options

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "repair.jsonl", HERE.parent / "docs" / "repair.md"
METHODS = ("obs", "ig_abs", "ig", "fast", "taylor", "magnitude_l2")
FORMER = "obs_fixed"  # rows of obs before its Gram matrices were shrunk: with a ridge of 1e-3


@dataclass(frozen=True)
class Row:
    """What is computed: a network pruned by a method to a target, on test or held-out images.

    Attributes:
        images: to repair on.
        steps, lr, distilled: of the fine-tuning, in batches of 128; no steps are none.
        batches: of 64 images to score on.
        start: what is fine-tuned: the network as ``"pruned"``, ``"repaired"``, or ``"both"``; ``"entwined"`` is
            fine-tuned after each of the rounds, and repaired before that.
        round_to: the widths: 1 for those that come, ``"auto"`` for the library's default for multiply-adds.
    """

    network: str
    method: str
    target: str
    seed: int
    images: int
    steps: int = 0
    lr: float = 0.0
    distilled: bool = False
    split: str = "test"
    batches: int = 1
    start: str = "both"
    round_to: int | str = 1

    @property
    def key(self) -> str:
        """Equal for rows that compute the same; fields that came later are left out where they say nothing new."""
        usual = {"batches": 1, "start": "both", "round_to": 1}
        return json.dumps({k: v for k, v in asdict(self).items() if usual.get(k) != v}, sort_keys=True)


class Kept(singe_plugin.Callback):
    """Remembers which units went."""

    def __init__(self) -> None:
        self.gone: dict[str, set[int]] = {}

    def on_removed(self, event: Any) -> None:
        self.gone.setdefault(event.layer, set()).update(event.units)

    def left(self, result: singe_plugin.Result) -> dict[str, list[int]]:
        """The units of every layer that stayed, in the numbering of the unpruned network."""
        return {
            layer.name: [u for u in range(layer.units_before) if u not in self.gone.get(layer.name, ())]
            for layer in result.layers
        }


def compute(row: Row, setting: Setting, models: Path | None) -> dict[str, Any]:
    """Prune, measure, repair, measure; then fine-tune, if asked for. The method ``none`` is the network before."""
    if row.method == "none":
        return {"unpruned": accuracy(row.split, setting, setting.make())}
    if row.start == "entwined":
        return _entwined(row, setting)
    found, networks = _stored(row, setting, models)
    if row.steps:
        starts = ("pruned", "repaired") if row.start == "both" else (row.start,)
        for start in starts:
            torch.manual_seed(row.seed)
            fine_tune(networks[start], _finetuning(row, setting, "end"))
            name = "tuned" if start == "pruned" else "repaired_tuned"
            found[name] = accuracy(row.split, setting, networks[start])
    return found


def _stored(row: Row, setting: Setting, models: Path | None) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """What is known of a network as pruned and as repaired, and both: from a folder, if they are there."""
    same = replace(row, steps=0, lr=0.0, distilled=False, start="both", split="").key
    file = None if models is None else models / f"{hashlib.sha256(same.encode()).hexdigest()[:16]}.pt"
    if file is not None and file.exists():
        stored = torch.load(file, map_location="cpu", weights_only=True)
        assert stored["key"] == same
        found = stored["found"]
        networks = {name: _cut(setting, stored["left"], state) for name, state in stored["states"].items()}
    else:
        found, left, networks = _pruned_and_repaired(row, setting)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            states = {name: network.state_dict() for name, network in networks.items()}
            torch.save({"key": same, "found": found, "left": left, "states": states}, file)
    return found | {name: accuracy(row.split, setting, network) for name, network in networks.items()}, networks


def _cut(setting: Setting, left: dict[str, list[int]], state: dict[str, Any]) -> nn.Module:
    """The network with these units of its layers, and these weights."""
    model = setting.make()
    graph = AxisGraph(model, setting.test[0][0][None].to(model_device(model)))
    for name, units in left.items():
        if gone := sorted(set(range(graph.groups[name].size)) - set(units)):
            remove_units(graph, graph.groups[name], gone, settled=True)
    model.load_state_dict(state)
    return model


def _pruned(row: Row, setting: Setting, **given: Any) -> tuple[singe_plugin.Result, dict[str, Any]]:
    """The network of a row, pruned in the rounds that all methods share, and how much went."""
    options = BASE | {"scoring_batch_count": row.batches}
    options |= {"nodes": 1} if row.batches > 1 else {}  # as the library does in rounds
    result = singe_plugin.prune(
        setting.make(), setting.train, target=row.target, scoring=scoring_of(row.method, options, setting.classes),
        seed=row.seed, pace=replace(pace_of(options), round_to=row.round_to), **given,
    )  # fmt: skip
    return result, {"removed_params": result.removed_params, "removed_macs": result.removed_macs}


def _pruned_and_repaired(
    row: Row, setting: Setting
) -> tuple[dict[str, Any], dict[str, list[int]], dict[str, nn.Module]]:
    """How it went, the units that are left, and the networks."""
    kept, start = Kept(), time.perf_counter()
    result, found = _pruned(row, setting, finetune=0, callbacks=[kept], repair=None)
    found |= {"pruning_seconds": time.perf_counter() - start, "pruned_on": environment()["device"]}
    torch.manual_seed(row.seed)
    loader = DataLoader(setting.train, 64, shuffle=True)
    left, repaired, original = kept.left(result), copy.deepcopy(result.model), setting.make()
    start = time.perf_counter()
    done = singe_plugin.repair(repaired, original, loader, row.images, kept=left, seed=row.seed)
    found |= {"repair_seconds": time.perf_counter() - start, "solved": len(done.better)}
    return found, left, {"pruned": result.model, "repaired": repaired}


def _finetuning(row: Row, setting: Setting, every: str) -> singe_plugin.FineTune:
    """The library's defaults, but for the rate and the teacher; on a GPU with the loss as a graph, in channels-last."""
    loader = DataLoader(setting.train, 128, shuffle=True, drop_last=True)
    teacher = setting.make() if row.distilled else None
    if teacher is not None and torch.cuda.is_available():
        teacher.to(memory_format=torch.channels_last)
    graph = graphed_loss(teacher=teacher)
    given = {"distill": teacher} if graph is None else {"step_fn": graph, "channels_last": True}
    return singe_plugin.FineTune(loader, row.steps, every, lr=row.lr, **given)


def _entwined(row: Row, setting: Setting) -> dict[str, Any]:
    tuning, mended = _finetuning(row, setting, "layer"), singe_plugin.Repair(row.images, every="round")
    result, found = _pruned(row, setting, finetune=tuning, repair=mended)
    return found | {"entwined": accuracy(row.split, setting, result.model)}


def wanted(args: argparse.Namespace) -> Iterator[Row]:
    for seed in args.seeds:
        for target in args.targets:
            for method in args.methods:
                steps = (args.steps, args.lr, args.distill) if args.steps else (0, 0.0, False)
                start = args.start if args.steps else "both"
                target_ = f"{args.kind}={target:g}"
                what = (args.network, method, target_, seed, args.images, *steps, args.split, args.batches, start)
                yield Row(*what, round_to=args.round_to)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    setting = load_setting(args.network, args.weights, args.data, args.test_images, args.size)
    about = {"data": setting.data, "weights": setting.weights, **environment()}
    rows = list(wanted(args))
    part, parts = args.part
    for number, row in enumerate(rows):
        if number % parts != part or row.key in {stored["key"] for stored in read(args.rows)}:
            continue
        start = time.perf_counter()
        try:
            found = compute(row, setting, args.models)
        except singe_plugin.SingeError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        found |= {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
        append(args.rows, {"key": row.key, **asdict(row), **found, **about})
        print(f"[{number + 1}/{len(rows)}] {row}: {found}", flush=True)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


HEADS = {
    "pruned": "as pruned", "repaired": "repaired", "tuned": "as pruned, fine-tuned",
    "repaired_tuned": "repaired, fine-tuned", "entwined": "in turns with pruning and repair",
}  # fmt: skip


def page(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown."""
    parts = [
        "# Repair\n",
        "`benchmarks/repair.py` wrote this page from `benchmarks/results/repair.jsonl`. Top-1 in percent, the mean and "
        "deviation over seeds; four rounds, ranks per cost. *As pruned* is the network right after the last removal; "
        "*repaired* is the same network with the layers behind solved again on unlabelled training images "
        "([usage](usage.md)). `fast` is `Scoring.fast()`. Widths are as they come, so that only criteria are compared; "
        "*in steps* they are multiples of 8 channels or less, which is the library's default for multiply-adds.\n",
        "## Without training\n",
        *_table([r for r in _untrained(rows) if r["split"] == "test"], ("pruned", "repaired")),
        "## Choices\n",
        "What the default criterion was chosen by: the same on 5,000 training images that neither scoring nor repair "
        f"saw (the networks were trained on them). `{FORMER}` is `obs` with a fixed ridge in the place of a shrunk "
        "matrix; its rows were computed before.\n",
        *_table([r for r in _untrained(rows) if r["split"] != "test"], ("pruned", "repaired")),
        "## Fine-tuned\n",
        "The same budget for all: batches of 128, one cosine, from the rate that is named. *Distilled* learns from the "
        'logits of the unpruned network (`FineTune(distill="unpruned")`), *labels* does not. *In turns* is fine-tuned '
        "for a quarter of the steps after each of the four rounds, and repaired before that.\n",
        *_table([r for r in rows if r["steps"]], ("pruned", "repaired", "tuned", "repaired_tuned", "entwined")),
    ]
    before = [f"{r['network']}, {r['data']}: {_cell([r['unpruned']])}" for r in rows if "unpruned" in r]
    parts.append(f"Unpruned: {'; '.join(before)}.\n")
    places = dict.fromkeys(place for r in rows for place in (r.get("pruned_on"), r["device"]) if place)
    parts.append(f"Computed on: {'; '.join(places)}; commits and seconds are in the rows.\n")
    return "\n".join(parts)


def _untrained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is known of the networks before any training; a row with fine-tuning has it, too."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted((r for r in rows if "repaired" in r), key=lambda r: bool(r["steps"])):
        names = ("network", "data", "split", "target", "method", "seed", "images", "batches", "round_to")
        found.setdefault(
            json.dumps([row.get(name, 1) for name in names]), row | {"steps": 0, "lr": 0.0, "distilled": False}
        )
    return list(found.values())


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """A table with a line for all seeds of what else is the same."""
    tuned = any(r["steps"] for r in rows)
    names = ["network, data", "removed", "criterion", "scored on", "seeds", "images", *(["steps"] if tuned else [])]
    lines = [
        "| " + " | ".join([*names, *(HEADS[c] for c in columns)]) + " |",
        "|" + "---|" * (len(names) + len(columns)),
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        what = ("network", "data", "split", "target", "method", "images", "steps", "lr", "distilled")
        groups.setdefault((*(r[name] for name in what), r.get("batches", 1), str(r.get("round_to", 1))), []).append(r)
    order = {method: place for place, method in enumerate((*METHODS, FORMER))}

    def place(group: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
        network, _, _, target, method, *_, distilled, batches, widths = group[0]
        return network, target, widths, -batches, distilled, order[method]

    for key, found in sorted(groups.items(), key=place):
        network, data, split, target, method, images, steps, lr, distilled, batches, widths = key
        where = f"{network}, {data}" + ("" if split == "test" else ", held-out")
        seeds = len({r["seed"] for r in found})
        removed = f"`{target}`" + ("" if widths == "1" else ", in steps")
        cells = [where, removed, method, f"{64 * batches} images", str(seeds), str(images)]
        cells += [f"{steps} at {lr:g}, {'distilled' if distilled else 'labels'}"] if tuned else []
        for column in columns:
            of_seed = {r["seed"]: r[column] for r in found if column in r}
            cells.append(_cell(list(of_seed.values())) + ("" if len(of_seed) in (0, seeds) else f" ({len(of_seed)})"))
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    asked = commands.add_parser("run", help="compute the rows that are missing")
    setting_options(asked)
    asked.add_argument("--kind", default="params", choices=("params", "macs"))
    asked.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    asked.add_argument("--methods", nargs="+", default=list(METHODS))
    asked.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked.add_argument("--images", type=int, default=512, help="to repair on")
    asked.add_argument("--steps", type=int, default=0, help="of fine-tuning in batches of 128")
    asked.add_argument("--lr", type=float, default=0.03)
    asked.add_argument("--distill", action="store_true", help="learn from the unpruned network")
    asked.add_argument("--start", default="both", choices=("both", "pruned", "repaired", "entwined"))
    asked.add_argument("--batches", type=int, default=1, help="of 64 images to score on")
    asked.add_argument("--round-to", default=1, type=read_step, help="1 for widths as they come, or auto")
    asked.add_argument("--models", type=Path, help="a folder that keeps what is pruned and repaired")
    asked.add_argument("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="every N-th row from I on")
    asked.add_argument("--split", default="test", choices=("test", "held_out"))
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--rows", type=Path, default=ROWS)
    commands.add_parser("write", help="the page from the stored rows")
    args = parser.parse_args()
    if args.action == "run":
        run(args)
    else:
        PAGE.write_text(page(read(ROWS)))


if __name__ == "__main__":
    main()
