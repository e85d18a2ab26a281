"""``tp.pruner.SInGEPruner``: torch-pruning's ``BasePruner`` with verified groups and Algorithm 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.algorithm import Progress, prune_layers, units_per_removal
from singe_plugin.budget import Target, count_macs, count_params, plan_removals
from singe_plugin.errors import BudgetError, ConfigError, DataError, GroupError, SingeError
from singe_plugin.events import Callback, Callbacks, History
from singe_plugin.finetune import FineTune
from singe_plugin.objective import call_model, materialise
from singe_plugin.state import preserved, train_mode_of
from singe_plugin.units import refuse_tied, tied_parameters

from .arguments import check_arguments, check_base_arguments, check_parts, check_ratios
from .groups import aligned_units, group_name, unit_group
from .host import PrunableLayer, TorchPruningHost, block_of, is_conv_or_linear
from .importance import SInGEImportance
from .oracles import verify_groups
from .removal import PreservingGroup, Snapshot, Trackers, remove_channels
from .scorers import with_gradients

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

    - every group passes two oracles before anything is removed; one that fails is left whole and reported in
      ``left_whole`` with the reason. Groups that reach the model's output are left whole too.
    - parameter objects survive removals: optimizer, scheduler, hooks and ``requires_grad`` stay valid, optimizer
      state and EMA are cut along.
    - a failure rolls the model back.

    Args:
        model: the model; it stays in its train/eval mode and on its device.
        example_inputs: a tensor, a tuple of arguments or a dict of keywords.
        importance: any torch-pruning importance; a :class:`SInGEImportance` must be bound to data.
        target: for ``run``: the fraction to remove, ``"params=0.5"`` or ``"macs=0.5"``; None removes
            ``pruning_ratio`` of each layer's units.
        ratios: how it is spread: ``"uniform"``, ``"block"`` (one ratio per block, §3.3), ``"global"`` (by score) or
            ``{layer or block name: ratio}``.
        units_per_step: removals between two scorings: 1 is Algorithm 1; a number, a fraction of the layer inside
            ]0, 1[, or ``"layer"``.
        finetune: a :class:`~singe_plugin.FineTune`, or None.
        callbacks: see :mod:`singe_plugin.events`.
        batches: data for importances that need gradients but cannot be bound (Taylor, Hessian, OBD-C).
        optimizer: an optimizer to cut along (besides FineTune's).
        ema: an averaged copy to cut along (besides FineTune's).
        verify: run the oracles.

    Raises:
        ConfigError, DataError: for arguments that cannot mean anything.
        GroupError: if torch-pruning cannot trace the model.

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
        ratios: str | Mapping[Any, float] = "block",
        units_per_step: int | float | str = 1,
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
        self.ratios = check_ratios(ratios)
        units_per_removal(units_per_step, 1)
        check_parts(model, finetune, callbacks := list(callbacks), list(kwargs.get("ignored_layers") or ()))
        self.units_per_step, self.finetune, self.callbacks = units_per_step, finetune, callbacks
        self.batches = None if batches is None else materialise(batches)
        self.example_inputs = example_inputs
        self.trackers = Trackers(
            [o for o in (optimizer,) if o is not None],
            [e for e in (ema, getattr(finetune, "ema", None)) if e is not None],
        )
        for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
            kwargs[name] = dict(kwargs.get(name) or {})  # BasePruner's own defaults are shared between pruners
        kwargs.setdefault("forward_fn", call_model)
        check_base_arguments(kwargs)
        try:
            with preserved(model):  # torch-pruning leaves its hooks behind when the forward pass fails
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(True)  # the graph is traced through autograd
                super().__init__(model, example_inputs, importance, *args, **kwargs)
        except SingeError:
            raise
        except Exception as error:
            raise GroupError(
                f"torch-pruning could not trace {type(model).__name__}: {type(error).__name__}: {error}; check that "
                "model(example_inputs) runs and is differentiable"
            ) from error
        self.left_whole: dict[str, str] = {}
        self.layers = self._verified_layers(verify)

    # -- groups ---------------------------------------------------------------------------------------------------

    def _verified_layers(self, verify: bool) -> list[PrunableLayer]:
        """Every group that may be pruned, in forward order; the others are noted in ``left_whole``."""
        order = self._forward_order()
        ties = tied_parameters(self.model)
        entries: list[tuple[int, PrunableLayer, Any, list[list[int]]]] = []
        taken: set[str] = set()
        for group in self.DG.get_all_groups(self.ignored_layers, tuple(self.root_module_types)):
            is_attention, _ = self._is_atten_group(group)
            rooted = self._downstream_node_as_root_if_attention(group) if is_attention else group
            writers = self._writers(group)
            name = self._name_of(group, writers, order, taken)
            reason = self._reason_to_leave(group, rooted, ties)
            if reason is not None:
                self._leave(name, group, reason)
                continue
            channels = len(rooted[0].idxs)
            self._note_coupled_channels(rooted)
            channel_groups = self._get_channel_groups(rooted)
            if channels % channel_groups:
                self._leave(name, group, f"{channels} channels cannot be split into {channel_groups} channel groups")
                continue
            dep = rooted[0].dep
            entry = PrunableLayer(name, dep.target.module, dep.handler, channel_groups, block_of(name))
            position = min((order.get(m, len(order)) for _, m in writers), default=len(order))
            entries.append((position, entry, rooted, aligned_units(channels, channel_groups)))
        entries.sort(key=lambda e: e[0])
        reasons: dict[int, str] = {}
        if verify and entries:
            reasons = verify_groups(self, [(e[2], e[3]) for e in entries], self.example_inputs)
        kept = []
        for number, (_, entry, group, _) in enumerate(entries):
            if number in reasons:
                self._leave(entry.name, group, reasons[number])
            else:
                kept.append(entry)
        return kept

    def _name_of(
        self, group: Any, writers: list[tuple[str, nn.Module]], order: dict[nn.Module, int], taken: set[str]
    ) -> str:
        """The first layer that writes the group; behind a split, several groups may have the same one."""
        ordered = [name for name, _ in sorted(writers, key=lambda w: order.get(w[1], len(order)))]
        root = group_name(group)
        numbered = (f"{root}#{i}" for i in itertools.count(2))
        name = next(n for n in itertools.chain(ordered, [root], numbered) if n not in taken)
        taken.add(name)
        return name

    def _note_coupled_channels(self, group: Any) -> None:
        """Equal parts of a layer that meet again (a chunk whose halves are multiplied) are channel groups of it."""
        dep, channels = group[0].dep, len(group[0].idxs)
        if self._get_channel_groups(group) > 1 or not self.DG.is_out_channel_pruning_fn(dep.handler):
            return
        coupled = sorted(self.DG.get_pruning_group(dep.target.module, dep.handler, [0])[0].idxs)
        if len(coupled) > 1 and channels % len(coupled) == 0 and coupled == aligned_units(channels, len(coupled))[0]:
            self.out_channel_groups[dep.target.module] = len(coupled)

    def _writers(self, group: Any) -> list[tuple[str, nn.Module]]:
        """The convolutions and linear layers that produce a group's channels."""
        found = {}
        for i in range(len(group)):
            dep = group[i].dep
            if self.DG.is_out_channel_pruning_fn(dep.handler) and is_conv_or_linear(dep.target.module):
                found[self.DG._module2name[dep.target.module]] = dep.target.module
        return list(found.items())

    def _reason_to_leave(self, group: Any, rooted: Any, ties: dict[int, tuple[str, ...]]) -> str | None:
        if rooted is None:
            return "its attention has no linear layer behind it to root the group at"
        for i in range(len(group)):
            dep = group[i].dep
            writes = self.DG.is_out_channel_pruning_fn(dep.handler)
            if dep.target.type == tp.ops.OPTYPE.OUTPUT or (writes and not dep.target.outputs):
                return "it reaches the model's output"
        try:
            refuse_tied(unit_group(group), ties)
        except SingeError as error:
            return str(error)
        return None

    def _leave(self, name: str, group: Any, reason: str) -> None:
        """Keep a group whole: torch-pruning skips groups that write an ignored layer."""
        self.left_whole[name] = reason
        for i in range(len(group)):
            dep = group[i].dep
            if self.DG.is_out_channel_pruning_fn(dep.handler) and isinstance(dep.target.module, nn.Module):
                self.ignored_layers.append(dep.target.module)

    def _forward_order(self) -> dict[nn.Module, int]:
        """The position of each layer in one forward pass."""
        order: dict[nn.Module, int] = {}

        def note(module: nn.Module, _: Any) -> None:
            order.setdefault(module, len(order))

        with preserved(self.model), torch.no_grad():
            self.model.eval()
            for module in self.model.modules():
                module.register_forward_pre_hook(note)
            call_model(self.model, self.example_inputs)
        return order

    # -- BasePruner's own way -------------------------------------------------------------------------------------

    def estimate_importance(self, group: Any) -> Any:
        """Score one group; importances that read gradients get them from ``batches``."""
        if self.batches is None:
            return self.importance(group)  # the user may have called backward() for Taylor, as in torch-pruning
        return with_gradients(self, self.importance, self.batches, lambda: self.importance(group))

    def _check_pruning_ratio(self, group: Any) -> bool:
        """As ``BasePruner``'s, and no group with one unit left: torch-pruning mistakes some of them for depthwise."""
        is_attention, _ = self._is_atten_group(group)
        if not is_attention and len(group[0].idxs) <= self._get_channel_groups(group):
            return False
        return bool(super()._check_pruning_ratio(group))

    def _prune(self) -> Generator[Any, None, None]:
        for group in super()._prune():
            yield PreservingGroup(group, self._all_trackers())

    def step(self, interactive: bool = False) -> Any:
        """As ``BasePruner.step``; without ``interactive``, a failure rolls the whole step back."""
        if interactive:
            return super().step(interactive=True)
        undo = Snapshot(self.DG, trackers=self._all_trackers())
        before: int = self.current_step
        try:
            return super().step()
        except BaseException:
            undo.restore()
            self.current_step = before
            raise

    def load_pruning_history(self, pruning_history: list[Any]) -> None:
        """Repeat the removals of :meth:`pruning_history` on this (fresh) model."""
        for name, is_out, idxs in list(pruning_history):
            module = self.model.get_submodule(name)
            pruner = self.DG.get_pruner_of_module(module)
            function = pruner.prune_out_channels if is_out else pruner.prune_in_channels
            remove_channels(self.DG, module, function, idxs, self._all_trackers())

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
            self.DG, self.layers, self._all_trackers(), self.example_inputs, min(self.max_pruning_ratio, 1.0)
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
        specs, costs, aim = host.layers(), host.costs(), None
        scores = None
        ratios = self.ratios if isinstance(self.ratios, str) else self._named(self.ratios)
        if ratios == "global":
            last = torch.tensor([math.inf])  # the last unit stays, whatever its score
            scores = {spec.name: self.score_layer(host, spec.name) if spec.units > 1 else last for spec in specs}
        target = self.target
        if target is None:
            if self.pruning_ratio_dict:
                own = {spec.name: self._ratio_of(host, spec.name) for spec in specs}
                return plan_removals(specs, costs, None, own, self.round_to)
            return plan_removals(specs, costs, None, ratios, self.round_to, scores, self.pruning_ratio)
        before = {"params": count_params(self.model), "macs": count_macs(self.model, self.example_inputs)}
        nearest = math.inf
        for _ in range(6):
            counts = plan_removals(specs, costs, target, ratios, self.round_to, scores, aim=aim)
            reached = 1 - host.trial(counts)[target.kind] / before[target.kind]
            nearest = min(nearest, reached, key=lambda r: abs(r - target.fraction))
            if abs(reached - target.fraction) <= 0.01:
                return counts
            aim = (target.fraction if aim is None else aim) + target.fraction - reached
            if not 0 < aim < 1:
                break
        raise BudgetError(
            f"target {target.kind}={target.fraction:g} cannot be met within one point: the nearest that was reached is "
            f"{target.kind}={nearest:.4f}; choose that, or relax round_to and max_pruning_ratio"
        )

    def _ratio_of(self, host: TorchPruningHost, layer: str) -> float:
        """The ratio that ``pruning_ratio_dict`` gives to a layer of the group, else ``pruning_ratio``."""
        group, _ = host.full_group(layer)
        for _, module in self._writers(group):
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
            hits = [e.name for e in self.layers if self.DG._module2name.get(key) == e.name or key is e.root]
            if not hits:
                raise ConfigError(f"ratios: {key!r} is no prunable layer of the model; use names from pruner.layers")
            named.update(dict.fromkeys(hits, float(ratio)))
        return named

    def run(
        self,
        progress: Progress | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        history: History | None = None,
    ) -> PruningOutcome:
        """Algorithm 1: layer by layer in forward order, score, remove the least, fine-tune in between.

        Args:
            progress: where to continue (see :func:`singe_plugin.prune`); None starts at the beginning.
            checkpoint: called with the progress after every layer.
            history: to continue; None starts a new one.

        Raises:
            BudgetError: before anything is removed, if the target cannot be met.
            SingeError: if something fails on the way; the model, optimizer and EMA are rolled back.
        """
        history = history or History()
        callback = Callbacks([history, *self.callbacks])
        before = count_params(self.model), count_macs(self.model, self.example_inputs)
        modes = train_mode_of(self.model)
        self._check_data()
        if self.finetune is not None and (progress is None or self.finetune.optimizer is None):
            self.finetune.prepare(self.model)
        host = self.host()
        undo = Snapshot(self.DG, trackers=self._all_trackers(), values=True)
        rewind = None if self.finetune is None else self.finetune.rewinder()
        try:
            if progress is None:
                progress = Progress(self._plan(host))
            if not progress.finished:
                prune_layers(
                    host,
                    lambda layer: self.score_layer(host, layer),
                    progress,
                    units_per_step=self.units_per_step,
                    finetune=self.finetune,
                    callback=callback,
                    checkpoint=checkpoint,
                )
        except BaseException:
            undo.restore()
            if rewind is not None:
                rewind()
            raise
        finally:
            for module, training in modes.items():
                module.training = training
        after = count_params(self.model), count_macs(self.model, self.example_inputs)
        return PruningOutcome(
            self.model,
            (before[0], after[0]),
            (before[1], after[1]),
            dict(progress.plan),
            history,
            dict(self.left_whole),
        )

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
