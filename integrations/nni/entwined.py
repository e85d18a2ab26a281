"""Algorithm 1 inside the evaluator's own training loop: masks instead of removals, its optimizer and scheduler."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.costs import count_params
from singe_plugin.loop.events import FinetuneStep, Repaired
from singe_plugin.loop.loop import Loop, Pause
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.turns import in_layers

from .pieces import MaskedGroup
from .repairing import RepairingPruner
from .sparsity import kept_units, rule_of

__all__ = ["Entwined", "MaskHost"]

_logger = logging.getLogger("singe_plugin")


class MaskHost:
    """A host for :mod:`singe_plugin.loop.loop` that masks units in the place of removing them."""

    def __init__(self, pruner: RepairingPruner) -> None:
        self.pruner = pruner
        self.model: nn.Module = pruner.bound_model
        self.pieces: dict[str, MaskedGroup] = {piece.name: piece for piece in pruner.pieces}
        self.kept = {name: pruner.alive(piece) for name, piece in self.pieces.items()}

    def layers(self) -> list[GroupSpec]:
        return [GroupSpec(name, len(self.kept[name]), name) for name in self.pieces]

    def score(self, layers: Sequence[str]) -> dict[str, Tensor]:
        found = self.pruner.score([self.pieces[name] for name in layers], [self.kept[name] for name in layers])
        return dict(zip(layers, found, strict=True))

    def remove(self, layer: str, units: Sequence[int]) -> None:
        stays = torch.ones(len(self.kept[layer]), dtype=torch.bool)
        stays[list(units)] = False
        self.kept[layer] = self.kept[layer][stays]
        keep = []
        for name, piece in self.pieces.items():
            mine = torch.zeros(piece.size, dtype=torch.bool)
            mine[self.kept[name]] = True
            keep.append(mine)
        self.pruner.update_masks(self.pruner.masks_of(keep))

    def repair(self, last: bool) -> Repaired | None:
        return self.pruner.repair(last)

    def params(self) -> int:
        return count_params(self.model)


@dataclass(frozen=True)
class _Steps:
    """When the evaluator's loop trains on: see :class:`singe_plugin.loop.loop.Schedule`."""

    every: str
    steps: int


class Entwined:
    """Drives Algorithm 1 by the optimizer steps of somebody else's training loop.

    The first step gives the first batch to score on; the others are shared between the layers.
    """

    def __init__(self, pruner: RepairingPruner, evaluator: Any) -> None:
        self.pruner, self.evaluator = pruner, evaluator
        self.pauses: Iterator[Pause] | None = None
        self.left = self.step = 0
        self.finished = False
        self.schedule = _Steps(pruner.every, max(pruner.training_steps - 1, 0))

    def after_step(self) -> None:
        """Called after every optimizer step."""
        if self.finished:
            return
        if self.pauses is None:
            self._start()
        else:
            self.step += 1
            loss = self.pruner._collector.loss if self.pruner._collector is not None else float("nan")
            self.pruner.callback.on_finetune_step(FinetuneStep(self.step, self.schedule.steps, loss, self._rate()))
            self.left -= 1
        if self.left <= 0:
            self._advance()

    def _start(self) -> None:
        pruner = self.pruner
        assert pruner.pace is not None
        loop = Loop(MaskHost(pruner), Progress(self._plan()), self.schedule, pruner.callback)
        self.pauses = loop.pauses(in_layers(loop, pruner.pace))

    def _plan(self) -> dict[str, int]:
        """How many units of every piece will be masked; thresholds and global ratios need scores for that."""
        pruner, spaces = self.pruner, self.pruner._target_spaces
        rules = [rule_of(piece, spaces) for piece in pruner.pieces]
        if all(rule.threshold is None and rule.family is None for rule in rules):
            scores = [torch.zeros(piece.size) for piece in pruner.pieces]
        else:
            scores = pruner.scores_of(pruner.pieces)
        kept = kept_units(pruner.pieces, scores, spaces, pruner.min_width)
        return {
            piece.name: max(len(pruner.alive(piece)) - int(mine.sum()), 0)
            for piece, mine in zip(pruner.pieces, kept, strict=True)
        }

    def _advance(self) -> None:
        assert self.pauses is not None
        with self.pruner.all_or_nothing():
            pause = next(self.pauses, None)
        self.left, self.finished = (0, True) if pause is None else (pause.steps, False)

    def finish(self) -> None:
        """Mask what is still to be masked, if the loop ended early."""
        if self.finished:
            return
        if self.pauses is None:
            self._start()
        assert self.pauses is not None
        _logger.warning(
            "the training loop ended after %d of %d steps: what was not yet masked is masked without fine-tuning",
            self.step, self.schedule.steps,
        )  # fmt: skip
        while not self.finished:
            self._advance()

    def _rate(self) -> float:
        optimizers = getattr(self.evaluator, "_optimizers", None)
        return float(optimizers[0].param_groups[0]["lr"]) if optimizers else float("nan")
