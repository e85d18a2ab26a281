"""SInGE as an NNI pruner: the whole interface of ``nni.compression.base.compressor.Pruner``, the same mathematics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.config import trans_legacy_config_list
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import IdentityModuleWrapper, ModuleWrapper
from nni.compression.pruning.tools import active_sparse_targets_filter
from nni.compression.utils.scaling import Scaling
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, verify_groups
from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.events import Callback, Callbacks, History, LayerScored
from singe_plugin.finetune import SCHEDULES
from singe_plugin.objective import ObjectiveLike, materialise, split_batch
from singe_plugin.scoring import ScoringOptions, score_units
from singe_plugin.units import UnitGroup, subgroup

from .entwined import Entwined
from .evaluators import BatchCollector, check_evaluator, step_of
from .pieces import Piece, build_pieces, metric_shape
from .settings import check_config, register_types, selected_modules
from .sparsity import Masks, kept_units, masks_from, rule_of
from .view import StepModel, plain_view

__all__ = ["SInGEPruner"]

_logger = logging.getLogger("singe_plugin")
_GONE = -1.0  # the metric of what is masked already: below every score
_MODES = ("one_shot", "entwined")


class SInGEPruner(Pruner):  # type: ignore[misc]
    r"""Prune by integrating the gradient along the path that walks a unit's weights to zero (Eq. 5).

    .. math:: C_{IG^p}(n)=\sum_{s=0}^{S}\|\mu^sW^n\|_p\,\|\nabla_{\mu^sW^n}F(X)\|_p

    Use it as NNI's ``TaylorPruner``: alone, under ``AGPPruner`` or ``LinearPruner``, or fused with a distiller or
    quantizer. Every key of NNI's config list means what it means there, and beyond that

    - layers that write the same channels (residual streams, depthwise convolutions, q, k and v) get the same mask,
      without a ``dependency_group_id``; the groups pass the oracles of :mod:`singe_plugin.axes`;
    - the norms behind masked channels are masked along, so that :func:`~singe_plugin.integrations.nni.shrink` can
      remove the channels without changing the model;
    - at least ``keep_at_least`` channels of every layer stay.

    Args:
        model: the model; NNI wraps it in place.
        config_list: NNI's; types of layers that NNI does not know (timm's norms) can be named.
        evaluator: one of NNI's; not needed for ``l1``, ``l2``, ``lp`` or with ``batches``.
        training_steps: how many steps of the evaluator's training loop are run: their batches are what F is evaluated
            on afterwards. With ``schedule="entwined"``, the steps that pruning is entwined with.
        criterion, p, mu, steps, quadrature, nodes, path, group_reduction, unit_batch, amp, channels_last: see
            :class:`~singe_plugin.ScoringOptions`.
        objective: F: ``"loss"``, ``"logit"`` or a function ``(outputs, targets) -> scalar``; None is the evaluator's
            own training step (``TorchEvaluator``), the model's own loss (``TransformersEvaluator``), else ``"loss"``.
        schedule: ``"one_shot"`` masks at the end of the steps, ``"entwined"`` runs Algorithm 1 inside the training
            loop: layer by layer, score, mask the least, train on.
        every, units_per_step: for ``"entwined"``: fine-tune after every ``"layer"``, ``"removal"`` or at the ``"end"``,
            and how many units are masked between two scorings (a number, a fraction of the layer, or ``"layer"``).
        batches: data for scoring in the place of the evaluator's; nothing is trained then.
        scoring_batches: how many of the latest batches every scoring reads; None is all of them, and one for
            ``"entwined"`` (the paper's number).
        example_inputs: to find the groups with; None takes the evaluator's ``dummy_input``, or the first batch.
        coupled: False ranks every layer by itself, as NNI does; such masks often cannot be removed physically.
        mask_norms: mask the norms behind masked channels along.
        keep_at_least: the smallest number of units that stays of every layer.
        default_granularity: what ``granularity="default"`` means for parameters: ``"out_channel"``, ``"in_channel"``, a
            block, or None for single weights.
        verify: put the groups through the oracles.
        callbacks: see :mod:`singe_plugin.events`.
        existed_wrappers: NNI's, for :meth:`from_compressor`.

    Attributes:
        history: what happened, as everywhere in this package.
        partial: group -> the layers that write its channels but are not in the config list, so that its channels can
            be masked but not removed.

    Raises:
        ConfigError: for a config list, an evaluator or an option that cannot mean anything.
        GroupError: if the model does not run on the example inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
        >>> config = [{"op_types": ["Linear"], "exclude_op_names": ["2"], "sparse_ratio": 0.5}]
        >>> pruner = SInGEPruner(net, config, batches=[batch])
        >>> _, masks = pruner.compress()
        >>> int(masks["0"]["bias"].sum()), bool((masks["0"]["weight"][:, 0] == masks["0"]["bias"]).all())
        (4, True)
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        training_steps: int = 20,
        criterion: str = "ig",
        p: float = 2,
        mu: float = 0.9,
        path: str = "layer",
        *,
        steps: int | None = None,
        quadrature: str = "gauss",
        nodes: int = 5,
        objective: ObjectiveLike | None = None,
        group_reduction: str = "sum",
        unit_batch: int = 16,
        amp: str | None = None,
        channels_last: bool = False,
        schedule: str = "one_shot",
        every: str = "layer",
        units_per_step: int | float | str = 0.1,
        batches: Iterable[Any] | None = None,
        scoring_batches: int | None = None,
        example_inputs: Any = None,
        coupled: bool = True,
        mask_norms: bool = True,
        keep_at_least: int = 1,
        default_granularity: str | list[int] | None = "out_channel",
        verify: bool = True,
        callbacks: Iterable[Callback] = (),
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if any("_nni_wrapper" in m._modules for m in model.modules()):
            raise ConfigError(
                "the model is wrapped by another compressor; call its unwrap_model() first, or fuse both: "
                "SInGEPruner.from_compressor(other, config_list, ...)"
            )
        check_evaluator(evaluator)
        self.options = ScoringOptions(
            criterion, p, mu, steps, quadrature, nodes, path, "loss" if objective is None else objective,
            group_reduction, None, unit_batch, amp, channels_last,
        )  # fmt: skip
        self._own_objective = objective is not None
        for name, value in (("training_steps", training_steps), ("scoring_batches", scoring_batches)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r} is not a number of steps; give a whole number >= 1")
        if isinstance(keep_at_least, bool) or not isinstance(keep_at_least, int) or keep_at_least < 0:
            raise ConfigError(f"keep_at_least={keep_at_least!r} is not a number of units; give a whole number >= 0")
        if schedule not in _MODES:
            raise ConfigError(f"unknown schedule {schedule!r}; choose one of {', '.join(_MODES)}")
        if every not in SCHEDULES:
            raise ConfigError(f"unknown every {every!r}; choose one of {', '.join(SCHEDULES)}")
        self.batches = None if batches is None else list(materialise(batches))
        if self.batches is not None and not self.batches:
            raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
        if evaluator is None and (
            schedule == "entwined" or (self.options.rule.needs_gradient and self.batches is None)
        ):
            raise ConfigError(
                f"criterion {criterion!r} with schedule {schedule!r} needs an evaluator; give one of NNI's (the "
                "batches of its training loop are scored on), or batches=[(inputs, targets), ...] for a one_shot "
                "pruning without training, or criterion='l2'"
            )
        if not self._own_objective and evaluator is not None:
            step_of(evaluator)  # says now if it cannot be used
        self.training_steps, self.schedule, self.every, self.units_per_step = (
            training_steps,
            schedule,
            every,
            units_per_step,
        )
        self.scoring_batches = scoring_batches or (1 if schedule == "entwined" else training_steps)
        self.keep_at_least, self.default_granularity, self.coupled = keep_at_least, default_granularity, coupled
        self.history = History()
        self.callback = Callbacks([self.history, *callbacks])
        # what NNI's schedulers (AGPPruner, LinearPruner) set
        self.interval_steps: int = training_steps
        self.total_times: int | str = 1

        register_types(model)
        config_list = trans_legacy_config_list(deepcopy(config_list))
        check_config(model, config_list, keep_at_least)
        self.graph = self._grouped(model, evaluator, example_inputs, verify)
        followers = self._follower_configs(model, config_list, existed_wrappers or {}) if mask_norms else []
        super().__init__(model, [*config_list, *followers], evaluator, existed_wrappers)
        with plain_view(self._module_wrappers):
            self.pieces: list[Piece] = build_pieces(model, self._target_spaces, self.graph, coupled)
        for piece in self.pieces:
            rule_of(piece, self._target_spaces)  # says now what does not fit together
        self.partial = {p.name: list(p.missing) for p in self.pieces if p.missing}
        for name, missing in self.partial.items():
            _logger.warning(
                "the channels of %s are also written by %s, which the config list leaves out: they are masked, but "
                "cannot be removed", name, ", ".join(missing),
            )  # fmt: skip
        self._collector: BatchCollector | None = None
        self._entwined: Entwined | None = None
        self._generated = 0

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        new_config_list: list[dict[str, Any]],
        *args: Any,
        evaluator: Any = None,
        **kwargs: Any,
    ) -> SInGEPruner:
        """A pruner of the model, wrappers and evaluator of another compressor, to be run fused with it."""
        if compressor.evaluator is None and evaluator is None:
            raise ConfigError("fused compressors run inside a training loop; give evaluator=")
        made: SInGEPruner = super().from_compressor(compressor, new_config_list, *args, evaluator=evaluator, **kwargs)
        return made

    # -- what is pruned -------------------------------------------------------------------------------------------

    def _grouped(self, model: nn.Module, evaluator: Any, example: Any, verify: bool) -> AxisGraph | None:
        if example is None and evaluator is not None:
            example = evaluator.get_dummy_input()
        if example is None and self.batches:
            example = split_batch(self.batches[0])[0]
        if example is None:
            if self.coupled:
                raise ConfigError(
                    "the layers that have to be masked alike are found by running the model once; give example_inputs= "
                    "(or the evaluator a dummy_input), or coupled=False to rank every layer by itself"
                )
            return None
        graph = AxisGraph(model, example)
        for name, reason in (verify_groups(graph) if verify and self.coupled else {}).items():
            graph.drop(name, reason)
        return graph

    def _follower_configs(
        self, model: nn.Module, config_list: list[dict[str, Any]], existed: dict[str, ModuleWrapper]
    ) -> list[dict[str, Any]]:
        """Entries for the norms behind what is pruned, so that they are wrapped and have masks."""
        if self.graph is None:
            return []
        chosen = {name for modules in selected_modules(model, config_list) for name in modules}
        names: list[str] = []
        for module in model.modules():
            norm = self.graph.trace.sole_reader(module) if self.graph.names[module] in chosen else None
            names += [self.graph.names[norm]] if norm is not None else []
        for group in self.graph.groups.values() if self.coupled else ():
            if not group.secondary and chosen & set(group.writers):
                names += [self.graph.names[p.slots[0].owner] for p in group.unit_group().producers]
                names += [self.graph.names[p.norm] for p in group.unit_group().producers if p.norm is not None]
        modules = dict(model.named_modules())
        wanted = [
            name
            for name in dict.fromkeys(names)
            if name not in chosen
            and not isinstance(existed.get(name), IdentityModuleWrapper)
            and not isinstance(modules[name], (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding))
            and isinstance(weight := modules[name]._parameters.get("weight"), Tensor)
            and weight.ndim == 1
        ]
        both = [n for n in wanted if "bias" in modules[n]._parameters]
        lone = [n for n in wanted if "bias" not in modules[n]._parameters]
        found = [{"op_names": both, "target_names": ["weight", "bias"]}, {"op_names": lone, "target_names": ["weight"]}]
        return [config for config in found if config["op_names"]]

    def _validate_config(self) -> None:
        check_config(self.bound_model, self.config_list, self.keep_at_least)

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> Any:
        if target_space.type is TargetType.PARAMETER:
            return self.default_granularity
        return "per_channel"

    def _register_scalers(self) -> None:
        for name, targets in self._target_spaces.items():
            for target, space in targets.items():
                parameter = space.type is TargetType.PARAMETER
                if not parameter and (space.sparse_ratio is not None or space.sparse_threshold is not None):
                    raise ConfigError(
                        f"{name}.{target} has a ratio, but only parameters can be ranked (as in NNI's own pruners); "
                        f"align it to the layer's weight with target_settings={{{target!r}: {{'align': ...}}}}"
                    )
                if parameter and space.granularity == "per_channel":
                    raise ConfigError(
                        f"{name}.{target}: granularity 'per_channel' is for inputs and outputs; a parameter's is "
                        "'out_channel', 'in_channel' or a block such as [4, 1]"
                    )
                if not parameter and space.granularity in ("out_channel", "in_channel"):
                    raise ConfigError(
                        f"{name}.{target}: the granularity of an input or output is 'per_channel' or a block"
                    )
        super()._register_scalers()
        for name, targets in self._target_spaces.items():
            layer = self._module_wrappers[name].module
            if isinstance(layer, nn.modules.conv._ConvTransposeNd) and "weight" in targets:
                self._transposed(name, layer, targets)

    def _transposed(self, name: str, layer: Any, targets: dict[str, PruningTargetSpace]) -> None:
        """The output channels of a transposed convolution are dimension 1 of its weight, not 0."""
        if targets["weight"].granularity != "out_channel":
            return
        if layer.groups > 1:
            raise ConfigError(
                f"{name!r}: the output channels of a transposed convolution with groups={layer.groups} cannot be "
                "masked one by one in NNI's form; exclude it"
            )
        targets["weight"]._scaler = Scaling([-1, 1], kernel_padding_mode="back", kernel_padding_val=-1)
        if "bias" in targets and (targets["bias"].align or {}).get("module_name", "") is None:
            targets["bias"]._setting["align"]["dims"] = [1]

    # -- scores and masks -----------------------------------------------------------------------------------------

    def _collect_data(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = active_sparse_targets_filter(self._target_spaces)
        return found

    def _calculate_metrics(self, data: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """One metric per block of every target, ``[C, 1, 1, 1]`` for output channels; what is masked already has -1."""
        metrics: dict[str, dict[str, Tensor]] = {}
        for piece in self.pieces:
            keys = [key for key in piece.members if key[1] in data.get(key[0], {})]
            if not keys:
                continue
            scores = self.score_piece(piece)
            for module, target in keys:
                space = self._target_spaces[module][target]
                flat = piece.spread((module, target), scores, 0.0)
                mine = flat.view(metric_shape(space)).to(data[module][target].device)
                other = metrics.setdefault(module, {}).get(target)
                metrics[module][target] = mine if other is None else other + mine
        return metrics

    def _generate_sparsity(self, metrics: dict[str, dict[str, Tensor]]) -> Masks:
        pieces = [p for p in self.pieces if all(target in metrics.get(module, {}) for module, target in p.members)]
        scores = [piece.gathered(metrics) for piece in pieces]
        return masks_from(
            pieces, kept_units(pieces, scores, self._target_spaces, self.keep_at_least), self._target_spaces
        )

    def masks_of(self, kept: list[Tensor]) -> Masks:
        """The masks that keep these units of every piece."""
        return masks_from(self.pieces, kept, self._target_spaces)

    def alive(self, piece: Piece) -> Tensor:
        """The units of a piece that are not masked, in order."""
        left = torch.zeros(piece.size, dtype=torch.bool)
        for (module, target), labels in piece.members.items():
            space = self._target_spaces[module][target]
            if space.mask is None:
                return torch.arange(piece.size)
            shape = metric_shape(space)
            mask = space.mask.detach()
            if mask.numel() != len(labels):
                blocks = [part for size, full in zip(shape, mask.shape, strict=True) for part in (size, full // size)]
                mask = mask.reshape(blocks).amax(dim=list(range(1, 2 * len(shape), 2)))
            flat = mask.flatten().cpu() != 0
            left[labels[(labels >= 0) & flat]] = True
        return left.nonzero().flatten()

    def score_piece(self, piece: Piece, units: Tensor | None = None) -> Tensor:
        """One score per unit of a piece, -1 for units that are masked already; only ``units`` if they are given."""
        alive = self.alive(piece)
        chosen = alive if units is None else units
        start = time.perf_counter()
        with self._scored_model() as (model, batches, options):
            if piece.by_weights:
                options = replace(options, criterion="l2")  # F does not depend on an auxiliary head
            groups: list[UnitGroup] = [subgroup(source, chosen) for source in piece.sources]
            found = torch.stack([score_units(model, group, batches, options) for group in groups]).mean(0)
        if units is not None:
            return found
        scores = torch.full((piece.size,), _GONE, dtype=found.dtype, device=found.device)
        scores[chosen.to(found.device)] = found
        self.callback.on_layer_scored(LayerScored(piece.name, found.cpu(), time.perf_counter() - start))
        return scores

    @contextmanager
    def _scored_model(self) -> Iterator[tuple[nn.Module, Any, ScoringOptions]]:
        """The model in its plain view, the batches and the options, with F as it was asked for."""
        if self.batches is not None:
            batches: list[Any] | None = self.batches
        else:
            batches = None if self._collector is None else list(self._collector.batches)
        if self.options.rule.needs_gradient and not batches:
            raise DataError("no batch has been seen: the evaluator's training loop must run before anything is scored")
        step = None if self._own_objective or self.evaluator is None else step_of(self.evaluator)
        with plain_view(self._module_wrappers):
            if step is None:
                yield self.bound_model, batches, self.options
                return
            wrapped = [((batch,), None) for batch in batches or ()]
            yield StepModel(self.bound_model, step), wrapped, replace(self.options, objective=_as_it_is)

    # -- NNI's ways of running ------------------------------------------------------------------------------------

    def _register_trigger(self, evaluator: Any) -> None:
        """Masks at the end of every interval, on the batches that were seen last."""
        if self.interval_steps < 1:
            raise ConfigError(
                f"interval_steps={self.interval_steps} is not a number of steps; give a whole number >= 1"
            )
        self._current_step = 0
        self._remaining_times = self.total_times

        def optimizer_task() -> None:
            self._current_step += 1
            if self._current_step == self.interval_steps:
                self._generate()
                if isinstance(self._remaining_times, int):
                    self._remaining_times -= 1
                if self._remaining_times == "unlimited" or self._remaining_times > 0:  # type: ignore[operator]
                    self._current_step = 0

        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[optimizer_task])

    def _generate(self) -> None:
        self.update_masks(self.generate_masks())
        self._generated += 1

    def _fuse_preprocess(self, evaluator: Any) -> None:
        self._collector = BatchCollector(evaluator, self.scoring_batches)
        self._generated = 0
        if self.schedule == "entwined":
            self._entwined = Entwined(self, evaluator)
            evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[self._entwined.after_step])
        else:
            self._register_trigger(evaluator)

    def _fuse_postprocess(self, evaluator: Any) -> None:
        if self._entwined is not None:
            self._entwined.finish()
        elif not self._generated:
            raise ScoringError(
                f"the training loop ended after {self._current_step} optimizer steps, but masks are made after "
                f"{self.interval_steps}: nothing was pruned; let it run longer, or choose fewer training_steps"
            )
        self._collector = self._entwined = None

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.schedule == "entwined":
            if max_steps is None and max_epochs is None:
                max_steps = self.training_steps
            if max_steps is not None and max_steps < self.training_steps:
                raise ConfigError(
                    f"max_steps={max_steps}, but pruning is entwined with training_steps={self.training_steps} steps; "
                    "train at least as long"
                )
            self._fusion_compress(max_steps, max_epochs)
            return
        if max_steps is not None or max_epochs is not None:
            raise ConfigError(
                "a one_shot pruning takes training_steps steps; call compress() without max_steps and max_epochs, or "
                "use schedule='entwined'"
            )
        if self.batches is not None or not self.options.rule.needs_gradient:
            self._track_shapes()
            self._generate()
            return
        self._fusion_compress(self.training_steps, None)

    def _track_shapes(self) -> None:
        """Inputs and outputs that are masked along have no shape until something runs through the wrapped model."""
        open_spaces = [
            s for ts in self._target_spaces.values() for s in ts.values() if s.type is not TargetType.PARAMETER
        ]
        if open_spaces and self.graph is not None:
            example = self.graph.inputs
            args = example if isinstance(example, (tuple, list)) else () if isinstance(example, dict) else (example,)
            self.track_forward(*args, **(example if isinstance(example, dict) else {}))

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        finally:
            self._collector = self._entwined = None

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> Any:
        """Prune.

        Args:
            max_steps, max_epochs: how long the evaluator trains, for fused and entwined runs; None otherwise.

        Returns:
            the wrapped model, and ``{module: {parameter: mask}}``.

        Raises:
            ConfigError: if the duration does not fit the schedule.
            ScoringError: if F is not finite, or the training loop ends before masks were made.
        """
        if len(self.fused_compressors) > 1 and max_steps is None and max_epochs is None:
            raise ConfigError("fused compressors run inside a training loop; give compress(max_steps, max_epochs)")
        return super().compress(max_steps, max_epochs)


def _as_it_is(outputs: Any, targets: Any) -> Tensor:
    return outputs  # type: ignore[no-any-return]
