"""What the layers that read units make of them, on data: the criterion ``obs``.

A pass of every batch without gradients shows what each layer gets (its Gram matrix, at positions drawn at random), and
one with gradients how much the objective moves with what it gives. :mod:`singe_plugin.method.surgeon` does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singe_plugin.axes.algebra import Axis, labels
from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.groups import Group
from singe_plugin.axes.rows import drawn, inputs_at, matrix_of, positions_of
from singe_plugin.axes.tape import Playback, Tape
from singe_plugin.errors import DataError, ScoringError, SingeError
from singe_plugin.loop.player import ready
from singe_plugin.method.batches import inputs_for, materialise, read
from singe_plugin.method.dependence import check_zeros
from singe_plugin.method.evaluation import all_finite, detached, evaluate, evaluation_failed
from singe_plugin.method.objective import check_head
from singe_plugin.method.options import Scoring
from singe_plugin.method.reduction import normalize
from singe_plugin.method.ridge import LARGEST, Moments, exact
from singe_plugin.method.scoring import measuring, score_groups
from singe_plugin.method.step import BatchObjective, as_step, check_form, model_inputs
from singe_plugin.method.surgeon import LEAST, Reading, removal_costs, shrinkage
from singe_plugin.method.units import UnitGroup
from singe_plugin.nested import call_model, examples_in, map_tensors, to_device
from singe_plugin.ranks import Division, current
from singe_plugin.state import forget_caches, model_device

__all__ = ["costs_of_removal"]

_logger = logging.getLogger("singe_plugin")
_POSITIONS = 32  # of an example, at most


@dataclass
class _Reader:
    """The contractions with a parameter, and what is summed up of them.

    Attributes:
        number: of the first of them.
        name: of the parameter.
        made_up: whether a bias, or a batch-norm behind, makes up for the mean.
        known: of the inputs; there are no targets.
        examples: how many were seen; the squares are of the Gram matrix of each, ``[groups]``.
        moves: squares of the objective's gradient for the weights of each output, ``[groups, O]``.
        seen: the last one.
    """

    number: int
    name: str
    made_up: bool
    known: Moments | None = None
    examples: int = 0
    squares: Any = 0.0
    moves: Tensor | None = None
    seen: Contraction | None = None

    def include_others(self, empty: bool) -> None:
        """Count in what the other ranks saw, and not what this one did, if that was ``empty``: of others' batches."""
        ranks, known = current(), self.known
        if ranks.world == 1 or known is None:
            return
        moved = all(ranks.gather("whether F moves with a layer", self.moves is not None or empty))
        counts = torch.tensor([known.count, self.examples], dtype=torch.float64, device=known.x.device)
        mine = [counts, known.x, known.xx, torch.as_tensor(self.squares), *([] if self.moves is None else [self.moves])]
        if not moved:
            mine, self.moves = mine[:4], None
        summed = ranks.add_up(f"what {self.name} reads", [torch.zeros_like(t) if empty else t for t in mine])
        known.count, self.examples = (int(number) for number in summed[0].tolist())
        known.x, known.xx, self.squares = summed[1:4]
        self.moves = summed[4] if moved else None

    def add(self, found: Contraction, x: Tensor) -> None:
        """Count rows ``[groups, rows, F]`` in: of a convolution those of one image after the other.

        Of a product every row is an example: which rows belong together is not seen there.
        """
        examples = x.shape[1] if found.convolution is None else len(found.x)
        each = exact(x).reshape(len(x), examples, -1, x.shape[2])
        self.squares = self.squares + (each @ each.transpose(2, 3) / each.shape[2]).square().sum((1, 2, 3))
        self.examples += examples
        if self.known is None:
            self.known = Moments.of(x, x[:, :, :0])
        else:
            self.known.include(x, x[:, :, :0])
        self.seen = replace(found, x=found.x[:0], out=found.out[:0])  # their memory is not kept


def costs_of_removal(
    graph: AxisGraph,
    names: Collection[str],
    batches: Iterable[Any],
    options: Scoring,
    seed: int = 0,
    blocks: Mapping[str, UnitGroup] | None = None,
) -> dict[str, Tensor]:
    """Score the units of groups by what their removal costs once all that read them were solved again.

    See :func:`singe_plugin.method.surgeon.removal_costs` for the formula. A group that something reads which is not
    followed (a weight that is computed, or that reads its own results, as recurrent ones do), or that no layer reads
    (queries and keys), is scored by :math:`\\tfrac12\\langle W^n,\\nabla_{W^n}F\\rangle^2` instead, the square of
    ``ig_abs`` with one node: a number of the same kind, without the others taking over. That is logged.

    Args:
        graph: of the model.
        names: of groups.
        batches: ``(inputs, targets)`` or mappings.
        options: the objective, and how scores are normalised.
        seed: of the choice of positions.
        blocks: of residual blocks, the layers that write their results; scored without what takes over, too.

    Returns:
        group, or block -> ``[N]`` float32 on the model's device.

    Raises:
        DataError: if there are no batches.
        ScoringError: if F is not finite, cannot be evaluated, or does not depend on a group.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
        >>> costs_of_removal(AxisGraph(net, batch[0]), ["0"], [batch], Scoring("obs"))["0"].shape
        torch.Size([8])
    """
    reading = {name: graph.groups[name].readers() for name in names}
    batches = materialise(batches)
    readers = _measured(graph, set().union(*reading.values()), batches, options, seed)
    product = replace(options, criterion="ig_abs", mu=None, quadrature="gauss", nodes=1, normalizer=None)
    costs: dict[str, Tensor] = {}
    alone: list[str] = []
    for name, wanted in reading.items():
        group = graph.groups[name]
        readings, unseen = _readings(graph, group, wanted, readers)
        if unseen or not readings:
            alone.append(name)
            _logger.info(
                "the units of %r are scored without what reads them, %s", name,
                f"because {unseen} is not followed" if unseen else "because no layer does",
            )  # fmt: skip
            continue
        costs[name] = removal_costs(readings, group.size)
        if not bool(costs[name].any()):
            step, steps, plain = as_step(graph.model, batches, product)
            with measuring(step):
                check_zeros(step, group.unit_group(), steps or (), plain)
    blocks = blocks or {}
    if alone or blocks:
        groups = {name: graph.groups[name].unit_group() for name in alone} | dict(blocks)
        products = score_groups(graph.model, groups, batches, product)
        costs |= {name: 0.5 * scores.double().square() for name, scores in products.items()}
    found = {}
    for name in [*reading, *blocks]:
        if not bool(torch.isfinite(costs[name]).all()):
            raise ScoringError(f"group {name!r}: the scores are not finite; check the batches for inf/NaN")
        found[name] = normalize(costs[name], options.normalizer).float().to(model_device(graph.model))
    return found


def _measured(
    graph: AxisGraph, wanted: Collection[str], batches: Iterable[Any], options: Scoring, seed: int
) -> list[_Reader]:
    """What the contractions with some parameters get, and how much the objective moves with what they give."""
    model, device = graph.model, model_device(graph.model)
    check_head(model, options.objective)
    readers: dict[int, _Reader] = {}
    tape: Tape | None = None

    def look(index: int, batch: Any) -> None:
        nonlocal tape
        inputs = to_device(model_inputs(model, batch, options.objective), device, options.channels_last)
        if tape is None:
            forget_caches(model, partial(call_model, model, inputs))
            with torch.no_grad():
                tape = Tape.of(model, map_tensors(torch.clone, inputs), graph.forward)
            readers.update(_followed(graph, tape, wanted))
        examples = max(examples_in(inputs), 1)
        model.eval()  # a step may have evaluated F in another mode
        with torch.no_grad():
            see = partial(_see, graph, readers, examples, seed + 7919 * index)
            with Playback(model, tape, see):
                graph.forward(model, map_tensors(torch.clone, inputs))
        _differentiate(graph, _each(readers), inputs, batch, options, index)

    count, division, first = 0, Division(), None
    with ready(model), torch.autocast(device.type, enabled=False), torch.inference_mode(False):
        for index, batch in enumerate(read(batches, "reading the batches to score on")):
            check_form(batch, options.objective)
            if not index:
                first, division = batch, current().division(batch)
            if index in division:
                look(index, batch)
            count += 1
        if not count:
            raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
        empty = not division.of(count)
        if empty:
            look(0, first)  # it shows how the layers are called
    for reader in _each(readers):
        reader.include_others(empty)
    return [reader for reader in _each(readers) if reader.moves is not None]


def _each(readers: dict[int, _Reader]) -> list[_Reader]:
    return list({reader.name: reader for reader in readers.values()}.values())


def _followed(graph: AxisGraph, tape: Tape, wanted: Collection[str]) -> dict[int, _Reader]:
    """Who reads those parameters that nothing else reads, by contraction; none if the trace has others."""
    if len(tape.sites) != len(graph.trace.contractions):
        return {}
    numbers: dict[str, list[int]] = {}
    for number, (weight, _, _) in enumerate(tape.sites):
        if weight is not None and weight in wanted and not tape.read_by(weight):
            numbers.setdefault(weight, []).append(number)
    found: dict[int, _Reader] = {}
    for weight, mine in numbers.items():
        if any(tape.depends[number] & set(mine) for number in mine):
            continue  # it reads its own results: it is not solved again
        owner = graph.model.get_submodule(weight.rpartition(".")[0])
        biased = all(tape.sites[number][1] is not None or number in tape.added for number in mine)
        made_up = biased or graph.trace.sole_reader(owner) is not None
        found |= dict.fromkeys(mine, _Reader(mine[0], weight, made_up))
    return found


def _see(graph: AxisGraph, readers: dict[int, _Reader], examples: int, seed: int, found: Contraction) -> None:
    """Count what a contraction gets in."""
    reader = readers.get(found.number)
    if reader is None:
        return
    weight = graph.model.get_parameter(reader.name)
    if matrix_of(found, weight).shape[2] > LARGEST or not found.x.is_floating_point():
        for number in [number for number, other in readers.items() if other is reader]:
            del readers[number]
        return
    most = _POSITIONS * (1 if found.convolution is not None else examples)
    chosen = drawn(positions_of(found), most, seed + found.number, found.x.device)
    reader.add(found, inputs_at(found, weight.shape[2:], chosen))


def _differentiate(
    graph: AxisGraph, readers: list[_Reader], inputs: Any, batch: Any, options: Scoring, index: int
) -> None:
    """Count in how much the objective moves with what every contraction gives, on a batch."""
    weights = {reader.name: graph.model.get_parameter(reader.name) for reader in readers if reader.seen is not None}
    if not weights:
        return
    who, device = f"criterion {options.criterion!r}", model_device(graph.model)
    try:
        with torch.enable_grad():
            value = evaluate(*_run_of(graph, inputs, batch, index, options), device)
            if not value.requires_grad:
                raise detached(who)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise evaluation_failed(who, index, inputs, error) from error
    if not all_finite([value, *(one for one in found if one is not None)]):
        raise ScoringError(f"{who}: F or its gradient is not finite on batch {index}; check the batch for inf/NaN")
    gradients = dict(zip(weights, found, strict=True))
    for reader in readers:
        if reader.seen is not None and (gradient := gradients[reader.name]) is not None:
            squares = exact(matrix_of(reader.seen, gradient)).square().sum(2)
            reader.moves = squares if reader.moves is None else reader.moves + squares


def _run_of(
    graph: AxisGraph, inputs: Any, batch: Any, index: int, options: Scoring
) -> tuple[Callable[[], Any], Any, Scoring]:
    """What evaluates F on a batch, the targets, and the options for it."""
    options, model = replace(options, amp=None), graph.model
    if not isinstance(options.objective, BatchObjective):
        targets = to_device(inputs_for(model, batch)[1], model_device(model))
        return partial(graph.forward, model, inputs), targets, options
    step, steps, options = as_step(model, [batch], options)
    assert steps is not None
    [((only,), _)] = steps
    only.seed = index
    return partial(step.eval(), only), None, options


def _readings(
    graph: AxisGraph, group: Group, wanted: set[str], readers: list[_Reader]
) -> tuple[list[Reading], str | None]:
    """How a group is read by some parameters, and one of them that is not followed."""
    leaf = group.leaf.root()
    readings: list[Reading] = []
    for reader in readers:
        if reader.name in wanted and reader.seen is not None:
            axes = graph.trace.contractions[reader.number]
            matrix = exact(graph.model.get_parameter(reader.name).detach())
            readings += _of(reader, matrix_of(reader.seen, matrix), axes, leaf)
    unseen = sorted(wanted - {reader.name for reader in readers})
    return readings, unseen[0] if unseen else None


def _of(reader: _Reader, matrix: Tensor, axes: tuple[list[Axis], list[Axis]], leaf: Any) -> Iterator[Reading]:
    """Yield the readings of a contraction: one for every group of a grouped convolution that has units."""
    assert reader.seen is not None
    assert reader.known is not None
    dim = 1 if reader.seen.convolution is not None else -1
    groups, outputs, features = matrix.shape
    units = _units(axes[0][dim], leaf, features * groups).reshape(groups, features)
    given = _units(axes[1][dim], leaf, outputs * groups).reshape(groups, outputs)
    assert reader.moves is not None
    gram = reader.known.xx / reader.known.count
    curvature = reader.moves / gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp(min=1e-300)
    ridge = shrinkage(gram, reader.squares, reader.examples)
    if reader.made_up:
        gram = reader.known.centred().xx / reader.known.count
    for index in range(groups):
        own = torch.from_numpy(units[index]).to(matrix.device)
        if bool((own >= 0).any()):
            theirs = torch.from_numpy(given[index]).to(matrix.device)
            yield Reading(gram[index], matrix[index], curvature[index], own, theirs, max(LEAST, float(ridge[index])))


def _units(axis: Axis, leaf: Any, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The unit of each of ``count`` features; a kernel has several for a channel."""
    found = labels(axis, leaf)
    return np.repeat(found, count // len(found))
