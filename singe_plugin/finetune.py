"""Entwined fine-tuning: the optimisation steps between removals (Algorithm 1, §3.3, §4.2).

The total number of steps is spread evenly over the phases: after every removal (Algorithm 1 as printed), after
every layer (§3.3, and the experiments), or all at the end (post-pruning, the paper's baseline in Table 2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, DataError, SingeError
from singe_plugin.events import Callback, FinetuneStep
from singe_plugin.objective import Objective, call_model, check_classes, materialise, read, split_batch, to_device
from singe_plugin.state import RngState, casts_forgotten, model_device, train_mode_of

__all__ = ["SCHEDULES", "BatchStream", "FineTune", "beside", "loader_generators", "phase_share"]

SCHEDULES = ("removal", "layer", "end")
OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None


class BatchStream:
    """An endless stream of batches whose position can be saved and found again, exactly.

    A new pass over the loader starts whenever the last one is used up. The random state at its start and the number
    of batches taken from it are the position.

    Args:
        batches: a DataLoader or any other iterable that can be iterated again.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = materialise(batches)
        self.taken = 0
        self.start: RngState | None = None
        self.generators = loader_generators(self.batches)
        self._starts: list[Tensor] = []
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self.start = RngState.capture()
                self._starts = [g.get_state() for g in self.generators]
                self._iterator, self.taken = read(self.batches, "the fine-tuning loader"), 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            self.taken += 1
            return batch
        raise DataError("the fine-tuning loader is empty; give at least one batch of (inputs, targets)")

    def position(self) -> dict[str, Any]:
        """What :meth:`seek` needs to continue from here."""
        return {"taken": self.taken if self._iterator is not None else 0, "start": self.start, "loaders": self._starts}

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a saved position; the current random state is left as it is."""
        self._iterator, self.taken, self.start = None, 0, position["start"]
        if not position["taken"] or self.start is None:
            return
        now = RngState.capture()
        self.start.restore()
        for generator, state in zip(self.generators, position["loaders"], strict=True):
            generator.set_state(state)
        self._starts = list(position["loaders"])
        self._iterator = read(self.batches, "the fine-tuning loader")
        for _ in range(position["taken"]):
            next(self._iterator)
            self.taken += 1
        now.restore()


def loader_generators(batches: Any) -> list[torch.Generator]:
    """The generators a DataLoader carries of its own."""
    holders = (
        batches,
        getattr(batches, "sampler", None),
        getattr(getattr(batches, "batch_sampler", None), "sampler", None),
    )
    found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    return list(found.values())


def beside(parameter: Tensor, key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """A value of an optimizer's state where its step expects it: beside the parameter, but counts on the CPU.

    Only optimizers that are fused or captured in a graph count on the parameter's device.
    """
    counted = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value if counted or not isinstance(value, Tensor) else value.to(parameter.device)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer updates."""
    return {id(p) for g in optimizer.param_groups for p in g["params"]}


def phase_share(steps: int, phase: int, phases: int) -> int:
    """How many of ``steps`` the phase number ``phase`` of ``phases`` gets; the shares add up to ``steps``.

    Example:
        >>> [phase_share(10, phase, 4) for phase in range(4)]
        [2, 3, 2, 3]
    """
    return (phase + 1) * steps // phases - phase * steps // phases


def _is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class FineTune:
    r"""Fine-tuning steps, entwined with the removals.

    Defaults: SGD with momentum 0.9 and weight decay 1e-4, cosine decay of the learning rate that restarts in each
    phase (one over the whole run would leave the last layers, which lose the most, a rate near zero), cross-entropy
    with label smoothing 0.1, gradients clipped to norm 1, mixed precision on CUDA.

    .. math:: \eta_t=\tfrac12\eta_0\,(1+\cos(\pi t/T_{\mathrm{phase}}))

    Args:
        loader: batches of ``(inputs, targets)`` or mappings; iterated as often as needed.
        steps: the total number of optimisation steps.
        every: ``"removal"``, ``"layer"`` or ``"end"``.
        lr, momentum, weight_decay: of the default optimizer.
        optimizer: an optimizer over the model's parameters, or a function that makes one from them.
        scheduler: a learning-rate scheduler of that optimizer, stepped once per step; replaces the cosine.
        warmup: steps over which the cosine's learning rate rises from zero.
        label_smoothing: of the default loss.
        loss: ``(outputs, targets) -> scalar`` in place of the default loss.
        clip_grad: the largest gradient norm, or None.
        amp: None, ``"bf16"``, ``"fp16"`` or ``"auto"`` (bf16 on CUDA cards that compute in it, nothing elsewhere).
        ema: an averaged copy of the model, cut along with it; with an ``update`` method it is updated every step.
        channels_last: convert image batches to that memory format.
        step_fn: ``(model, batch) -> loss`` in place of the forward pass and the loss; called in train mode.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> batch = (torch.randn(8, 4), torch.randint(0, 2, (8,)))
        >>> FineTune([batch], steps=10, every="layer").share(0, 4), FineTune([batch], steps=10).share(3, 4)
        (2, 3)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        steps: int = 1000,
        every: str = "layer",
        *,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        optimizer: OptimizerLike = None,
        scheduler: Any = None,
        warmup: int = 0,
        label_smoothing: float = 0.1,
        loss: Objective | None = None,
        clip_grad: float | None = 1.0,
        amp: str | None = "auto",
        ema: nn.Module | None = None,
        channels_last: bool = False,
        step_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ConfigError(f"steps={steps!r} is not a number of optimisation steps; give a whole number >= 0")
        if every not in SCHEDULES:
            raise ConfigError(f"unknown every {every!r}; choose one of {', '.join(SCHEDULES)}")
        if amp not in (None, "auto", "bf16", "fp16"):
            raise ConfigError(f"unknown amp {amp!r}; choose 'auto', 'bf16', 'fp16' or None")
        if not (_is_number(lr) and lr > 0):
            raise ConfigError(f"lr={lr!r} is not a learning rate; give a positive number")
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not (_is_number(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} is not a setting of SGD; give a number >= 0")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ConfigError(f"warmup={warmup!r} is not a number of optimisation steps; give a whole number >= 0")
        if not (_is_number(label_smoothing) and 0 <= label_smoothing < 1):
            raise ConfigError(f"label_smoothing={label_smoothing!r} is not inside [0, 1[; 0 switches it off")
        if clip_grad is not None and not (_is_number(clip_grad) and clip_grad > 0):
            raise ConfigError(f"clip_grad={clip_grad!r} is not a gradient norm; give a positive number or None")
        if optimizer is not None and not callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer={optimizer!r} is neither an optimizer nor a function that makes one from parameters"
            )
        if scheduler is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError("a scheduler belongs to an optimizer; give that optimizer too (an instance)")
        self.loader, self.steps, self.every = loader, steps, every
        self.lr, self.momentum, self.weight_decay, self.warmup = lr, momentum, weight_decay, warmup
        self.label_smoothing, self.loss, self.clip_grad, self.amp = label_smoothing, loss, clip_grad, amp
        self.scheduler, self.ema, self.channels_last, self.step_fn = scheduler, ema, channels_last, step_fn
        self._make = optimizer
        self.optimizer: torch.optim.Optimizer | None = (
            optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        )
        self._own_schedule = not isinstance(optimizer, torch.optim.Optimizer)
        self.stream = BatchStream(loader)
        self.done = 0
        self.scaler: torch.amp.GradScaler | None = None

    def prepare(self, model: nn.Module) -> None:
        """Make the optimizer, if none was given, and start at step 0; called once, before the first removal.

        Raises:
            ConfigError: if the model has no parameter that wants a gradient, or the optimizer holds none of them.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self.steps and not trainable:
            raise ConfigError("every parameter is frozen (requires_grad=False), so fine-tuning cannot change the model")
        self.done, self.stream = 0, BatchStream(self.stream.batches)
        mine = {id(p) for p in trainable}
        if self._own_schedule and self.optimizer is not None and not _held(self.optimizer) & mine:
            self.optimizer = None  # it was made for another model
        if self.optimizer is None and trainable:
            if callable(self._make):
                self.optimizer = self._make(trainable)
            else:
                self.optimizer = torch.optim.SGD(
                    trainable, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
                )
        if self.optimizer is not None:
            if trainable and not _held(self.optimizer) & mine:
                raise ConfigError(
                    "the optimizer holds none of the model's parameters; build it from model.parameters()"
                )
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        if self._precision(model_device(model)) == torch.float16:
            self.scaler = torch.amp.GradScaler(model_device(model).type)

    def follow(self) -> None:
        """Bring the optimizer's state to where the parameters are; after the model was moved to another device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    state.update({k: beside(parameter, k, v, group) for k, v in state.items()})

    def rewinder(self) -> Callable[[], None]:
        """A function that puts the step count, the scheduler and the loader back to where they are now."""
        done, stream = self.done, self.stream.position()
        schedule = None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict())

        def rewind() -> None:
            self.done = done
            self.stream.seek(stream)
            if schedule is not None:
                self.scheduler.load_state_dict(schedule)

        return rewind

    def share(self, phase: int, phases: int) -> int:
        """How many of the steps phase number ``phase`` of ``phases`` gets; the shares add up to ``steps``."""
        return phase_share(self.steps, phase, phases)

    def run(self, model: nn.Module, steps: int, callback: Callback, phase: tuple[int, int] | None = None) -> None:
        """Take some steps in train mode; the mode of every module is put back afterwards.

        Args:
            model: the model.
            steps: how many.
            callback: sees every step.
            phase: ``(steps of this phase that are done, its length)``; by default the phase is these steps.

        Raises:
            DataError: if the loader is empty or the loss is not finite.
        """
        if steps <= 0:
            return
        begun, length = phase or (0, steps)
        modes = train_mode_of(model)
        model.train()
        try:
            with torch.enable_grad(), casts_forgotten():
                for step in range(steps):
                    loss, lr = self._step(model, (begun + step) / length)
                    self.done += 1
                    callback.on_finetune_step(FinetuneStep(self.done, self.steps, loss, lr))
        finally:
            for module, training in modes.items():
                module.training = training

    def _step(self, model: nn.Module, share: float) -> tuple[float, float]:
        """One step, when ``share`` of the phase is over; the loss and the learning rate."""
        assert self.optimizer is not None
        device = model_device(model)
        lr = self._set_lr(share)
        batch = to_device(next(self.stream), device, self.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        precision = self._precision(device)
        with torch.autocast(device.type, dtype=precision) if precision else nullcontext():
            loss = self._loss(model, batch)
        value = float(loss.detach())  # here: read at the end, it would wait for the backward pass and the optimizer
        if not math.isfinite(value):
            raise DataError(
                f"the fine-tuning loss is {value} at step {self.done + 1} of {self.steps}; lower lr "
                f"(now {lr:g}), check the batches, or set amp=None"
            )
        scaler = self.scaler
        (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
        if self.clip_grad is not None:
            if scaler:
                scaler.unscale_(self.optimizer)
            held = [p for g in self.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(held, self.clip_grad)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        update = getattr(self.ema, "update", None)
        if callable(update):
            update(model)
        return value, lr

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.step_fn is not None:
            loss = self.step_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ConfigError("step_fn(model, batch) must return the loss, a scalar tensor")
            return loss.reshape(())
        inputs, targets = split_batch(batch)
        try:
            outputs = call_model(model, inputs)
            if self.loss is not None:
                return self.loss(outputs, targets)
            if not isinstance(outputs, Tensor):
                raise DataError(
                    f"the model returns {type(outputs).__name__}, not logits; give FineTune(loss=...) or step_fn"
                )
            check_classes(targets, outputs)
            return functional.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"fine-tuning step {self.done + 1} failed with {type(error).__name__}: {error}") from error

    def _precision(self, device: torch.device) -> torch.dtype | None:
        if self.amp == "auto":
            if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
                return None
            return torch.bfloat16
        return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]

    def _set_lr(self, share: float) -> float:
        assert self.optimizer is not None
        if self._own_schedule:
            factor = 0.5 * (1 + math.cos(math.pi * share))
            if self.done < self.warmup:
                factor *= (self.done + 1) / self.warmup
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers whose state must be cut along with the model."""
        return () if self.optimizer is None else (self.optimizer,)
