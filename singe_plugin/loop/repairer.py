"""The survivors of a removal take over: every layer that gets other inputs is solved again, in closed form.

The unpruned network and the pruned one see the same images. Layer after layer, in forward order, X' is what the layer
gets in the pruned network as it is by then, and Y is what the unpruned network's layer gives there, at the units that
are left; the layer becomes the ridge regression of Y on X' (:mod:`singe_plugin.method.ridge`). No labels, no training,
no new parameters. Layers that do not depend on each other are solved in one pass, and nothing is computed again that
is the same as in the pass before (:mod:`singe_plugin.axes.tape`), as far as there is memory to keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from singe_plugin.axes.algebra import Atom, Axis, labels, leaves
from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.rows import inputs_at, matrix_of, positions_of, results_at, weights_of
from singe_plugin.axes.tape import Kept, Playback, Reached, Strayed, Tape
from singe_plugin.loop.repair import Repair, Solved
from singe_plugin.loop.sites import Site
from singe_plugin.loop.statistics import renew_statistics
from singe_plugin.method.ridge import solve
from singe_plugin.nested import map_tensors, tensors_in
from singe_plugin.state import RngState, model_device, plain_layers, preserved, want_gradients

__all__ = ["Repairer"]

_LARGEST = 100.0  # factor of a batch-norm against its channels' median: beyond, a channel makes up for nothing
_MEMORY = 2**28  # bytes that are kept of all batches of a network from one pass to the next


class _Player:
    """Plays a network again and again, batch by batch, from the layers that are solved next."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Sequence[Any]) -> None:
        self.model, self.forward, self.batches = model, forward, batches
        self.tape = Tape.of(model, map_tensors(torch.clone, batches[0]), forward)
        self.starts = [0] * len(batches)
        self.kept: list[Kept] = [{} for _ in batches]
        shapes = [[t.shape for t in tensors_in(batch)] for batch in batches]
        self.same = [found == shapes[0] and self.tape.why_not is None for found in shapes]

    def play(
        self, index: int, start: int, see: Callable[[Contraction], None], watch: Mapping[int, Callable[[Any], None]]
    ) -> None:
        """Run a batch until ``see`` or ``watch`` ends it; what comes before ``start`` stays as it is from now on."""
        keep = None
        if self.same[index] and start > self.starts[index]:
            size = sum(shape.bytes for shape in self.tape.live(start).values())
            keep = start if size * len(self.batches) <= _MEMORY else None
        state, inputs = RngState.capture(), map_tensors(torch.clone, self.batches[index])
        run = Playback(self.model, self.tape, see, self.starts[index], self.kept[index], keep, watch)
        try:
            with run, suppress(Reached):
                self.forward(self.model, inputs)
        except Strayed:
            if not self.starts[index]:
                raise
            self.same[index], self.starts[index], self.kept[index] = False, 0, {}
            state.restore()
            self.play(index, start, see, watch)
            return
        state.restore()
        if run.kept:
            self.starts[index], self.kept[index] = start, run.kept


class Repairer:
    """Repairs pruned copies of a network.

    Args:
        original: the unpruned network, whose outputs are the targets; it is left as it was.
        graph: its axes, traced with inputs as large as the first batch.
        batches: inputs.
        options: how.
        seed: of the choice of positions.
        forward: how the networks are called with the batches.
    """

    def __init__(
        self, original: nn.Module, graph: AxisGraph, batches: Sequence[Any], options: Repair, seed: int,
        forward: Callable[[nn.Module, Any], Any],
    ) -> None:  # fmt: skip
        self.original, self.graph, self.batches, self.options = original, graph, batches, options
        self.seed, self.forward = seed, forward
        self.examples = max(next((len(t) for t in tensors_in(batches[0]) if t.ndim), 1), 1)
        self.kept: dict[Atom, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        self.masks: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def repair(
        self, pruned: nn.Module, kept: Mapping[str, Sequence[int]], masks: Mapping[str, Tensor] | None = None
    ) -> list[Solved]:
        """Solve the layers of a pruned network again, and bring its batch-norms along.

        Args:
            pruned: the network; its weights change in place.
            kept: group -> the units that are left, in the numbering of the unpruned network; by default all.
            masks: parameter -> which weights may be other than zero; of others, those that are not, or never were. The
                layers themselves are plain ones (:func:`singe_plugin.masks.plain_weights`).

        Returns:
            every layer whose inputs are others than in the unpruned network, with its error before and after.
        """
        self.kept, self.masks = {}, masks or {}
        for name, units in kept.items():
            leaf = self.graph.groups[name].leaf.root()
            mask = np.zeros(leaf.size, dtype=bool)
            mask[list(units)] = True
            if not mask.all():
                self.kept[leaf] = mask
        players = []
        found: list[tuple[int, Solved]] = []
        with torch.autocast(model_device(pruned).type, enabled=False):  # casts would stand between layer and weight
            for model in (self.original, pruned):
                with preserved(model), plain_layers(model):
                    want_gradients(model.eval())
                    players.append(_Player(model, self.forward, self.batches))
            for stage in self._stages(*players):
                self._collect(players, stage)
                found += [(site.numbers[0], self._solved(pruned, site)) for site in stage]
            renew_statistics(pruned, self.batches, self.forward)
        place = {number: place for place, number in enumerate(players[1].tape.order)}
        found += [(number, solved) for number, solved in self.left.values()]
        return [solved for _, solved in sorted(found, key=lambda pair: place[pair[0]])]

    def _stages(self, original: _Player, pruned: _Player) -> Iterator[list[Site]]:
        """What to solve, in forward order, together with what does not depend on it."""
        mine, theirs = dict(pruned.model.named_parameters()), dict(original.model.named_parameters())
        norms = {module: name for name, module in self.original.named_modules()}
        sites: dict[str, Site] = {}
        for number, (weight, bias, reads) in enumerate(pruned.tape.sites):
            if weight is not None:
                site = sites.setdefault(weight, Site(weight, bias))
                site.numbers.append(number)
                if readers := pruned.tape.read.get(weight):
                    site.reason = f"its parameter is read by {', '.join(sorted(readers))}, too"
                if original.tape.sites[number : number + 1] != [(weight, bias, reads)] or bias != site.bias:
                    site.reason = "the pruned network runs other operators than the unpruned one"
        self.open = {name: site.numbers for name, site in sites.items()}
        self.left: dict[str, tuple[int, Solved]] = {}
        changed: set[int] = set()
        stage: list[Site] = []
        for number in pruned.tape.order:
            computed = pruned.tape.computed.get(number)
            if computed is not None:
                again = {
                    n for n in computed.names if mine[n].shape == theirs[n].shape and _differs(mine[n], theirs[n], 0)
                }
                before = original.tape.computed.get(number, computed).features
                if again or computed.features != before or computed.depends & changed:
                    changed.add(number)
                    name = computed.names[0]
                    if name not in sites:
                        self.left.setdefault(name, (number, Solved(name, reason=computed.why)))
                continue
            weight, _, reads = pruned.tape.sites[number]
            differs = weight is not None and _differs(mine[weight], theirs[weight], reads)
            if differs or pruned.tape.depends[number] & changed:
                changed.add(number)
            if weight is None or sites[weight].numbers[0] != number:
                continue
            site = sites[weight]
            reach = frozenset().union(*(pruned.tape.depends[n] for n in site.numbers))
            if not (differs or reach & changed):
                continue
            changed |= set(site.numbers)
            if reach & set(site.numbers):
                site.reason = (
                    site.reason or "what it reads depends on its own results (it is recurrent, or called again)"
                )
            if site.bias is None:
                owner = self.original.get_submodule(weight.rpartition(".")[0])
                norm = self.graph.trace.sole_reader(owner)
                site.norm = None if norm is None else norms[norm]
            self._find_sums(site, original, pruned)
            reach = reach.union(*(found.depends for found in site.sums.values()))
            if any(set(other.numbers) & reach for other in stage):
                yield stage
                stage = []
            stage.append(site)
        if stage:
            yield stage

    def _collect(self, players: Sequence[_Player], stage: list[Site]) -> None:
        """Run all batches through both networks, up to the last layer of a stage."""
        sites = {number: site for site in stage for number in site.numbers}
        first, last = min(sites), max(sites)
        original, pruned = players
        later = [pruned.tape.touched[name] for name, numbers in self.open.items() if max(numbers) >= first]
        starts = [
            original.tape.contracting[first],
            min(pruned.tape.contracting[first], *later),
        ]  # these will still change
        ends = [
            max([player.tape.contracting[last], *(player.tape.sums[n].step for site in stage for n in site.sums)])
            for player in players
        ]
        targets: dict[int, tuple[Tensor, Tensor] | None] = {}
        beside: dict[int, Tensor] = {}
        waiting: dict[int, tuple[Contraction, Tensor, Tensor, Tensor]] = {}

        def see_original(found: Contraction) -> None:
            if found.number in sites:
                targets[found.number] = self._target(found, batch)
            if original.tape.contracting[found.number] == ends[0]:
                raise Reached

        def watch_original(number: int, args: Any) -> None:
            found = original.tape.sums[number]
            if (target := targets[number]) is not None:
                beside[number] = self._rows_beside(args[found.other], number, target[1], True)
            if found.step == ends[0]:
                raise Reached

        def see_pruned(found: Contraction) -> None:
            if found.number in sites:
                site, target = sites[found.number], targets.pop(found.number)
                weight = pruned.model.get_parameter(site.name)
                if not found.x.is_floating_point():
                    site.reason = f"it computes in {found.x.dtype}"
                elif target is None or not _fits(found, *target):
                    site.reason = "its results in the pruned network are no part of those in the unpruned one"
                elif found.number in site.sums:
                    y, chosen = target
                    waiting[found.number] = found, inputs_at(found, weight.shape[2:], chosen), y, chosen
                else:
                    site.add(found, inputs_at(found, weight.shape[2:], target[1]), target[0], len(self.batches))
            if pruned.tape.contracting[found.number] == ends[1]:
                raise Reached

        def watch_pruned(number: int, args: Any) -> None:
            found = pruned.tape.sums[number]
            if number in waiting:
                contraction, x, y, chosen = waiting.pop(number)
                mine = self._rows_beside(args[found.other], number, chosen, False)
                scale = sites[number].scale
                shift = beside[number] - mine
                y = y + (shift if scale is None else shift * scale)
                sites[number].add(contraction, x, y, len(self.batches))
            if found.step == ends[1]:
                raise Reached

        watches = [
            {player.tape.sums[n].step: partial(watch, n) for site in stage for n in site.sums}
            for player, watch in ((original, watch_original), (pruned, watch_pruned))
        ]
        with ExitStack() as stack:
            for player in players:
                stack.enter_context(preserved(player.model))
                stack.enter_context(plain_layers(player.model))
                want_gradients(player.model.eval())
            for batch in range(len(self.batches)):
                for player, start, see, watch in zip(players, starts, (see_original, see_pruned), watches, strict=True):
                    player.play(batch, start, see, watch)

    def _target(self, found: Contraction, batch: int) -> tuple[Tensor, Tensor] | None:
        """What a layer gives in the unpruned network where the pruned one has it, at some positions; and which.

        None, if the trace has no such operator.
        """
        out, traced = found.out, self.graph.trace.contractions
        axes = traced[found.number][1] if found.number < len(traced) else []
        if len(axes) != out.ndim:
            return None
        for dim, axis in enumerate(axes):
            left = self._left(axis)
            if left is not None and len(left[0]) and left[1] == out.shape[dim]:
                out = out.index_select(dim, left[0].to(out.device))
        pixels = found.convolution is not None
        count = math.prod(out.shape[2:]) if pixels else len(out)
        generator = torch.Generator().manual_seed(self.seed + 7919 * batch + found.number)
        most = self.options.positions * (1 if pixels else self.examples)
        chosen = torch.randperm(count, generator=generator)[:most].sort().values.to(out.device)
        return results_at(found, out, chosen), chosen

    def _find_sums(self, site: Site, original: _Player, pruned: _Player) -> None:
        """See where the results of a layer are added to what went wrong before: it can make up for that."""
        mine, theirs = ({n: p.tape.sums.get(n) for n in site.numbers} for p in (pruned, original))
        scales = set()
        for number in site.numbers:
            a, b = mine[number], theirs[number]
            if number >= len(self.graph.trace.contractions):
                return
            _, axes = self.graph.trace.contractions[number]
            rows = [axis for dim, axis in enumerate(axes) if dim != 1]
            if a is None or b is None or a.norm != b.norm or any(self._left(axis) is not None for axis in rows):
                return
            scales.add(a.norm)
        if len(scales) != 1:
            return
        site.sums = {number: found for number, found in mine.items() if found is not None}
        name = next(iter(scales))
        if name is not None:
            norm: Any = pruned.model.get_submodule(name)
            factor = (norm.running_var + norm.eps).sqrt() / (1.0 if norm.weight is None else norm.weight)
            dead = ~(factor.abs() < _LARGEST * factor.abs().median())
            site.scale = torch.where(dead, 0.0, factor)

    def _rows_beside(self, other: Tensor, number: int, chosen: Tensor, whole: bool) -> Tensor:
        """The rows of what a result is added to; of the unpruned network, where the pruned one has them."""
        _, axes = self.graph.trace.contractions[number]
        pixels = len(axes) > 2
        left = self._left(axes[1]) if whole else None
        if left is not None:
            other = other.index_select(1 if pixels else other.ndim - 1, left[0].to(other.device))
        if pixels:
            return other.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1)
        return other.flatten(0, -2)[chosen]

    def _left(self, axis: Axis) -> tuple[Tensor, int] | None:
        """The positions along an axis of the unpruned network that are left, and how many there were; None for all."""
        left: Any = None
        for leaf in dict.fromkeys(leaves(axis)):
            if (mask := self.kept.get(leaf.root())) is not None:
                units = labels(axis, leaf)
                stays = np.where(units >= 0, mask[units], True)
                left = stays if left is None else left & stays
        return None if left is None else (torch.from_numpy(left.nonzero()[0]), len(left))

    def _solved(self, pruned: nn.Module, site: Site) -> Solved:
        """Solve a layer from what is known of its rows; it keeps its weights if that is not better."""
        known, last = site.known, site.last
        site.known = site.last = None
        if site.reason is not None or known is None or last is None:
            return Solved(site.name, reason=site.reason or "no operator of its own gives its results")
        if not all(part.finite() for part in known):
            return Solved(site.name, reason="its inputs or its results are not finite")
        weight = pruned.get_parameter(site.name)
        matrix = matrix_of(last, weight)
        bias, norm = None, None if site.norm is None else pruned.get_submodule(site.norm)
        if site.bias is not None:
            bias = pruned.get_parameter(site.bias).reshape(matrix.shape[:2])
        elif norm is not None:
            bias = matrix.new_zeros(matrix.shape[:2])
        kept = self._solvable(site.name, weight)
        kept = None if kept is None or bool(kept.all()) else matrix_of(last, kept)
        behind = None
        if site.scale is not None:
            behind = torch.where(site.scale == 0, 0.0, 1 / site.scale).reshape(matrix.shape[:2])
        found = solve(matrix, bias, *known, self.options.ridges, kept, behind)
        if found.ridge is not None:
            weight.data.copy_(weights_of(last, found.weight, weight.shape))
            if found.bias is not None and site.bias is not None:
                pruned.get_parameter(site.bias).data.copy_(found.bias.flatten())
            elif found.bias is not None and norm is not None:
                mean: Any = norm.running_mean
                mean.sub_(found.bias.flatten().to(mean))
        return Solved(site.name, found.before, found.after, found.ridge)

    def _solvable(self, name: str, weight: Tensor) -> Tensor | None:
        """Which weights of a parameter may be other than zero; None is all of them."""
        if name in self.masks:
            return self.masks[name]
        whole = self.original.get_parameter(name)
        return (weight != 0) | (whole == 0).to(weight.device) if weight.shape == whole.shape else None


def _fits(found: Contraction, y: Tensor, chosen: Tensor) -> bool:
    """Whether targets are for the channels and positions that a layer has."""
    return y.shape[1] == found.out.shape[1] and len(chosen) > 0 and int(chosen.max()) < positions_of(found)


def _differs(mine: Tensor, theirs: Tensor, reads: int) -> bool:
    """Whether a parameter lost inputs, along the dimension that reads, or was changed: trained, masked, solved."""
    if mine.shape == theirs.shape:
        return not torch.equal(mine, theirs.to(mine.device))
    return mine.shape[reads] != theirs.shape[reads]
