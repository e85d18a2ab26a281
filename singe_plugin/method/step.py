"""F of a model and a batch: what a model computes as its loss in its own way, scored as it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.method.batches import check_batch, inputs_for, read, split_batch
from singe_plugin.nested import tensors_in, to_device
from singe_plugin.state import RngState, model_device

if TYPE_CHECKING:
    from singe_plugin.method.options import Scoring

__all__ = ["Batch", "BatchObjective", "StepModel", "as_it_is", "as_step", "check_form", "model_inputs"]

Step = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class BatchObjective:
    """F as a function of the model and a batch, for what is no function of outputs and targets.

    Detectors return their losses in train mode only and take the targets with the images; a diffusion model's loss is
    that of noise which is drawn; two towers are compared with each other. The function gets the batch as the data gives
    it, on the model's device. Fine-tuning minimises it, too (it is a ``step_fn``). What it draws at random is drawn
    alike in every evaluation of a batch, so that scores compare weights and not draws.

    Args:
        function: ``(model, batch) -> scalar tensor``.
        train: whether it is evaluated with the model in train mode. Modules without children, batch-norms and whatever
            drops at random stay in eval mode then: statistics are held still.
        inputs: what the model is called with for a batch in eval mode, without a loss: example inputs for tracing are
            taken from it, and the repair and the criterion ``obs`` look at what layers get from it. By default the
            inputs of ``(inputs, targets)``, or of a mapping with targets under a known name.

    Raises:
        ConfigError: if they are no functions.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> squared = BatchObjective(lambda model, batch: model(batch["x"]).pow(2).mean(), inputs=lambda b: b["x"])
        >>> squared(net, {"x": torch.zeros(1, 2)}).shape
        torch.Size([])
    """

    function: Step
    train: bool = False
    inputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"BatchObjective needs a function (model, batch) -> scalar, got {self.function!r}")
        if not (self.inputs is None or callable(self.inputs)):
            raise ConfigError(f"BatchObjective(inputs=...) is a function of a batch, got {self.inputs!r}")

    @property
    def __name__(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.function(model, batch)

    def inputs_of(self, batch: Any) -> Any:
        """What the model is called with for a batch.

        Raises:
            DataError: if that is not known, or the function for it fails.
        """
        if self.inputs is None:
            try:
                return split_batch(batch)[0]
            except DataError as error:
                raise DataError(
                    f"{error}; or say what of it the model is called with: BatchObjective(inputs=lambda batch: ...)"
                ) from error
        try:
            return self.inputs(batch)
        except Exception as error:
            raise DataError(
                f"BatchObjective(inputs=...) failed on a batch ({type(batch).__name__}) with {type(error).__name__}: "
                f"{error}; it gets the batch as the data gives it, and returns what the model is called with"
            ) from error


class Batch:
    """A batch on its way to somebody's training step: nothing looks into it, so it arrives as it is.

    Args:
        value: the batch, of whatever type.
        seed: of what the step draws at random; None leaves the generators alone.
    """

    def __init__(self, value: Any, seed: int | None = None) -> None:
        self.value, self.seed = value, seed


class StepModel(nn.Module):
    """A model together with somebody's training step, as a module that maps a batch to the loss.

    Args:
        model: the model that is trained.
        step: the training step, ``(model, batch) -> loss``.
        trains: whether eval mode is train mode for those modules that have others in them, see
            :class:`BatchObjective`.
    """

    def __init__(self, model: nn.Module, step: Step, trains: bool = False) -> None:
        super().__init__()
        self.model, self.step, self.trains = model, step, trains

    def train(self, mode: bool = True) -> StepModel:
        super().train(mode)
        for module in self.model.modules() if self.trains and not mode else ():
            if module is self.model or (any(module.children()) and not _is_fixed(module)):
                module.training = True
        return self

    def forward(self, batch: Batch) -> Tensor:
        if batch.seed is None:
            return self.step(self.model, batch.value)
        rng = RngState.capture()
        try:
            torch.manual_seed(batch.seed)
            return self.step(self.model, batch.value)
        finally:
            rng.restore()


def _is_fixed(module: nn.Module) -> bool:
    """Whether a module with others in it is one operator: a norm with its activation, an attention with its dropout."""
    name = type(module).__name__.lower()
    return "norm" in name or "drop" in name or isinstance(module, nn.MultiheadAttention)


@dataclass(frozen=True)
class _Steps:
    """Batches as the inputs of a :class:`StepModel`, as often as they are asked for."""

    batches: Iterable[Any]
    device: torch.device
    channels_last: bool

    def __iter__(self) -> Iterator[Any]:
        for seed, batch in enumerate(read(self.batches, "reading the batches to score on")):
            yield (Batch(to_device(batch, self.device, self.channels_last), seed),), None


def as_step(
    model: nn.Module, batches: Iterable[Any] | None, options: Scoring
) -> tuple[nn.Module, Iterable[Any] | None, Scoring]:
    """The model, batches and options to score with: with a :class:`BatchObjective`, its step is the model.

    Example:
        >>> from singe_plugin.method.options import Scoring
        >>> net, options = nn.Linear(2, 1), Scoring(objective=BatchObjective(lambda model, batch: model(batch).sum()))
        >>> step, batches, plain = as_step(net, [torch.ones(3, 2)], options)
        >>> [(inputs, targets)] = batches
        >>> plain.function(step(*inputs), targets).shape
        torch.Size([])
    """
    objective = options.objective
    if not isinstance(objective, BatchObjective):
        return model, batches, options
    step = StepModel(model, objective, objective.train)
    wrapped = None if batches is None else _Steps(batches, model_device(model), options.channels_last)
    return step, wrapped, replace(options, objective=as_it_is)


def as_it_is(outputs: Any, targets: Any) -> Tensor:
    """F where the model is a step: what it returns."""
    return outputs  # type: ignore[no-any-return]


def check_form(batch: Any, objective: Any) -> None:
    """Raise :class:`DataError` for a batch that cannot be scored on; a :class:`BatchObjective` takes any."""
    if not isinstance(objective, BatchObjective):
        check_batch(batch)


def model_inputs(model: nn.Module, batch: Any, objective: Any) -> Any:
    """What the model is called with for a batch, targets that its forward pass takes included.

    Raises:
        DataError: if the batch has no form that is known.
    """
    if isinstance(objective, BatchObjective):
        inputs = objective.inputs_of(batch)
        if next(tensors_in(inputs), None) is None:
            raise DataError(
                f"BatchObjective(inputs=...) returned {type(inputs).__name__} without a tensor; it returns what the "
                "model is called with: a tensor, a tuple of arguments, or a mapping of keywords"
            )
        return inputs
    return inputs_for(model, batch)[0]
