"""Other data for tensors, for a while: the objects stay the same."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from singe_plugin.rollback import swap_data

__all__ = ["Copies", "Values"]


class Values:
    """Replacement data for tensors; what they had is kept, and put back by :meth:`restore`."""

    def __init__(self) -> None:
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Somebody else replaces the data of this tensor."""
        self._saved.setdefault(id(tensor), (tensor, tensor.data))

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Give a tensor other data."""
        self.keep(tensor)
        tensor.data = value.detach()

    def zero(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        """Put zeros at some positions of a dimension."""
        self.put(tensor, tensor.data.index_fill(dim, index.to(tensor.device), 0.0))

    def scale(self, tensor: Tensor, factors: Tensor) -> None:
        """Multiply the elements of a tensor with some factors, which are taken over and over."""
        self.put(tensor, tensor.data.clone())
        _scale(tensor.data, factors)

    def restore(self) -> None:
        """Put back what the tensors had."""
        for tensor, data in self._saved.values():
            tensor.data = data
        self._saved.clear()


class Copies(Values):
    """The same where the data of most tensors are copies in double precision, made for the purpose.

    They are written in place or dropped, and made again of what they were copied from: there is never a second copy.

    Args:
        sources: by the id of a tensor, what its present data is a copy of.
    """

    def __init__(self, sources: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.sources, self._changed = sources, dict[int, Tensor]()

    def keep(self, tensor: Tensor) -> None:
        if id(tensor) in self.sources:
            self._changed[id(tensor)] = tensor
        else:
            super().keep(tensor)

    def zero(self, tensor: Tensor, dim: int, index: Tensor) -> None:
        if id(tensor) not in self.sources:
            super().zero(tensor, dim, index)
            return
        self.keep(tensor)
        tensor.data.index_fill_(dim, index.to(tensor.device), 0.0)

    def scale(self, tensor: Tensor, factors: Tensor) -> None:
        if id(tensor) not in self.sources:
            super().scale(tensor, factors)
            return
        self.keep(tensor)
        _scale(tensor.data, factors)

    def restore(self) -> None:
        super().restore()
        for key, tensor in self._changed.items():
            source = self.sources[key]
            if tensor.shape == source.shape and tensor.stride() == source.stride():
                tensor.data.copy_(source)
            else:
                tensor.grad = None
                swap_data(tensor, source.to(tensor.dtype, copy=True))
        self._changed.clear()


def _scale(data: Tensor, factors: Tensor) -> None:
    if not data.is_contiguous():
        data.mul_(factors.repeat(-(-data.numel() // len(factors)))[: data.numel()].view(data.shape))
        return
    for block in data.view(-1).split(len(factors)):  # type: ignore[no-untyped-call]
        block.mul_(factors[: len(block)])
