"""What pruning would do to a model, before anything is done: its groups, and what scoring them costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from singe_plugin.app.curves import Curves, gradient_curves
from singe_plugin.errors import BudgetError
from singe_plugin.fields import as_options, describe
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import BY_SCORE, Pace, units_per_turn
from singe_plugin.loop.target import Target
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import passes_together
from singe_plugin.nested import to_device
from singe_plugin.run.data import scoring_batches
from singe_plugin.run.staging import count_examples
from singe_plugin.state import model_device
from singe_plugin.tables import markdown_table

__all__ = ["InspectedGroup", "Inspection", "RunCost", "figure_two", "inspect_model", "pruner_of"]


@dataclass(frozen=True)
class InspectedGroup:
    """A group of coupled layers that can be pruned, or a residual block that can go as a whole, as one unit.

    Attributes:
        name, block: of its first layer; both are a residual block's name.
        units: how many can be removed one by one.
        channels_per_unit: above 1 in grouped convolutions and attention heads.
        params: parameters that would go with all its units, those of the layers that read them included; a weight
            between two groups counts in both.
        producers: the layers that write the units.
    """

    name: str
    block: str
    units: int
    channels_per_unit: int
    params: int
    producers: tuple[str, ...]


@dataclass(frozen=True)
class RunCost:
    """What a run for a target takes, in passes (one batch, forward and backward).

    Attributes:
        units_removed: of all layers.
        scorings: how often a layer is scored; where all are scored together (by ``obs``, or with a path that is its
            start alone), how often that is done. To a pass of ``obs`` comes a forward pass alone, and so it does to
            every batch and round of what is scored along a path.
        passes_per_scoring: for one batch; with ``path="neuron"``, for one unit.
        scoring_passes: of the whole run.
        probing_passes: where layers go one after the other: whether F depends on every one.
        finetune_passes: one per fine-tuning step.
    """

    units_removed: int
    scorings: int
    passes_per_scoring: int
    scoring_passes: int
    probing_passes: int
    finetune_passes: int

    @property
    def total_passes(self) -> int:
        """Scoring, probing and fine-tuning together."""
        return self.scoring_passes + self.probing_passes + self.finetune_passes


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes:
        params, macs: of the model; MACs for one example.
        groups: what can be pruned, in forward order; with ``Pace(blocks=True)`` residual blocks are behind them.
        left_whole: group -> why it cannot.
        options: what the cost is for.
        cost: of a run for the target; None if the target cannot be met.
        problem: why there is no cost.
    """

    params: int
    macs: int
    groups: list[InspectedGroup]
    left_whole: dict[str, str]
    options: dict[str, Any]
    cost: RunCost | None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(self)
        if self.cost is not None:
            found["cost"]["total_passes"] = self.cost.total_passes
        return found

    def text(self) -> str:
        """Tables for people."""
        rows = [
            (g.name, g.block, g.units, g.channels_per_unit, f"{g.params:,}", _few(g.producers)) for g in self.groups
        ]
        parts = [
            f"{self.params:,} parameters, {self.macs:,} MACs, {len(self.groups)} groups that can be pruned",
            markdown_table(["group", "block", "units", "channels per unit", "parameters", "written by"], rows),
        ]
        if self.left_whole:
            parts.append("left whole:\n" + "\n".join(f"  {k}: {v}" for k, v in self.left_whole.items()))
        if self.cost is None:
            parts.append(f"no cost for {self.options['target'] or 'no target'}: {self.problem}")
        else:
            cost, options, pace, scoring = self.cost, self.options, self.options["pace"], self.options["scoring"]
            how = f"{pace['rounds']} rounds"
            if pace["order"] == "layers":
                how = f"one layer after the other, units_per_step={pace['units_per_step']}"
            ratios = pace["ratios"]
            by = f"ratios={ratios}" + (", counted as uniform" if isinstance(ratios, str) and ratios in BY_SCORE else "")
            parts.append(
                f"{options['target'] or 'no target'} in {how}, {by}: "
                f"{cost.units_removed} units removed, {cost.scorings} scorings of {cost.passes_per_scoring} passes"
                f"{' per unit' if scoring['path'] == 'neuron' else ''} on each of "
                f"{scoring['batches']} batches = {cost.scoring_passes} forward and backward passes, plus "
                f"{f'{cost.probing_passes} to see that F depends on every layer, ' if cost.probing_passes else ''}"
                f"{cost.finetune_passes} fine-tuning steps: {cost.total_passes} passes in all"
            )
        return "\n\n".join(parts)


def pruner_of(model: nn.Module, example_inputs: Any, **options: Any) -> Any:
    """A pruner that scores by magnitude: enough to look at a model's groups, and no data needed."""
    import torch_pruning

    from singe_plugin.integrations.torch_pruning import SInGEPruner

    return SInGEPruner(model, example_inputs, torch_pruning.importance.MagnitudeImportance(), **options)


def inspect_model(
    model: nn.Module,
    example_inputs: Any,
    target: str | Target | None = "macs=0.5",
    scoring: Scoring | str | None = None,
    pace: Pace | str | None = None,
    finetune: FineTune | int | None = None,
    **options: Any,
) -> Inspection:
    """Look at a model's groups and at what pruning it would cost; nothing is removed.

    Args:
        model: left as it was.
        example_inputs: a batch to trace with: a tensor, a tuple of arguments or a dict of keywords. The first dimension
            of its first tensor is the number of examples.
        target, scoring, pace, finetune: of the run whose cost is wanted, as :func:`singe_plugin.prune` takes them.
            Ratios by score need scores; the cost is then that of ``"uniform"`` without any block gone, plus one
            scoring of every layer where the layers are pruned one after the other.
        options: further arguments of ``SInGEPruner`` (``ignored_layers``, ...).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> import torch
        >>> found = inspect_model(net, torch.zeros(2, 4), target="params=0.48",
        ...                       pace=Pace("layers", units_per_step=1), finetune=10)
        >>> [(g.name, g.units, g.params) for g in found.groups], found.cost.total_passes
        ([('0', 8, 56)], 31)
    """
    from singe_plugin.integrations.prune import usual_every, what_repairs

    pace = as_options(Pace, pace, "pace", "order").settle()
    assert pace.order is not None
    tuning = as_options(FineTune, finetune, "finetune", "steps").settle(usual_every(pace))
    steps, repaired = tuning.steps, what_repairs("auto", tuning) is not None
    scoring = as_options(Scoring, scoring, "scoring", "criterion").settle(pace.order, repaired=repaired)
    by_score = isinstance(pace.ratios, str) and pace.ratios in BY_SCORE
    counted = replace(pace, ratios="uniform", blocks=False) if by_score else pace
    pruner = pruner_of(model, example_inputs, target=target, pace=counted, **options)
    rows: list[InspectedGroup] = []
    cost, problem = None, None
    try:
        host = pruner.host()
        specs, costs = host.layers(), host.costs()
        whole = costs.cost("params", {})
        groups = {spec.name: pruner.graph.groups[spec.name].unit_group() for spec in specs}
        for spec in specs:
            producers = tuple(producer.name for producer in groups[spec.name].producers)
            params = round(whole - costs.cost("params", {spec.name: spec.units}))
            rows.append(InspectedGroup(spec.name, spec.block, spec.units, spec.channels_per_unit, params, producers))
        if not isinstance(scoring.criterion, str):
            raise BudgetError(f"what a {type(scoring.criterion).__name__} costs is not known here")
        plan = pruner.plan()
        alive = _units_at_scorings({spec.name: spec.units for spec in specs}, plan, pruner, by_score)
        together = passes_together(groups)
        probing = together if pace.order == "layers" and scoring.rule.needs_gradient else 0
        cost = _cost(alive, sum(plan.values()), scoring, pace, together, probing, steps)
    except BudgetError as error:
        problem = str(error)
    if pace.blocks and pruner.layers:
        pruner.find_blocks()
        rows += _blocks(pruner)
    said = None if target is None else str(target)
    shown: dict[str, Any] = {"target": said, "pace": describe(pace.named(model)), "scoring": describe(scoring)}
    shown |= {"finetune_steps": steps}
    macs = count_macs(model, example_inputs) // count_examples(example_inputs)
    return Inspection(count_params(model), macs, rows, dict(pruner.left_whole), shown, cost, problem)


def _blocks(pruner: Any) -> list[InspectedGroup]:
    """The residual blocks that could go, each as one unit of all channels that its branch ends in."""
    host = pruner.host()
    costs, graph = host.costs("params"), pruner.graph
    whole = costs.cost("params", {})
    found = []
    for name, block in graph.blocks.items():
        producers = block.unit_group().producers
        params = round(whole - costs.cost("params", {name: 1}))
        names = tuple(producer.name for producer in producers)
        found.append(InspectedGroup(name, name, 1, len(producers[0].rows), params, names))
    return found


def figure_two(model: nn.Module, data: Dataset[Any], batch_size: int = 64, seed: int = 0) -> list[Curves]:
    """The paper's Figure 2 for a model: five random units of an early and of a late layer, on one batch.

    Args:
        model: left as it was.
        data: the dataset to draw the batch from.
        batch_size: examples in it.
        seed: of the batch and of the units.

    Raises:
        BudgetError: if the model has no layer that can be pruned.
    """
    batches = scoring_batches(data, [], batch_size, 1, seed)
    pruner = pruner_of(model, to_device(batches[0][0][:2], model_device(model)))
    names = [spec.name for spec in pruner.host().layers()]
    chosen = list(dict.fromkeys([names[len(names) // 4], names[-1 - len(names) // 4]]))
    return gradient_curves(model, [pruner.graph.groups[name].unit_group() for name in chosen], batches, seed=seed)


def _units_at_scorings(units: dict[str, int], plan: dict[str, int], pruner: Any, by_score: bool) -> list[int]:
    """The units of a layer at each of its scorings, all layers in one list."""
    found = []
    for name, removed in plan.items():
        if pruner.pace.order == "rounds":
            gone = [0.0, *(pruner.pace.share_after(number) for number in range(1, pruner.pace.rounds))]
            found += [units[name] - round(removed * share) for share in gone]
            continue
        chunk = units_per_turn(pruner.pace.units_per_step, units[name])
        found += [units[name] - i * chunk for i in range(math.ceil(removed / chunk))]
        if by_score:
            found.append(units[name])  # the units of all layers are ranked before the first removal
    return found


def _cost(
    alive: list[int], removed: int, scoring: Scoring, pace: Pace, together: int, probing: int, finetune_steps: int
) -> RunCost:
    """Count the passes of all scorings; ``together`` are those that give the gradients of all layers."""
    assert scoring.batches is not None
    if scoring.rule.of_readers:  # of all layers of a turn at once, behind a forward pass that sees what they read
        turns = (pace.rounds or 1) if pace.order == "rounds" else len(alive)
        return RunCost(removed, turns, 1, turns * scoring.batches, probing, finetune_steps)
    if scoring.at_start and pace.order == "rounds":
        turns = pace.rounds or 1
        return RunCost(removed, turns, together, turns * together * scoring.batches, probing, finetune_steps)
    evaluations = sum(alive) if scoring.path == "neuron" else len(alive)
    passes = evaluations * scoring.passes * scoring.batches
    return RunCost(removed, len(alive), scoring.passes, passes, probing, finetune_steps)


def _few(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
