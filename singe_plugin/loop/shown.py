"""What a run shows while it goes: lines in the log, and a bar."""

from __future__ import annotations

import logging
from statistics import median
from typing import Any

from tqdm import tqdm

from singe_plugin.loop.events import (
    Callback,
    Evaluated,
    FinetuneStep,
    LayerDone,
    Removed,
    Repaired,
    RoundDone,
    RunEnded,
    RunStarted,
)

__all__ = ["LogCallback", "ProgressBar"]


class LogCallback(Callback):
    """Writes one line per layer to the logger ``singe_plugin``."""

    def __init__(self, level: int = logging.INFO) -> None:
        self.level = level
        self.logger = logging.getLogger("singe_plugin")
        self._loss: float | None = None

    def on_run_start(self, event: RunStarted) -> None:
        units, layers = sum(event.plan.values()), sum(1 for v in event.plan.values() if v)
        self.logger.log(
            self.level, "removing %d units from %d layers, %d fine-tuning steps", units, layers, event.finetune_steps
        )

    def on_repaired(self, event: Repaired) -> None:
        if event.better:
            before, after = (median(getattr(layer, which) for layer in event.better) for which in ("before", "after"))
            self.logger.log(
                self.level, "repaired %d of %d layers in %.0f s: their error fell from %.3f to %.3f (median)",
                len(event.better), len(event.layers), event.seconds, before, after,
            )  # fmt: skip
        for layer in (layer for layer in event.layers if layer.reason):
            self.logger.log(self.level, "%s was not repaired: %s", layer.name, layer.reason)

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self._loss = event.loss

    def on_evaluated(self, event: Evaluated) -> None:
        found = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
        self.logger.log(self.level, "it is judged: %s", found or "nothing could be measured")

    def on_layer_done(self, event: LayerDone) -> None:
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        self.logger.log(
            self.level,
            "%d/%d %s done: %d parameters left%s",
            event.index + 1,
            event.layers,
            event.layer,
            event.params,
            loss,
        )

    def on_round_done(self, event: RoundDone) -> None:
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        self.logger.log(
            self.level, "round %d/%d done: %d removed, %d left%s", event.round, event.rounds, event.removed, event.left,
            loss,
        )  # fmt: skip


class ProgressBar(Callback):
    """A tqdm bar over removals and fine-tuning steps, with the time that is left.

    A removal is one step; where they go into the hundreds of thousands (single weights), all of them are a thousand.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.unit, self.gone = 1, 0

    def on_run_start(self, event: RunStarted) -> None:
        units = sum(event.plan.values())
        self.unit = 1 if units < 100_000 else units // 1000
        self._open(units // self.unit + event.finetune_steps)

    def _open(self, total: int | None = None) -> None:
        self.bar = tqdm(total=total, unit="step", dynamic_ncols=True, desc="pruning")

    def _advance(self, count: int, **shown: Any) -> None:
        if self.bar is None:
            self._open()  # a resumed run has started before
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(count)

    def on_removed(self, event: Removed) -> None:
        before, self.gone = self.gone, self.gone + event.count
        self._advance(self.gone // self.unit - before // self.unit, layer=event.layer, left=event.left)

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self._advance(1, loss=f"{event.loss:.3f}")

    def on_run_end(self, event: RunEnded) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar down; a run that fails does not do it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
