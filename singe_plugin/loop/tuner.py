"""Fine-tuning in progress: the optimizer, the position in the data, and one step after the other."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from singe_plugin.axes.graph import AxisGraph
from singe_plugin.errors import ConfigError, DataError, SingeError
from singe_plugin.fields import describe
from singe_plugin.loop.averaging import Average
from singe_plugin.loop.distillation import Teacher, find_teacher
from singe_plugin.loop.events import Callback, FinetuneStep
from singe_plugin.loop.finetune import FineTune, held_by, make_optimizer, place_state
from singe_plugin.loop.losses import check_loss, loss_of, loss_on, name_of, unmoved
from singe_plugin.loop.mixing import Mixing
from singe_plugin.loop.outlook import Rates
from singe_plugin.loop.phase import Phase, precision_of
from singe_plugin.loop.stream import BatchStream
from singe_plugin.method.batches import inputs_for
from singe_plugin.method.objective import Objective, ObjectiveLike, get_objective
from singe_plugin.method.step import BatchObjective
from singe_plugin.nested import examples_in, to_device
from singe_plugin.state import casts_forgotten, model_device, train_mode_of

__all__ = ["Tuner"]

_STILL = 10  # steps without any gradient: one batch may have none, so many have a reason
_logger = logging.getLogger("singe_plugin")


class Tuner:
    """What a :class:`~singe_plugin.FineTune` says, being done to a model.

    Args:
        options: how.
        loader: what to train on, in the place of the options' loader.

    Attributes:
        objective: F, which is minimised unless the options have a ``loss`` or ``step_fn``. ``"loss"`` is trained as
            cross-entropy with label smoothing, and so is ``"logit"``: a mean logit has no minimum. A model that
            computes its own loss is trained with that (see :func:`singe_plugin.method.objective.own_loss`), and a
            function with itself.
        optimizer: the optimizer; None until :meth:`prepare` makes it.
        scheduler: the given one of that optimizer, or None.
        done: how many steps were taken.
        stream: the batches.
        scaler: scales the loss in half precision, or None.
        teacher: what is distilled from, while it is held: see :meth:`taught`; or None.

    Raises:
        ConfigError: if there is nothing to train on.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> tuner = Tuner(FineTune([(torch.randn(8, 4), torch.randint(0, 2, (8,)))], steps=3))
        >>> tuner.prepare(net)
        >>> tuner.run(net, 3, Callback())
        >>> tuner.done
        3
    """

    def __init__(self, options: FineTune, loader: Iterable[Any] | None = None) -> None:
        self.options = options
        batches = options.loader if loader is None else loader
        if batches is None:
            if options.steps:
                raise ConfigError("there is nothing to fine-tune on; give FineTune(loader=...)")
            batches = ()
        given = options.optimizer
        self.scheduler = given if isinstance(given, LRScheduler) else None
        self.optimizer = given if isinstance(given, torch.optim.Optimizer) else None
        if self.scheduler is not None:
            self.optimizer = self.scheduler.optimizer
        self._own_schedule = self.optimizer is None
        self.objective: ObjectiveLike = "loss"
        self._still = 0  # steps without a gradient, up to the first that has one
        self.stream = BatchStream(batches)
        self.done = 0
        self.rates = Rates()  # for those who say how long it takes
        self.average: Average | None = None
        self._mixing = Mixing(options) if options.added.mixes else None
        self._smoothing = options.label_smoothing if self._mixing is None else 0.0  # mixed targets are smooth already
        self.scaler: torch.amp.GradScaler | None = None
        self.teacher: Teacher | None = None
        self._distils: str | None = None  # the name of the last one

    def begin_average(self, model: nn.Module) -> None:
        """Hold the moving average that the options ask for, before anything is removed; it is then their ``ema``."""
        if (decay := self.options.added.ema_decay) is not None:
            self.average = Average(model, decay)
            recipe = replace(self.options.added, ema_decay=None)
            self.options = replace(self.options, ema=self.average.ema, recipe=recipe)

    def finish(self, model: nn.Module) -> None:
        """Leave the model with the average of its weights, if there is one of the steps that were taken."""
        if self.average is not None and self.done:
            self.average.give_to(model)

    def prepare(self, model: nn.Module) -> None:
        """Make the optimizer, if none was given, and start at step 0; called once, before the first removal.

        Raises:
            ConfigError: if the model has no parameter that wants a gradient, or the optimizer holds none of them.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        if self.options.steps and not trainable:
            raise ConfigError("every parameter is frozen (requires_grad=False), so fine-tuning cannot change the model")
        self._find_teacher(model)
        self.done, self._still, self.stream = 0, 0, BatchStream(self.stream.batches)
        mine = {id(p) for p in trainable}
        if self._own_schedule and self.optimizer is not None and not held_by(self.optimizer) & mine:
            self.optimizer = None  # it was made for another model
        if self.optimizer is None and trainable:
            self.optimizer = make_optimizer(self.options, trainable)
        if self.optimizer is not None:
            if trainable and not held_by(self.optimizer) & mine:
                raise ConfigError(
                    "the optimizer holds none of the model's parameters; build it from model.parameters()"
                )
            for group in self.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
            if self.options.steps and not self._own_schedule and self.scheduler is None:
                _logger.info(
                    "fine-tuning at the constant learning rate of the given %s; give a function that makes it, for the "
                    "cosine, or its scheduler in its place", type(self.optimizer).__name__,
                )  # fmt: skip
        if self.options.accelerator is not None:
            self.scaler = self.options.accelerator.scaler
        elif precision_of(self.options, model_device(model)) == torch.float16:
            self.scaler = torch.amp.GradScaler(model_device(model).type)

    @contextmanager
    def taught(
        self, model: nn.Module, example: Any = None, begun: bool = False, graph: AxisGraph | None = None
    ) -> Iterator[None]:
        """Hold the teacher in here, if the options ask for one: of the model as it is now, before anything is removed.

        Inside of another such block for the same model, the teacher is that one's. :meth:`prepare` takes it, too, where
        nobody did before; what is prepared outside of such a block keeps it.

        Args:
            model: what learns.
            example: inputs, to see whether it classifies.
            begun: whether something was removed already, so that the unpruned network is not here.
            graph: the axes of the model, if units are removed.

        Raises:
            ConfigError: see :func:`~singe_plugin.loop.distillation.find_teacher`.
        """
        held = self.teacher
        self._find_teacher(model, example, begun, graph)
        try:
            yield
        finally:
            if self.teacher is not held:
                self._release_teacher()

    def _find_teacher(
        self, model: nn.Module, example: Any = None, begun: bool = False, graph: AxisGraph | None = None
    ) -> None:
        """Hold the teacher from now on, unless it is held."""
        if self.teacher is None or self.teacher.model is not model:
            self._release_teacher()
            options = replace(self.options, step_fn=self.step_fn)
            self.teacher = find_teacher(options, self._chosen_loss(), model, example, begun, graph)
            self._distils = None if self.teacher is None else self.teacher.name

    def _release_teacher(self) -> None:
        held, self.teacher = self.teacher, None
        if held is not None:
            held.release()

    def describe(self) -> dict[str, Any]:
        """The options as plain values, with the loss, the teacher, the rate and its course that are in force.

        ``lr`` is the rate that the course ``schedule`` begins with: ``"cosine"``, ``"constant"`` (an optimizer was
        given, and no scheduler), or the name of the scheduler. It is None where a function makes the optimizer, until
        it is made: see :meth:`rate`.
        """
        made = describe(self.options)
        if self.average is not None:
            made |= {"ema": None, "recipe": {**made["recipe"], "ema_decay": self.average.ema.decay}}
        course = "constant"
        if self.scheduler is not None:
            course, made["optimizer"] = type(self.scheduler).__name__, type(self.optimizer).__qualname__
        loss = self.step_fn or self._chosen_loss()
        makes = self._own_schedule and callable(self.options.optimizer)
        return made | {
            "every": self.options.every or "layer",
            "minimises": name_of(loss),
            "distils": self._distils,
            "lr": None if makes and self.optimizer is None else self.rate(),
            "schedule": "cosine" if self._own_schedule else course,
            "batch_size": getattr(self.stream.batches, "batch_size", None),
        }

    def rate(self) -> float | list[float]:
        """The optimizer's learning rate before any schedule; a list where its groups have several."""
        if self.optimizer is None:
            return self.options.lr
        scheduled = self._own_schedule or self.scheduler is not None
        rates = [float(g.get("initial_lr", g["lr"]) if scheduled else g["lr"]) for g in self.optimizer.param_groups]
        return rates[0] if len(set(rates)) == 1 else rates

    @property
    def step_fn(self) -> Callable[[nn.Module, Any], Tensor] | None:
        """The given function of model and batch, or F, if it is one and there is no other loss; else None."""
        if self.options.step_fn is None and self.options.loss is None and isinstance(self.objective, BatchObjective):
            return self.objective
        return self.options.step_fn

    def _chosen_loss(self) -> Objective | None:
        """The given loss, or F; None for cross-entropy with label smoothing, as for ``loss`` and ``logit``."""
        if self.options.loss is not None:
            return self.options.loss
        return None if self.objective in ("loss", "logit") else get_objective(self.objective)

    def check(self, model: nn.Module, batch: Any) -> None:
        """See before anything is pruned that the loss fits the outputs in train mode and can move, on a scoring batch.

        Raises:
            DataError: see :func:`singe_plugin.loop.losses.check_loss`, and for a teacher whose outputs do not fit;
                ``step_fn`` is not tried.
        """
        if self.options.steps and self.step_fn is None:
            inputs, targets = to_device(inputs_for(model, batch), model_device(model), self.options.channels_last)
            started = time.perf_counter()
            check_loss(model, inputs, self._chosen_loss(), targets, self.options.label_smoothing)
            if self.teacher is not None:
                self.teacher.check(to_device(batch, model_device(model), self.options.channels_last))
            self.rates.trial = (time.perf_counter() - started) / max(examples_in(inputs), 1)

    def follow(self) -> None:
        """Bring the optimizer's state to where the parameters are; after the model was moved to another device."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    state.update({k: place_state(parameter, k, v, group) for k, v in state.items()})

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
            if self.scheduler is not None and schedule is not None:
                self.scheduler.load_state_dict(schedule)
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)
            for group, settings in groups:
                for key in [k for k in group if k != "params" and k not in settings]:
                    del group[key]  # initial_lr
                group.update(settings)

        return rewind

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
        if self.teacher is not None:
            self.teacher.look_up()
        modes = train_mode_of(model)
        model.train()
        try:
            passes = Phase(model, self._loss, self.options, self.stream, self.scaler)
            with torch.enable_grad(), casts_forgotten(), passes.done():
                for step in range(steps):
                    loss, lr = self._step(passes, model, (begun + step) / length)
                    self.done += 1
                    callback.on_finetune_step(FinetuneStep(self.done, self.options.steps, loss, lr))
        finally:
            for module, training in modes.items():
                module.training = training

    def _step(self, passes: Phase, model: nn.Module, share: float) -> tuple[float, float]:
        """One step, when ``share`` of the phase is over; the loss and the learning rate."""
        assert self.optimizer is not None
        lr = self._set_lr(share)
        self.optimizer.zero_grad(set_to_none=True)
        value = passes.gradients(self.done + 1, lr)
        scaler = self.scaler
        self._see_movement(value)
        if self.options.clip_grad is not None:
            if scaler:
                scaler.unscale_(self.optimizer)
            held = [p for g in self.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(held, self.options.clip_grad)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if callable(update := getattr(self.options.ema, "update", None)):
            update(model, *([self.done + 1] if self.average is not None else []))
        return value, lr

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        step = self.step_fn
        if step is not None:
            loss = step(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ConfigError(f"step_fn(model, batch), here {name_of(step)}, must return the loss, a scalar tensor")
            return loss.reshape(())
        try:
            if self._mixing is not None:
                batch = self._mixing(model, batch)
            if self.teacher is not None:
                return self.teacher.loss_on(model, batch, self._hard_loss)
            inputs, targets = inputs_for(model, batch)
            return loss_on(model, inputs, self._chosen_loss(), targets, self._smoothing)
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"fine-tuning step {self.done + 1} failed with {type(error).__name__}: {error}") from error

    def _hard_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss without a teacher."""
        return loss_of(outputs, self._chosen_loss(), targets, self._smoothing)

    def _see_movement(self, loss: float) -> None:
        """Raise if no step so far had a gradient; whoever says just what its teacher says needs none."""
        if self._still < 0 or (self.teacher is not None and loss == 0):
            return
        assert self.optimizer is not None
        held = (p.grad for g in self.optimizer.param_groups for p in g["params"])
        if any(grad is not None and bool((grad != 0).any()) for grad in held):
            self._still = -1
            return
        self._still += 1
        if self._still >= min(self.options.steps, _STILL):
            raise unmoved(f"no parameter had a gradient other than zero in {self._still} steps")

    def _set_lr(self, share: float) -> float:
        assert self.optimizer is not None
        if self._own_schedule:
            factor = 0.5 * (1 + math.cos(math.pi * share))
            if self.done < self.options.added.warmup:
                factor *= (self.done + 1) / self.options.added.warmup
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers whose state must be cut along with the model."""
        return () if self.optimizer is None else (self.optimizer,)
