"""Two oracles for "is this group right?", run before anything is removed.

*Permutation*: if a group names every slice that belongs to its units, permuting the units in all of them at once
leaves the function unchanged, exactly. *Mask = removal*: the model with the units' producing rows zeroed and the
model with the units removed compute the same function, where a norm that mixes the channels is taken over those
that are left.

Both run on the user's model with randomised weights, statistics and inputs (so that nothing passes because it is
all ones and zeros), which is then put back bit for bit.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError, SingeError
from singe_plugin.objective import call_model
from singe_plugin.state import preserved

from .groups import UnitSlice, group_name, roots_of, unit_slices
from .removal import Snapshot, Trackers, remove_channels
from .slices import tensor_of

__all__ = ["TOLERANCE", "check_group", "randomised"]

TOLERANCE = 1e-4  # of the output, and
SHARE = 0.05  # of what the units do to the output (deep inside a network that may be little), down to
NOISE = 2e-6  # rounding in single precision
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
    order = torch.randperm(len(units), generator=generator).tolist()
    middle, effect, half = max(1, len(units) // 2), 0.0, order
    for half in (order[:middle], order[middle:]):
        masked, _ = _masked_outputs(model, group, units, half, inputs)
        if isinstance(masked, str):
            return f"the forward pass fails when its units are masked ({masked})"
        effect = relative_change(base, masked)
        if effect > 0.0:  # else these units are dead on this input: try the others
            break
    else:
        return "its units do not change the output on random data, so it cannot be verified"
    limit = max(NOISE, min(TOLERANCE, SHARE * effect))
    with _exchanged(slices, _derangement(len(units), generator)):
        moved = _forward(model, inputs)
    if isinstance(moved, str):
        return f"the forward pass fails when its units are permuted ({moved})"
    change = relative_change(base, moved)
    if change > limit:
        return f"permuting its units changes the output by {change:.2g} (relative): the group misses a slice"
    undo = Snapshot(pruner.DG)
    try:
        return _check_removals(pruner, group, units, half, inputs, limit)
    except SingeError as error:
        return str(error)
    finally:
        undo.restore()


def _check_removals(
    pruner: Any, group: Any, units: Sequence[Sequence[int]], half: list[int], inputs: Any, limit: float
) -> str | None:
    """Remove one unit, then the rest of ``half``: the graph has to be right after a removal, too."""
    model: nn.Module = pruner.model
    rounds = [half[:1]] if len(half) == 1 else [half[:1], half]
    expected = [_masked_outputs(model, group, units, chosen, inputs) for chosen in rounds]
    gone: list[int] = []
    for chosen, (masked, exact) in zip(rounds, expected, strict=True):
        if isinstance(masked, str):
            return f"the forward pass fails when its units are masked ({masked})"
        channels = _renumbered(units, [u for u in chosen if u not in gone], gone)
        remove_channels(pruner.DG, *_root_of(group), channels, Trackers())
        gone = chosen
        removed = _forward(model, inputs)
        if isinstance(removed, str):
            return f"the forward pass fails when {len(chosen)} of its units are removed ({removed})"
        if [t.shape for t in removed] != [t.shape for t in masked]:
            return "removing its units changes the shape of the model's output"
        change = relative_change(masked, removed)
        if change == float("inf"):
            return "the output is not finite when its units are removed"
        if exact and change > limit:
            return f"removing its units is not the same as masking them: the outputs differ by {change:.2g} (relative)"
    return None


def _root_of(group: Any) -> tuple[nn.Module, Any]:
    dep = group[0].dep
    return dep.target.module, dep.handler


def _renumbered(units: Sequence[Sequence[int]], chosen: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The root channels of the chosen units, after those of ``gone`` were removed."""
    missing = sorted(channel for unit in gone for channel in units[unit])
    return [channel - bisect_left(missing, channel) for unit in chosen for channel in units[unit]]


def _masked_outputs(
    model: nn.Module, group: Any, units: Sequence[Sequence[int]], chosen: list[int], inputs: Any
) -> tuple[list[Tensor] | str, bool]:
    """The outputs with the producing rows of the chosen units zeroed, and whether removal must give the same."""
    roots = {channel for unit in chosen for channel in units[unit]}
    with ExitStack() as stack:
        norms = [_NormOfTheRest(group, i, roots) for i in range(len(group)) if _mixes(group, i)]
        stack.enter_context(_masked(unit_slices(group, units), set(chosen)))
        for norm in norms:
            stack.enter_context(norm.module.register_forward_hook(norm))
        return _forward(model, inputs), all(norm.exact for norm in norms)


def _mixes(group: Any, number: int) -> bool:
    return isinstance(group[number].dep.target.module, _MIXING)


class _NormOfTheRest:
    """A forward hook that takes a layer or group norm over the channels that are left; the others become zero."""

    def __init__(self, group: Any, number: int, roots: set[int]) -> None:
        dep, idxs = group[number].dep, list(group[number].idxs)
        gone = sorted(i for i, root in zip(idxs, roots_of(group, number), strict=True) if root in roots)
        self.module: nn.Module = dep.target.module
        self.width = int(group._DG.get_out_channels(self.module))
        self.kept = torch.tensor([i for i in range(self.width) if i not in set(gone)])
        self.small = copy.deepcopy(self.module)
        self.exact = True
        if gone:
            dep.handler.__self__.pruning_dim = dep.target.pruning_dim
            dep.handler(self.small, gone)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        dims = [d for d, size in enumerate(args[0].shape) if size == self.width] if args else []
        if isinstance(module, nn.GroupNorm):
            dims = [1]
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            dims = [args[0].ndim - 1]
        if len(dims) != 1:  # a layer norm over we do not know which dimension
            self.exact = False
            return output
        kept = self.kept.to(output.device)
        rest = self.small(args[0].index_select(dims[0], kept))
        return torch.zeros_like(output).index_copy(dims[0], kept, rest)


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
