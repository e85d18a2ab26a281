"""Two oracles for "is this group right?", run before anything is removed.

*Permutation*: if a group names every slice that belongs to its units, permuting the units in all of them at once
leaves the function unchanged, exactly. *Mask = removal*: the model with the units' producing rows zeroed and the
model with the units removed compute the same function, where a norm that mixes the channels is taken over those
that are left.

Both run on the user's model with randomised weights, statistics and inputs (so that nothing passes because it is
all ones and zeros), which is then put back bit for bit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError, SingeError
from singe_plugin.objective import call_model

from .groups import unit_slices
from .removal import Snapshot, Trackers, remove_channels
from .substitutes import (
    NormOfTheRest,
    derangement,
    double_inputs,
    exchanged,
    in_double,
    masked,
    random_inputs,
    randomised,
)

__all__ = ["NOISE", "SHARE", "TOLERANCE", "check_group"]

TOLERANCE = 1e-4  # of the output, and
SHARE = 0.05  # of what the units do to the output (deep inside a network that may be little), down to
NOISE = 2e-6  # rounding in single precision
_MIXING = (nn.LayerNorm, nn.GroupNorm)


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
    if len(units) < 2:
        return "it has only one unit: its channels cannot be told apart"
    try:
        reason, worst = _check(pruner, group, units, inputs, base, TOLERANCE)
        if reason is None and worst > NOISE:  # rounding, or a mistake that this network nearly hides?
            with in_double(pruner.model):
                inputs = double_inputs(inputs)
                exact = _forward(pruner.model, inputs)
                if not isinstance(exact, str):
                    reason, _ = _check(pruner, group, units, inputs, exact, NOISE)
    except SingeError as error:
        return str(error)
    return reason


def _check(
    pruner: Any, group: Any, units: Sequence[Sequence[int]], inputs: Any, base: list[Tensor], tolerance: float
) -> tuple[str | None, float]:
    """The reason why the group is wrong, or None; and the largest change that was let pass."""
    model: nn.Module = pruner.model
    slices = unit_slices(group, units)
    generator = torch.Generator().manual_seed(len(units))
    order = torch.randperm(len(units), generator=generator).tolist()
    middle, effect, half = (len(units) + 1) // 2, 0.0, order
    for half in (order[:middle], order[middle:]):
        without, _ = _masked_outputs(model, group, units, half, inputs)
        if isinstance(without, str):
            return f"the forward pass fails when its units are masked ({without})", 0.0
        effect = relative_change(base, without)
        if effect > 0.0:  # else these units are dead on this input: try the others
            break
    else:
        return "its units do not change the output on random data, so it cannot be verified", 0.0
    limit = max(NOISE, min(tolerance, SHARE * effect))
    with exchanged(slices, derangement(len(units), generator)):
        moved = _forward(model, inputs)
    if isinstance(moved, str):
        return f"the forward pass fails when its units are permuted ({moved})", 0.0
    change = relative_change(base, moved)
    if change > limit:
        return f"permuting its units changes the output by {change:.2g} (relative): the group misses a slice", change
    undo = Snapshot(pruner.DG)
    try:
        reason, worst = _check_removals(pruner, group, units, half, inputs, limit)
    finally:
        undo.restore()
    return reason, max(change, worst)


def _check_removals(
    pruner: Any, group: Any, units: Sequence[Sequence[int]], half: list[int], inputs: Any, limit: float
) -> tuple[str | None, float]:
    """Remove one unit, then the rest of ``half``: the graph has to be right after a removal, too."""
    model: nn.Module = pruner.model
    rounds = [half[:1]] if len(half) == 1 else [half[:1], half]
    expected = [_masked_outputs(model, group, units, chosen, inputs) for chosen in rounds]
    gone: list[int] = []
    worst = 0.0
    for chosen, (without, exact) in zip(rounds, expected, strict=True):
        if isinstance(without, str):
            return f"the forward pass fails when its units are masked ({without})", worst
        channels = _renumbered(units, [u for u in chosen if u not in gone], gone)
        remove_channels(pruner.DG, *_root_of(group), channels, Trackers())
        gone = chosen
        removed = _forward(model, inputs)
        if isinstance(removed, str):
            return f"the forward pass fails when {len(chosen)} of its units are removed ({removed})", worst
        if [t.shape for t in removed] != [t.shape for t in without]:
            return "removing its units changes the shape of the model's output", worst
        change = relative_change(without, removed)
        if change == float("inf"):
            return "the output is not finite when its units are removed", worst
        if exact and change > limit:
            return f"removing its units is not the same as masking them: the outputs differ by {change:.2g}", change
        worst = max(worst, change if exact else 0.0)
    return None, worst


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
        norms = [NormOfTheRest(group, i, roots) for i in range(len(group)) if _mixes(group, i)]
        stack.enter_context(masked(unit_slices(group, units), set(chosen)))
        for norm in norms:
            stack.enter_context(norm.module.register_forward_hook(norm))
        return _forward(model, inputs), all(norm.exact for norm in norms)


def _mixes(group: Any, number: int) -> bool:
    return isinstance(group[number].dep.target.module, _MIXING)


def _forward(model: nn.Module, inputs: Any) -> list[Tensor] | str:
    """The outputs, or what went wrong: a wrong group may break the forward pass in any way."""
    try:
        return flat_outputs(call_model(model, inputs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


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
                reasons[number] = reason
    return reasons
