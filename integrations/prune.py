"""``singe_plugin.prune``: the one call that most people need."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sized
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import ConfigError, is_of_the_machine
from singe_plugin.fields import as_options, describe, to_plain
from singe_plugin.loop.costs import LATENCY
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.target import Target
from singe_plugin.loop.times import Timing
from singe_plugin.loop.watch import Evaluate
from singe_plugin.loop.widths import with_step
from singe_plugin.method.folding import fold_batchnorm
from singe_plugin.method.options import Scoring
from singe_plugin.ranks import together
from singe_plugin.run.result import Result
from singe_plugin.run.run import carry_through
from singe_plugin.run.staging import as_judge, set_stage, with_log

from .diffusers.config import follow_config as follow_diffusers
from .torch_pruning.importance import SInGEImportance
from .torch_pruning.pruner import SInGEPruner
from .transformers.config import follow_config as follow_transformers

__all__ = ["Result", "describe_target", "prune", "settle_target", "usual_every", "what_repairs", "what_scores"]

LATENCY_TABLE = "latency.json"
_logger = logging.getLogger("singe_plugin")


@together()
def prune(
    model: nn.Module,
    data: Any,
    *,
    target: str | Target | None = "macs=0.5",
    scoring: Scoring | str | Callable[..., Any] | None = None,
    pace: Pace | str | None = None,
    finetune: FineTune | int | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    val_data: Any = None,
    example_inputs: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    fold: bool = False,
    repair: Repair | int | str | None = "auto",
    callbacks: Iterable[Callback] = (),
    out_dir: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Prune a trained model with SInGE and entwined fine-tuning.

    Units of all layers go in rounds, ranked by score per MAC (or parameter): what kept the most on a trained ResNet-56
    (docs/results.md). ``pace="layers"`` is the paper's Algorithm 1, one layer after the other.

    In several processes (``torchrun``, ``accelerate launch``, a process group of your own) it is called in all of them
    alike, and they prune together: see "Many processes" in docs/usage.md.

    Args:
        model: changed in place (it is also ``result.model``); back on its device and in its modes afterwards.
        data: a dataset, a DataLoader, or a list of batches ``(inputs, targets)``. Example inputs, scoring batches
            and fine-tuning batches are taken from it.
        target: the fraction to remove, ``"macs=0.5"``, ``"params=0.5"`` or ``"latency=0.3"``, or several with commas,
            which are all met. A :class:`~singe_plugin.Target` says with what latency is measured, too. With a ratio
            per layer give None, or what the ratios come to; with other ratios None removes half of the units.
        scoring: a :class:`~singe_plugin.Scoring`, the name of a criterion, or any torch-pruning importance (in the
            place of the criterion: ``Scoring(importance, objective=...)``).
        pace: a :class:`~singe_plugin.Pace`, or the name of an order.
        finetune: a :class:`~singe_plugin.FineTune`, or a number of steps; 1000 steps, if nothing is said. It minimises
            the objective of the scoring, unless it has a ``loss`` or ``step_fn``.
        ignored_layers: modules or names of layers that stay whole, with what is inside of them.
        val_data: what the network is judged by, before and after: a dataset or batches (top-1 accuracy), a function of
            the model that returns a number or a dictionary of numbers, or an :class:`~singe_plugin.Evaluate`, which
            says how often, too, and how much worse it may get. None measures nothing.
        example_inputs: in the place of two examples from the data.
        device: where to run; None is the CUDA device that the model is on, else CUDA when there is one, else the CPU.
        seed: of everything random; the caller's random state is left alone.
        fold: fold batch-norm for good first, as in the paper's experiments.
        repair: a :class:`~singe_plugin.Repair`, or a number of images: after the last removal the layers that read
            what is gone are solved again, so that the survivors take over. ``"auto"`` does so unless the fine-tuning
            is entwined with the removals, which it would undo; None leaves them.
        callbacks: see :mod:`singe_plugin.loop.events`; a :class:`~singe_plugin.ProgressBar` shows a bar.
        out_dir: a folder for the checkpoint, written after every round (with ``pace="layers"``: every layer), and
            while it is fine-tuned at the end.
        resume: continue from the checkpoint in ``out_dir``, if there is one; ``model`` must be the unpruned model.

    Returns:
        the pruned model and everything measured.

    Raises:
        SingeError: one clear error; the model is as it was before.

    Example:
        >>> import torch, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> result = singe_plugin.prune(net, batches, target="params=0.5", finetune=4)
        >>> result.before.params, result.after.params
        (114, 58)
    """
    pace = as_options(Pace, pace, "pace", "order").settle()
    finetune = as_options(FineTune, finetune, "finetune", "steps").settle(usual_every(pace))
    judge = as_judge(val_data)
    mended = what_repairs(repair, finetune, judge)
    scoring, importance = what_scores(as_options(Scoring, scoring, "scoring", "criterion"), pace, mended is not None)
    wanted, pace = settle_target(target, pace)
    wanted = wanted if wanted is None else _with_table(wanted, out_dir)
    options = {
        **describe_target(wanted), "scoring": describe(scoring), "pace": describe(pace.named(model)), "seed": seed,
        "fold": fold, "repair": None if mended is None else describe(mended),
    }  # fmt: skip
    with set_stage(
        model, data, scoring=scoring, finetune=finetune, val_data=judge,
        example_inputs=example_inputs, device=device, seed=seed, out_dir=out_dir, resume=resume,
        images=0 if mended is None else mended.images, timing=None if wanted is None else wanted.timing,
    ) as stage:  # fmt: skip
        folded = list(fold_batchnorm(model, stage.example).folded) if fold else []
        if isinstance(importance, SInGEImportance) and importance.model is None:
            importance = copy(importance).bind(model, stage.batches)  # the user's stays free for other models and data
        pruner = SInGEPruner(
            model, stage.example, importance, target=wanted, pace=pace, finetune=stage.tuner,
            callbacks=with_log(callbacks), batches=stage.batches, ignored_layers=ignored_layers,
        )  # fmt: skip
        pruner.counted, pruner.meter.watch = stage.counted, stage.watch
        if mended is not None:
            pruner.repair_with(mended, stage.images, seed, needed=repair != "auto")
        pruner.objective = scoring.objective or "loss"
        result = carry_through(pruner, stage, options, folded, resume)
        _follow_config(model, stage.example)
        return result


def settle_target(target: str | Target | None, pace: Pace) -> tuple[Target | None, Pace]:
    """What is to go, and the pace: where it is to become faster, widths are rounded to what the device likes.

    Example:
        >>> settle_target("macs=0.3", Pace())[1].round_to, settle_target("params=0.3", Pace())[1].round_to
        ('auto', None)
    """
    wanted = None if target is None else Target.parse(target)
    return wanted, with_step(pace, wanted)


def describe_target(target: Target | None) -> dict[str, Any]:
    """What a run records of its target. Where a latency table was kept says nothing of the run.

    Example:
        >>> describe_target(Target.parse("macs=0.5"))
        {'target': 'macs=0.5'}
    """
    timing = None if target is None or target.timing in (None, Timing()) else describe(target.timing)
    said = {} if timing is None else {"timing": {k: v for k, v in timing.items() if k != "table"}}
    return {"target": None if target is None else str(target), **said}


def _with_table(target: Target, out_dir: str | Path | None) -> Target:
    """A target whose latency table is kept in the folder of the run: one that is resumed needs it."""
    timing = target.timing or Timing()
    if LATENCY in target.kinds and timing.table is None and out_dir is not None:
        timing = replace(timing, table=Path(out_dir) / LATENCY_TABLE)
    return target if LATENCY not in target.kinds and target.timing is None else replace(target, timing=timing)


def _follow_config(model: nn.Module, example: Any) -> None:
    """Let the configuration of a model of transformers or diffusers say its widths; what comes of it is logged.

    A failure is no reason to lose a run that is over: it is logged, too.
    """
    try:
        told = follow_diffusers(model, example) or follow_transformers(model, example)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        kind = type(model).__name__
        _logger.warning(
            "the configuration of %s was left as it was (%s: %s); use singe_plugin.save and singe_plugin.load", kind,
            type(error).__name__, error,
        )  # fmt: skip
        return
    if told:
        _logger.info(told)


def usual_every(pace: Pace) -> str:
    """When fine-tuning happens, if nothing is said: at the end of rounds, and entwined with Algorithm 1."""
    return "layer" if pace.order == "layers" else "end"


def what_repairs(repair: Repair | int | str | None, finetune: FineTune, judge: Evaluate | None = None) -> Repair | None:
    """How the survivors take over, if they do: where the network is judged after every round, in every round.

    Example:
        >>> what_repairs("auto", FineTune(every="end")), what_repairs("auto", FineTune(every="layer"))
        (Repair(images=512, every='end', ridge=None, positions=32), None)
    """
    if repair == "auto":
        limited = judge is not None and judge.max_drop is not None
        usual = Repair(every="round") if limited else Repair()
        return None if finetune.steps and finetune.every != "end" else usual
    return None if repair is None else as_options(Repair, repair, "repair", "images")


def what_scores(scoring: Scoring, pace: Pace, repaired: bool) -> tuple[Scoring, Callable[..., Any]]:
    """What is recorded of the scoring, with everything decided, and the importance that does it.

    Raises:
        ConfigError: for options of a criterion beside an importance, which has its own.
    """
    assert pace.order is not None
    usual = scoring.settle(pace.order, repaired=repaired)
    if isinstance(scoring.criterion, str):
        return usual, SInGEImportance(**vars(usual))
    importance, kind = scoring.criterion, type(scoring.criterion).__name__
    read = ("criterion", "batches", "batch_size", "objective")
    given = [f.name for f in fields(Scoring) if f.name not in read and getattr(scoring, f.name) != f.default]
    if given:
        raise ConfigError(f"{given[0]} was given beside a {kind}, which would ignore it; give it to that, if it has it")
    if not isinstance(importance, SInGEImportance):
        return usual, importance
    own = importance.scoring
    if scoring.objective not in (None, own.objective):
        raise ConfigError(
            f"objective={to_plain(scoring.objective)!r} was given beside an importance whose F is "
            f"{to_plain(own.objective)!r}; give it to the importance alone"
        )
    batches = scoring.batches or own.batches or usual.batches
    if isinstance(importance.batches, Sized):
        batches = len(importance.batches)
    return replace(own, batches=batches, batch_size=scoring.batch_size).settle("layers"), importance
