"""Pruning inside of Lightning's ``Trainer``: a callback.

Lightning is a package of its own (``pip install lightning``), and imported with this module, if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ArtifactError, ConfigError, MissingPackageError
from singe_plugin.loop.pace import Pace
from singe_plugin.method.options import Scoring

from .in_training import EpochPruning

__all__ = ["SInGEPruning"]

_FOUND = importlib.util.find_spec("lightning") is not None
_Callback: Any = importlib.import_module("lightning.pytorch").Callback if _FOUND else object


class SInGEPruning(_Callback):  # type: ignore[misc]
    """Removes units at the beginning of some epochs of a ``Trainer``'s training, in as many rounds.

    The state of all optimizers is cut along, and schedulers go on, for the optimizers and parameters stay the same
    objects. A checkpoint has the weights that are left and, in this callback's state, what was removed. Given to
    ``Trainer.fit(ckpt_path=...)`` (or ``validate``, ``test``, ``predict``) with an unpruned module and a new callback
    of the same options, this removes it again before the weights are loaded; :meth:`load` does so without a
    ``Trainer``.

    Args:
        epochs: the epochs, counted from 0, in ascending order.
        target: the fraction to remove in all, ``"macs=0.5"`` or ``"params=0.5"``.
        module: the name of the part of the ``LightningModule`` that is pruned, as ``"net"``; by default all of it,
            which is called with the inputs of a batch.
        scoring: a :class:`~singe_plugin.Scoring`, or the name of a criterion. The objective is cross-entropy of the
            outputs unless it says something else.
        pace: a :class:`~singe_plugin.Pace` for the course of the rounds and how far they may go.
        ignored_layers: modules or names of layers that stay whole.
        example_inputs: for tracing; None is two examples of the training data.
        batches: to score on; None draws them from the training data, anew for every round.

    Raises:
        ConfigError: for values that cannot mean anything; in training, for several devices, and for averaged copies
            that another callback keeps.
        MissingPackageError: if Lightning is not installed.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[SInGEPruning([2, 4, 6], "macs=0.5", module="net")])  # doctest: +SKIP
    """

    def __init__(
        self,
        epochs: Iterable[int],
        target: str = "macs=0.5",
        module: str = "",
        scoring: Scoring | str | None = None,
        pace: Pace | None = None,
        ignored_layers: Iterable[nn.Module | str] = (),
        example_inputs: Any = None,
        batches: Iterable[Any] | None = None,
    ) -> None:
        if not _FOUND:
            raise MissingPackageError("Lightning is not installed: pip install lightning", name="lightning")
        super().__init__()
        self.module = module
        self.pruning = EpochPruning(epochs, target, scoring, pace, ignored_layers, example_inputs, batches)
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See what is in the way, and be called before weights are loaded."""
        if trainer.world_size > 1:
            raise ConfigError(
                f"the Trainer runs on {trainer.world_size} devices, whose wrapper of the model knows the shapes that "
                "it was made with; prune with devices=1, or with singe_plugin.prune under torchrun"
            )
        for callback in trainer.callbacks:
            if hasattr(callback, "_average_model"):
                raise ConfigError(
                    f"{type(callback).__name__} keeps an averaged copy of the model, which is not cut along; leave it "
                    "out until the last round is over"
                )
        self._part(pl_module)
        self._listen(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take away what :meth:`setup` put into the module."""
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As after the end: nothing stays in the module."""
        self._forget()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Prune, if it is time."""
        epoch = trainer.current_epoch
        if self.pruning.is_due(epoch):
            with _apart(pl_module):
                self.pruning.prune(epoch, self._part(pl_module), trainer.optimizers, trainer.train_dataloader)

    def state_dict(self) -> dict[str, Any]:
        """What was removed."""
        return self.pruning.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: what was removed is removed before the weights are loaded, and this comes after them."""

    def load(self, checkpoint: str | Path, pl_module: Any) -> Any:
        """Load a checkpoint into an unpruned module, as ``load_from_checkpoint`` does for one that has its shapes.

        Args:
            checkpoint: the file. It is read without running code in it.
            pl_module: the module, as it was before pruning; it changes in place.

        Returns:
            the module.

        Raises:
            ArtifactError: if the checkpoint is of another model, or of a training without this callback.
        """
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self._remove(pl_module, found)
        pl_module.load_state_dict(found["state_dict"])
        return pl_module

    def _part(self, pl_module: Any) -> nn.Module:
        try:
            part: nn.Module = pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise ConfigError(
                f"module={self.module!r} is no part of {type(pl_module).__name__}; its parts are {names}"
            ) from error
        return part

    def _remove(self, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        if self.state_key not in states:
            raise ArtifactError(
                f"the checkpoint has no state of {self.state_key}, only of {', '.join(states) or 'no callback'}; it "
                "was written by a training without it"
            )
        with _apart(pl_module):
            self.pruning.restore(self._part(pl_module), states[self.state_key])

    def _listen(self, pl_module: Any) -> None:
        """Let the module's own hook, which comes before its weights, remove first."""
        self._forget()
        own, before = pl_module.on_load_checkpoint, pl_module.__dict__.get("on_load_checkpoint")

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            if self.state_key in checkpoint.get("callbacks", {}):
                self._remove(pl_module, checkpoint)
            own(checkpoint)

        def undo() -> None:
            if before is None:
                pl_module.__dict__.pop("on_load_checkpoint", None)
            else:
                pl_module.__dict__["on_load_checkpoint"] = before

        pl_module.__dict__["on_load_checkpoint"] = on_load_checkpoint
        self._undo = undo

    def _forget(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


@contextmanager
def _apart(pl_module: Any) -> Iterator[None]:
    """Let nothing of the trainer be reached from the module, which is followed and put back in here."""
    trainer = pl_module._trainer
    pl_module.trainer = None
    try:
        yield
    finally:
        pl_module.trainer = trainer
