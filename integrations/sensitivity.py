"""``singe_plugin.sensitivity``: how much worse a network gets when units of one layer alone go."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.axes import Snapshot, remove_units
from singe_plugin.checks import is_number
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.fields import as_options, describe, to_plain
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.loop import lowest
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.watch import measured_by
from singe_plugin.method.options import Scoring
from singe_plugin.run.sensitivity import LayerSensitivity, Sensitivity, SensitivityPoint, loss_and_accuracy
from singe_plugin.run.staging import Stage, as_judge, fingerprints, set_stage

from .prune import what_scores
from .torch_pruning.host import TorchPruningHost, block_of
from .torch_pruning.importance import SInGEImportance
from .torch_pruning.pruner import SInGEPruner

__all__ = ["RATIOS", "sensitivity"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_logger = logging.getLogger("singe_plugin")
Told = Callable[[str, SensitivityPoint, int, int], None]


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    ratios: Sequence[float] = RATIOS,
    scoring: Scoring | str | Callable[..., Any] | None = None,
    val_data: Any = None,
    repair: Repair | int | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    heads: str = "dims",
    verify: bool = True,
    example_inputs: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    resume: bool = False,
    on_point: Told | None = None,
) -> Sensitivity:
    """Measure how much worse a network gets when 10, 20, ... 90 % of the units of one layer go, for every layer.

    Units are scored once, all layers together. Of one layer after the other the least relevant units are taken out,
    the network is judged in one pass over the data, and they are put back. Taking units out is what masking them is,
    with norms over the channels that are left: the groups are verified for that, as :func:`singe_plugin.prune` does.

    Args:
        model: left exactly as it was: the same objects with the same content, whatever happens.
        data: a dataset, a DataLoader, or a list of batches ``(inputs, targets)``. A few batches are scored on
            (``Scoring(batches=, batch_size=)``).
        ratios: fractions of a layer's units, inside ]0, 1[.
        scoring: a :class:`~singe_plugin.Scoring`, the name of a criterion, or any torch-pruning importance.
        val_data: what the network is judged on, for F and the top-1 accuracy: a dataset or batches. None is the batches
            that are scored on. A function of the model that returns a number or a dictionary of numbers judges it
            beside F on these.
        repair: a :class:`~singe_plugin.Repair`, or a number of images: the layers that read what is gone are solved
            again before each judgement. None leaves them.
        ignored_layers: modules or names of layers that stay whole, with what is inside of them.
        heads: what goes of attention, see :class:`~singe_plugin.Pace`.
        verify: whether every group is proved first.
        example_inputs: in the place of two examples from the data.
        device: where to run; None is the CUDA device that the model is on, else CUDA when there is one, else the CPU.
        seed: of everything random; the caller's random state is left alone.
        path: a JSON file that every point is written to when it is there.
        resume: keep the points that ``path`` has, if it is there; new ratios are added to them.
        on_point: is called with the layer's name, its point, how many points are done, and how many there are in all.

    Returns:
        the curves; :meth:`~singe_plugin.run.sensitivity.Sensitivity.ratios` makes a pace of them.

    Raises:
        ConfigError: for arguments that cannot mean anything.
        ArtifactError: if what ``path`` has is of another model, other data or other options.
        BudgetError: if no layer can be pruned.

    Example:
        >>> import torch, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> found = singe_plugin.sensitivity(net, batches, ratios=[0.25, 0.5])
        >>> [(layer.name, [point.removed for point in layer.points]) for layer in found.layers]
        [('0', [4, 8])]
        >>> pace = singe_plugin.Pace(ratios=found.ratios(max_drop=0.1, measure="loss"))
    """
    asked = sorted({_ratio(ratio) for ratio in ratios})
    if not asked:
        raise ConfigError("ratios is empty; give fractions of a layer's units, e.g. [0.25, 0.5, 0.75]")
    if resume and path is None:
        raise ConfigError("resume=True needs path, the file of the run to continue")
    judge = as_judge(val_data)
    if judge is not None and judge.every != "end":
        raise ConfigError("every= and max_drop= of Evaluate are for a run; give max_drop to Sensitivity.ratios instead")
    mended = None if repair is None else as_options(Repair, repair, "repair", "images")
    pace = Pace("layers", heads=heads, verify=verify)
    settled, importance = what_scores(
        as_options(Scoring, scoring, "scoring", "criterion"), Pace().settle(), bool(mended)
    )
    options = {
        "scoring": describe(settled), "repair": None if mended is None else describe(mended), "heads": heads,
        "seed": seed, "judge": None if judge is None else judge.describe()["by"],
    }  # fmt: skip
    with set_stage(
        model, data, scoring=settled, finetune=FineTune(steps=0), val_data=judge, example_inputs=example_inputs,
        device=device, seed=seed, images=0 if mended is None else mended.images,
    ) as stage:  # fmt: skip
        if isinstance(importance, SInGEImportance) and importance.model is None:
            importance = copy(importance).bind(model, stage.batches)  # the user's stays free
        pruner = SInGEPruner(
            model, stage.example, importance, pace=pace, batches=stage.batches, ignored_layers=ignored_layers
        )
        pruner.counted = stage.counted
        if mended is not None:
            pruner.repair_with(mended, stage.images, seed)
        pruner.objective = settled.objective or "loss"
        work = _Work(model, pruner, stage, settled, path)
        blank = Sensitivity(
            _plain(work.judged()), tuple(LayerSensitivity(s.name, block_of(s.name), s.units) for s in work.specs),
            dict(pruner.left_whole), to_plain(options), fingerprints(model, stage), False,
        )  # fmt: skip
        return work.carry_on(_continued(blank, path) if resume else blank, asked, on_point)


def _ratio(value: Any) -> float:
    if not is_number(value) or not 0 < value < 1:
        raise ConfigError(f"ratios must be inside ]0, 1[, got {value!r}")
    return float(value)


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _continued(blank: Sensitivity, path: str | Path | None) -> Sensitivity:
    """What an earlier run has found, if it was of the same.

    Raises:
        ArtifactError: if it was not.
    """
    if path is None or not Path(path).exists():
        return blank
    found = Sensitivity.load(path)
    mine, theirs = ({**f.options, **f.fingerprint, "nothing removed": f.whole} for f in (blank, found))
    different = [key for key in mine if mine[key] != theirs.get(key)]
    layers = [[(row.name, row.units) for row in f.layers] for f in (blank, found)]
    if different or layers[0] != layers[1]:
        what = ", ".join(different) or "layers"
        raise ArtifactError(
            f"{path} holds curves of another run ({what} differ); give another path, or leave resume out to begin anew"
        )
    return replace(found, finished=False)


class _Work:
    """Takes units out of one layer after the other, judges, and puts them back."""

    def __init__(
        self, model: nn.Module, pruner: SInGEPruner, stage: Stage, scoring: Scoring, path: str | Path | None
    ) -> None:
        self.model, self.pruner, self.stage, self.scoring, self.path = model, pruner, stage, scoring, path
        self.host: TorchPruningHost = pruner.host()
        self.specs: list[GroupSpec] = self.host.layers()

    def carry_on(self, found: Sensitivity, asked: Sequence[float], on_point: Told | None) -> Sensitivity:
        """Add what is missing, point by point."""
        there = {layer.name: {point.ratio for point in layer.points} for layer in found.layers}
        missing = {spec: [r for r in asked if r not in there[spec.name]] for spec in self.specs}
        total, done = len(asked) * len(self.specs), 0
        scores = self.host.score([spec.name for spec in self.specs]) if any(missing.values()) else {}
        for number, (spec, ratios) in enumerate(missing.items()):
            done += len(asked) - len(ratios)
            known = {0: found.whole}
            for ratio in ratios:
                count = self.host.allowed({spec.name: spec.units - spec.kept_for(spec.units * (1 - ratio))})[spec.name]
                if count not in known:
                    known[count] = self.without(spec.name, lowest(spec.name, scores[spec.name], count).tolist())
                point, done = SensitivityPoint(ratio, count, dict(known[count])), done + 1
                found = found.with_point(spec.name, point)
                self._write(found)
                if on_point is not None:
                    on_point(spec.name, point, done, total)
            if ratios:
                _logger.info("%d/%d %s: %d points", number + 1, len(missing), spec.name, len(ratios))
        found = replace(found, finished=True)
        self._write(found)
        return found

    def without(self, layer: str, units: list[int]) -> dict[str, float | None]:
        """What the network without some units of a layer is worth; they are put back."""
        unpruned = self.host.unpruned
        undo = Snapshot(self.model, self.pruner.graph, values=unpruned is not None)
        try:
            remove_units(self.pruner.graph, self.pruner.graph.groups[layer], units, undo=False)
            if unpruned is not None:
                unpruned.removed()
                unpruned.repair(True, [])
            return _plain(self.judged())
        finally:
            undo.restore()

    def judged(self) -> dict[str, float]:
        """What the network is worth as it is."""
        judge, batches = self.stage.judge, self.stage.validation
        loss, accuracy = loss_and_accuracy(self.model, self.stage.batches if batches is None else batches, self.scoring)
        own = measured_by(judge.by, self.model) if judge is not None and judge.is_function else {}
        return {"loss": loss} | ({} if accuracy is None else {"accuracy": accuracy}) | own

    def _write(self, found: Sensitivity) -> None:
        if self.path is not None:
            found.save(self.path)
