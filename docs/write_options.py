"""Writes docs/options.md from the fields of the options' classes: ``python docs/write_options.py``."""

from __future__ import annotations

from pathlib import Path

from singe_plugin import Distill, FineTune, Pace, Recipe, Repair, Scoring, Timing
from singe_plugin.fields import table

HEAD = """# Options

Seven frozen dataclasses hold every option; each is defined once, in the class, and this page, the docstrings, the
keywords of `SInGEImportance`, the command's flags and what a run records are read off it
(`python docs/write_options.py` writes this page). Where `None` is the default, the text says what is decided then.
"""
INTROS = {
    Scoring: "How units are scored: `prune(..., scoring=Scoring(...))`, or the name of a criterion.",
    Pace: "In which order units go, how fast, and how far: `prune(..., pace=Pace(...))`, or the name of an order.",
    Repair: "How the survivors take over: `prune(..., repair=Repair(...))`, or a number of images; None is no repair.",
    FineTune: "How the network is fine-tuned in between: `prune(..., finetune=FineTune(...))`, or a number of steps.",
    Recipe: "What recipes of training add: `FineTune(recipe=Recipe(...))`.",
    Distill: "How fine-tuning learns from a teacher: `FineTune(distill=Distill(...))`, or the teacher; None is none.",
    Timing: "With what latency is measured: `prune(..., target=Target.parse('latency=0.3', Timing(...)))`.",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for cls, intro in INTROS.items():
        parts.append(f"## {cls.__name__}\n\n{intro}\n\n{table(cls)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(page())
