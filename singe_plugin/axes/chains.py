"""What becomes of the result of a contraction right behind it: a bias, a batch-norm, a sum with something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .contractions import CONTRACTING, Names

__all__ = ["Chains", "Sum"]

_FORMS = frozenset({"view", "_unsafe_view", "alias"})
_ADDING = frozenset({"add", "add_"})
_CELLS = {"_thnn_fused_lstm_cell": ((0, 3), (1, 4)), "_thnn_fused_gru_cell": ((0, 3), (1, 4))}
"""Operators that add biases, besides: which argument is added to which."""


@dataclass(frozen=True)
class Sum:
    """Where the result of a contraction is added to something else, alone or behind a batch-norm.

    Attributes:
        step: the operator.
        other: which of its arguments is the other one.
        norm: the name of the batch-norm in between, or None.
        depends: the contractions that the other one depends on.
    """

    step: int
    other: int
    norm: str | None
    depends: frozenset[int]


@dataclass(frozen=True)
class _Link:
    """A tensor that is the result of a contraction, with what was done to it since."""

    number: int
    product: bool  # of matrices, else a convolution
    norm: str | None = None
    biased: bool = False


class Chains:
    """Follows results until they are added to something, or are read twice.

    Args:
        model: the model.
        names: of its parameters.

    Attributes:
        sums: by number, where the results of contractions are added to something that does not depend on them; each
            sum once. What others read, too, must not make up for anything.
        added: by number, the parameter that is added to all that contractions give, and by which operator.
        table: the tensors that are followed.
    """

    def __init__(self, model: nn.Module, names: Names) -> None:
        self.names = names
        self.sums: dict[int, Sum] = {}
        self.added: dict[int, tuple[str, int]] = {}
        self.table: Any = WeakIdKeyDictionary()  # tensor -> _Link
        self._read: Any = WeakIdKeyDictionary()
        self._norms = {id(b): n.rpartition(".")[0] for n, b in model.named_buffers() if n.endswith("running_mean")}

    def start(self, number: int, out: Tensor, product: bool) -> None:
        """Follow the result of a contraction."""
        self.table[out] = _Link(number, product)

    def follow(
        self, step: int, name: str, args: Any, kwargs: Any, results: list[Any], operands: list[Tensor],
        reach: Callable[[Tensor], frozenset[int]],
    ) -> None:  # fmt: skip
        """See whether results of contractions are biased, normalised or added here.

        Args:
            step: the operator.
            name: its name.
            args, kwargs: what it is called with.
            results: what it gives.
            operands: the tensors that it takes.
            reach: tells the contractions that a tensor depends on.
        """
        mine = [t for t in operands if t in self.table]
        if not mine or name in CONTRACTING:
            for tensor in mine:
                self._is_first(tensor)
            return
        if self._is_biased(step, name, args, kwargs, results):
            return
        chained = max(mine, key=lambda t: self.table[t].number)
        link: _Link = self.table[chained]
        firsts = {id(tensor): self._is_first(tensor) for tensor in mine}
        if isinstance(results[0], Tensor) and results[0] in self.table:  # changed in place: no result any more
            del self.table[results[0]]
        if not firsts[id(chained)]:
            return
        if name in _FORMS:
            self.table[results[0]] = link
        elif "batch_norm" in name and args[0] is chained and link.norm is None:
            found = next((self._norms[id(t)] for t in operands if id(t) in self._norms), None)
            if found is not None:
                self.table[results[0]] = replace(link, norm=found)
        elif name in _ADDING and not kwargs and len(operands) == 2 and operands[0].shape == operands[1].shape:
            other = 1 if operands[0] is chained else 0
            depends = reach(operands[other])
            if not depends or max(depends) < link.number:
                self.sums[link.number] = Sum(step, other, link.norm, depends)

    def _is_biased(self, step: int, name: str, args: Any, kwargs: Any, results: list[Any]) -> bool:
        """See whether a parameter is added to what products give, number for number; and follow the sum."""
        pairs = _CELLS.get(name, ((0, 1), (1, 0)) if name in _ADDING and not kwargs else ())
        found = False
        for product, bias in pairs:
            if max(product, bias) >= len(args) or not all(isinstance(args[i], Tensor) for i in (product, bias)):
                continue
            link: _Link | None = self.table.get(args[product])
            origin, _ = self.names.made.get(args[bias], (None, False))
            fits = args[bias].ndim == 1 and args[bias].shape == args[product].shape[-1:]
            if link is None or origin is None or not fits or not link.product or link.norm or link.biased:
                continue
            if self._is_first(args[product]):
                self.added[link.number] = origin, step
                found = True
                if name in _ADDING:
                    self.table[results[0]] = replace(link, biased=True)
                    self._read.pop(results[0], None)  # in place, it is read for the first time now
        return found

    def _is_first(self, tensor: Tensor) -> bool:
        """Whether nothing read it before."""
        first = tensor not in self._read
        self._read[tensor] = True
        if not first:
            link = self.table[tensor]
            self.sums.pop(link.number, None)
            if not link.biased:
                self.added.pop(link.number, None)
        return first
