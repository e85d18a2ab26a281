"""A network that is played again and again, from where it will still change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.tape import Kept, Playback, Reached, Strayed, Tape
from singe_plugin.nested import map_tensors, tensors_in
from singe_plugin.state import (
    RngState,
    computed_tables,
    forget_tables,
    plain_layers,
    preserved,
    want_gradients,
)

__all__ = ["MEMORY", "Player", "ready"]

MEMORY = 2**28  # bytes that are kept of all batches of a network from one pass to the next


@contextmanager
def ready(model: nn.Module) -> Iterator[None]:
    """The model as it is followed and played; it is put back afterwards.

    Example:
        >>> layer = nn.Linear(1, 1).requires_grad_(False)
        >>> with ready(layer):
        ...     layer.training, layer.weight.requires_grad
        (False, True)
        >>> layer.training, layer.weight.requires_grad
        (True, False)
    """
    with preserved(model), plain_layers(model):
        want_gradients(model.eval())
        yield


class Player:
    """Plays a network again and again, batch by batch, from the layers that are solved next.

    Args:
        model: the network.
        forward: how it is called with a batch.
        batches: inputs.
        marked: parameters of which the tape notes what depends on them.
        mine: the numbers of the batches that are played here; None is all of them.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[nn.Module, Any], Any], batches: Sequence[Any],
        marked: Collection[str] = (), mine: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.mine = range(len(batches)) if mine is None else mine
        self.model, self.forward, self.batches = model, forward, batches
        with ready(model):
            self._caches = computed_tables(model, lambda: forward(model, map_tensors(torch.clone, batches[0])))
            forget_tables(self._caches)  # a pass that finds something there runs other operators
            self.tape = Tape.of(model, map_tensors(torch.clone, batches[0]), forward, marked)
        self.starts = [0] * len(batches)
        self.kept: list[Kept] = [{} for _ in batches]
        shapes = [[t.shape for t in tensors_in(batch)] for batch in batches]
        self.same = [found == shapes[0] and self.tape.why_not is None for found in shapes]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The network as it is played."""
        with ready(self.model):
            forget_tables(self._caches)
            yield

    def play(
        self, index: int, start: int, see: Callable[[Contraction], None], watch: Mapping[int, Callable[[Any], None]]
    ) -> None:
        """Run a batch until ``see`` or ``watch`` ends it; what comes before ``start`` stays as it is from now on."""
        keep = None
        if self.same[index] and start > self.starts[index]:
            size = sum(shape.bytes for shape in self.tape.live(start).values())
            keep = start if size * len(self.batches) <= MEMORY else None
        state, inputs = RngState.capture(), map_tensors(torch.clone, self.batches[index])
        run = Playback(self.model, self.tape, see, self.starts[index], self.kept[index], keep, watch)
        try:
            with run, suppress(Reached):
                self.forward(self.model, inputs)
        except Strayed:
            if not self.starts[index]:
                raise
            self.same[index], self.starts[index], self.kept[index] = False, 0, {}
            state.restore()
            self.play(index, start, see, watch)
            return
        state.restore()
        if run.kept:
            self.starts[index], self.kept[index] = start, run.kept
