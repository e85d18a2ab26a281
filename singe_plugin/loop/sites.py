"""What is known of a layer that is solved: where it is contracted, what it gets and what it is to give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from singe_plugin.axes.chains import Sum
from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.tape import Tape
from singe_plugin.method.dual import Rows
from singe_plugin.method.ridge import LARGEST, Moments
from singe_plugin.ranks import current

__all__ = ["Site"]

_HELD = 0.25  # of the rows are held out, to choose the ridge on


@dataclass
class Site:
    """A parameter that is solved, and where it is contracted.

    Attributes:
        name: of the parameter.
        bias: the name of what is added, or None.
        numbers: of its contractions.
        added: the name of a bias that another operator adds right behind, if there is none here; or None.
        norm: the batch-norm that alone reads it, if there is no bias; or None.
        sums: contraction -> where its results are added to something.
        scale: what the batch-norm in between divides by, ``[O]``, or None.
        known: of the rows to solve on, and of those that are held out.
        last: the contraction that ran last.
        live: which outputs it gives, ``[O]``: the others are masked, with all that they are made of; None is all.
        reason: why it cannot be solved, or None.
    """

    name: str
    bias: str | None
    numbers: list[int] = field(default_factory=list)
    added: str | None = None
    norm: str | None = None
    sums: dict[int, Sum] = field(default_factory=dict)
    scale: Tensor | None = None
    known: tuple[Any, Any] | None = None
    last: Contraction | None = None
    live: Tensor | None = None
    reason: str | None = None

    def find_bias(self, tape: Tape) -> None:
        """See what is added to the results, and whether that is read elsewhere, too."""
        steps = [tape.contracting[number] for number in self.numbers]
        if self.bias is not None:
            if readers := tape.read_by(self.bias, steps):
                self.reason = self.reason or f"its bias is read by {', '.join(readers)}, too"
            return
        added = [tape.added[number] for number in self.numbers if number in tape.added]
        names = {name for name, _ in added}
        if len(added) == len(self.numbers) and len(names) == 1:
            (name,) = names
            self.added = None if tape.read_by(name, [step for _, step in added]) else name

    def add(self, contraction: Contraction, x: Tensor, y: Tensor, batches: int) -> None:
        """Count rows ``[groups, rows, F]`` and ``[rows, O]`` of one of some batches in.

        The first are to solve on, the last ones are held out. Of a layer that reads too many features for a matrix of
        them, the rows themselves are kept, as many of every batch.
        """
        y = y if self.live is None else y * self.live
        y = y.reshape(len(y), len(x), -1).transpose(0, 1)
        kind: Any = Moments
        if x.shape[2] > LARGEST:
            most = max(LARGEST // (batches * len(self.numbers)), 2)
            if x.shape[1] > most:
                even = torch.linspace(0, x.shape[1] - 1, most, device=x.device).round().long()
                x, y = x[:, even], y[:, even]
            kind = Rows
        cut = math.ceil(x.shape[1] * (1 - _HELD))
        pairs = ((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))
        self.last = contraction
        if self.known is None:
            self.known = kind.of(*pairs[0]), kind.of(*pairs[1])
        else:
            for mine, pair in zip(self.known, pairs, strict=True):
                mine.include(*pair)

    def include_others(self, empty: bool) -> None:
        """Count in what other ranks know, and not what this one does, if that is ``empty``: of others' batches."""
        ranks = current()
        if ranks.world == 1:
            return
        said = ranks.gather(f"the rows of {self.name}", (self.reason, self.known is None))
        self.reason = next((reason for reason, _ in said if reason is not None), None)
        if any(nothing for _, nothing in said):
            self.known = None
        if self.reason is None and self.known is not None:
            fitted, held = (part.of_all(ranks, empty) for part in self.known)
            self.known = fitted, held
