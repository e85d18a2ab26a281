"""``docs/results.md`` from the stored rows: every number on the page comes through here."""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from singe_plugin.app.curves import Curves
from singe_plugin.tables import markdown_table

from cells import (
    PAPER_BATCH,
    Row,
    Rows,
    cell,
    common_batch,
    macs_gone,
    measured,
    on_cpu,
    one_shot_cell,
    scoring_seconds,
    values,
)
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
    RATE,
    RATED,
    RATES,
)
from headline import first_sentence, repaired
from records import read

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"

NAMES = {
    "l1": "magnitude, L1 (Eq. 1)", "l2": "magnitude, L2 (Eq. 1)", "grad": "gradient (Eq. 2)",
    "norm_grad": "magnitude x gradient (Eq. 3)", "sg": "SG: summed gradients (§3.2)", "ig": "IG: SInGE (Eq. 5)",
    "ig_abs": "IG, inner product (ours)", "random": "TP Random", "magnitude_l1": "TP Magnitude, L1",
    "magnitude_l2": "TP Magnitude, L2", "bn_scale": "TP BNScale", "lamp": "TP LAMP", "fpgm": "TP FPGM",
    "taylor": "TP Taylor", "hessian": "TP Hessian", "obdc": "TP OBD-C",
}  # fmt: skip
PAPER_TABLE_1 = {  # NeurIPS 2022, Table 1: CIFAR-10, ResNet-56, baseline 93.46
    "l1": ("42.01", "19.14", "10.00"), "l2": ("42.35", "19.13", "10.00"), "grad": ("77.68", "28.31", "10.00"),
    "norm_grad": ("92.36", "90.28", "10.00"), "sg": ("93.01", "91.90", "77.20"), "ig": ("93.23", "92.80", "85.38"),
}  # fmt: skip
PAPER_TABLE_2 = {  # Table 2: (target, schedule, steps)
    (0.85, "post", 1000): "92.59", (0.85, "layer", 1000): "93.18", (0.85, "post", 2000): "92.66",
    (0.85, "layer", 2000): "93.25", (0.85, "post", 5000): "93.13", (0.85, "layer", 5000): "93.31",
    (0.9, "post", 1000): "77.2", (0.9, "layer", 1000): "85.38", (0.9, "post", 2000): "80.89",
    (0.9, "layer", 2000): "87.52", (0.9, "post", 5000): "86.39", (0.9, "layer", 5000): "90.02",
}  # fmt: skip
TRAINED = ("resnet56_from_scratch", "resnet56_converged", "mobilenetv2_035")  # what benchmarks/train.py printed
PEER_PASSES = {"taylor": "1 a round", "hessian": "1 forward a round, backward 1 an image", "obdc": "1 a round"}
INTEGRATED = ("sg", "ig", "ig_abs")
SCHEDULES = {"post": "after pruning", "layer": "entwined, per layer", "removal": "entwined, per removal"}


def by_target(rows: Rows, network: str, methods: Sequence[str], targets: Sequence[float], steps: int) -> str:
    """Methods by targets: right after pruning, and fine-tuned."""
    header = ["criterion"]
    for target in targets:
        header += [f"-{target:.0%}", f"-{target:.0%}, {steps:,} steps"]
    lines = []
    for method in methods:
        line = [NAMES[method]]
        for target in targets:
            line.append(one_shot_cell(rows.at_once(network, method, target), method))
            line.append(cell(rows.tuned(network, method, target, steps), "tuned"))
        lines.append(line)
    return markdown_table(header, lines)


def table_1(rows: Rows) -> str:
    """The paper's order beside the paper's numbers."""
    targets = (0.75, 0.85, 0.9)
    lines = []
    for method in OURS:
        line = [NAMES[method]]
        for number, target in enumerate(targets):
            found = rows.at_once("resnet56", method, target, LAYERS)
            paper = PAPER_TABLE_1[method][number] if method in PAPER_TABLE_1 else "-"
            tuned = rows.tuned("resnet56", method, target, 1000, LAYERS)
            line += [one_shot_cell(found, method), cell(tuned, "tuned"), paper]
        lines.append(line)
    header = [f"-{t:.0%}{what}" for t in targets for what in ("", ", 1,000 steps", " [paper]")]
    return markdown_table(["criterion", *header], lines)


def rounds(rows: Rows) -> str:
    return by_target(rows, "resnet56", OURS, (0.5, 0.75, 0.85, 0.9), 1000)


def table_2(rows: Rows) -> str:
    lines = []
    for target in (0.85, 0.9):
        for steps in (1000, 2000, 5000):
            line = [f"-{target:.0%}", f"{steps:,}"]
            for every in SCHEDULES:
                found = rows.of(network="resnet56", method="ig", target=target, every=every, steps=steps, split="test")
                found = [r for r in found if r["options"].get("order") == "layers"]
                paper = PAPER_TABLE_2.get((target, every, steps))
                line.append(cell(found, "tuned") + (f" [{paper}]" if paper else ""))
            lines.append(line)
    return markdown_table(["parameters", "steps", *SCHEDULES.values()], lines)


def table_3(rows: Rows) -> str:
    """The largest of the targets that were run whose mean accuracy is there."""
    base = baseline(rows, "resnet56")
    lines = []
    for method in (*OURS, *PEERS):
        found = {t: rows.tuned("resnet56", method, t, 1000) for t in (0.2, 0.3, 0.4, 0.5, 0.75, 0.85, 0.9)}
        found = {t: mine for t, mine in found.items() if values(mine, "tuned")}
        if base is None or not found:
            continue
        line = [NAMES[method], ", ".join(f"-{t:.0%}: {cell(mine, 'tuned')}" for t, mine in found.items())]
        for drop in (0, 2):
            reached = [t for t, mine in found.items() if statistics.mean(values(mine, "tuned")) >= base - drop]
            line.append(f"-{max(reached):.0%}" if reached else "none of these")
        lines.append(line)
    return markdown_table(["criterion", "what was run", "baseline - 0", "baseline - 2 points"], lines)


def weights(rows: Rows) -> str:
    columns = [(0.8, None), (0.9, None), (0.95, None), (0.98, None), (0.5, "2:4")]
    names = {"l1": "magnitude, global", "norm_grad": "magnitude x gradient", "ig": "IG: SInGE"}
    lines = []
    for count in (1, 4):
        for method, name in names.items():
            if count == 4 and method in DATA_FREE:
                continue  # magnitudes do not change between rounds
            line = [name if count == 1 else f"{name}, {count} rounds"]
            for target, pattern in columns:
                found = [r for r in rows.of(network="resnet56", method=method, target=target, split="test",
                                            granularity="weight")
                         if r["options"].get("pattern") == pattern and r["options"].get("rounds") == count]  # fmt: skip
                line.append("-" if pattern and count == 4 else one_shot_cell(found, method))
            lines.append(line)
    return markdown_table(["criterion", *[p or f"{t:.0%} masked" for t, p in columns]], lines)


def peers(rows: Rows) -> str:
    """Every criterion in both orders right after pruning, and fine-tuned."""
    lines = []
    for method in (*OURS, *PEERS):
        line = [NAMES[method]]
        for target in PEER_TARGETS:
            line.append(one_shot_cell(rows.at_once("resnet56", method, target, LAYERS), method))
            line.append(one_shot_cell(rows.at_once("resnet56", method, target), method))
            line.append(cell(rows.tuned("resnet56", method, target, 1000), "tuned"))
            line.append(cell(rows.between("resnet56", method, target), "tuned"))
        lines.append(line)
    stages = ("layers", "rounds", "rounds, 1,000 steps after", "8 rounds, 1,000 steps between")
    header = [f"-{t:.0%}: {stage}" for t in PEER_TARGETS for stage in stages]
    return markdown_table(["criterion", *header], lines)


def more_data(rows: Rows) -> str:
    """Scoring on one batch and on several: what it brings and what it costs."""
    lines = []
    for network, targets in NETWORKS.items():
        for target in targets:
            for method, options in MORE_DATA.items():
                words = ", ".join(f"{k}={v}" for k, v in options.items())
                line = [network, f"-{target:.0%}", f"{NAMES[method]}: {words}"]
                seconds = []
                for given in ({}, options):
                    found = rows.at_once(network, method, target, given)
                    line += [cell(found, "pruned"), cell(rows.tuned(network, method, target, 1000, given), "tuned")]
                    took = scoring_seconds(found)
                    seconds.append(f"{took:.0f}" if took is not None else "?")
                lines.append([*line, " / ".join(seconds)])
    header = [f"{data}{when}" for data in ("one batch", "more data") for when in ("", ", 1,000 steps")]
    return markdown_table(["network", "parameters", "criterion", *header, "scoring (s)"], lines)


def widths(rows: Rows) -> str:
    """How many units of each layer one criterion removes, and which ones another; one batch size."""
    asked = [(target, other) for target in (0.9, 0.75) for other in CROSSED]
    tuned = {
        (target, other, method): rows.tuned("resnet56", method, target, 1000, options)
        for target, other in asked
        for method, options in CROSSED[other].items()
    }
    batch = common_batch(tuned.values())
    lines = []
    for target, other in asked:
        line = [f"-{target:.0%}", NAMES[other]]
        for method, options in CROSSED[other].items():
            line.append(cell(rows.at_once("resnet56", method, target, options), "pruned"))
            line.append(cell(tuned[target, other, method], "tuned", batch))
        lines.append(line)
    units = next(iter(CROSSED.values()))
    header = [f"units of {NAMES[method]}{when}" for method in units for when in ("", ", 1,000 steps")]
    return markdown_table(["parameters", "widths of", *header], lines)


def lead(rows: Rows) -> str:
    """The best integrated criterion against the best peer, each in its better setting, by mean over three seeds."""
    lines = []
    for network, targets in NETWORKS.items():
        for target in targets:
            for stage, batch in (("pruned", None), ("tuned", PAPER_BATCH), ("tuned", 32)):
                ours, others = (best(rows, network, methods, target, stage, batch) for methods in (INTEGRATED, PEERS))
                if ours and others:
                    when = f"after 1,000 steps of {batch}" if batch else "right after pruning"
                    lines.append([network, f"-{target:.0%}", when, ours[1], f"{ours[0]:.1f}", others[1],
                                  f"{others[0]:.1f}", f"{ours[0] - others[0]:+.1f}",
                                  f"{ours[2]:.0%} / {others[2]:.0%}"])  # fmt: skip
    header = ["network", "parameters", "when", "ours", "top-1", "best peer", "top-1", "lead", "MACs gone"]
    return markdown_table(header, lines)


def best(
    rows: Rows, network: str, methods: Iterable[str], target: float, stage: str, batch: int | None = None
) -> tuple[float, str, float] | None:
    """The best mean of those with three seeds (one where no data is read), whose it is, and the MACs that went."""
    found = []
    for method in methods:
        for name, mine in (
            ("rounds", rows.at_once(network, method, target)),
            ("8 rounds", rows.between(network, method, target)),
            ("layers", rows.at_once(network, method, target, LAYERS)),
            ("more data", rows.at_once(network, method, target, MORE_DATA[method]) if method in MORE_DATA else []),
        ):
            of_length = [row for row in mine if stage == "pruned" or row["steps"] == 1000]
            seen = measured(of_length, stage, batch)
            if len(seen) >= 3 or (seen and method in DATA_FREE and stage == "pruned"):
                macs = statistics.mean(row["removed_macs"] for row in seen)
                found.append((statistics.mean(100 * row[stage] for row in seen), f"{NAMES[method]}, {name}", macs))
    return max(found, default=None)


def cost(rows: Rows) -> str:
    """The criterion's cost: seconds of scoring, passes, and the multiply-adds that went along."""
    lines = []
    for method in (*OURS, *PEERS):
        found = rows.at_once("resnet56", method, 0.75)
        seconds = scoring_seconds(found)
        if seconds is not None:
            passes = found[0].get("passes_per_scoring")
            said = PEER_PASSES.get(method, "none") if passes is None else f"{passes} a layer and round"
            macs = []
            for target in (0.9, 0.75, 0.5):
                macs.append(macs_gone(rows.at_once("resnet56", method, target)))
            lines.append([NAMES[method], f"{seconds:.1f}", said, *macs])
    gone_at = [f"MACs gone at -{target:.0%}" for target in (0.9, 0.75, 0.5)]
    header = ["criterion", "scoring in 4 rounds (s)", "forward and backward passes", *gone_at]
    return markdown_table(header, lines)


def ablation(rows: Rows) -> str:
    """One choice a line, on held-out images."""
    found = rows.of(network="resnet56", split="held_out", granularity="channel", steps=0)
    found = sorted((row for row in found if row["method"] != "none"), key=lambda r: (r["method"], bool(r["options"])))
    seeds, lines = {row["seed"] for row in found}, []
    for name in dict.fromkeys(option_name(row) for row in found):
        mine = [row for row in found if option_name(row) == name]
        line = [name]
        for target in (0.5, 0.75):
            at = [row for row in mine if row["target"] == target]
            text = cell(at, "pruned") if at else ""
            line.append(text.replace(" (1 seed)", "") if len(seeds) == 1 else text)
        seconds = [row["scoring_seconds"] for row in mine if "scoring_seconds" in row and row["target"] == 0.5]
        lines.append([*line, f"{statistics.median(seconds):.0f}" if seconds else ""])
    table = markdown_table(["choice", "top-1 at -50%", "top-1 at -75%", "scoring at -50% (s)"], lines)
    return f"All of one seed.\n\n{table}" if len(seeds) == 1 else table


def ablation_tuned(rows: Rows) -> str:
    """One choice a line, before and after fine-tuning, on held-out images."""
    found = rows.of(network="resnet56", split="held_out", granularity="channel", steps=1000, target=0.9)
    found = [row for row in found if "lr" not in row["options"]]
    lines = []
    for name in sorted({option_name(row) for row in found}):
        mine = [row for row in found if option_name(row) == name]
        lines.append([name, cell(mine, "pruned"), cell(mine, "tuned"), macs_gone(mine)])
    return markdown_table(["choice", "top-1 at -90%", "top-1 at -90%, 1,000 steps", "MACs gone"], lines)


def rates(rows: Rows) -> str:
    """Learning rates of the fine-tuning, on held-out images."""
    lines = []
    for name, (method, target, every, options) in RATED.items():
        line = [f"{NAMES[method]}, {name.removesuffix(', less')}", f"-{target:.0%}"]
        for lr in sorted(RATES):
            found = rows.of(network="resnet56", split="held_out", method=method, target=target, every=every, steps=1000,
                            options={**options, "lr": lr})  # fmt: skip
            line.append(cell(found, "tuned"))
        lines.append(line)
    return markdown_table(["1,000 steps", "parameters", *[f"lr {lr:g}" for lr in sorted(RATES)]], lines)


def higher_rate(rows: Rows) -> str:
    """The leads, and entwined against after pruning, at two learning rates; one batch size."""
    found = [
        [rows.of(network="resnet56", split="test", granularity="channel", method=method, target=target, every=every,
                 steps=1000, options=options | rate) for rate in ({}, {"lr": HIGHER_RATE})]
        for method, target, every, options in COMPARED
    ]  # fmt: skip
    batch = common_batch([higher for _, higher in found])
    lines = []
    for (method, target, every, options), both in zip(COMPARED, found, strict=True):
        how = f"layers, {SCHEDULES[every]}" if options == LAYERS else "rounds"
        lines.append([f"-{target:.0%}", NAMES[method], how, *[cell(mine, "tuned", batch) for mine in both]])
    return markdown_table(["parameters", "criterion", "how", f"lr {RATE:g}", f"lr {HIGHER_RATE:g}"], lines)


def option_name(row: Row) -> str:
    """A row of the ablation in words."""
    options = ", ".join(f"{k}={v}" for k, v in row["options"].items()) or "base"
    return f"{row['method']}: {options}"


def depthwise(rows: Rows) -> str:
    return by_target(rows, "mobilenetv2_035", (*OURS, *PEERS), DEPTHWISE_TARGETS, 1000)


def baseline(rows: Rows, network: str) -> float | None:
    found = values(rows.of(network=network, method="none", split="test"), "pruned")
    return found[0] if found else None


def devices(rows: Rows) -> str:
    """The same rows on the CPU and on a GPU: how far apart they are right after pruning."""
    pairs: dict[tuple[str, float, bool], dict[str, dict[bool, float]]] = {}
    for row in rows.of(split="test", granularity="channel", every="post"):
        if "pruned" in row and row["method"] != "none":
            group = (row["network"], row["target"], row["method"] in DATA_FREE)
            same = json.dumps([row["method"], row["options"], row["seed"]], sort_keys=True)
            pairs.setdefault(group, {}).setdefault(same, {}).setdefault(on_cpu(row), 100 * row["pruned"])
    lines = []
    for (network, target, data_free), found in sorted(pairs.items()):
        apart = [abs(both[True] - both[False]) for both in found.values() if len(both) == 2]
        if apart:
            reads = "magnitudes" if data_free else "gradients"
            lines.append([network, f"-{target:.0%}", reads, str(len(apart)), f"{statistics.mean(apart):.1f}",
                          f"{max(apart):.1f}"])  # fmt: skip
    header = ["network", "parameters", "criteria of", "rows on both", "points apart: mean", "largest"]
    return markdown_table(header, lines)


def networks(rows: Rows) -> str:
    """How the networks that were trained here were trained, by their records beside the rows."""
    lines = []
    for name in TRAINED:
        found = json.loads((HERE / "results" / f"{name}.json").read_text())
        start = found.get("start") or "random weights"
        lines.append([found["network"], found["weights"], start, f"{found['steps']:,}", f"{100 * found['test']:.2f}",
                      f"{100 * found['held_out']:.2f}", f"{found['seconds']:.0f}", found["device"],
                      f"`{found['command']}`"])  # fmt: skip
    header = ["network", "weights", "from", "steps", "test top-1", "held-out top-1", "seconds", "device", "command"]
    return markdown_table(header, lines)


def source(rows: Rows) -> str:
    """Where the rows come from."""
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows.rows):
        mine = rows.of(network=network)
        said = {k: ", ".join(sorted({row[k] for row in mine})) for k in ("data", "device", "versions", "commit")}
        batches = ", ".join(str(b) for b in sorted({row["batch"] for row in mine if row["steps"]}))
        weights = ", ".join(sorted({row["weights"] for row in mine if row.get("weights")}))  # older rows do not say
        base = baseline(rows, network)
        before = "not run" if base is None else f"{base:.2f} %"
        lines.append(
            f"- {network}: {len(mine)} rows, {said['data']}; accuracy before pruning {before}; {said['device']}; "
            f"{said['versions']}; commits {said['commit']}"
            + (f"; fine-tuning batches of {batches}" if batches else "")
            + (f"; weights {weights}" if weights else "")
        )
    return "\n".join(lines)


PARTS: dict[str, Callable[[Rows], str]] = {
    "main": first_sentence, "repaired": repaired,
    "source": source, "networks": networks, "devices": devices, "lead": lead, "more data": more_data,
    "table 1": table_1, "rounds": rounds, "table 2": table_2, "table 3": table_3, "weights": weights, "peers": peers,
    "cost": cost, "ablation": ablation, "depthwise": depthwise, "widths": widths, "ablation tuned": ablation_tuned,
    "rates": rates, "higher rate": higher_rate,
}  # fmt: skip


def write(path: Path, page: Path = PAGE) -> None:
    """Put the parts between their marks, and draw the plots beside the page."""
    rows, text = Rows(read(path)), page.read_text()
    for name, part in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{page.name} has no place for {name!r}: it needs the lines {start.strip()} and {end}")
        text = f"{before}{start}{part(rows)}\n{end}{after}"
    page.write_text(text)
    draw(rows, page.parent)


def draw(rows: Rows, folder: Path) -> None:
    """``results_one_shot.svg``: accuracy right after pruning; ``results_figure_2.svg``: the paper's Figure 2."""
    figures = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib").rcParams["svg.hashsalt"] = "singe_plugin"  # the same file every time
    figure = figures.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in (*OURS, *PEERS):
        points = [(t, values(rows.at_once("resnet56", method, t), "pruned")) for t in (0.3, 0.5, 0.75, 0.85, 0.9)]
        shown = [(100 * t, statistics.mean(v)) for t, v in points if v]
        if shown:
            axes.plot(*zip(*shown), marker=".", label=NAMES[method], ls="-" if method in OURS else "--")
    axes.set_xlabel("parameters removed (%)")
    axes.set_ylabel("top-1 right after pruning (%)")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(folder / "results_one_shot.svg", metadata={"Date": None})
    curves = read(HERE / "results" / "figure_2.jsonl")
    if curves:
        draw_curves = importlib.import_module("singe_plugin.app.plots").draw_curves
        figure = figures.Figure(figsize=(9, 4), layout="constrained")
        draw_curves(figure, [Curves(**panel) for panel in curves[-1]["panels"]])
        figure.savefig(folder / "results_figure_2.svg", metadata={"Date": None})
