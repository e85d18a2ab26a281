"""What a run shows while it goes: lines in the log, and a bar with the time that is left."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TextIO

from tqdm import tqdm

from singe_plugin.loop.events import (
    Callback,
    Evaluated,
    FinetuneStep,
    LayerDone,
    LayerScored,
    Removed,
    Repaired,
    RoundDone,
    RunEnded,
    RunStarted,
    Stopped,
)
from singe_plugin.loop.outlook import Ahead, Measured, Outlook

__all__ = ["LogCallback", "ProgressBar", "as_time", "what_is_left"]


def what_is_left(shares: Mapping[str, float]) -> str:
    """What is left of a network, in words.

    Example:
        >>> what_is_left({"units": 0.61, "macs": 0.724}), what_is_left({})
        (' (61.0 % of the units, 72.4 % of the MACs)', '')
    """
    words = {"macs": "MACs", "params": "parameters"}
    parts = [f"{share:.1%} of the {words.get(kind, kind)}".replace("%", " %") for kind, share in shares.items()]
    return f" ({', '.join(parts)})" if parts else ""


def as_time(seconds: float | None) -> str:
    """Seconds as people say them.

    Example:
        >>> as_time(7.4), as_time(200), as_time(7300), as_time(None)
        ('7 s', '3 min 20 s', '2 h 1 min', 'unknown')
    """
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f", loss {loss:.4f}"


def _round_line(event: RoundDone, loss: float | None) -> str:
    head = f"round {event.round}/{event.rounds} done: {event.removed} removed, {event.left} left"
    return head + what_is_left(event.shares) + _loss(loss)


def _layer_line(event: LayerDone, loss: float | None) -> str:
    head = f"{event.index + 1}/{event.layers} {event.layer} done: {event.params} parameters left"
    return head + what_is_left(event.shares) + _loss(loss)


class LogCallback(Callback):
    """Writes one line per layer or round to the logger ``singe_plugin``."""

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
        self.logger.log(self.level, "%s", _layer_line(event, self._loss))

    def on_round_done(self, event: RoundDone) -> None:
        self.logger.log(self.level, "%s", _round_line(event, self._loss))


class ProgressBar(Callback):
    """Shows how far a run is, in seconds of work, and how long it still takes (see :mod:`singe_plugin.loop.outlook`).

    On a terminal that is a bar; in a file there are plain lines, one every ``interval`` seconds. Both have a line for
    every round, or layer, with the loss and what is left.

    Args:
        stream: where to; stderr.
        interval: seconds between two lines in a file.
        clock: says what time it is, in seconds.
        beats: whether a thread keeps it going while nothing is finished.

    Example:
        >>> import io
        >>> shown = io.StringIO()
        >>> bar = ProgressBar(shown, beats=False)
        >>> bar.on_round_done(RoundDone(1, 4, 20, 80, {"units": 0.8}))
        >>> print(shown.getvalue().strip())
        round 1/4 done: 20 removed, 80 left (80.0 % of the units)
    """

    def __init__(
        self, stream: TextIO | None = None, interval: float = 30.0, clock: Callable[[], float] = time.monotonic,
        beats: bool = True,
    ) -> None:  # fmt: skip
        self.stream = sys.stderr if stream is None else stream
        self.interval, self.clock, self.beats = interval, clock, beats
        self.outlook = Outlook(clock)
        self.bar: Any = None
        self._terminal = self.stream.isatty()
        self._loss: float | None = None
        self._doing = "scoring"
        self._open = {"scoring": False, "rounds": False}
        self._told = clock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- what happens -------------------------------------------------------------------------------------------------

    def on_measured(self, event: Measured) -> None:
        if event.last:
            self.close()
        else:
            self.outlook = Outlook(self.clock)
            self.outlook.closing = 1

    def on_ahead(self, event: Ahead) -> None:
        self.outlook.begin(event)
        self._told = self.clock()
        if self.beats and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        self._show()

    def on_layer_scored(self, event: LayerScored) -> None:
        self._open["scoring"] = True
        self._happened()

    def on_removed(self, event: Removed) -> None:
        self._scored()
        self._happened()

    def _scored(self) -> None:
        if self._open["scoring"]:
            self.outlook.done("scoring")
        self._open["scoring"] = False

    def _happened(self) -> None:
        self.outlook.spent()
        self._show()

    def on_repaired(self, event: Repaired) -> None:
        self._scored()
        self._finished("repair")

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self._scored()
        self._loss = event.loss
        self._doing = f"fine-tuning step {event.step}/{event.total}, loss {event.loss:.3f}"
        self._finished("step")

    def on_evaluated(self, event: Evaluated) -> None:
        self._scored()
        self._finished("evaluation")

    def _finished(self, kind: str) -> None:
        self.outlook.done(kind)
        self._show()

    def on_stopped(self, event: Stopped) -> None:
        self.outlook.stop()
        self._line(f"stopped: {event.reason}")

    def on_layer_done(self, event: LayerDone) -> None:
        if self._open["rounds"]:
            return  # all layers are done then, and the round has said it
        self._ended(event.shares)
        self._line(_layer_line(event, self._loss))

    def on_round_done(self, event: RoundDone) -> None:
        self._open["rounds"] = True
        self._ended(event.shares)
        self._line(_round_line(event, self._loss))

    def _ended(self, shares: Mapping[str, float]) -> None:
        self._scored()
        self._doing = "scoring"
        size = shares.get("macs", shares.get("params"))
        if size is not None:
            self.outlook.resize(size)

    def on_run_end(self, event: RunEnded) -> None:
        self._doing = "measuring"
        if not self.outlook.closing:
            self.close()

    # -- how it is shown ----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(1.0 if self._terminal else self.interval / 10):
            self._show()

    def _show(self) -> None:
        """Show how far it is: on a terminal now, in a file if it is time for a line."""
        now = self.clock()
        if now - self._told < (0.1 if self._terminal else self.interval):
            return
        self._told, left, gone = now, self.outlook.left(), self.outlook.elapsed()
        text = f"{as_time(left)} left, {self._doing}"
        if not self._terminal:
            share = "" if left is None else f"{gone / max(gone + left, 1e-9):.0%} done, ".replace("%", " %")
            self._line(f"pruning: {share}{as_time(gone)} gone, {text}")
            return
        if self.bar is None:
            form = "{desc}: {percentage:3.0f}%|{bar}|{postfix}"
            self.bar = tqdm(total=1, desc="pruning", bar_format=form, file=self.stream, dynamic_ncols=True, leave=False)
        if left is not None:
            self.bar.total = max(gone + left, 1e-9)
            self.bar.n = min(gone, self.bar.total)
        self.bar.set_postfix_str(text, refresh=True)

    def _line(self, text: str) -> None:
        if self._terminal and self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def close(self) -> None:
        """Take the bar down; a run that fails does not do it."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if self.bar is not None:
            self.bar.close()
            self.bar = None
