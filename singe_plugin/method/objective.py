"""The objective F: the scalar of a model's outputs that is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError

__all__ = [
    "OBJECTIVES", "Objective", "ObjectiveLike", "check_classes", "check_head", "check_logits", "cross_entropy",
    "get_objective", "own_loss", "true_class_logit",
]  # fmt: skip

Objective: TypeAlias = Callable[[Any, Any], Tensor]
ObjectiveLike: TypeAlias = str | Objective


def cross_entropy(outputs: Any, targets: Any) -> Tensor:
    r"""Compute ``"loss"``, the mean cross-entropy :math:`F = -\frac1B\sum_b\log p_{y_b}(x_b)`.

    A model that computes its loss itself (see :func:`own_loss`) has that as its F.

    Args:
        outputs: logits ``[B, C, ...]``.
        targets: class indices ``[B, ...]`` or probabilities ``[B, C, ...]``.

    Raises:
        DataError: if F would be constant, or mean something else: see :func:`check_logits`.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.6931)
    """
    own = own_loss(outputs)
    if own is not None:
        return own
    logits = _logits(outputs, "loss")
    check_logits(logits, targets)
    return functional.cross_entropy(logits, targets.to(logits.dtype) if targets.is_floating_point() else targets)


def true_class_logit(outputs: Any, targets: Any) -> Tensor:
    r"""Compute ``"logit"``, the mean logit of the true class, :math:`F=\frac1B\sum_b z_{b,y_b}`.

    Args:
        outputs: logits ``[B, C]``.
        targets: class indices ``[B]``, or probabilities ``[B, C]`` (then the expected logit).

    Example:
        >>> import torch
        >>> true_class_logit(torch.tensor([[1.0, 5.0]]), torch.tensor([1]))
        tensor(5.)
    """
    logits = _logits(outputs, "logit")
    if targets.is_floating_point():
        expected: Tensor = (logits * targets).sum(1).mean()
        return expected
    check_classes(targets, logits, ignored=None)
    return logits.gather(1, targets.unsqueeze(1)).mean()


def check_classes(targets: Any, logits: Tensor, ignored: int | None = -100) -> None:
    """Raise ``IndexError``, as PyTorch does on the CPU, for a class that the logits ``[B, C, ...]`` do not have.

    CUDA would only say so later, and refuse everything from then on. Who calls it adds the layer and the batch.
    Targets that are no class indices are left to the loss.

    Example:
        >>> import torch
        >>> check_classes(torch.tensor([0, 3]), torch.zeros(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        IndexError: Target 3 is out of bounds: the model has 3 classes, 0 to 2; ...
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return
    classes = logits.shape[1] if logits.ndim > 1 else logits.numel()
    outside = (targets < 0) | (targets >= classes)
    if ignored is not None:
        outside &= targets != ignored
    if bool(outside.any()):
        raise IndexError(
            f"Target {int(targets[outside][0])} is out of bounds: the model has {classes} classes, 0 to {classes - 1}; "
            "check the labels, or make the model with more classes"
        )


def check_logits(logits: Tensor, targets: Any) -> None:
    """Raise unless a cross-entropy of these logits ``[B, C, ...]`` can move, and means what it says.

    Targets that are no tensor are left to the loss.

    Raises:
        DataError: for a single class (the cross-entropy is 0 whatever the model does), for outputs without a dimension
            of classes, for targets all of which are ignored (-100), and for targets in floating point that are no
            probabilities.
        IndexError: see :func:`check_classes`.

    Example:
        >>> import torch
        >>> check_logits(torch.zeros(2, 1), torch.tensor([0, 0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        singe_plugin.errors.DataError: the model has one output, and a cross-entropy over one class is 0 whatever ...
    """
    if not isinstance(targets, Tensor):
        return
    shape, given = tuple(logits.shape), tuple(targets.shape)
    if logits.ndim == 0 or (logits.ndim == 1 and targets.ndim > 0):
        raise DataError(
            f"cross-entropy needs logits (examples, classes, ...), but the model returns shape {shape} for targets of "
            f"shape {given}; {_INSTEAD}"
        )
    classes = logits.shape[1] if logits.ndim > 1 else len(logits)
    if classes < 2:
        raise DataError(
            f"the model has {'one output' if classes else 'no outputs'}, and a cross-entropy over "
            f"{'one class' if classes else 'no classes'} is 0 whatever the model does: nothing can be ranked or "
            f"trained by it; give the model a logit for each class, or {_INSTEAD}"
        )
    if not targets.is_floating_point():
        if targets.numel() and bool((targets == _IGNORED).all()):
            raise DataError(
                f"every target of the batch is {_IGNORED}, which cross-entropy ignores, so that there is no loss; give "
                "batches with at least one target"
            )
        check_classes(targets, logits)
        return
    if shape != given:
        raise DataError(
            f"the targets are {str(targets.dtype).removeprefix('torch.')} of shape {given}, for outputs of shape "
            f"{shape}: cross-entropy takes whole numbers (classes), or a probability for each output; convert them "
            f"with .long() if they are classes, or {_INSTEAD}"
        )
    sums = targets.detach().float().sum(1 if logits.ndim > 1 else 0)
    if bool((targets < 0).any()) or bool(((sums - 1).abs() > 0.02).any()):
        raise DataError(
            "the targets are in floating point, and cross-entropy takes them for probabilities, but they are negative "
            f"or do not add up to 1 over the {classes} outputs; {_INSTEAD}"
        )


_IGNORED = -100  # PyTorch's default
_INSTEAD = (
    "say what F is, which is also what fine-tuning minimises: objective=torch.nn.functional.mse_loss, "
    "objective=torch.nn.functional.binary_cross_entropy_with_logits (both want targets of the outputs' shape), or a "
    "function (outputs, targets) -> scalar"
)


def check_head(model: nn.Module, objective: ObjectiveLike | None) -> None:
    """Raise ``DataError`` for a model that says it has no classifier, if its outputs would be taken for logits.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> model.num_classes = 0  # as timm's models without a head
        >>> check_head(model, "loss")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        singe_plugin.errors.DataError: Linear has num_classes=0: it returns features, and objective='loss' would ...
    """
    classes = getattr(model, "num_classes", None)
    if isinstance(objective, str) and type(classes) is int and classes == 0:
        raise DataError(
            f"{type(model).__name__} has num_classes=0: it returns features, and objective={objective!r} would take "
            f"them for logits; make it with its classes, or {_INSTEAD}"
        )


def own_loss(outputs: Any) -> Tensor | None:
    """Return the loss in a model's outputs, ``outputs.loss`` or ``outputs["loss"]``, as Transformers' models return it.

    Example:
        >>> import torch
        >>> own_loss({"loss": torch.tensor(1.5), "logits": torch.zeros(1, 2)}), own_loss(torch.zeros(1, 2))
        (tensor(1.5000), None)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _logits(outputs: Any, name: str) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # half precision would round F
    own, hint = "outputs[0]", ""
    for form, held in (("outputs.logits", hasattr(outputs, "logits")), ("outputs['logits']", _has(outputs, "logits"))):
        if held:
            own = form
    if name == "loss" and (hasattr(outputs, "loss") or _has(outputs, "loss")):
        hint = "give batches that are mappings with 'labels', from which it computes its own loss, or "
    raise DataError(
        f"objective={name!r} needs a tensor of logits, but the model returns {type(outputs).__name__}; {hint}"
        f"pass a callable instead, e.g. objective=lambda outputs, targets: cross_entropy({own}, targets)"
    )


def _has(outputs: Any, key: str) -> bool:
    return isinstance(outputs, Mapping) and key in outputs


OBJECTIVES: dict[str, Objective] = {"loss": cross_entropy, "logit": true_class_logit}


def get_objective(objective: ObjectiveLike) -> Objective:
    """Turn a name or a callable into the callable ``(outputs, targets) -> scalar``.

    Raises:
        ConfigError: if it is neither a known name nor callable.

    Example:
        >>> get_objective("loss") is cross_entropy
        True
    """
    if isinstance(objective, str) and objective in OBJECTIVES:
        return OBJECTIVES[objective]
    if callable(objective):
        return objective
    raise ConfigError(
        f"unknown objective {objective!r}; choose one of {', '.join(OBJECTIVES)} or pass a callable "
        "(outputs, targets) -> scalar"
    )
