"""Sets of units that are ranked together: what NNI's target spaces and the groups of the model make of each other.

A *piece* has units; each of its members, a target ``(layer, parameter)`` of NNI's, says which unit every entry of its
metric belongs to. The channels of layers that are added to each other are one piece with several members, so their
masks are equal by construction. A layer that shares its channels with nobody, columns, tiles and single weights are
pieces of one member.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import is_active_target
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph
from singe_plugin.axes.values import Values
from singe_plugin.errors import ConfigError
from singe_plugin.masks import LAYERS
from singe_plugin.method.folding import is_batchnorm
from singe_plugin.method.units import BlockLayout, Producer, RowLayout, Slot, UnitGroup
from singe_plugin.nested import tensors_in
from singe_plugin.state import preserved

__all__ = ["Key", "MaskedGroup", "Spaces", "build_pieces", "called", "followers_of", "kernel_of", "metric_shape"]

Key = tuple[str, str]  # the name of a module, and of its parameter
Spaces = Mapping[str, Mapping[str, PruningTargetSpace]]
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass
class MaskedGroup:
    """Units that are ranked together.

    Attributes:
        name: the name of the group, or of the target.
        size: the number of units.
        members: the targets; each has the unit of every entry of its metric, or -1 where that belongs to none.
        sources: what is scored; the mean over them is a unit's score.
        followers: the parameters of norms that are masked along, in the form of ``members``.
        by_weights: whether F does not depend on the piece (auxiliary heads), so that only weights can be ranked.
        missing: the layers that write the same channels but are not in the config list.
    """

    name: str
    size: int
    members: dict[Key, Tensor]
    sources: tuple[UnitGroup, ...]
    followers: dict[Key, Tensor] = field(default_factory=dict)
    by_weights: bool = False
    missing: tuple[str, ...] = ()

    def spread(self, key: Key, values: Tensor, rest: float) -> Tensor:
        """Turn one value per unit into one per entry of a member's metric (flat)."""
        labels = {**self.members, **self.followers}[key].to(values.device)
        chosen = values[labels.clamp(min=0)]
        return torch.where(labels >= 0, chosen, torch.full_like(chosen, rest))

    def gathered(self, metrics: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return one score per unit, the mean over all entries of all members."""
        total = count = torch.zeros(self.size, dtype=torch.float64)
        for (module, target), labels in self.members.items():
            metric = metrics[module][target].detach().double().flatten()
            chosen, mine = metric[(labels >= 0).to(metric.device)], labels[labels >= 0].to(metric.device)
            total = total.to(metric.device).index_add(0, mine, chosen)
            count = count.to(metric.device).index_add(0, mine, torch.ones_like(chosen))
        return total / count.clamp(min=1)


def metric_shape(space: PruningTargetSpace) -> list[int]:
    """Return the shape of a target's metric, which has one entry per block that its granularity makes."""
    target = space.target
    assert target is not None
    return [1 if k == -1 else size // k for k, size in zip(kernel_of(space), target.shape, strict=True)]


def kernel_of(space: PruningTargetSpace) -> tuple[int, ...]:
    """Return the extent of a block along every dimension of the parameter."""
    ndim = len(space.shape or ())
    scaler = space._scaler
    if scaler is None:
        return (1,) * ndim
    padded = scaler._padding(scaler.kernel_size, ndim, scaler.kernel_padding_val, scaler.kernel_padding_mode)
    return tuple(int(k) for k in padded)


def build_pieces(model: nn.Module, spaces: Spaces, graph: AxisGraph | None, coupled: bool) -> list[MaskedGroup]:
    """Return the pieces of all targets that have a ratio or a threshold, in forward order.

    Args:
        model: the model, unwrapped or in its plain view.
        spaces: NNI's target spaces.
        graph: the groups of the model; None if there are none.
        coupled: whether layers that write the same channels share their units.

    Raises:
        ConfigError: if targets of one ``dependency_group_id`` do not fit each other.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    channels: list[Key] = []
    pieces: list[MaskedGroup] = []
    for name, targets in spaces.items():
        for attr, space in targets.items():
            if not is_active_target(space) or space.target is None:
                continue
            if attr == "weight" and space.granularity == "out_channel":
                channels.append((name, attr))
            else:
                pieces.append(_block_piece(modules[name], (name, attr), space))
    covered: dict[Key, Tensor] = {}
    if graph is not None and coupled:
        for piece in _group_pieces(graph, channels, modules):
            pieces.append(piece)
            for key, labels in piece.members.items():
                covered[key] = covered.get(key, torch.zeros(len(labels), dtype=torch.bool)) | (labels >= 0)
    for key in channels:
        count = math.prod(metric_shape(spaces[key[0]][key[1]]))
        rest = torch.arange(count) if key not in covered else (~covered[key]).nonzero().flatten()
        if len(rest):
            pieces.append(_lone_piece(modules[key[0]], key, rest, count, graph))
    traced = {} if graph is None else {graph.names[m]: i for m, i in graph.trace.order.items() if m in graph.names}
    order = {name: (traced.get(name, 1 << 30), number) for number, name in enumerate(modules)}
    pieces.sort(key=lambda p: min((*order[name], target) for name, target in p.members))
    pieces = list(_merged(pieces, spaces))
    own = {name for piece in pieces for name, target in piece.members if target == "weight"}
    taken: set[str] = set()
    for piece in pieces:
        piece.followers = {key: labels for key, labels in piece.followers.items() if key[0] not in own}
        names = (piece.name, *(f"{piece.name}#{number}" for number in range(2, len(pieces) + 2)))
        piece.name = next(name for name in names if name not in taken)
        taken.add(piece.name)
    return pieces


def _group_pieces(graph: AxisGraph, channels: list[Key], modules: Mapping[str, nn.Module]) -> Iterator[MaskedGroup]:
    """Yield the pieces of layers whose channels belong to a group of the model."""
    wanted = {modules[name]: (name, attr) for name, attr in channels}
    for group in graph.groups.values():
        if group.secondary:
            continue
        units = group.unit_group()
        members: dict[Key, Tensor] = {}
        scored: list[Producer] = []
        missing: list[str] = []
        for producer in units.producers:
            owner = producer.slots[0].owner
            mine = [m for m in (owner, producer.norm) if m in wanted and _is_channel_dim(m, producer)]
            for module in mine:
                members[wanted[module]] = producer.unit_of_row()
            if mine:
                scored.append(producer)
            elif not _is_affine(owner) and not _only_scales(graph, units, producer):
                missing.append(producer.name)
        if not members:
            continue
        complete = not missing
        names = [name for name, _ in members]
        yield MaskedGroup(
            group.name if group.name.split("#")[0] in names else names[0],
            units.size,
            members,
            (units if complete else UnitGroup(units.name, units.size, tuple(scored)),),
            _followers(graph, units.producers if complete else tuple(scored), complete, members),
            group.only_training,
            tuple(missing),
        )


def _is_channel_dim(module: nn.Module, producer: Producer) -> bool:
    """Say whether what NNI calls a layer's output channels is what it writes; of an embedding it is the vocabulary."""
    slot = producer.slots[0]
    return slot.owner is not module or slot.layout.dim == (1 if isinstance(module, _TRANSPOSED) else 0)


def _is_affine(module: nn.Module) -> bool:
    """Say whether a module is a norm, a layer scale or the like: some numbers per channel, no layers inside."""
    own = [p for p in module._parameters.values() if p is not None]
    leaf = next(module.children(), None) is None and not isinstance(module, (*LAYERS, nn.Embedding))
    return is_batchnorm(module) or (leaf and bool(own) and all(p.ndim == 1 for p in own))


def _only_scales(graph: AxisGraph, group: UnitGroup, producer: Producer) -> bool:
    """Say whether a parameter that a block holds itself only scales what the layers write (a layer scale).

    With what the layers write at zero, it then has no influence; a position embedding has.
    """
    if isinstance(producer.slots[0].owner, (*LAYERS, nn.Embedding)):
        return False
    values = Values()
    with preserved(graph.model), torch.no_grad():
        graph.model.eval()
        try:
            for other in group.producers:
                layers = isinstance(other.slots[0].owner, (*LAYERS, nn.Embedding))
                norm = [] if other.norm is None else [Slot(other.norm, attr) for attr in ("weight", "bias")]
                for slot in (*other.slots, *norm) if layers else ():
                    if (tensor := slot.tensor) is not None:
                        stays = (other.unit_of_row() < 0).to(tensor)
                        values.put(tensor, tensor * slot.layout.spread(stays, tensor))
            before = list(tensors_in(graph.forward(graph.model, graph.inputs)))
            for slot in producer.slots:
                if (tensor := slot.tensor) is not None:
                    values.put(tensor, tensor + torch.randn_like(tensor))
            after = list(tensors_in(graph.forward(graph.model, graph.inputs)))
        finally:
            values.restore()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def called(graph: AxisGraph, module: nn.Module) -> bool:
    """Say whether a module runs or is not used at all; it does not where the model only reads its parameters."""
    return module in graph.trace.inputs or module not in graph.trace.order


def followers_of(
    model: nn.Module, graph: AxisGraph, chosen: Collection[str], coupled: bool
) -> dict[str, tuple[str, ...]]:
    """Return the norms and layer scales that are masked along with the chosen layers, with their parameters' names."""
    modules = dict(model.named_modules())
    names: list[str] = []
    for name, module in modules.items():
        norm = graph.trace.sole_reader(module) if name in chosen else None
        names += [graph.names[norm]] if norm is not None else []
    for group in graph.groups.values() if coupled else ():
        if not group.secondary and set(chosen) & set(group.writers):
            producers = group.unit_group().producers
            names += [graph.names[m] for p in producers for m in (p.slots[0].owner, p.norm) if m is not None]
    names = [name for name in names if called(graph, modules[name])]
    own = {n: [a for a, p in modules[n]._parameters.items() if p is not None] for n in names if n not in chosen}
    return {name: tuple(attrs) for name, attrs in own.items() if attrs and _is_affine(modules[name])}


def _followers(
    graph: AxisGraph, producers: tuple[Producer, ...], complete: bool, members: Mapping[Key, Tensor]
) -> dict[Key, Tensor]:
    found: dict[Key, Tensor] = {}
    for producer in producers:
        owner = producer.slots[0].owner
        followers = [(producer.norm, attr) for attr in ("weight", "bias") if producer.norm is not None]
        if complete and _is_affine(owner):
            followers += [(owner, slot.attr) for slot in producer.slots]
        for module, attr in followers:
            if module._parameters.get(attr) is not None and (graph.names[module], "weight") not in members:
                found[graph.names[module], attr] = producer.unit_of_row()
    return found


def _lone_piece(module: nn.Module, key: Key, rows: Tensor, count: int, graph: AxisGraph | None) -> MaskedGroup:
    """Make a piece of output channels that no other layer shares, each of which is a unit."""
    name, _ = key
    norm: nn.Module | None = None
    is_norm = is_batchnorm(module)
    layout = RowLayout(1 if isinstance(module, _TRANSPOSED) else 0)
    if graph is not None and isinstance(module, LAYERS):
        norm = graph.norm_of(module)
    slots = [Slot(module, "weight", layout)]
    if "bias" in module._parameters or is_norm:
        slots.append(Slot(module, "bias"))
    units = torch.arange(len(rows))
    producer = Producer(name, tuple(slots), rows, units, norm, is_norm)
    labels = torch.full((count,), -1, dtype=torch.int64)
    labels[rows] = units
    piece = MaskedGroup(name, len(rows), {key: labels}, (UnitGroup(name, len(rows), (producer,)),))
    if graph is not None:
        piece.followers = _followers(graph, (producer,), False, piece.members)
    return piece


def _block_piece(module: nn.Module, key: Key, space: PruningTargetSpace) -> MaskedGroup:
    """Make a piece of blocks of one parameter: columns, tiles or single weights."""
    count = math.prod(metric_shape(space))
    units = torch.arange(count)
    slot = Slot(module, key[1], BlockLayout(kernel=kernel_of(space)))
    name = ".".join(key)
    group = UnitGroup(name, count, (Producer(name, (slot,), units, units),))
    return MaskedGroup(name, count, {key: units.clone()}, (group,))


def _merged(pieces: list[MaskedGroup], spaces: Spaces) -> Iterator[MaskedGroup]:
    """Pieces whose targets have the same ``dependency_group_id`` become one."""
    families: dict[Any, list[MaskedGroup]] = {}
    for piece in pieces:
        ids = {i for module, target in piece.members if (i := spaces[module][target].dependency_group_id) is not None}
        if len(ids) > 1:
            raise ConfigError(
                f"the layers {_names(piece)} write the same channels, but have different dependency_group_ids "
                f"({', '.join(map(str, sorted(ids, key=str)))}); give them one"
            )
        families.setdefault(ids.pop() if ids else object(), []).append(piece)
    for identity, family in families.items():
        yield family[0] if len(family) == 1 else _join(identity, family, spaces)


def _join(identity: Any, family: list[MaskedGroup], spaces: Spaces) -> MaskedGroup:
    """Make one piece of several, whose i-th channels are masked together."""
    anchors = [
        (piece, labels)
        for piece in family
        for (module, target), labels in piece.members.items()
        if spaces[module][target].dependency_group_id is not None
    ]
    lengths = {len(labels) for _, labels in anchors}
    if len(lengths) > 1 or any(bool((labels < 0).any()) for _, labels in anchors):
        sizes = ", ".join(f"{_names(piece)}: {len(labels)}" for piece, labels in anchors)
        raise ConfigError(
            f"dependency_group_id={identity!r} joins layers of different numbers of channels ({sizes}); layers of one "
            "id are masked alike, so they must be of one size"
        )
    joint = torch.arange(lengths.pop())
    while True:  # channels of one unit in any member are one unit
        before = joint.clone()
        for piece, labels in anchors:
            least = torch.full((piece.size,), len(joint)).scatter_reduce(0, labels, joint, "amin")
            joint = torch.minimum(joint, least[labels])
        if torch.equal(before, joint):
            break
    numbers, joint = torch.unique(joint, return_inverse=True)
    members: dict[Key, Tensor] = {}
    followers: dict[Key, Tensor] = {}
    sources: list[UnitGroup] = []
    for piece in family:
        new = torch.full((piece.size,), -1, dtype=torch.int64)
        for other, labels in anchors:
            if other is piece:
                new[labels] = joint
        if bool((new < 0).any()):
            raise ConfigError(
                f"dependency_group_id={identity!r}: the layers {_names(piece)} share their channels, and the one with "
                "the id has only some of them; give the id to the widest of them"
            )
        for found, table in ((piece.members, members), (piece.followers, followers)):
            table.update({key: torch.where(own >= 0, new[own.clamp(min=0)], own) for key, own in found.items()})
        for source in piece.sources:
            producers = tuple(replace(p, units=new[p.units]) for p in source.producers)
            sources.append(UnitGroup(source.name, len(numbers), producers))
    first = family[0]
    by_weights = any(p.by_weights for p in family)
    missing = tuple(m for p in family for m in p.missing)
    return MaskedGroup(first.name, len(numbers), members, tuple(sources), followers, by_weights, missing)


def _names(piece: MaskedGroup) -> str:
    return " and ".join(repr(module) for module in dict.fromkeys(name for name, _ in piece.members))
