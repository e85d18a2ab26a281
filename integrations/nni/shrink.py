"""Make a masked model smaller: remove what is masked, if that leaves the function as it is.

NNI's own ``ModelSpeedup`` does not work on current PyTorch. This step takes the same arguments and follows the
dependency graph of :mod:`singe_plugin.axes`. What it removes is decided by the masked model itself: a unit goes if it
is silent (what writes it is masked, and what reads it sees zeros) or if nobody reads it; then the smaller model has to
compute what the masked one does, in double precision, or the removal is undone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.artifact import Builder, Structure, describe_structure
from singe_plugin.axes import AxisGraph, Group, Snapshot, Trackers, remove_units
from singe_plugin.axes.algebra import labels
from singe_plugin.axes.oracles import relative_change, sorted_out
from singe_plugin.axes.substitutes import NormsOfTheRest, double_inputs, in_double, masked, random_inputs
from singe_plugin.budget import count_macs, count_params
from singe_plugin.errors import ConfigError, GroupError, SingeError
from singe_plugin.events import History, Removed
from singe_plugin.folding import is_batchnorm
from singe_plugin.objective import tensors_in
from singe_plugin.result import LayerRow, Metrics, Result, package_versions
from singe_plugin.state import caches_preserved, preserved, train_mode_of
from singe_plugin.units import Producer

from .masks import checked_masks, fold_masks

__all__ = ["ShrinkResult", "shrink", "shrink_with_report"]

_logger = logging.getLogger("singe_plugin")
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
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
        fold_masks(model, checked)
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
        self.model, self.masks, self.constants, self.norms, self.tolerance = model, masks, constants, norms, tolerance
        self.dummy = dummy
        self.before = Structure.of(model)
        self.graph = AxisGraph(model, _few(dummy, 1))
        self.inputs = _with_noise(_few(dummy, 1))
        self.twin = _mask_twin(model, masks)
        self.trackers = Trackers(emas=[self.twin])
        self.still: dict[str, str] = {}
        self.history = History()

    def run(self, builder: Builder | None) -> ShrinkResult:
        metrics = Metrics(count_params(self.model), count_macs(self.model, _few(self.dummy, 1)))
        sizes = {name: group.size for name, group in self.graph.groups.items()}
        with self._silence() as loudness:
            start = self._outputs()
        constants, gone = self._find(loudness)
        expected = self._without(constants, start)
        # whole heads before their dimensions: both are groups, and overlap
        for secondary in (True, False):
            todo = {g: u for g, u in gone.items() if g.secondary == secondary and u}
            if todo:
                self._remove(todo, expected)
                if secondary:
                    _, gone = self._find(loudness)
        difference = relative_change(start, self._outputs())
        after = Metrics(count_params(self.model), count_macs(self.model, _few(self.dummy, 1)))
        left = self._left_masks()
        self._explain(left)
        result = ShrinkResult(
            model=self.model,
            before=metrics,
            after=after,
            layers=[LayerRow(n, n, sizes[n], g.size) for n, g in self.graph.groups.items() if not g.secondary],
            left_whole=dict(self.graph.left_whole),
            history=self.history,
            options={"allow_constants": self.constants, "allow_norms": self.norms, "tolerance": self.tolerance},
            versions=package_versions(_PACKAGES),
            builder=builder,
            structure=describe_structure(self.model, self.before, []),
            still_masked=self.still,
            masks=left,
            difference=difference,
        )
        for line in result.summary().splitlines():
            _logger.info("%s", line)
        if self.still:
            _logger.warning("%d layers stay masked in part; see ShrinkResult.still_masked", len(self.still))
        return result

    # -- running ----------------------------------------------------------------------------------------------------

    def _outputs(self) -> list[Tensor]:
        """What the model computes on the dummy input and on noise, in eval mode and double precision."""
        model = self.model
        with preserved(model), torch.no_grad():
            model.eval()
            for parameter in model.parameters():
                parameter.grad = None
            with ExitStack() as stack:
                stack.enter_context(in_double(model))
                stack.enter_context(caches_preserved(model))
                self.graph.trace.forget()
                try:
                    made = list(tensors_in(self.graph.forward(model, double_inputs(self.inputs))))
                except Exception:  # something in it insists on single precision
                    stack.close()
                    made = list(tensors_in(self.graph.forward(model, self.inputs)))
        return made

    @contextmanager
    def _silence(self) -> Iterator[dict[nn.Module, Tensor]]:
        """While active, notes how large every input channel of every layer gets."""
        found: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                x = args[0].detach()
                largest = x.abs().movedim(_channel_dim(module, x.ndim), 0).flatten(1).amax(1)
                old = found.get(module)
                found[module] = largest if old is None else torch.maximum(old, largest)

        handles = [m.register_forward_pre_hook(note) for m in self.model.modules() if isinstance(m, _LAYERS)]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    # -- what can go ------------------------------------------------------------------------------------------------

    def _find(self, loudness: Mapping[nn.Module, Tensor]) -> tuple[dict[Group, list[int]], dict[Group, list[int]]]:
        """Per group, the units that still pass a constant on, and those that can go."""
        constants: dict[Group, list[int]] = {}
        gone: dict[Group, list[int]] = {}
        for group in self.graph.groups.values():
            written, read = _unwritten(group), _unread(group)
            heard = self._heard(group, loudness)
            still = written & heard & ~read
            if bool(still.any()):
                constants[group] = still.nonzero().flatten().tolist()
            out = (written & (~heard if not self.constants else torch.ones_like(heard))) | read
            gone[group] = out.nonzero().flatten().tolist()
        return constants, gone

    def _heard(self, group: Group, loudness: Mapping[nn.Module, Tensor]) -> Tensor:
        """Whether a layer that reads a unit sees anything but zeros of it."""
        heard = torch.zeros(group.size, dtype=torch.bool)
        leaf = group.leaf.root()
        for part in group.slices():
            seen = loudness.get(part.owner)
            axes = self.graph.trace.inputs.get(part.owner)
            if seen is None or not axes or not part.is_parameter:
                continue
            unit_of = torch.from_numpy(labels(axes[0][_channel_dim(part.owner, len(axes[0]))], leaf))
            if len(unit_of) != len(seen):
                continue
            loud = (seen.cpu() > 0) & (unit_of >= 0)
            heard[unit_of[loud]] = True
        return heard

    def _without(self, constants: Mapping[Group, list[int]], start: list[Tensor]) -> list[Tensor]:
        """The outputs to compare with: with ``allow_constants``, units that pass a constant on become zero first."""
        if not self.constants:
            for group, units in constants.items():
                self.still[group.name] = (
                    f"{len(units)} masked units still pass a constant on (a norm or a bias behind them is not masked); "
                    "mask it along, or use allow_constants=True"
                )
        if not self.constants or not constants:
            return start
        with torch.no_grad():
            for group, units in constants.items():
                for part in group.slices():
                    if part.is_parameter:
                        index = torch.isin(torch.from_numpy(part.units), torch.tensor(units)).nonzero().flatten()
                        part.tensor.data = part.tensor.data.index_fill(part.dim, index.to(part.tensor.device), 0.0)
        return self._outputs()

    def _remove(self, gone: dict[Group, list[int]], expected: list[Tensor]) -> None:
        """Remove units, if the outputs stay what they are; what fails together is taken apart."""
        last = {g: units[:-1] if len(units) == g.size else units for g, units in gone.items()}
        for group, units in gone.items():
            if len(last[group]) < len(units):
                self.still[group.name] = "all its units are masked; the last one stays, so that the layer has one"
        todo = [g for g in gone if last[g]]
        right, wrong = sorted_out(lambda groups: self._trial({g: last[g] for g in groups}, expected), todo)
        if self.norms and wrong:
            again = [g for g, _ in wrong]
            rest = {g: last[g] for g in right}
            more, wrong = sorted_out(lambda groups: self._trial_of_the_rest(rest | {g: last[g] for g in groups}), again)
            right += more
        for group, reason in wrong:
            self.still[group.name] = f"{len(last[group])} masked units: {reason}"
        for group in right:
            remove_units(self.graph, group, last[group], self.trackers)
            self.history.on_removed(Removed(group.name, tuple(last[group]), group.size))

    def _trial(self, gone: Mapping[Group, list[int]], expected: list[Tensor]) -> str | None:
        """Why removing these units changes the outputs; None if it does not. Everything is put back."""
        undo = Snapshot(self.model, self.graph, trackers=self.trackers)
        try:
            for group, units in gone.items():
                remove_units(self.graph, group, units, self.trackers)
            made = self._outputs()
        except SingeError as error:
            return str(error)
        except Exception as error:
            return f"the forward pass fails without them ({type(error).__name__}: {error})"
        finally:
            undo.restore()
        change = relative_change(expected, made)
        if change <= self.tolerance:
            return None
        hint = (
            "" if self.norms else " (a norm over channels sees the masked ones as zeros; allow_norms=True accepts that)"
        )
        return f"the outputs change by {change:.2g} without them{hint if self._mixes(gone) else ''}"

    def _trial_of_the_rest(self, gone: Mapping[Group, list[int]]) -> str | None:
        """The same, with norms over the channels that are left."""
        try:
            with masked(gone), NormsOfTheRest(self.graph, gone):
                expected = self._outputs()
        except GroupError as error:
            return str(error)
        return self._trial(gone, expected)

    def _mixes(self, gone: Mapping[Group, list[int]]) -> bool:
        leaves = {group.leaf.root() for group in gone}
        return any(
            leaves & atom.members() for dims in self.graph.trace.mixing.values() for _, axis in dims for atom in axis
        )

    # -- what stays -------------------------------------------------------------------------------------------------

    def _left_masks(self) -> dict[str, dict[str, Tensor]]:
        """The masks that are still needed, in the shapes of the smaller model."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, targets in self.masks.items():
            module = self.twin.get_submodule(name)
            for target in targets:
                kept = module._parameters.get(target)
                if kept is not None and bool((kept == 0).any()):
                    found.setdefault(name, {})[target] = (kept.detach() != 0).float()
        return found

    def _explain(self, left: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Why layers have masks left, where no group has said so."""
        told = {n for name in self.still if name in self.graph.groups for n in self.graph.groups[name].writers}
        for name, targets in left.items():
            mask = targets.get("weight")
            if name in told or mask is None:
                continue
            rows = mask.flatten(1).amax(1) if mask.ndim > 1 else mask
            whole = int((rows == 0).sum())
            reason = self.graph.left_whole.get(name, "other layers write the same channels and are not masked")
            single = int((mask == 0).sum()) - whole * (mask[0].numel() if mask.ndim > 1 else 1)
            parts = [f"{whole} of {len(rows)} units ({reason})"] * (whole > 0) + [f"{single} single weights"] * (
                single > 0
            )
            self.still[name] = " and ".join(parts)


def _unwritten(group: Group) -> Tensor:
    """The units whose activation cannot depend on the input, because what writes them is zero: ``[N]`` bool."""
    constant = torch.ones(group.size, dtype=torch.bool)
    zero = torch.zeros(group.size, dtype=torch.bool)
    for producer in group.unit_group().producers:
        mine = _zero_rows(producer, group.size)
        owner = producer.slots[0].owner
        if isinstance(owner, _LAYERS):
            zero |= mine
            if producer.norm is not None:
                mine = mine | _zero_rows(_of_norm(producer), group.size)
            depthwise = getattr(owner, "groups", 1) > 1 and owner.weight.shape[1] == 1
            # a depthwise convolution reads nothing but its own units
            constant &= torch.ones_like(mine) if depthwise else mine
        elif is_batchnorm(owner):
            zero |= mine
        elif "norm" in type(owner).__name__.lower() or any(
            p.ndim > 1 for p in owner._parameters.values() if p is not None
        ):
            constant &= mine
    return constant & zero


def _of_norm(producer: Producer) -> Producer:
    """The batch-norm that is folded into a producer, as a producer."""
    assert producer.norm is not None
    slots = tuple(type(producer.slots[0])(producer.norm, attr) for attr in ("weight", "bias"))
    return Producer(producer.name, slots, producer.rows, producer.units)


def _zero_rows(producer: Producer, size: int) -> Tensor:
    """The units whose rows in all parameters of a producer are zero (or that have no rows in it)."""
    zero = torch.ones(size, dtype=torch.bool)
    present = False
    for slot in producer.slots:
        tensor = slot.tensor
        if tensor is None:
            continue
        present = True
        loud = (slot.layout.rows(tensor.detach()) != 0).any(1).cpu()[producer.rows]
        zero[producer.units[loud]] = False
    return zero if present else torch.zeros(size, dtype=torch.bool)


def _unread(group: Group) -> Tensor:
    """The units that every layer which reads them has zero weights for: ``[N]`` bool."""
    read = torch.zeros(group.size, dtype=torch.bool)
    readers = 0
    for part in group.slices():
        if part.reads and part.is_parameter and not isinstance(part.owner, nn.PReLU):
            readers += 1
            loud = (part.tensor.detach().movedim(part.dim, 0).flatten(1) != 0).any(1).cpu()
            units = torch.from_numpy(part.units)
            read[units[loud & (units >= 0)]] = True
    return ~read if readers else torch.zeros_like(read)


def _channel_dim(layer: nn.Module, ndim: int) -> int:
    """Where the input channels of a convolution or linear layer are."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return ndim - 1 if isinstance(layer, nn.Linear) else ndim - weight.ndim + 1


def _few(inputs: Any, count: int) -> Any:
    """The first examples of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[:count] if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {k: _few(v, count) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)([_few(v, count) for v in inputs])
    return inputs


def _with_noise(inputs: Any) -> Any:
    """The example and random numbers in one batch; nested inputs (ids, masks) as they are."""
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim > 1:
        return torch.cat([inputs, random_inputs(inputs)])
    return inputs


def _mask_twin(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """A copy whose parameters are the masks: it is cut along, so that what is left of them fits the smaller model."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.data = torch.ones_like(parameter)
        for name, targets in masks.items():
            for target, mask in targets.items():
                if target in twin.get_submodule(name)._parameters:
                    twin.get_submodule(name)._parameters[target].data = mask.clone()  # type: ignore[union-attr]
    return twin
