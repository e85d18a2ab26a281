"""Pruning inside of transformers' ``Trainer``: a callback.

transformers is imported with this module, if it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ArtifactError, ConfigError, MissingPackageError
from singe_plugin.files import write_atomically
from singe_plugin.loop.pace import Pace
from singe_plugin.method.options import Scoring

from ..in_training import EpochPruning
from .config import follow_config

__all__ = ["SInGEPruningCallback"]

_FOUND = importlib.util.find_spec("transformers") is not None
_Callback: Any = importlib.import_module("transformers").TrainerCallback if _FOUND else object
_FILE = "singe_pruning.pt"
_logger = logging.getLogger("singe_plugin")


class SInGEPruningCallback(_Callback):  # type: ignore[misc]
    """Removes units at the beginning of some epochs of a ``Trainer``'s training, in as many rounds.

    The state of the optimizer is cut along, and the scheduler goes on, for the optimizer and the parameters stay the
    same objects. Beside the weights of every checkpoint, ``singe_pruning.pt`` says what was removed. ``Trainer`` loads
    weights before it calls any callback, so this file is read by a call of yours:

    .. code-block:: python

        callback.restore(model, "out/checkpoint-60")  # an unpruned model, and a new callback of the same options
        Trainer(model, ..., callbacks=[callback]).train(resume_from_checkpoint="out/checkpoint-60")

    Args:
        epochs: the epochs, counted from 0, in ascending order.
        target: the fraction to remove in all, ``"macs=0.5"`` or ``"params=0.5"``.
        scoring: a :class:`~singe_plugin.Scoring`, or the name of a criterion. The objective is the model's own loss,
            where its batches have labels.
        pace: a :class:`~singe_plugin.Pace` for the course of the rounds and how far they may go.
        ignored_layers: modules or names of layers that stay whole.
        example_inputs: for tracing; None is two examples of the training data.
        batches: to score on; None draws them from the training data, anew for every round.

    Raises:
        ConfigError: for values that cannot mean anything; in training, for several processes or devices.
        MissingPackageError: if transformers is not installed.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[SInGEPruningCallback([1, 2], "params=0.3")])  # doctest: +SKIP
    """

    def __init__(
        self,
        epochs: Iterable[int],
        target: str = "macs=0.5",
        scoring: Scoring | str | None = None,
        pace: Pace | None = None,
        ignored_layers: Iterable[nn.Module | str] = (),
        example_inputs: Any = None,
        batches: Iterable[Any] | None = None,
    ) -> None:
        if not _FOUND:
            raise MissingPackageError(
                "transformers is not installed: pip install transformers accelerate", name="transformers"
            )
        self.pruning = EpochPruning(epochs, target, scoring, pace, ignored_layers, example_inputs, batches)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Prune, if it is time."""
        epoch = int((state.epoch or 0) + 1e-3)
        if not self.pruning.is_due(epoch):
            return
        if args.world_size > 1 or args.n_gpu > 1:
            raise ConfigError(
                f"the Trainer runs in {args.world_size} processes on {args.n_gpu} devices each, whose wrapper of the "
                "model knows the shapes that it was made with; train on one device, or prune with singe_plugin.prune "
                "under torchrun"
            )
        optimizer = given["optimizer"]
        plain = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self.pruning.prune(epoch, given["model"], [plain], given["train_dataloader"])

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what was removed into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_atomically(folder / _FILE, lambda path: torch.save(self.pruning.state(), path))

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the configuration say the widths that are left, where it can; what comes of it is logged."""
        if self.pruning.done:
            _logger.info(follow_config(given["model"], self.pruning.example))

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Remove from an unpruned model what was removed when a checkpoint was written, before its weights are loaded.

        Args:
            model: the model, as it was before pruning; it changes in place.
            checkpoint: the folder. What is read of it is read without running code in it.

        Raises:
            ArtifactError: if it was written by a training without this callback, or with another model.
        """
        path = Path(checkpoint) / _FILE
        if not path.is_file():
            raise ArtifactError(f"{path} is not there: the checkpoint was written by a training without this callback")
        self.pruning.restore(model, torch.load(path, map_location="cpu", weights_only=True))
