"""Two oracles for "are these groups right?", run before anything is removed.

*Permutation*: if a group names every slice that belongs to its units, permuting the units in all of them at once
leaves the function unchanged, exactly. *Mask = removal*: the model with every slice of some units zeroed and the
model with these units removed compute the same function, where operators that take all channels together (norms)
are taken over those that are left.

Both run on the user's model with randomised weights, statistics and inputs (so that nothing passes because it is
all ones and zeros), in double precision where the model allows it, and for all groups at once: only when they fail
together are they taken apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from singe_plugin.errors import SingeError, is_of_the_machine
from singe_plugin.nested import relative_change, results_in

from .algebra import contains
from .bench import EXACT, TOLERANCE, Bench, bench_elsewhere, opened_bench, same_start
from .choices import Choices
from .graph import AxisGraph
from .groups import Group
from .homes import parts_of
from .sorting import sorted_out, taken_apart
from .substitutes import NormsOfTheRest, derangement, exchanged, masked

__all__ = ["Trials", "verify_groups"]

_NOISE = 65_537  # different factors, over and over: no two rows of a weight begin with the same
_BLOCK = 1 << 22  # elements of a product that are there at a time
_FELT = 10.0  # what a group does to the output, in units of the tolerance, for a mistake in it to be seen
_UNFELT = "its units do not change the output on random data, so it cannot be verified"
_FAILS = "the forward pass fails when its units are removed"
_NOT_FINITE = "the output is not finite when its units are removed"
_Trial: TypeAlias = "Callable[[Trials, Sequence[Group]], str | None]"


class Trials:
    """What groups are put through on a bench; each trial answers why they are wrong, or None.

    Args:
        bench: the model, or a part of it, and how exactly it computes.
        number: of every group, by name; None numbers those of the graph.
    """

    def __init__(self, bench: Bench, number: Mapping[str, int] | None = None) -> None:
        self.bench = bench
        self.number = number or {name: number for number, name in enumerate(bench.graph.groups)}

    def at_home(self, trial: _Trial, groups: Sequence[Group]) -> list[tuple[Group, str]]:
        """Find groups that are wrong in the part of the model that holds everything of them, without all the rest."""
        wrong: list[tuple[Group, str]] = []
        for part, inside in parts_of(self.bench, groups):
            wrong += sorted_out(partial(trial, Trials(part, self.number)), inside)[1]
        return wrong

    def permuted(self, groups: Sequence[Group]) -> str | None:
        """Why permuting the units of these groups changes the function; None if it does not."""
        generator = torch.Generator().manual_seed(len(groups))
        try:
            targets = {g: derangement(g.size, generator) for g in groups}
            with exchanged(targets, self.bench.values()), self.bench.repeating():
                moved = self.bench.run()
        except SingeError as error:
            return str(error)
        except Exception as error:
            return self.bench.explained(error, "permuted")
        change = relative_change(self.bench.base, moved)
        if change > self.bench.tolerance:
            return f"permuting its units changes the output by {change:.2g} (relative): the group misses a slice"
        return None

    def unevenly_removed(self, groups: Sequence[Group]) -> str | None:
        """Why removing units, of every group another number, is not the same as masking them; None if it is.

        Numbers in proportion would hide a bound that the code computes from a width: it would still fall on the seam
        between two groups. They are small: through layers of one unit hardly anything reaches the output.
        """
        return self._removed([{g: _order(g)[: self._few(g)] for g in groups}])

    def removed_twice(self, groups: Sequence[Group]) -> str | None:
        """Why that is not so for larger numbers, after some were removed: the graph has to be right then, too."""
        first = {g: self._uneven(g, 1) for g in groups}
        counts = (first, {g: max(first[g], self._uneven(g, 2)) for g in groups})
        return self._removed([{g: _order(g)[: count[g]] for g in groups} for count in counts])

    def every_second_removed(self, groups: Sequence[Group]) -> str | None:
        """Why that is not so where neighbours stay whole, in turn.

        If all lose units, what is left of two neighbours may happen to meet a bound again; and an odd number of a
        group goes once, for what depends on whether a width is even.
        """
        for turn in (0, 1):
            chosen = {g: _order(g)[: self._odd(g)] for g in groups if self.number[g.name] % 2 == turn}
            reason = self._removed([chosen]) if any(chosen.values()) else None
            if reason is not None:
                return reason
        return None

    def each_part_removed(self, groups: Sequence[Group]) -> str | None:
        """Why that is not so where one part of a dimension shrinks and the others stay, each part in turn.

        Where a group is a part of a dimension, a bound that the code computes from the whole width may fall on the seam
        by chance, if the other parts shrink along or only a unit goes.
        """
        for chosen in _one_part_each(groups):
            reason = self._removed([chosen])
            if reason is not None:
                return reason
        return None

    def some(self, group: Group) -> list[int]:
        """Some units of a group, of every group another number, as few as may go."""
        return _order(group)[: self._few(group)]

    @staticmethod
    def _odd(group: Group) -> int:
        left = max(group.size - group.least, 0)
        most = (2 * left + 2) // 3
        return most if most % 2 else max(most - 1, 0)

    def _few(self, group: Group) -> int:
        """How many units of a group go at first: some, at most half of them."""
        left = group.size - group.least
        return max(min((1, 3, 2, 0, 2)[self.number[group.name] % 5], max(left // 2, 1), left), 0)

    def _uneven(self, group: Group, step: int) -> int:
        """How many units of a group go: one of the first, all but one of the second, and so on."""
        left = max(group.size - group.least, 0)
        numbers = (1, left, (2 * left + 2) // 3, (left + 2) // 3, (left + 1) // 2)
        return numbers[(self.number[group.name] + step) % len(numbers)] if left else 0

    def _removed(self, rounds: Sequence[Mapping[Group, list[int]]]) -> str | None:
        most = self.bench.graph.allowed({group: len(units) for group, units in rounds[-1].items()})
        rounds = [{group: units[: most[group]] for group, units in chosen.items()} for chosen in rounds]
        expected, choices = [], Choices()
        try:
            with (
                choices,
                masked(rounds[-1], values=self.bench.values()),
                NormsOfTheRest(self.bench.graph, rounds[-1], self.bench.before),
            ):
                expected = self.bench.run()
        except SingeError as error:
            return str(error)
        except Exception as error:
            return self.bench.explained(error, "masked")
        try:
            with self.bench.repeating(choices):
                removed = self.bench.run_without(rounds)
        except SingeError as error:
            return str(error)
        except Exception as error:
            return self.bench.explained(error, "removed")
        if [t.shape for t in removed] != [t.shape for t in expected]:
            return "removing its units changes the shape of the model's output"
        change = relative_change(expected, removed)
        if change == float("inf"):
            return _NOT_FINITE
        if change > self.bench.tolerance:
            return f"removing its units is not the same as masking them: the outputs differ by {change:.2g}"
        return None


def _order(group: Group) -> list[int]:
    """List the units of a group in a random order, always the same."""
    order: list[int] = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size)).tolist()
    return order


def _one_part_each(groups: Sequence[Group]) -> list[dict[Group, list[int]]]:
    """Choose all that may go of one part of every divided dimension: of the first parts, the second ones, and so on."""
    parts: dict[tuple[int, int], list[Group]] = {}
    for group in groups:
        written = [part for part in group.slices() if part.owner in group.writers.values()]
        for key in {(id(part.tensor), part.dim) for part in written if bool((part.units < 0).any())}:
            parts.setdefault(key, []).append(group)
    turns: list[dict[Group, list[int]]] = []
    for family in dict.fromkeys(tuple(family) for family in parts.values()):
        for number, group in enumerate(family):
            turns += [{} for _ in range(number + 1 - len(turns))]
            turns[number][group] = _order(group)[: max(group.size - group.least, 0)]
    return [chosen for chosen in turns if any(chosen.values())]


def verify_groups(graph: AxisGraph, inputs: Any | None = None) -> dict[str, str]:
    """Put every group of a graph through both oracles.

    Args:
        graph: the graph; it and its model are left as they are.
        inputs: example inputs; None takes those that the graph was made with.

    Returns:
        ``group name -> why it is wrong``, for those that are.

    Raises:
        GroupError: if the model itself does not run on random inputs.
    """
    reasons = {
        group.name: why
        for axis, why in graph.trace.constants
        for group in graph.groups.values()
        if contains(axis, group.leaf.root())
    }
    groups = [group for group in graph.groups.values() if group.name not in reasons]
    if not groups:
        return reasons
    with opened_bench(graph, graph.inputs if inputs is None else inputs) as bench:
        bench.tolerance = max(bench.tolerance, min(10 * _amplified(bench), TOLERANCE))
        reasons |= {g.name: _UNFELT for g in _unfelt(bench, groups)}
        right = [g for g in groups if g.name not in reasons]
        trials = Trials(bench)
        tests = (
            Trials.permuted, Trials.unevenly_removed, Trials.removed_twice, Trials.every_second_removed,
            Trials.each_part_removed,
        )  # fmt: skip
        settled = False
        while not settled:  # in the end, all that are left have passed every test together
            before = len(right)
            for test in tests:
                right, wrong = _sorted_out_to_two(trials, test, right)
                reasons |= {g.name: reason for g, reason in wrong}
            for seed in range(1, 8) if _one_part_each(right) else (1,):
                with bench_elsewhere(bench, graph.inputs if inputs is None else inputs, seed) as other:
                    if other is None:
                        continue
                    again = (Trials.unevenly_removed, Trials.each_part_removed)
                    for test in again if seed == 1 else again[1:]:
                        right, wrong = _sorted_out_to_two(Trials(other), test, right)
                        reasons |= {g.name: reason for g, reason in wrong}
            settled = len(right) == before
    return reasons


def _sorted_out_to_two(
    trials: Trials, trial: _Trial, groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Sort groups out; where the model fails with a layer of one unit, two units of every group have to stay."""
    test, look = partial(trial, trials), partial(trials.at_home, trial)
    reason = test(groups) if groups else None
    if reason is None:
        return groups, []
    single = [g for g in groups if g.least == 1 and g.size > 2] if reason.startswith((_FAILS, _NOT_FINITE)) else []
    for group in single:
        group.least = 2
    right, wrong = sorted_out(test, groups, look) if single else taken_apart(test, groups, look)
    if single and wrong:  # then it may have failed for another reason
        for group in single:
            group.least = 1
        if test(right) is not None:
            for group in single:
                group.least = 2
    return right, wrong


def _amplified(bench: Bench) -> float:
    """Measure what a change of 1e-14 in every parameter does to the outputs: some networks amplify rounding."""
    if bench.tolerance > EXACT:
        return 0.0
    noise = 1 + 1e-14 * (2 * torch.rand(_NOISE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1)
    values = bench.values()
    try:
        for parameter in bench.graph.model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                values.scale(parameter, noise.to(parameter.device))
        with bench.repeating():
            return relative_change(bench.base, bench.run())
    except Exception as error:
        values.restore()
        bench.explained(error, "changed a little")
        return 0.0
    finally:
        values.restore()


def _unfelt(bench: Bench, groups: Sequence[Group]) -> list[Group]:
    """Find the groups whose units hardly change the output: a mistake in them could not be seen."""
    try:
        effect = _effects(bench)
    except Exception as error:  # the model cannot be differentiated: look at each group alone
        if is_of_the_machine(error):
            raise
        return [group for group in groups if _masked_effect(bench, group) < _FELT * bench.tolerance]
    silent = []
    for group in groups:
        felt = 0.0
        for part in group.slices():
            if part.is_parameter and (id(part.tensor), part.dim) in effect:
                felt += float(effect[id(part.tensor), part.dim][torch.from_numpy(part.units >= 0)].sum())
        least = _FELT * bench.tolerance
        if felt < least and _masked_effect(bench, group) < least:  # what comes before a rounding has no gradient
            silent.append(group)
    return silent


def _effects(bench: Bench) -> dict[tuple[int, int], Tensor]:
    """Compute ``|gradient x parameter|`` of a random projection of the outputs, relative to it, of all positions.

    Gradients are dropped one by one.

    Returns:
        ``(id of the parameter, dimension) -> effects``; parameters that no output depends on are left out.
    """
    model, found = bench.graph.model, dict[tuple[int, int], Tensor]()

    def summed(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if not parameter.ndim:
            return
        rows = max(_BLOCK * len(parameter) // max(parameter.numel(), 1), 1)
        sums: list[list[Tensor]] = [[] for _ in parameter.shape]
        whole, values = gradient.to_dense(), parameter.detach()
        for start in range(0, len(parameter), rows):
            moved = (whole[start : start + rows] * values[start : start + rows]).abs_()
            for dim, mine in enumerate(sums):
                rest = [d for d in range(moved.ndim) if d != dim]
                mine.append((moved.sum(rest) if rest else moved).cpu())
        for dim, mine in enumerate(sums):
            found[id(parameter), dim] = torch.stack(mine).sum(0) if dim else torch.cat(mine)

    with same_start(bench.graph), torch.enable_grad(), ExitStack() as hooks:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
                handle = parameter.register_post_accumulate_grad_hook(summed)  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
        outputs = [t for t in results_in(bench.graph.forward(model, bench.inputs)) if t.requires_grad]
        total: Any = 0.0
        for output in outputs:
            probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            total = total + (output * probe).sum() / (output.detach() * probe).norm().clamp(min=1e-12)
        if outputs:
            total.backward()
    return found


def _masked_effect(bench: Bench, group: Group) -> float:
    try:
        with masked({group: _order(group)[: max(group.size // 2, 1)]}, values=bench.values()):
            return relative_change(bench.base, bench.run())
    except Exception as error:
        bench.explained(error, "masked")
        return math.inf  # the oracles say why
