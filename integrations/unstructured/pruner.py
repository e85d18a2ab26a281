"""``UnstructuredPruner``: single weights, pruned by Algorithm 1 or in rounds, masks held by a parametrization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from singe_plugin.algorithm import CountedProgress, Progress, algorithm_1, score, tune
from singe_plugin.axes import Trackers
from singe_plugin.batches import check_batch, in_memory, materialise
from singe_plugin.budget import count_macs_by_module, count_params
from singe_plugin.data import example_from
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.events import Callback, Callbacks, History, LayerDone, RunEnded
from singe_plugin.finetune import FineTune
from singe_plugin.masks import fold_masks, masks_of
from singe_plugin.rollback import all_or_nothing
from singe_plugin.rounds import check_rounds, decided, rounds_of
from singe_plugin.scoring import ScoringOptions, score_units
from singe_plugin.state import model_device

from ..checks import check_here, check_lone, check_model, check_parts
from ..staging import examples_in
from .allocation import Allocation, Scope, layer_ratios
from .arguments import check_amount, scoring_options
from .host import WeightHost
from .layers import WeightLayer, find_layers
from .patterns import Pattern

__all__ = ["LayerSparsity", "SparseOutcome", "UnstructuredPruner"]


@dataclass(frozen=True)
class LayerSparsity:
    """One pruned layer: its weights, those that are not masked, and multiply-adds of one example with either."""

    name: str
    weights: int
    nonzero: int
    macs: int | None = None
    effective_macs: int | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of its weights that is masked."""
        return 1 - self.nonzero / self.weights


@dataclass(frozen=True)
class SparseOutcome:
    """What :meth:`UnstructuredPruner.run` did.

    Attributes:
        model: the pruned model (the user's object), with masks.
        layers: the pruned layers in forward order.
        params, nonzero: all parameters of the model, and those that are not masked.
        macs, effective_macs: multiply-adds of one example, all of them and those with a weight that is not masked; None
            without example inputs.
        plan: layer -> weights removed in this run.
        masks: parameter name -> ``bool``.
        history: every event.
        left_whole: layer or parameter -> why it was not pruned.
    """

    model: nn.Module
    layers: list[LayerSparsity]
    params: int
    nonzero: int
    macs: int | None
    effective_macs: int | None
    plan: dict[str, int]
    masks: dict[str, Tensor]
    history: History
    left_whole: dict[str, str]

    @property
    def sparsity(self) -> float:
        """The fraction of the weights of the pruned layers that is masked."""
        return 1 - sum(layer.nonzero for layer in self.layers) / sum(layer.weights for layer in self.layers)


class UnstructuredPruner:
    """Prune single weights: score each by what it costs to walk it to zero, mask the cheapest, fine-tune in between.

    The weights of ``nn.Conv*`` and ``nn.Linear`` are pruned, the classifier's included unless it is ignored; biases,
    norms, embeddings and raw parameters are not. For one weight, :math:`\\|W\\|` in Eq. 5 is :math:`|w|`; the path
    decays all weights of a layer together and leaves its bias where it is. Batch-norm is folded into the weights while
    they are scored.

    Args:
        model: the model; it stays in its mode, on its device, and keeps its parameter objects.
        batches: what F is evaluated on, a few batches ``(inputs, targets)``; criteria that read only weights need none.
        sparsity: the fraction of the weights of the pruned layers to mask; None is 0.9, or what ``pattern`` needs.
        scope: ``"global"`` ranks all weights together, ``"layer"`` masks the same fraction of every layer, a dict maps
            names of layers (or of modules that hold some) to fractions.
        pattern: ``"2:4"`` or ``(2, 4)``: at most two of every four consecutive weights along the inputs stay (see
            :mod:`.patterns`), chosen by score inside each block. Layers that it does not fit are left whole.
        layers, ignored_layers: modules or names, with what is inside of them.
        order: ``"rounds"`` scores all layers, then masks in all of them; ``"layers"`` is Algorithm 1, one layer after
            the other. None is rounds, or Algorithm 1 where ``units_per_step`` is given.
        rounds, schedule: how many rounds (1; 10 in :func:`prune_weights`), and how the sparsity grows over them:
            ``"cubic"`` or ``"linear"``.
        units_per_step: how many weights of a layer go between two scorings of Algorithm 1: a number, a fraction inside
            ]0, 1[ (0.1), or ``"layer"``.
        max_sparsity: the largest fraction of one layer that goes; at least one weight stays.
        finetune: a :class:`~singe_plugin.FineTune`, or None; ``every`` is a removal (a round), a layer or the end.
            Without a loss of its own it minimises the objective that is scored with.
        callbacks: see :mod:`singe_plugin.events`; ``params`` in events counts what is not masked.
        example_inputs: for tracing and counting; by default two examples of the first batch.
        scoring: a ready :class:`~singe_plugin.ScoringOptions`; or give its fields:
        **options: ``criterion``, ``p``, ``mu`` (0.8 as in the paper), ``steps``, ``quadrature``, ``nodes``, ...

    Raises:
        ConfigError, DataError, TiedParameterError: naming the layer, the value and the remedy.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
        >>> pruner = UnstructuredPruner(net, [batch], sparsity=0.75, rounds=2)
        >>> outcome = pruner.run()
        >>> outcome.sparsity, outcome.nonzero, outcome.macs, outcome.effective_macs
        (0.75, 22, 48, 12)
        >>> masks = pruner.fold()
        >>> int(net[0].weight.count_nonzero() + net[2].weight.count_nonzero())
        12
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        *,
        sparsity: float | None = None,
        scope: Scope = "global",
        pattern: str | tuple[int, int] | Pattern | None = None,
        layers: Iterable[nn.Module | str] | None = None,
        ignored_layers: Iterable[nn.Module | str] = (),
        order: str | None = None,
        rounds: int | None = None,
        schedule: str = "cubic",
        units_per_step: int | float | str | None = None,
        max_sparsity: float = 1.0,
        finetune: FineTune | None = None,
        callbacks: Iterable[Callback] = (),
        example_inputs: Any = None,
        scoring: ScoringOptions | None = None,
        **options: Any,
    ) -> None:
        check_model(model)
        check_parts(model, finetune, callbacks := list(callbacks), ())
        self.model, self.finetune, self.callbacks = model, finetune, callbacks
        self.scoring = scoring_options(scoring, options)
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        self.sparsity, self.scope, self.max_sparsity = check_amount(sparsity, scope, self.pattern, max_sparsity)
        order, _, rounds, units_per_step = decided(order, None, rounds, units_per_step, 1)
        check_rounds(rounds, schedule)
        self.order, self.rounds, self.schedule, self.units_per_step = order, rounds, schedule, units_per_step
        self.batches = None if batches is None else in_memory(materialise(batches))
        if self.batches == [] or (self.batches is None and self.scoring.rule.needs_gradient):
            raise DataError(
                f"criterion {self.scoring.criterion!r} differentiates F on data, and there is none; give batches of "
                "(inputs, targets), or use criterion='l1'"
            )
        for batch in self.batches or ():
            check_batch(batch)
        if example_inputs is None and self.batches:
            example_inputs = example_from(self.batches[0], model_device(model))
        self.example_inputs = example_inputs
        found, self.left_whole = find_layers(model, layers, ignored_layers, example_inputs)
        self.ratios: dict[str, float] = {}  # of a scope with a ratio per layer: those of the layers that are pruned
        self.layers = self._fitting(found)
        self._host: WeightHost | None = None

    def _fitting(self, found: list[WeightLayer]) -> list[WeightLayer]:
        """The layers that the pattern fits and that have a ratio; the others are left whole."""
        why = {} if self.pattern is None else {x.name: self.pattern.misfit(x) for x in found}
        if not isinstance(self.scope, str):
            ratios = layer_ratios([layer.name for layer in found], self.scope)
            why |= {name: "scope gives it no sparsity" for name, ratio in ratios.items() if ratio == 0}
            self.ratios = {name: ratio for name, ratio in ratios.items() if not why.get(name)}
        self.left_whole |= {name: reason for name, reason in why.items() if reason}
        left = [layer for layer in found if not why.get(layer.name)]
        if not left:
            name, reason = next((n, r) for n, r in why.items() if r)
            raise ConfigError(f"no layer is left to prune; {name!r}, for one: {reason}")
        return left

    def host(self) -> WeightHost:
        """The layers as a host for :mod:`singe_plugin.algorithm`; puts the masks on, where there are none yet."""
        if self._host is None or not self._host.attached():
            self._host = WeightHost(self.model, self.layers, self._macs(), self._trackers().ema_models())
        return self._host

    def score_layer(self, host: WeightHost, layer: str) -> Tensor:
        """One score per weight of a layer that is not masked, in row-major order."""
        return score_units(self.model, host.units(layer), self.batches, self.scoring)

    def run(
        self,
        progress: Progress | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        history: History | None = None,
    ) -> SparseOutcome:
        """Prune to the target. The masks stay on the model: train on with them, or :meth:`fold` them.

        Args:
            progress: where to continue; None starts at the beginning.
            checkpoint: called with the progress after every round or layer.
            history: to continue; None starts a new one.

        Raises:
            BudgetError: before anything is masked, if the sparsity cannot be reached.
            SingeError: if something fails on the way; model, optimizer and EMA are rolled back, masks included.
        """
        check_here()
        check_lone(self.model, self.finetune, self.example_inputs)
        history = history or History()
        if self.finetune is not None:
            self.finetune.minimise(self.scoring.objective)
        try:
            with all_or_nothing(self.model, self.finetune, self._trackers()):
                if self.finetune is not None and (progress is None or self.finetune.optimizer is None):
                    self.finetune.prepare(self.model)
                host = self.host()
                callback = _Unmasked(host, [history, *self.callbacks])
                if progress is None:
                    progress = CountedProgress({})
                    self._check_objective(host)
                if not progress.finished:
                    self._prune(host, progress, callback, checkpoint)
                return self._outcome(host, progress, history)
        except BaseException:
            self._host = None  # what it has counted is of the masks before they were rolled back
            raise

    def _check_objective(self, host: WeightHost) -> None:
        """Say before anything is masked that F does not fit the outputs, or does not depend on a layer.

        Rounds begin with a scoring of all layers, which says so too.
        """
        first = [] if self.batches is None else self.batches[:1]
        if self.order == "layers" and self.scoring.rule.needs_gradient:
            probe = replace(self.scoring, criterion="grad", path="layer", normalizer=None)
            for spec in host.layers():
                score_units(self.model, host.units(spec.name), first, probe)
        if self.finetune is not None:
            for batch in first:
                self.finetune.check(self.model, batch)

    def _prune(
        self,
        host: WeightHost,
        progress: Progress,
        callback: Callback,
        checkpoint: Callable[[Progress], None] | None,
    ) -> None:
        """In the order that was asked for."""
        removed = progress.plan if self.order == "rounds" else {}
        scope = self.scope if isinstance(self.scope, str) else self.ratios
        allocation = Allocation(host, self.sparsity, scope, self.pattern, self.max_sparsity, removed)
        scorer = partial(self.score_layer, host)
        if self.order == "rounds":
            pauses = rounds_of(
                host, scorer, allocation, progress, self.rounds, self.schedule, self.finetune, callback, checkpoint,
                choose=allocation.choose,
            )  # fmt: skip
        else:
            if not progress.plan:
                specs = host.layers() if allocation.needs_scores else []
                progress.plan = allocation.plan({s.name: score(scorer, s.name, s.units)[0] for s in specs})
            pauses = algorithm_1(
                host, scorer, progress, self.units_per_step, self.finetune, callback, checkpoint,
                choose=allocation.choose,
            )  # fmt: skip
        tune(host, pauses, self.finetune, callback)

    def fold(self) -> dict[str, Tensor]:
        """Make the masks permanent: zeros in plain weights, the parametrizations gone, the outputs the same bits.

        Returns:
            the masks; :func:`singe_plugin.masks.hold_masks` puts them on again.
        """
        masks = fold_masks(self.model)
        for ema in self._trackers().ema_models():
            fold_masks(ema)
        self._host = None
        return masks

    def _outcome(self, host: WeightHost, progress: Progress, history: History) -> SparseOutcome:
        rows = []
        for name in host.by_name:
            size, left = host.size(name), host.left(name)
            macs = None if host.macs is None else host.macs.get(name, 0)
            rows.append(LayerSparsity(name, size, left, macs, None if macs is None else round(macs * left / size)))
        return SparseOutcome(
            self.model, rows, count_params(self.model), host.nonzero(),
            None if host.macs is None else host.macs[""], host.effective_macs(), dict(progress.plan),
            masks_of(self.model), history, dict(self.left_whole),
        )  # fmt: skip

    def _macs(self) -> dict[str, int] | None:
        """Dense multiply-adds of one example, per module."""
        if self.example_inputs is None:
            return None
        examples = examples_in(self.example_inputs)
        return {k: v // examples for k, v in count_macs_by_module(self.model, self.example_inputs).items()}

    def _trackers(self) -> Trackers:
        if self.finetune is None:
            return Trackers()
        return Trackers(list(self.finetune.optimizers), [e for e in (self.finetune.ema,) if e is not None])


class _Unmasked(Callbacks):
    """Passes events on, with the parameters that are not masked in the place of all of them."""

    def __init__(self, host: WeightHost, callbacks: Iterable[Callback]) -> None:
        super().__init__(callbacks)
        self.host = host

    def on_layer_done(self, event: LayerDone) -> None:
        super().on_layer_done(replace(event, params=self.host.nonzero()))

    def on_run_end(self, event: RunEnded) -> None:
        super().on_run_end(replace(event, params=self.host.nonzero()))
