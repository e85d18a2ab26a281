"""What the method costs, as ratios inside one run: to a plain pass, to what cannot be saved, to peers.

    python benchmarks/speed.py run [--only NAME ...]      # rows go to benchmarks/results/speed.jsonl
    python benchmarks/speed.py check                      # runs again; fails where a ratio is 20 % above the stored one
    python benchmarks/speed.py write                      # docs/performance.md from the stored rows

*Plain* is a forward and a backward pass of the whole network on one of the batches. The *floor* of a scoring is what
lies behind each layer, its input for free: per batch, node and layer one forward pass from the layer on and the
gradients down to the layer. Seconds are of the processor (what else the machine does is not counted), on one thread,
the median of some repetitions. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
from singe_plugin import Scoring
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.loop.pace import Pace
from singe_plugin.method.decay import substituted, touched
from singe_plugin.method.scoring import measuring, score_groups
from singe_plugin.method.timeline import Prefix, Timeline
from singe_plugin.method.units import UnitGroup

import outlook
from records import append, environment, read

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "speed.jsonl", HERE.parent / "docs" / "performance.md"
NETWORKS = ("resnet18", "resnet50", "mobilenetv2_100", "convnext_atto", "vit_tiny_patch16_224")
WORSE = 1.2  # of a stored ratio: a regression
Batch = tuple[Tensor, Tensor]


def network(name: str) -> nn.Module:
    """With random weights; scales that timm starts at zero are not, or nothing would get through some layers."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 and not bool(parameter.any()):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def batches_of(name: str, count: int, examples: int) -> list[Batch]:
    side = 224 if "vit" in name else 64
    return [(torch.randn(examples, 3, side, side), torch.randint(0, 10, (examples,))) for _ in range(count)]


def seconds(call: Callable[[], Any], times: int = 3) -> float:
    """Of the processor, the median; of several, once before that for nothing."""
    if times > 1:
        call()
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return median(found)


def plain(model: nn.Module, batch: Batch) -> float:
    def run() -> None:
        functional.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return seconds(run, 5)


def groups_of(model: nn.Module, batch: Batch) -> dict[str, UnitGroup]:
    return {name: group.unit_group() for name, group in AxisGraph(model, batch[0]).groups.items()}


def floor_of(model: nn.Module, groups: dict[str, UnitGroup], batch: Batch, nodes: int) -> float:
    """Forward passes from each layer on and the gradients down to it, with what is in front kept from before."""
    total = 0.0
    with measuring(model):
        model.requires_grad_(False)
        line = Timeline(model, lambda: model(batch[0]))
        for group in groups.values():
            prefix = Prefix(line)
            prefix.before(line.start(touched(group)))
            with substituted(group) as rows, prefix:
                leaves = [row.owner._parameters[row.attr] for row in rows]

                def one(leaves: list[Any] = leaves) -> None:
                    torch.autograd.grad(functional.cross_entropy(model(batch[0]), batch[1]), leaves, allow_unused=True)

                one()
                prefix.seal()
                total += nodes * seconds(one, 2)
    return total


def scoring_in_rounds(name: str, nodes: int) -> dict[str, Any]:
    model, batches = network(name), batches_of(name, 4, 16)
    groups = groups_of(model, batches[0])
    options = Scoring("ig_abs", nodes=nodes)
    took = seconds(lambda: score_groups(model, groups, batches, options), 1)
    floor, whole = 4 * floor_of(model, groups, batches[0], nodes), plain(model, batches[0])
    return {"layers": len(groups), "ratio": took / floor, "to": "floor", "plain": took / whole, "goal": 1.15}


def without_a_path(criterion: str) -> dict[str, Any]:
    model, batches = network("resnet50"), batches_of("resnet50", 1, 8)
    groups = groups_of(model, batches[0])
    took = seconds(lambda: score_groups(model, groups, batches, Scoring(criterion)))
    return {"layers": len(groups), "ratio": took / plain(model, batches[0]), "to": "plain", "goal": 3.0}


def magnitudes() -> dict[str, Any]:
    model = network("resnet101")
    groups = groups_of(model, batches_of("resnet101", 1, 2)[0])
    took = seconds(lambda: score_groups(model, groups, None, Scoring("l2")))
    fused = seconds(lambda: torch._foreach_norm(list(model.parameters())))
    return {"layers": len(groups), "ratio": took / fused, "to": "fused norm of every parameter", "goal": 2.0}


def whole_run(scoring: str | None, **options: Any) -> dict[str, Any]:
    """``prune`` of resnet50 at 64 px in batches of 2, without fine-tuning."""
    batches = batches_of("resnet50", 8, 2)
    model = network("resnet50")

    def run() -> None:
        given = {} if scoring is None else {"scoring": scoring}
        singe_plugin.prune(copy.deepcopy(model), batches, target="params=0.5", finetune=0, **given, **options)

    took = seconds(run, 1)
    return {"ratio": took / plain(model, batches[0]), "to": "plain", "goal": 150.0}


def beside_taylor() -> dict[str, Any]:
    """The whole run of :meth:`Scoring.fast` and of torch-pruning's Taylor, on as many batches, nothing verified."""
    batches, model = batches_of("resnet50", 16, 8), network("resnet50")

    def run(scoring: Any) -> float:
        def once() -> None:
            singe_plugin.prune(
                copy.deepcopy(model), batches, target="params=0.5", scoring=scoring, finetune=0, repair=None,
                pace=Pace(verify=False),
            )  # fmt: skip

        return seconds(once, 1)

    peer = Scoring(tp.importance.GroupTaylorImportance(), batches=16)
    return {"ratio": run(Scoring.fast()) / run(peer), "to": "the same with Taylor", "goal": 1.5}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"scoring in rounds, {n}": lambda n=n: scoring_in_rounds(n, 1) for n in NETWORKS},  # type: ignore[misc]
    "scoring in rounds, 5 nodes, resnet18": lambda: scoring_in_rounds("resnet18", 5),
    "grad of all layers, resnet50": lambda: without_a_path("grad"),
    "norm_grad of all layers, resnet50": lambda: without_a_path("norm_grad"),
    "l2 of all layers, resnet101": magnitudes,
    "prune, resnet50, the defaults": lambda: whole_run(None),
    "prune, resnet50, ig_abs, no repair": lambda: whole_run("ig_abs", repair=None),
    "prune, resnet50, Scoring.fast()": beside_taylor,
}


def computed(only: list[str] | None) -> Iterator[dict[str, Any]]:
    for name, case in CASES.items():
        if only is None or any(part in name for part in only):
            yield {"case": name, **case()}


def latest(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in rows}


def write(rows: list[dict[str, Any]]) -> None:
    """The page."""
    found = latest(rows)
    lines = [
        "# Performance", "",
        "`benchmarks/speed.py` wrote this page from `benchmarks/results/speed.jsonl`. Ratios inside one run, of "
        "processor seconds on one thread; weights are random, networks timm's, images 64 px (224 px for the "
        "transformer). *Plain* is a forward and a backward pass of the whole network on one batch; the *floor* of a "
        "scoring is what lies behind each layer, its input for free (four batches of 16).", "",
        "| what | ratio | to | goal | plain passes | layers |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in CASES:
        if (row := found.get(name)) is not None:
            passes = f"{row['plain']:.1f}" if "plain" in row else ""
            cells = [name, f"{row['ratio']:.2f}", row["to"], f"{row['goal']:g}", passes, str(row.get("layers", ""))]
            lines.append(f"| {' | '.join(cells)} |")
    about = sorted({(row["commit"], row["device"], row["versions"]) for row in found.values()})
    lines += ["", "Computed on: " + "; ".join(f"{device}, commit {commit}, {v}" for commit, device, v in about) + "."]
    lines += ["", *outlook.page()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "check", "write"))
    parser.add_argument("--only", nargs="+", help="parts of the names of cases")
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.what == "write":
        return write(read(args.rows))
    torch.set_num_threads(1)
    stored, worse = latest(read(args.rows)), []
    for row in computed(args.only):
        before = stored.get(row["case"], {}).get("ratio")
        print(
            f"{row['case']}: {row['ratio']:.2f} of {row['to']}" + (f" (stored {before:.2f})" if before else ""),
            flush=True,
        )
        if args.what == "run":
            append(args.rows, row | environment())
        elif before is not None and row["ratio"] > WORSE * before:
            worse.append(row["case"])
    if worse:
        raise SystemExit(f"slower by more than {WORSE - 1:.0%}: {', '.join(worse)}")
    return None


if __name__ == "__main__":
    main()
