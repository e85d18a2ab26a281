"""One batch, walked down the path: F and its gradients with the weights of a group at each scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ScoringError, SingeError
from singe_plugin.method.decay import Measured, Row, inner_products, join, root, unit_norms
from singe_plugin.method.evaluation import all_finite, detached, evaluate, evaluation_failed
from singe_plugin.method.options import Scoring
from singe_plugin.method.path import DecayPath
from singe_plugin.method.prefix import PrefixCache
from singe_plugin.method.timeline import Prefix
from singe_plugin.method.units import UnitGroup
from singe_plugin.nested import call_model
from singe_plugin.state import model_device

__all__ = ["Walker"]


class Walker:
    """One batch, walked down the path.

    Args:
        model, group, rows, options, path: see :mod:`singe_plugin.method.scoring`.
        index: the number of the batch, for messages.
        inputs, targets: the batch.
        norms, inner: whether the gradients' norms and the inner products are wanted; if not, they are zeros along
            ``path="layer"``.
    """

    def __init__(
        self,
        model: nn.Module,
        group: UnitGroup,
        rows: list[Row],
        options: Scoring,
        path: DecayPath,
        index: int,
        inputs: Any,
        targets: Any,
        norms: bool = True,
        inner: bool = True,
    ) -> None:
        self.model, self.group, self.rows, self.options, self.path = model, group, rows, options, path
        self.index, self.inputs, self.targets = index, inputs, targets
        self.norms, self.inner = norms, inner
        self.who = f"group {group.name!r}"
        self.device = model_device(model)
        self.loss_scale = 2.0**14 if options.amp == "fp16" else 1.0

    def nodes(self, prefix: PrefixCache | Prefix | None) -> Iterator[Measured]:
        """Yield what is measured at every node of the path, in order: nothing of earlier nodes is kept."""
        return self._layer_path(prefix) if self.options.path == "layer" else self._neuron_path(prefix)

    def _layer_path(self, prefix: PrefixCache | Prefix | None) -> Iterator[Measured]:
        """Let all units of the group decay together, with one pass per node."""
        for scale in self.path.scales.tolist():
            yield self._decayed(scale)
            if prefix is not None:
                prefix.seal()

    def _decayed(self, scale: float, unit: Tensor | None = None) -> Measured:
        """Measure gradient norms and inner products [N] per producer, with all units (or one alone) at ``scale``."""
        leaves = self._scaled_leaves(scale, unit)
        return self._norms(leaves, self._gradients(leaves, scale))

    def _norms(self, leaves: list[Tensor], found: list[Tensor]) -> Measured:
        """Gradient norms and inner products [N] per producer, of gradients."""
        p, size = self.options.degree, self.group.size
        result = []
        for number in range(len(self.group.producers)):
            mine = [(r, leaf, g) for r, leaf, g in zip(self.rows, leaves, found, strict=True) if r.producer == number]
            none = torch.zeros((), dtype=torch.float64, device=self.device).expand(size)
            norms = unit_norms([(r, g) for r, _, g in mine], size, p) if self.norms else none
            dots = inner_products(mine, size) if self.inner else none
            result.append((norms, dots))
        return result

    def _scaled_leaves(self, scale: float, unit: Tensor | None) -> list[Tensor]:
        """Write the parameters of the group in the model for this place of the path, and return them."""
        return [row.write(scale, unit) for row in self.rows]

    def moves(self) -> bool:
        """Whether the gradient at the start of the path is anything but zero."""
        return any(bool(gradient.any()) for gradient in self._gradients(self._scaled_leaves(1.0, None), 1.0))

    def value_at(self, scale: float, unit: Tensor | None = None) -> Tensor:
        """Compute F with all units (or one alone) at ``scale``, without a gradient."""
        self._scaled_leaves(scale, unit)
        with torch.no_grad():
            return self._value(self.model)

    def _neuron_path(self, prefix: PrefixCache | Prefix | None) -> Iterator[Measured]:
        """Let each unit decay alone (Eq. 4); units are evaluated in batches with ``torch.func.vmap``."""
        if self.options.unit_batch == 1:
            yield from self._unit_by_unit(prefix)
            return
        if prefix is not None:
            prefix.cancel()  # within a batch of units, what is in front is computed once anyway
        names = {module: name for name, module in self.model.named_modules()}
        keys = [f"{names[r.owner]}.{r.attr}".lstrip(".") for r in self.rows]
        for scale in self.path.scales.tolist():
            while True:
                norms, dots, values = self._units_at(scale, keys)
                if not bool(torch.isfinite(values).all()):
                    raise self._not_finite("F", scale)
                if all(bool(torch.isfinite(g).all()) for g in norms):
                    break
                self._lower_loss_scale(scale)
            yield list(zip(norms, dots, strict=True))

    def _unit_by_unit(self, prefix: PrefixCache | Prefix | None) -> Iterator[Measured]:
        """Walk the neuron path without ``torch.func``, for models that it cannot follow."""
        units = torch.arange(self.group.size, device=self.device)
        for scale in self.path.scales.tolist():
            found = []
            for unit in units:
                found.append(self._decayed(scale, unit))
                if prefix is not None:
                    prefix.seal()
            yield [
                (
                    torch.stack([layers[number][0][n] for n, layers in enumerate(found)]),
                    torch.stack([layers[number][1][n] for n, layers in enumerate(found)]),
                )
                for number in range(len(self.group.producers))
            ]

    def _units_at(self, scale: float, keys: list[str]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Measure gradient norms and inner products [N] per producer, and F [N], with each unit alone at ``scale``."""
        p, producers = self.options.degree, len(self.group.producers)

        def one_unit(unit: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
            tensors = {key: row.scaled(scale, unit) for key, row in zip(keys, self.rows, strict=True)}

            def evaluate(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                value = self._value(lambda *a, **k: torch.func.functional_call(self.model, weights, a, k))
                if not value.requires_grad:
                    raise detached(self.who)
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
            return [join(x, p) for x in powers], [torch.stack(x).sum(0) for x in dots], value

        chunk = min(self.options.unit_batch, self.group.size)
        units = torch.arange(self.group.size, device=self.device)
        try:
            powers, dots, values = torch.func.vmap(one_unit, chunk_size=chunk, randomness="same")(units)
        except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            raise ScoringError(
                f"group {self.group.name!r}: the model's forward cannot be evaluated for several units at once "
                f"with torch.func.vmap ({type(error).__name__}: {error}); use unit_batch=1 or path='layer'"
            ) from error
        return [root(x.detach(), p) for x in powers], [x.detach() for x in dots], values.detach()

    def _value(self, call: Any) -> Tensor:
        """Compute F on this batch, as a scalar."""
        return evaluate(lambda: call_model(call, self.inputs), self.targets, self.options, self.device)

    @staticmethod
    def together(walkers: Sequence[Walker]) -> list[Measured]:
        """Measure what :meth:`nodes` yields first of several groups, whose weights all are where the path begins.

        One pass gives all their gradients, at u = 1.
        """
        leaves = [walker._scaled_leaves(1.0, None) for walker in walkers]
        first = copy(walkers[0])
        if len(walkers) > 1:
            first.who = f"{first.who} and {len(walkers) - 1} more"
        found = iter(first._gradients([leaf for mine in leaves for leaf in mine], 1.0))
        return [w._norms(mine, [next(found) for _ in mine]) for w, mine in zip(walkers, leaves, strict=True)]

    def _gradients(self, leaves: list[Tensor], scale: float) -> list[Tensor]:
        while True:
            try:
                value = self._value(self.model)
                if not bool(torch.isfinite(value)):
                    raise self._not_finite("F", scale)
                if not value.requires_grad:
                    raise detached(self.who)
                found = torch.autograd.grad(value * self.loss_scale, leaves, allow_unused=True)
            except (SingeError, MemoryError, torch.cuda.OutOfMemoryError):
                raise
            except Exception as error:
                raise evaluation_failed(self.who, self.index, self.inputs, error) from error
            unscaled = [g if g is None or self.loss_scale == 1.0 else g / self.loss_scale for g in found]
            grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, unscaled, strict=True)]
            if all_finite(grads):
                return grads
            self._lower_loss_scale(scale)

    def _lower_loss_scale(self, scale: float) -> None:
        """Answer an overflow of a gradient: try again with a smaller loss scale, as long as there is one."""
        if self.loss_scale <= 1.0:
            raise self._not_finite("a gradient", scale)
        self.loss_scale /= 4.0

    def _not_finite(self, what: str, scale: float) -> ScoringError:
        return ScoringError(
            f"{self.who}: {what} is not finite on batch {self.index} with the weights at {scale:.4g} of "
            "their size; check the batch for inf/NaN, or use amp='bf16' or no amp"
        )
