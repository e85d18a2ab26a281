r"""Walk the decay path on a live model and score the units of a group.

For every node u of the path, the producing rows of the group are replaced by :math:`uW^n` (batch-norm folded in,
virtually), F is evaluated in eval mode, and the gradient with respect to exactly those rows is taken. The model's
own parameters are never written to: substitutes take their place and are taken out again, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.method.batches import check_batch, inputs_for, materialise, read
from singe_plugin.method.decay import LayerStats, Measured, decaying, weight_norms
from singe_plugin.method.dependence import check_zeros
from singe_plugin.method.objective import check_head
from singe_plugin.method.options import Scoring
from singe_plugin.method.path import DecayPath
from singe_plugin.method.prefix import PrefixCache
from singe_plugin.method.reduction import normalize, reduce_layers
from singe_plugin.method.units import UnitGroup, refuse_tied, tied_parameters
from singe_plugin.method.walk import Walker
from singe_plugin.nested import call_model, to_device
from singe_plugin.state import forget_caches, model_device, plain_layers, preserved

__all__ = ["measuring", "path_gradient_norms", "score_error", "score_units"]

Norms = tuple[list[Tensor], list[Tensor]]  # per producer: the norms at the start, and which units it has
Found = TypeVar("Found")


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
    options = (options or Scoring()).settle()
    return _score(model, group, batches, options, options.decay_path)


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
    scores = _score(model, group, batches, options, path)
    if not options.rule.needs_path:
        return scores, torch.zeros_like(scores)
    return scores, (scores - _score(model, group, batches, options, path.refined())).abs()


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
    walks = list(_walk(model, group, batches, options, path))
    root = [walk[0] for walk in walks]
    scales = path.scales.to(root[0].norms.device)
    return scales[:, None] * root[0].norms, torch.stack([r.grads for r in root]).mean(0)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """The model as F is evaluated on it, with gradients; it is restored afterwards."""
    with preserved(model), plain_layers(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        yield


def _score(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None, options: Scoring, path: DecayPath
) -> Tensor:
    rule = options.rule
    batches = None if batches is None else materialise(batches)
    totals: list[Tensor] = []

    def add_up(start: Norms, nodes: Iterator[Measured]) -> list[Tensor]:
        """Every criterion is a sum over the nodes: they are added one by one, and none is kept."""
        norms, covered = start
        if not totals:
            totals.extend(torch.zeros_like(n) for n in norms)
        for scale, weight, node in zip(path.scales.tolist(), path.weights.unsqueeze(1), nodes, strict=True):
            for total, norm, (grads, inner) in zip(totals, norms, node, strict=True):
                total += rule.combine(norm[None] * scale, grads[None], inner[None], weight.to(norm.device))
        return covered

    covered = list(_per_batch(model, group, batches, options, path, add_up, rule.inner))
    means = [total / len(covered) for total in totals]
    if batches is not None and rule.needs_gradient and not any(bool(mean.any()) for mean in means):
        with measuring(model):
            check_zeros(model, group, batches, options)
    scores = normalize(reduce_layers(means, covered[0], options.group_reduction), options.normalizer)
    if scores.shape != (group.size,):
        raise ConfigError(
            f"normalizer {options.normalizer!r} returned shape {tuple(scores.shape)} for {group.size} units of group "
            f"{group.name!r}; it must keep one score per unit"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ScoringError(f"group {group.name!r}: the scores are not finite after normalizer {options.normalizer!r}")
    return scores.as_subclass(Tensor).float()


def _walk(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None, options: Scoring, path: DecayPath
) -> Iterator[list[LayerStats]]:
    """Per batch, everything that was measured in each layer, node by node."""

    def keep(start: Norms, nodes: Iterator[Measured]) -> list[LayerStats]:
        layers = zip(*nodes, strict=True)  # [layer][node] from [node][layer]
        return [
            LayerStats(norm, covered, torch.stack([g for g, _ in layer]), torch.stack([d for _, d in layer]))
            for norm, covered, layer in zip(*start, layers, strict=True)
        ]

    return _per_batch(model, group, batches, options, path, keep, True)


def _per_batch(
    model: nn.Module,
    group: UnitGroup,
    batches: Iterable[Any] | None,
    options: Scoring,
    path: DecayPath,
    reduce: Callable[[Norms, Iterator[Measured]], Found],
    inner: bool,
) -> Iterator[Found]:
    """Per batch, what ``reduce`` makes of the walk. The model is restored before the first is given out."""
    refuse_tied(group, tied_parameters(model))
    if not group.producers:
        raise ConfigError(f"group {group.name!r} has no layer that produces its units; nothing to score")
    if not options.rule.needs_gradient:
        with preserved(model), decaying(model, group) as rows:
            start = weight_norms(group, rows, options.degree)
        nothing = [(n.new_zeros(()).expand_as(n),) * 2 for n in start[0]]
        yield reduce(start, iter([nothing]))
        return
    if batches is None:
        raise DataError(
            f"criterion {options.criterion!r} differentiates F on data, and none is bound; call "
            "importance.bind(model, batches) with batches of (inputs, targets) first, or use the criterion 'l2'"
        )
    check_head(model, options.objective)
    results = []
    device = model_device(model)
    with measuring(model), decaying(model, group) as rows:
        start = weight_norms(group, rows, options.degree)
        for index, batch in enumerate(read(batches, "reading the batches to score on")):
            check_batch(batch)
            inputs, targets = inputs_for(model, batch)
            moved = to_device(inputs, device, options.channels_last), to_device(targets, device)
            if not index:
                forget_caches(model, partial(call_model, model, moved[0]))
            walker = Walker(model, group, rows, options, path, index, *moved, inner)
            with PrefixCache(model, {row.owner for row in rows}) as prefix:
                results.append(reduce(start, walker.nodes(prefix)))
    if not results:
        raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
    yield from results
