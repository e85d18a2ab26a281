"""Make a masked model smaller: remove what is masked, if that leaves the function as it is.

NNI's own ``ModelSpeedup`` does not work on current PyTorch. This step takes the same arguments and follows the
dependency graph of :mod:`singe_plugin.axes`. A unit that a mask touches goes if nobody can miss it, whatever the values
of the parameters that are not masked (see :mod:`.silence`); then the smaller model has to compute what the masked one
does, in double precision, or the unit stays.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.architecture import Builder, Structure, describe_structure
from singe_plugin.axes import AxisGraph, Group, Snapshot, Trackers, remove_units
from singe_plugin.axes.algebra import contains
from singe_plugin.budget import count_macs, count_params
from singe_plugin.data import few
from singe_plugin.errors import ConfigError, GroupError
from singe_plugin.events import History, Removed
from singe_plugin.nested import to_device
from singe_plugin.result import LayerRow, Metrics, Result, package_versions
from singe_plugin.stale import remember_shapes
from singe_plugin.state import model_device, preserved, train_mode_of

from .holes import holes_of, masked_along, touched, with_units
from .masks import checked_masks, fold_masks
from .silence import Laboratory
from .trials import Trials, change_of

__all__ = ["ShrinkResult", "shrink", "shrink_with_report"]

_logger = logging.getLogger("singe_plugin")
_PACKAGES = ("singe_plugin", "torch", "nni", "timm")


@dataclass
class ShrinkResult(Result):
    """A :class:`~singe_plugin.Result` (save it with :func:`singe_plugin.save`), and what is still masked.

    Attributes:
        still_masked: group or layer -> how many of its masked units are still there, and why.
        masks: the masks of what is still masked, in the shapes of the smaller model, to train on with.
        difference: the largest change of the outputs against the masked model, relative to their size.
    """

    still_masked: dict[str, str] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    difference: float = 0.0

    def summary(self) -> str:
        """The before/after table, and what is still masked."""
        lines = [super().summary(), f"the outputs differ from the masked model's by {self.difference:.1e} (relative)"]
        return "\n".join([*lines, *(f"still masked: {name}: {why}" for name, why in self.still_masked.items())])


def shrink(
    model: nn.Module,
    masks: Any,
    dummy_input: Any,
    *,
    allow_constants: bool = False,
    allow_norms: bool = False,
    tolerance: float = 1e-6,
) -> nn.Module:
    """Remove every fully masked unit from a model, in place.

    Args:
        model: the model the masks were made for, unwrapped (``pruner.unwrap_model()``). Its train/eval mode stays.
        masks: what ``compress()`` of any NNI pruner returned, or the path of a file with them; not changed.
        dummy_input: a tensor, a tuple of arguments or a dict of keywords.
        allow_constants: also remove units that a masked model still passes a constant on of (a batch-norm that was not
            masked along makes one); the function changes by these constants.
        allow_norms: also remove units that a norm over channels (layer or group norm) sees as zeros in the masked model
            and not at all in the smaller one; the function changes by that.
        tolerance: how far the outputs may be from the masked model's, relative to their size.

    Returns:
        the model.

    Raises:
        ConfigError: for masks that do not fit the model.
        GroupError: if the model does not run on the input. The model is as it was, whatever is raised.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> keep = torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1])
        >>> shrink(net, {"0": {"weight": keep[:, None], "bias": keep}}, torch.randn(2, 4))[0]
        Linear(in_features=4, out_features=6, bias=True)
    """
    return shrink_with_report(
        model, masks, dummy_input, allow_constants=allow_constants, allow_norms=allow_norms, tolerance=tolerance
    ).model


def shrink_with_report(
    model: nn.Module,
    masks: Any,
    dummy_input: Any,
    *,
    allow_constants: bool = False,
    allow_norms: bool = False,
    tolerance: float = 1e-6,
    builder: Builder | None = None,
) -> ShrinkResult:
    """As :func:`shrink`, with a report, and ready for :func:`singe_plugin.save`.

    Args:
        model, masks, dummy_input, allow_constants, allow_norms, tolerance: see :func:`shrink`.
        builder: how to build the unpruned architecture, for saving; it can also be given to ``save``.

    Raises:
        ConfigError, GroupError: see :func:`shrink`.
    """
    if not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise ConfigError(f"tolerance={tolerance!r} is not a relative error; give a positive number")
    checked = checked_masks(model, masks)
    modes = train_mode_of(model)
    undo = Snapshot(model)
    try:
        shrinker = _Shrinker(model, checked, dummy_input, allow_constants, allow_norms, tolerance)
        return shrinker.run(builder)
    except BaseException:
        undo.restore()
        raise
    finally:
        for module, training in modes.items():
            module.training = training


class _Shrinker:
    """One model whose masks are in its weights."""

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]], dummy: Any, constants: bool, norms: bool,
        tolerance: float,
    ) -> None:  # fmt: skip
        self.model, self.allow_constants, self.allow_norms, self.tolerance = model, constants, norms, tolerance
        self.before = Structure.of(model)
        # of the values of all parameters
        self.graph, self.example = _traced(model, to_device(dummy, model_device(model)))
        fold_masks(model, masks)
        self.twin = _mask_twin(model, masks)
        self.trackers = Trackers(emas=[self.twin])
        self.lab = Laboratory(self.graph, self.example)
        self.still: dict[str, str] = {}
        self.history = History()
        self.made: list[Tensor] | None = self.lab.start  # what the model computes now, if that is known

    def run(self, builder: Builder | None) -> ShrinkResult:
        groups = list(self.graph.groups.values())
        sizes = {group: group.size for group in groups}
        metrics = self._metrics()
        start = self.lab.start
        if any(bool(t.isnan().any()) for t in start):
            raise GroupError("the masked model's outputs are NaN on dummy_input, so nothing can be compared with them")
        for secondary in (True, False):  # whole heads before their dimensions: both are groups, and overlap
            self._remove([g for g in groups if g.secondary == secondary])
        left = self._left_masks()
        self._explain(left)
        result = ShrinkResult(
            model=self.model,
            before=metrics,
            after=self._metrics(),
            layers=[LayerRow(g.name, g.name, sizes[g], g.size) for g in groups if not g.secondary or g.size < sizes[g]],
            left_whole=dict(self.graph.left_whole),
            history=self.history,
            options={
                "allow_constants": self.allow_constants, "allow_norms": self.allow_norms, "tolerance": self.tolerance,
            },
            versions=package_versions(_PACKAGES),
            builder=builder,
            structure=describe_structure(self.model, self.before, []),
            still_masked=self.still,
            masks=left,
            difference=change_of(start, self.lab.outputs() if self.made is None else self.made),
        )  # fmt: skip
        for line in result.summary().splitlines():
            _logger.info("%s", line)
        if self.still:
            _logger.warning("%d layers stay masked in part; see ShrinkResult.still_masked", len(self.still))
        return result

    def _metrics(self) -> Metrics:
        """Parameters, and MACs of one example (of all, if the model does not run on one)."""
        with preserved(self.model):
            self.model.requires_grad_(False)  # PyTorch's counter trips over views of parameters that want gradients
            try:
                macs = count_macs(self.model, few(self.example, 1))
            except (MemoryError, torch.cuda.OutOfMemoryError):
                raise
            except Exception:
                macs = count_macs(self.model, self.example)
        return Metrics(count_params(self.model), macs)

    # -- what can go ------------------------------------------------------------------------------------------------

    def _remove(self, groups: Sequence[Group]) -> None:
        """Remove the masked units of some groups that nobody can miss, if the outputs stay what they are."""
        holes = holes_of(self.model, self.twin)
        some, unwritten = touched(self.graph, holes)
        masked_units = {g: units for g, units in some.items() if g in groups and units.any()}
        if not masked_units:
            return
        certain = all(torch.equal(units, unwritten[g]) for g, units in masked_units.items())
        if certain:  # what is zero whatever the rest is, and passes zeros on
            loud = _both(masked_units, self.lab.loud(holes))
            certain = not any(bool(units.any()) for units in loud.values())
        silent = masked_units if certain else _both(masked_units, self.lab.silent(holes))
        constant = {g: units & ~silent[g] for g, units in masked_units.items()}
        loud = constant
        if any(bool(units.any()) for units in constant.values()):
            constant = _both(constant, self.lab.constant(holes))
            loud = _both(constant, self.lab.loud(holes))
        quiet = {g: units & ~loud[g] for g, units in constant.items()}
        zeroed = loud if self.allow_constants else {}
        closed = with_units(with_units(holes, quiet), zeroed)
        going = {g: silent[g] | (constant[g] if self.allow_constants else quiet[g]) for g in silent}
        if any(bool(units.any()) for units in constant.values()):
            going = _both(going, self.lab.silent(closed))
        if self.allow_norms:
            behind_norms = _both(masked_units, self.lab.silent(closed, norms=True))
            going = {g: units | behind_norms[g] for g, units in going.items()}
        for group, units in loud.items():
            if not self.allow_constants and bool((units & ~going[group]).any()):
                self._say(
                    group,
                    f"{int(units.sum())} masked units still pass a constant on (a norm or a bias behind them is not "
                    "masked); mask it along, or use allow_constants=True",
                )
        gone = {g: units.nonzero().flatten().tolist() for g, units in going.items()}
        for group, numbers in gone.items():
            if len(numbers) == group.size:
                self._say(group, "all its units are masked; the last one stays, so that the layer has one")
                numbers.pop()
        trials = Trials(self.lab, holes, closed, quiet, zeroed, self.tolerance)
        todo = {g: numbers for g, numbers in gone.items() if numbers}
        right, wrong = trials.sorted(todo)
        if self.allow_norms and wrong:
            more, wrong = trials.sorted({g: todo[g] for g in (*right, *(g for g, _ in wrong))}, right, rest=True)
            right += more
        for group, reason in wrong:
            hint = " (a norm over channels sees the masked ones as zeros; allow_norms=True accepts that)"
            mixed = not self.allow_norms and _mixes(self.graph, group)
            self._say(group, f"{len(gone[group])} masked units: {reason}{hint if mixed else ''}")
        done, made = trials.passed
        if right:
            known = not any(bool(units.any()) for units in zeroed.values())
            self.made = made if known and done == {g: gone[g] for g in right} else None
        for group in right:
            before = [(part.tensor, part.tensor.shape) for part in group.slices() if part.is_parameter]
            remove_units(self.graph, group, gone[group], self.trackers)
            remember_shapes(before)
            self.history.on_removed(Removed(group.name, tuple(gone[group]), group.size))

    def _say(self, group: Group, reason: str) -> None:
        told = self.still.get(group.name)
        self.still[group.name] = f"{told}; {reason}" if told else reason

    # -- what stays -------------------------------------------------------------------------------------------------

    def _left_masks(self) -> dict[str, dict[str, Tensor]]:
        """The masks that are still needed, in the shapes of the smaller model."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, module in self.twin.named_modules():
            for attr, mask in module._parameters.items():
                if mask is not None and bool((mask == 0).any()):
                    found.setdefault(name, {})[attr] = (mask.detach() != 0).float()
        return found

    def _explain(self, left: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Why layers have masks left, where no group has said so."""
        said = [group for name, group in self.graph.groups.items() if name in self.still]
        told = {part.owner for group in said for part in group.slices() if not part.reads}
        for name, targets in left.items():
            module = self.model.get_submodule(name)
            main = next((attr for attr in targets if "weight" in attr), next(iter(targets)))
            dim = int(bool(getattr(module, "transposed", False)) and main == "weight")
            mask = targets[main]
            rows = mask.movedim(dim, 0).flatten(1) if mask.ndim > 1 else mask[:, None]
            whole = int((rows == 0).all(1).sum())
            single = int((rows == 0).sum()) - whole * rows.shape[1]
            parts = []
            if whole and module not in told:
                reason = self.graph.left_whole.get(name) or self._not_masked(module)
                parts.append(f"{whole} of {len(rows)} {'units' if main == 'weight' else main} ({reason})")
            if single:
                parts.append(f"{single} single weights")
            if parts and name not in self.still:
                self.still[name] = " and ".join(parts)

    def _not_masked(self, module: nn.Module) -> str:
        """What else writes the masked units of a layer."""
        holes, found, known = holes_of(self.model, self.twin), dict[str, None](), False
        for group in self.graph.groups.values():
            parts = [p for p in group.slices() if p.is_parameter and not p.reads]
            mine = torch.zeros(group.size, dtype=torch.bool)
            known = known or any(part.owner is module for part in parts)
            for part in parts:
                if part.owner is module:
                    mine |= masked_along(part, holes, group.size)
            for part in parts:
                if bool((mine & ~masked_along(part, holes, group.size)).any()):
                    found[f"{self.graph.names[part.owner]}.{part.attr}".strip(".")] = None
        names = list(found)
        if not known:
            return f"the channels of {type(module).__name__} are not removed"
        if not names:
            return self.lab.trouble or "each is one with channels of other heads or groups, which are not masked along"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} not masked along"


def _both(some: Mapping[Group, Tensor], others: Mapping[Group, Tensor]) -> dict[Group, Tensor]:
    return {group: units & others[group] for group, units in some.items()}


def _mixes(graph: AxisGraph, group: Group) -> bool:
    """Whether an operator takes the units of a group together."""
    leaf = group.leaf.root()
    return any(contains(axis, leaf) for dims in graph.trace.mixing.values() for _, axis in dims)


def _traced(model: nn.Module, dummy: Any) -> tuple[AxisGraph, Any]:
    """The graph of a model, and the examples that it was made with: two of them, if the model runs on two."""
    example = few(dummy, 2)
    try:
        return AxisGraph(model, example), example
    except GroupError:
        return AxisGraph(model, dummy), dummy


def _mask_twin(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """A copy whose parameters are the masks: it is cut along, so that what is left of them fits the smaller model."""
    made = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor) and not v.is_leaf]
    twin = copy.deepcopy(model, {id(v): v.detach() for v in made})  # what a forward pass left: it cannot be copied
    for parameter in twin.parameters():
        parameter.data = torch.ones_like(parameter)
    fold_masks(twin, masks)
    return twin
