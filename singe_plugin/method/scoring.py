r"""Walk the decay path on a live model and score the units of a group.

For every node u of the path, the producing rows of the group are replaced by :math:`uW^n` (batch-norm folded in,
virtually), F is evaluated in eval mode, and the gradient with respect to exactly those rows is taken. The model's
own parameters are never written to: substitutes take their place and are taken out again, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, DataError, ScoringError, SingeError, is_of_the_machine
from singe_plugin.method.batches import check_batch, inputs_for, materialise, read
from singe_plugin.method.decay import LayerStats, Measured, Row, on_norms, substituted, touched, weight_norms
from singe_plugin.method.dependence import check_zeros
from singe_plugin.method.objective import check_head
from singe_plugin.method.options import Scoring
from singe_plugin.method.path import DecayPath
from singe_plugin.method.prefix import PrefixCache
from singe_plugin.method.reduction import normalize, reduce_layers
from singe_plugin.method.step import as_step
from singe_plugin.method.timeline import Prefix, Timeline
from singe_plugin.method.units import UnitGroup, refuse_tied, tied_parameters
from singe_plugin.method.walk import Walker
from singe_plugin.nested import call_model, to_device
from singe_plugin.ranks import Division, current
from singe_plugin.state import forget_caches, model_device, plain_layers, preserved

__all__ = ["measuring", "passes_together", "path_gradient_norms", "score_error", "score_groups", "score_units"]

Norms = tuple[list[Tensor], list[Tensor]]  # per producer: the norms at the start, and which units it has


def score_units(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None = None, options: Scoring | None = None
) -> Tensor:
    r"""Score every unit of a group (Eq. 1-3, 5), averaged over the batches.

    Args:
        model: left bit for bit as it was.
        group: its units and the layers that produce them.
        batches: ``(inputs, targets)`` pairs or mappings; may be None for ``l1``, ``l2`` and ``lp``.
        options: how.

    Returns:
        ``[N]`` float32 on the model's device; larger is more important.

    Raises:
        DataError: no batches, or not of a known form.
        ScoringError: F is not finite, the forward pass fails, or all scores are zero and that is not the truth (F
            changes without the units, or does not depend on them at all).
        TiedParameterError: a producing parameter is shared with another layer.

    Example:
        >>> import torch
        >>> from singe_plugin.method.options import Scoring
        >>> from singe_plugin.method.units import Producer, Slot, UnitGroup
        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> rows = torch.arange(3)
        >>> group = UnitGroup("net", 3, (Producer("net", (Slot(net, "weight"),), rows, rows),))
        >>> scores = score_units(net, group, options=Scoring(criterion="l2"))
        >>> torch.allclose(scores, net.weight.detach().norm(dim=1))
        True
    """
    return score_groups(model, {group.name: group}, batches, options)[group.name]


def score_groups(
    model: nn.Module,
    groups: Mapping[str, UnitGroup],
    batches: Iterable[Any] | None = None,
    options: Scoring | None = None,
) -> dict[str, Tensor]:
    r"""Score every unit of several groups, as :func:`score_units` does one after the other.

    What they share is done once. Where the path is its start, u = 1, alone, as of ``grad`` and ``norm_grad``, one pass
    of each batch gives the gradients of all of them (of those that have no layer in common); elsewhere each batch takes
    the groups in the order of the network, and what is in front of a group is computed no more than once.

    Returns:
        name -> ``[N]`` float32 on the model's device.

    Example:
        >>> import torch
        >>> from singe_plugin.method.units import Producer, Slot, UnitGroup
        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> group = UnitGroup("net", 3, (Producer("net", (Slot(net, "weight"),), torch.arange(3), torch.arange(3)),))
        >>> batch = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
        >>> score_groups(net, {"net": group}, [batch], Scoring(criterion="grad"))["net"].shape
        torch.Size([3])
    """
    options = (options or Scoring()).settle()
    return _score(model, groups, batches, options, options.decay_path)


def score_error(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any], options: Scoring | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and an estimate of their quadrature error, ``|Q - Q_refined|`` per unit.

    The refined rule (:meth:`~singe_plugin.method.path.DecayPath.refined`) has about twice the nodes, so this costs
    about three times a plain scoring. Criteria without a path have no quadrature and an error of zero.

    Returns:
        scores ``[N]`` and errors ``[N]``, both in the units of the score, before the normaliser.
    """
    options = replace((options or Scoring()).settle(), normalizer=None)
    path = options.decay_path
    batches = materialise(batches)  # they are read twice
    (scores,) = _score(model, {group.name: group}, batches, options, path).values()
    if not options.rule.needs_path:
        return scores, torch.zeros_like(scores)
    (refined,) = _score(model, {group.name: group}, batches, options, path.refined()).values()
    return scores, (scores - refined).abs()


def path_gradient_norms(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any], options: Scoring | None = None
) -> tuple[Tensor, Tensor]:
    r"""The curves of the paper's Figure 2: the gradient norm along the path, per unit, in the root layer.

    Returns:
        decayed weight norms :math:`\|\mu^sW^n\|_p` and gradient norms :math:`\|\nabla_{\mu^sW^n}F\|_p`, both
        ``[K, N]``, averaged over the batches.
    """
    options = (options or Scoring()).settle()
    path = options.decay_path
    root = [layers[0] for layers in _walk(model, group, batches, options, path)]
    scales = path.scales.to(root[0].norms.device)
    return scales[:, None] * root[0].norms, torch.stack([r.grads for r in root]).mean(0)


def _walk(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None, options: Scoring, path: DecayPath
) -> list[list[LayerStats]]:
    """Per batch, everything that was measured in each layer, node by node."""
    found: list[list[LayerStats]] = []

    def keep(_: str, start: Norms, nodes: Iterator[Measured]) -> None:
        layers = zip(*nodes, strict=True)  # [layer][node] from [node][layer]
        found.append(
            [
                LayerStats(norm, covered, torch.stack([g for g, _ in layer]), torch.stack([d for _, d in layer]))
                for norm, covered, layer in zip(*start, layers, strict=True)
            ]
        )

    model, batches, options = as_step(model, batches, options)
    _measure(model, {group.name: group}, batches, options, path, keep, True, True, divided=False)
    return found


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """The model as F is evaluated on it, with gradients; it is restored afterwards."""
    with preserved(model), plain_layers(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        yield


def _score(
    model: nn.Module,
    groups: Mapping[str, UnitGroup],
    batches: Iterable[Any] | None,
    options: Scoring,
    path: DecayPath,
) -> dict[str, Tensor]:
    rule = options.rule
    model, batches, options = as_step(model, None if batches is None else materialise(batches), options)
    totals: dict[str, list[Tensor]] = {}
    covered: dict[str, list[Tensor]] = {}

    def add_up(name: str, start: Norms, nodes: Iterator[Measured]) -> None:
        """Every criterion is a sum over the nodes: they are added one by one, and none is kept."""
        norms, covered[name] = start
        mine = totals.setdefault(name, [torch.zeros_like(n) for n in norms])
        for scale, weight, node in zip(path.scales.tolist(), path.weights.unsqueeze(1), nodes, strict=True):
            for total, norm, (grads, inner) in zip(mine, norms, node, strict=True):
                total += rule.combine(norm[None] * scale, grads[None], inner[None], weight.to(norm.device))

    count = _measure(model, groups, batches, options, path, add_up, rule.norms, rule.inner)
    if rule.needs_gradient:
        count, totals = _of_all_ranks(count, totals)
    means = {name: [total / count for total in totals[name]] for name in groups}
    zeros = [name for name in groups if not any(bool(mean.any()) for mean in means[name])]
    if batches is not None and rule.needs_gradient and zeros:
        with measuring(model):
            for name in zeros:
                check_zeros(model, groups[name], batches, options)
    return {name: _scores(group, means[name], covered[name], options) for name, group in groups.items()}


def _of_all_ranks(count: int, totals: dict[str, list[Tensor]]) -> tuple[int, dict[str, list[Tensor]]]:
    """The batches and the sums over them, of all ranks: each has some of the batches."""
    ranks = current()
    summed = iter(ranks.add_up("the scores", [total for mine in totals.values() for total in mine]))
    totals = {name: [next(summed).to(total) for total in mine] for name, mine in totals.items()}
    return sum(ranks.gather("the number of batches", count)), totals


def _scores(group: UnitGroup, means: list[Tensor], covered: list[Tensor], options: Scoring) -> Tensor:
    """The scores of a group, from those of each of its layers."""
    scores = normalize(reduce_layers(means, covered, options.group_reduction), options.normalizer)
    if scores.shape != (group.size,):
        raise ConfigError(
            f"normalizer {options.normalizer!r} returned shape {tuple(scores.shape)} for {group.size} units of group "
            f"{group.name!r}; it must keep one score per unit"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ScoringError(f"group {group.name!r}: the scores are not finite after normalizer {options.normalizer!r}")
    return scores.as_subclass(Tensor).float()


def _measure(
    model: nn.Module,
    groups: Mapping[str, UnitGroup],
    batches: Iterable[Any] | None,
    options: Scoring,
    path: DecayPath,
    take: Callable[[str, Norms, Iterator[Measured]], None],
    norms: bool,
    inner: bool,
    divided: bool = True,
) -> int:
    """Hand the norms of every group, and what is measured along its path on every batch, to ``take``.

    Where several ranks have the same batches, these are ``divided``; one that gets none takes nothing but zeros.

    Returns:
        on how many batches that was done.
    """
    ties = tied_parameters(model)
    for group in groups.values():
        refuse_tied(group, ties)
        if not group.producers:
            raise ConfigError(f"group {group.name!r} has no layer that produces its units; nothing to score")
    if not options.rule.needs_gradient:
        for name, group in groups.items():
            with substituted(group, runs=False) as rows:
                start = weight_norms(group, rows, options.degree)
            nothing = [(n.new_zeros(()).expand_as(n),) * 2 for n in start[0]]
            take(name, start, iter([nothing]))
        return 1
    if batches is None:
        raise DataError(
            f"criterion {options.criterion!r} differentiates F on data, and none is bound; call "
            "importance.bind(model, batches) with batches of (inputs, targets) first, or use the criterion 'l2'"
        )
    check_head(model, options.objective)
    if not norms:
        groups = {name: on_norms(group) for name, group in groups.items()}
    device, count, starts, division = model_device(model), 0, dict[str, Norms](), Division()
    alone = options.path == "layer" and path.is_start
    together = list(_apart(groups)) if alone else []
    with measuring(model):
        model.requires_grad_(False)
        for index, batch in enumerate(read(batches, "reading the batches to score on")):
            check_batch(batch)
            if not index and divided:
                division = current().division(batch)
            count += 1
            if index not in division:
                continue
            inputs, targets = inputs_for(model, batch)
            moved = to_device(inputs, device, options.channels_last), to_device(targets, device)
            run = partial(call_model, model, moved[0])
            if index == division.first:
                forget_caches(model, run)

            def walker(name: str, rows: list[Row], index: int = index, moved: tuple[Any, Any] = moved) -> Walker:
                if name not in starts:
                    starts[name] = weight_norms(groups[name], rows, options.degree)
                return Walker(model, groups[name], rows, options, path, index, *moved, norms, inner)

            for names in together:
                with ExitStack() as stack:
                    walkers = [walker(name, stack.enter_context(substituted(groups[name]))) for name in names]
                    found = Walker.together(walkers)
                for name, measured in zip(names, found, strict=True):
                    take(name, starts[name], iter([measured]))
            for name, prefix in () if alone else _in_turn(model, groups, run, path.nodes):
                with substituted(groups[name]) as rows, prefix() as cache:
                    mine = walker(name, rows)
                    take(name, starts[name], mine.nodes(cache))
    if not count:
        raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
    for name, group in groups.items() if not division.of(count) else ():
        with substituted(group, runs=False) as rows:
            start = weight_norms(group, rows, options.degree)
        take(name, start, iter([[(n.new_zeros(()).expand_as(n),) * 2 for n in start[0]]] * path.nodes))
    return len(division.of(count))


def passes_together(groups: Mapping[str, UnitGroup]) -> int:
    """How many passes of a batch give the gradients of all groups, where the path is its start: often one."""
    return len(list(_apart(groups)))


def _apart(groups: Mapping[str, UnitGroup]) -> Iterator[list[str]]:
    """Yield names of groups that have no module in common, until all were there."""
    left = {name: set(touched(group)) for name, group in groups.items()}
    while left:
        taken: set[nn.Module] = set()
        names = []
        for name, modules in left.items():
            if taken.isdisjoint(modules):
                taken |= modules
                names.append(name)
        for name in names:
            del left[name]
        yield names


def _in_turn(
    model: nn.Module, groups: Mapping[str, UnitGroup], run: Callable[[], Any], nodes: int
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]]]]:
    """Yield groups in the order in which they are needed, each with what keeps the results in front of its layers."""
    if len(groups) == 1:
        for name, group in groups.items():
            yield name, nullcontext if nodes == 1 else partial(PrefixCache, model, touched(group))
        return
    try:
        line = Timeline(model, run)
    except Exception as error:
        if isinstance(error, SingeError) or is_of_the_machine(error):
            raise
        yield from ((name, nullcontext) for name in groups)  # what is wrong is said of the first of them
        return
    needed = {name: line.start(touched(group)) for name, group in groups.items()}
    prefix = Prefix(line)
    for name in sorted(groups, key=lambda name: needed[name]):
        prefix.before(needed[name])
        yield name, lambda: prefix
