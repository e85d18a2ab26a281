"""What is drawn of a run: the paper's Figure 2, and what happened on the way, in a size that can be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from singe_plugin.loop.events import History
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import path_gradient_norms
from singe_plugin.method.units import UnitGroup

__all__ = ["Curves", "gradient_curves", "history_summary", "run_curves"]

MOST = 400
"""How many points of a loss are drawn at most; of more steps, each point is the mean of some."""


@dataclass(frozen=True)
class Curves:
    """One panel of Figure 2: the gradient norms of some units of a layer while the layer decays.

    Attributes:
        layer: its name.
        units: which units were drawn.
        norms: per unit, the decayed norms (x axis), largest first.
        grads: per unit, the gradient norms (y axis).
    """

    layer: str
    units: tuple[int, ...]
    norms: tuple[tuple[float, ...], ...]
    grads: tuple[tuple[float, ...], ...]


def gradient_curves(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batches: Iterable[Any],
    units: int = 5,
    seed: int = 0,
    mu: float = 0.8,
    p: float = 2,
) -> list[Curves]:
    r"""The data of the paper's Figure 2: :math:`\|\nabla_{\mu^sW^n}F\|_p` against :math:`\|\mu^sW^n\|_p`.

    Args:
        model: left as it was.
        groups: the layers to draw, one panel each.
        batches: what F is evaluated on.
        units: how many random units per layer.
        seed: of the choice of units.
        mu, p: of the path and the norms; the path is walked down to 1 % of the weights.

    Example:
        >>> from singe_plugin.method.units import Producer, Slot, UnitGroup
        >>> net, rows = torch.nn.Linear(2, 3), torch.arange(3)
        >>> group = UnitGroup("net", 3, (Producer("net", (Slot(net, "weight"),), rows, rows),))
        >>> batch = (torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> [len(c.units) for c in gradient_curves(net, [group], [batch], units=2)]
        [2]
    """
    options = Scoring(criterion="ig", p=p, mu=mu, quadrature="geometric")
    batches = list(batches)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group in groups:
        norms, grads = (t.detach().cpu().double() for t in path_gradient_norms(model, group, batches, options))
        chosen = sorted(torch.randperm(group.size, generator=generator)[:units].tolist())
        curve = [tuple(tuple(t[:, n].tolist()) for n in chosen) for t in (norms, grads)]
        found.append(Curves(group.name, tuple(chosen), curve[0], curve[1]))
    return found


def history_summary(history: History) -> dict[str, Any]:
    """A run in a few numbers.

    Example:
        >>> history = History([{"event": "removed", "layer": "a", "units": [1, 2], "left": 6}])
        >>> history_summary(history)["units_removed"]
        2
    """
    scored, steps, ended = (history.select(kind) for kind in ("layer_scored", "finetune_step", "run_end"))
    return {
        "layers_pruned": len(history.select("layer_done")),
        "scorings": len(scored),
        "seconds_scoring": sum(row["seconds"] for row in scored),
        "units_removed": sum(row.get("count", len(row["units"])) for row in history.select("removed")),
        "finetune_steps": len(steps),
        "first_loss": steps[0]["loss"] if steps else None,
        "last_loss": steps[-1]["loss"] if steps else None,
        "seconds": ended[-1]["seconds"] if ended else None,
    }


def run_curves(history: History, most: int = MOST) -> dict[str, Any]:
    """What happened on the way, as plain values.

    Returns:
        ``losses``, the mean loss of steps ``first`` to ``last`` of the fine-tuning, of at most ``most`` windows;
        ``removals``, how many units of how many layers went after how many steps; ``rounds``, what each round (layer)
        removed and what the network was judged at its end; ``repairs``, how many layers were solved again, and the
        median of their errors before and after.

    Example:
        >>> rows = [{"event": "removed", "layer": "a", "units": [1, 2], "left": 6}]
        >>> rows += [{"event": "finetune_step", "step": n, "loss": float(n), "lr": 0.1} for n in (1, 2, 3)]
        >>> found = run_curves(History(rows), most=2)
        >>> found["removals"]
        [{'step': 0, 'units': 2, 'layers': 1}]
        >>> found["losses"]
        [{'first': 1, 'last': 2, 'loss': 1.5}, {'first': 3, 'last': 3, 'loss': 3.0}]
    """
    losses: list[tuple[int, float]] = []
    removals: dict[int, dict[str, int]] = {}
    rounds: list[dict[str, Any]] = []
    repairs: list[dict[str, Any]] = []
    units = 0
    for row in history.rows:
        kind, step = row["event"], len(losses)
        if kind == "finetune_step":
            losses.append((row["step"], row["loss"]))
        elif kind == "removed" and (count := row.get("count", len(row["units"]))):
            mark = removals.setdefault(step, {"step": step, "units": 0, "layers": 0})
            mark["units"], mark["layers"], units = mark["units"] + count, mark["layers"] + 1, units + count
        elif kind == "evaluated":
            rounds.append({"step": step, "units": units, "values": row["values"]})
            units = 0
        elif kind == "round_done" or (kind == "layer_done" and units):
            if units or not rounds:
                rounds.append({"step": step, "units": units, "values": {}})
            units = 0
        elif kind == "repaired":
            solved = [s for s in row["layers"].values() if s["ridge"] is not None]
            errors = [median(s[which] for s in solved) if solved else None for which in ("before", "after")]
            repairs.append({"step": step, "solved": len(solved), "before": errors[0], "after": errors[1]})
    size = -(-len(losses) // most) or 1
    windows = [losses[start : start + size] for start in range(0, len(losses), size)]
    return {
        "losses": [{"first": w[0][0], "last": w[-1][0], "loss": fmean(loss for _, loss in w)} for w in windows],
        "removals": list(removals.values()),
        "rounds": rounds,
        "repairs": repairs,
    }
