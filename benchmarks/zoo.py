"""Models that people own beyond timm's: what can be pruned of them, and whether it is right and still whole.

    python benchmarks/zoo.py run                 # resumable: a finished row is not run again
    python benchmarks/zoo.py run --again NAME    # after a change
    python benchmarks/zoo.py run --fast          # the subset that CI runs; ends with an error if a row is bad
    python benchmarks/zoo.py table               # docs/models.md from the rows

The libraries are not among this package's extras; a row whose library is not installed says so. One process a model, on
one thread. Rows are appended to ``benchmarks/results/zoo.jsonl``.

*Share* is the part of the parameters that belongs to a unit of a verified group. *Right*: with half of the units gone
(magnitudes choose), the network computes in double precision what the original does with the activations of those
channels masked, which of them is read off a copy whose elements are their own positions; where an operator mixes
channels in a way that the masked reference does not know, permuting the units of all groups at once leaves the outputs
as they were. *Whole*: outputs of the same form, gradients for all parameters that had some, a second pruning, and a
state that a fresh copy of the pruned network loads.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from records import alone, append, on_a_cpu, peak_mb, read

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "zoo.jsonl", HERE.parent / "docs" / "models.md"
FLOOR, SECONDS = 0.8, 30.0  # what is asked of the share, and of building and verifying


def one(name: str) -> dict[str, Any]:
    """Run the checks on one model, in this process."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import torch
    from zoo_models import MODELS

    torch.set_num_threads(1)
    entry = MODELS[name]
    row: dict[str, Any] = {"model": name, "library": entry.library}
    try:
        row["version"] = version(entry.library)
    except PackageNotFoundError:
        return row | {"missing": True}
    return row | check(entry)


def check(entry: Any) -> dict[str, Any]:
    """Share, right and whole of one model."""
    import torch
    import torch_pruning as tp
    from backbones import mixes, outputs, permutation, prunable_share

    from singe_plugin import Pace, SInGEPruner
    from singe_plugin.axes.grouped import PlainGroups
    from singe_plugin.axes.substitutes import double_inputs, in_double, random_inputs
    from singe_plugin.nested import relative_change

    from masking import Masked

    torch.manual_seed(0)
    model, inputs = entry.make().eval(), entry.inputs()

    def gradients(net: Any) -> set[str]:
        """The parameters that get a gradient. What modules keep of a pass has no graph afterwards: it can be copied."""
        net.zero_grad(set_to_none=True)
        made = [t for t in outputs(net, inputs) if t.requires_grad]
        if made:
            torch.stack([t.float().square().mean() for t in made]).sum().backward()
        found = {key for key, p in net.named_parameters() if p.grad is not None}
        net.zero_grad(set_to_none=True)
        with torch.no_grad():
            outputs(net, inputs)
        return found

    count = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        shapes = [t.ndim for t in outputs(model, inputs)]
    had = gradients(model)
    row: dict[str, Any] = {"params": count, "right": [], "whole": []}
    masked = Masked(model)
    start = time.process_time()
    pruner = SInGEPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, iterative_steps=1, ema=masked.tags
    )
    row["seconds"] = round(time.process_time() - start, 2)
    graph = pruner.graph
    row |= {"groups": len(graph.groups), "share": round(prunable_share(graph), 4), "left": {}}
    for reason in graph.left_whole.values():
        row["left"][reason] = row["left"].get(reason, 0) + 1
    known = not mixes(graph) and not graph.computed  # the reference would mask what a weight is computed from
    if not known:
        row["permuted"], tolerance = best(lambda double: permutation(graph, inputs, double=double))
        if not row["permuted"] < tolerance:
            row["right"].append(f"permuting all units changes the outputs by {row['permuted']:.2g}")
    pruner.step()
    row["removed"] = round(1 - sum(p.numel() for p in model.parameters()) / count, 4)
    if known:
        reference, given = masked.model(), random_inputs(inputs, 3)

        def masked_apart(double: bool) -> float:
            with torch.no_grad(), ExitStack() as stack:
                if double:
                    for part in (in_double(model), in_double(reference), PlainGroups()):
                        stack.enter_context(part)
                x = double_inputs(given) if double else given
                return float(relative_change(outputs(reference, x), outputs(model, x)))

        row["masked"], tolerance = best(masked_apart)
        if not row["masked"] < tolerance:
            row["right"].append(f"pruned and masked differ by {row['masked']:.2g}")
    with torch.no_grad():
        made = outputs(model, inputs)
    if [t.ndim for t in made] != shapes or not all(bool(torch.isfinite(t).all()) for t in made):
        row["whole"].append("the outputs have another form, or are not finite")
    if missing := had - gradients(model):
        row["whole"].append(f"{len(missing)} parameters have no gradient, e.g. {sorted(missing)[0]}")
    twin, held = copy.deepcopy(model), io.BytesIO()
    torch.save(model.state_dict(), held)
    for tensor in twin.state_dict().values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            torch.nn.init.zeros_(tensor)
    twin.load_state_dict(torch.load(io.BytesIO(held.getvalue()), weights_only=True))
    with torch.no_grad():
        if not all(torch.equal(a, b) for a, b in zip(made, outputs(twin, inputs), strict=True)):
            row["whole"].append("a copy that loads its state computes something else")
    pace = Pace(verify=row["seconds"] < 20)
    SInGEPruner(model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.25, pace=pace).step()
    with torch.no_grad():
        if [t.ndim for t in outputs(model, inputs)] != shapes:
            row["whole"].append("a second pruning changes the form of the outputs")
    return row | {"peak_mb": round(peak_mb())}


def best(apart: Callable[[bool], float]) -> tuple[float, float]:
    """How far two computations are apart, in double precision where the model runs so, and what is asked of that."""
    try:
        return apart(True), 1e-6
    except RuntimeError as error:
        if "scalar type" not in str(error) and "dtype" not in str(error):
            raise
        return apart(False), 1e-4


def run(args: argparse.Namespace) -> None:
    from zoo_models import MODELS

    done = {row["model"] for row in read(ROWS) if not row.get("missing")}
    names = [n for n, entry in MODELS.items() if entry.fast] if args.fast else list(MODELS)
    wanted = [n for n in names if not args.only or n in args.only]
    todo = wanted if args.again or args.fast else [n for n in wanted if n not in done]
    bad = 0
    for number, name in enumerate(todo):
        start = time.perf_counter()
        row = {"model": name} | alone(__file__, (name,), args.limit)
        row |= {"library": MODELS[name].library, "wall": round(time.perf_counter() - start, 1)}
        row |= on_a_cpu("torch", "torch-pruning")
        if not args.fast:
            append(ROWS, row)
        bad += bool(row.get("error") or row.get("right") or row.get("whole"))
        print(f"[{number + 1}/{len(todo)}] {name}: {verdict(row)}", flush=True)
    if args.fast and bad:
        raise SystemExit(f"{bad} rows are not right and whole")


def verdict(row: dict[str, Any]) -> str:
    if row.get("missing"):
        return f"{row['library']} is not installed"
    if "error" in row:
        return f"error: {row['error']}"
    faults = [*(f"wrong: {f}" for f in row["right"]), *row["whole"]]
    return f"share {row['share']:.3f}, removed {row['removed']:.3f}, {row['seconds']:.1f} s" + (
        f"; {'; '.join(faults)}" if faults else ""
    )


def table() -> None:
    """Write docs/models.md."""
    from zoo_models import MODELS

    found = {row["model"]: row for row in read(ROWS) if row["model"] in MODELS and not row.get("missing")}
    rows = [found[name] for name in MODELS if name in found]
    good = [row for row in rows if "error" not in row]
    right, whole = (sum(not row[key] for row in good) for key in ("right", "whole"))
    share = sum(row["share"] >= FLOOR for row in good)
    libraries = len({row["library"] for row in rows})
    slow = sum(row["seconds"] > SECONDS for row in good)
    lines = [
        "# Models beyond timm", "",
        "`benchmarks/zoo.py` wrote this page from `benchmarks/results/zoo.jsonl`: models of many libraries, built "
        "small from "
        "their configurations with random weights, and pruned by half of the units of every group. What *share*, "
        "*right* and *whole* mean is said at the top of that file; seconds are of one core, for the groups and their "
        "verification. timm's families have [a page of their own](backbones.md).", "",
        f"{len(rows)} models of {libraries} libraries: {right} right, {whole} whole, {share} with a share of "
        f"{FLOOR:.0%} or more, {len(good) - slow} within {SECONDS:.0f} s, {len(rows) - len(good)} that "
        "failed.", "",
        "| library | model | K params | share | removed | right | whole | s | MiB | left whole, for the most part |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['library']} | {row['model']} | | | | | | | | failed: {row['error'].replace('|', '/')} |"
            )
            continue
        reasons = {k: v for k, v in row["left"].items() if k != "it reaches the model's output"}
        most = sorted(reasons.items(), key=lambda item: -item[1])[:2]
        said = "; ".join([*row["right"], *row["whole"], *(f"{count}: {reason}" for reason, count in most)])
        lines.append(
            f"| {row['library']} {row['version']} | {row['model']} | {row['params'] / 1e3:,.0f} | {row['share']:.0%} | "
            f"{row['removed']:.0%} | {'no' if row['right'] else 'yes'} | {'no' if row['whole'] else 'yes'} | "
            f"{row['seconds']:.1f} | {row['peak_mb']} | {said.replace('|', '/')} |"
        )
    about = sorted({(row["commit"], row["machine"], row["versions"]) for row in rows})
    lines += ["", "Computed on: " + "; ".join(f"{m}, commit {c}, {v}" for c, m, v in about) + "."]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "table"))
    parser.add_argument("only", nargs="*", help="names of models")
    parser.add_argument("--again", action="store_true", help="run finished rows again; the last row of a model counts")
    parser.add_argument("--fast", action="store_true", help="the subset of CI; nothing is stored")
    parser.add_argument("--limit", type=int, default=400, help="seconds per model")
    args = parser.parse_intermixed_args()
    if args.what == "one":
        print(json.dumps(one(args.only[0])))
    elif args.what == "run":
        run(args)
    else:
        table()


if __name__ == "__main__":
    main()
