r"""Walk the decay path on a live model and score the units of a group.

For every node u of the path, the producing rows of the group are replaced by :math:`uW^n` (batch-norm folded in,
virtually), F is evaluated in eval mode, and the gradient with respect to exactly those rows is taken. The model's
own parameters are never written to: substitutes take their place and are taken out again, whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from singe_plugin.criteria import Criterion, check_degree, get_criterion
from singe_plugin.errors import ConfigError, DataError, GroupError, ScoringError, SingeError
from singe_plugin.folding import norm_scale_shift
from singe_plugin.objective import (
    Objective,
    ObjectiveLike,
    call_model,
    get_objective,
    materialise,
    split_batch,
    to_device,
)
from singe_plugin.path import DecayPath, decay_path
from singe_plugin.prefix import PrefixCache
from singe_plugin.reduction import NormalizerLike, check_normalizer, check_reduction, normalize, reduce_layers
from singe_plugin.state import model_device, preserved
from singe_plugin.units import Producer, RowLayout, UnitGroup, refuse_tied, tied_parameters

__all__ = ["PATHS", "ScoringOptions", "path_gradient_norms", "score_error", "score_units"]

PATHS = ("layer", "neuron")
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ScoringOptions:
    """How units are scored. Every field is checked when the object is made.

    Attributes:
        criterion: a name of :mod:`singe_plugin.criteria`.
        p: the norms' degree, at least 1 (``l1`` and ``l2`` have their own).
        mu, steps: the path of Eq. 5 (see :mod:`singe_plugin.path`).
        quadrature, nodes: the rule over it.
        path: ``"layer"`` decays all units of the group together, ``"neuron"`` each alone (Eq. 4 to the letter).
        objective: ``"loss"``, ``"logit"`` or a callable ``(outputs, targets) -> scalar``.
        group_reduction, normalizer: see :mod:`singe_plugin.reduction`.
        unit_batch: how many units ``path="neuron"`` evaluates at once; 1 does without ``torch.func``, which not every
            model supports.
        amp: None, ``"bf16"`` or ``"fp16"`` (with loss scaling).
        channels_last: convert 4-D inputs to that memory format.

    Example:
        >>> ScoringOptions(criterion="ig", mu=0.95).passes
        5
    """

    criterion: str = "ig"
    p: float = 2
    mu: float = 0.9
    steps: int | None = None
    quadrature: str = "gauss"
    nodes: int = 5
    path: str = "layer"
    objective: ObjectiveLike = "loss"
    group_reduction: str = "sum"
    normalizer: NormalizerLike = None
    unit_batch: int = 16
    amp: str | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        get_criterion(self.criterion)
        check_degree(self.p)
        check_reduction(self.group_reduction)
        check_normalizer(self.normalizer)
        get_objective(self.objective)
        if self.path not in PATHS:
            raise ConfigError(f"unknown path {self.path!r}; choose one of {', '.join(PATHS)}")
        if self.amp is not None and self.amp not in _AMP:
            raise ConfigError(f"unknown amp {self.amp!r}; choose one of {', '.join(_AMP)} or None")
        if isinstance(self.unit_batch, bool) or not isinstance(self.unit_batch, int) or self.unit_batch < 1:
            raise ConfigError(f"unit_batch={self.unit_batch!r} is not a number of units; give a whole number >= 1")
        _ = self.decay_path

    @property
    def rule(self) -> Criterion:
        """The criterion object."""
        return get_criterion(self.criterion)

    @property
    def degree(self) -> float:
        """The degree of the norms: the criterion's own, or ``p``."""
        own = self.rule.degree
        return float(self.p) if own is None else own

    @property
    def decay_path(self) -> DecayPath:
        """The nodes that are visited; one at u = 1 for criteria without a path."""
        rule = self.rule
        if not rule.needs_path:
            decay_path(self.mu, self.steps, self.quadrature, self.nodes)
            return decay_path(self.mu, 0, "geometric")
        return decay_path(self.mu, self.steps, self.quadrature, self.nodes, rule.measure)

    @property
    def passes(self) -> int:
        """Forward-and-backward passes per batch and group (per unit, for ``path="neuron"``)."""
        return self.decay_path.nodes if self.rule.needs_gradient else 0


def score_units(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None = None, options: ScoringOptions | None = None
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
        ScoringError: F is not finite, or the forward pass fails.
        TiedParameterError: a producing parameter is shared with another layer.

    Example:
        >>> import torch
        >>> from singe_plugin.units import Producer, Slot, UnitGroup
        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> rows = torch.arange(3)
        >>> group = UnitGroup("net", 3, (Producer("net", (Slot(net, "weight"),), rows, rows),))
        >>> scores = score_units(net, group, options=ScoringOptions(criterion="l2"))
        >>> torch.allclose(scores, net.weight.detach().norm(dim=1))
        True
    """
    options = options or ScoringOptions()
    return _score(model, group, batches, options, options.decay_path)


def score_error(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any], options: ScoringOptions | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and an estimate of their quadrature error, ``|Q - Q_refined|`` per unit.

    The refined rule (:meth:`~singe_plugin.path.DecayPath.refined`) has about twice the nodes, so this costs about
    three times a plain scoring. Criteria without a path have no quadrature and an error of zero.

    Returns:
        scores ``[N]`` and errors ``[N]``, both in the units of the score, before the normaliser.
    """
    options = replace(options or ScoringOptions(), normalizer=None)
    path = options.decay_path
    batches = materialise(batches)  # they are read twice
    scores = _score(model, group, batches, options, path)
    if not options.rule.needs_path:
        return scores, torch.zeros_like(scores)
    return scores, (scores - _score(model, group, batches, options, path.refined())).abs()


def path_gradient_norms(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any], options: ScoringOptions | None = None
) -> tuple[Tensor, Tensor]:
    r"""The curves of the paper's Figure 2: the gradient norm along the path, per unit, in the root layer.

    Returns:
        decayed weight norms :math:`\|\mu^sW^n\|_p` and gradient norms :math:`\|\nabla_{\mu^sW^n}F\|_p`, both
        ``[K, N]``, averaged over the batches.
    """
    options = options or ScoringOptions()
    path = options.decay_path
    walks = list(_walk(model, group, batches, options, path))
    root = [walk[0] for walk in walks]
    scales = path.scales.to(root[0].norms.device)
    return scales[:, None] * root[0].norms, torch.stack([r.grads for r in root]).mean(0)


def _score(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None, options: ScoringOptions, path: DecayPath
) -> Tensor:
    rule = options.rule
    totals: list[Tensor] = []
    covered: list[Tensor] = []
    count = 0
    scales = path.scales
    for walk in _walk(model, group, batches, options, path):
        count += 1
        for i, stats in enumerate(walk):
            scales = scales.to(stats.norms.device)
            score = rule.combine(scales[:, None] * stats.norms, stats.grads, stats.inner, path.weights)
            if count == 1:
                totals.append(score)
                covered.append(stats.covered)
            else:
                totals[i] = totals[i] + score
    scores = normalize(reduce_layers([t / count for t in totals], covered, options.group_reduction), options.normalizer)
    if scores.shape != (group.size,):
        raise ConfigError(
            f"normalizer {options.normalizer!r} returned shape {tuple(scores.shape)} for {group.size} units of group "
            f"{group.name!r}; it must keep one score per unit"
        )
    if not bool(torch.isfinite(scores).all()):
        raise ScoringError(f"group {group.name!r}: the scores are not finite after normalizer {options.normalizer!r}")
    return scores.float()


@dataclass
class _LayerStats:
    """What one layer of the group measured on one batch: ``norms`` and ``covered`` [N], the others [K, N]."""

    norms: Tensor
    covered: Tensor
    grads: Tensor
    inner: Tensor


@dataclass
class _Row:
    """A parameter that decays: the folded tensor it starts from, and the unit of each of its rows."""

    owner: nn.Module
    attr: str
    layout: RowLayout
    base: Tensor
    unit_of: Tensor
    producer: int

    def scaled(self, scale: float, unit: Tensor | None = None) -> Tensor:
        """The tensor with its units' rows (or those of one unit) multiplied by ``scale``."""
        chosen = self.unit_of >= 0 if unit is None else self.unit_of == unit
        factors = torch.where(chosen, torch.full((), scale, dtype=self.base.dtype, device=self.base.device), 1.0)
        return self.base * self.layout.spread(factors.to(self.base.dtype), self.base)


def _walk(
    model: nn.Module, group: UnitGroup, batches: Iterable[Any] | None, options: ScoringOptions, path: DecayPath
) -> Iterator[list[_LayerStats]]:
    """Per batch, the statistics of each layer. The model is restored between batches being asked for."""
    refuse_tied(group, tied_parameters(model))
    if not group.producers:
        raise ConfigError(f"group {group.name!r} has no layer that produces its units; nothing to score")
    if not options.rule.needs_gradient:
        with preserved(model), _decaying(model, group) as rows:
            stats = _measure_weights(group, rows, options)
        yield stats
        return
    if batches is None:
        raise DataError(
            f"criterion {options.criterion!r} differentiates F on data, and none is bound; call "
            "importance.bind(model, batches) with batches of (inputs, targets) first, or use criterion='l2'"
        )
    results = []
    device = model_device(model)
    with preserved(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        with _decaying(model, group) as rows:
            for index, batch in enumerate(batches):
                inputs, targets = split_batch(batch)
                moved = to_device(inputs, device, options.channels_last), to_device(targets, device)
                walker = _Walker(model, group, rows, options, path, index, *moved)
                with PrefixCache(model, {row.owner for row in rows}) as prefix:
                    walk = walker.layer_path if options.path == "layer" else walker.neuron_path
                    results.append(walk(prefix))
    if not results:
        raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
    yield from results


@contextmanager
def _decaying(model: nn.Module, group: UnitGroup) -> Iterator[list[_Row]]:
    """Put folded substitutes in the place of the group's parameters; the caller restores through ``preserved``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows: list[_Row] = []
    for number, producer in enumerate(group.producers):
        if not producer.is_norm and all(slot.tensor is None for slot in producer.slots):
            raise GroupError(
                f"group {group.name!r}: {producer.name!r} has no parameter that could decay "
                f"({', '.join(slot.attr for slot in producer.slots)} are None); leave it out of the producers"
            )
        for owner, attr, layout, base in _folded(producer):
            parameter = nn.Parameter(base.clone(memory_format=torch.preserve_format))
            unit_of = producer.unit_of_row().to(base.device)
            if len(unit_of) != layout.count(base):
                raise ScoringError(
                    f"group {group.name!r}: {producer.name}.{attr} has {layout.count(base)} rows, "
                    f"expected {len(unit_of)}"
                )
            owner._parameters[attr] = parameter
            rows.append(_Row(owner, attr, layout, base, unit_of, number))
    yield rows


def _folded(producer: Producer) -> Iterator[tuple[nn.Module, str, RowLayout, Tensor]]:
    """The tensors of a producer with batch-norm folded in; the batch-norm itself becomes the identity."""
    slots = [(slot, slot.tensor) for slot in producer.slots]
    norm = producer.norm
    if norm is None and not producer.is_norm:
        for slot, tensor in slots:
            if tensor is not None:
                yield slot.owner, slot.attr, slot.layout, tensor.detach()
        return
    if producer.is_norm:
        norm = producer.slots[0].owner
        scale, shift = norm_scale_shift(norm)
        _make_identity(norm)
        for (slot, tensor), value in zip(slots, (scale, shift), strict=True):
            # a half-precision batch-norm refuses float32 scales
            yield (
                slot.owner,
                slot.attr,
                slot.layout,
                value.to((cast(Tensor, norm.running_mean) if tensor is None else tensor).dtype),
            )
        return
    assert norm is not None
    scale, shift = norm_scale_shift(norm)
    _make_identity(norm)
    (weight_slot, weight), (bias_slot, bias) = slots
    assert weight is not None
    weight = weight.detach()
    # The batch-norm has one channel per output channel, however many blocks of rows the units see.
    channels = replace(weight_slot.layout, blocks=1)
    folded = (weight * channels.spread(scale.to(weight.device), weight)).to(weight.dtype)
    yield weight_slot.owner, weight_slot.attr, weight_slot.layout, folded
    start = torch.zeros_like(shift) if bias is None else bias.detach().to(shift.dtype)
    yield bias_slot.owner, bias_slot.attr, bias_slot.layout, (scale * start + shift).to(weight.dtype)


def _make_identity(norm: nn.Module) -> None:
    """Replace a batch-norm's tensors so that it passes its input on, in eval mode."""
    plain = {
        "running_mean": 0.0,
        "running_var": 1.0 - float(norm.eps),  # type: ignore[arg-type]
        "weight": 1.0,
        "bias": 0.0,
    }
    for name, value in plain.items():
        parameter, buffer = norm._parameters.get(name), norm._buffers.get(name)
        if parameter is not None:
            fresh = torch.full_like(parameter.detach(), value)
            norm._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        if buffer is not None:
            norm._buffers[name] = torch.full_like(buffer, value)


def _power(rows: Tensor, p: float) -> Tensor:
    """Per row, sum of |x|^p in float64 (the largest |x| for p = inf)."""
    values = rows.detach().double().abs()
    if math.isinf(p):
        return values.amax(1)
    return values.pow(p).sum(1)


def _to_units(per_row: Tensor, unit_of: Tensor, size: int, p: float = 1) -> Tensor:
    """Collect one value per row into one per unit, by sum (by maximum for p = inf)."""
    out = torch.zeros(size, dtype=per_row.dtype, device=per_row.device)
    chosen = unit_of >= 0
    if math.isinf(p):
        return out.scatter_reduce(0, unit_of[chosen], per_row[chosen], "amax")
    return out.index_add(0, unit_of[chosen], per_row[chosen])


def _root(power: Tensor, p: float) -> Tensor:
    return power if math.isinf(p) else power.pow(1 / p)


def _join(parts: list[Tensor], p: float) -> Tensor:
    stacked = torch.stack(parts)
    return stacked.amax(0) if math.isinf(p) else stacked.sum(0)


def _weight_norms(group: UnitGroup, rows: list[_Row], p: float) -> tuple[list[Tensor], list[Tensor]]:
    norms, covered = [], []
    for number in range(len(group.producers)):
        mine = [r for r in rows if r.producer == number]
        parts = [_to_units(_power(r.layout.rows(r.base), p), r.unit_of, group.size, p) for r in mine]
        norms.append(_root(_join(parts, p), p))
        ones = [_to_units(torch.ones_like(r.unit_of, dtype=torch.float64), r.unit_of, group.size) for r in mine]
        covered.append(torch.stack(ones).sum(0) > 0)
    return norms, covered


def _measure_weights(group: UnitGroup, rows: list[_Row], options: ScoringOptions) -> list[_LayerStats]:
    norms, covered = _weight_norms(group, rows, options.degree)
    zeros = [torch.zeros(1, group.size, dtype=n.dtype, device=n.device) for n in norms]
    return [_LayerStats(n, c, z, z) for n, c, z in zip(norms, covered, zeros, strict=True)]


class _Walker:
    """One batch, walked down the path."""

    def __init__(
        self,
        model: nn.Module,
        group: UnitGroup,
        rows: list[_Row],
        options: ScoringOptions,
        path: DecayPath,
        index: int,
        inputs: Any,
        targets: Any,
    ) -> None:
        self.model, self.group, self.rows, self.options, self.path = model, group, rows, options, path
        self.index, self.inputs, self.targets = index, inputs, targets
        self.objective: Objective = get_objective(options.objective)
        self.device = model_device(model)
        self.loss_scale = 2.0**14 if options.amp == "fp16" else 1.0
        self.norms, self.covered = _weight_norms(group, rows, options.degree)

    def layer_path(self, prefix: PrefixCache) -> list[_LayerStats]:
        """All units of the group decay together: one pass per node."""
        grads: list[list[Tensor]] = [[] for _ in self.group.producers]
        inner: list[list[Tensor]] = [[] for _ in self.group.producers]
        for scale in self.path.scales.tolist():
            for number, (norm, dot) in enumerate(self._decayed(scale)):
                grads[number].append(norm)
                inner[number].append(dot)
            prefix.seal()
        return self._stats(grads, inner)

    def _decayed(self, scale: float, unit: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """With all units (or one alone) at ``scale``: per producer the gradient norms and inner products [N]."""
        p, size = self.options.degree, self.group.size
        leaves = [cast(Tensor, row.owner._parameters[row.attr]) for row in self.rows]
        with torch.no_grad():
            for row, leaf in zip(self.rows, leaves, strict=True):
                leaf.copy_(row.scaled(scale, unit))
        found = self._gradients(leaves, scale)
        result = []
        for number in range(len(self.group.producers)):
            mine = [(r, leaf, g) for r, leaf, g in zip(self.rows, leaves, found, strict=True) if r.producer == number]
            powers = [_to_units(_power(r.layout.rows(g), p), r.unit_of, size, p) for r, _, g in mine]
            dots = [
                _to_units((r.layout.rows(leaf).double() * r.layout.rows(g).double()).sum(1), r.unit_of, size)
                for r, leaf, g in mine
            ]
            result.append((_root(_join(powers, p), p), torch.stack(dots).sum(0).detach()))
        return result

    def neuron_path(self, prefix: PrefixCache) -> list[_LayerStats]:
        """Each unit decays alone (Eq. 4); units are evaluated in batches with ``torch.func.vmap``."""
        if self.options.unit_batch == 1:
            return self._unit_by_unit(prefix)
        prefix.cancel()  # within a batch of units, what is in front is computed once anyway
        names = {module: name for name, module in self.model.named_modules()}
        keys = [f"{names[r.owner]}.{r.attr}".lstrip(".") for r in self.rows]
        grads: list[list[Tensor]] = [[] for _ in self.group.producers]
        inner: list[list[Tensor]] = [[] for _ in self.group.producers]
        for scale in self.path.scales.tolist():
            while True:
                norms, dots, values = self._units_at(scale, keys)
                if not bool(torch.isfinite(values).all()):
                    raise self._not_finite("F", scale)
                if all(bool(torch.isfinite(g).all()) for g in norms):
                    break
                self._lower_loss_scale(scale)
            for number, (norm, dot) in enumerate(zip(norms, dots, strict=True)):
                grads[number].append(norm)
                inner[number].append(dot)
        return self._stats(grads, inner)

    def _unit_by_unit(self, prefix: PrefixCache) -> list[_LayerStats]:
        """The neuron path without ``torch.func``, for models that it cannot follow."""
        grads: list[list[Tensor]] = [[] for _ in self.group.producers]
        inner: list[list[Tensor]] = [[] for _ in self.group.producers]
        units = torch.arange(self.group.size, device=self.device)
        for scale in self.path.scales.tolist():
            found = []
            for unit in units:
                found.append(self._decayed(scale, unit))
                prefix.seal()
            for number in range(len(self.group.producers)):
                grads[number].append(torch.stack([layers[number][0][n] for n, layers in enumerate(found)]))
                inner[number].append(torch.stack([layers[number][1][n] for n, layers in enumerate(found)]))
        return self._stats(grads, inner)

    def _units_at(self, scale: float, keys: list[str]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """With each unit alone at ``scale``: per producer the gradient norms and inner products [N], and F [N]."""
        p, producers = self.options.degree, len(self.group.producers)

        def one_unit(unit: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
            tensors = {key: row.scaled(scale, unit) for key, row in zip(keys, self.rows, strict=True)}

            def evaluate(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                value = self._value(lambda *a, **k: torch.func.functional_call(self.model, weights, a, k))
                if not value.requires_grad:
                    raise self._detached()
                return value * self.loss_scale, value

            found, value = torch.func.grad(evaluate, has_aux=True)(tensors)
            powers: list[list[Tensor]] = [[] for _ in range(producers)]
            dots: list[list[Tensor]] = [[] for _ in range(producers)]
            for key, row in zip(keys, self.rows, strict=True):
                own = (row.unit_of == unit).double()
                grad_rows = row.layout.rows(found[key]).double() / self.loss_scale
                power = grad_rows.abs().amax(1) if math.isinf(p) else grad_rows.abs().pow(p).sum(1)
                powers[row.producer].append((power * own).amax() if math.isinf(p) else (power * own).sum())
                dots[row.producer].append(((row.layout.rows(tensors[key]).double() * grad_rows).sum(1) * own).sum())
            return [_join(x, p) for x in powers], [torch.stack(x).sum(0) for x in dots], value

        chunk = min(self.options.unit_batch, self.group.size)
        units = torch.arange(self.group.size, device=self.device)
        try:
            powers, dots, values = torch.func.vmap(one_unit, chunk_size=chunk, randomness="same")(units)
        except (SingeError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise ScoringError(
                f"group {self.group.name!r}: the model's forward cannot be evaluated for several units at once "
                f"with torch.func.vmap ({type(error).__name__}: {error}); use unit_batch=1 or path='layer'"
            ) from error
        return [_root(x.detach(), p) for x in powers], [x.detach() for x in dots], values.detach()

    def _stats(self, grads: list[list[Tensor]], inner: list[list[Tensor]]) -> list[_LayerStats]:
        return [
            _LayerStats(n, c, torch.stack(g), torch.stack(d))
            for n, c, g, d in zip(self.norms, self.covered, grads, inner, strict=True)
        ]

    def _value(self, call: Any) -> Tensor:
        """F on this batch, as a scalar."""
        amp = self.options.amp
        context = torch.autocast(self.device.type, dtype=_AMP[amp]) if amp else nullcontext()
        with context:
            value = self.objective(_call(call, self.inputs), self.targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ScoringError(
                f"the objective must return one number (a scalar tensor), got {shape}; reduce it, e.g. with .mean()"
            )
        return value.reshape(())

    def _gradients(self, leaves: list[Tensor], scale: float) -> list[Tensor]:
        while True:
            try:
                value = self._value(self.model)
            except (SingeError, torch.cuda.OutOfMemoryError):
                raise
            except Exception as error:
                raise self._failed(error) from error
            if not bool(torch.isfinite(value)):
                raise self._not_finite("F", scale)
            if not value.requires_grad:
                raise self._detached()
            found = torch.autograd.grad(value * self.loss_scale, leaves, allow_unused=True)
            grads = [
                torch.zeros_like(leaf) if g is None else g / self.loss_scale
                for leaf, g in zip(leaves, found, strict=True)
            ]
            if all(bool(torch.isfinite(g).all()) for g in grads):
                return grads
            self._lower_loss_scale(scale)

    def _lower_loss_scale(self, scale: float) -> None:
        """A gradient overflowed: try again with a smaller loss scale, as long as there is one."""
        if self.loss_scale <= 1.0:
            raise self._not_finite("a gradient", scale)
        self.loss_scale /= 4.0

    def _failed(self, error: Exception) -> ScoringError:
        return ScoringError(
            f"group {self.group.name!r}: evaluating F on batch {self.index} (inputs {_describe(self.inputs)}) "
            f"failed with {type(error).__name__}: {error}"
        )

    def _detached(self) -> ScoringError:
        return ScoringError(
            f"group {self.group.name!r}: F does not depend on its weights through autograd (detached output, "
            "or torch.no_grad() inside the forward); it cannot be scored by gradients, use criterion='l2'"
        )

    def _not_finite(self, what: str, scale: float) -> ScoringError:
        return ScoringError(
            f"group {self.group.name!r}: {what} is not finite on batch {self.index} with the weights at {scale:.4g} of "
            "their size; check the batch for inf/NaN, or use amp='bf16' or no amp"
        )


def _call(call: Any, inputs: Any) -> Any:
    if isinstance(call, nn.Module):
        return call_model(call, inputs)
    if isinstance(inputs, dict):
        return call(**inputs)
    return call(*inputs) if isinstance(inputs, (tuple, list)) else call(inputs)


def _describe(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return str(tuple(inputs.shape))
    if isinstance(inputs, dict):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, (tuple, list)):
        return "(" + ", ".join(_describe(v) for v in inputs) + ")"
    return type(inputs).__name__
