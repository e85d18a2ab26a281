"""The network before pruning, held to repair the one that is pruned; ``singe_plugin.repair`` for any pruned network."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from singe_plugin.axes.algebra import Axis, labels, leaves
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.parameters import Held
from singe_plugin.errors import ConfigError, DataError, GroupError
from singe_plugin.fields import as_options
from singe_plugin.loop.distillation import frozen_copy
from singe_plugin.loop.events import Repaired
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.repairer import Repairer
from singe_plugin.loop.stand_ins import blocks_gone, standing_in
from singe_plugin.masks import fold_masks, masks_of, plain_weights
from singe_plugin.method.batches import has_targets, inputs_for, inputs_only, read
from singe_plugin.method.step import BatchObjective
from singe_plugin.nested import call_model, examples_in, to_device
from singe_plugin.rollback import Trackers, all_or_nothing
from singe_plugin.state import model_device

__all__ = ["Unpruned", "images_of", "repair", "survivors"]

_logger = logging.getLogger("singe_plugin")
Forward = Callable[[nn.Module, Any], Any]


def images_of(batches: Iterable[Any], count: int, model: nn.Module | None = None, objective: Any = None) -> list[Any]:
    """Return the inputs of batches, up to a number of examples; batches may have targets or not.

    The last batch is left out if it is smaller than the others, unless it is the only one. Of a mapping, targets that
    the model's forward pass takes stay. A :class:`~singe_plugin.BatchObjective` says what the inputs of a batch are.

    Raises:
        DataError: if there is none.

    Example:
        >>> [len(x) for x in images_of([(torch.zeros(4, 2), torch.zeros(4))] * 3, 8)]
        [4, 4]
    """
    found: list[Any] = []
    examples = 0
    for batch in read(batches, "reading the images for the repair"):
        if isinstance(objective, BatchObjective):
            batch = (objective.inputs_of(batch), None)
        takes = model is not None and isinstance(batch, Mapping) and has_targets(batch)
        inputs = inputs_for(model, batch)[0] if model is not None and takes else inputs_only(batch)
        size = examples_in(inputs)
        if found and size < examples_in(found[0]):
            break
        found.append(inputs)
        examples += size
        if examples >= count:
            break
    if not found:
        raise DataError("there are no images to repair on: the data gives no batch; give some, or repair=None")
    return found


class Unpruned:
    """A network as it was before pruning, and the repair of what becomes of it.

    Args:
        model: what is pruned.
        batches: inputs.
        options: how.
        graph: its axes, whose groups know which units are left; None if none are removed, but weights masked.
        ignored: modules and parameters whose units stay, as in the graph.
        forward: how the model is called with the batches.
        seed: of the choice of positions.
        needed: whether it is an error if the model cannot be copied; else that is said, and nothing is repaired.
        plain: lets layers be plain ones while they are solved, and gives their masks.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], options: Repair, graph: AxisGraph | None = None,
        ignored: Collection[Any] = (), forward: Forward = call_model, seed: int = 0, needed: bool = True,
        plain: Callable[[nn.Module], AbstractContextManager[Mapping[str, Tensor]]] = plain_weights,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.options, self.forward, self.seed = model, batches, options, forward, seed
        self._groups = {} if graph is None else graph.groups
        self._ignored, self._needed, self._plain = ignored, needed, plain
        self._copy: nn.Module | None = None
        self._masks: dict[str, Tensor] = {}  # of the model when it was copied
        self._repairer: Repairer | None = None
        self._dirty = False

    def hold(self, anew: bool = False) -> None:
        """Copy the model as it is now, if nothing was removed from it yet.

        Args:
            anew: whether it is copied again if there is a copy: it may have been trained in between.

        Raises:
            ConfigError: if it cannot be copied.
        """
        removed = any(group.size < group.initial for group in self._groups.values())
        removed = removed or (self._copy is not None and bool(blocks_gone(self._copy, self.model)))
        if removed or (self._copy is not None and not (anew and self._same_masks())):
            return
        try:
            self._copy, self._repairer = frozen_copy(self.model, "the repair needs", "give repair=None"), None
        except ConfigError as error:
            if self._needed:
                raise
            _logger.warning("the survivors do not take over: %s", error)
            return
        self._masks = fold_masks(self._copy)

    def _same_masks(self) -> bool:
        """Whether no weight was masked since the model was copied."""
        now = masks_of(self.model)
        return now.keys() == self._masks.keys() and all(
            torch.equal(now[n].to(m.device), m) for n, m in self._masks.items()
        )

    def _made(self, copy: nn.Module) -> Repairer:
        """What repairs with the copy as the target."""
        model = self.model
        names = {id(part): name for name, part in (*model.named_modules(), *model.named_parameters())}
        given = [names[id(part)] for part in self._ignored if id(part) in names]
        modules, parameters = dict(copy.named_modules()), dict(copy.named_parameters())
        batches = [to_device(batch, model_device(model)) for batch in self.batches]
        graph = AxisGraph(
            copy, batches[0], [modules[n] for n in given if n in modules],
            [parameters[n] for n in given if n in parameters], self.forward,
        )  # fmt: skip
        return Repairer(copy, graph, batches, self.options, self.seed, self.forward)

    def begin(self) -> None:
        """Note that a run begins or goes on: what went in rounds that are over was repaired then."""
        if self.options.every == "round":
            self._dirty = False

    def rewinder(self) -> Callable[[], None]:
        """Return a function that puts back whether there is something to repair."""
        dirty = self._dirty

        def rewind() -> None:
            self._dirty = dirty

        return rewind

    def removed(self) -> None:
        """Note that something was removed."""
        self._dirty = True

    def is_due(self, last: bool) -> bool:
        """Whether :meth:`repair` would do something now."""
        return self._copy is not None and self._dirty and (self.options.every == "round" or last)

    def on(self, batches: Sequence[Any]) -> None:
        """Repair on other inputs from now on."""
        self.batches, self._repairer = batches, None

    def repair(self, last: bool, emas: Sequence[nn.Module]) -> Repaired | None:
        """Repair the model if it is time.

        Args:
            last: whether nothing else will be removed.
            emas: averaged copies, which get the solved weights, too.
        """
        if self._copy is None or not self.is_due(last):
            return None
        if self._repairer is None:
            self._repairer = self._made(self._copy)
        start = time.perf_counter()
        model = self.model
        values = {name: tensor.clone() for name, tensor in _tensors(model).items()} if emas else {}
        kept = {name: group.left for name, group in self._groups.items()}
        with self._plain(model) as masks, standing_in(self._repairer.graph, model, kept) as gone:
            found = self._repairer.repair(model, kept, masks, gone)
        for ema in emas:
            twins = _tensors(ema)
            for name, tensor in _tensors(model).items():
                if name in twins and not torch.equal(values[name], tensor):
                    twins[name].data.copy_(tensor)
        self._dirty = False
        return Repaired(tuple(found), time.perf_counter() - start)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def repair(
    pruned: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    options: Repair | int | None = None,
    *,
    kept: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    forward: Forward = call_model,
) -> Repaired:
    """Let the survivors of a pruning take over, in closed form and without labels; whoever pruned it.

    Every layer of the pruned network that gets other inputs than in the unpruned one is solved again by ridge
    regression, so that it gives the unpruned network's outputs from what is left (see
    :mod:`singe_plugin.loop.repairer`), and its batch-norms are brought along. Masks are kept: those that
    :func:`~singe_plugin.hold_masks` put on say which weights may be solved; of a layer without one, a weight that is
    zero here and was not there stays zero.

    Args:
        pruned: the network with units removed, or with zeros in its weights; it changes in place.
        original: the same network before.
        batches: inputs, or ``(inputs, targets)`` of which the targets are not read; two inputs without targets are
            ``((a, b), None)``.
        options: a :class:`~singe_plugin.Repair`, or a number of images.
        kept: group -> the units that are left, in the numbering of the original; None finds out by looking for the
            weights of the one in the other, which must not have been trained in between.
        seed: of the choice of positions.
        forward: how the networks are called with the inputs.

    Returns:
        what became of the layers.

    Raises:
        GroupError: if it cannot be found out which units are left.
        SingeError: if something fails; the network is as it was before.

    Example:
        >>> import copy, torch, singe_plugin
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> smaller, x = copy.deepcopy(net), torch.randn(64, 4)
        >>> _ = singe_plugin.SInGEPruner(smaller, x, lambda group: torch.arange(8.0), pruning_ratio=0.5).step()
        >>> before = (smaller(x) - net(x)).square().mean()
        >>> singe_plugin.repair(smaller, net, [x]).better[0].name, bool((smaller(x) - net(x)).square().mean() < before)
        ('2.weight', True)
    """
    if pruned is original:
        raise ConfigError("pruned and original are one object; give the network before pruning, e.g. a copy of it")
    chosen = as_options(Repair, options, "options", "images")
    here, there = model_device(pruned), model_device(original)
    if here != there:
        raise ConfigError(f"the pruned network is on {here} and the original on {there}; move one: .to({str(here)!r})")
    inputs = [to_device(batch, here) for batch in images_of(batches, chosen.images, pruned)]
    start = time.perf_counter()
    with all_or_nothing(pruned, None, Trackers(), None), plain_weights(original), plain_weights(pruned) as masks:
        graph = AxisGraph(original, inputs[0], forward=forward)
        left = survivors(graph, pruned) if kept is None else kept
        unknown = [name for name in left if name not in graph.groups]
        if unknown:
            raise GroupError(
                f"kept: {unknown[0]!r} is no group of the network; the groups are {', '.join(graph.groups)}"
            )
        with standing_in(graph, pruned, left) as gone:
            found = Repairer(original, graph, inputs, chosen, seed, forward).repair(pruned, left, masks, gone)
    return Repaired(tuple(found), time.perf_counter() - start)


def survivors(graph: AxisGraph, pruned: nn.Module) -> dict[str, list[int]]:
    """Find out which units of a network are left in a pruned copy, by looking for its weights in the original's.

    Args:
        graph: of the original.
        pruned: the copy.

    Raises:
        GroupError: if a layer is smaller, and its weights are not a part of the original's.

    Example:
        >>> import copy
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> smaller = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     _ = smaller[0].weight.copy_(net[0].weight[[1, 6]])
        >>> survivors(AxisGraph(net, torch.zeros(1, 4)), smaller)
        {'0': [1, 6]}
    """
    modules = dict(pruned.named_modules())
    gone: dict[Any, set[int]] = {}  # leaf -> units
    missing = tuple(f"{name}." for name in blocks_gone(graph.model, pruned))
    there = [held for held in graph.held if not (missing and f"{graph.names[held.owner]}.".startswith(missing))]
    todo = [(held, _twin(graph, modules, held)) for held in there]
    for held, tensor in todo:
        if tensor.ndim != held.tensor.ndim:
            raise GroupError(f"{graph.names[held.owner]}.{held.attr} has another number of dimensions when pruned")
    open_dims = [(h, t, d) for h, t in todo for d in range(t.ndim) if t.shape[d] != h.tensor.shape[d]]
    while open_dims:
        rest = []
        for held, tensor, dim in open_dims:
            known, whole = _positions(held.axes[dim], gone), held.tensor.detach()
            if known is not None and len(known) == tensor.shape[dim]:
                continue
            for other in (d for d in range(tensor.ndim) if d != dim):
                left = _positions(held.axes[other], gone)
                if left is not None:
                    whole = whole.index_select(other, torch.as_tensor(left, device=whole.device))
            found = None
            if all(whole.shape[d] == tensor.shape[d] for d in range(tensor.ndim) if d != dim):
                found = _matched(*(t.transpose(0, dim).reshape(t.shape[dim], -1) for t in (whole, tensor.detach())))
            if found is None:
                rest.append((held, tensor, dim))
                continue
            for leaf in dict.fromkeys(leaves(held.axes[dim])):
                units = labels(held.axes[dim], leaf)
                stays = set(units[found].tolist())
                gone.setdefault(leaf.root(), set()).update(u for u in range(leaf.root().size) if u not in stays)
        if len(rest) == len(open_dims):
            held, tensor, dim = rest[0]
            raise GroupError(
                f"{graph.names[held.owner]}.{held.attr} is {tuple(tensor.shape)} in the pruned network and "
                f"{tuple(held.tensor.shape)} before, and its weights are no part of these: it was trained since, "
                "or is of another network; say which units are left: kept={group: units}"
            )
        open_dims = rest
    return {
        name: [u for u in range(group.size) if u not in gone[group.leaf.root()]]
        for name, group in graph.groups.items()
        if gone.get(group.leaf.root())
    }


def _twin(graph: AxisGraph, modules: Mapping[str, nn.Module], held: Held) -> Tensor:
    name = graph.names[held.owner]
    owner = modules.get(name)
    tensor = None if owner is None else owner._parameters.get(held.attr, owner._buffers.get(held.attr))
    if tensor is None:
        raise GroupError(f"the pruned network has no {name}.{held.attr}; give the network that it was pruned from")
    return tensor


def _positions(axis: Axis, gone: Mapping[Any, set[int]]) -> Any:
    """The positions along an axis that are left, as far as it is known what is gone; None if nothing is."""
    stays = None
    for leaf in dict.fromkeys(leaves(axis)):
        if missing := gone.get(leaf.root()):
            here = ~np.isin(labels(axis, leaf), list(missing))
            stays = here if stays is None else stays & here
    return None if stays is None else np.flatnonzero(stays)


def _matched(whole: Tensor, part: Tensor) -> Any:
    """Which rows of ``whole`` the rows of ``part`` are, in order; None if they are not, or if that is not clear."""
    if whole.dtype != part.dtype or whole.shape[1] != part.shape[1]:
        return None
    places: dict[bytes, list[int]] = {}
    for place, key in enumerate(_keys(whole)):
        places.setdefault(key, []).append(place)
    hits = [places.get(key, []) for key in _keys(part)]
    found = [place for hit in hits for place in hit]
    return np.asarray(found) if all(len(hit) == 1 for hit in hits) and found and found == sorted(found) else None


def _keys(rows: Tensor) -> Iterator[bytes]:
    """A short key for every row: comparing each with each takes too long where there are thousands."""
    same = (rows.detach() + 0).cpu()  # there are two zeros
    data = same.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
    for row in data:
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()
