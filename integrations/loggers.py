"""What a run tells, for TensorBoard and Weights & Biases: one callback each.

======================  =====================================================================================
``finetune/*``          ``loss`` and ``lr``, by fine-tuning step
``round/*``             ``removed`` and ``left`` units, and the shares of ``units``, ``params``, ``macs`` that are
                        left (``share_...``, in [0, 1]), by round; layer by layer it is ``layer/*``
``evaluation/*``        what the network is judged by, by round
``measured/*``          parameters, MACs, accuracy, latency: 0 is before the run, 1 after it; its ``seconds``
``seconds/*``           of ``scoring`` and ``repair``, by round
======================  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from singe_plugin.errors import ConfigError, MissingPackageError
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
)
from singe_plugin.loop.outlook import Measured

__all__ = ["LOGGERS", "Logger", "TensorBoardLogger", "WandbLogger", "make_logger"]


class Logger(Callback):
    """Turns the events of a run into numbers by name; where they go to, :meth:`write` says.

    Example:
        >>> class Printed(Logger):
        ...     def write(self, values, axis, step):
        ...         print(axis, step, dict(values))
        >>> Printed().on_finetune_step(FinetuneStep(3, 10, 0.5, 0.01))
        step 3 {'finetune/loss': 0.5, 'finetune/lr': 0.01}
    """

    def __init__(self) -> None:
        self._turns = 0
        self._rounds = False
        self._seconds = {"scoring": 0.0, "repair": 0.0}
        self._evaluated: dict[str, float] = {}

    def write(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Write numbers down.

        Args:
            values: by name.
            axis: what is counted along: ``step``, ``round``, ``layer``, or ``run``, which is 0 before and 1 after.
            step: where on that axis.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Everything is written; also called if the run failed."""

    def on_measured(self, event: Measured) -> None:
        self.write(_under("measured", event.values), "run", int(event.last))

    def on_layer_scored(self, event: LayerScored) -> None:
        self._seconds["scoring"] += event.seconds

    def on_removed(self, event: Removed) -> None:
        self._turns += event.count

    def on_repaired(self, event: Repaired) -> None:
        self._seconds["repair"] += event.seconds

    def on_finetune_step(self, event: FinetuneStep) -> None:
        self.write({"finetune/loss": event.loss, "finetune/lr": event.lr}, "step", event.step)

    def on_evaluated(self, event: Evaluated) -> None:
        self._evaluated = dict(event.values)

    def on_layer_done(self, event: LayerDone) -> None:
        if not self._rounds:  # in rounds all layers are done with the last one
            self._turn("layer", event.index + 1, {"removed": self._turns, "params": event.params}, event.shares)

    def on_round_done(self, event: RoundDone) -> None:
        self._rounds = True
        self._turn("round", event.round, {"removed": event.removed, "left": event.left}, event.shares)

    def _turn(self, axis: str, number: int, counts: Mapping[str, float], shares: Mapping[str, float]) -> None:
        values = {**counts, **{f"share_{kind}": share for kind, share in shares.items()}}
        found = _under(axis, values) | _under("seconds", self._seconds) | _under("evaluation", self._evaluated)
        self.write(found, axis, number)
        self._turns, self._seconds, self._evaluated = 0, {"scoring": 0.0, "repair": 0.0}, {}

    def on_run_end(self, event: RunEnded) -> None:
        self.write({"measured/seconds": event.seconds}, "run", 1)


def _under(head: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{head}/{name}": float(value) for name, value in values.items()}


class TensorBoardLogger(Logger):
    """Writes scalars for TensorBoard: ``tensorboard --logdir FOLDER``.

    Args:
        folder: where the event files go.

    Raises:
        MissingPackageError: if TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError(
                f"TensorBoard is needed for its log and cannot be imported ({error}); pip install tensorboard",
                name="tensorboard",
            ) from error
        self.writer: Any = SummaryWriter(str(folder))

    def write(self, values: Mapping[str, float], axis: str, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_run_end(self, event: RunEnded) -> None:
        super().on_run_end(event)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLogger(Logger):
    """Logs to Weights & Biases, every group of numbers along its own axis.

    Args:
        run: a run of ``wandb.init``, which stays open; None begins one, which :meth:`close` ends.
        options: for ``wandb.init``: ``project``, ``name``, ``config``, ``dir``, ``mode``.

    Raises:
        MissingPackageError: if wandb is not installed.
        ConfigError: if no run can be begun.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        super().__init__()
        self._own = run is None
        self.run = _begin(options) if run is None else run
        for axis, heads in {
            "step": ("finetune",), "round": ("round", "evaluation", "seconds"), "layer": ("layer",),
            "run": ("measured",),
        }.items():  # fmt: skip
            self.run.define_metric(axis, hidden=True)
            for head in heads:
                self.run.define_metric(f"{head}/*", step_metric=axis)

    def write(self, values: Mapping[str, float], axis: str, step: int) -> None:
        self.run.log({**values, axis: step})

    def close(self) -> None:
        if self._own:
            self.run.finish()


def _begin(options: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError(
            f"wandb is needed for its log and cannot be imported ({error}); pip install wandb", name="wandb"
        ) from error
    try:
        return wandb.init(**options)
    except Exception as error:
        raise ConfigError(
            f"wandb cannot begin a run ({type(error).__name__}: {error}); run 'wandb login' first, or set "
            "WANDB_MODE=offline"
        ) from error


def _tensorboard(output: Path, config: Mapping[str, Any]) -> Logger:
    return TensorBoardLogger(output / "tensorboard")


def _wandb(output: Path, config: Mapping[str, Any]) -> Logger:
    return WandbLogger(dir=str(output), config=dict(config))


LOGGERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def make_logger(name: str, output: Path, config: Mapping[str, Any]) -> Logger:
    """The logger of a name, which writes into a run's folder.

    Args:
        name: one of ``LOGGERS``.
        output: the folder.
        config: what the run was asked for.
    """
    return LOGGERS[name](output, config)
