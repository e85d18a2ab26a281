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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.errors import GroupError, SingeError, is_of_the_machine
from singe_plugin.nested import map_tensors, tensors_in
from singe_plugin.state import plain_layers, preserved

from .algebra import contains
from .graph import AxisGraph, Group, containers_training
from .removal import Snapshot, remove_units
from .substitutes import (
    NormsOfTheRest,
    SharedNoise,
    Values,
    derangement,
    double_inputs,
    exchanged,
    in_double,
    masked,
    random_inputs,
    randomised,
)

__all__ = ["EXACT", "TOLERANCE", "relative_change", "sorted_out", "verify_groups"]

TOLERANCE = 1e-4  # of the output, in single precision
EXACT = 1e-10  # in double precision
_ROUNDED = 1e-6  # in double precision, but with constants that the model computed and kept in single precision
_FELT = 10.0  # what a group does to the output, in units of the tolerance, for a mistake in it to be seen
_SIDES = (96, 112, 128, 160, 192, 224, 256)  # image sizes that verification tries, if smaller than the example


def relative_change(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest change between two outputs, relative to the first's size; inf if shapes differ or it is no number."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            if not bool(torch.isfinite(y).all()):
                return float("inf")
            change = float((x - y).abs().max() / x.abs().max().clamp(min=1e-12))
            if not math.isfinite(change):
                return float("inf")
            worst = max(worst, change)
    return worst


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and notices results and operands in less than double precision.

    A constant that the model makes in single precision is no result: only what is rounded is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.single = self.rounded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.counts[func._schema.name.split("::")[1]] += 1
        operands = list(tensors_in((args, kwargs)))
        if isinstance(out, Tensor) and _is_single(out):
            self.single = self.single or any(t.dtype == torch.float64 for t in operands)
        self.rounded = self.rounded or any(map(_is_single, operands))
        return out


def _is_single(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Bench:
    """A randomised model on random inputs, and how exactly it computes."""

    graph: AxisGraph
    inputs: Any
    base: list[Tensor]
    tolerance: float

    def __post_init__(self) -> None:
        self.number = {name: number for number, name in enumerate(self.graph.groups)}

    def run(self) -> list[Tensor]:
        """The outputs: every run starts from the same state of the model and the same random numbers."""
        with _same_start(self.graph), torch.no_grad():
            return list(tensors_in(self.graph.forward(self.graph.model, self.inputs)))

    def explained(self, error: Exception, done: str) -> str:
        """A failure of the forward pass after a change to the model, as a reason; one with another cause goes on.

        Raises:
            GroupError: if the model fails without the change, too.
        """
        if is_of_the_machine(error):
            raise error
        try:
            self.run()
        except Exception as again:
            if is_of_the_machine(again):
                raise
            raise GroupError(
                f"the model ran on random inputs, and now it fails with {type(again).__name__}: {again}; its forward "
                "pass must give the same for the same inputs and weights"
            ) from again
        return f"the forward pass fails when its units are {done} ({type(error).__name__}: {error})"

    def permuted(self, groups: Sequence[Group]) -> str | None:
        """Why permuting the units of these groups changes the function; None if it does not."""
        generator = torch.Generator().manual_seed(len(groups))
        try:
            with exchanged({g: derangement(g.size, generator) for g in groups}):
                moved = self.run()
        except SingeError as error:
            return str(error)
        except Exception as error:
            return self.explained(error, "permuted")
        change = relative_change(self.base, moved)
        if change > self.tolerance:
            return f"permuting its units changes the output by {change:.2g} (relative): the group misses a slice"
        return None

    def unevenly_removed(self, groups: Sequence[Group]) -> str | None:
        """Why removing units, of every group another number, is not the same as masking them; None if it is.

        Numbers in proportion would hide a bound that the code computes from a width: it would still fall on the seam
        between two groups. They are small: through layers of one unit hardly anything reaches the output.
        """
        return self._removed([{g: _order(g)[: self._few(g)] for g in groups}])

    def removed_twice(self, groups: Sequence[Group]) -> str | None:
        """The same for larger numbers, after some were removed: the graph has to be right after a removal, too."""
        first = {g: self._uneven(g, 1) for g in groups}
        counts = (first, {g: max(first[g], self._uneven(g, 2)) for g in groups})
        return self._removed([{g: _order(g)[: count[g]] for g in groups} for count in counts])

    def every_second_removed(self, groups: Sequence[Group]) -> str | None:
        """The same where neighbours stay whole, in turn.

        If all lose units, what is left of two neighbours may happen to meet a bound again; and an odd number of a
        group goes once, for what depends on whether a width is even.
        """
        for turn in (0, 1):
            chosen = {g: _order(g)[: self._odd(g)] for g in groups if self.number[g.name] % 2 == turn}
            reason = self._removed([chosen]) if any(chosen.values()) else None
            if reason is not None:
                return reason
        return None

    @staticmethod
    def _odd(group: Group) -> int:
        left = max(group.size - group.least, 0)
        most = (2 * left + 2) // 3
        return most if most % 2 else max(most - 1, 0)

    def _few(self, group: Group) -> int:
        """Some units, at most half of them."""
        left = group.size - group.least
        return max(min((1, 3, 2, 0, 2)[self.number[group.name] % 5], max(left // 2, 1), left), 0)

    def _uneven(self, group: Group, step: int) -> int:
        """How many units of a group go: one of the first, all but one of the second, and so on."""
        left = max(group.size - group.least, 0)
        numbers = (1, left, (2 * left + 2) // 3, (left + 2) // 3, (left + 1) // 2)
        return numbers[(self.number[group.name] + step) % len(numbers)] if left else 0

    def _removed(self, rounds: Sequence[Mapping[Group, list[int]]]) -> str | None:
        expected = []
        try:
            with masked(rounds[-1]), NormsOfTheRest(self.graph, rounds[-1]):
                expected = self.run()
        except SingeError as error:
            return str(error)
        except Exception as error:
            return self.explained(error, "masked")
        undo = Snapshot(self.graph.model, self.graph)
        gone: dict[Group, list[int]] = {}
        try:
            for chosen in rounds:
                for group, units in chosen.items():
                    remove_units(self.graph, group, _renumbered(units, gone.get(group, [])))
                    gone[group] = list(units)
            removed = self.run()
        except SingeError as error:
            return str(error)
        except Exception as error:
            undo.restore()
            return self.explained(error, "removed")
        finally:
            undo.restore()
        if [t.shape for t in removed] != [t.shape for t in expected]:
            return "removing its units changes the shape of the model's output"
        change = relative_change(expected, removed)
        if change == float("inf"):
            return _NOT_FINITE
        if change > self.tolerance:
            return f"removing its units is not the same as masking them: the outputs differ by {change:.2g}"
        return None


def _order(group: Group) -> list[int]:
    """The units of a group in a random order, always the same."""
    order: list[int] = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size)).tolist()
    return order


def _renumbered(units: Sequence[int], gone: Sequence[int]) -> list[int]:
    """The present numbers of units, after those in ``gone`` were removed."""
    return [u - sum(g < u for g in gone) for u in units if u not in set(gone)]


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
    with _bench(graph, graph.inputs if inputs is None else inputs) as bench:
        bench.tolerance = max(bench.tolerance, min(10 * _amplified(bench), TOLERANCE))
        reasons |= {g.name: _UNFELT for g in _unfelt(bench, groups)}
        right = [g for g in groups if g.name not in reasons]
        tests = (bench.permuted, bench.unevenly_removed, bench.removed_twice, bench.every_second_removed)
        settled = False
        while not settled:  # in the end, all that are left have passed every test together
            before = len(right)
            for test in tests:
                right, wrong = _sorted_out_to_two(test, right)
                reasons |= {g.name: reason for g, reason in wrong}
            with _elsewhere(bench, graph.inputs if inputs is None else inputs) as other:
                right, wrong = _sorted_out_to_two(other.unevenly_removed, right) if other is not None else (right, [])
                reasons |= {g.name: reason for g, reason in wrong}
            settled = len(right) == before
    return reasons


_UNFELT = "its units do not change the output on random data, so it cannot be verified"
_FAILS = "the forward pass fails when its units are removed"
_NOT_FINITE = "the output is not finite when its units are removed"


def _sorted_out_to_two(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """As :func:`sorted_out`; where the model fails with a layer of one unit, two units of every group have to stay."""
    reason = test(groups) if groups else None
    if reason is None:
        return groups, []
    single = [g for g in groups if g.least == 1 and g.size > 2] if reason.startswith((_FAILS, _NOT_FINITE)) else []
    for group in single:
        group.least = 2
    right, wrong = sorted_out(test, groups) if single else _taken_apart(test, groups)
    if single and wrong:  # then it may have failed for another reason
        for group in single:
            group.least = 1
        if test(right) is not None:
            for group in single:
                group.least = 2
    return right, wrong


def sorted_out(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """The groups that pass a test together, and the others with the reason."""
    return (groups, []) if not groups or test(groups) is None else _taken_apart(test, groups)


def _taken_apart(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """The same for groups that fail together."""
    right, wrong = _halve(test, groups)
    if len(right) < 2 or (wrong and test(right) is None):
        return right, wrong
    together: list[Group] = []  # each passes alone, but not all of them together
    for group in right:
        reason = test([*together, group])
        if reason is None:
            together.append(group)
        else:
            wrong.append((group, reason))
    return together, wrong


def _halve(
    test: Callable[[Sequence[Group]], str | None], groups: list[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Halve groups that fail together."""
    wrong: list[tuple[Group, str]] = []
    if len(groups) == 1:
        return [], [(groups[0], test(groups) or "it fails together with others")]
    middle = len(groups) // 2
    found: list[Group] = []
    for half in (groups[:middle], groups[middle:]):
        if test(half) is None:
            found += half
            continue
        right, failed = _halve(test, half)
        found += right
        wrong += failed
    return found, wrong


def _amplified(bench: _Bench) -> float:
    """What a relative change of 1e-14 in every parameter does to the outputs: some networks amplify rounding."""
    if bench.tolerance > EXACT:
        return 0.0
    generator = torch.Generator().manual_seed(1)
    values = Values()
    try:
        for parameter in bench.graph.model.parameters():
            if parameter.is_floating_point():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
                values.put(parameter, parameter.data * (1 + 1e-14 * (2 * noise - 1)))
        return relative_change(bench.base, bench.run())
    except Exception as error:
        values.restore()
        bench.explained(error, "changed a little")
        return 0.0
    finally:
        values.restore()


def _unfelt(bench: _Bench, groups: Sequence[Group]) -> list[Group]:
    """The groups whose units hardly change the output: a mistake in them could not be seen."""
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
            if part.is_parameter and id(part.tensor) in effect:
                index = torch.from_numpy(part.units >= 0).nonzero().flatten()
                mine = effect[id(part.tensor)]
                felt += float(mine.index_select(part.dim, index.to(mine.device)).sum())
        least = _FELT * bench.tolerance
        if felt < least and _masked_effect(bench, group) < least:  # what comes before a rounding has no gradient
            silent.append(group)
    return silent


def _effects(bench: _Bench) -> dict[int, Tensor]:
    """``|gradient x parameter|`` of a random projection of the outputs, relative to it, by the parameter's id."""
    model = bench.graph.model
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    with _same_start(bench.graph), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        outputs = [t for t in tensors_in(bench.graph.forward(model, bench.inputs)) if t.requires_grad]
        total: Any = 0.0
        for output in outputs:
            probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            total = total + (output * probe).sum() / (output.detach() * probe).norm().clamp(min=1e-12)
        found = torch.autograd.grad(total, parameters, allow_unused=True) if outputs else [None] * len(parameters)
    return {id(p): (g * p.detach()).abs() for p, g in zip(parameters, found, strict=True) if g is not None}


def _masked_effect(bench: _Bench, group: Group) -> float:
    try:
        with masked({group: _order(group)[: max(group.size // 2, 1)]}):
            return relative_change(bench.base, bench.run())
    except Exception as error:
        bench.explained(error, "masked")
        return math.inf  # the oracles say why


@contextmanager
def _bench(graph: AxisGraph, inputs: Any) -> Iterator[_Bench]:
    """The randomised model with the most exact arithmetic and the smallest input that it runs on."""
    model = graph.model
    with ExitStack() as stack:
        stack.enter_context(randomised(model))
        with ExitStack() as precise:
            precise.enter_context(in_double(model))
            for candidate in _candidates(inputs):
                noise = double_inputs(random_inputs(candidate))
                outcome = _attempt(graph, noise)
                if isinstance(outcome, tuple) and _same_path(graph, outcome[1]):
                    base, watch = outcome
                    if watch.single:
                        break  # parts of the model compute in single precision: so do the oracles
                    stack.push(precise.pop_all())
                    yield _Bench(graph, noise, _finite(base), _ROUNDED if watch.rounded else EXACT)
                    return
        noise = random_inputs(inputs)
        outcome = _attempt(graph, noise)
        if not isinstance(outcome, tuple):
            raise GroupError(f"the model does not run on random inputs of the example's shape: {outcome}")
        yield _Bench(graph, noise, _finite(outcome[0]), TOLERANCE)


@contextmanager
def _elsewhere(bench: _Bench, inputs: Any) -> Iterator[_Bench | None]:
    """The same on other inputs and parameters, with another number of examples and pixels, and in training mode.

    As far as the model runs so: not every one takes other sizes. Single layers stay in eval mode.
    """
    graph = bench.graph
    for mode in (containers_training, nullcontext):
        with randomised(graph.model, 1, bias=0.1), mode(graph.model):
            for candidate in _other_inputs(inputs, bench.inputs):
                noise = random_inputs(candidate, 1)
                noise = double_inputs(noise) if bench.tolerance < TOLERANCE else noise
                outcome = _attempt(graph, noise)
                if isinstance(outcome, str) or not _same_path(graph, outcome[1]):
                    continue
                if all(bool(torch.isfinite(t).all()) for t in outcome[0] if t.is_floating_point()):
                    yield _Bench(graph, noise, outcome[0], bench.tolerance)
                    return
    yield None


def _other_inputs(inputs: Any, used: Any) -> Iterator[Any]:
    """More examples, of other image sizes first; then as many as before."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point():
        for side in (*_SIDES, min(inputs.shape[2:])):
            if side <= min(inputs.shape[2:]) and side != min(used.shape[2:]):
                yield _repeated(inputs[:, :, :side, :side], 3)
    for count in (3, 4):
        yield _repeated(used, count)
    yield used


def _repeated(inputs: Any, count: int) -> Any:
    """Tensors with their examples again and again, until they are as many as asked for."""
    return map_tensors(lambda t: t[torch.arange(count, device=t.device) % len(t)] if t.ndim and len(t) else t, inputs)


def _same_path(graph: AxisGraph, watch: _Watch) -> bool:
    """Whether the operators that mix channels are those of the trace."""
    names = {name for name, _ in graph.trace.mixing}
    return all(watch.counts[name] == graph.trace.count(name) for name in names)


def _finite(outputs: list[Tensor]) -> list[Tensor]:
    if not all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
        raise GroupError("the model's output is not finite on random inputs, so groups cannot be verified")
    return outputs


def _attempt(graph: AxisGraph, inputs: Any) -> tuple[list[Tensor], _Watch] | str:
    watch = _Watch()
    try:
        with _same_start(graph), torch.no_grad(), watch:
            return list(tensors_in(graph.forward(graph.model, inputs))), watch
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return f"{type(error).__name__}: {error}"


@contextmanager
def _same_start(graph: AxisGraph) -> Iterator[None]:
    """A run of the model: it keeps nothing for the next one, and draws the same random numbers for all units."""
    with preserved(graph.model), plain_layers(graph.model):
        graph.trace.forget()
        with SharedNoise():
            yield


def _candidates(inputs: Any) -> Iterator[Any]:
    """Smaller images first, where the example is a batch of images."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point():
        for side in _SIDES:
            if side < min(inputs.shape[2:]):
                yield inputs[:2, :, :side, :side]
    yield inputs
