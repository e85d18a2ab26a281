"""Several processes that prune one network together: who computes what, what is added up, and how one failure ends all.

Every process (rank) of ``torch.distributed`` has the whole network and goes through the same steps. What costs time is
divided: batches to score and to repair on go round the ranks, and of a batch to train on each rank takes its rows.
Sums are added up in double precision and spread from rank 0, so that all ranks know the same bits and remove the same.

Everything that ranks tell each other begins with a message that says what it is about and whether the sender failed.
So a rank that fails somewhere tells the others at their next message, and ranks that went apart find out, too; nobody
waits for somebody who does not come. :func:`current` is who is here: one process alone, unless :func:`together` found
others.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from singe_plugin.errors import ConfigError, RankError
from singe_plugin.files import digest
from singe_plugin.nested import leaves_in

__all__ = ["Division", "Ranks", "current", "processes", "together"]

T = TypeVar("T")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_logger = logging.getLogger("singe_plugin")


class Division:
    """Which of some things, counted from 0, one rank takes.

    Args:
        first: the first of them.
        step: how far it is from one to the next.

    Example:
        >>> mine = Division(1, 3)
        >>> [number in mine for number in range(5)], list(mine.of(5)), list(mine.of(1))
        ([False, True, False, False, True], [1, 4], [])
    """

    def __init__(self, first: int = 0, step: int = 1) -> None:
        self.first, self.step = first, step

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and number % self.step == self.first

    def of(self, count: int) -> range:
        """Those of ``count`` things that this rank takes."""
        return range(self.first, count, self.step)


class Ranks:
    """One process alone: it has all of it, and nobody to talk to.

    Attributes:
        rank: the number of this process.
        local: its number on this machine.
        world: how many there are.

    Example:
        >>> alone = Ranks()
        >>> alone.main, alone.gather("loss", 2.0), alone.division(torch.ones(1)).of(2)
        (True, [2.0], range(0, 2))
    """

    rank, local, world = 0, 0, 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and says what is going on."""
        return self.rank == 0

    def gather(self, what: str, value: T) -> list[T]:
        """The values of all ranks, in order.

        Args:
            what: what it is, in a word or two; the ranks must agree on it.
            value: this rank's; it can be pickled.

        Raises:
            RankError: if another rank failed, is gone, or is somewhere else.
        """
        return [value]

    def first(self, what: str, value: T) -> T:
        """The value of rank 0; the others' are left out."""
        return self.gather(what, value)[0]

    def same(self, what: str, value: Any, remedy: str) -> None:
        """Raise :class:`RankError` on every rank unless all of them have the same value."""

    def add_up(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all ranks of some tensors, in double precision and the same on all to the bit."""
        return list(tensors)

    def align(self, what: str, tensors: Collection[Tensor]) -> None:
        """Write rank 0's values into tensors of the others."""

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Say that a failure in here finds the others waiting for something else than a message: it is not told."""
        yield

    def division(self, batch: Any) -> Division:
        """Which batches this rank takes: all if each rank has batches of its own, else every n-th.

        Args:
            batch: the first one. Where it is the same on all ranks, all of them have all batches.
        """
        return Division()


class _Many(Ranks):
    """One of several processes of a process group.

    Args:
        group: a group of all ranks in which tensors of the CPU can be sent.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        self.silent = False  # whether a failure cannot be told: the others know, or wait for something else
        self._over_nccl = "nccl" in str(distributed.get_backend_config())

    def gather(self, what: str, value: T) -> list[T]:
        found = self._exchange((None, what, value))
        for rank, (failure, _, _) in enumerate(found):
            if failure is not None:
                raise RankError(f"rank {rank} of {self.world} failed, so that this one ends, too: {failure}")
        places = [place for _, place, _ in found]
        if len(set(places)) > 1:
            said = ", ".join(f"rank {rank} at {place!r}" for rank, place in enumerate(places))
            raise RankError(
                f"the ranks went apart ({said}): they have to be given the same model, options and callbacks"
            )
        return [one for _, _, one in found]

    def same(self, what: str, value: Any, remedy: str) -> None:
        mine = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
        found = self.gather(what, mine)
        other = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if other:
            self.silent = True  # every rank says so
            raise RankError(f"{what} of rank {', '.join(map(str, other))} are not those of rank 0; {remedy}")

    def add_up(self, what: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = [(tuple(t.shape)) for t in tensors]
        self.same(what, shapes, "their shapes differ: give all ranks the same model and the same form of batches")
        if not tensors:
            return []
        flat = torch.cat([t.detach().double().reshape(-1) for t in tensors])
        group = self._group_of(flat)
        with self._connected():
            distributed.all_reduce(flat, group=group)
            distributed.broadcast(flat, 0, group=group)
        parts = torch.split(flat, [t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def align(self, what: str, tensors: Collection[Tensor]) -> None:
        self.gather(what, len(tensors))
        with self._connected(), torch.no_grad():
            for tensor in tensors:
                plain = tensor.detach().contiguous()
                distributed.broadcast(plain, 0, group=self._group_of(plain))
                if self.rank:
                    tensor.data.copy_(plain)

    def division(self, batch: Any) -> Division:
        found = self.gather("the data", _fingerprint(batch))
        return Division(self.rank, self.world) if len(set(found)) == 1 else Division()

    @contextmanager
    def unheard(self) -> Iterator[None]:
        self.silent = True
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, distributed.DistError) or "gloo" in str(error):
                raise self._lost(error) from error
            raise
        self.silent = False

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends, where they do not know; whoever is gone is not told."""
        if not self.silent and not isinstance(error, RankError):
            with suppress(RankError):
                self._exchange((f"{type(error).__name__}: {error}", "", None))

    def _exchange(self, message: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        with self._connected():
            distributed.all_gather_object(found, message, group=self.group)
        return found

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> RankError:
        return RankError(
            f"rank {self.rank} of {self.world} lost the others ({str(error).splitlines()[0]}); one of them ended, and "
            "says why, or this one waited longer than the process group's timeout"
        )

    def _group_of(self, tensor: Tensor) -> Any:
        return None if tensor.is_cuda and self._over_nccl else self.group


def _fingerprint(value: Any) -> str:
    """A checksum of a batch; of what cannot be pickled in it, its class counts."""
    found = hashlib.sha256()
    for leaf in leaves_in(value):
        if isinstance(leaf, Tensor):
            found.update(digest(leaf).encode())
            continue
        try:
            found.update(pickle.dumps(leaf))
        except (pickle.PicklingError, AttributeError, TypeError):
            found.update(type(leaf).__qualname__.encode())
    return found.hexdigest()


_ALONE = Ranks()
_here: list[_Many] = []


def current() -> Ranks:
    """Who prunes here: the ranks that :func:`together` found, or this process alone."""
    return _here[-1] if _here else _ALONE


def processes() -> int:
    """How many processes a launcher or a process group says that there are, whether they prune together or not.

    A launcher is believed if it gives everything that a process group is made from: batch systems set ``WORLD_SIZE``
    alone for jobs of one process, too.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    if distributed.is_available() and all(os.environ.get(name) for name in _LAUNCHED):
        count = os.environ["WORLD_SIZE"]
        return int(count) if count.isdigit() else 1
    return 1


@contextmanager
def together() -> Iterator[Ranks]:
    """Be one of the ranks in here, if there are several; inside of another such block, be that one's.

    A process group that a launcher's environment describes is made, if there is none, and ended with the block. A
    failure in the block ends all ranks, and no rank leaves before all do.

    Raises:
        RankError: if another rank failed.

    Example:
        >>> with together() as ranks:
        ...     ranks.world
        1
    """
    if _here or processes() == 1:
        yield current()
        return
    made = not distributed.is_initialized()
    if made:
        _initialise()
    group = distributed.new_group(backend="gloo")
    ranks = _Many(group)
    _here.append(ranks)
    try:
        yield ranks
        ranks.gather("the end", None)
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        _here.remove(ranks)
        for one in (group, None) if made else (group,):
            with suppress(RuntimeError, ValueError):  # of those who are gone
                distributed.destroy_process_group(one)


def _initialise() -> None:
    """Make the process group that the environment describes: over NCCL where every rank has a card of its own."""
    try:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    except ValueError as error:
        raise ConfigError(f"RANK or WORLD_SIZE is no number ({error}); start the processes with torchrun") from error
    cards = torch.cuda.is_available() and distributed.is_nccl_available() and torch.cuda.device_count() >= beside
    if cards:
        torch.cuda.set_device(local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo")
