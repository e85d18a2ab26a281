"""Units are removed for a moment, to see whether that changes what the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from singe_plugin.axes import Group, Snapshot, remove_units
from singe_plugin.axes.sorting import sorted_out
from singe_plugin.axes.substitutes import NormsOfTheRest, masked
from singe_plugin.errors import GroupError, SingeError, is_of_the_machine
from singe_plugin.nested import relative_change

from .holes import Holes, Units, any_unit, with_units
from .laboratory import Laboratory, OpenFunctions

__all__ = ["Trials", "change_of"]

_SINGLE, _SINGLE_DRAWN = 1e-5, 1e-4  # what rounding may change in single precision


@dataclass
class Trials:
    """Removes units and puts them back, to see what that changes.

    Attributes:
        lab: what runs the model.
        holes: where the model is masked.
        closed: the holes, and all slices of units that pass zeros or a constant on.
        quiet: the units that pass zeros on, for their own values.
        zeroed: the units that pass a constant on, which is given up.
        tolerance: how far the outputs may be from the masked model's, relative to their size.
        passed: the latest removal that left the outputs for the model's own values as they are, and these outputs.
    """

    lab: Laboratory
    holes: Holes
    closed: Holes
    quiet: Units
    zeroed: Units
    tolerance: float

    def __post_init__(self) -> None:
        self._expected: dict[tuple[bool, int], list[Tensor]] = {}
        self.passed: tuple[dict[Group, Sequence[int]], list[Tensor]] = ({}, [])

    def sorted(
        self, gone: Mapping[Group, Sequence[int]], base: Sequence[Group] = (), rest: bool = False
    ) -> tuple[list[Group], list[tuple[Group, str]]]:
        """Return the groups whose units can be removed together without changing the outputs, and why others cannot.

        Args:
            gone: the units of each group that are to go.
            base: the groups among them that are known to pass.
            rest: whether to compare with a model whose norms over channels leave the units out.
        """
        right, wrong = [group for group in gone if group not in base], []
        for own in (False, True):  # random values first: smaller inputs do for them
            right, failed = sorted_out(lambda some: self._why({g: gone[g] for g in (*base, *some)}, own, rest), right)  # noqa: B023
            wrong += failed
        return right, wrong

    def _why(self, gone: Mapping[Group, Sequence[int]], own: bool, rest: bool) -> str | None:
        """Say why removing some units changes the outputs; None if it does not."""
        for number, (values, functions) in enumerate(self._settings(own)):
            with values:
                try:
                    if rest:
                        expected = self._of_the_rest(gone, functions, own)
                    else:
                        if (own, number) not in self._expected:
                            as_given = own and not any_unit(self.zeroed)
                            self._expected[own, number] = self.lab.start if as_given else self._run(functions, own)
                        expected = self._expected[own, number]
                    made = self._removed(gone, functions, own)
                except SingeError as error:
                    return str(error)
                except Exception as error:
                    if is_of_the_machine(error):
                        raise
                    return f"the forward pass fails without them ({type(error).__name__}: {error})"
            limit = self.tolerance if self.lab.double else max(self.tolerance, _SINGLE if own else _SINGLE_DRAWN)
            change = change_of(expected, made)
            if change > limit:
                where = "" if own else " on random values of the other parameters"
                return f"the outputs change by {change:.2g} without them{where}"
            if own:
                self.passed = dict(gone), made
        return None

    def _settings(self, own: bool) -> Iterator[tuple[AbstractContextManager[None], bool]]:
        """Yield the values to try, and whether functions are open then."""
        if own:
            yield masked(_lists(self.zeroed)), False
            return
        yield self.lab.drawn(self.closed, 100), True
        if any_unit(self.quiet):
            yield self.lab.drawn(with_units(self.holes, self.zeroed), 101, self.quiet), False

    def _run(self, functions: bool, own: bool) -> list[Tensor]:
        with OpenFunctions() if functions else nullcontext():
            return self.lab.outputs() if own else self.lab.run(self.lab.noise(7))

    def _removed(self, gone: Mapping[Group, Sequence[int]], functions: bool, own: bool) -> list[Tensor]:
        undo = Snapshot(self.lab.graph.model, self.lab.graph)
        try:
            for group, units in gone.items():
                remove_units(self.lab.graph, group, units, undo=False)
            return self._run(functions, own)
        finally:
            undo.restore()

    def _of_the_rest(self, gone: Mapping[Group, Sequence[int]], functions: bool, own: bool) -> list[Tensor]:
        made: list[Tensor] = []
        graph = self.lab.graph
        with masked(gone):
            for inputs in self.lab.examples if own else [self.lab.noise(7)]:
                with OpenFunctions() if functions else nullcontext(), NormsOfTheRest(graph, gone) as norms:
                    made += self.lab.run(inputs)
                if not self.lab.as_traced(norms):
                    raise GroupError("the norms of the model cannot be followed on these inputs")
        return made


def change_of(expected: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Return the largest change, relative to the outputs' size; inf for other shapes, NaN or infinities elsewhere."""
    if [t.shape for t in expected] != [t.shape for t in made]:
        return float("inf")
    pairs = list(zip(expected, made, strict=True))
    if any(bool(a.isnan().any()) or not torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs):
        return float("inf")
    zero = {"posinf": 0.0, "neginf": 0.0}
    return relative_change([a.nan_to_num(**zero) for a, _ in pairs], [b.nan_to_num(**zero) for _, b in pairs])


def _lists(units: Units) -> dict[Group, list[int]]:
    return {group: flags.nonzero().flatten().tolist() for group, flags in units.items()}
