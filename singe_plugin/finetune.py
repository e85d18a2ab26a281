"""Entwined fine-tuning: the optimisation steps between removals (Algorithm 1, §3.3, §4.2).

The total number of steps is spread evenly over the phases: after every removal (Algorithm 1 as printed), after
every layer (§3.3, and the experiments), or all at the end (post-pruning, the paper's baseline in Table 2).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.batches import inputs_for, materialise, read
from singe_plugin.errors import ConfigError, DataError, SingeError
from singe_plugin.events import Callback, FinetuneStep
from singe_plugin.losses import check_loss, loss_on, unmoved
from singe_plugin.nested import to_device
from singe_plugin.objective import Objective, ObjectiveLike, get_objective
from singe_plugin.state import RngState, casts_forgotten, model_device, train_mode_of

__all__ = ["SCHEDULES", "BatchStream", "FineTune", "beside", "loader_generators", "phase_share"]

SCHEDULES = ("removal", "layer", "end")
_STILL = 10  # steps without any gradient: one batch may have none, so many have a reason
_logger = logging.getLogger("singe_plugin")
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
    phase (one over the whole run would leave the last layers, which lose the most, a rate near zero), gradients clipped
    to norm 1, mixed precision on CUDA.

    .. math:: \eta_t=\tfrac12\eta_0\,(1+\cos(\pi t/T_{\mathrm{phase}}))

    What is minimised is ``loss`` or what ``step_fn`` returns, if one is given; else F, the objective that the run
    scores with (see :meth:`minimise`).

    Args:
        loader: batches of ``(inputs, targets)`` or mappings; iterated as often as needed.
        steps: the total number of optimisation steps.
        every: ``"removal"``, ``"layer"`` or ``"end"``.
        lr, momentum, weight_decay: of the default optimizer.
        optimizer: an optimizer over the model's parameters, whose learning rates are left as they are (there is no
            cosine then), or a function that makes one from them, whose rates the cosine scales.
        scheduler: a learning-rate scheduler of that optimizer, stepped once per step.
        warmup: steps over which the cosine's learning rate rises from zero.
        label_smoothing: of the cross-entropy.
        loss: ``(outputs, targets) -> scalar``, in the place of F.
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
        self._objective: ObjectiveLike = "loss"
        self._still = 0  # steps without a gradient, up to the first that has one
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
        self.done, self._still, self.stream = 0, 0, BatchStream(self.stream.batches)
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
            if self.steps and not self._own_schedule and self.scheduler is None:
                _logger.info(
                    "fine-tuning at the constant learning rate of the given %s; give a function that makes it, for the "
                    "cosine, or its scheduler", type(self.optimizer).__name__,
                )  # fmt: skip
        if self._precision(model_device(model)) == torch.float16:
            self.scaler = torch.amp.GradScaler(model_device(model).type)

    def minimise(self, objective: ObjectiveLike) -> None:
        """Take over the objective F that a run scores with; ``loss`` and ``step_fn`` go before it.

        ``"loss"`` is trained as cross-entropy with label smoothing, and so is ``"logit"``: a mean logit has no minimum.
        A model that computes its own loss is trained with that (see :func:`singe_plugin.objective.own_loss`), and a
        function with itself.

        Example:
            >>> tuning = FineTune([(torch.ones(1, 1), torch.ones(1, 1))], steps=1)
            >>> tuning.minimise(torch.nn.functional.mse_loss)
            >>> tuning.described()["finetune_loss"]
            'mse_loss'
        """
        get_objective(objective)
        self._objective = objective

    def described(self) -> dict[str, Any]:
        """The settings as plain values, the same before and after a run.

        ``lr`` is the rate that the course ``lr_schedule`` begins with: ``"cosine"``, ``"constant"`` (an optimizer was
        given, and no scheduler), or the name of the scheduler. It is None where a function makes the optimizer, whose
        rate is known when it is made: see :meth:`rate`.
        """
        course = "constant" if self.scheduler is None else type(self.scheduler).__name__
        loss = self.step_fn or self._chosen_loss()
        return {
            "finetune_steps": self.steps,
            "finetune_every": self.every,
            "finetune_loss": "cross_entropy" if loss is None else getattr(loss, "__name__", type(loss).__name__),
            "lr": None if self._own_schedule and callable(self._make) else self.rate(),
            "lr_schedule": "cosine" if self._own_schedule else course,
        }

    def rate(self) -> float | list[float]:
        """The optimizer's learning rate before any schedule; a list where its groups have several."""
        if self.optimizer is None:
            return self.lr
        scheduled = self._own_schedule or self.scheduler is not None
        rates = [float(g.get("initial_lr", g["lr"]) if scheduled else g["lr"]) for g in self.optimizer.param_groups]
        return rates[0] if len(set(rates)) == 1 else rates

    def _chosen_loss(self) -> Objective | None:
        """The given loss, or F if it is a function; None for cross-entropy with label smoothing."""
        if self.loss is not None:
            return self.loss
        return None if isinstance(self._objective, str) else self._objective

    def check(self, model: nn.Module, batch: Any) -> None:
        """See before anything is pruned that the loss fits the outputs in train mode and can move, on a scoring batch.

        Raises:
            DataError: see :func:`singe_plugin.losses.check_loss`; ``step_fn`` is not tried.
        """
        if self.steps and self.step_fn is None:
            inputs, targets = to_device(inputs_for(model, batch), model_device(model), self.channels_last)
            check_loss(model, inputs, self._chosen_loss(), targets, self.label_smoothing)

    def follow(self) -> None:
        """Bring the optimizer's state to where the parameters are; after the model was moved to another device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    state.update({k: beside(parameter, k, v, group) for k, v in state.items()})

    def rewinder(self) -> Callable[[], None]:
        """A function that puts everything back to where it is now, but for the values that an optimizer has.

        That is the step count, the scheduler, the scaler, the loader and its generators, the settings of the
        optimizer's groups, and which optimizer there is. To be called before :meth:`prepare`, which changes some.
        """
        done, stream, optimizer, scaler = self.done, self.stream, self.optimizer, self.scaler
        position, generators = stream.position(), [(g, g.get_state()) for g in stream.generators]
        schedule = None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict())
        scale = None if scaler is None else copy.deepcopy(scaler.state_dict())
        groups = [(g, {k: v for k, v in g.items() if k != "params"}) for o in self.optimizers for g in o.param_groups]

        def rewind() -> None:
            self.done, self.stream, self.optimizer, self.scaler = done, stream, optimizer, scaler
            stream.seek(position)
            for generator, state in generators:
                generator.set_state(state)
            if schedule is not None:
                self.scheduler.load_state_dict(schedule)
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)
            for group, settings in groups:
                for key in [k for k in group if k != "params" and k not in settings]:
                    del group[key]  # initial_lr
                group.update(settings)

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
        if not loss.requires_grad:
            raise unmoved(f"it has no gradient at step {self.done + 1}")
        (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
        self._see_movement()
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
        inputs, targets = inputs_for(model, batch)
        try:
            return loss_on(model, inputs, self._chosen_loss(), targets, self.label_smoothing)
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"fine-tuning step {self.done + 1} failed with {type(error).__name__}: {error}") from error

    def _see_movement(self) -> None:
        """Raise if no step so far had a gradient."""
        if self._still < 0:
            return
        assert self.optimizer is not None
        held = (p.grad for g in self.optimizer.param_groups for p in g["params"])
        if any(grad is not None and bool((grad != 0).any()) for grad in held):
            self._still = -1
            return
        self._still += 1
        if self._still >= min(self.steps, _STILL):
            raise unmoved(f"no parameter had a gradient other than zero in {self._still} steps")

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
    def made_by(self) -> OptimizerLike:
        """What was given as ``optimizer``: one, a function that makes one, or None."""
        return self._make

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers whose state must be cut along with the model."""
        return () if self.optimizer is None else (self.optimizer,)
