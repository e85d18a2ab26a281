"""Which dimensions of a parameter produce, and which read: whether the operators contract them with activations.

``x @ W`` reads along the first dimension of W and writes along its second, ``F.linear(x, W)`` the other way round, and
attention's packed ``in_proj_weight`` is as wide on both sides. So no name and no shape says it: each rule says what its
operator contracts (:meth:`Origins.contract`), and what becomes of a parameter on the way there (a transpose, a view, a
part, another factor) is followed by dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Dims", "Origins"]

Dims: TypeAlias = frozenset[tuple[int, int]]
"""``(id of a parameter, dimension)``."""

_SWAPS = frozenset({"t", "transpose", "t_", "transpose_", "swapaxes", "adjoint", "mT"})
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten"})
_PICKS = frozenset({"index", "_unsafe_index", "index_select"})
_PRODUCTS = frozenset({"mm", "bmm", "matmul", "addmm", "baddbmm"})


class Origins:
    """What becomes of parameters during one forward pass, until they meet activations.

    Attributes:
        contracted: dimensions that some operator sums over, together with an activation.
        written: dimensions that meet activations in any other way.
    """

    def __init__(self) -> None:
        self.contracted: set[tuple[int, int]] = set()
        self.written: set[tuple[int, int]] = set()
        self._of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._summed: set[tuple[int, int]] = set()

    def start(self, parameter: Tensor) -> None:
        """A parameter, of which nothing has been made yet."""
        self._of[parameter] = [frozenset({(id(parameter), dim)}) for dim in range(parameter.ndim)]

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are made of buffers: they are cut along."""
        for tensor in tensors:
            self._held[tensor] = True

    def activate(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that depend on the model's input."""
        for tensor in tensors:
            self._live[tensor] = True

    def reads(self, parameter: Tensor, dim: int) -> bool:
        """Whether a dimension of a parameter is contracted wherever it is used."""
        return self.all_read(frozenset({(id(parameter), dim)}))

    def all_read(self, dims: Dims) -> bool:
        """Whether dimensions of parameters are contracted wherever they are used."""
        return bool(dims & self.contracted) and not dims & self.written

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor depends neither on the input nor on a parameter or buffer."""
        return tensor not in self._live and tensor not in self._of and tensor not in self._held

    def made_of(self, tensor: Tensor, parameters: Collection[int]) -> bool:
        """Whether a tensor is made of some of these parameters and nothing else."""
        found = [dims for dims in self._of.get(tensor) or () if dims]  # type: ignore[no-untyped-call]
        return bool(found) and tensor not in self._live and all(key in parameters for dims in found for key, _ in dims)

    def contract(self, a: Tensor, dim: int, b: Tensor, other: int) -> None:
        """The operator at work sums over a dimension of both: of two made of parameters alone, the second one reads."""
        for tensor, at in ((b, other), (a, dim)):
            if tensor in self._of:
                self._summed.add((id(tensor), at % tensor.ndim))
                if a in self._live or b in self._live or tensor is b:
                    self.contracted |= self._of[tensor][at]
                if a in self._of and b in self._of:
                    break

    def note(self, operator: str, args: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """An operator has run: its results are activations, or made of parameters."""
        made_of = [t for t in operands if t in self._of]
        if operator in _PICKS and made_of and args[0] is made_of[0]:
            self._pick(operator, args, results[0])
        elif any(t in self._live for t in operands):
            for tensor in made_of:
                for dim, origin in enumerate(self.dims_of(tensor)):
                    if (id(tensor), dim) not in self._summed:
                        self.written |= origin
            self.activate(results)
        elif made_of:
            for result in (r for r in results if r not in self._of):
                found: list[Dims] = [frozenset()] * result.ndim
                for tensor in made_of:
                    carried = _carried(operator, args, self.dims_of(tensor), tensor, result)
                    found = [a | b for a, b in zip(found, carried, strict=True)]
                self._of[result] = found
        elif any(t in self._held for t in operands):
            self.hold(results)
        self._summed.clear()

    def _pick(self, operator: str, args: Any, result: Tensor) -> None:
        """Parts of something made of parameters, which the input chooses: they may still be contracted with it."""
        dims = self.dims_of(args[0])
        chosen = (
            [args[1] % len(dims)] if operator == "index_select" else [d for d, i in enumerate(args[1]) if i is not None]
        )
        kept = [origin for dim, origin in enumerate(dims) if dim not in chosen]
        self.written |= frozenset().union(*(dims[dim] for dim in chosen))
        first = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
        made: list[Dims] = [frozenset()] * (result.ndim - len(kept))
        self._of[result] = [*kept[:first], *made, *kept[first:]]
        self.activate([result])

    def dims_of(self, tensor: Tensor) -> list[Dims]:
        """Of which dimensions of parameters the dimensions of a tensor are made."""
        found: list[Dims] = self._of.get(tensor) or [frozenset()] * tensor.ndim  # type: ignore[no-untyped-call]
        return found


def _carried(operator: str, args: Any, origins: list[Dims], source: Tensor, result: Tensor) -> list[Dims]:
    """Of which dimensions of the source the dimensions of a result are made."""
    ndim = source.ndim
    if operator in _SWAPS and ndim > 1:
        a, b = (args[1], args[2]) if len(args) > 2 else (-2, -1)
        order = list(range(ndim))
        order[a], order[b] = order[b], order[a]
        return [origins[d] for d in order]
    if operator == "permute":
        return [origins[d] for d in args[1]]
    if operator in _PRODUCTS and ndim == result.ndim:
        first = source is args[-2]
        return [*origins[:-2], origins[-2] if first else frozenset(), frozenset() if first else origins[-1]]
    if operator in _VIEWS:
        return _through_view(list(source.shape), origins, list(result.shape))
    if operator == "select":
        return [o for d, o in enumerate(origins) if d != args[1] % ndim]
    if operator == "unbind":
        return [o for d, o in enumerate(origins) if d != (args[1] if len(args) > 1 else 0) % ndim]
    if ndim == 1 and result.ndim > 1 and "norm" in operator:  # one number per channel
        return [frozenset(), origins[0], *[frozenset()] * (result.ndim - 2)]
    if ndim <= result.ndim:
        return [frozenset()] * (result.ndim - ndim) + origins
    return [frozenset().union(*origins)] * result.ndim


def _through_view(before: list[int], origins: list[Dims], after: list[int]) -> list[Dims]:
    """A dimension is made of those that lie in the same stretch of memory."""
    found: list[Dims] = []
    i = 0
    start, left = 1, before[0] if before else 1  # of the source's dimension i: what is in front of it, and with it
    right = 1
    for size in after:
        begin, right = right, right * size
        mine: Dims = frozenset()
        while before:
            if size > 1 and before[i] > 1 and start < right and begin < left:
                mine |= origins[i]
            if left > right or i + 1 == len(before):
                break
            i += 1
            start, left = left, left * before[i]
        found.append(mine)
    return found
