"""Which arguments of a torch function are sizes of what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from singe_plugin.objective import tensors_in

from .algebra import Axis, size_of, split

if TYPE_CHECKING:
    from .trace import Trace

__all__ = ["link_sizes"]

_MADE = frozenset(
    {"reshape", "view", "expand", "new_zeros", "new_ones", "new_empty", "new_full", "zeros", "ones", "empty"}
)


def link_sizes(state: Trace, name: str, args: Any, kwargs: Any, out: Any) -> None:
    """The attributes among the arguments that are sizes of the result."""
    results = [t for t in tensors_in(out) if t.ndim]
    if not results:
        return
    axes = state.of(results[0])
    if name in _MADE:
        sizes = _size_arguments(args)
        if len(sizes) == len(axes):
            for size, axis in zip(sizes, axes, strict=True):
                state.link(size, axis)
    elif name == "unflatten":
        first = _argument(args, kwargs, 1, "dim", 0) % args[0].ndim
        for offset, size in enumerate(_argument(args, kwargs, 2, "sizes", ())):
            state.link(size, axes[first + offset])
    elif name in ("split", "split_with_sizes"):
        dim = _argument(args, kwargs, 2, "dim", 0)
        sizes = _argument(args, kwargs, 1, "split_size_or_sections", _argument(args, kwargs, 1, "split_size", ()))
        each = sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(results)
        for size, part in zip(each, results, strict=False):
            state.link(size, state.of(part)[dim])
    elif name == "narrow":
        state.link(_argument(args, kwargs, 3, "length", 0), axes[_argument(args, kwargs, 1, "dim", 0)])
    elif name == "__getitem__":
        _link_slices(state, args, results[0])
    elif name in ("layer_norm", "rms_norm"):
        shape = _argument(args, kwargs, 1, "normalized_shape", ())
        for size, axis in zip(shape, axes[-len(shape) :], strict=True):
            state.link(size, axis)
    elif name == "group_norm":
        _link_groups(state, _argument(args, kwargs, 1, "num_groups", 1), axes[1])
    elif name.startswith("conv") and len(axes) > 1:
        _link_groups(state, _argument(args, kwargs, 6, "groups", 1), axes[1])


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any) -> Any:
    return kwargs.get(name, args[position] if len(args) > position else default)


def _link_groups(state: Trace, groups: Any, axis: Axis) -> None:
    if groups > 1:
        outer, _ = split(axis, [int(groups), size_of(axis) // int(groups)], state.why)
        state.link(groups, outer)


def _link_slices(state: Trace, args: Any, result: Tensor) -> None:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    dim = 0
    for position, item in enumerate(index):
        if item is Ellipsis:
            dim = result.ndim - (len(index) - position - 1)
            continue
        if isinstance(item, slice) and item.start in (None, 0):
            state.link(item.stop, state.of(result)[dim])
        if item is None or isinstance(item, slice):
            dim += 1


def _size_arguments(args: Any) -> list[Any]:
    rest = args[1:] if args and isinstance(args[0], Tensor) else args
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        return list(rest[0])
    return [a for a in rest if isinstance(a, int)]
