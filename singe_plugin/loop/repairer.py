"""The survivors of a removal take over: every layer that gets other inputs is solved again, in closed form.

The unpruned network and the pruned one see the same images. Layer after layer, in forward order, X' is what the layer
gets in the pruned network as it is by then, and Y is what the unpruned network's layer gives there, at the units that
are left; the layer becomes the ridge regression of Y on X' (:mod:`singe_plugin.method.ridge`). No labels, no training,
no new parameters. Layers that do not depend on each other are solved in one pass, and nothing is computed again that
is the same as in the pass before (:mod:`singe_plugin.axes.tape`), as far as there is memory to keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from singe_plugin.axes.algebra import Atom
from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.rows import inputs_at, matrix_of, positions_of, weights_of
from singe_plugin.axes.tape import MARKED, Reached
from singe_plugin.loop.player import Player
from singe_plugin.loop.repair import Repair, Solved
from singe_plugin.loop.sites import Site
from singe_plugin.loop.statistics import renew_statistics
from singe_plugin.loop.targets import Target, Targets
from singe_plugin.masks import named_tensors
from singe_plugin.method.folding import is_batchnorm
from singe_plugin.method.ridge import solve
from singe_plugin.nested import examples_in
from singe_plugin.ranks import current
from singe_plugin.state import model_device

__all__ = ["Repairer"]

_LARGEST = 100.0  # factor of a batch-norm against its channels' median: beyond, a channel makes up for nothing
_UNKNOWN = "it reads units that went, by an operator that is not known here; it keeps its weights"


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
        self.masks: Mapping[str, Tensor] = {}
        self.gone: frozenset[str] = frozenset()

    @torch.no_grad()
    def repair(
        self,
        pruned: nn.Module,
        kept: Mapping[str, Sequence[int]],
        masks: Mapping[str, Tensor] | None = None,
        gone: Collection[str] = (),
    ) -> list[Solved]:
        """Solve the layers of a pruned network again, and bring its batch-norms along.

        Args:
            pruned: the network; its weights change in place.
            kept: group -> the units that are left, in the numbering of the unpruned network; by default all.
            masks: parameter -> which weights may be other than zero; of others, those that are not, or never were. The
                layers themselves are plain ones (:func:`singe_plugin.masks.plain_weights`). Biases, norms, embeddings
                and other parameters can have masks, too: what comes after them gets other inputs.
            gone: parameters that are no part of the network any more, and stand in it at zero while it is repaired.

        Returns:
            every layer whose inputs are others than in the unpruned network, with its error before and after.
        """
        self.masks, self.gone = masks or {}, frozenset(gone)
        left: dict[Atom, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        readers: set[str] = set()
        self.unread: set[str] = set()
        for name, units in kept.items():
            leaf = self.graph.groups[name].leaf.root()
            mask = np.zeros(leaf.size, dtype=bool)
            mask[list(units)] = True
            if not mask.all():
                left[leaf] = mask
                mine = self.graph.groups[name].readers()
                readers |= mine
                if not mine:  # queries and keys: what goes is missing in their products
                    self.unread |= self.graph.groups[name].matrices()
        examples = max(examples_in(self.batches[0]), 1)
        self.targets = Targets(self.graph, left, self.options.positions, examples, self.seed)
        found: list[tuple[int, Solved]] = []
        with torch.autocast(model_device(pruned).type, enabled=False):  # casts would stand between layer and weight
            masked = [name for name, mask in self.masks.items() if not bool(mask.all())]
            own = current().division(self.batches[0]).of(len(self.batches))
            empty, played = not own, own or range(1)  # one of the others' shows how the layers are called
            players = [Player(self.original, self.forward, self.batches, mine=played)]
            players.append(Player(pruned, self.forward, self.batches, [*masked, *gone], played))
            for window in self.targets.windows(players[0], list(self._stages(*players))):
                targets = self.targets.collect(players[0], [site for stage in window for site in stage])
                for stage in window:
                    self._collect(players[1], stage, targets)
                    for site in stage:
                        site.include_others(empty)
                    found += [(site.numbers[0], self._solved(pruned, site)) for site in stage]
            renew_statistics(pruned, self.batches, self.forward, self._held_norms())
        current().align("the repaired weights", [tensor for _, tensor in named_tensors(pruned)])
        place = {number: place for place, number in enumerate(players[1].tape.order)}
        found += [(number, solved) for number, solved in self.left.values() if solved.name not in self.gone]
        layers = [solved for _, solved in sorted(found, key=lambda pair: place[pair[0]])]
        missed = sorted(readers - {solved.name for solved in layers} - self.gone)
        return layers + [Solved(name, reason=_UNKNOWN) for name in missed]

    def _stages(self, original: Player, pruned: Player) -> Iterator[list[Site]]:
        """What to solve, in forward order, together with what does not depend on it."""
        mine, theirs = dict(pruned.model.named_parameters()), dict(original.model.named_parameters())
        norms = {module: name for name, module in self.original.named_modules()}
        sites: dict[str, Site] = {}
        for number, (weight, bias, reads) in enumerate(pruned.tape.sites):
            if weight is not None:
                site = sites.setdefault(weight, Site(weight, bias))
                site.numbers.append(number)
                if readers := pruned.tape.read_by(weight):
                    site.reason = f"its parameter is read by {', '.join(readers)}, too"
                if original.tape.sites[number : number + 1] != [(weight, bias, reads)] or bias != site.bias:
                    site.reason = "the pruned network runs other operators than the unpruned one"
        for site in sites.values():
            site.find_bias(pruned.tape)
        self.open = {name: site.numbers for name, site in sites.items()}
        self.left: dict[str, tuple[int, Solved]] = {}
        changed = {MARKED}
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
            if differs or weight in self.unread or pruned.tape.depends[number] & changed:
                changed.add(number)
            if weight is None or weight in self.gone or sites[weight].numbers[0] != number:
                continue
            site = sites[weight]
            reach = frozenset().union(*(pruned.tape.depends[n] for n in site.numbers))
            if site.bias is None and site.added is None:
                owner = self.original.get_submodule(weight.rpartition(".")[0])
                norm = self.graph.trace.sole_reader(owner)
                site.norm = None if norm is None else norms[norm]
            loses = differs and self._loses(site, mine[weight], theirs[weight], reads)
            if not (loses or reach & changed):
                continue
            changed |= set(site.numbers)
            if reach & set(site.numbers):
                site.reason = (
                    site.reason or "what it reads depends on its own results (it is recurrent, or called again)"
                )
            self._find_sums(site, original, pruned)
            reach = reach.union(*(found.depends for found in site.sums.values()))
            if any(set(other.numbers) & reach for other in stage):
                yield stage
                stage = []
            stage.append(site)
        if stage:
            yield stage

    def _collect(self, player: Player, stage: list[Site], targets: list[dict[int, Target | None]]) -> None:
        """Run all batches through the pruned network, up to the last layer of a stage."""
        sites = {number: site for site in stage for number in site.numbers if site.reason is None}
        if not sites:
            return
        tape, model = player.tape, player.model
        first = min(sites)
        later = [tape.touched[name] for name, numbers in self.open.items() if max(numbers) >= first]
        start = min(tape.contracting[first], *later)  # these will still change
        sums = {number: site.sums[number] for number, site in sites.items() if number in site.sums}
        end = max([tape.contracting[max(sites)], *(tape.sums[number].step for number in sums)])
        waiting: dict[int, tuple[Contraction, Tensor, Target]] = {}

        def see(found: Contraction) -> None:
            if found.number in sites:
                site, target = sites[found.number], targets[batch].pop(found.number)
                weight = model.get_parameter(site.name)
                if not found.x.is_floating_point():
                    site.reason = f"it computes in {found.x.dtype}"
                elif target is None or not _fits(found, target):
                    site.reason = "its results in the pruned network are no part of those in the unpruned one"
                else:
                    self._find_silent(site, found)
                    x = inputs_at(found, weight.shape[2:], target.chosen)
                    if found.number in sums:
                        waiting[found.number] = found, x, target
                    else:
                        site.add(found, x, target.rows, len(self.batches))
            if tape.contracting[found.number] == end:
                raise Reached

        def watch(number: int, args: Any) -> None:
            found = tape.sums[number]
            if number in waiting:
                contraction, x, target = waiting.pop(number)
                assert target.beside is not None
                shift = target.beside - self.targets.beside(args[found.other], number, target.chosen, False)
                scale = sites[number].scale
                rows = target.rows + (shift if scale is None else shift * scale)
                sites[number].add(contraction, x, rows, len(self.batches))
            if found.step == end:
                raise Reached

        watches = {tape.sums[number].step: partial(watch, number) for number in sums}
        with player.ready():
            for batch in player.mine:
                player.play(batch, start, see, watches)

    def _find_sums(self, site: Site, original: Player, pruned: Player) -> None:
        """See where the results of a layer are added to what went wrong before: it can make up for that."""
        if site.name in self.targets.factors:
            return  # it is to give something else than it gave
        mine, theirs = ({n: p.tape.sums.get(n) for n in site.numbers} for p in (pruned, original))
        scales = set()
        for number in site.numbers:
            a, b = mine[number], theirs[number]
            if number >= len(self.graph.trace.contractions):
                return
            _, axes = self.graph.trace.contractions[number]
            rows = [axis for dim, axis in enumerate(axes) if dim != 1]
            if a is None or b is None or a.norm != b.norm or any(self.targets.left(axis) is not None for axis in rows):
                return
            if a.depends & set(site.numbers):
                return  # what it would make up for changes with it: a recurrent layer, step by step
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

    def _constant(self, site: Site) -> tuple[bool, Tensor | None]:
        """Whether an output without weights can give something, a constant; the mask of that, if only some can."""
        name = site.bias or site.added or (None if site.norm is None else f"{site.norm}.weight")
        stays = None if name is None else self.masks.get(name)
        return name is not None and stays is None, stays

    def _loses(self, site: Site, mine: Tensor, theirs: Tensor, reads: int) -> bool:
        """Whether a layer that differs does so at outputs that are not masked with all that they are made of."""
        (gives, stays), mask = self._constant(site), self.masks.get(site.name)
        if mask is None or gives or mine.shape != theirs.shape:
            return True
        live = mask.movedim(1 - reads, 0).flatten(1).any(1)
        if stays is not None and stays.shape != live.shape:
            return True
        live = live if stays is None else live | stays
        return not torch.equal(*(t.to(mask.device).movedim(1 - reads, 0)[live] for t in (mine, theirs)))

    def _find_silent(self, site: Site, found: Contraction) -> None:
        """See which outputs have neither weights nor a bias that could be other than zero: they give nothing."""
        (gives, stays), mask = self._constant(site), self.masks.get(site.name)
        if gives:
            return
        live = None if mask is None else matrix_of(found, mask).any(2).flatten()
        if stays is not None and site.norm is None and bool((~stays if live is None else live & ~stays).any()):
            site.reason = "its bias is masked at outputs whose weights are not"
        elif live is not None:
            site.live = live if stays is None else live | stays

    def _held_norms(self) -> set[str]:
        """The batch-norms that cannot be brought along: a shift would have to change that is masked."""
        found = set()
        for name, module in self.original.named_modules():
            shift, scale = self.masks.get(f"{name}.bias"), self.masks.get(f"{name}.weight")
            if is_batchnorm(module) and shift is not None:
                held = ~shift if scale is None else ~shift & scale
                found |= {name} if bool(held.any()) else set()
        return found

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
        elif norm is not None or site.added is not None:
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
            elif found.bias is not None and site.added is not None:
                behind_it = pruned.get_parameter(site.added).data
                behind_it.add_(found.bias.flatten().to(behind_it))
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


def _fits(found: Contraction, target: Target) -> bool:
    """Whether targets are for the channels and positions that a layer has."""
    chosen = target.chosen
    return target.rows.shape[1] == found.out.shape[1] and len(chosen) > 0 and int(chosen.max()) < positions_of(found)


def _differs(mine: Tensor, theirs: Tensor, reads: int) -> bool:
    """Whether a parameter lost inputs, along the dimension that reads, or was changed: trained, masked, solved."""
    if mine.shape == theirs.shape:
        return not torch.equal(mine, theirs.to(mine.device))
    return mine.shape[reads] != theirs.shape[reads]
