"""``tp.pruner.SInGEPruner``: torch-pruning's ``BasePruner`` with verified groups and Algorithm 1."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Trackers, find_blocks, verify_groups
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.fields import as_options
from singe_plugin.loop.budget import plan_removals
from singe_plugin.loop.costs import Counted, count_params
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.events import Callback, History
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.loop import Loop, Turn, score_layers
from singe_plugin.loop.pace import AUTO, BY_SCORE, WIDE, Pace
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.survivors import Unpruned, images_of
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner
from singe_plugin.loop.turns import in_layers, in_rounds
from singe_plugin.loop.watch import Watch
from singe_plugin.loop.widths import Widths, with_step
from singe_plugin.method.batches import materialise
from singe_plugin.method.objective import ObjectiveLike
from singe_plugin.run.guards import check_here, check_parts, parts_of
from singe_plugin.run.job import carry_out, make_tuner
from singe_plugin.run.result import GroupRow

from .. import timm as _timm_adapters  # noqa: F401 - registers them
from .allocation import Rounds, counts_for
from .arguments import base_options, check_arguments, forward_of, settle_with
from .graph import AxisDependencyGraph
from .host import TorchPruningHost, block_of
from .importance import SInGEImportance
from .meter import Meter
from .stepping import SteppingPruner

__all__ = ["PruningOutcome", "SInGEPruner"]

_logger = logging.getLogger("singe_plugin")


@dataclass(frozen=True)
class PruningOutcome:
    """What :meth:`SInGEPruner.run` did.

    Attributes:
        model: the pruned model (the user's object).
        params, macs: ``(before, after)``; MACs are for the example inputs.
        plan: layer -> units removed.
        history: every event.
        left_whole: group -> why it was not pruned.
    """

    model: nn.Module
    params: tuple[int, int]
    macs: tuple[int, int]
    plan: dict[str, int]
    history: History
    left_whole: dict[str, str]


class SInGEPruner(SteppingPruner):
    """Prune with verified groups: one-shot or iteratively (``step``), or by the paper's Algorithm 1 (``run``).

    All arguments of ``tp.pruner.BasePruner`` are accepted, and ``step()``, ``step(interactive=True)`` and the
    pruning history work as there. What is added:

    - groups come from the axes of one forward pass (:class:`singe_plugin.axes.AxisGraph`) and pass two oracles
      before anything is removed; what fails, is not understood or reaches the model's output is left whole and
      reported in ``left_whole`` with the reason. ``num_heads``, ``unwrapped_parameters``, ``customized_pruners`` and
      channel groups are accepted and not needed.
    - attention: head dimensions are pruned by ``pruning_ratio``; whole heads with ``prune_num_heads`` and
      ``head_pruning_ratio``; ``prune_head_dims=False`` leaves the dimensions.
    - parameter objects survive removals: scheduler, hooks and ``requires_grad`` stay valid, and the state of the
      optimizers and EMA copies that are given here or to ``finetune`` is cut along. Another optimizer over the same
      parameters is told at its next step (:mod:`singe_plugin.stale`).
    - ``step`` refuses what only ``run`` obeys.
    - a failure rolls the model back.

    Args:
        model: the model; it stays in its train/eval mode and on its device.
        example_inputs: a tensor, a tuple of arguments or a dict of keywords.
        importance: any torch-pruning importance; a :class:`SInGEImportance` is bound to data, or gets ``batches``.
        target: for ``run``: the fraction to remove, ``"params=0.5"``, ``"macs=0.5"`` or ``"latency=0.3"``, or several
            that are met together; None removes ``pruning_ratio`` of each layer's units.
        pace: the order, how fast and how far, for ``run``: a :class:`~singe_plugin.Pace`, or the name of an order. By
            default Algorithm 1 to the letter, without limits of its own: ``Pace("layers", units_per_step=1,
            max_pruning_ratio=1, min_width=1)``, field by field. Its ``min_width`` holds in ``step``, too, and its
            ``max_pruning_ratio`` and ``round_to`` are ``BasePruner``'s.
        finetune: a :class:`~singe_plugin.FineTune` with a loader, or None. Without a loss of its own it
            minimises the importance's F.
        callbacks: see :mod:`singe_plugin.loop.events`.
        batches: data for importances that need gradients: torch-pruning's (Taylor, Hessian, OBD-C), and a
            :class:`SInGEImportance` that is not bound yet.
        optimizer: an optimizer, or several, to cut along (besides FineTune's).
        ema: an averaged copy to cut along (besides FineTune's).
        repair: a :class:`~singe_plugin.Repair`, or a number of images: ``run`` lets the survivors take over after its
            removals, on the inputs of ``batches``; None does not.

    Raises:
        ConfigError, DataError: for arguments that cannot mean anything.
        GroupError: if the model does not run on the example inputs.

    Example:
        >>> import torch, torch_pruning as tp, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruner = tp.pruner.SInGEPruner(net, torch.zeros(2, 4), tp.importance.MagnitudeImportance(),
        ...                                target="params=0.48", pace=singe_plugin.Pace(ratios="uniform"))
        >>> outcome = pruner.run()
        >>> outcome.params, net[0].out_features
        ((58, 30), 4)
    """

    kind: type[Progress] = Progress
    callbacks: Sequence[Callback]
    watch: Watch | None = None

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[..., Any],
        *args: Any,
        target: str | Target | None = None,
        pace: Pace | str | None = None,
        finetune: FineTune | Tuner | None = None,
        callbacks: Iterable[Callback] = (),
        batches: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        ema: nn.Module | None = None,
        repair: Repair | int | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(model, example_inputs, importance)
        self.target = None if target is None else Target.parse(target)
        options = base_options(args, kwargs)
        asked = as_options(Pace, pace, "pace", "order")
        self.pace = settle_with(asked, options)
        options["ignored_layers"] = parts_of(model, options["ignored_layers"])
        check_parts(model, finetune, callbacks := list(callbacks), options["ignored_layers"])
        self.tuner, self.callbacks = make_tuner(finetune, model), callbacks
        self.batches = None if batches is None else materialise(batches)
        self.model, self.example_inputs, self.importance = model, example_inputs, importance
        self.counted = Counted(model, example_inputs)
        self.meter = Meter(model, self.counted, self.target)
        self._objective: ObjectiveLike = "loss"
        self._cut_along = Trackers(
            list(optimizer) if isinstance(optimizer, Sequence) else [o for o in (optimizer,) if o is not None],
            [e for e in (ema, None if self.tuner is None else self.tuner.options.ema) if e is not None],
        )
        usual = Pace("layers")
        run_only = ("order", "rounds", "course", "units_per_step", "ratios", "blocks")
        self._only_run = [
            f"pace.{name}" for name in run_only if getattr(asked, name) not in (None, getattr(usual, name))
        ]
        parts = {"target": target is not None, "finetune": finetune is not None, "callbacks": bool(callbacks)}
        parts["repair"] = repair is not None
        self._only_run += [name for name, was_given in parts.items() if was_given]
        self._take(options)
        graph = AxisGraph(model, example_inputs, self.ignored_layers, self.ignored_params, forward_of(options))
        if self.pace.verify:
            for name, reason in verify_groups(graph).items():
                graph.drop(name, reason)
        self.DG = AxisDependencyGraph(graph, self._cut_along)
        if self.pace.blocks:
            self.find_blocks()
        self._block_names = frozenset(graph.blocks)
        self._initial = {g.name: g.initial for g in self.layers} | dict.fromkeys(graph.blocks, 1)
        self._forward, self._unpruned = forward_of(options), None
        if repair is not None:
            chosen = as_options(Repair, repair, "repair", "images")
            self.repair_with(chosen, self._images(chosen))

    def repair_with(self, repair: Repair, images: Sequence[Any], seed: int = 0, needed: bool = True) -> None:
        """Let the survivors take over after the removals of ``run``, on these inputs.

        Args:
            repair: how.
            images: inputs.
            seed: of the choice of positions.
            needed: whether it is an error if the model cannot be copied.
        """
        ignored = [*self.ignored_layers, *self.ignored_params]
        self._unpruned = Unpruned(self.model, images, repair, self.graph, ignored, self._forward, seed, needed)

    def _images(self, repair: Repair) -> list[Any]:
        batches = self.batches
        if batches is None and isinstance(self.importance, SInGEImportance):
            batches = self.importance.batches
        if batches is None:
            raise DataError("repair needs images: give SInGEPruner(batches=...), whose targets are not read")
        return images_of(batches, repair.images, self.model, self.objective)

    # -- Algorithm 1 and rounds -----------------------------------------------------------------------------------

    def plan(self) -> dict[str, int]:
        """How many units ``run`` will remove from each layer; nothing is removed.

        Raises:
            BudgetError: if the target cannot be met, with the nearest that can.
        """
        return self._plan(self.host())

    def _plan(self, host: TorchPruningHost) -> dict[str, int]:
        specs, scores, widths = host.layers(), None, self.widths
        ratios = self._named(self.pace.ratios) if isinstance(self.pace.ratios, Mapping) else str(self.pace.ratios)
        if ratios in BY_SCORE:
            last = {spec.name: torch.tensor([math.inf]) for spec in specs if spec.units < 2}  # whatever its score
            scores = last | score_layers(host, {spec.name: spec.units for spec in specs if spec.units > 1})
        if self.target is not None:
            return counts_for(host, self.target, ratios, widths, scores)
        specs = widths.of(specs)
        if self.pruning_ratio_dict:
            own = {spec.name: self._ratio_of(spec.name) for spec in specs}
            return plan_removals(specs, host.costs("params"), None, own)
        return plan_removals(specs, host.costs("params"), None, ratios, scores, self.pruning_ratio)

    @property
    def widths(self) -> Widths:
        """The widths that layers may have: multiples of what was asked for, or of what the device likes."""
        given = with_step(self.pace, self.target).round_to
        if given == AUTO:
            return Widths(WIDE if self.meter.table is None else self.meter.table.step)
        return Widths(int(given or 1), exact=True)

    def _ratio_of(self, layer: str) -> float:
        """The ratio that ``pruning_ratio_dict`` gives to a layer of the group, else ``pruning_ratio``."""
        for module in self.graph.groups[layer].writers.values():
            if module in self.pruning_ratio_dict:
                return float(self.pruning_ratio_dict[module][-1])
        return float(self.pruning_ratio)

    def _named(self, ratios: Mapping[Any, float]) -> dict[str, float]:
        """Ratios by layer name: modules become the names of the layers that contain them."""
        named: dict[str, float] = {}
        for key, ratio in ratios.items():
            if isinstance(key, str):
                named[key] = float(ratio)
                continue
            hits = [group.name for group in self.layers if any(key is w for w in group.writers.values())]
            if not hits:
                raise ConfigError(f"ratios: {key!r} is no prunable layer of the model; use names from pruner.layers")
            named.update(dict.fromkeys(hits, float(ratio)))
        return named

    def start(self, host: TorchPruningHost) -> Progress:
        """Nothing done: with the plan, or with what the rounds need."""
        kinds = ("params",) if self.target is None else ("params", *self.target.kinds, self.target.kind)
        if self.pace.order == "layers":
            return Progress(self._plan(host), before=host.sizes(*kinds))
        by_ratio = bool(self.target is None and self.pruning_ratio_dict)
        fixed = isinstance(self.pace.ratios, Mapping) or self.pace.ratios not in BY_SCORE or by_ratio
        return Progress({}, goal=self._plan(host) if fixed else {}, before=host.sizes(*kinds))

    @property
    def goal(self) -> float | None:
        """The share of the multiply-adds that is left in the end, where the target counts these."""
        target = self.target
        return None if target is None or target.kind != "macs" else 1 - target.fraction

    def turns(self, loop: Loop) -> Iterator[Turn]:
        """Algorithm 1 or rounds, as the pace says."""
        if self._unpruned is not None:
            self._unpruned.begin()
        if self.pace.order == "layers":
            return in_layers(loop, self.pace)
        host: Any = loop.host
        allocation = Rounds(
            host, loop.progress, self.target, float(self.pruning_ratio), str(self.pace.ratios), self.widths
        )
        return in_rounds(loop, self.pace, allocation, allocation.expected)

    def run(
        self,
        progress: Progress | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        history: History | None = None,
    ) -> PruningOutcome:
        """Algorithm 1 (layer by layer in forward order), or rounds over all layers: score, remove, fine-tune.

        Args:
            progress: where to continue (see :func:`singe_plugin.prune`); None starts at the beginning.
            checkpoint: called with the progress after every layer or round.
            history: to continue; None starts a new one.

        Raises:
            BudgetError: before anything is removed, if the target cannot be met.
            SingeError: if something fails on the way; the model, optimizer and EMA are rolled back.
        """
        check_here()
        history = history or History()
        before = count_params(self.model), self.counted.macs
        with carry_out(self, progress, checkpoint, history) as (host, done):
            after = host.sizes("params", "macs")
        return PruningOutcome(
            self.model, (before[0], after["params"]), (before[1], after["macs"]), dict(done.plan), history,
            dict(self.left_whole),
        )  # fmt: skip

    def find_blocks(self) -> None:
        """Find the residual blocks that may go, but for those with layers that stay: they are ``graph.blocks`` then."""
        graph = self.graph
        normalizer = getattr(getattr(self.importance, "scoring", None), "normalizer", None)
        if normalizer is not None:
            raise ConfigError(
                f"blocks=True compares a block with units of other layers, and normalizer={normalizer!r} makes the "
                "score of every block the same; leave one of them out"
            )
        find_blocks(graph, verify=self.pace.verify)
        ignored = {*self.ignored_layers, *self.ignored_params}
        distill = None if self.tuner is None else self.tuner.options.distill
        names = (distill.features or ()) if isinstance(distill, Distill) else ()
        watched = {module for name, module in graph.model.named_modules() if name in names}
        reasons = {}
        for name, block in graph.blocks.items():
            if any(m in ignored or not ignored.isdisjoint(m._parameters.values()) for m in block.modules):
                reasons[name] = "a layer in it is in ignored_layers"
            elif any(m in watched for m in block.modules - {block.module}):
                reasons[name] = "the fine-tuning learns from the features of a layer in it"
        graph.leave_blocks(reasons)
        if not graph.blocks:
            why = next(iter(reasons.values()), "none was found whose shortcut is an identity")
            _logger.warning("no residual block of %s can go as a whole: %s", type(graph.model).__name__, why)

    def rows(self) -> list[GroupRow]:
        """The pruned layers, and the residual blocks that could go: the units they had, and those they have.

        Nothing is left of a layer that went with its block.
        """
        there = {g.name: g.size for g in self.layers} | dict.fromkeys(self.graph.blocks, 1)
        first = self._initial | {g.name: g.initial for g in self.layers}
        blocks = self._block_names
        return [
            GroupRow(name, name if name in blocks else block_of(name), units, there.get(name, 0))
            for name, units in first.items()
        ]

    def numbers(self) -> dict[str, Any]:
        """Nothing: what is removed is gone."""
        return {}

    def fold(self) -> dict[str, Tensor]:
        """No masks are left to be made permanent."""
        return {}

    def check(self) -> None:
        """Say before anything is pruned that there is no data, or that F fits neither the outputs nor a layer.

        Rounds begin with a scoring of all layers, which says so too.
        """
        importance, batches, host = self.importance, self.batches, self.host()
        if self._unpruned is not None:
            self._unpruned.hold(anew=True)
        if isinstance(importance, SInGEImportance) and importance.scoring.rule.needs_gradient:
            if importance.model is None:
                if self.batches is None:
                    raise DataError(
                        f"criterion {importance.scoring.criterion!r} needs data: call importance.bind(model, batches) "
                        "or give SInGEPruner(batches=...)"
                    )
                self.importance = importance = copy(importance).bind(self.model, self.batches)
            batches = importance.batches
            if self.pace.order == "layers" and batches is not None:
                probe = copy(importance)
                probe.batches = list(islice(batches, 1))
                probe.scoring = replace(importance.scoring, criterion="grad", path="layer", normalizer=None)
                host.ranking.importance = probe
                host.score([spec.name for spec in host.layers()])
        if self.tuner is not None:
            for batch in islice(batches or (), 1):
                self.tuner.check(self.model, batch)
