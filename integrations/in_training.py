"""Pruning inside of somebody else's training loop: a round at the beginning of some of its epochs.

What loops have in common is here; :mod:`singe_plugin.integrations.lightning` and
:mod:`singe_plugin.integrations.transformers` say when it is called, and with what.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from singe_plugin.checks import check_count
from singe_plugin.errors import ArtifactError, ConfigError, DataError, RemovalError
from singe_plugin.fields import as_options
from singe_plugin.loop.loop import Loop, Turn
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.progress import Progress
from singe_plugin.method.batches import materialise
from singe_plugin.method.options import Scoring
from singe_plugin.nested import copied, map_tensors
from singe_plugin.ranks import processes
from singe_plugin.rollback import all_or_nothing
from singe_plugin.run.checkpoint import fitting, record_progress, restore_progress
from singe_plugin.run.data import example_from, scoring_batches
from singe_plugin.state import RngState, model_device

from .torch_pruning.importance import SInGEImportance
from .torch_pruning.pruner import SInGEPruner

__all__ = ["EpochPruning"]

_logger = logging.getLogger("singe_plugin")


class EpochPruning:
    """Removes units at the beginning of some epochs, in as many rounds, until a target is met.

    Args:
        epochs: the epochs, counted from 0, in ascending order.
        target: the fraction to remove in all, ``"macs=0.5"`` or ``"params=0.5"``.
        scoring: a :class:`~singe_plugin.Scoring`, the name of a criterion, or None for what ``prune`` takes in rounds
            without a repair: training goes on.
        pace: a :class:`~singe_plugin.Pace` for the course of the rounds and how far they may go.
        ignored_layers: modules or names of layers that stay whole.
        example_inputs: for tracing; None is two examples of the data.
        batches: to score on; None draws them from the loop's data set, anew for every round.
        ema: an averaged copy of the model, cut along with it, as timm's ``ModelEmaV3``.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> pruning = EpochPruning([1, 2], target="params=0.5")
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(net.parameters())
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> [pruning.prune(epoch, net, [optimizer], batches) for epoch in range(4)], net[0].out_features
        ([False, True, True, False], 8)
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
        ema: nn.Module | None = None,
    ) -> None:
        self.ema = ema
        self.epochs = list(epochs)
        for epoch in self.epochs:
            check_count("epochs", epoch, 0, "list of epochs, counted from 0")
        if not self.epochs or sorted(set(self.epochs)) != self.epochs:
            raise ConfigError(f"epochs={self.epochs} are not the epochs to prune at; give some, in ascending order")
        asked = as_options(Pace, pace, "pace", "order")
        if asked.order == "layers" or asked.rounds not in (None, len(self.epochs)):
            raise ConfigError(
                f"pace={asked!r}, but there is a round in each of the {len(self.epochs)} epochs; leave order and "
                "rounds out"
            )
        self.target, self.ignored, self.example = target, list(ignored_layers), example_inputs
        self.pace = replace(asked, order="rounds", rounds=len(self.epochs)).settle()
        self.scoring = as_options(Scoring, scoring, "scoring", "criterion").settle("rounds")
        self.batches = None if batches is None else materialise(batches)
        self.importance = SInGEImportance(**vars(self.scoring))
        self.pruner: SInGEPruner | None = None
        self.progress: Progress | None = None
        self._waiting: tuple[Loop, Iterator[Turn], Turn | None] | None = None

    @property
    def done(self) -> int:
        """How many rounds are over."""
        return 0 if self.progress is None else self.progress.next_layer

    def is_due(self, epoch: int) -> bool:
        """Whether :meth:`prune` would remove something now: rounds that were missed are made up for."""
        return sum(one <= epoch for one in self.epochs) > self.done

    def prune(self, epoch: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loader: Any) -> bool:
        """Remove what is due at the beginning of an epoch.

        Args:
            epoch: its number, from 0.
            model: the model, which stays in its modes and on its device.
            optimizers: those over its parameters; their state is cut along.
            loader: what is trained on.

        Returns:
            whether something was due.

        Raises:
            SingeError: if it fails; the model and the optimizers are as they were.
        """
        due = sum(one <= epoch for one in self.epochs) - self.done
        if due <= 0:
            return False
        if processes() > 1:
            raise ConfigError(
                "units are removed inside of a training loop in one process only; train on one device, or prune in "
                "many processes with singe_plugin.prune"
            )
        rng = RngState.capture()
        try:
            for _ in range(due):
                kept = deepcopy(self.progress)
                try:
                    self._round(epoch, model, optimizers, loader)
                except BaseException:
                    self.progress, self._waiting = kept, None
                    raise
        finally:
            rng.restore()
        return True

    def _round(self, epoch: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loader: Any) -> None:
        assert self.scoring.batches is not None
        batches = self.batches if self.batches is not None else self._drawn(loader)
        if self.pruner is None:
            first = next(iter(batches), None)
            if first is None:
                raise DataError("there is no batch to score on; give at least one of (inputs, targets)")
            if self.example is None:
                self.example = example_from(first, model_device(model), objective=self.scoring.objective)
            self.pruner = self._made(model)
        pruner = self.pruner
        if pruner.model is not model:
            raise ConfigError("the model is another one than at the last round; make a new callback for it")
        pruner.cut_along(optimizers)
        pruner.importance = copy(self.importance).bind(model, batches)
        with all_or_nothing(model, None, pruner.trackers(), pruner.graph):
            if self._waiting is None:
                host = pruner.host()
                progress = pruner.start(host) if self.progress is None else self.progress
                loop = Loop(host, progress)
                turns = pruner.turns(loop)
                self._waiting, self.progress = (loop, turns, next(turns, None)), progress
            loop, turns, turn = self._waiting
            loop.host = pruner.host()
            if turn is not None:
                before = len(loop.progress.removals)
                loop.take(turn)
                self._waiting = loop, turns, next(turns, None)
                gone = sum(len(units) for _, units in loop.progress.removals[before:])
                _logger.info("epoch %d: round %d of %d removed %d units", epoch, self.done, len(self.epochs), gone)

    def _made(self, model: nn.Module) -> SInGEPruner:
        return SInGEPruner(
            model,
            self.example,
            copy(self.importance),
            target=self.target,
            pace=self.pace,
            ignored_layers=self.ignored,
            ema=self.ema,
        )

    def _drawn(self, loader: Any) -> Iterable[Any]:
        """Batches of the loop's data set, by a loader of our own: its own is where it is."""
        assert self.scoring.batches is not None
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            generator = torch.Generator().manual_seed(self.done)
            size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or self.scoring.batch_size
            loader = DataLoader(
                loader.dataset, batch_size=size, shuffle=True, generator=generator, collate_fn=loader.collate_fn
            )
        elif not isinstance(loader, (list, tuple)):
            raise DataError(
                f"batches to score on cannot be drawn from a {type(loader).__name__} without taking them from the "
                "training; give some: batches=[(inputs, targets), ...]"
            )
        return scoring_batches(loader, loader, 1, self.scoring.batches)

    def state(self) -> dict[str, Any]:
        """What was removed, as plain values and tensors; empty, if nothing was."""
        if self.progress is None:
            return {}
        return {"progress": record_progress(self.progress), "example": _plain(copied(self.example))}

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Remove from an unpruned model what a state says, so that it has the shapes of the weights that belong to it.

        Raises:
            ArtifactError: if the state is of another model.
        """
        if not state:
            return
        device = model_device(model)
        self.example = map_tensors(lambda tensor: tensor.to(device), state["example"])
        with fitting():
            progress = restore_progress(state)
        if self.pruner is not None and self.pruner.model is model:
            if self.progress == progress:
                return  # it is that model, pruned
            raise ArtifactError("the model was pruned already; restore a checkpoint with a model that is whole")
        pruner = self._made(model)
        with all_or_nothing(model, None, pruner.trackers(), pruner.graph), fitting():
            host = pruner.host()
            try:
                for layer, units in progress.removals:
                    host.remove(layer, units)
            except RemovalError as error:
                raise ArtifactError(
                    f"what was removed does not fit this {type(model).__name__}: {error}; give the unpruned model that "
                    "was trained"
                ) from error
        self.pruner, self.progress, self._waiting = pruner, progress, None


def _plain(value: Any) -> Any:
    """Nested arguments in plain containers, which can be read without running code."""
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value)) if type(value) in (tuple, list) else tuple(map(_plain, value))
    return value.cpu() if isinstance(value, torch.Tensor) else value
