"""SInGE as an NNI pruner: the whole interface of ``nni.compression.base.compressor.Pruner``, the same mathematics."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from nni.compression.base.compressor import Compressor
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import IdentityModuleWrapper, ModuleWrapper
from nni.compression.utils.evaluator import LightningEvaluator
from torch import nn

from singe_plugin.axes import AxisGraph, verify_groups
from singe_plugin.checks import check_choice
from singe_plugin.errors import ConfigError, ScoringError
from singe_plugin.fields import as_options
from singe_plugin.loop.events import Callback, Callbacks, History
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.method.batches import split_batch
from singe_plugin.method.options import Scoring
from singe_plugin.nested import to_device
from singe_plugin.run.guards import check_here
from singe_plugin.state import model_device

from .arguments import batches_of, check_amounts, check_without_evaluator, settle_entwined
from .entwined import Entwined
from .evaluators import BatchCollector, check_evaluator, step_of
from .pieces import MaskedGroup, build_pieces, followers_of
from .repairing import RepairingPruner
from .settings import (
    check_called,
    check_config,
    check_entries,
    check_free,
    check_optimizers,
    make_scalers,
    register_types,
    selected_modules,
    translated,
)
from .sparsity import rule_of
from .view import plain_view, undone_on_error

__all__ = ["SInGEPruner"]

_logger = logging.getLogger("singe_plugin")


class SInGEPruner(RepairingPruner):
    r"""Prune by integrating the gradient along the path that walks a unit's weights to zero (Eq. 5).

    .. math:: C_{IG^p}(n)=\sum_{s=0}^{S}\|\mu^sW^n\|_p\,\|\nabla_{\mu^sW^n}F(X)\|_p

    Use it as NNI's ``TaylorPruner``: alone, under ``AGPPruner`` or ``LinearPruner``, or fused with a distiller or
    quantizer. Every key of NNI's config list means what it means there, and beyond that

    - layers that write the same channels (residual streams, depthwise convolutions, q, k and v) get the same mask,
      without a ``dependency_group_id``; the groups pass the oracles of :mod:`singe_plugin.axes`;
    - the norms behind masked channels are masked along, so that :func:`~singe_plugin.integrations.nni.shrink` can
      remove the channels without changing the model;
    - at least ``min_width`` channels of every layer stay.

    Args:
        model: the model; NNI wraps it in place.
        config_list: NNI's; types of layers that NNI does not know (timm's norms) can be named.
        evaluator: one of NNI's; not needed for ``l1``, ``l2``, ``lp`` or with ``batches``.
        training_steps: how many steps of the evaluator's training loop are run: their batches are what F is evaluated
            on afterwards. With a ``pace``, the steps that pruning is entwined with.
        scoring: a :class:`~singe_plugin.Scoring`, or the name of a criterion. Without an ``objective``, F is the
            evaluator's own training step (``TorchEvaluator``), the model's own loss (``TransformersEvaluator``), else
            ``"loss"``. Every scoring reads the latest ``batches`` of the loop: all of them, if nothing is said, and one
            where pruning is entwined (the paper's number).
        pace: None masks at the end of the steps; a :class:`~singe_plugin.Pace` of layers, or ``"layers"``, runs
            Algorithm 1 inside the training loop: layer by layer, score, mask the least, train on.
        every: where pruning is entwined, train on after every ``"layer"``, ``"removal"`` or at the ``"end"``.
        batches: data for scoring in the place of the evaluator's; nothing is trained then.
        example_inputs: to find the groups with; None takes the evaluator's ``dummy_input``, or the first batch.
        coupled: False ranks every layer by itself, as NNI does; such masks often cannot be removed physically.
            ``"unverified"`` masks layers alike whose groups have not passed the oracles.
        mask_norms: mask the norms behind masked channels along.
        min_width: how many units of every layer stay at least.
        default_granularity: what ``granularity="default"`` means for parameters: ``"out_channel"``, ``"in_channel"``, a
            block, or None for single weights.
        repair: a :class:`~singe_plugin.Repair`, or a number of images: what is left takes over behind the last masks
            (or those of every interval, ``every="round"``), on ``batches``, or what the training loop has shown; the
            unpruned network is that before the first mask. None does not.
        callbacks: see :mod:`singe_plugin.loop.events`.
        existed_wrappers: NNI's, for :meth:`from_compressor`.

    Attributes:
        history: what happened, as everywhere in this package.
        partial: group -> the layers that write its channels but are not in the config list, so that its channels can
            be masked but not removed.

    Raises:
        ConfigError: for a config list, an evaluator or an option that cannot mean anything.
        GroupError: if the model does not run on the example inputs.

    Example:
        >>> import torch
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
        scoring: Scoring | str | None = None,
        *,
        pace: Pace | str | None = None,
        every: str = "layer",
        batches: Iterable[Any] | None = None,
        example_inputs: Any = None,
        coupled: bool | str = True,
        mask_norms: bool = True,
        min_width: int = 1,
        default_granularity: str | list[int] | None = "out_channel",
        repair: Repair | int | None = None,
        callbacks: Iterable[Callback] = (),
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
    ) -> None:
        check_here()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if any("_nni_wrapper" in m._modules for m in model.modules()):
            raise ConfigError(
                "the model is wrapped by another compressor; call its unwrap_model() first, or fuse both: "
                "SInGEPruner.from_compressor(other, config_list, ...)"
            )
        check_evaluator(evaluator)
        asked = as_options(Scoring, scoring, "scoring", "criterion")
        self._own_objective = asked.objective is not None
        chosen = None if repair is None else as_options(Repair, repair, "repair", "images")
        self.pace = None if pace is None else settle_entwined(as_options(Pace, pace, "pace", "order"))
        self.scoring, steps = asked.settle(), training_steps
        check_amounts(every, min_width, training_steps)
        check_choice("coupled", coupled, (True, False, "unverified"))
        _ = self.scoring.rule  # an importance of torch-pruning is none
        self.batches = batches_of(batches, asked.objective)
        if evaluator is None:
            check_without_evaluator(self.scoring, self.pace is not None, self.batches)
        if not self._own_objective and evaluator is not None:
            step_of(evaluator)  # says now if it cannot be used
        self.training_steps, self.every = training_steps, every
        self.scoring_batches = asked.batches or (1 if self.pace is not None else steps)
        self.min_width, self.default_granularity, self.coupled = min_width, default_granularity, bool(coupled)
        self.history = History()
        self.callback = Callbacks([self.history, *callbacks])
        self._interval_steps = training_steps
        self.total_times: int | str = 1  # set by NNI's schedulers (AGPPruner, LinearPruner), as interval_steps

        entries = translated(config_list)
        check_entries(entries, min_width)
        register_types(model)
        check_config(model, entries)
        existed = existed_wrappers or {}
        check_free(model, entries, existed)
        check_optimizers(model, evaluator)
        self.graph = self._grouped(model, evaluator, example_inputs, coupled is True)
        if self.graph is not None:
            check_called(self.graph, entries)
        followers = self._follower_entries(model, entries, existed) if mask_norms else []
        with undone_on_error(model, existed.values()):
            super().__init__(model, [*entries, *followers], evaluator, existed_wrappers)
            with plain_view(model):
                self.pieces: list[MaskedGroup] = build_pieces(model, self._target_spaces, self.graph, self.coupled)
            for piece in self.pieces:
                rule_of(piece, self._target_spaces)  # says now what does not fit together
            if not self.pieces:
                raise ConfigError(
                    "nothing in config_list has a sparse_ratio or sparse_threshold, so there is nothing to prune"
                )
            if chosen is not None:
                self.repair_with(chosen)
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
        training_steps: int = 20,
        *,
        evaluator: Any = None,
        **options: Any,
    ) -> SInGEPruner:
        """A pruner of the model, wrappers and evaluator of another compressor, to be run fused with it.

        Args:
            compressor: any of NNI's; its wrappers, with their state, are kept.
            new_config_list: what to prune.
            training_steps, options: as for the class.
            evaluator: where the other compressor has none.

        Raises:
            ConfigError: as the class; the other compressor is as it was then.
        """
        if compressor.evaluator is None and evaluator is None:
            raise ConfigError("fused compressors run inside a training loop; give evaluator=")
        was_wrapped = compressor._is_wrapped
        try:
            made: SInGEPruner = super().from_compressor(
                compressor, new_config_list, evaluator=evaluator, training_steps=training_steps, **options
            )
        except BaseException:
            if was_wrapped and not compressor._is_wrapped:
                compressor.wrap_model()
            raise
        return made

    @property
    def interval_steps(self) -> int:
        """The optimizer steps after which masks are made; NNI's schedulers set it.

        Raises:
            ConfigError: for an entwined pruner, which has a schedule of its own.
        """
        if self.pace is not None:
            raise ConfigError(
                "a pruner with a pace prunes by a schedule of its own; use it without AGPPruner and LinearPruner, or "
                "give them one without"
            )
        return self._interval_steps

    @interval_steps.setter
    def interval_steps(self, steps: int) -> None:
        self._interval_steps = steps

    # -- what is pruned -------------------------------------------------------------------------------------------

    def _grouped(self, model: nn.Module, evaluator: Any, example: Any, verify: bool) -> AxisGraph | None:
        if example is None and evaluator is not None:
            example = evaluator.get_dummy_input()
            if isinstance(evaluator, LightningEvaluator) and evaluator._dummy_input is None:
                example = split_batch(example)[0]  # it is a batch of the data module
        if example is None and self.batches:
            example = split_batch(self.batches[0])[0]
        if example is None:
            if self.coupled:
                raise ConfigError(
                    "the layers that have to be masked alike are found by running the model once; give example_inputs= "
                    "(or the evaluator a dummy_input), or coupled=False to rank every layer by itself"
                )
            return None
        graph = AxisGraph(model, to_device(example, model_device(model)))
        for name, reason in (verify_groups(graph) if verify else {}).items():
            graph.drop(name, reason)
        return graph

    def _follower_entries(
        self, model: nn.Module, entries: list[dict[str, Any]], existed: Mapping[str, ModuleWrapper]
    ) -> list[dict[str, Any]]:
        """Entries for the norms behind what is pruned, so that they are wrapped and have masks."""
        if self.graph is None:
            return []
        chosen = {name for modules in selected_modules(model, entries) for name in modules}
        found: dict[tuple[str, ...], list[str]] = {}
        for name, attrs in followers_of(model, self.graph, chosen, self.coupled).items():
            if not isinstance(existed.get(name), IdentityModuleWrapper):
                found.setdefault(attrs, []).append(name)
        return [{"op_names": names, "target_names": list(attrs)} for attrs, names in found.items()]

    def _validate_config(self) -> None:
        """The entries were checked before anything was touched."""

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> Any:
        if target_space.type is TargetType.PARAMETER:
            return self.default_granularity
        return "per_channel"

    def _register_scalers(self) -> None:
        for name, targets in sorted(self._target_spaces.items()):
            wrapper = self._module_wrappers[name]
            if wrapper.fused_modules and "bias" in targets and targets["bias"].target is None:
                del targets["bias"], wrapper.pruning_target_spaces["bias"]  # NNI fuses norms into real biases only
            make_scalers(name, wrapper, targets, self._set_default_sparse_granularity)

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
                if isinstance(self._remaining_times, int):
                    self._remaining_times -= 1
                self.mask(last=self._remaining_times == 0)
                if self._remaining_times == "unlimited" or self._remaining_times > 0:  # type: ignore[operator]
                    self._current_step = 0

        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[optimizer_task])

    def _fuse_preprocess(self, evaluator: Any) -> None:
        self.check_repair(trains=True)
        images = 0 if self.survivors is None or self.batches else self.survivors.options.images
        self._collector = BatchCollector(evaluator, self.scoring_batches, images)
        self._generated = 0
        if self.pace is not None:
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
        elif isinstance(self.total_times, int) and self._generated < self.total_times:
            _logger.warning(
                "the training loop ended when masks had been made %d of %d times: the ratios of the config list were "
                "not reached; let it run for total_times * interval_steps = %d steps",
                self._generated, self.total_times, self.total_times * self.interval_steps,
            )  # fmt: skip
        self.repair_and_tell(last=True)
        self._collector = self._entwined = None

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if self.pace is not None:
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
                "a pruning without a pace takes training_steps steps; call compress() without max_steps and "
                "max_epochs, or give pace='layers', which entwines it with the training"
            )
        if self.batches is not None or not self.scoring.rule.needs_gradient:
            self.check_repair(trains=False)
            self._track_shapes()
            self.mask(last=True)
            return
        self._fusion_compress(self.training_steps, None)

    def _fusion_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        try:
            super()._fusion_compress(max_steps, max_epochs)
        except BaseException:
            if getattr(self.evaluator, "model", None) is not None:
                self.evaluator.unbind_model()  # else the next run would warn of it
            raise
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
