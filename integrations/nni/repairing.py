"""The survivors of NNI's masks take over: when, on which images, and what must not be in the way.

A repair belongs between making masks and training on with them, so it happens right behind the masks, inside NNI's
training loop if they are made there. The wrapped model is solved in its plain view (:func:`.view.solved_view`), against
a copy of it that is made before the first unit is masked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.events import Repaired
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.survivors import Unpruned, images_of
from singe_plugin.masks import plain_weights
from singe_plugin.nested import copied, examples_in, to_device
from singe_plugin.rollback import Trackers, all_or_nothing
from singe_plugin.state import model_device, preserved

from .evaluators import Step, step_of
from .metrics import ScoringPruner
from .view import plain_view, solved_view, wrappers_in

__all__ = ["RepairingPruner", "Survivors", "check_solvable"]

_logger = logging.getLogger("singe_plugin")
Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The arguments and keywords that a model is called with."""


def check_solvable(wrappers: Iterable[ModuleWrapper]) -> None:
    """Raise :class:`ConfigError` if wrappers do more to a layer than to multiply masks, so that it cannot be solved."""
    for wrapper in sorted(wrappers, key=lambda wrapper: wrapper.name):
        if wrapper.quantization_target_spaces or wrapper.fused_modules:
            raise ConfigError(
                f"repair: {wrapper.name!r} is quantised by a compressor that is fused with the pruner, and would round "
                "what is solved by scales of other weights; prune and repair first, unwrap_model(), then make the "
                "quantizer; or give repair=None"
            )
        for target, space in wrapper.pruning_target_spaces.items():
            if space.apply_method != "mul":
                raise ConfigError(
                    f"repair: the mask of {wrapper.name}.{target} has the apply_method {space.apply_method!r}, and "
                    "only of one that is multiplied ('mul') it is known what is left to solve; give that, or "
                    "repair=None"
                )


def call(model: nn.Module, arguments: Call) -> Any:
    """Call a model as it was called."""
    return model(*arguments[0], **arguments[1])


def as_call(inputs: Any) -> Call:
    """Say how a model is called with the inputs of a batch.

    Example:
        >>> as_call({"pixels": 1}), as_call((1, 2)), as_call(3)
        (((), {'pixels': 1}), ((1, 2), {}), ((3,), {}))
    """
    if isinstance(inputs, Mapping):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def calls_in(model: nn.Module, step: Step, batches: Iterable[Any]) -> list[Call]:
    """Return how somebody's training step calls a model on batches; the model is in its plain view.

    Raises:
        DataError: if it does not call it.
    """
    found: list[Call] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(copied((args, kwargs)))

    with preserved(model), torch.enable_grad():
        handle = model.eval().register_forward_pre_hook(see, with_kwargs=True)
        for batch in batches:
            step(model, batch)
        handle.remove()
    if not found:
        raise DataError(
            f"repair: the training step computes its loss without calling {type(model).__name__} itself, so that it is "
            "not known what its inputs are; give the pruner batches=[(inputs, targets), ...], or repair=None"
        )
    return found


class Survivors:
    """The network before masking, and the repair of what is left.

    Args:
        model: the model, which is wrapped.
        options: how.
        batches: ``(inputs, targets)``, or None: then those of the training loop are used.
    """

    def __init__(self, model: nn.Module, options: Repair, batches: Sequence[Any] | None) -> None:
        self.model, self.options = model, options
        self.images = None if batches is None else [as_call(x) for x in images_of(batches, options.images, model)]
        self._unpruned = Unpruned(model, (), options, forward=call, plain=_plain)
        self._held = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See whether more is masked after the block than before.

        The network is copied as it is in front of the block, as long as nothing of it is masked (it may have been
        trained until then), or another compressor had masked it before.
        """
        if not self._held or not any(bool((mask == 0).any()) for mask in _masks(self.model)):
            with plain_view(self.model):
                self._unpruned.hold(anew=True)
            self._held = True
        before = [mask.clone() for mask in _masks(self.model)]
        yield
        after = list(_masks(self.model))
        if len(before) != len(after) or not all(map(torch.equal, before, after)):
            self._unpruned.removed()

    def is_due(self, last: bool) -> bool:
        """Whether there is something to repair now."""
        return self._unpruned.is_due(last)

    def repair(self, pruner: RepairingPruner, last: bool) -> Repaired | None:
        """Repair the model if it is time."""
        if not self.is_due(last):
            return None
        check_solvable(wrappers_in(self.model).values())
        device = model_device(self.model)
        images = pruner.seen_images() if self.images is None else self.images
        self._unpruned.on([to_device(image, device) for image in images])
        return self._unpruned.repair(last, ())


@contextmanager
def _plain(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The model as it is solved: without NNI's wrappers, and without PyTorch's masks that others hold."""
    with plain_weights(model) as held, solved_view(model) as masks:
        yield {**held, **masks}


def _masks(model: nn.Module) -> Iterator[Tensor]:
    """All masks that NNI has for a model."""
    for wrapper in wrappers_in(model).values():
        for space in wrapper.pruning_target_spaces.values():
            if space.mask is not None:
                yield space.mask


class RepairingPruner(ScoringPruner):
    """A pruner whose survivors take over; the constructor is :class:`SInGEPruner`'s.

    Attributes:
        survivors: what repairs; None where nothing is repaired.
    """

    survivors: Survivors | None = None
    _generated: int

    def repair_with(self, repair: Repair) -> None:
        """Let the survivors take over.

        Raises:
            ConfigError: for what cannot be solved.
            DataError: if there will be no images.
        """
        if self.evaluator is None and not self.batches:
            raise DataError(
                "repair needs images: give the pruner batches, whose targets are not read, or an evaluator, whose "
                "training loop has some"
            )
        check_solvable(self._module_wrappers.values())
        self.survivors = Survivors(self.bound_model, repair, self.batches)

    def check_repair(self, trains: bool) -> None:
        """Raise :class:`ConfigError` if a repair is due in this run and cannot be.

        Args:
            trains: whether the evaluator's training loop runs, in which batches are seen.
        """
        if self.survivors is None:
            return
        check_solvable(wrappers_in(self.bound_model).values())
        if not trains and self.survivors.images is None:
            raise ConfigError(
                f"repair needs images, and with the criterion {self.scoring.criterion!r} the evaluator trains nothing, "
                "so that no batch of its loop is seen; give batches=[(inputs, targets), ...], or repair=None"
            )

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If masks are followed by a repair and the block fails, weights, buffers and masks are as they were before."""
        with nullcontext() if self.survivors is None else all_or_nothing(self.bound_model, None, Trackers()):
            yield

    def mask(self, last: bool) -> None:
        """Make masks, and let what is left take over if it is time.

        Args:
            last: whether nothing else will be masked.
        """
        with self.all_or_nothing():
            self.update_masks(self.generate_masks())
            self.repair_and_tell(last)
        self._generated += 1

    def update_masks(self, masks: Any) -> None:
        """Set masks, as NNI's pruners do."""
        with nullcontext() if self.survivors is None else self.survivors.watched():
            super().update_masks(masks)

    def repair(self, last: bool) -> Repaired | None:
        """Let what is left take over, if it is time."""
        return None if self.survivors is None else self.survivors.repair(self, last)

    def repair_and_tell(self, last: bool) -> None:
        """Let what is left take over, if it is time, and tell whoever watches."""
        if self.survivors is None or not self.survivors.is_due(last):
            return
        with self.all_or_nothing():
            if (done := self.repair(last)) is not None:
                self.callback.on_repaired(done)

    def seen_images(self) -> list[Call]:
        """The latest inputs of the training loop, as its step gives them to the model.

        Raises:
            DataError: if there are none.
        """
        assert self.survivors is not None
        count = self.survivors.options.images
        batches = [] if self._collector is None else list(self._collector.images)
        if not batches:
            raise DataError("repair: no batch has been seen; the evaluator's training loop must run before")
        step = None if self._own_objective else step_of(self.evaluator)
        if step is None:
            images = [as_call(x) for x in images_of(batches, count, self.bound_model)]
        else:
            device = model_device(self.bound_model)
            with plain_view(self.bound_model):
                images = calls_in(self.bound_model, step, (to_device(batch, device) for batch in batches))
        sizes = [examples_in(image) for image in images]
        if sum(sizes) < count:
            _logger.warning(
                "the repair has %d images and not %d: the training loop has shown no more until now; give the pruner "
                "batches, or more training_steps", sum(sizes), count,
            )  # fmt: skip
        return [image for image, size in zip(images, sizes, strict=True) if size == max(sizes)]
