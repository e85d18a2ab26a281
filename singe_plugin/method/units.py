"""Which slices of which parameters make up a unit ("neuron").

A host (torch-pruning, NNI, ...) describes a group of coupled layers as a :class:`UnitGroup`; the scoring engine
reads nothing else. A *row* is the part of a tensor that produces one output channel: ``weight[n]`` of a
convolution, ``bias[n]``, ``weight[:, n]`` of a transposed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from singe_plugin.computed import REMEDY, weight_of_layer
from singe_plugin.errors import GroupError, TiedParameterError

__all__ = ["BlockLayout", "Producer", "RowLayout", "Slot", "UnitGroup", "refuse_tied", "subgroup", "tied_parameters"]


@dataclass(frozen=True)
class RowLayout:
    """Where the rows are in a tensor.

    Attributes:
        dim: the dimension that runs over the rows.
        groups: above 1 only for grouped *transposed* convolutions, whose weight is
            ``[groups * in_per_group, out_per_group, ...]``: row ``g * out_per_group + j`` is block g, column j.
        blocks: how many times the rows repeat along ``dim`` (3 for a packed q, k, v projection).

    Example:
        >>> import torch
        >>> RowLayout(dim=1).rows(torch.zeros(2, 5, 3)).shape
        torch.Size([5, 6])
    """

    dim: int = 0
    groups: int = 1
    blocks: int = 1

    @property
    def channels(self) -> RowLayout:
        """Where the output channels are: the layout of a batch-norm behind the layer, whatever rows the units see."""
        return RowLayout(self.dim, self.groups)

    def count(self, tensor: Tensor) -> int:
        """Count the rows in ``tensor``."""
        return tensor.shape[self.dim] * self.groups // self.blocks

    def rows(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as a matrix with one row per unit-producing row, ``[rows, -1]``."""
        if self.groups > 1:
            split = tensor.reshape(self.groups, -1, *tensor.shape[1:]).transpose(1, 2)
            return split.flatten(0, 1).flatten(1)
        moved = tensor.movedim(self.dim, 0)
        if self.blocks > 1:
            return moved.reshape(self.blocks, -1, *moved.shape[1:]).transpose(0, 1).flatten(1)
        return moved.reshape(moved.shape[0], -1)

    def spread(self, factors: Tensor, tensor: Tensor) -> Tensor:
        """Shape one factor per row so that ``tensor * spread(factors, tensor)`` scales the rows."""
        shape = [1] * tensor.ndim
        if self.groups > 1:
            per_group = factors.view(self.groups, 1, -1)
            wide = per_group.expand(-1, tensor.shape[0] // self.groups, -1).reshape(tensor.shape[0], -1)
            return wide.reshape(list(wide.shape) + shape[2:])
        shape[self.dim] = -1
        return factors.repeat(self.blocks).view(shape)


@dataclass(frozen=True)
class BlockLayout(RowLayout):
    """Units that are blocks of one tensor: single weights, columns, tiles; each block is a row of its own.

    Attributes:
        kernel: the block's extent along every dimension, -1 for all of it. Blocks are numbered in row-major order.
        dim, groups: where the output channels are (see :class:`RowLayout`), for a batch-norm that is folded in.

    Example:
        >>> import torch
        >>> BlockLayout(kernel=(-1, 2)).rows(torch.arange(8).view(2, 4)).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
        >>> BlockLayout(kernel=(1, 1)).rows(torch.zeros(2, 4)).shape
        torch.Size([8, 1])
    """

    kernel: tuple[int, ...] = ()

    def _sizes(self, tensor: Tensor) -> list[tuple[int, int]]:
        """Return, for every dimension, how many blocks there are and how large they are."""
        if len(self.kernel) != tensor.ndim:
            raise GroupError(f"a block of {self.kernel} does not fit a tensor of shape {tuple(tensor.shape)}")
        sizes = []
        for extent, size in zip(self.kernel, tensor.shape, strict=True):
            step = size if extent == -1 else extent
            if step < 1 or size % step:
                raise GroupError(
                    f"a tensor of shape {tuple(tensor.shape)} cannot be divided into blocks of {self.kernel}; choose "
                    "extents that divide its sizes"
                )
            sizes.append((size // step, step))
        return sizes

    def count(self, tensor: Tensor) -> int:
        return math.prod(number for number, _ in self._sizes(tensor))

    def rows(self, tensor: Tensor) -> Tensor:
        sizes = self._sizes(tensor)
        apart = tensor.reshape([part for pair in sizes for part in pair])
        order = [*range(0, 2 * tensor.ndim, 2), *range(1, 2 * tensor.ndim, 2)]
        return apart.permute(order).reshape(self.count(tensor), -1)

    def spread(self, factors: Tensor, tensor: Tensor) -> Tensor:
        sizes = self._sizes(tensor)
        wide = factors.view([part for number, _ in sizes for part in (number, 1)])
        return wide.expand([part for pair in sizes for part in pair]).reshape(tensor.shape)


@dataclass(frozen=True)
class Slot:
    """One parameter of a producer.

    Attributes:
        owner: the module that holds the parameter.
        attr: its name there (``"weight"``).
        layout: where the rows are.
        places: every other ``(module, name)`` that holds the same parameter (tied weights), where it decays, too.
    """

    owner: nn.Module
    attr: str
    layout: RowLayout = field(default_factory=RowLayout)
    places: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def tensor(self) -> Tensor | None:
        """The parameter as it is now (removals replace it), or None if the layer has none (``bias=False``)."""
        if self.attr not in self.owner._parameters:
            computed = weight_of_layer(self.owner, self.attr)
            if computed is not None:
                return computed.value()
            raise GroupError(
                f"{type(self.owner).__name__}.{self.attr} is no parameter, and none that torch.nn.utils.parametrize, "
                f"weight_norm, spectral_norm or prune compute; {REMEDY}"
            )
        return self.owner._parameters[self.attr]

    def parameters(self) -> list[Tensor]:
        """What of the model it is: the parameter, or those that a layer computes it from."""
        computed = None if self.attr in self.owner._parameters else weight_of_layer(self.owner, self.attr)
        places = [(self.owner, self.attr)] if computed is None else computed.sources()
        return [p for owner, attr in places if (p := owner._parameters.get(attr)) is not None]


@dataclass(frozen=True)
class Producer:
    """One layer of a group that writes its units: rows, bias, and the batch-norm folded into them.

    Attributes:
        name: the qualified name of the layer or parameter.
        slots: its parameters; the first one's rows define the row numbers.
        rows: ``[m]`` int64, the rows that belong to units of the group.
        units: ``[m]`` int64, the unit of each of those rows.
        norm: a batch-norm that reads this layer alone and can be folded into it, or None.
        is_norm: whether the layer is itself a batch-norm that stands alone; its running statistics are then
            part of its scale and shift.
        bias: the layer's bias where it is no part of any unit (single weights, columns) and a batch-norm is folded
            in: it takes the shift and does not decay.
    """

    name: str
    slots: tuple[Slot, ...]
    rows: Tensor
    units: Tensor
    norm: nn.Module | None = None
    is_norm: bool = False
    bias: Slot | None = None

    def unit_of_row(self) -> Tensor:
        """Return the unit of each row of the layer, ``[rows]`` int64, -1 for rows that belong to none."""
        tensor = self.slots[0].tensor
        if tensor is not None:
            count = self.slots[0].layout.count(tensor)
        else:
            count = int(self.rows.max()) + 1 if len(self.rows) else 0
            features = getattr(self.slots[0].owner, "num_features", count)
            count = max(count, int(features))
        owner = torch.full((count,), -1, dtype=torch.int64)
        owner[self.rows] = self.units
        return owner


@dataclass(frozen=True)
class UnitGroup:
    """A set of coupled layers and the units that can be removed from them together.

    Attributes:
        name: how messages call it (the root layer's qualified name).
        size: the number of units.
        producers: every layer that writes the units, the root first. Layers that only *read* them are not here.

    Raises:
        GroupError: if two producers name the same parameter: one would overwrite what the other made of it.
    """

    name: str
    size: int
    producers: tuple[Producer, ...]

    def __post_init__(self) -> None:
        seen: dict[tuple[nn.Module, str], str] = {}
        for producer in self.producers:
            for slot in producer.slots:
                other = seen.setdefault((slot.owner, slot.attr), producer.name)
                if other is not producer.name or sum(s == slot for s in producer.slots) > 1:
                    raise GroupError(
                        f"group {self.name!r}: {slot.attr!r} of {type(slot.owner).__name__} is a producer twice "
                        f"({other} and {producer.name}); its units cannot decay along two dimensions at once, so put "
                        "the layer in ignored_layers"
                    )

    def slots(self) -> Iterator[Slot]:
        """Yield all parameters of all producers."""
        for producer in self.producers:
            yield from producer.slots


def subgroup(group: UnitGroup, units: Tensor) -> UnitGroup:
    """Make a group of some of the units only, numbered anew in the given order.

    Args:
        group: the group.
        units: ``[k]`` int64, distinct.

    Example:
        >>> import torch
        >>> rows = torch.arange(4)
        >>> net = torch.nn.Linear(2, 4)
        >>> group = UnitGroup("net", 4, (Producer("net", (Slot(net, "weight"),), rows, rows),))
        >>> subgroup(group, torch.tensor([3, 1])).producers[0].rows.tolist()
        [1, 3]
    """
    number = torch.full((group.size,), -1, dtype=torch.int64)
    number[units] = torch.arange(len(units))
    kept = []
    for producer in group.producers:
        mine = number[producer.units]
        if bool((mine >= 0).any()):
            kept.append(replace(producer, rows=producer.rows[mine >= 0], units=mine[mine >= 0]))
    return UnitGroup(group.name, len(units), tuple(kept))


def tied_parameters(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Find the parameters that are registered in more than one place, as ``id(parameter) -> all their names``.

    A *module* that is registered or called twice is not a tie: it has one weight, and one place to slice it.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> list(tied_parameters(model).values())
        [('0.weight', '1.weight')]
    """
    places: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(f"{module_name}.{attr}" if module_name else attr)
    return {key: tuple(names) for key, names in places.items() if len(names) > 1}


def refuse_tied(group: UnitGroup, ties: dict[int, tuple[str, ...]]) -> None:
    """Raise :class:`TiedParameterError` if a producer shares a parameter with a layer that it does not know."""
    for slot in group.slots():
        for tensor in slot.parameters():
            names: Sequence[str] = ties.get(id(tensor), ())
            if len(names) <= 1 + len(slot.places):
                continue
            raise TiedParameterError(
                f"group {group.name!r}: the parameters {' and '.join(map(repr, names))} are one tensor, so its "
                "rows cannot be decayed or removed in one place alone; untie them (clone one) or put the layer in "
                "ignored_layers"
            )
