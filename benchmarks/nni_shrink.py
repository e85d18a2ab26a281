"""Shrinking masked models: ours beside NNI's ModelSpeedup, on the same masks, one process per model and method.

    python benchmarks/nni_shrink.py run             # resumable: a finished row is not run again
    python benchmarks/nni_shrink.py table           # docs/nni.md from the rows

Masks: half of the output channels of every convolution and linear layer but the classifier, by their l2 norm, coupled
and with the norms masked along. The difference is the largest one to the masked model's outputs on noise, relative to
their size; batch-norm statistics and affine parameters are random. Seconds are those of one core, for the shrinking
step alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from records import append, commit, read

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "nni_shrink.jsonl", HERE.parent / "docs" / "nni.md"
MODELS = (
    "plain_cnn", "resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224",
    "regnetx_002", "densenet121", "swin_tiny_patch4_window7_224",
)  # fmt: skip
METHODS = {
    "ours": "`shrink`",
    "ours_norms": "`shrink(allow_norms=True)`",
    "nni": "`ModelSpeedup`",
    "nni_fx": "`ModelSpeedup(graph_module=symbolic_trace(model))`",
}
NORMS = ("convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")


def build(name: str) -> tuple[Any, Any, list[str]]:
    """A model with random statistics, an input, and the names of its classifiers."""
    import timm
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "plain_cnn":
        model: Any = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip
        heads, size = ["11"], (3, 32, 32)
    else:
        model = timm.create_model(name)
        given = model.default_cfg["classifier"]
        heads, size = [given] if isinstance(given, str) else list(given), model.default_cfg["input_size"]
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
                module.weight.uniform_(0.5, 1.5)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.2)
    return model.eval(), torch.randn(1, *size), heads


def masked_copy(model: Any, masks: Any) -> Any:
    """The masked model, by multiplying."""
    made = copy.deepcopy(model)
    for name, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                parameter = getattr(made.get_submodule(name), target)
                parameter.data = parameter.data * mask
    return made


def one(name: str, method: str) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    from singe_plugin.integrations.nni import SInGEPruner
    from singe_plugin.shrink import shrink_with_report

    torch.set_num_threads(1)
    model, x, heads = build(name)
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": heads, "sparse_ratio": 0.5}]
    pruner = SInGEPruner(model, config, scoring="l2", example_inputs=x)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    reference, noise = masked_copy(model, masks), torch.randn(2, *x.shape[1:])
    with torch.no_grad():
        expected = reference(noise)
    params = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"still": None}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if method.startswith("ours"):
        result = shrink_with_report(model, masks, x, allow_norms=method == "ours_norms")
        row["still"] = len(result.still_masked)
    else:
        from nni.compression.speedup import ModelSpeedup

        graph = {"graph_module": torch.fx.symbolic_trace(model)} if method == "nni_fx" else {}
        model = ModelSpeedup(model, x, masks, **graph).speedup_model()
    row["seconds"] = time.process_time() - start
    row["extra_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with torch.no_grad():
        made = model.eval()(noise)
    row["left"] = sum(p.numel() for p in model.parameters()) / params
    row["difference"] = float((made - expected).abs().max() / expected.abs().max())
    return row


def run(limit: int, only: list[str]) -> None:
    done = {(row["model"], row["method"]) for row in read(ROWS)}
    jobs = [(m, k) for m in only or MODELS for k in METHODS if k != "ours_norms" or m in NORMS]
    now = commit()
    for name, method in [job for job in jobs if job not in done]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "one", name, method]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
            lines = process.stdout.strip().splitlines()
            row = json.loads(lines[-1]) if process.returncode == 0 else {"error": _last(process.stderr)}
        except subprocess.TimeoutExpired:
            row = {"error": f"no answer in {limit} s"}
        row |= {"model": name, "method": method, "commit": now,
                "machine": f"{platform.machine()}, 1 thread, CPU",
                "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "timm", "nni"))}  # fmt: skip
        append(ROWS, row)
        print(name, method, {k: v for k, v in row.items() if k not in ("machine", "versions")}, flush=True)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:200]


def table() -> None:
    """Write the rows into the page, between its two marks."""
    found = {(row["model"], row["method"]): row for row in read(ROWS)}
    lines = ["| model | method | works | parameters left | difference from the masked model | seconds (one core) "
        "| more memory (MB) | still masked (layers) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (name, method), row in sorted(
        found.items(), key=lambda r: (MODELS.index(r[0][0]), list(METHODS).index(r[0][1]))
    ):
        if "error" in row:
            lines.append(f"| {name} | {METHODS[method]} | **no** | | | | | {row['error'].replace('|', '/')} |")
            continue
        still = "" if row["still"] is None else str(row["still"])
        cells = [name, METHODS[method], "yes", f"{100 * row['left']:.1f} %", f"{row['difference']:.1e}",
                 f"{row['seconds']:.1f}", f"{row['extra_mb']:.0f}", still]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    some = next(iter(found.values()))
    commits = ", ".join(sorted({row["commit"] for row in found.values()}))
    head = [
        f"`python benchmarks/nni_shrink.py run`, {some['versions']}; {some['machine']}; commits {commits}; seed 0.",
        "",
    ]
    text = PAGE.read_text()
    start, end = text.index("<!-- table -->"), text.index("<!-- end of table -->")
    PAGE.write_text(text[:start] + "<!-- table -->\n" + "\n".join([*head, *lines]) + "\n" + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "one", "table"))
    parser.add_argument("rest", nargs="*", help="for run: models; for one: model and method")
    parser.add_argument("--limit", type=int, default=600, help="seconds per row")
    args = parser.parse_intermixed_args()
    if args.command == "one":
        print(json.dumps(one(*args.rest)))
    elif args.command == "run":
        run(args.limit, args.rest)
    else:
        table()


if __name__ == "__main__":
    main()
