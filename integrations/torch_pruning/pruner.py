"""``tp.pruner.SInGEPruner``: torch-pruning's ``BasePruner`` with verified groups and Algorithm 1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.algorithm import Pause, Progress, algorithm_1, tune
from singe_plugin.axes import AxisGraph, Group, Snapshot, Trackers, verify_groups
from singe_plugin.batches import materialise
from singe_plugin.budget import BY_SCORE, Target, count_macs, count_params, plan_removals
from singe_plugin.errors import BudgetError, ConfigError, DataError
from singe_plugin.events import Callback, Callbacks, History
from singe_plugin.finetune import FineTune
from singe_plugin.objective import ObjectiveLike, get_objective
from singe_plugin.rollback import all_or_nothing
from singe_plugin.rounds import check_rounds, decided, rounds_of

from .. import timm as _timm_adapters  # noqa: F401 - registers them
from ..checks import check_here, check_lone, check_parts, parts_of
from .allocation import Rounds, counts_for, sizes
from .arguments import base_options, check_arguments, check_min_width, check_ratios, forward_of
from .graph import AxisDependencyGraph, AxisGroup
from .host import TorchPruningHost, channels_per_unit, scores_per_unit
from .importance import SInGEImportance
from .scorers import RoundScorer, with_gradients

__all__ = ["PruningOutcome", "SInGEPruner"]


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


class SInGEPruner(tp.pruner.BasePruner):  # type: ignore[misc]
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
        target: for ``run``: the fraction to remove, ``"params=0.5"`` or ``"macs=0.5"``; None removes
            ``pruning_ratio`` of each layer's units.
        ratios: how it is spread: ``"uniform"``, ``"block"`` (one ratio per block, §3.3), ``"global"`` (by score),
            ``"per_cost"`` (by score per parameter or MAC) or ``{layer or block name: ratio}``. None is ``"block"``
            for layers one after the other and ``"per_cost"`` for rounds.
        units_per_step: removals between two scorings with ``order="layers"``: None or 1 is Algorithm 1 to the letter; a
            number, a fraction of the layer inside ]0, 1[, or ``"layer"``.
        order: of ``run``: ``"layers"`` is Algorithm 1, one layer after the other; ``"rounds"`` scores all layers, then
            removes units of all of them.
        rounds, schedule: how many rounds (None is 4; 1 scores the intact model only), and how fast the target is
            approached over them: ``"cubic"`` or ``"linear"``, see :mod:`singe_plugin.rounds`.
        min_width: how many units of a layer stay at least, in ``run`` and in ``step``, beside ``max_pruning_ratio``; a
            layer that has no more is left as it is.
        finetune: a :class:`~singe_plugin.FineTune`, or None. Without a loss of its own it minimises the importance's F.
        callbacks: see :mod:`singe_plugin.events`.
        batches: data for importances that need gradients: torch-pruning's (Taylor, Hessian, OBD-C), and a
            :class:`SInGEImportance` that is not bound yet.
        optimizer: an optimizer to cut along (besides FineTune's).
        ema: an averaged copy to cut along (besides FineTune's).
        verify: run the oracles.

    Raises:
        ConfigError, DataError: for arguments that cannot mean anything.
        GroupError: if the model does not run on the example inputs.

    Example:
        >>> import torch, torch_pruning as tp, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pruner = tp.pruner.SInGEPruner(net, torch.zeros(2, 4), tp.importance.MagnitudeImportance(),
        ...                                target="params=0.48", ratios="uniform")
        >>> outcome = pruner.run()
        >>> outcome.params, net[0].out_features
        ((58, 30), 4)
    """

    current_step: int

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[..., Any],
        *args: Any,
        target: str | Target | None = None,
        ratios: str | Mapping[Any, float] | None = None,
        units_per_step: int | float | str | None = None,
        order: str = "layers",
        rounds: int | None = None,
        schedule: str = "cubic",
        min_width: int = 1,
        finetune: FineTune | None = None,
        callbacks: Iterable[Callback] = (),
        batches: Iterable[Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        ema: nn.Module | None = None,
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments(model, example_inputs, importance)
        self.target = None if target is None else Target.parse(target)
        given = {"ratios": ratios, "units_per_step": units_per_step, "rounds": rounds}
        order, ratios, rounds, units_per_step = decided(order, ratios, rounds, units_per_step, default_units=1)
        self.ratios = check_ratios(ratios)
        check_rounds(rounds, schedule)
        self.order, self.rounds, self.schedule = order, rounds, schedule
        self.min_width = check_min_width(min_width)
        options = base_options(args, kwargs)
        options["ignored_layers"] = parts_of(model, options["ignored_layers"])
        check_parts(model, finetune, callbacks := list(callbacks), options["ignored_layers"])
        self.units_per_step, self.finetune, self.callbacks = units_per_step, finetune, callbacks
        self.batches = None if batches is None else materialise(batches)
        self.model, self.example_inputs, self.importance = model, example_inputs, importance
        self._objective: ObjectiveLike = "loss"
        self.trackers = Trackers(
            [o for o in (optimizer,) if o is not None],
            [e for e in (ema, getattr(finetune, "ema", None)) if e is not None],
        )
        self._only_run = {
            "target": target is not None, "ratios": given["ratios"] is not None,
            "units_per_step": given["units_per_step"] is not None, "order": order != "layers",
            "rounds": given["rounds"] is not None, "schedule": schedule != "cubic", "finetune": finetune is not None,
            "callbacks": bool(callbacks),
        }  # fmt: skip
        self._take(options)
        graph = AxisGraph(model, example_inputs, self.ignored_layers, self.ignored_params, forward_of(options))
        if verify:
            for name, reason in verify_groups(graph).items():
                graph.drop(name, reason)
        self.DG = AxisDependencyGraph(graph, self.trackers)
        self._initial = {name: group.size for name, group in graph.groups.items()}

    def _take(self, options: dict[str, Any]) -> None:
        """Keep ``BasePruner``'s options under its names."""
        for name in (
            "global_pruning", "pruning_ratio", "max_pruning_ratio", "isomorphic", "round_to", "iterative_steps",
            "iterative_pruning_ratio_scheduler", "prune_num_heads", "prune_head_dims", "head_pruning_ratio",
        ):  # fmt: skip
            setattr(self, name, options[name])
        self.root_module_types = list(options["root_module_types"])
        given = options["ignored_layers"]
        self.ignored_layers = [m for part in given if isinstance(part, nn.Module) for m in part.modules()]
        self.ignored_params = [part for part in given if isinstance(part, nn.Parameter)]
        self.current_step = 0
        schedule = self.iterative_pruning_ratio_scheduler
        self.per_step_pruning_ratio = schedule(self.pruning_ratio, self.iterative_steps)
        self.per_step_head_pruning_ratio = schedule(self.head_pruning_ratio, self.iterative_steps)
        self.pruning_ratio_dict, self._scopes = {}, {}
        for number, (key, ratio) in enumerate((options["pruning_ratio_dict"] or {}).items()):
            for module in (m for part in (key if isinstance(key, tuple) else (key,)) for m in part.modules()):
                self.pruning_ratio_dict[module] = schedule(ratio, self.iterative_steps)
                self._scopes[module] = f"scope {number}"
        self.head_pruning_ratio_dict = {
            module: schedule(ratio, self.iterative_steps)
            for part, ratio in (options["head_pruning_ratio_dict"] or {}).items()
            for module in part.modules()
        }

    # -- groups ---------------------------------------------------------------------------------------------------

    @property
    def left_whole(self) -> dict[str, str]:
        """Group or layer -> why it is not pruned."""
        return self.DG.axis_graph.left_whole

    @property
    def layers(self) -> list[Group]:
        """The groups that are pruned, in forward order.

        Of groups that share their channels, this is the one with the smaller units: the dimensions of attention heads
        rather than whole heads. ``prune_num_heads=True`` adds the heads (by ``head_pruning_ratio``),
        ``prune_head_dims=False`` leaves their dimensions out.
        """
        roots = tuple(self.root_module_types)
        return [
            group
            for group in self.DG.axis_graph.groups.values()
            if any(isinstance(writer, roots) for writer in group.writers.values()) and self._is_chosen(group)
        ]

    def _is_chosen(self, group: Group) -> bool:
        if group.secondary:
            return bool(self.prune_num_heads) and group.is_heads
        return bool(self.prune_head_dims) or not group.in_heads

    # -- BasePruner's own way -------------------------------------------------------------------------------------

    def estimate_importance(self, group: Any) -> Any:
        """Score one group; importances that read gradients get them from ``batches``."""
        if self.batches is None:
            return self.importance(group)  # the user may have called backward() for Taylor, as in torch-pruning
        return with_gradients(self, self.importance, self.batches, lambda: self.importance(group))

    @torch.no_grad()
    def _prune(self) -> Iterator[AxisGroup]:
        """Choose what to remove, as ``BasePruner`` does: rank the units of every scope, take the least important."""
        if self.current_step > self.iterative_steps:
            warnings.warn("all iterative steps are done: nothing is pruned", stacklevel=3)
            return
        scopes: dict[str, list[tuple[AxisGroup, Tensor]]] = {}
        for group in self.layers:
            if group.size > 1:
                full = AxisGroup(self.DG, group)
                scores = self._scores(full)
                if scores is not None:
                    scopes.setdefault(self._scope_of(group, full), []).append((full, scores.cpu()))
        for members in scopes.values():
            yield from self._least(members)

    def _scores(self, group: AxisGroup) -> Tensor | None:
        """One score per unit, or None where the importance has nothing to say."""
        by_unit = getattr(self.importance, "score_units", None)
        if by_unit is not None:
            return by_unit(group, None)  # type: ignore[no-any-return]
        scores = self.estimate_importance(group)
        return None if scores is None else scores_per_unit(group, self.importance, scores)

    def _scope_of(self, group: Group, full: AxisGroup) -> str:
        """Units are ranked among those of the same scope."""
        name = group.name
        if group.secondary:
            return "heads" if self.global_pruning else name
        for module in group.writers.values():
            if module in self._scopes:
                return self._scopes[module] + ("" if self.global_pruning else name)
        if self.isomorphic:
            parts = (f"{type(item.dep.layer).__name__}.{item.dep.handler.__name__}" for item in full.items)
            return f"isomorphic {' '.join(parts)}"
        return "all" if self.global_pruning else name

    def _target_of(self, group: Group) -> float:
        """The ratio of a group's initial units that is gone after this step."""
        step = self.current_step
        own, default, top = self.pruning_ratio_dict, self.per_step_pruning_ratio, self.max_pruning_ratio
        if group.secondary:
            own, default, top = self.head_pruning_ratio_dict, self.per_step_head_pruning_ratio, 1.0
        found = (own[writer] for writer in group.writers.values() if writer in own)
        return float(min(next(found, default)[step], top))

    def _least(self, members: list[tuple[AxisGroup, Tensor]]) -> Iterator[AxisGroup]:
        """The least important units of one scope, by group."""
        initial = sum(self._initial[group.axis_group.name] for group, _ in members)
        scores = torch.cat([s for _, s in members])
        count = len(scores) - int(initial * (1 - self._target_of(members[0][0].axis_group)))
        if count <= 0:
            return
        owner = torch.cat([torch.full((len(s),), i) for i, (_, s) in enumerate(members)])
        chosen = owner[scores.argsort(stable=True)[:count]].bincount(minlength=len(members)).tolist()
        for (group, own), number in zip(members, chosen, strict=True):
            size, first = group.axis_group.size, self._initial[group.axis_group.name]
            least = max(self.min_width, group.axis_group.least)
            kept = max(size - number, math.ceil(first * (1 - self.max_pruning_ratio) - 1e-9), least)
            if self.round_to:
                per_unit = channels_per_unit(group.axis_group)
                quantum = self.round_to // math.gcd(self.round_to, per_unit)
                kept = max(kept - kept % quantum, math.ceil(least / quantum) * quantum)
            if kept < size:
                yield AxisGroup(self.DG, group.axis_group, own.argsort(stable=True)[: size - kept].tolist())

    def step(self, interactive: bool = False) -> Any:
        """As ``BasePruner.step``; without ``interactive``, a failure rolls the whole step back.

        Raises:
            ConfigError: if the pruner was given what only :meth:`run` obeys (a target, ratios, an order, fine-tuning).
        """
        check_here()
        ignored = [name for name, was_given in self._only_run.items() if was_given]
        if ignored:
            raise ConfigError(
                f"step() prunes by pruning_ratio and iterative_steps, and would ignore {', '.join(ignored)}; call "
                "run(), or leave these out"
            )
        before: int = self.current_step
        self.current_step += 1
        self.DG.trackers = self._all_trackers()
        if interactive:
            return self._prune()
        undo = Snapshot(self.model, self.DG.axis_graph, trackers=self._all_trackers())
        try:
            for group in self._prune():
                group.prune()
        except BaseException:
            undo.restore()
            self.current_step = before
            raise
        return None

    def load_pruning_history(self, pruning_history: list[Any]) -> None:
        """Repeat the removals of :meth:`pruning_history` on this (fresh) model."""
        self.DG.trackers = self._all_trackers()
        for name, is_out, idxs in list(pruning_history):
            module = self.model.get_submodule(name)
            pruner = self.DG.get_pruner_of_module(module)
            function = pruner.prune_out_channels if is_out else pruner.prune_in_channels
            self.DG.get_pruning_group(module, function, idxs).prune()

    @property
    def objective(self) -> ObjectiveLike:
        """F: a :class:`SInGEImportance`'s own, else ``"loss"`` or what it is set to; fine-tuning minimises it, too."""
        return self.importance.options.objective if isinstance(self.importance, SInGEImportance) else self._objective

    @objective.setter
    def objective(self, objective: ObjectiveLike) -> None:
        get_objective(objective)
        self._objective = objective

    def _all_trackers(self) -> Trackers:
        own = list(self.finetune.optimizers) if self.finetune is not None else []
        unique = {id(o): o for o in [*self.trackers.optimizers, *own]}
        return Trackers(list(unique.values()), self.trackers.emas)

    # -- Algorithm 1 ----------------------------------------------------------------------------------------------

    def host(self) -> TorchPruningHost:
        """The verified layers as a host for :mod:`singe_plugin.algorithm`."""
        if not self.layers:
            reasons = "; ".join(f"{k}: {v}" for k, v in list(self.left_whole.items())[:5])
            raise BudgetError(f"no layer of {type(self.model).__name__} can be pruned ({reasons or 'none was found'})")
        return TorchPruningHost(
            self.DG,
            [group.name for group in self.layers],
            self._all_trackers(),
            self.example_inputs,
            min(self.max_pruning_ratio, 1.0),
            self.min_width,
        )

    def score_layer(self, host: TorchPruningHost, layer: str) -> Tensor:
        """One score per unit of a layer, by whatever importance the pruner has."""
        scores = with_gradients(self, self.importance, self.batches, lambda: host.score(layer, self.importance))
        return torch.as_tensor(scores)

    def plan(self) -> dict[str, int]:
        """How many units ``run`` will remove from each layer; nothing is removed.

        Raises:
            BudgetError: if the target cannot be met within one point, with the nearest that can.
        """
        return self._plan(self.host())

    def _plan(self, host: TorchPruningHost) -> dict[str, int]:
        specs, scores = host.layers(), None
        ratios = self.ratios if isinstance(self.ratios, str) else self._named(self.ratios)
        if ratios in BY_SCORE:
            last = torch.tensor([math.inf])  # the last unit stays, whatever its score
            scorer = RoundScorer(self, host, Progress({}))  # nothing is removed in between
            scores = {spec.name: scorer(spec.name) if spec.units > 1 else last for spec in specs}
        if self.target is not None:
            return counts_for(host, self.target, ratios, self.round_to, scores)
        if self.pruning_ratio_dict:
            own = {spec.name: self._ratio_of(spec.name) for spec in specs}
            return plan_removals(specs, host.costs(), None, own, self.round_to)
        return plan_removals(specs, host.costs(), None, ratios, self.round_to, scores, self.pruning_ratio)

    def _ratio_of(self, layer: str) -> float:
        """The ratio that ``pruning_ratio_dict`` gives to a layer of the group, else ``pruning_ratio``."""
        for module in self.DG.axis_graph.groups[layer].writers.values():
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

    def _start(self, host: TorchPruningHost) -> Progress:
        """Nothing done: with the plan, or with what the rounds need."""
        if self.order == "layers":
            return Progress(self._plan(host))
        fixed = self.ratios not in BY_SCORE or bool(self.target is None and self.pruning_ratio_dict)
        return Progress({}, goal=self._plan(host) if fixed else {}, before=sizes(host))

    def _pauses(
        self,
        host: TorchPruningHost,
        progress: Progress,
        callback: Callback,
        checkpoint: Callable[[Progress], None] | None,
    ) -> Iterator[Pause]:
        """The algorithm in the order that was asked for."""
        if self.order == "layers":
            scorer = partial(self.score_layer, host)
            return algorithm_1(host, scorer, progress, self.units_per_step, self.finetune, callback, checkpoint)
        allocation = Rounds(host, progress, self.target, float(self.pruning_ratio), self.ratios, self.round_to)
        return rounds_of(
            host, RoundScorer(self, host, progress), allocation, progress, self.rounds, self.schedule, self.finetune,
            callback, checkpoint,
        )  # fmt: skip

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
        callback = Callbacks([history, *self.callbacks])
        before = count_params(self.model), count_macs(self.model, self.example_inputs)
        self._check_data()
        check_lone(self.model, self.finetune, self.example_inputs)
        if self.finetune is not None:
            self.finetune.minimise(self.objective)
        if progress is None:
            self._check_objective(self.host())
        with all_or_nothing(self.model, self.finetune, self._all_trackers(), self.DG.axis_graph):
            if self.finetune is not None and (progress is None or self.finetune.optimizer is None):
                self.finetune.prepare(self.model)
            host = self.host()
            if progress is None:
                progress = self._start(host)
            if not progress.finished:
                tune(host, self._pauses(host, progress, callback, checkpoint), self.finetune, callback)
            after = count_params(self.model), count_macs(self.model, self.example_inputs)
        return PruningOutcome(
            self.model,
            (before[0], after[0]),
            (before[1], after[1]),
            dict(progress.plan),
            history,
            dict(self.left_whole),
        )

    def _check_objective(self, host: TorchPruningHost) -> None:
        """Say before anything is pruned that F does not fit the outputs, or does not depend on a layer.

        Rounds begin with a scoring of all layers, which says so too.
        """
        importance, batches = self.importance, self.batches
        if isinstance(importance, SInGEImportance) and importance.options.rule.needs_gradient:
            batches = importance.batches
            if self.order == "layers" and batches is not None:
                probe = copy(importance)
                probe.batches = list(islice(batches, 1))
                probe.options = replace(importance.options, criterion="grad", path="layer", normalizer=None)
                for spec in host.layers():
                    host.score(spec.name, probe)
        if self.finetune is not None:
            for batch in islice(batches or (), 1):
                self.finetune.check(self.model, batch)

    def _check_data(self) -> None:
        """Say before anything happens that the importance has no data, or another model."""
        importance = self.importance
        if not isinstance(importance, SInGEImportance) or importance.model is not None:
            return
        if importance.options.rule.needs_gradient:
            if self.batches is None:
                raise DataError(
                    f"criterion {importance.options.criterion!r} needs data: call importance.bind(model, batches) or "
                    "give SInGEPruner(batches=...)"
                )
            importance.bind(self.model, self.batches)
