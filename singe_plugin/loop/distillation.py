r"""Distillation: the network that is pruned learns what a teacher, by default itself before pruning, says of a batch.

With a share :math:`w` and a temperature :math:`T`, the loss of fine-tuning becomes

.. math::
    (1-w)\,L+w\,T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(z^\text{teacher}/T)\,\|\,\mathrm{softmax}(z/T)\bigr)

where :math:`L` is the loss without a teacher (Hinton, Vinyals and Dean 2015, *Distilling the Knowledge in a Neural
Network*, section 2: the factor :math:`T^2` keeps the gradients of both terms comparable). A batch without targets has
no :math:`L`: it is learned from the teacher alone. What layers give may be learned from, too: see
:mod:`singe_plugin.loop.features`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from singe_plugin.axes.graph import AxisGraph
from singe_plugin.errors import ConfigError, DataError, SingeError, is_of_the_machine
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.features import Features, watched
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.losses import name_of
from singe_plugin.method.batches import has_targets, inputs_for, inputs_only
from singe_plugin.method.objective import Objective, cross_entropy, own_loss
from singe_plugin.nested import call_model, map_tensors
from singe_plugin.state import RngState, model_device, preserved, train_mode_of, unfused_attention
from singe_plugin.undo import Contents

__all__ = [
    "Teacher", "class_logits", "classifies", "distillation", "find_teacher", "frozen_copy", "is_cross_entropy",
]  # fmt: skip

_STEP = "leave distill out, or distil in a loss of your own: FineTune(step_fn=...)"
_INSTEAD = "give another module as the teacher, e.g. one that is built again with the same weights, or distill=None"
_logger = logging.getLogger("singe_plugin")


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    r"""Compute :math:`T^2\,\mathrm{KL}(\mathrm{softmax}(z^t/T)\,\|\,\mathrm{softmax}(z^s/T))`, the mean over a batch.

    Args:
        student, teacher: logits ``[B, C, ...]``, the classes where cross-entropy has them; every place of the other
            dimensions counts alike.
        temperature: :math:`T`; what is above 1 shows more of how a teacher ranks the wrong classes.

    Example:
        >>> distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]), 4.0)
        tensor(0.)
        >>> distillation(torch.tensor([[0.0, 0.0]]), torch.tensor([[20.0, 0.0]]), 1.0)  # log 2
        tensor(0.6931)
    """
    classes = 1 if student.ndim > 1 else 0
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)  # half is too coarse
    mine, theirs = ((z.to(kind) / temperature).log_softmax(classes) for z in (student, teacher))
    chance = theirs.exp()
    terms = torch.where(chance > 0, chance * (theirs - mine), 0.0)  # a class ruled out by -inf counts nothing
    return temperature**2 * terms.sum(classes).mean()


def class_logits(outputs: Any, whose: str) -> Tensor:
    """Return the logits in a model's outputs: a tensor ``[B, C, ...]``, or their ``logits`` ``[B, C]``.

    Raises:
        DataError: if there are none, or if which dimension has the classes is not known.

    Example:
        >>> class_logits({"logits": torch.zeros(1, 2)}, "the model")
        tensor([[0., 0.]])
    """
    held = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    logits = outputs if isinstance(outputs, Tensor) else held
    if not isinstance(logits, Tensor):
        raise DataError(
            f"{whose} returns {type(outputs).__name__}, and distillation is of logits, a tensor or .logits; {_STEP}"
        )
    shape = tuple(logits.shape)
    if not isinstance(outputs, Tensor) and logits.ndim != 2:
        raise DataError(
            f"{whose} returns .logits of shape {shape}, and only of (examples, classes) it is known where the classes "
            f"are; {_STEP}"
        )
    if logits.ndim == 0 or shape[min(1, logits.ndim - 1)] < 2 or not logits.is_floating_point():
        raise DataError(
            f"{whose} returns {logits.dtype} of shape {shape}, and distillation is of logits (examples, classes, ...) "
            f"with two classes or more; {_STEP}"
        )
    return logits


def classifies(model: nn.Module, example: Any) -> bool:
    """Whether a model's outputs for some example inputs, in eval mode, are a tensor that may be logits ``[B, C, ...]``.

    Example:
        >>> classifies(nn.Linear(3, 2), torch.zeros(1, 3)), classifies(nn.Linear(3, 1), torch.zeros(1, 3))
        (True, False)
    """
    with preserved(model), torch.no_grad():
        model.eval()
        outputs = call_model(model, example)
    if not isinstance(outputs, Tensor):
        return False
    return outputs.ndim > 1 and outputs.shape[1] > 1 and outputs.is_floating_point()


def is_cross_entropy(loss: Objective | None) -> bool:
    """Whether a loss is a cross-entropy, the outputs logits: fine-tuning's own (None), or one of PyTorch's.

    Example:
        >>> is_cross_entropy(None), is_cross_entropy(nn.CrossEntropyLoss()), is_cross_entropy(functional.mse_loss)
        (True, True, False)
    """
    while isinstance(loss, partial):
        loss = loss.func
    known = loss is None or loss is functional.cross_entropy or loss is cross_entropy
    return known or isinstance(loss, nn.CrossEntropyLoss)


def frozen_copy(model: nn.Module, who: str = "distill='unpruned' is", instead: str = _INSTEAD) -> nn.Module:
    """Return a deep copy in eval mode whose parameters want no gradient.

    Args:
        model: the model.
        who: wants it, in an error, with a verb.
        instead: what to do if there is none.

    Raises:
        ConfigError: if the model cannot be copied, or shares parameters with its copy.

    Example:
        >>> made = frozen_copy(nn.BatchNorm1d(1))
        >>> made.training, made.weight.requires_grad
        (False, False)
    """
    computed = [tensor for tensor in Contents([model], copied=0).tensors.values() if not tensor.is_leaf]
    try:  # what a forward pass left behind belongs to a graph, which has no copy
        made = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise ConfigError(
            f"{who} a copy of the model, and {type(model).__name__} cannot be copied "
            f"({type(error).__name__}: {error}); {instead}"
        ) from error
    _check_apart(made, model, f"the copy of the model ({who} one)")
    return made.eval().requires_grad_(False)


def _check_apart(teacher: nn.Module, model: nn.Module, whose: str) -> None:
    """Raise :class:`ConfigError` if the teacher would be pruned and trained along."""
    mine = {_memory(p): name for name, p in model.named_parameters()}
    for name, parameter in teacher.named_parameters():
        if parameter.numel() and (held := mine.get(_memory(parameter))) is not None:
            raise ConfigError(
                f"{whose} shares the parameter {name!r} with the model ({held!r}), and would be pruned and trained "
                f"along with it; {_INSTEAD}"
            )


def _check_whole(teacher: nn.Module, name: str) -> None:
    """Raise :class:`ConfigError` unless all of a given teacher has values, on one device."""
    first: dict[torch.device, str] = {}
    for key, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ConfigError(
                f"the teacher ({name}) has no values for {key!r} (it is lazy, or on meta); run it on a batch, or load "
                "its weights, first"
            )
        first.setdefault(tensor.device, key)
    if len(first) > 1:
        places = ", ".join(f"{key!r} on {device}" for device, key in first.items())
        raise ConfigError(f"the teacher ({name}) is spread over several devices ({places}); move it to one")


def _memory(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


class Teacher:
    """What is distilled from, while it teaches: in eval mode, on the model's device, without gradients.

    Args:
        given: a module, which :meth:`release` puts back as it was, or the name of the model before pruning.
        model: what learns; it is copied, if no module is given.
        temperature, share: see :func:`distillation` and the formula above.
        features: what else is learned from; None is logits alone.

    Attributes:
        network: the module, or the copy.
        name: what a run records: ``"unpruned"``, or the class of the module.

    Raises:
        ConfigError: if the model has no copy, or shares parameters with the teacher.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> teacher = Teacher("unpruned", net)
        >>> teacher.loss_on(net, torch.ones(1, 3), lambda outputs, targets: outputs.sum())
        tensor(0., grad_fn=<MulBackward0>)
    """

    def __init__(
        self, given: nn.Module | str, model: nn.Module, temperature: float = 4.0, share: float = 0.9,
        features: Features | None = None,
    ) -> None:  # fmt: skip
        self.model, self.temperature, self.share, self.features = model, temperature, share, features
        self._names = () if features is None else features.names
        self._before: tuple[torch.device, dict[nn.Module, bool], Contents] | None = None
        self._seen = self._told = False
        if not isinstance(given, nn.Module):
            self.network, self.name = frozen_copy(model), "unpruned"
            return
        self.network, self.name = given, type(given).__qualname__
        _check_whole(given, self.name)
        _check_apart(given, model, f"the teacher ({self.name})")
        self._before = model_device(given), train_mode_of(given), Contents([given])
        try:
            given.to(model_device(model)).eval()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Put a given module back on its device and into its modes; the copy is gone with this object."""
        if self._before is not None:
            home, modes, contents = self._before
            self._before = None
            for module, training in modes.items():
                module.training = training  # here, because the content of a scripted module cannot be seen
            if model_device(self.network) != home:
                self.network.to(home)
            contents.restore()

    def look_up(self) -> None:
        """See which units of the model are left, before it learns on: see :class:`Features`."""
        if self.features is not None:
            self.features.look_up()

    def loss_on(self, model: nn.Module, batch: Any, hard: Callable[[Any, Any], Tensor]) -> Tensor:
        """Compute the loss of a batch, with or without targets; see the formula above.

        Args:
            model: what learns.
            batch: as :func:`~singe_plugin.method.batches.split_batch` takes it, or inputs alone.
            hard: the loss without a teacher, of outputs and targets.

        Raises:
            DataError: if the outputs are no logits, or of another shape than the teacher's.
            ConfigError: if the features cannot be compared.
        """
        labelled = has_targets(batch)
        theirs, shown = self._says(inputs_for(self.network, batch)[0] if labelled else inputs_only(batch))
        inputs, targets = inputs_for(model, batch) if labelled else (inputs_only(batch), None)
        with watched(model, self._names, "the model") as seen:
            outputs = call_model(model, inputs)
        mine = class_logits(outputs, "the model")
        if mine.shape != theirs.shape:
            raise DataError(
                f"the teacher ({self.name}) returns logits of shape {tuple(theirs.shape)} and the model of shape "
                f"{tuple(mine.shape)}; give a teacher with the same classes, or {_STEP}"
            )
        soft = distillation(mine, theirs, self.temperature)
        if not labelled:
            self._tell()
        if labelled and self.share < 1:
            self._check_classes(outputs, targets)
            soft = (1 - self.share) * hard(outputs, targets) + self.share * soft
        return soft if self.features is None else soft + self.features.weight * self.features.loss(seen, shown)

    def _check_classes(self, outputs: Any, targets: Any) -> None:
        if own_loss(outputs) is not None and isinstance(targets, Tensor) and targets.is_floating_point():
            raise DataError(
                f"the model computes its own loss from targets of {targets.dtype}, so that its logits need not be of "
                f"classes that exclude each other, which distillation takes them for; {_STEP}"
            )

    def check(self, batch: Any) -> None:
        """Raise :class:`DataError` if the outputs for a batch do not fit the model's, which is left as it was."""
        self.look_up()
        with preserved(self.model), torch.set_grad_enabled(self.features is not None):
            self.model.eval()
            try:
                self.loss_on(self.model, batch, lambda outputs, targets: class_logits(outputs, "the model").sum())
            except (SingeError, torch.cuda.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                _logger.debug("distillation cannot be tried on a scoring batch: %s", error)

    def _says(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits and features; random states and inputs, which it might write into, are left alone."""
        rng = RngState.capture()
        try:
            if not self._seen and self._before is None:
                self._prove(inputs)
                rng.restore()
            self._seen = True
            watch = watched(self.network, self._names, f"the teacher ({self.name})")
            with torch.no_grad(), unfused_attention() if self._names else nullcontext(), watch as shown:
                outputs = call_model(self.network, map_tensors(torch.clone, inputs))
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"the teacher ({self.name}) fails on a batch with {type(error).__name__}: {error}; give one that takes "
                "the model's inputs"
            ) from error
        finally:
            rng.restore()
        return class_logits(outputs, f"the teacher ({self.name})").detach(), shown

    def _prove(self, inputs: Any) -> None:
        """Raise :class:`ConfigError` if the copy computes with the model's parameters, by a closure that it took over.

        Its own want no gradient, so that whatever has one is the model's.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with preserved(self.network), torch.enable_grad():
            logits = class_logits(call_model(self.network, map_tensors(torch.clone, inputs)), "the model's copy")
            if not logits.requires_grad or not trained:
                return
            found = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise ConfigError(
                f"the copy of {type(self.model).__name__}, for distill='unpruned', computes with the model's own "
                "parameters (a hook or a function in it refers to the model itself), and would be pruned along with "
                f"it; {_INSTEAD}"
            )

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            _logger.info("batches to fine-tune on have no targets: their loss is the distillation alone")


def find_teacher(
    options: FineTune, loss: Objective | None, model: nn.Module, example: Any = None, begun: bool = False,
    graph: AxisGraph | None = None,
) -> Teacher | None:  # fmt: skip
    """Make the teacher that the options ask for, before anything is removed; None if there is none.

    Args:
        options: how the model is fine-tuned.
        loss: what is minimised without a teacher; None is cross-entropy.
        model: what learns.
        example: inputs, to see whether it classifies.
        begun: whether something was removed already, so that the unpruned network is not here.
        graph: the axes of the model, if units are removed.

    Raises:
        ConfigError: for a loss that is of no logits, and see :class:`Teacher` and :class:`Features`.

    Example:
        >>> find_teacher(FineTune(distill="auto"), None, nn.Linear(3, 2), torch.zeros(1, 3)).name
        'unpruned'
    """
    asked = options.distill
    if not isinstance(asked, Distill) or not options.steps or options.step_fn is not None:
        return None
    given = asked.teacher
    if given == "auto":
        if begun or example is None or not is_cross_entropy(loss) or not classifies(model, example):
            return None
        features = _features(asked, model, graph)
        try:
            return Teacher(given, model, asked.temperature, asked.weight, features)
        except ConfigError as error:
            _logger.warning("fine-tuning goes without a teacher: %s", error)
            return None
    if not is_cross_entropy(loss):
        raise ConfigError(
            f"a teacher is learned from by its logits, and what is minimised is {name_of(loss)}, whose outputs need "
            "not be any; say that they are with FineTune(loss=torch.nn.functional.cross_entropy), leave distill out, "
            "or distil in a loss of your own: FineTune(step_fn=...)"
        )
    if begun and not isinstance(given, nn.Module):
        raise ConfigError(
            "distill='unpruned' is the network before pruning, and this run goes on with one that was pruned; give the "
            "unpruned network as a module: FineTune(distill=...)"
        )
    return Teacher(given, model, asked.temperature, asked.weight, _features(asked, model, graph))


def _features(asked: Distill, model: nn.Module, graph: AxisGraph | None) -> Features | None:
    """What is learned from beside logits, if anything."""
    if asked.features is None:
        return None
    given = asked.teacher if isinstance(asked.teacher, nn.Module) else None
    return Features(asked.features, model, graph, given, asked.feature_weight)
