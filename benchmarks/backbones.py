"""The sweep over timm's (and torchvision's) backbones: every check of ``tests/backbones.py``, one process per model.

    python benchmarks/backbones.py models           # which models: the two smallest of every timm module
    python benchmarks/backbones.py run              # resumable: a finished row is not run again
    python benchmarks/backbones.py run --again NAME  # after a change
    python benchmarks/backbones.py table            # docs/backbones.md from the rows

Rows are appended to ``benchmarks/results/backbones.jsonl``; times are of one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from records import alone, append, on_a_cpu, read

HERE = Path(__file__).parent
MODELS, ROWS = HERE / "results" / "backbone_models.json", HERE / "results" / "backbones.jsonl"
PAGE = HERE.parent / "docs" / "backbones.md"
TORCHVISION = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16",
    "densenet121", "googlenet", "shufflenet_v2_x0_5", "regnet_x_400mf", "regnet_y_400mf",
)  # fmt: skip
ATTENTION = frozenset(
    {
        "beit", "byoanet", "cait", "coat", "convit", "cpubone", "crossvit", "csatv2", "davit", "deepseek_vit", "deit",
        "edgenext", "efficientformer", "efficientformer_v2", "efficientvim", "efficientvit_mit", "efficientvit_msra",
        "eva", "fastvit", "focalnet", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "iformer", "levit", "lowformer",
        "mambaout", "maxxvit", "metaformer", "mlp_mixer", "mobilenetv5", "mobilevit", "mvitv2", "naflexvit", "nest",
        "nextvit", "pit", "pvt_v2", "qwen3_vit", "sequencer", "shvit", "swiftformer", "swin_transformer",
        "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer", "vision_transformer",
        "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
        "vit_b_16", "swin_t",
    }
)  # fmt: skip
"""Attention, mixer, hybrid and state-space families: a share of 80 % is asked of them, of the others 90 %."""


def find_models() -> dict[str, list[str]]:
    """The two smallest models of every timm module, and its smallest ``test_`` model."""
    import timm
    import torch

    found: dict[str, list[str]] = {}
    for module in timm.list_modules():
        sizes = []
        for name in timm.list_models(module=module):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            sizes.append((sum(p.numel() for p in model.parameters()), name))
        real = [name for _, name in sorted(sizes) if not name.startswith("test_")]
        test = [name for _, name in sorted(sizes) if name.startswith("test_")]
        found[module] = [*test[:1], *real[:2]]
        print(module, found[module], flush=True)
    return found


def jobs() -> list[tuple[str, str]]:
    models = json.loads(MODELS.read_text())
    first = [(f"timm:{family}", names[0]) for family, names in models.items() if names]
    rest = [(f"timm:{family}", name) for family, names in models.items() for name in names[1:]]
    return [*first, *(("torchvision", name) for name in TORCHVISION), *rest]


def one(source: str, name: str) -> dict[str, Any]:
    """Run the checks on one model, in this process."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import torch
    from backbones import check

    from singe_plugin import Builder

    torch.set_num_threads(1)
    if source == "torchvision":
        import torchvision

        row = check(
            name, lambda: torchvision.models.get_model(name, weights=None), None, (3, 224, 224), scoring_seconds=30
        )
    else:
        import timm

        size = timm.create_model(name).default_cfg["input_size"]
        row = check(name, lambda: timm.create_model(name), Builder.timm(name), size, scoring_seconds=30)
    return row.as_dict()


def run(args: argparse.Namespace) -> None:
    done = set() if args.again else {(row["source"], row["model"]) for row in read(ROWS)}
    if args.again and not args.only:
        raise SystemExit("--again needs the names of the models to run again")
    todo = [job for job in jobs() if job not in done and (not args.only or any(o in job[1] for o in args.only))]
    todo = todo[args.part :: args.parts]
    for number, (source, name) in enumerate(todo):
        start = time.perf_counter()
        row = {"model": name} | alone(__file__, (source, name), args.limit)
        row |= {"source": source, "wall": round(time.perf_counter() - start, 1)}
        row |= on_a_cpu("torch", "timm", "torchvision", "torch-pruning")
        append(ROWS, row)
        print(f"[{number + 1}/{len(todo)}] {name}: {verdict(row)} {row['wall']} s", flush=True)


def verdict(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"error: {row['error']}"
    faults = [*(f"wrong: {f}" for f in row["right"]), *row["whole"]]
    return f"share {row['share']:.3f}, removed {row['removed']:.3f}, {row['seconds']:.1f} s" + (
        f", {'; '.join(faults)}" if faults else ""
    )


def table() -> None:
    """Write the rows into the page, between its two marks."""
    found = {(row["source"], row["model"]): row for row in read(ROWS)}
    order = [job for job in jobs() if job in found]
    first = dict(reversed(jobs()))
    lines, counts = [], dict.fromkeys(("families", "right", "whole", "worth", "fast", "all"), 0)
    for source, name in order:
        row = found[source, name]
        family = source.removeprefix("timm:")
        if "error" in row:
            lines.append(f"| {family} | {name} | | no | no | | | | | {row['error']} |")
            good = dict.fromkeys(("right", "whole", "worth", "fast"), False)
        else:
            floor = 0.8 if family in ATTENTION or name in ATTENTION else 0.9
            limit = 20 if row["params"] < 30e6 else 60
            good = {
                "right": not row["right"], "whole": not row["whole"], "worth": row["share"] >= floor,
                "fast": row["seconds"] <= limit,
            }  # fmt: skip
            note = "; ".join([*row["right"], *row["whole"]]) or left_whole(row)
            says = [("yes" if good[k] else "**no**") for k in ("right", "whole")]
            cells = [
                family, name, f"{row['params'] / 1e6:.1f}", *says,
                f"{100 * row['share']:.0f} %{'' if good['worth'] else ' **(low)**'}", f"{100 * row['removed']:.0f} %",
                f"{row['seconds']:.1f}{'' if good['fast'] else ' **(slow)**'}", row["scored"], note.replace("|", "/"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        if source != "torchvision" and first[source] == name:
            counts["families"] += 1
            for key, value in good.items():
                counts[key] += value
            counts["all"] += all(good.values())
    commits = ", ".join(sorted({found[job]["commit"] for job in order}))
    some = found[order[0]]
    versions = " and ".join(sorted({found[job]["versions"] for job in order}))
    head = [
        f"Of {counts['families']} timm families (first row of each): {counts['right']} right, {counts['whole']} whole, "
        f"{counts['worth']} worth it, {counts['fast']} fast, {counts['all']} all four. {len(order)} models in all. "
        f"Not run: {', '.join(name for job in first.items() if job not in found for name in job[1:]) or 'none'} of the "
        f"smallest, {sum(job not in found for job in jobs())} of all {len(jobs())} that the sweep lists.",
        "",
        f"`python benchmarks/backbones.py run`, {versions}; {some['machine']}; commits {commits}; seed 0.",
        "",
        "| family | model | M params | right | whole | share | removed | seconds | scored | left whole |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    text = PAGE.read_text()
    start, end = text.index("<!-- table -->"), text.index("<!-- end of table -->")
    PAGE.write_text(text[:start] + "<!-- table -->\n" + "\n".join([*head, *lines]) + "\n" + text[end:])


def left_whole(row: dict[str, Any]) -> str:
    reasons = {k: v for k, v in row["left"].items() if k != "it reaches the model's output"}
    return "; ".join(f"{count}: {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1])[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("models", "run", "one", "table"))
    parser.add_argument("rest", nargs="*", help="for run: parts of model names; for one: source and name")
    parser.add_argument("--again", action="store_true", help="run named models again; their last row counts")
    parser.add_argument("--limit", type=int, default=900, help="seconds per model")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1, help="share the models between processes")
    args = parser.parse_intermixed_args()
    args.only = args.rest
    if args.command == "models":
        MODELS.write_text(json.dumps(find_models(), indent=1) + "\n")
    elif args.command == "one":
        print(json.dumps(one(*args.rest)))
    elif args.command == "run":
        run(args)
    else:
        table()


if __name__ == "__main__":
    main()
