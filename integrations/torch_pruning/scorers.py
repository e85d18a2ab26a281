"""Any torch-pruning importance as the scorer of Algorithm 1.

The loop is criterion-agnostic. What differs between importances is what they need beforehand: Taylor needs
gradients, Hessian needs them per sample, OBD-C needs its hooks; SInGE and the magnitudes need nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
import torch_pruning as tp
from torch import nn

from singe_plugin.algorithm import Progress
from singe_plugin.batches import check_batch, inputs_for, read
from singe_plugin.errors import DataError, ScoringError, SingeError
from singe_plugin.nested import call_model, to_device
from singe_plugin.objective import check_head, check_logits, get_objective
from singe_plugin.state import model_device, plain_layers, preserved

from .host import TorchPruningHost

__all__ = ["RoundScorer", "needs_data", "with_gradients"]

_TAYLOR = tp.importance.GroupTaylorImportance
_HESSIAN = tp.importance.GroupHessianImportance
_OBDC = tp.importance.OBDCImportance
Preparer = Callable[[Any, Any, list[Any]], None]


def needs_data(importance: Any) -> bool:
    """Whether a torch-pruning importance reads gradients that somebody has to compute first."""
    return isinstance(importance, (_TAYLOR, _HESSIAN, _OBDC))


def with_gradients(pruner: Any, importance: Any, batches: Iterable[Any] | None, score: Callable[[], Any]) -> Any:
    """Call ``score`` while the model holds the gradients that ``importance`` reads; then put the model back.

    Raises:
        DataError: if the importance needs data and there is none.
    """
    if not needs_data(importance):
        return score()
    if batches is None:
        raise DataError(
            f"{type(importance).__name__} reads gradients, and there is no data to compute them on; give "
            "SInGEPruner(batches=...)"
        )
    model: nn.Module = pruner.model
    with preserved(model), plain_layers(model), torch.enable_grad():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        ready = [to_device(batch, model_device(model)) for batch in checked(batches)]
        if not ready:
            raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
        _PREPARE[next(kind for kind in _PREPARE if isinstance(importance, kind))](pruner, importance, ready)
        return score()


def checked(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, each of a form that can be scored on."""
    for batch in read(batches, "reading the batches to score on"):
        check_batch(batch)
        yield batch


class RoundScorer:
    """One score per unit of a layer, where all layers are scored before anything is removed.

    An importance that reads gradients gets them once for all layers.

    Args:
        pruner: whose importance and batches are used.
        host: the layers.
        progress: says when the scores are of yesterday.
    """

    def __init__(self, pruner: Any, host: TorchPruningHost, progress: Progress) -> None:
        self.pruner, self.host, self.progress = pruner, host, progress
        self._when: tuple[int, int] | None = None
        self._scores: dict[str, Any] = {}

    def __call__(self, layer: str) -> torch.Tensor:
        pruner, importance, host = self.pruner, self.pruner.importance, self.host
        if not needs_data(importance):
            return torch.as_tensor(pruner.score_layer(host, layer))
        now = (self.progress.next_layer, len(self.progress.removals))
        if now != self._when:
            names = [spec.name for spec in host.layers()]
            self._scores = with_gradients(
                pruner, importance, pruner.batches, lambda: {name: host.score(name, importance) for name in names}
            )
            self._when = now
        return torch.as_tensor(self._scores[layer])


def _loss(pruner: Any, batch: Any, per_example: bool = False) -> Any:
    """F on a batch as ``pruner.objective`` says; one for each example, on request."""
    model, objective = pruner.model, pruner.objective
    check_head(model, objective)
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


def _taylor(pruner: Any, importance: Any, batches: list[Any]) -> None:
    for batch in batches:
        (_loss(pruner, batch) / len(batches)).backward()


def _hessian(pruner: Any, importance: Any, batches: list[Any]) -> None:
    importance.zero_grad()
    for batch in batches:
        losses = _loss(pruner, batch, per_example=True)
        for loss in losses:
            pruner.model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(pruner.model)


def _obdc(pruner: Any, importance: Any, batches: list[Any]) -> None:
    importance.modules.clear()
    importance.steps = 0
    importance.num_classes = None
    importance.A, importance.DS, importance.Fisher = {}, {}, {}
    for module in pruner.model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            importance.modules.append(module)
            module.register_forward_pre_hook(importance._save_input)
            module.register_full_backward_hook(importance._save_grad_output)
    for batch in batches:
        pruner.model.zero_grad()
        _loss(pruner, batch).backward()
        importance.step()
    for module, fisher in importance.Fisher.items():
        if module.bias is not None:  # torch-pruning counts a column for the bias here, but not when it scores
            importance.Fisher[module] = fisher[:, :-1]


_PREPARE: dict[type, Preparer] = {_HESSIAN: _hessian, _OBDC: _obdc, _TAYLOR: _taylor}
