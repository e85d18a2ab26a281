"""What the unpruned network gives, where the pruned one has it: what its layers are solved for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from singe_plugin.axes.algebra import Atom, Axis, labels, leaves
from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.rows import drawn, results_at
from singe_plugin.axes.tape import Reached
from singe_plugin.loop.player import MEMORY, Player
from singe_plugin.loop.sites import Site

__all__ = ["Target", "Targets"]


@dataclass
class Target:
    """What a layer is to give.

    Attributes:
        rows: its results in the unpruned network, ``[rows, O]``, of the units that are left.
        chosen: at which positions.
        beside: what they are added to there, ``[rows, O]``; or None.
    """

    rows: Tensor
    chosen: Tensor
    beside: Tensor | None = None


class Targets:
    """Collects targets in passes of the unpruned network, of as many layers at once as there is memory for.

    Args:
        graph: the axes of the unpruned network.
        kept: leaf -> which of its units are left; of others, all are.
        positions: how many positions of an example there are at most.
        examples: how many a batch has.
        seed: of the choice of positions.
    """

    def __init__(
        self, graph: AxisGraph, kept: Mapping[Atom, np.ndarray[Any, np.dtype[np.bool_]]], positions: int,
        examples: int, seed: int,
    ) -> None:  # fmt: skip
        self.graph, self.kept, self.positions, self.examples, self.seed = graph, kept, positions, examples, seed
        self.factors = self._factors()

    def _factors(self) -> dict[str, Tensor]:
        """Parameter -> what each of its outputs is multiplied by: where attention divides by the root of its width.

        The softmax is as sharp as it was if the queries of a width that went from d to d' are sqrt(d'/d) of what they
        were (:mod:`singe_plugin.axes.scales`).
        """
        found: dict[str, Tensor] = {}
        for scale in self.graph.scales:
            left = self.left(scale.width)
            if left is None:
                continue
            factor = math.sqrt(len(left[0]) / left[1])
            for owner, attr, rows in scale.rows:
                name = f"{self.graph.names[owner]}.{attr}".lstrip(".")
                before = found.get(name, torch.ones(len(rows), dtype=torch.float64, device=rows.device))
                found[name] = torch.where(rows, before * factor, before)
        return found

    def windows(self, player: Player, stages: Sequence[list[Site]]) -> Iterator[list[list[Site]]]:
        """Cut stages into runs whose targets can be kept together."""
        window: list[list[Site]] = []
        size = 0
        for stage in stages:
            more = sum(self._bytes(player, site, number) for site in stage for number in site.numbers)
            if window and size + more > MEMORY:
                yield window
                window, size = [], 0
            window.append(stage)
            size += more
        if window:
            yield window

    def _bytes(self, player: Player, site: Site, number: int) -> int:
        """What the targets of a contraction take, of all batches."""
        if site.reason is not None:
            return 0
        step = player.tape.steps[player.tape.contracting[number]]
        shape = step.results[0]
        assert shape is not None
        rows, *channels = shape.size
        if step.name == "convolution":
            rows *= min(self.positions, math.prod(channels[1:]))
        else:
            rows = min(rows, self.positions * self.examples)
        return rows * channels[0] * shape.dtype.itemsize * len(player.batches) * (1 + (number in site.sums))

    def collect(self, player: Player, sites: Sequence[Site]) -> list[dict[int, Target | None]]:
        """Run all batches through the unpruned network: for each, contraction -> what it is to give.

        It is None, if the trace has no such operator.
        """
        wanted = {number: site for site in sites for number in site.numbers if site.reason is None}
        found: list[dict[int, Target | None]] = [{} for _ in player.batches]
        if not wanted:
            return found
        tape = player.tape
        sums = {number: site.sums[number] for number, site in wanted.items() if number in site.sums}
        end = max([tape.contracting[max(wanted)], *(tape.sums[number].step for number in sums)])

        def see(contraction: Contraction) -> None:
            if contraction.number in wanted:
                factor = self.factors.get(wanted[contraction.number].name)
                found[batch][contraction.number] = self._of(contraction, batch, factor)
            if tape.contracting[contraction.number] == end:
                raise Reached

        def watch(number: int, args: Any) -> None:
            sum_ = tape.sums[number]
            if (target := found[batch][number]) is not None:
                target.beside = self.beside(args[sum_.other], number, target.chosen, True)
            if sum_.step == end:
                raise Reached

        watches = {tape.sums[number].step: partial(watch, number) for number in sums}
        with player.ready():
            for batch in player.mine:
                player.play(batch, tape.contracting[min(wanted)], see, watches)
        return found

    def _of(self, found: Contraction, batch: int, factor: Tensor | None = None) -> Target | None:
        """What a layer gives in the unpruned network where the pruned one has it, at some positions; and which.

        None, if the trace has no such operator.

        Args:
            found: the contraction.
            batch: which one it is of.
            factor: what its outputs are to be multiplied by, ``[O]``.
        """
        out, traced = found.out, self.graph.trace.contractions
        axes = traced[found.number][1] if found.number < len(traced) else []
        if len(axes) != out.ndim:
            return None
        if factor is not None:
            own = factor if len(factor) == out.shape[1] else factor[:1]  # along the inputs it is the same for all
            out = out * own.to(out).view(-1, *[1] * (out.ndim - 2))
        for dim, axis in enumerate(axes):
            left = self.left(axis)
            if left is not None and len(left[0]) and left[1] == out.shape[dim]:
                out = out.index_select(dim, left[0].to(out.device))
        pixels = found.convolution is not None
        count = math.prod(out.shape[2:]) if pixels else len(out)
        most = self.positions * (1 if pixels else self.examples)
        chosen = drawn(count, most, self.seed + 7919 * batch + found.number, out.device)
        return Target(results_at(found, out, chosen), chosen)

    def beside(self, other: Tensor, number: int, chosen: Tensor, whole: bool) -> Tensor:
        """The rows of what a result is added to; of the unpruned network, where the pruned one has them."""
        _, axes = self.graph.trace.contractions[number]
        pixels = len(axes) > 2
        left = self.left(axes[1]) if whole else None
        if left is not None:
            other = other.index_select(1 if pixels else other.ndim - 1, left[0].to(other.device))
        if pixels:
            return other.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)
        return other.flatten(0, -2)[chosen]

    def left(self, axis: Axis) -> tuple[Tensor, int] | None:
        """The positions along an axis of the unpruned network that are left, and how many there were; None for all."""
        left: Any = None
        for leaf in dict.fromkeys(leaves(axis)):
            if (mask := self.kept.get(leaf.root())) is not None:
                units = labels(axis, leaf)
                stays = np.where(units >= 0, mask[units], True)
                left = stays if left is None else left & stays
        return None if left is None else (torch.from_numpy(left.nonzero()[0]), len(left))
