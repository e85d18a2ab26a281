"""Options by the names of their fields, sorted into the objects that own them: what tests vary one by one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from singe_plugin import FineTune, Pace, Scoring

__all__ = ["asked"]

SCORING, PACE, FINETUNE = ({f.name for f in fields(cls)} for cls in (Scoring, Pace, FineTune))


def asked(**options: Any) -> dict[str, Any]:
    """Keywords of ``prune`` and of the pruners: fields of Scoring, Pace and FineTune in their objects, the rest alone.

    A name that two of them have is Scoring's; ``finetune_steps`` is FineTune's ``steps``, a ``pattern`` a part of the
    sparsity, and batches that are no number are a pruner's own. Beside an importance, what only a criterion has is left
    out.
    """
    if callable(options.get("criterion")):
        options = {name: value for name, value in options.items() if name not in ("nodes", "mu")}
    if (pattern := options.pop("pattern", None)) is not None:
        options["sparsity"] = pattern, options.get("sparsity")
    found: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"scoring": {}, "pace": {}, "finetune": {}}
    for name, value in options.items():
        if name == "finetune_steps":
            parts["finetune"]["steps"] = value
        elif name in SCORING and not (name == "batches" and not isinstance(value, int)):
            parts["scoring"][name] = value
        elif name in PACE:
            parts["pace"][name] = value
        elif name in FINETUNE:
            parts["finetune"][name] = value
        else:
            found[name] = value
    for name, cls in (("scoring", Scoring), ("pace", Pace), ("finetune", FineTune)):
        if parts[name]:
            assert name not in found, f"{name} and its fields {sorted(parts[name])}"
            found[name] = cls(**parts[name])
    return found
