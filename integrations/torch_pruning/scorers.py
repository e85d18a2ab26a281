"""Any torch-pruning importance as what ranks the units.

The loop is criterion-agnostic. What differs between importances is what they need beforehand: Taylor needs
gradients, Hessian needs them per sample, OBD-C needs its hooks; SInGE and the magnitudes need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.errors import DataError, GroupError, ScoringError, SingeError
from singe_plugin.method.batches import inputs_for, read
from singe_plugin.method.objective import ObjectiveLike, check_head, check_logits, get_objective
from singe_plugin.method.step import Batch, BatchObjective, StepModel, as_it_is, check_form
from singe_plugin.nested import call_model, to_device
from singe_plugin.ranks import current
from singe_plugin.state import model_device, plain_layers, preserved

from .graph import GroupView

__all__ = ["Ranking", "needs_data"]

_TAYLOR = tp.importance.GroupTaylorImportance
_HESSIAN = tp.importance.GroupHessianImportance
_OBDC = tp.importance.OBDCImportance
Preparer = Callable[["Ranking", list[Any]], None]


def needs_data(importance: Any) -> bool:
    """Whether a torch-pruning importance reads gradients that somebody has to compute first."""
    return isinstance(importance, (_TAYLOR, _HESSIAN, _OBDC))


class Ranking:
    """Scores groups by any torch-pruning importance, and gives it what it needs beforehand.

    Args:
        importance: the importance.
        model: the model whose groups are scored.
        batches: data for an importance that reads gradients: they are computed once for all groups.
        objective: F, which is differentiated.
        own_gradients: without batches, such an importance reads the gradients that the user has computed, and a group
            that it has no score for is left out.
    """

    def __init__(
        self,
        importance: Callable[..., Any],
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        objective: ObjectiveLike = "loss",
        own_gradients: bool = False,
    ) -> None:
        self.importance, self.model, self.batches, self.objective = importance, model, batches, objective
        self.own_gradients = own_gradients

    def scores(self, groups: Mapping[str, GroupView]) -> dict[str, Tensor]:
        """One score per unit of each group, the same on all ranks.

        Ours divide their batches among the ranks. Of other importances every rank asks its own, and what counts is the
        mean.

        Raises:
            DataError: if the importance needs data and there is none.
            GroupError: if it gives no score for a group.
            ScoringError: if one of torch-pruning's importances fails, or any gives something else than a score per
                channel.
        """
        by_group = getattr(self.importance, "score_groups", None)
        ranks = current()
        if by_group is not None:
            ours: dict[str, Tensor] = dict(by_group(groups))
            ranks.align("the scores", list(ours.values()))
            return ours
        with self.gradients():
            found = {name: self._score(name, group) for name, group in groups.items()}
        given = {name: scores for name, scores in found.items() if scores is not None}
        if ranks.world == 1:
            return given
        summed = ranks.add_up("the scores", list(given.values()))
        return {name: total / ranks.world for name, total in zip(given, summed, strict=True)}

    def _score(self, name: str, group: GroupView) -> Tensor | None:
        by_unit = getattr(self.importance, "score_units", None)
        if by_unit is not None:
            return torch.as_tensor(by_unit(group, None))
        kind = type(self.importance).__name__
        try:
            scores = self.importance(group)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            theirs = type(self.importance).__module__.split(".")[0] == "torch_pruning"  # a user's own error passes
            if not theirs or isinstance(error, (SingeError, torch.cuda.OutOfMemoryError)):
                raise
            raise ScoringError(
                f"layer {name!r}: {kind} failed with {type(error).__name__}: {error}; use another importance or put "
                "the layer in ignored_layers"
            ) from error
        if scores is None:
            if self.own_gradients:
                return None
            raise GroupError(
                f"layer {name!r}: {kind} gives no score for this group (it ignores its layers); use another importance "
                "or put the layer in ignored_layers"
            )
        lengths = {len(item.idxs) for item in group.items}
        if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) not in lengths:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoringError(
                f"layer {name!r} has {len(group[0].idxs)} channels, but {kind} returned {got}; an importance gives one "
                "score per channel"
            )
        return group.per_unit(scores)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """The model holds the gradients that the importance reads; then it is put back."""
        if not needs_data(self.importance) or (self.batches is None and self.own_gradients):
            yield
            return
        if self.batches is None:
            raise DataError(
                f"{type(self.importance).__name__} reads gradients, and there is no data to compute them on; give "
                "SInGEPruner(batches=...)"
            )
        model = self.model
        with preserved(model), plain_layers(model), torch.enable_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
            ready = [to_device(batch, model_device(model)) for batch in checked(self.batches, self.objective)]
            if not ready:
                raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
            _PREPARE[next(kind for kind in _PREPARE if isinstance(self.importance, kind))](self, ready)
            yield


def checked(batches: Iterable[Any], objective: ObjectiveLike) -> Iterator[Any]:
    """The batches, each of a form that can be scored on."""
    for batch in read(batches, "reading the batches to score on"):
        check_form(batch, objective)
        yield batch


def _loss(ranking: Ranking, batch: Any, per_example: bool = False) -> Any:
    """F on a batch; one for each example, on request."""
    model, objective = ranking.model, ranking.objective
    check_head(model, objective)
    inputs: Any
    targets: Any
    if isinstance(objective, BatchObjective):
        model, inputs, targets = StepModel(model, objective, objective.train).eval(), (Batch(batch, 0),), None
        objective = as_it_is
    else:
        inputs, targets = inputs_for(model, batch)
    try:
        outputs = call_model(model, inputs)
        if not per_example:
            value = get_objective(objective)(outputs, targets)
        elif objective == "loss" and isinstance(outputs, torch.Tensor):
            check_logits(outputs, targets)
            value = functional.cross_entropy(outputs, targets, reduction="none")
        else:
            raise ScoringError(
                "GroupHessianImportance needs a loss for every example, which there is for objective='loss' on logits "
                f"only (the model returns {type(outputs).__name__}); use another importance"
            )
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            raise ScoringError(
                "F does not depend on the model through autograd (an objective that is constant, a detached output, or "
                "torch.no_grad() inside the forward); give another objective, or use tp.importance.MagnitudeImportance"
            )
        return value
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, (SingeError, torch.cuda.OutOfMemoryError)):
            raise
        raise ScoringError(
            f"the loss on a batch failed with {type(error).__name__}: {error}; check the batch against the model"
        ) from error


def _taylor(ranking: Ranking, batches: list[Any]) -> None:
    for batch in batches:
        (_loss(ranking, batch) / len(batches)).backward()


def _hessian(ranking: Ranking, batches: list[Any]) -> None:
    importance: Any = ranking.importance
    importance.zero_grad()
    for batch in batches:
        losses = _loss(ranking, batch, per_example=True)
        for loss in losses:
            ranking.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(ranking.model)


def _obdc(ranking: Ranking, batches: list[Any]) -> None:
    importance: Any = ranking.importance
    importance.modules.clear()
    importance.steps = 0
    importance.num_classes = None
    importance.A, importance.DS, importance.Fisher = {}, {}, {}
    for module in ranking.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            importance.modules.append(module)
            module.register_forward_pre_hook(importance._save_input)
            module.register_full_backward_hook(importance._save_grad_output)
    for batch in batches:
        ranking.model.zero_grad()
        _loss(ranking, batch).backward()
        importance.step()
    for module, fisher in importance.Fisher.items():
        if module.bias is not None:  # torch-pruning counts a column for the bias here, but not when it scores
            importance.Fisher[module] = fisher[:, :-1]


_PREPARE: dict[type, Preparer] = {_HESSIAN: _hessian, _OBDC: _obdc, _TAYLOR: _taylor}
