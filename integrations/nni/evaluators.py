"""NNI's evaluators give what the method needs: F, as the user's own training step computes it, and the batches."""

from __future__ import annotations

import inspect
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nni
from nni.common.serializer import is_traceable
from nni.compression.utils import evaluator as _nni
from torch import Tensor, nn
from torch.optim import Optimizer

from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.method.batches import TARGET_KEYS
from singe_plugin.nested import examples_in

__all__ = [
    "BatchCollector",
    "LightningEvaluator",
    "Step",
    "TorchEvaluator",
    "TransformersEvaluator",
    "check_evaluator",
    "step_of",
]

Step = Callable[[nn.Module, Any], Tensor]


class TorchEvaluator(_nni.TorchEvaluator):  # type: ignore[misc]
    """NNI's ``TorchEvaluator``, which says what is wrong with its arguments instead of failing an assertion.

    Raises:
        ConfigError: for an optimizer or scheduler that ``nni.trace`` did not make, with the line to write.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Any,
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[..., Any] | None = None,
    ) -> None:
        for name, function in (("training_func", training_func), ("training_step", training_step)):
            if not callable(function):
                raise ConfigError(f"TorchEvaluator: {name} must be a function, got {type(function).__name__}")
        for kind, module, given in (
            ("optimizer", "optim", optimizers),
            ("scheduler", "optim.lr_scheduler", lr_schedulers),
        ):
            for item in given if isinstance(given, (list, tuple)) else [given]:
                if item is None and kind == "scheduler":
                    continue
                name = type(item).__name__
                if not isinstance(item, Optimizer if kind == "optimizer" else _nni.SCHEDULER):
                    raise ConfigError(
                        f"TorchEvaluator: {name} is no {kind}; give one made by nni.trace, such as "
                        f"nni.trace(torch.{module}.{'SGD' if kind == 'optimizer' else 'ExponentialLR'})(...), or a list"
                    )
                if not is_traceable(item):
                    raise ConfigError(
                        f"TorchEvaluator: the {kind} {name} was not made by nni.trace, so NNI cannot make it again "
                        f"for the wrapped model; write nni.trace(torch.{module}.{name})(...) in the place of "
                        f"torch.{module}.{name}(...)"
                    )
        super().__init__(training_func, optimizers, training_step, lr_schedulers, dummy_input, evaluating_func)


class LightningEvaluator(_nni.LightningEvaluator):  # type: ignore[misc]
    """This is NNI's ``LightningEvaluator`` for Lightning 2, where the number of steps is set in another place."""

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound model."""
        trainer: Any = self.trainer.trace_copy().get()
        trainer.num_sanity_val_steps = 0
        if max_steps:
            trainer.fit_loop.epoch_loop.max_steps = max_steps
        if max_epochs:
            trainer.fit_loop.max_epochs = max_epochs
        trainer.fit(self.model, self.data_module)
        self.model.trainer = None


class TransformersEvaluator(_nni.TransformersEvaluator):  # type: ignore[misc]
    """NNI's ``TransformersEvaluator`` for today's Transformers.

    The trainer's ``compute_loss`` has further keywords now, and ``create_optimizer`` asks for the optimizer in another
    way; and of several tasks at optimizer steps (a scheduler and its pruner) NNI's own runs the last one only.
    """

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        trainer: Any = self.traced_trainer
        if trainer.optimizer is None:
            kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            trainer.optimizer_cls_and_kwargs = nni.trace(kind), options
            trainer.create_optimizer()
        super()._init_optimizer_helpers(pure_model)

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """``patch(loss, batch)`` in the place of the loss."""
        old = self.trainer.compute_loss

        def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batch = dict(inputs)  # compute_loss may take the labels out
            found = old(model, inputs, *args, **kwargs)
            return (patch(found[0], batch), *found[1:]) if isinstance(found, tuple) else patch(found, batch)

        self.trainer.compute_loss = compute_loss

    def patch_optimizer_step(
        self, before_step_tasks: list[Callable[[], Any]], after_step_tasks: list[Callable[[], Any]]
    ) -> None:
        """Run tasks before and after every step of the optimizer."""
        optimizer = self._raw_optimizer()
        old = optimizer.step

        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            for task in before_step_tasks:
                task()
            found = old(*args, **kwargs)
            for task in after_step_tasks:
                task()
            return found

        optimizer.step = types.MethodType(step, optimizer)

    def revert_optimizer_step(self) -> None:
        """Take the tasks out of the optimizer's steps again."""
        self._raw_optimizer().step = self._ori_trainer_attr["optimizer.step"]

    def _raw_optimizer(self) -> Any:
        """Return the optimizer itself, out of Accelerate's wrapper."""
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)


def check_evaluator(evaluator: Any) -> None:
    """Raise :class:`ConfigError` unless it is None or one of NNI's evaluators."""
    if evaluator is not None and not isinstance(evaluator, _nni.Evaluator):
        raise ConfigError(
            f"evaluator must be one of NNI's (TorchEvaluator, LightningEvaluator, TransformersEvaluator), got "
            f"{type(evaluator).__name__}"
        )


def _loss_in(output: Any) -> Tensor:
    """Return the loss in what a training step returns, by NNI's own convention."""
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    elif isinstance(output, Sequence) and not isinstance(output, str) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ScoringError(
            f"the evaluator's training step returned {type(output).__name__}; it must return the loss, a tuple that "
            "begins with it, or a mapping with 'loss'"
        )
    return output


def step_of(evaluator: Any) -> Step | None:
    """The user's own loss as ``(model, batch) -> loss``; None where a batch is ``(inputs, targets)`` for F = "loss".

    Raises:
        ConfigError: if a ``TorchEvaluator``'s training step cannot be called with the batch and the model.
    """
    if isinstance(evaluator, _nni.TorchEvaluator):
        step = evaluator._ori_training_step
        try:
            inspect.signature(step).bind("batch", "model")
        except TypeError as error:
            raise ConfigError(
                f"the training step takes {inspect.signature(step)}, but scoring calls it with a batch and the model "
                f"only ({error}); give all other arguments defaults, or say what is differentiated: "
                "scoring=Scoring(objective='loss'), or a function (outputs, targets) -> scalar there"
            ) from error
        return lambda model, batch: _loss_in(step(batch, model))
    if isinstance(evaluator, _nni.TransformersEvaluator):
        return _own_loss
    if isinstance(evaluator, _nni.LightningEvaluator):
        return lambda model, batch: _lightning_loss(evaluator, model, batch)
    return None


def _lightning_loss(evaluator: Any, model: nn.Module, batch: Any) -> Tensor:
    original: Any = evaluator._ori_model_attr.get("training_step") or model.training_step
    with _silent(model):
        return _loss_in(original(batch, 0))


@contextmanager
def _silent(model: Any) -> Iterator[None]:
    """Let a Lightning module log nothing in here: what scoring computes is none of the user's metrics."""
    names = ("log", "log_dict")
    saved = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        for name in names:
            model.__dict__[name] = lambda *args, **kwargs: None
        yield
    finally:
        for name in names:
            del model.__dict__[name]
        model.__dict__.update(saved)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a Transformers model computes from a batch with labels."""
    if not isinstance(batch, Mapping) or not any(key in batch for key in TARGET_KEYS):
        raise DataError(
            f"the model computes its loss from a batch with labels, got {type(batch).__name__}"
            f"{' with ' + ', '.join(map(str, batch)) if isinstance(batch, Mapping) else ''}; give "
            "scoring=Scoring(objective=...)"
        )
    return _loss_in(model(**batch))


class BatchCollector:
    """The latest batches of somebody's training loop, through ``evaluator.patch_loss``.

    Attributes:
        batches: the latest batches, at most ``count`` of them; the last one is the latest.
        images: the latest batches that have ``examples`` examples together.
        loss: the loss of the latest training step, as a number.
    """

    def __init__(self, evaluator: Any, count: int, examples: int = 0) -> None:
        self.batches: deque[Any] = deque(maxlen=count)
        self.images: deque[Any] = deque()
        self._examples = examples
        self.loss = float("nan")
        evaluator.patch_loss(self._see)

    def _see(self, loss: Tensor, batch: Any) -> Tensor:
        if loss.requires_grad:  # Transformers evaluates through the same function
            self.batches.append(batch)
            self._keep(batch)
            self.loss = float(loss.detach().mean())
        return loss

    def _keep(self, batch: Any) -> None:
        """Keep a batch, and of those before no more than are needed."""
        if not self._examples:
            return
        self.images.append(batch)
        sizes = [max(examples_in(held), 1) for held in self.images]
        while sum(sizes) - sizes[0] >= self._examples:
            self.images.popleft()
            sizes.pop(0)
