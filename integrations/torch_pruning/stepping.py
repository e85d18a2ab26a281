"""``BasePruner``'s own way over verified groups: scopes, ratios, ``step()``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Group, Snapshot, Trackers
from singe_plugin.errors import BudgetError, ConfigError
from singe_plugin.loop.costs import Counted
from singe_plugin.loop.loop import Loop, Turn
from singe_plugin.loop.pace import AUTO, WIDE, Pace
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.survivors import Unpruned
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner
from singe_plugin.method.objective import ObjectiveLike, get_objective
from singe_plugin.run.guards import check_here

from .graph import AxisDependencyGraph, GroupView, is_rooted
from .host import TorchPruningHost, channels_per_unit
from .importance import SInGEImportance
from .meter import Meter
from .scorers import Ranking

__all__ = ["SteppingPruner"]


class SteppingPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """What ``BasePruner`` promises, over groups that are read off one forward pass and verified.

    The constructor is :class:`SInGEPruner`'s, which adds what runs to a target.

    Attributes:
        model, example_inputs, importance, batches: as they were given.
        pace: how far a layer may go.
        tuner: the fine-tuning, or None.
        DG: the dependency graph.
        counted: the MACs of the model.
        meter: counts and times the model.
        target: what is to go, for ``run``.
    """

    model: nn.Module
    importance: Callable[..., Any]
    pace: Pace
    tuner: Tuner | None
    DG: AxisDependencyGraph
    counted: Counted
    meter: Meter
    target: Target | None
    current_step: int
    _objective: ObjectiveLike
    _cut_along: Trackers
    _only_run: list[str]
    _unpruned: Unpruned | None

    def _take(self, options: dict[str, Any]) -> None:
        """Keep ``BasePruner``'s options under its names."""
        for name in (
            "global_pruning", "pruning_ratio", "max_pruning_ratio", "isomorphic", "round_to", "iterative_steps",
            "iterative_pruning_ratio_scheduler", "prune_num_heads", "prune_head_dims", "head_pruning_ratio",
        ):  # fmt: skip
            setattr(self, name, WIDE if options[name] == AUTO else options[name])
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
        return self.graph.left_whole

    @property
    def layers(self) -> list[Group]:
        """The groups that are pruned, in forward order.

        Of groups that share their channels, this is the one with the smaller units: the dimensions of attention heads
        rather than whole heads. ``prune_num_heads=True`` adds the heads (by ``head_pruning_ratio``),
        ``prune_head_dims=False`` leaves their dimensions out.
        """
        return [
            group
            for group in self.graph.groups.values()
            if is_rooted(group, self.root_module_types) and self._is_chosen(group)
        ]

    def _is_chosen(self, group: Group) -> bool:
        if group.secondary:
            return bool(self.prune_num_heads) and group.is_heads
        return bool(self.prune_head_dims) or not group.in_heads

    # -- BasePruner's own way -------------------------------------------------------------------------------------

    def estimate_importance(self, group: Any) -> Any:
        """Score one group; importances that read gradients get them from ``batches``."""
        with self._ranking(own_gradients=True).gradients():
            return self.importance(group)

    def _ranking(self, own_gradients: bool = False) -> Ranking:
        return Ranking(self.importance, self.model, self.batches, self.objective, own_gradients)

    def _scope_of(self, group: Group, full: GroupView) -> str:
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

    def _least(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many units of each group a step takes, as ``BasePruner``: the least important ones of every scope."""
        scopes: dict[str, list[str]] = {}
        for name in scores:
            group = self.graph.groups[name]
            scopes.setdefault(self._scope_of(group, GroupView(self.DG, group)), []).append(name)
        counts: dict[str, int] = {}
        for names in scopes.values():
            pool = torch.cat([scores[name] for name in names])
            initial = sum(self.graph.groups[name].initial for name in names)
            count = len(pool) - int(initial * (1 - self._target_of(self.graph.groups[names[0]])))
            owner = torch.cat([torch.full((len(scores[name]),), i) for i, name in enumerate(names)])
            chosen = owner[pool.argsort(stable=True)[: max(count, 0)]].bincount(minlength=len(names)).tolist()
            counts |= {name: self._at_most(name, number) for name, number in zip(names, chosen, strict=True) if number}
        return counts

    def _at_most(self, name: str, number: int) -> int:
        """How many of ``number`` units of a group may go."""
        group = self.graph.groups[name]
        assert self.pace.min_width is not None
        least = max(self.pace.min_width, group.least)
        kept = max(group.size - number, math.ceil(group.initial * (1 - self.max_pruning_ratio) - 1e-9), least)
        quantum = group.multiple
        if self.round_to:
            quantum = math.lcm(quantum, self.round_to // math.gcd(self.round_to, channels_per_unit(group)))
        if quantum > 1:
            kept = max(kept - kept % quantum, math.ceil(least / quantum) * quantum)
        return int(group.size - kept)

    def step(self, interactive: bool = False) -> Any:
        """As ``BasePruner.step``: one turn of the loop; without ``interactive``, a failure rolls it back.

        Raises:
            ConfigError: if the pruner was given what only :meth:`run` obeys (a target, ratios, an order, fine-tuning).
        """
        check_here()
        if self._only_run:
            raise ConfigError(
                f"step() prunes by pruning_ratio and iterative_steps, and would ignore {', '.join(self._only_run)}; "
                "call run(), or leave these out"
            )
        before: int = self.current_step
        self.current_step += 1
        self.DG.trackers = self.trackers()
        if interactive:
            return self._prune()
        undo = Snapshot(self.model, self.graph, trackers=self.trackers())
        try:
            for group in self._prune():
                group.prune()
        except BaseException:
            undo.restore()
            self.current_step = before
            raise
        return None

    @torch.no_grad()
    def _prune(self) -> Iterator[GroupView]:
        """What a step removes, group by group."""
        if self.current_step > self.iterative_steps:
            warnings.warn("all iterative steps are done: nothing is pruned", stacklevel=3)
            return
        names = [group.name for group in self.layers if group.size > 1]
        if names:
            host = self._host(names, own_gradients=True)
            loop = Loop(host, Progress({}))
            loop.progress.begin(host.layers())
            for name, units in loop.choose_units(Turn(names, self._least), missing=True).items():
                group = self.graph.groups[name]
                most = self.graph.allowed({group: len(units)})[group]  # of the network as it is by then
                if most:
                    yield GroupView(self.DG, group, units.tolist()[:most])

    def load_pruning_history(self, pruning_history: list[Any]) -> None:
        """Repeat the removals of :meth:`pruning_history` on this (fresh) model."""
        self.DG.trackers = self.trackers()
        for name, is_out, idxs in list(pruning_history):
            if name in self.graph.blocks:
                self.DG.remove_block(self.graph.blocks[name], self.trackers())
                continue
            module = self.model.get_submodule(name)
            pruner = self.DG.get_pruner_of_module(module)
            function = pruner.prune_out_channels if is_out else pruner.prune_in_channels
            group = self.DG.get_pruning_group(module, function, idxs)
            self.DG.remove(group.axis_group, group.units, self.DG.trackers, settled=True)  # what it was then

    @property
    def objective(self) -> ObjectiveLike:
        """F: a :class:`SInGEImportance`'s own, else ``"loss"`` or what it is set to; fine-tuning minimises it, too."""
        if isinstance(self.importance, SInGEImportance):
            return self.importance.scoring.objective or "loss"
        return self._objective

    @objective.setter
    def objective(self, objective: ObjectiveLike) -> None:
        get_objective(objective)
        self._objective = objective

    def cut_along(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Cut the state of these optimizers along from now on, in the place of those that were given."""
        self._cut_along.optimizers[:] = optimizers

    def trackers(self) -> Trackers:
        """The optimizers and averaged copies that are cut along."""
        own = list(self.tuner.optimizers) if self.tuner is not None else []
        unique = {id(o): o for o in [*self._cut_along.optimizers, *own]}
        return Trackers(list(unique.values()), self._cut_along.emas)

    @property
    def graph(self) -> AxisGraph:
        """The groups of the model."""
        return self.DG.axis_graph

    def host(self) -> TorchPruningHost:
        """The verified layers as a host for :mod:`singe_plugin.loop.loop`."""
        if not self.layers:
            reasons = "; ".join(f"{k}: {v}" for k, v in list(self.left_whole.items())[:5])
            raise BudgetError(f"no layer of {type(self.model).__name__} can be pruned ({reasons or 'none was found'})")
        if self._unpruned is not None:
            self._unpruned.hold()
        host = self._host([group.name for group in self.layers])
        host.begin()
        return host

    def _host(self, names: list[str], own_gradients: bool = False) -> TorchPruningHost:
        assert self.pace.min_width is not None
        limits = min(self.max_pruning_ratio, 1.0), self.pace.min_width
        ranking = self._ranking(own_gradients)
        self.meter.counted, self.meter.target = self.counted, self.target
        return TorchPruningHost(self.DG, names, self.trackers(), self.meter, ranking, *limits, self._unpruned)
