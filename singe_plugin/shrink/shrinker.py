"""Make a masked model smaller: remove what is masked, if that leaves the function as it is.

A unit that a mask touches goes if nobody can miss it, whatever the values of the parameters that are not masked (see
:mod:`.silence`); then the smaller model has to compute what the masked one does, in double precision, or the unit
stays. What belongs to a unit is what the dependency graph of :mod:`singe_plugin.axes` says.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Group, Snapshot, Trackers, remove_units
from singe_plugin.axes.algebra import contains
from singe_plugin.checks import is_number
from singe_plugin.errors import ConfigError, GroupError, is_of_the_machine
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.loop.events import History, Removed
from singe_plugin.masks import mask_module
from singe_plugin.nested import to_device
from singe_plugin.run.architecture import Builder, Structure, describe_structure, remember_origin
from singe_plugin.run.data import few
from singe_plugin.run.inputs import describe_inputs
from singe_plugin.run.result import GroupRow, Metrics, package_versions
from singe_plugin.stale import remember_shapes
from singe_plugin.state import model_device, preserved, train_mode_of

from .holes import any_unit, holes_of, touched, with_units
from .laboratory import Laboratory
from .masks import Masks, apply_masks, checked_masks, is_flat, mask_twin, read_masks, take_masks
from .report import ShrinkResult, explain_rest, masks_left
from .silence import find_constant, find_loud, find_silent
from .trials import Trials, change_of

__all__ = ["shrink", "shrink_with_report"]

_logger = logging.getLogger("singe_plugin")
_PACKAGES = ("singe_plugin", "torch", "nni", "timm")


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
        model: the model that the masks were made for. Masks that it holds itself (those of
            :func:`~singe_plugin.hold_masks`, ``UnstructuredPruner`` or ``torch.nn.utils.prune``) are folded into its
            weights, so that its layers are plain ones afterwards. NNI's wrappers have to be taken off before
            (``pruner.unwrap_model()``). Its train/eval mode stays.
        masks: where the model is masked, beyond the masks that it holds; not changed. Either parameter name -> bool or
            0/1 tensor (``result.weight_masks`` of :func:`~singe_plugin.prune_weights`), or module -> parameter ->
            tensor (what ``compress()`` of any NNI pruner returned), or the path of a file with one of them
            (``torch.save``'s, or the ``masks.safetensors`` of a saved result). None goes by what the model holds.
        dummy_input: a tensor, a tuple of arguments or a dict of keywords.
        allow_constants: also remove units of which the masked model still passes a constant on (a bias or a batch-norm
            that was not masked along makes one); the function changes by these constants.
        allow_norms: also remove units that a norm over channels (layer or group norm) sees as zeros in the masked model
            and not at all in the smaller one; the function changes by that.
        tolerance: how far the outputs may be from the masked model's, relative to their size.

    Returns:
        the model.

    Raises:
        ConfigError: for masks that do not fit the model, and if there are none.
        GroupError: if the model does not run on the input. The model is as it was, whatever is raised.

    Example:
        >>> import singe_plugin
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> result = singe_plugin.prune_weights(net, batches, sparsity=0.7, finetune=2)
        >>> expected = net(batches[0][0])  # with most weights at zero
        >>> net = shrink(net, result.weight_masks, batches[0][0])
        >>> net[0].out_features < 8, torch.allclose(net(batches[0][0]), expected, atol=1e-6)
        (True, True)

        NNI's masks:

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
    """Shrink a model as :func:`shrink` does, with a report that is ready for :func:`singe_plugin.save`.

    Args:
        model, masks, dummy_input, allow_constants, allow_norms, tolerance: see :func:`shrink`.
        builder: how to build the unpruned architecture, for saving; it can also be given to ``save``.

    Raises:
        ConfigError, GroupError: see :func:`shrink`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (is_number(tolerance) and tolerance > 0):
        raise ConfigError(f"tolerance={tolerance!r} is not a relative error; give a positive number")
    if isinstance(masks, (str, Path)):
        masks = read_masks(masks)
    modes = train_mode_of(model)
    undo = Snapshot(model, values=any(mask_module(m) is not None for m in model.modules()))
    try:
        held = take_masks(model)
        if masks is None and not held:
            raise ConfigError(
                f"masks=None goes by the masks that the model holds, and this {type(model).__name__} holds none; give "
                "them ({parameter name: tensor}), or put them on with singe_plugin.hold_masks(model, masks)"
            )
        checked = checked_masks(model, held, {} if masks is None else masks)
        result = _Shrinker(model, checked, dummy_input, allow_constants, allow_norms, tolerance).run(builder)
        if held or is_flat(masks):
            weights = {name: own["weight"].bool() for name, own in result.masks.items() if "weight" in own}
            result.weight_masks = {f"{name}.weight".lstrip("."): mask for name, mask in weights.items()}
        return result
    except BaseException:
        undo.restore()
        raise
    finally:
        for module, training in modes.items():
            module.training = training


class _Shrinker:
    """Shrinks one model, whose masks are in its weights."""

    def __init__(
        self, model: nn.Module, masks: Masks, dummy: Any, constants: bool, norms: bool, tolerance: float
    ) -> None:
        self.model, self.allow_constants, self.allow_norms, self.tolerance = model, constants, norms, tolerance
        self.before = Structure.of(model)
        self.graph, self.example = _traced(model, to_device(dummy, model_device(model)))
        apply_masks(model, masks)
        self.twin = mask_twin(model, masks)
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
        left = masks_left(self.twin)
        self.still |= explain_rest(self.graph, self.twin, left, self.still, self.lab.trouble)
        result = ShrinkResult(
            model=self.model,
            before=metrics,
            after=self._metrics(),
            layers=[GroupRow(g.name, g.name, sizes[g], g.size) for g in groups if not g.secondary or g.size < sizes[g]],
            left_whole=dict(self.graph.left_whole),
            history=self.history,
            options={
                "allow_constants": self.allow_constants, "allow_norms": self.allow_norms, "tolerance": self.tolerance,
            },
            versions=package_versions(_PACKAGES),
            builder=builder,
            structure=describe_structure(self.model, self.before, []),
            inputs=describe_inputs(self.example),
            still_masked=self.still,
            masks=left,
            difference=change_of(start, self.lab.outputs() if self.made is None else self.made),
        )  # fmt: skip
        remember_origin(self.model, builder, result.structure)
        for line in result.summary().splitlines():
            _logger.info("%s", line)
        if self.still:
            _logger.warning("%d layers stay masked in part; see ShrinkResult.still_masked", len(self.still))
        return result

    def _metrics(self) -> Metrics:
        """Count parameters, and the MACs of one example (of all, if the model does not run on one)."""
        with preserved(self.model):
            self.model.requires_grad_(False)  # PyTorch's counter trips over views of parameters that want gradients
            try:
                macs = count_macs(self.model, few(self.example, 1))
            except Exception as error:
                if is_of_the_machine(error):
                    raise
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
            loud = _both(masked_units, find_loud(self.lab, holes))
            certain = not any_unit(loud)
        silent = masked_units if certain else _both(masked_units, find_silent(self.lab, holes))
        constant = {g: units & ~silent[g] for g, units in masked_units.items()}
        loud = constant
        if any_unit(constant):
            constant = _both(constant, find_constant(self.lab, holes))
            loud = _both(constant, find_loud(self.lab, holes))
        quiet = {g: units & ~loud[g] for g, units in constant.items()}
        zeroed = loud if self.allow_constants else {}
        closed = with_units(with_units(holes, quiet), zeroed)
        going = {g: silent[g] | (constant[g] if self.allow_constants else quiet[g]) for g in silent}
        if any_unit(constant):
            going = _both(going, find_silent(self.lab, closed))
        if self.allow_norms:
            behind_norms = _both(masked_units, find_silent(self.lab, closed, norms=True))
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
        for group, most in self.graph.allowed({g: len(numbers) for g, numbers in gone.items()}).items():
            if most < len(gone[group]):
                self._say(group, f"{len(gone[group]) - most} of its masked units stay: the model compares widths")
                del gone[group][most:]
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
            known = not any_unit(zeroed)
            self.made = made if known and done == {g: gone[g] for g in right} else None
        for group in right:
            before = [(part.tensor, part.tensor.shape) for part in group.slices() if part.is_parameter]
            remove_units(self.graph, group, gone[group], self.trackers, settled=True)
            remember_shapes(before)
            self.history.on_removed(Removed(group.name, tuple(gone[group]), group.size))

    def _say(self, group: Group, reason: str) -> None:
        told = self.still.get(group.name)
        self.still[group.name] = f"{told}; {reason}" if told else reason


def _both(some: Mapping[Group, Tensor], others: Mapping[Group, Tensor]) -> dict[Group, Tensor]:
    return {group: units & others[group] for group, units in some.items()}


def _mixes(graph: AxisGraph, group: Group) -> bool:
    """Say whether an operator takes the units of a group together."""
    leaf = group.leaf.root()
    return any(contains(axis, leaf) for dims in graph.trace.mixing.values() for _, axis in dims)


def _traced(model: nn.Module, dummy: Any) -> tuple[AxisGraph, Any]:
    """Return the graph of a model, and the examples that it was made with: two, if the model runs on two."""
    example = few(dummy, 2)
    try:
        return AxisGraph(model, example), example
    except GroupError:
        return AxisGraph(model, dummy), dummy
