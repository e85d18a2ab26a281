"""``UnstructuredPruner``: single weights, pruned by Algorithm 1 or in rounds, masks held by a parametrization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from singe_plugin.axes import Trackers
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.fields import as_options
from singe_plugin.loop.costs import count_macs_by_module, count_params
from singe_plugin.loop.events import Callback, History
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.loop import Loop, Turn, score_layers
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.progress import CountedProgress, Progress
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.survivors import Unpruned, images_of
from singe_plugin.loop.tuner import Tuner
from singe_plugin.loop.turns import in_layers, in_rounds
from singe_plugin.loop.watch import Watch
from singe_plugin.masks import fold_masks, masks_of
from singe_plugin.method.batches import in_memory, materialise
from singe_plugin.method.objective import ObjectiveLike
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.method.step import check_form
from singe_plugin.method.units import UnitGroup
from singe_plugin.run.data import example_from
from singe_plugin.run.guards import check_model, check_parts
from singe_plugin.run.job import carry_out, make_tuner
from singe_plugin.run.result import GroupRow
from singe_plugin.run.staging import count_examples
from singe_plugin.state import model_device

from ..torch_pruning.host import block_of
from .allocation import Allocation, layer_ratios
from .arguments import Sparsity, settle_pace, settle_sparsity, split_sparsity
from .host import WeightHost
from .layers import WeightGroup, find_layers

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
        sparsity: the fraction of the weights of the pruned layers to mask, 0.9 if nothing is said; or a pattern,
            ``"2:4"`` or ``(2, 4)``: at most two of every four consecutive weights along the inputs stay (see
            :mod:`.patterns`), chosen by score inside each block, and layers that it does not fit are left whole; or
            both, ``("2:4", 0.75)``, for more than the pattern masks.
        layers, ignored_layers: modules or names, with what is inside of them.
        pace: the order, how fast and how far: a :class:`~singe_plugin.Pace`, or the name of an order. ``ratios`` is
            ``"global"`` (all weights are ranked together), ``"uniform"`` (the same fraction of every layer goes) or
            maps names of layers, or of modules that hold some, to fractions. There is one round, if nothing is said
            (10 in :func:`prune_weights`).
        finetune: a :class:`~singe_plugin.FineTune` with a loader, or None. Without a loss of its own it minimises the
            objective that is scored with.
        callbacks: see :mod:`singe_plugin.loop.events`; ``params`` in events counts what is not masked.
        example_inputs: for tracing and counting; by default two examples of the first batch.
        scoring: a :class:`~singe_plugin.Scoring`, or the name of a criterion; ``mu`` is 0.8 as in the paper.
        repair: a :class:`~singe_plugin.Repair`, or a number of images: the weights that are left take over after the
            removals of :meth:`run`, on the inputs of ``batches``; None does not.

    Raises:
        ConfigError, DataError, TiedParameterError: naming the layer, the value and the remedy.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
        >>> pruner = UnstructuredPruner(net, [batch], sparsity=0.75, pace=Pace(rounds=2))
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
        sparsity: Sparsity | None = None,
        layers: Iterable[nn.Module | str] | None = None,
        ignored_layers: Iterable[nn.Module | str] = (),
        pace: Pace | str | None = None,
        finetune: FineTune | Tuner | None = None,
        callbacks: Iterable[Callback] = (),
        example_inputs: Any = None,
        scoring: Scoring | str | None = None,
        repair: Repair | int | None = None,
    ) -> None:
        check_model(model)
        check_parts(model, finetune, callbacks := list(callbacks), ())
        self.model, self.tuner, self.callbacks = model, make_tuner(finetune, model), callbacks
        fraction, self.pattern = split_sparsity(sparsity)
        self.pace = settle_pace(as_options(Pace, pace, "pace", "order"), 1)
        assert self.pace.order is not None
        self.scoring = as_options(Scoring, scoring, "scoring", "criterion").settle(self.pace.order, weights=True)
        self.sparsity = settle_sparsity(fraction, self.pace, self.pattern)
        self.batches = None if batches is None else in_memory(materialise(batches))
        if self.batches == [] or (self.batches is None and self.scoring.rule.needs_gradient):
            raise DataError(
                f"criterion {self.scoring.criterion!r} differentiates F on data, and there is none; give batches of "
                "(inputs, targets), or use scoring='l1'"
            )
        for batch in self.batches or ():
            check_form(batch, self.objective)
        if example_inputs is None and self.batches:
            example_inputs = example_from(self.batches[0], model_device(model), objective=self.objective)
        self.example_inputs = example_inputs
        found, self.left_whole = find_layers(model, layers, ignored_layers, example_inputs)
        self.ratios: str | dict[str, float] = str(self.pace.ratios)  # or, of the layers that are pruned, one for each
        self.layers = self._fitting(found)
        self._host: WeightHost | None = None
        self._unpruned: Unpruned | None = None
        if repair is not None:
            chosen = as_options(Repair, repair, "repair", "images")
            if not self.batches:
                raise DataError("repair needs images: give UnstructuredPruner batches, whose targets are not read")
            self.repair_with(chosen, images_of(self.batches, chosen.images, model, self.objective))

    def repair_with(self, repair: Repair, images: Sequence[Any], seed: int = 0, needed: bool = True) -> None:
        """Let the weights that are left take over after :meth:`run`; see :meth:`SInGEPruner.repair_with`."""
        self._unpruned = Unpruned(self.model, images, repair, seed=seed, needed=needed)

    def _fitting(self, found: list[WeightGroup]) -> list[WeightGroup]:
        """The layers that the pattern fits and that have a ratio; the others are left whole."""
        why = {} if self.pattern is None else {x.name: self.pattern.misfit(x) for x in found}
        if isinstance(self.pace.ratios, Mapping):
            ratios = layer_ratios([layer.name for layer in found], self.pace.ratios)
            why |= {name: "ratios gives it no sparsity" for name, ratio in ratios.items() if ratio == 0}
            self.ratios = {name: ratio for name, ratio in ratios.items() if not why.get(name)}
        self.left_whole |= {name: reason for name, reason in why.items() if reason}
        left = [layer for layer in found if not why.get(layer.name)]
        if not left:
            name, reason = next((n, r) for n, r in why.items() if r)
            raise ConfigError(f"no layer is left to prune; {name!r}, for one: {reason}")
        return left

    graph = None  # units stay where they are
    kind: type[Progress] = CountedProgress
    watch: Watch | None = None
    callbacks: Sequence[Callback]

    @property
    def objective(self) -> ObjectiveLike:
        """F, which fine-tuning minimises, too."""
        return self.scoring.objective or "loss"

    def host(self) -> WeightHost:
        """The layers as a host for :mod:`singe_plugin.loop.loop`; puts the masks on, where there are none yet."""
        if self._host is None or not self._host.attached():

            def score(group: UnitGroup) -> Tensor:
                return score_units(self.model, group, self.batches, self.scoring)

            emas = self.trackers().ema_models()
            self._host = WeightHost(self.model, self.layers, score, self._macs(), emas, self._unpruned)
            if self._unpruned is not None:
                self._unpruned.hold()
        return self._host

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
        history = history or History()
        try:
            with carry_out(self, progress, checkpoint, history) as (host, done):
                return self._outcome(host, done, history)
        except BaseException:
            self._host = None  # what it has counted is of the masks before they were rolled back
            raise

    def check(self) -> None:
        """Say before anything is masked that F does not fit the outputs, or does not depend on a layer.

        Rounds begin with a scoring of all layers, which says so too.
        """
        host, first = self.host(), [] if self.batches is None else self.batches[:1]
        if self._unpruned is not None:
            self._unpruned.hold(anew=True)
        if self.pace.order == "layers" and self.scoring.rule.needs_gradient:
            probe = replace(self.scoring, criterion="grad", path="layer", normalizer=None)
            for spec in host.layers():
                score_units(self.model, host.units(spec.name), first, probe)
        if self.tuner is not None:
            for batch in first:
                self.tuner.check(self.model, batch)

    @property
    def goal(self) -> float | None:
        """Masked weights are computed with all the same."""
        return 1.0

    def start(self, host: WeightHost) -> Progress:
        """Nothing done; for layers one after the other, with the plan, which may need all scores."""
        if self.pace.order == "rounds":
            return CountedProgress({}, before=host.sizes())
        allocation = self._allocation(host, {})
        units = {spec.name: spec.units for spec in host.layers()} if allocation.needs_scores else {}
        return CountedProgress(allocation.plan(score_layers(host, units)), before=host.sizes())

    def _allocation(self, host: WeightHost, removed: Mapping[str, int]) -> Allocation:
        assert self.pace.max_pruning_ratio is not None
        return Allocation(host, self.sparsity, self.ratios, self.pattern, self.pace.max_pruning_ratio, removed)

    def turns(self, loop: Loop) -> Iterator[Turn]:
        """Algorithm 1 or rounds, as the pace says."""
        if self._unpruned is not None:
            self._unpruned.begin()
        host: Any = loop.host
        allocation = self._allocation(host, loop.progress.plan if self.pace.order == "rounds" else {})
        loop.choose = allocation.choose
        if self.pace.order == "layers":
            return in_layers(loop, self.pace)
        return in_rounds(loop, self.pace, allocation)

    def rows(self) -> list[GroupRow]:
        """The pruned layers: all their weights, and those that are left."""
        host = self.host()
        return [GroupRow(name, block_of(name), host.size(name), host.left(name)) for name in host.by_name]

    def numbers(self) -> dict[str, Any]:
        """What only masks have: the parameters that are not masked, and the multiply-adds with them."""
        host = self.host()
        return {"nonzero": host.params(), "effective_macs": host.effective_macs()}

    def fold(self) -> dict[str, Tensor]:
        """Make the masks permanent: zeros in plain weights, the parametrizations gone, the outputs the same bits.

        Returns:
            the masks; :func:`singe_plugin.masks.hold_masks` puts them on again.
        """
        masks = fold_masks(self.model)
        for ema in self.trackers().ema_models():
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
            self.model, rows, count_params(self.model), host.params(),
            None if host.macs is None else host.macs[""], host.effective_macs(), dict(progress.plan),
            masks_of(self.model), history, dict(self.left_whole),
        )  # fmt: skip

    def _macs(self) -> dict[str, int] | None:
        """Dense multiply-adds of one example, per module."""
        if self.example_inputs is None:
            return None
        examples = count_examples(self.example_inputs)
        return {k: v // examples for k, v in count_macs_by_module(self.model, self.example_inputs).items()}

    def trackers(self) -> Trackers:
        """The optimizer and the averaged copy that change along."""
        if self.tuner is None:
            return Trackers()
        return Trackers(list(self.tuner.optimizers), [e for e in (self.tuner.options.ema,) if e is not None])
