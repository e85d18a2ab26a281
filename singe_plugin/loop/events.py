"""What happens while a network is pruned: events, the callbacks that see them, and the one history.

A callback overrides the methods it cares for; the others do nothing. The progress bar, the log and the history
are callbacks like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from singe_plugin.files import write_text
from singe_plugin.loop.outlook import Ahead, Measured
from singe_plugin.loop.repair import Solved

__all__ = [
    "Callback",
    "Callbacks",
    "Evaluated",
    "FinetuneStep",
    "History",
    "LayerDone",
    "LayerScored",
    "Removed",
    "Repaired",
    "RoundDone",
    "RunEnded",
    "RunStarted",
    "Stopped",
]


@dataclass(frozen=True)
class RunStarted:
    """The run begins: ``plan`` is layer -> units to remove, ``finetune_steps`` the total number of steps."""

    plan: dict[str, int]
    finetune_steps: int


@dataclass(frozen=True)
class LayerScored:
    """A layer was scored: ``scores`` has one value per remaining unit."""

    layer: str
    scores: Tensor
    seconds: float


@dataclass(frozen=True)
class Removed:
    """Units were removed: ``units`` in the numbering of the unpruned layer, ``left`` units remain.

    Single weights are too many to be named: ``units`` is empty then, and ``count`` says how many went.
    """

    layer: str
    units: tuple[int, ...]
    left: int
    count: int = -1

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, "count", len(self.units))


@dataclass(frozen=True)
class Repaired:
    """The survivors took over: what became of the ``layers`` whose inputs had changed, in forward order."""

    layers: tuple[Solved, ...]
    seconds: float

    @property
    def better(self) -> list[Solved]:
        """Those that have new weights."""
        return [layer for layer in self.layers if layer.ridge is not None]


@dataclass(frozen=True)
class FinetuneStep:
    """One optimisation step: the ``step``-th of ``total`` (from 1)."""

    step: int
    total: int
    loss: float
    lr: float


@dataclass(frozen=True)
class LayerDone:
    """A layer reached its ratio and the fine-tuning that follows it is done; ``shares`` as in :class:`RoundDone`."""

    layer: str
    index: int
    layers: int
    params: int
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundDone:
    """A round over all layers and the fine-tuning that follows it are done: the ``round``-th of ``rounds`` (from 1).

    ``removed`` units went in this round, ``left`` remain in the pruned layers. The ``shares`` of what there was before
    the first round that are left, in [0, 1]: of ``units``, ``params``, and of what the target counts.
    """

    round: int
    rounds: int
    removed: int
    left: int
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """The network was judged after a round (see :class:`singe_plugin.Evaluate`): the numbers, by name."""

    values: dict[str, float]


@dataclass(frozen=True)
class Stopped:
    """The network had become too bad: the last round was undone, for this reason, and nothing more is removed."""

    reason: str


@dataclass(frozen=True)
class RunEnded:
    """The run is over."""

    params: int
    seconds: float


class Callback:
    """Base class: override what you need.

    Example:
        >>> class Count(Callback):
        ...     removed = 0
        ...     def on_removed(self, event):
        ...         self.removed += len(event.units)
    """

    def on_model(self, model: nn.Module) -> None:
        """Before everything else, also of a run that goes on: the model, which a callback may act on."""

    def on_measured(self, event: Measured) -> None:
        """The network was measured, before and after the run; not where a pruner's ``run`` is called by itself."""

    def on_ahead(self, event: Ahead) -> None:
        """What is to be done is known, also of a run that goes on."""

    def on_run_start(self, event: RunStarted) -> None:
        """Before the first layer."""

    def on_layer_scored(self, event: LayerScored) -> None:
        """After each scoring."""

    def on_removed(self, event: Removed) -> None:
        """After each removal."""

    def on_repaired(self, event: Repaired) -> None:
        """The layers that read what was removed were solved again."""

    def on_finetune_step(self, event: FinetuneStep) -> None:
        """After each optimisation step."""

    def on_layer_done(self, event: LayerDone) -> None:
        """After each layer, fine-tuning included."""

    def on_round_done(self, event: RoundDone) -> None:
        """After each round, where layers are pruned together (see :mod:`singe_plugin.loop.loop`)."""

    def on_evaluated(self, event: Evaluated) -> None:
        """After each round, where the network is judged then; before :meth:`on_round_done`."""

    def on_stopped(self, event: Stopped) -> None:
        """The last round was undone, and the run goes to its end."""

    def on_run_end(self, event: RunEnded) -> None:
        """After the last layer and the last step."""


class Callbacks(Callback):
    """Passes every event on to several callbacks, in order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks: Sequence[Callback] = tuple(callbacks)

    def on_model(self, model: nn.Module) -> None:
        for callback in self.callbacks:
            callback.on_model(model)

    def on_measured(self, event: Measured) -> None:
        for callback in self.callbacks:
            callback.on_measured(event)

    def on_ahead(self, event: Ahead) -> None:
        for callback in self.callbacks:
            callback.on_ahead(event)

    def on_run_start(self, event: RunStarted) -> None:
        for callback in self.callbacks:
            callback.on_run_start(event)

    def on_layer_scored(self, event: LayerScored) -> None:
        for callback in self.callbacks:
            callback.on_layer_scored(event)

    def on_removed(self, event: Removed) -> None:
        for callback in self.callbacks:
            callback.on_removed(event)

    def on_repaired(self, event: Repaired) -> None:
        for callback in self.callbacks:
            callback.on_repaired(event)

    def on_finetune_step(self, event: FinetuneStep) -> None:
        for callback in self.callbacks:
            callback.on_finetune_step(event)

    def on_layer_done(self, event: LayerDone) -> None:
        for callback in self.callbacks:
            callback.on_layer_done(event)

    def on_round_done(self, event: RoundDone) -> None:
        for callback in self.callbacks:
            callback.on_round_done(event)

    def on_evaluated(self, event: Evaluated) -> None:
        for callback in self.callbacks:
            callback.on_evaluated(event)

    def on_stopped(self, event: Stopped) -> None:
        for callback in self.callbacks:
            callback.on_stopped(event)

    def on_run_end(self, event: RunEnded) -> None:
        for callback in self.callbacks:
            callback.on_run_end(event)


@dataclass
class History(Callback):
    """Everything that happened, as a list of plain dictionaries: what logs, plots and resuming read.

    Seconds are measured, so two identical runs differ in them alone; :meth:`without_times` compares equal.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def _add(self, event: str, **values: Any) -> None:
        self.rows.append({"event": event, **values})

    def on_run_start(self, event: RunStarted) -> None:
        self._add("run_start", **asdict(event))

    def on_layer_scored(self, event: LayerScored) -> None:
        scores = event.scores.double()
        self._add(
            "layer_scored",
            layer=event.layer,
            units=len(scores),
            lowest=float(scores.min()),
            highest=float(scores.max()),
            seconds=event.seconds,
        )

    def on_removed(self, event: Removed) -> None:
        count = {} if event.count == len(event.units) else {"count": event.count}
        self._add("removed", layer=event.layer, units=list(event.units), left=event.left, **count)

    def on_repaired(self, event: Repaired) -> None:
        rows = {s.name: {"before": s.before, "after": s.after, "ridge": s.ridge} for s in event.layers if not s.reason}
        left = {s.name: s.reason for s in event.layers if s.reason}
        self._add("repaired", layers=rows, unsolved=left, seconds=event.seconds)

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self._add("finetune_step", step=event.step, loss=event.loss, lr=event.lr)

    def on_layer_done(self, event: LayerDone) -> None:
        shares = {"shares": event.shares} if event.shares else {}
        self._add("layer_done", layer=event.layer, params=event.params, **shares)

    def on_round_done(self, event: RoundDone) -> None:
        self._add("round_done", **asdict(event))

    def on_evaluated(self, event: Evaluated) -> None:
        self._add("evaluated", values=dict(event.values))

    def on_stopped(self, event: Stopped) -> None:
        """What the undone round did to the network is taken out: it did not happen to the network that is left."""
        ends = [number for number, row in enumerate(self.rows) if row["event"] in ("run_start", "evaluated")]
        start = ends[-2] if len(ends) > 1 else -1
        undone = ("removed", "repaired", "layer_scored")
        self.rows[start + 1 :] = [row for row in self.rows[start + 1 :] if row["event"] not in undone]
        self._add("stopped", reason=event.reason)

    def on_run_end(self, event: RunEnded) -> None:
        self._add("run_end", params=event.params, seconds=event.seconds)

    def select(self, event: str) -> list[dict[str, Any]]:
        """The rows of one kind of event."""
        return [row for row in self.rows if row["event"] == event]

    def removals(self) -> dict[str, list[int]]:
        """Layer -> units removed, in order, in the numbering of the unpruned layer (not for single weights)."""
        found: dict[str, list[int]] = {}
        for row in self.select("removed"):
            found.setdefault(row["layer"], []).extend(row["units"])
        return found

    def without_times(self) -> list[dict[str, Any]]:
        """The rows without what depends on the clock."""
        return [{k: v for k, v in row.items() if k != "seconds"} for row in self.rows]

    def save(self, path: str | Path) -> None:
        """Write one JSON object per line; :class:`~singe_plugin.errors.ArtifactError` if that cannot be done."""
        write_text(Path(path), "".join(json.dumps(row) + "\n" for row in self.rows))
