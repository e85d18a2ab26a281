"""What NNI's pruner computes: one metric per block of every target, and the masks that follow from them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import TargetType
from nni.compression.pruning.tools import active_sparse_targets_filter
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph
from singe_plugin.errors import DataError
from singe_plugin.loop.events import Callbacks, LayerScored
from singe_plugin.loop.pace import Pace
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_groups
from singe_plugin.method.step import Batch, StepModel, as_it_is
from singe_plugin.method.units import subgroup
from singe_plugin.nested import call_model, to_device
from singe_plugin.run.guards import check_here
from singe_plugin.state import model_device, preserved

from .evaluators import BatchCollector, step_of
from .pieces import MaskedGroup, metric_shape
from .sparsity import Masks, kept_units, masks_from
from .view import plain_view

__all__ = ["ScoringPruner"]

_GONE = -1.0  # the metric of what is masked already: below every score


class ScoringPruner(Pruner):  # type: ignore[misc]
    """Scores pieces by SInGE's criteria where NNI asks for metrics; the constructor is :class:`SInGEPruner`'s.

    Attributes:
        pieces: what is masked together.
        scoring: how it is scored.
        batches: what is scored on, in the place of the batches of the evaluator's loop.
        min_width: how many units of every layer stay at least.
        callback: sees every event.
        graph: its groups, if they are known.
        training_steps, every, pace: when pruning is entwined with training, see the pruner.
    """

    pieces: list[MaskedGroup]
    scoring: Scoring
    batches: list[Any] | None
    min_width: int
    callback: Callbacks
    training_steps: int
    every: str
    pace: Pace | None
    graph: AxisGraph | None
    _own_objective: bool
    _collector: BatchCollector | None

    def _track_shapes(self) -> None:
        """Inputs and outputs that are masked along have no shape until something runs through the wrapped model."""
        open_spaces = [
            s for ts in self._target_spaces.values() for s in ts.values() if s.type is not TargetType.PARAMETER
        ]
        if open_spaces and self.graph is not None:
            with preserved(self.bound_model):
                self.bound_model.eval()
                call_model(self.track_forward, self.graph.inputs)
                shapes = [space.shape for space in open_spaces]
            for space, shape in zip(open_spaces, shapes, strict=True):
                space.shape = shape  # the one thing that is to be kept of that pass

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        held = {m: {t: s for t, s in ts.items() if s.target is not None} for m, ts in self._target_spaces.items()}
        found: dict[str, dict[str, Tensor]] = active_sparse_targets_filter(held)
        return found

    def _calculate_metrics(self, data: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """One metric per block of every target, ``[C, 1, 1, 1]`` for output channels; what is masked already has -1."""
        check_here()
        metrics: dict[str, dict[str, Tensor]] = {}
        wanted = [piece for piece in self.pieces if any(target in data.get(name, {}) for name, target in piece.members)]
        start = time.perf_counter()
        found = self.scores_of(wanted)
        took = (time.perf_counter() - start) / max(len(wanted), 1)
        for piece, scores in zip(wanted, found, strict=True):
            keys = [key for key in piece.members if key[1] in data.get(key[0], {})]
            alive = scores[scores != _GONE].cpu()
            if len(alive):
                self.callback.on_layer_scored(LayerScored(piece.name, alive, took))
            for module, target in keys:
                space = self._target_spaces[module][target]
                flat = piece.spread((module, target), scores, 0.0)
                mine = flat.view(metric_shape(space)).to(data[module][target].device)
                other = metrics.setdefault(module, {}).get(target)
                metrics[module][target] = mine if other is None else other + mine
        return metrics

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> Masks:
        pieces = [p for p in self.pieces if all(target in metrics.get(module, {}) for module, target in p.members)]
        scores = [piece.gathered(metrics) for piece in pieces]
        return masks_from(pieces, kept_units(pieces, scores, self._target_spaces, self.min_width), self._target_spaces)

    def masks_of(self, kept: list[Tensor]) -> Masks:
        """The masks that keep these units of every piece."""
        return masks_from(self.pieces, kept, self._target_spaces)

    def alive(self, piece: MaskedGroup) -> Tensor:
        """The units of a piece that are not masked, in order."""
        left = torch.zeros(piece.size, dtype=torch.bool)
        for (module, target), labels in piece.members.items():
            space = self._target_spaces[module][target]
            if space.mask is None:
                return torch.arange(piece.size)
            shape = metric_shape(space)
            mask = space.mask.detach()
            if mask.numel() != len(labels):
                blocks = [part for size, full in zip(shape, mask.shape, strict=True) for part in (size, full // size)]
                mask = mask.reshape(blocks).amax(dim=list(range(1, 2 * len(shape), 2)))
            flat = mask.flatten().cpu() != 0
            left[labels[(labels >= 0) & flat]] = True
        return left.nonzero().flatten()

    def scores_of(self, pieces: Sequence[MaskedGroup]) -> list[Tensor]:
        """One score per unit of every piece, -1 for units that are masked already."""
        alive = [self.alive(piece) for piece in pieces]
        result = []
        for piece, units, found in zip(pieces, alive, self.score(pieces, alive), strict=True):
            scores = torch.full((piece.size,), _GONE, dtype=found.dtype, device=found.device)
            scores[units.to(found.device)] = found
            result.append(scores)
        return result

    def score(self, pieces: Sequence[MaskedGroup], units: Sequence[Tensor]) -> list[Tensor]:
        """One score for each of some units of every piece: all of them together, in as few passes as that takes."""
        found = [list[Tensor]() for _ in pieces]
        with ExitStack() as stack:
            seen: Any = None
            for by_weights in (False, True):  # F does not depend on an auxiliary head
                groups = {
                    f"{number}.{place}": source if len(mine) == piece.size else subgroup(source, mine)
                    for number, (piece, mine) in enumerate(zip(pieces, units, strict=True))
                    if piece.by_weights == by_weights and len(mine)
                    for place, source in enumerate(piece.sources)
                }
                if not groups:
                    continue
                seen = seen or stack.enter_context(self._scored_model())
                model, batches, options = seen
                usual = replace(options, criterion="l2") if by_weights else options
                for name, scores in score_groups(model, groups, batches, usual).items():
                    found[int(name.partition(".")[0])].append(scores)
        return [torch.stack(mine).mean(0) if mine else torch.zeros(0) for mine in found]

    @contextmanager
    def _scored_model(self) -> Iterator[tuple[nn.Module, Any, Scoring]]:
        """The model in its plain view, the batches and the options, with F as it was asked for."""
        if self.batches is not None:
            batches: list[Any] | None = self.batches
        else:
            batches = None if self._collector is None else list(self._collector.batches)
        if self.scoring.rule.needs_gradient and not batches:
            raise DataError("no batch has been seen: the evaluator's training loop must run before anything is scored")
        step = None if self._own_objective or self.evaluator is None else step_of(self.evaluator)
        with plain_view(self.bound_model):
            if step is None:
                yield self.bound_model, batches, self.scoring
                return
            device, last = model_device(self.bound_model), self.scoring.channels_last
            as_in_training = self.batches is None and not last
            moved = (b if as_in_training else to_device(b, device, last) for b in batches or ())
            wrapped = [((Batch(batch),), None) for batch in moved]
            yield StepModel(self.bound_model, step), wrapped, replace(self.scoring, objective=as_it_is)
