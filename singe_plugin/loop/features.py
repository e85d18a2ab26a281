r"""Distillation from features: what layers give is compared with what they gave, at the units that are left.

The student has fewer channels than its teacher, and which these are is known: they are compared with the teacher's of
the same units, without a projection in between and without parameters of its own. For a layer with the outputs
:math:`h` of the student, and :math:`h^t` of the teacher at the positions that the student still has, the term is

.. math::
    \frac{\operatorname{mean}\bigl((h-h^t)^2\bigr)}{\operatorname{mean}\bigl((h^t)^2\bigr)}

and the mean of it over the layers is added to the loss (see :class:`~singe_plugin.Distill`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from singe_plugin.axes.algebra import Axis, labels, leaves
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.groups import Group
from singe_plugin.checks import closest
from singe_plugin.errors import ConfigError
from singe_plugin.nested import tensors_in
from singe_plugin.state import model_device

__all__ = ["Features", "relative_error", "watched"]

_LISTED = 40  # names of modules in an error
_ANOTHER = "name another module, e.g. the block that it is in"


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error relative to the teacher's mean square; of a teacher's zeros, the error itself.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))  # 4 / 12.5
        tensor(0.3200)
    """
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)  # half is too coarse
    mine, theirs = student.to(kind), teacher.to(kind)
    scale = theirs.square().mean()
    return (mine - theirs).square().mean() / torch.where(scale > 0, scale, 1.0)


@contextmanager
def watched(network: nn.Module, names: Sequence[str], whose: str) -> Iterator[dict[str, Tensor]]:
    """Note what some modules return in a forward pass; when the block is left, what was given has it by name.

    It is a copy, because what comes next may write into it. No hook outlives the block.

    Args:
        network: what is run in the block, once.
        names: of its modules.
        whose: they are, in an error.

    Raises:
        ConfigError: if one of them was not run or more than once, or returned anything but one tensor of real numbers.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with watched(net, ["0"], "the model") as seen:
        ...     _ = net(torch.zeros(1, 2))
        >>> seen["0"].shape, len(net[0]._forward_hooks)
        (torch.Size([1, 3]), 0)
    """
    calls: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules(remove_duplicate=False)) if names else {}
    handles = []
    try:
        for name in names:
            handles.append(modules[name].register_forward_hook(partial(_note, calls[name])))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update({name: _the_one(name, made, whose) for name, made in calls.items()})


def _note(calls: list[list[Tensor]], module: nn.Module, args: Any, output: Any) -> None:
    calls.append([tensor.clone() for tensor in tensors_in(output)])


def _the_one(name: str, calls: list[list[Tensor]], whose: str) -> Tensor:
    """The tensor that a module returned in its call."""
    if len(calls) != 1:
        raise _refused(name, f"{whose} calls it {len(calls)} times in a forward pass, and is to call it once")
    if len(calls[0]) != 1:
        raise _refused(name, f"in {whose} it returns {len(calls[0])} tensors, and is to return one")
    (tensor,) = calls[0]
    if not tensor.is_floating_point():
        raise _refused(name, f"in {whose} it returns {tensor.dtype}, and is to return floating-point numbers")
    return tensor


def _refused(name: str, why: str) -> ConfigError:
    return ConfigError(f"features: {name!r} cannot be learned from: {why}; {_ANOTHER}")


class Features:
    """Which outputs of a network are compared with its teacher's, and at which positions.

    Args:
        names: of the modules.
        model: what learns.
        graph: its axes, whose groups know which units are left; None if none are removed, but weights masked.
        teacher: a given one, which has the widths that the graph began with; None for a copy of the model as it is now.
        weight: of the term in the loss.

    Raises:
        ConfigError: if a module is not there, or which positions of its output belong to a unit cannot be told.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> features = Features(("0",), net, AxisGraph(net, torch.zeros(1, 2)))
        >>> features.loss({"0": net[0](torch.zeros(1, 2)) * 0}, {"0": torch.ones(1, 3)})
        tensor(1., grad_fn=<MeanBackward0>)
    """

    def __init__(
        self, names: Sequence[str], model: nn.Module, graph: AxisGraph | None = None, teacher: nn.Module | None = None,
        weight: float = 1.0,
    ) -> None:  # fmt: skip
        self.names, self.model, self.weight = tuple(names), model, weight
        _check_there(self.names, model, "the model")
        if teacher is not None:
            _check_there(self.names, teacher, f"the teacher ({type(teacher).__qualname__})")
        self._layers: dict[str, dict[int, _Dimension]] = {}
        self._left: dict[str, dict[int, tuple[Tensor, int]]] = {}
        if graph is not None:
            self._layers = _dimensions(self.names, graph, teacher is not None)
        self.look_up()

    def look_up(self) -> None:
        """See which units are left from now on: some may have been removed since."""
        device = model_device(self.model)
        self._left = {
            name: {
                number: (torch.from_numpy(dimension.left()).to(device), dimension.size)
                for number, dimension in dimensions.items()
            }
            for name, dimensions in self._layers.items()
        }

    def loss(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean over the layers of the relative errors, given the outputs of both.

        Raises:
            ConfigError: if the teacher's has another shape than the unpruned network's, or the student's no gradient.
        """
        terms = []
        for name in self.names:
            mine, theirs = student[name], self._survivors(name, teacher[name], student[name])
            if torch.is_grad_enabled() and not mine.requires_grad:
                raise _refused(
                    name, "no gradient goes from it to a parameter that is trained (they are frozen, or it is computed "
                    "without gradients, as torch.utils.checkpoint does with use_reentrant=True)",
                )  # fmt: skip
            terms.append(relative_error(mine, theirs))
        return torch.stack(terms).mean()

    def _survivors(self, name: str, theirs: Tensor, mine: Tensor) -> Tensor:
        """What the teacher gives at the units that are left."""
        whole, kept = list(mine.shape), self._left.get(name, {})
        for number, (left, size) in kept.items():
            if mine.shape[number : number + 1] != (len(left),):
                raise _refused(
                    name, f"it returns {tuple(mine.shape)}, and for the example inputs dimension {number} has "
                    f"{len(left)} positions, so that it is not known which belong to which unit",
                )  # fmt: skip
            whole[number] = size
        if list(theirs.shape) != whole:
            raise ConfigError(
                f"features: {name!r} returns {tuple(mine.shape)} in the model and {tuple(theirs.shape)} in the "
                f"teacher, and is to return {tuple(whole)} there, as in the network before pruning; give a teacher "
                "with the same widths, or name another module"
            )
        for number, (left, size) in kept.items():
            if len(left) < size:
                theirs = theirs.index_select(number, left.to(theirs.device))
        return theirs


def _check_there(names: Sequence[str], network: nn.Module, whose: str) -> None:
    modules = dict(network.named_modules(remove_duplicate=False))
    known = [name for name in modules if name]
    for name in names:
        if isinstance(modules.get(name), torch.jit.ScriptModule):
            raise _refused(name, f"in {whose} it is compiled by torch.jit, and nobody sees what it returns")
        if name not in known:
            more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
            raise ConfigError(
                f"features: {whose} has no module {name!r}{closest(name, known)}; it has "
                f"{', '.join(known[:_LISTED])}{more}"
            )


class _Dimension:
    """A dimension of an output that has units.

    Args:
        axis: it.
        groups: those whose units it has.
        begin: for each, the units that the teacher has.
    """

    def __init__(self, axis: Axis, groups: Sequence[Group], begin: Callable[[Group], list[int]]) -> None:
        self._parts = [(group, begin(group), labels(axis, group.leaf.root())) for group in groups]
        self.size = len(self._parts[0][2])

    def left(self) -> NDArray[np.int64]:
        """The positions along it, in the teacher, of the units that are left."""
        stays = np.ones(self.size, dtype=np.bool_)
        for group, units, unit_of in self._parts:
            stays &= np.where(unit_of >= 0, np.isin(units, group.left)[unit_of], True)
        return np.flatnonzero(stays)


def _dimensions(names: Sequence[str], graph: AxisGraph, whole: bool) -> dict[str, dict[int, _Dimension]]:
    """Module -> the dimensions of its output that lose units.

    Args:
        names: of the modules.
        graph: the axes.
        whole: whether the teacher has all units that there were, else those that there are.
    """
    trace, found = graph.trace, {}
    groups = {group.leaf.root(): group for group in graph.groups.values()}
    sizes = [(group, group.size) for group in groups.values()]
    passes = max(trace.runs[graph.model], 1)  # in eval mode and in train mode, where one does not read everything
    try:
        for group in groups.values():
            group.leaf.root().resize(group.initial if whole else group.size)
        for name in names:
            module = graph.model.get_submodule(name)
            outputs = trace.outputs.get(module)
            if outputs is None or trace.runs[module] > passes:
                calls = 0 if outputs is None else trace.runs[module] // passes
                raise _refused(name, f"the model calls it {calls} times in a forward pass, and is to call it once")
            if len(outputs) != 1:
                raise _refused(name, f"in the model it returns {len(outputs)} tensors, and is to return one")
            found[name] = dict(_of_one(name, outputs[0], groups, whole))
    finally:
        for group, size in sizes:
            group.leaf.root().resize(size)
    return found


def _of_one(
    name: str, axes: Sequence[Axis], groups: Mapping[Any, Group], whole: bool
) -> Iterator[tuple[int, _Dimension]]:
    """The dimensions of one output that have units of groups."""

    def begin(group: Group) -> list[int]:
        return list(range(group.initial)) if whole else list(group.left)

    for number, axis in enumerate(axes):
        here = [groups[leaf] for leaf in dict.fromkeys(leaf.root() for leaf in leaves(axis)) if leaf in groups]
        if here:
            try:
                yield number, _Dimension(axis, here, begin)
            except ValueError as error:
                names = " and ".join(repr(group.name) for group in here)
                raise _refused(
                    name, f"along dimension {number} of its output, which has the units of {names}, {error}, so that "
                    "what is left of a unit is no position of its own",
                ) from error  # fmt: skip
