"""``tp.importance.SInGEImportance``: the criterion under torch-pruning's importance contract."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.axes.graph import AxisGraph
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.readers import costs_of_removal
from singe_plugin.method.batches import materialise
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_error, score_groups, score_units
from singe_plugin.method.units import UnitGroup
from singe_plugin.run.guards import check_alone

from .graph import BlockView, GroupView
from .groups import unit_group

__all__ = ["SInGEImportance"]


class SInGEImportance(tp.importance.Importance):  # type: ignore[misc]
    r"""Importance by integrating the gradient along the path that walks a unit's weights to zero.

    .. math::

        C_{IG^p}(n)=\sum_{s=0}^{S}\|\mu^sW^n\|_p\,\|\nabla_{\mu^sW^n}F(X)\|_p\qquad\text{(Eq. 5)}

    :math:`W^n` is every row that produces unit n in the group, bias included, batch-norm folded in. Works wherever
    torch-pruning takes an importance; needs data, which :meth:`bind` gives it.

    Its keywords are the fields of :class:`~singe_plugin.Scoring`, also by position; what is None is what Algorithm 1
    takes. A pruner's fine-tuning minimises its objective, too.

    Raises:
        ConfigError: at construction, for a value that cannot mean anything.

    Example:
        >>> import torch, torch_pruning as tp, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = (torch.randn(16, 4), torch.randint(0, 2, (16,)))
        >>> imp = tp.importance.SInGEImportance(mu=0.9).bind(net, [batch])
        >>> graph = tp.DependencyGraph().build_dependency(net, batch[0])
        >>> imp(graph.get_pruning_group(net[0], tp.prune_linear_out_channels, list(range(8)))).shape
        torch.Size([8])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        scoring = Scoring(*args, **kwargs)
        self.scoring = replace(scoring, criterion=scoring.rule.name)
        self.model: nn.Module | None = None
        self.batches: Iterable[Any] | None = None

    def bind(self, model: nn.Module, batches: Iterable[Any]) -> SInGEImportance:
        """Give the importance the model and the data that F is evaluated on; returns itself.

        Args:
            model: the model whose groups will be scored.
            batches: an iterable of ``(inputs, targets)`` or mappings with targets; all of it is read at every
                scoring, so pass a few batches (the paper uses one of 64 images), not an epoch. A one-shot iterator
                is kept as a list.

        Raises:
            ConfigError: if ``model`` is not a module.
            DataError: if ``batches`` is not an iterable of batches, or is empty.
        """
        check_alone()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"bind(model, batches) needs a torch.nn.Module, got {type(model).__name__}")
        usable = materialise(batches)
        if isinstance(usable, Sized) and len(usable) == 0:
            raise DataError("batches is empty: scoring needs at least one batch of (inputs, targets)")
        self.model, self.batches = model, usable
        return self

    def __call__(self, group: Any, **_: Any) -> Tensor:
        """Score the channels of a group's root, one number per index, larger is more important.

        The group is not changed. Scores are on the model's device.

        Raises:
            DataError: if data is needed and none is bound.
        """
        scores = self.score_units(group, None)
        return group.per_channel(scores) if isinstance(group, GroupView) else scores

    def score_units(self, group: Any, units: Sequence[Sequence[int]] | None) -> Tensor:
        """Score sets of root channels as one unit each (the aligned channels of a grouped convolution).

        Args:
            group: a torch-pruning group.
            units: positions into the root's indices; None makes every root channel its own unit.
        """
        check_alone()
        options = self.scoring
        if isinstance(group, GroupView) and group.axis_group.only_training:
            options = replace(options, criterion="l2")  # F does not depend on an auxiliary head
        if options.rule.of_readers and isinstance(group, GroupView):
            return self.score_groups({group.axis_group.name: group})[group.axis_group.name]
        with torch.no_grad():
            return score_units(self._model_of(group), self._rows(group, units), self.batches, options)

    def score_groups(self, groups: Mapping[str, GroupView]) -> dict[str, Tensor]:
        """Score the units of several groups at once: what they have in common is done once."""
        options = self.scoring
        training = {name: group for name, group in groups.items() if group.axis_group.only_training}
        rest = {name: group for name, group in groups.items() if name not in training}
        found = {name: self.score_units(group, None) for name, group in training.items()}
        if not rest:
            return found
        check_alone()
        model = self._model_of(next(iter(rest.values())))
        if options.rule.of_readers:
            if self.batches is None:
                raise DataError(
                    f"criterion {options.criterion!r} needs data: call importance.bind(model, batches), or give "
                    "SInGEPruner(batches=...)"
                )
            graph = next(iter(rest.values())).axis_group.axes
            assert isinstance(graph, AxisGraph)
            blocks = {name: group.unit_group() for name, group in rest.items() if isinstance(group, BlockView)}
            own = {name: group.axis_group.name for name, group in rest.items() if name not in blocks}
            scores = costs_of_removal(graph, list(own.values()), self.batches, options, blocks=blocks)
            found |= {name: scores[own.get(name, name)] for name in rest}
        else:
            with torch.no_grad():
                found |= score_groups(
                    model, {name: group.unit_group() for name, group in rest.items()}, self.batches, options
                )
        return {name: found[name] for name in groups}

    @staticmethod
    def _rows(group: Any, units: Sequence[Sequence[int]] | None) -> UnitGroup:
        return group.unit_group() if isinstance(group, GroupView) else unit_group(group, units)

    def error(self, group: Any) -> tuple[Tensor, Tensor]:
        """Scores before the normaliser, and an estimate of their quadrature error (about three times the cost)."""
        if self.batches is None and self.scoring.rule.needs_gradient:
            raise DataError("the quadrature error needs data; call importance.bind(model, batches) first")
        return score_error(self._model_of(group), self._rows(group, None), self.batches or [], self.scoring)

    def _model_of(self, group: Any) -> nn.Module:
        model: nn.Module = group._DG.model
        if self.model is not None and self.model is not model:
            raise ConfigError(
                "the importance is bound to another model than the one this group belongs to; call "
                "importance.bind(model, batches) with the model that is pruned"
            )
        return model

    def __repr__(self) -> str:
        given = {k: v for k, v in vars(self.scoring).items() if v != getattr(Scoring, k)}
        return f"SInGEImportance({', '.join(f'{k}={v!r}' for k, v in given.items())})"


SInGEImportance.__signature__ = inspect.signature(Scoring)
