"""The loss that fine-tuning minimises: F, or what was given in its place; on one batch, and whether it can move."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import DataError, SingeError
from singe_plugin.method.dependence import depends_on
from singe_plugin.method.objective import Objective, check_head, check_logits, own_loss
from singe_plugin.nested import call_model, tensors_in
from singe_plugin.state import preserved

__all__ = ["check_loss", "loss_of", "loss_on", "name_of", "unmoved"]

_logger = logging.getLogger("singe_plugin")


def loss_on(
    model: Callable[..., Any], inputs: Any, chosen: Objective | None, targets: Any, label_smoothing: float
) -> Tensor:
    """Compute the loss on a batch: ``chosen``, or the model's own, or cross-entropy with label smoothing.

    Raises:
        DataError: if the outputs are none of what these take.

    Example:
        >>> loss_on(nn.Identity(), torch.zeros(1, 2), None, torch.tensor([0]), 0.1)
        tensor(0.6931)
    """
    return loss_of(call_model(model, inputs), chosen, targets, label_smoothing)


def loss_of(outputs: Any, chosen: Objective | None, targets: Any, label_smoothing: float) -> Tensor:
    """Compute the loss of a model's outputs: see :func:`loss_on`.

    Example:
        >>> loss_of({"loss": torch.tensor(2.0)}, None, None, 0.1)
        tensor(2.)
    """
    if chosen is not None:
        loss = chosen(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise DataError(f"the loss must be one number (a scalar tensor), got {got}; reduce it, e.g. with .mean()")
        return loss.reshape(())
    own = own_loss(outputs)
    if own is not None:
        return own.mean()  # a scalar already, unless several devices computed it
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model returns {type(outputs).__name__}, not logits; give FineTune(loss=...) or step_fn, or say with "
            "Scoring(objective=...) what is scored and trained; a model that computes its own loss from labels needs "
            "batches that are mappings with them"
        )
    check_logits(outputs, targets)
    return functional.cross_entropy(outputs, targets, label_smoothing=label_smoothing)


def check_loss(model: nn.Module, inputs: Any, chosen: Objective | None, targets: Any, label_smoothing: float) -> None:
    """Raise unless the loss can be computed from the outputs in train mode, and can move; the model is left as it was.

    Where the forward pass or the loss fails in another way nothing is said: the scoring, or the step that comes to it,
    names the place. A single example is not tried, for batch-norm refuses it in train mode.

    Raises:
        DataError: if the outputs are neither logits nor covered by the loss, or its gradient is zero for these weights
            and for random ones.
    """
    check_head(model, "loss" if chosen is None else None)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained or min((len(t) for t in tensors_in(inputs) if t.ndim), default=0) < 2:
        return
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        model.train()
        try:
            loss = loss_on(model, inputs, chosen, targets, label_smoothing)
            if loss.requires_grad:
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                if any(gradient is not None and bool((gradient != 0).any()) for gradient in found):
                    return
            found_at_random = depends_on(model, lambda call: loss_on(call, inputs, chosen, targets, label_smoothing))
            if not found_at_random & set(trained):
                raise unmoved("its gradient is zero for these weights and for random ones")
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            _logger.debug("the fine-tuning loss cannot be tried on a scoring batch: %s", error)


def name_of(loss: Objective | None) -> str:
    """What a loss is called; None is cross-entropy.

    Example:
        >>> name_of(None), name_of(functional.mse_loss), name_of(nn.CrossEntropyLoss())
        ('cross_entropy', 'mse_loss', 'CrossEntropyLoss')
    """
    return "cross_entropy" if loss is None else getattr(loss, "__name__", type(loss).__name__)


def unmoved(why: str) -> DataError:
    """Make the error for a loss that no step can change."""
    return DataError(
        f"the fine-tuning loss does not depend on the parameters that are trained: {why}; give FineTune(loss=...) or "
        "an objective that the outputs move, and see that the forward pass detaches nothing and that the layers to "
        "train are not frozen"
    )
