r"""Entwined fine-tuning: how the optimisation steps between removals are taken (Algorithm 1, §3.3, §4.2).

The total number of steps is spread evenly over the phases: after every removal (Algorithm 1 as printed), after
every layer (§3.3, and the experiments), or all at the end (post-pruning, the paper's baseline in Table 2). The learning
rate falls along a cosine that starts again in each phase (one over the whole run would leave the last layers, which
lose the most, a rate near zero):

.. math:: \eta_t=\tfrac12\eta_0\,(1+\cos(\pi t/T_{\mathrm{phase}}))
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from singe_plugin.checks import check_choice, check_count, check_flag, check_number, closest, is_number
from singe_plugin.errors import ConfigError
from singe_plugin.fields import documented, option
from singe_plugin.loop.distill import TEACHERS, Distill
from singe_plugin.method.objective import Objective

__all__ = [
    "EVERY", "FineTune", "OptimizerLike", "Recipe", "held_by", "make_optimizer", "phase_share", "place_state",
]  # fmt: skip

EVERY = ("removal", "layer", "end")
OptimizerLike = (
    str | torch.optim.Optimizer | LRScheduler | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None
)


def phase_share(steps: int, phase: int, phases: int) -> int:
    """How many of ``steps`` the phase number ``phase`` of ``phases`` gets; the shares add up to ``steps``.

    Example:
        >>> [phase_share(10, phase, 4) for phase in range(4)]
        [2, 3, 2, 3]
    """
    return (phase + 1) * steps // phases - phase * steps // phases


@documented
class Recipe:
    """What recipes of training add to the fine-tuning: a warm-up, an average that is kept, mixed images.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> Recipe(ema_decay=0.998, mixup=0.2).cutmix
        0.0
    """

    warmup: int = option(default=0, text="Over how many steps the cosine's learning rate rises from zero.")
    ema_decay: float | None = option(
        default=None,
        text="The decay of a moving average of the weights over the steps (timm's ``ModelEmaV3``, which warms up), "
        "which the network ends with; 0.998 suits a thousand steps. None leaves it with the last weights.",
        flag="--model-ema-decay",
    )
    mixup: float = option(
        default=0.0, text="How much two images are mixed, the alpha of timm's ``Mixup``; 0 leaves it out."
    )
    cutmix: float = option(
        default=0.0, text="The alpha of a part of one image in another, or, with ``mixup``, in half of the batches."
    )

    def __post_init__(self) -> None:
        check_count("warmup", self.warmup, 0, "number of optimisation steps")
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, 0, 1, "[[", "decay of an average; None has none: a number")
        for name in ("mixup", "cutmix"):
            check_number(name, getattr(self, name), 0, math.inf, "[[", "strength of mixing: a number")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix)


@documented
class FineTune:
    """How a network is fine-tuned. A number stands for the fine-tuning with that many steps.

    What is minimised is ``loss`` or what ``step_fn`` returns, if one is given; else F, the objective that the run
    scores with. A teacher adds a term to it: see :class:`~singe_plugin.Distill`.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> FineTune(steps=10, every="end").lr
        0.03
    """

    loader: Iterable[Any] | None = option(
        is_object=True,
        default=None,
        text="Batches of ``(inputs, targets)`` or mappings to train on, iterated as often as needed. By default "
        "the run's data, a dataset in shuffled batches of 64.",
        command=False,
    )
    steps: int = option(default=1000, text="How many optimisation steps are taken in all.", flag="--finetune-steps")
    every: str | None = option(
        default=None,
        text="When fine-tuning happens: after every ``removal``, after every ``layer`` (in rounds: every round), "
        "or at the ``end``. By default ``layer``, and at the end where ``prune`` removes units in rounds.",
        choices=EVERY,
        flag="--finetune-every",
    )
    lr: float = option(default=0.03, text="The learning rate that the cosine of every phase begins with.")
    momentum: float = option(default=0.9, text="The momentum of an optimizer that is made here.")
    weight_decay: float = option(default=1e-4, text="The weight decay of an optimizer that is made here.")
    optimizer: OptimizerLike = option(
        is_object=True,
        named=True,
        default=None,
        text="The name of an optimizer as timm has them (``timm.optim.list_optimizers()``); an optimizer over the "
        "model's parameters, whose learning rates are left as they are (there is no cosine then); a scheduler of "
        "``torch.optim.lr_scheduler``, whose optimizer is used, and which is stepped once per step; or a "
        "function that makes an optimizer from the parameters, whose rates the cosine scales. By default SGD with "
        "momentum, without Nesterov's.",
        flag="--opt",
        read=str,
        metavar="NAME",
    )
    label_smoothing: float = option(default=0.1, text="The label smoothing of the cross-entropy.")
    loss: Objective | None = option(
        default=None, text="A function of outputs and targets that is minimised in the place of F.", command=False
    )
    distill: Distill | nn.Module | str | None = option(
        default=None,
        text="The teacher whose logits are learned from, too: ``unpruned``, the network before pruning; ``auto``, "
        "which is ``unpruned`` if the model classifies, else None; or a module. None learns from targets only; with a "
        "teacher, batches may be inputs alone, and are learned from it alone. A ``Distill`` says how, too.",
        choices=TEACHERS,
        none=True,
    )
    clip_grad: float | None = option(default=1.0, text="The largest norm of the gradients; None does not clip them.")
    amp: Any = option(
        is_object=True,
        named=True,
        default="auto",
        text="Mixed precision: ``bf16``, ``fp16``, None, or ``auto``, which is bf16 on CUDA cards that compute in it. "
        "An ``accelerate.Accelerator`` brings its own, and how many batches are accumulated for a step.",
        choices=("bf16", "fp16"),
        none=True,
    )
    ema: nn.Module | None = option(
        is_object=True,
        default=None,
        text="An averaged copy of the model, cut along with it; with a method ``update`` it is updated every step.",
        command=False,
    )
    recipe: Recipe | None = option(
        default=None,
        text="What recipes of training add, see :class:`~singe_plugin.Recipe`; None adds nothing.",
        command=False,
    )
    channels_last: bool = option(default=False, text="Whether batches of images are converted to that memory format.")
    step_fn: Callable[[nn.Module, Any], Tensor] | None = option(
        default=None,
        text="A function of the model and a batch that returns the loss, in the place of the forward pass and the "
        "loss; it is called in train mode.",
        command=False,
    )

    @property
    def added(self) -> Recipe:
        """The recipe; one that adds nothing, if there is none."""
        return self.recipe or Recipe()

    def settle(self, every: str) -> FineTune:
        """This fine-tuning with everything decided; it happens ``every`` so, if nothing was said."""
        return self if self.every is not None else replace(self, every=every)

    def __post_init__(self) -> None:
        if self.distill is not None and not isinstance(self.distill, Distill):
            object.__setattr__(self, "distill", Distill(self.distill))
        if not isinstance(self.recipe, (Recipe, type(None))):
            raise ConfigError(f"recipe={self.recipe!r} is no Recipe; give FineTune(recipe=Recipe(...)), or None")
        check_count("steps", self.steps, 0, "number of optimisation steps")
        check_choice("every", self.every, (*EVERY, None))
        check_flag("channels_last", self.channels_last)
        if self.accelerator is None:
            check_choice("amp", self.amp, ("auto", "bf16", "fp16", None))
        else:
            _check_accelerator(self.amp)
        if not (is_number(self.lr) and self.lr > 0):
            raise ConfigError(f"lr={self.lr!r} is not a learning rate; give a positive number")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} is not a setting of SGD; give a number >= 0")
        if self.added.ema_decay is not None and self.ema is not None:
            raise ConfigError("ema and ema_decay were both given; an average of your own has its own decay")
        if self.added.mixes and (self.loss is not None or self.step_fn is not None):
            raise ConfigError(
                "mixup and cutmix make shares of classes, which the cross-entropy learns from; with a loss or step_fn "
                "of your own mix in the loader, or there"
            )
        check_number("label_smoothing", self.label_smoothing, 0, 1, "[[", "smoothing; 0 switches it off: a number")
        if self.step_fn is not None and isinstance(self.distill, Distill) and self.distill.teacher != "auto":
            raise ConfigError(
                "distill and step_fn were both given, and step_fn computes the whole loss, so that the teacher would "
                "be ignored; leave one out, or distil inside of step_fn"
            )
        if self.clip_grad is not None and not (is_number(self.clip_grad) and self.clip_grad > 0):
            raise ConfigError(f"clip_grad={self.clip_grad!r} is not a gradient norm; give a positive number or None")
        _check_optimizer(self.optimizer)

    @property
    def accelerator(self) -> Any:
        """The accelerator that says how precisely is computed, or None."""
        return None if self.amp is None or isinstance(self.amp, str) else self.amp


def _check_accelerator(given: Any) -> None:
    """Raise :class:`ConfigError` unless it may be given in the place of a precision."""
    if not all(hasattr(given, name) for name in ("autocast", "backward", "distributed_type", "scaler")):
        raise ConfigError(
            f"amp={given!r} is no precision; choose one of 'auto', 'bf16', 'fp16', None, or give an "
            "accelerate.Accelerator"
        )
    shape = str(getattr(given.distributed_type, "value", given.distributed_type))
    if shape != "NO" and not shape.startswith("MULTI_"):
        raise ConfigError(
            f"the accelerator divides the model among processes ({shape}), and units are removed from whole models; "
            "prune with an Accelerator without it (data parallel), save the result, and load it under it"
        )


def _check_optimizer(given: Any) -> None:
    """Raise :class:`ConfigError` unless it may be given as the optimizer."""
    if isinstance(given, str):
        from timm.optim import list_optimizers  # here: most runs need none by name

        if given not in (names := list_optimizers()):
            raise ConfigError(
                f"unknown optimizer {given!r}{closest(given, names)}; the names are those of "
                "timm.optim.list_optimizers(); or give an optimizer, its scheduler, or a function that makes one"
            )
    elif isinstance(given, LRScheduler):
        for name, parameter in inspect.signature(given.step).parameters.items():
            if parameter.default is parameter.empty and "VAR" not in parameter.kind.name:
                raise ConfigError(
                    f"optimizer={type(given).__name__} is a scheduler whose step needs {name!r}, and is given nothing; "
                    "give another of torch.optim.lr_scheduler, or its optimizer alone"
                )
    elif isinstance(getattr(given, "optimizer", None), torch.optim.Optimizer) and not callable(given):
        raise ConfigError(
            f"optimizer={type(given).__name__} has an optimizer and is no scheduler of torch.optim.lr_scheduler, which "
            "alone are stepped here; give one of these, or the optimizer alone, whose rates stay as they are"
        )
    elif not (given is None or isinstance(given, torch.optim.Optimizer) or callable(given)):
        raise ConfigError(
            f"optimizer={given!r} is neither an optimizer, nor its scheduler, nor its name, nor a function that makes "
            "one from parameters"
        )


def make_optimizer(options: FineTune, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the options ask for, where they name or make it.

    Raises:
        ConfigError: if what was given makes something else.

    Example:
        >>> make_optimizer(FineTune(lr=0.1), [nn.Parameter(torch.ones(1))]).param_groups[0]["lr"]
        0.1
    """
    given, o = options.optimizer, options
    if isinstance(given, str):
        from timm.optim import create_optimizer_v2

        named: torch.optim.Optimizer = create_optimizer_v2(
            parameters, given, lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum
        )
        return named
    if given is None:
        return torch.optim.SGD(parameters, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
    assert not isinstance(given, (torch.optim.Optimizer, LRScheduler))  # these were there from the start
    made = given(parameters)
    if not hasattr(made, "param_groups"):
        raise ConfigError(
            f"the function that was given as optimizer made a {type(made).__name__}, and is to make an optimizer; "
            "a scheduler is given itself: FineTune(optimizer=scheduler)"
        )
    return made


def place_state(parameter: Tensor, key: str, value: Any, group: Mapping[str, Any]) -> Any:
    """A value of an optimizer's state where its step expects it: beside the parameter, but counts on the CPU.

    Only optimizers that are fused or captured in a graph count on the parameter's device.
    """
    counted = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value if counted or not isinstance(value, Tensor) else value.to(parameter.device)


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer updates."""
    return {id(p) for g in optimizer.param_groups for p in g["params"]}
