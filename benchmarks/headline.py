"""The main result of ``docs/results.md``: its first sentence and the table below it, from the rows of the repair."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from singe_plugin.app.report import markdown_table

from cells import Row, Rows, cell, values
from records import read

__all__ = ["first_sentence", "repaired"]

STORED = Path(__file__).parent / "results" / "repair.jsonl"
FORMER = "obs_fixed"  # the default's former form, which was fine-tuned
SAID = {"resnet56": "ResNet-56", "tf_efficientnet_lite0": "efficientnet_lite0"}
COUNTED = {"params": "parameters", "macs": "multiply-adds"}


def _default(stored: list[Row]) -> list[Row]:
    """Rows of the default: its criterion on 256 images and its widths, on test images, before any training."""
    rows = [r for r in stored if r["method"] == "obs" and r["split"] == "test" and r["batches"] == 4 and not r["steps"]]
    return [r for r in rows if r.get("round_to", 1) == ("auto" if r["target"].startswith("macs") else 1)]


def _settings(stored: list[Row]) -> list[tuple[str, str]]:
    return sorted({(r["network"], r["target"]) for r in _default(stored)})


def _before(stored: list[Row], network: str) -> float:
    return next(100 * r["unpruned"] for r in stored if r["network"] == network and "unpruned" in r)


def first_sentence(_: Rows) -> str:
    """What is kept without training, of every network at the targets that were measured."""
    stored = read(STORED)
    said: dict[tuple[str, str], list[str]] = {}
    for network, target in _settings(stored):
        found = [r for r in _default(stored) if (r["network"], r["target"]) == (network, target)]
        kind, _, share = target.partition("=")
        kept = values(found, "repaired")
        said.setdefault((network, kind), []).append(f"**{mean(kept):.1f} %** with {100 * float(share):.0f}")
    networks = [
        f"{SAID[network]} ({_before(stored, network):.1f} % top-1) keeps {', '.join(kept[:-1])} and {kept[-1]} % of "
        f"its {COUNTED[kind]} gone"
        for (network, kind), kept in said.items()
    ]
    images = {r["images"] for r in _default(stored)}
    return (
        f"Pruned by the defaults and repaired on {'/'.join(map(str, sorted(images)))} images without their labels, "
        f"with no training at all, {'; '.join(networks)}."
    )


def repaired(_: Rows) -> str:
    """Right after pruning, repaired, and fine-tuned from there."""
    stored = read(STORED)
    lines = []
    for network, target in _settings(stored):
        found = [r for r in _default(stored) if (r["network"], r["target"]) == (network, target)]
        tuned = [
            r for r in stored
            if (r["network"], r["target"], r["method"]) == (network, target, FORMER) and r.get("start") == "repaired"
        ]  # fmt: skip
        steps = ", ".join(sorted({f"{r['steps']:,} steps at {r['lr']:g}" for r in tuned}))
        after = f"{cell(tuned, 'repaired_tuned')} * ({steps})" if tuned else "not run"
        lines.append([
            f"{SAID[network]}, {found[0]['data']}", f"`{target}`", f"{_before(stored, network):.1f}",
            cell(found, "pruned"), cell(found, "repaired"), after,
        ])  # fmt: skip
    header = ["network, data", "removed", "unpruned", "as pruned", "repaired, no training", "distilled from there"]
    return markdown_table(header, lines)
