"""Two oracles for "is this group right?", run before anything is removed.

*Permutation*: if a group names every slice that belongs to its units, permuting the units in all of them at once
leaves the function unchanged, exactly. *Mask = removal*: where no norm mixes the channels, the model with the
units' producing rows zeroed and the model with the units removed compute the same function.

Both run on the user's model with randomised weights, statistics and inputs (so that nothing passes because it is
all ones and zeros), which is then put back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError, SingeError
from singe_plugin.objective import call_model
from singe_plugin.state import preserved

from .groups import UnitSlice, group_name, unit_slices
from .removal import Snapshot, Trackers, remove_channels
from .slices import tensor_of

__all__ = ["TOLERANCE", "check_group", "randomised"]

TOLERANCE = 1e-4
_MIXING = (nn.LayerNorm, nn.GroupNorm)


@contextmanager
def randomised(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """The model in eval mode with random affine parameters and statistics; restored on leaving.

    Batch-norm statistics and one-dimensional parameters are drawn anew; larger weights are kept unless they are
    (nearly) zero, as zero-initialised branches are.
    """
    generator = torch.Generator().manual_seed(seed)
    originals = [(p, p.data) for p in model.parameters()]
    with preserved(model), torch.no_grad():
        try:
            for name, buffer in model.named_buffers():
                if not buffer.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    buffer.copy_(_uniform(buffer, generator))
                elif name.endswith("running_mean"):
                    buffer.copy_(_normal(buffer, generator) * 0.2)
            for parameter, data in originals:
                if not parameter.is_floating_point() or not data.numel():
                    continue
                if parameter.ndim <= 1:
                    sign = _uniform(data, generator) * torch.where(_normal(data, generator) > -1.0, 1.0, -1.0)
                    parameter.data = sign.to(data.dtype)
                elif float(data.abs().max()) < 1e-3:
                    parameter.data = _normal(data, generator) / max(data[0].numel(), 1) ** 0.5
            model.eval()
            yield
        finally:
            for parameter, data in originals:
                parameter.data = data


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) + 0.5).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def random_inputs(inputs: Any, seed: int = 0) -> Any:
    """Random normal tensors in the place of floating ones, everything else as it is."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs
        return _normal(inputs, torch.Generator().manual_seed(seed))
    if isinstance(inputs, dict):
        return {k: random_inputs(v, seed + 1) for k, v in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        moved = [random_inputs(v, seed + i) for i, v in enumerate(inputs)]
        return tuple(moved) if isinstance(inputs, tuple) else moved
    return inputs


def flat_outputs(value: Any) -> list[Tensor]:
    """All tensors in a nested output, in order."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat_outputs(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in flat_outputs(v)]
    return []


def relative_change(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest change between two outputs, relative to the size of the first; inf if their shapes differ."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            if not bool(torch.isfinite(y).all()):
                return float("inf")
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)))
    return worst


def check_group(pruner: Any, group: Any, units: Sequence[Sequence[int]], inputs: Any, base: list[Tensor]) -> str | None:
    """Put one group through both oracles; call inside :func:`randomised`.

    Args:
        pruner: the pruner whose graph and model the group belongs to.
        group: the full group.
        units: the root channels of each unit.
        inputs: random inputs.
        base: the outputs of the untouched randomised model.

    Returns:
        None if the group is right, else the reason why it is left whole.
    """
    model: nn.Module = pruner.model
    try:
        slices = unit_slices(group, units)
    except SingeError as error:
        return str(error)
    if len(units) < 2:
        return "it has only one unit: its channels cannot be told apart"
    generator = torch.Generator().manual_seed(len(units))
    with _exchanged(slices, _derangement(len(units), generator)):
        moved = _forward(model, inputs)
    if isinstance(moved, str):
        return f"the forward pass fails when its units are permuted ({moved})"
    change = relative_change(base, moved)
    if change > TOLERANCE:
        return f"permuting its units changes the output by {change:.2g} (relative): the group misses a slice"
    half = torch.randperm(len(units), generator=generator)[: max(1, len(units) // 2)].tolist()
    mixes = any(isinstance(group[i].dep.target.module, _MIXING) for i in range(len(group)))
    for chosen in ([half[0]], sorted(half)):
        reason = _check_removal(pruner, group, units, slices, chosen, inputs, base, mixes)
        if reason is not None:
            return reason
        if len(chosen) == len(half):
            break
    return None


def _check_removal(
    pruner: Any,
    group: Any,
    units: Sequence[Sequence[int]],
    slices: list[UnitSlice],
    chosen: list[int],
    inputs: Any,
    base: list[Tensor],
    mixes: bool,
) -> str | None:
    model: nn.Module = pruner.model
    with _masked(slices, set(chosen)):
        masked = _forward(model, inputs)
    if isinstance(masked, str):
        return f"the forward pass fails when its units are masked ({masked})"
    dep = group[0].dep
    undo = Snapshot(pruner.DG)
    try:
        remove_channels(pruner.DG, dep.target.module, dep.handler, [c for u in chosen for c in units[u]], Trackers())
        removed = _forward(model, inputs)
    except SingeError as error:
        return str(error)
    finally:
        undo.restore()
    if isinstance(removed, str):
        return f"the forward pass fails when {len(chosen)} of its units are removed ({removed})"
    if [t.shape for t in removed] != [t.shape for t in base]:
        return "removing its units changes the shape of the model's output"
    change = relative_change(masked, removed)
    if change == float("inf"):
        return "the output is not finite when its units are removed"
    if mixes:
        return None
    if change > TOLERANCE:
        return f"removing its units is not the same as masking them: the outputs differ by {change:.2g} (relative)"
    if len(chosen) > 1 and relative_change(base, masked) == 0.0:
        return "its units do not change the output on random data, so it cannot be verified"
    return None


def _forward(model: nn.Module, inputs: Any) -> list[Tensor] | str:
    """The outputs, or what went wrong: a wrong group may break the forward pass in any way."""
    try:
        return flat_outputs(call_model(model, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _derangement(count: int, generator: torch.Generator) -> list[int]:
    """A permutation without fixed points: a random cycle through all units."""
    order = torch.randperm(count, generator=generator).tolist()
    target = [0] * count
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        target[here] = there
    return target


@contextmanager
def _exchanged(slices: list[UnitSlice], target: list[int]) -> Iterator[None]:
    """Move unit ``u``'s slices to unit ``target[u]``'s places, in every tensor at once."""
    with _substituted(slices) as put:
        for part in slices:
            places: dict[int, list[int]] = {}
            for position, unit in zip(part.positions, part.units, strict=True):
                places.setdefault(unit, []).append(position)
            tensor = put.current(part)
            source = list(range(tensor.shape[part.dim]))
            for unit, mine in places.items():
                theirs = places.get(target[unit])
                if theirs is not None and len(theirs) == len(mine):
                    for a, b in zip(mine, theirs, strict=True):
                        source[b] = a
            if sorted(source) != list(range(len(source))):
                source = list(range(len(source)))  # units of unequal make-up cannot be exchanged: the oracle fails
            put.set(part, tensor.index_select(part.dim, torch.tensor(source, device=tensor.device)))
        yield


@contextmanager
def _masked(slices: list[UnitSlice], chosen: set[int]) -> Iterator[None]:
    """Zero the producing rows of the chosen units."""
    with _substituted(slices) as put:
        for part in slices:
            if not part.produces:
                continue
            gone = [p for p, u in zip(part.positions, part.units, strict=True) if u in chosen]
            tensor = put.current(part)
            index = torch.tensor(gone, device=tensor.device, dtype=torch.int64)
            put.set(part, tensor.index_fill(part.dim, index, 0.0))
        yield


class _Substitutes:
    """Temporary values for the tensors of some slices; the objects stay the same, only their data changes."""

    def __init__(self, slices: list[UnitSlice]) -> None:
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}
        for part in slices:
            tensor = self.current(part)
            self.saved[id(tensor)] = (tensor, tensor.data)

    def current(self, part: UnitSlice) -> Tensor:
        tensor = tensor_of(part.owner, part.attr)
        if tensor is None:
            raise GroupError(f"{type(part.owner).__name__}.{part.attr} is gone")
        return tensor

    def set(self, part: UnitSlice, value: Tensor) -> None:
        self.current(part).data = value.detach()

    def restore(self) -> None:
        for tensor, data in self.saved.values():
            tensor.data = data


@contextmanager
def _substituted(slices: list[UnitSlice]) -> Iterator[_Substitutes]:
    substitutes = _Substitutes(slices)
    try:
        yield substitutes
    finally:
        substitutes.restore()


def verify_groups(pruner: Any, candidates: Sequence[tuple[Any, list[list[int]]]], inputs: Any) -> dict[int, str]:
    """Run :func:`check_group` on every candidate; returns ``position -> reason`` for those that fail.

    Raises:
        GroupError: if the model itself does not run on random inputs.
    """
    reasons: dict[int, str] = {}
    with randomised(pruner.model):
        noise = random_inputs(inputs)
        base = _forward(pruner.model, noise)
        if isinstance(base, str):
            raise GroupError(f"the model does not run on random inputs of the example's shape: {base}")
        if not all(bool(torch.isfinite(t).all()) for t in base if t.is_floating_point()):
            raise GroupError("the model's output is not finite on random inputs, so groups cannot be verified")
        for number, (group, units) in enumerate(candidates):
            reason = check_group(pruner, group, units, noise, base)
            if reason is not None:
                reasons[number] = f"group {group_name(group)!r}: {reason}"
    return reasons
