"""How long a run still takes: what is to be done, in counts, times what one of each takes, in seconds.

What one takes is measured as soon as one was done; before that it is guessed from a forward and backward pass that was
timed when the loss was tried. Work on a network that has become smaller takes less; how much less is in :func:`effort`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from singe_plugin.loop.costs import ALL

__all__ = ["Ahead", "Measured", "Outlook", "Rates", "effort", "plan", "shares_of"]

WINDOW = 200  # steps that the seconds of a step are a mean of
KINDS = ("scoring", "repair", "evaluation", "step", "closing")
# One scoring of all layers, and one repair, in forward and backward passes of their images: what `obs` and the repair
# took on ResNet-18. They are in force until the first one is over.
SCORING, REPAIR = 6.0, 3.0


@dataclass
class Rates:
    """What is known of the speed of a run before its parts were done, in seconds; None is unknown.

    Attributes:
        trial: of one example forward and backward, as fine-tuning has it.
        reading: of making one example of the data, where that is not done beside the rest.
        closing: of measuring the network, as before the run.
        batch: examples of a fine-tuning batch.
        scored: examples that are scored on.
        repaired: examples that are repaired on.
    """

    trial: float | None = None
    reading: float = 0.0
    closing: float | None = None
    batch: int = 0
    scored: int = 0
    repaired: int = 0

    def guesses(self) -> dict[str, float]:
        """Kind of work -> seconds that one of it takes in the unpruned network.

        Example:
            >>> Rates(trial=0.01, batch=100, closing=2.0).guesses()["step"]
            1.0
        """
        found = {} if self.closing is None else {"closing": self.closing, "evaluation": self.closing}
        if self.trial is not None:
            found["step"] = self.batch * (self.trial + self.reading)
            found |= {"scoring": SCORING * self.scored * self.trial, "repair": REPAIR * self.repaired * self.trial}
        return found


@dataclass(frozen=True)
class Ahead:
    """What a run, or the rest of one, still has to do.

    Attributes:
        sizes: for every scoring that is left, the size that the network then has, as a fraction of the unpruned one.
        repairs, evaluations, steps: how many are left.
        goal: the size in the end; None where that is not known.
        at_end: whether the fine-tuning comes after the last removal.
        rates: what is known of the speed.
    """

    sizes: tuple[float, ...]
    repairs: int = 0
    evaluations: int = 0
    steps: int = 0
    goal: float | None = None
    at_end: bool = False
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True)
class Measured:
    """The network was measured: before the run, and after it.

    Attributes:
        values: parameters, MACs, accuracy, latency and the user's own numbers, as far as there are some.
        seconds: what that took; None where a run goes on, and it was measured then.
        last: whether that was after the run.
    """

    values: dict[str, float]
    seconds: float | None
    last: bool


def plan(
    way: Sequence[float], goal: float | None, repairs: str | None, watched: bool, steps: int, at_end: bool, rates: Rates
) -> Ahead:
    """What is ahead of a run.

    Args:
        way: for every turn that is left, how far the network is on the way to its last size, in [0, 1].
        goal: that size, as a fraction of the unpruned network's; None where it is not known.
        repairs: how often the survivors take over: at the ``"end"``, in every ``"round"``, or never (None).
        watched: whether the network is judged after every turn.
        steps: steps of fine-tuning that are left.
        at_end: whether these come after the last removal.
        rates: what is known of the speed.

    Example:
        >>> plan([0.0, 0.5], 0.5, "end", True, 10, True, Rates()).sizes
        (1.0, 0.75)
    """
    sizes = tuple(1.0 if goal is None else 1 - (1 - goal) * share for share in way)
    solved = 0 if repairs is None else len(way) if repairs == "round" else min(len(way), 1)
    return Ahead(sizes, solved, len(way) if watched else 0, steps, goal, at_end, rates)


def shares_of(sizes: Callable[..., Mapping[str, float]], before: Mapping[str, float]) -> dict[str, float]:
    """What is left of sizes that were there before, in [0, 1].

    Example:
        >>> shares_of(lambda *kinds: {"units": 6, "macs": 50}, {"units": 8, "macs": 200})
        {'units': 0.75, 'macs': 0.25}
    """
    there = {kind: size for kind, size in before.items() if size and kind != ALL}
    now = sizes(*(kind for kind in there if kind != "units")) if there else {}
    return {kind: float(now[kind] / size) for kind, size in there.items()}


def effort(size: float) -> float:
    """What work on a network takes that has this share of the multiply-adds: not all of it shrinks along.

    Example:
        >>> effort(1.0), effort(0.5)
        (1.0, 0.55)
    """
    return 0.1 + 0.9 * size


class Outlook:
    """Follows a run and says how many seconds are left.

    Args:
        clock: says what time it is, in seconds.

    Example:
        >>> now = [0.0]
        >>> outlook = Outlook(lambda: now[0])
        >>> outlook.begin(Ahead((), steps=4, goal=1.0))
        >>> now[0] = 2.0
        >>> outlook.done("step")
        >>> outlook.left()
        6.0
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ahead = Ahead(())
        self.size = 1.0
        self.closing = 0
        self._opened = self._last = clock()
        self._pending = 0.0
        self._first_step = False  # whether the first step is all that is known of steps
        self._sizes: list[float] = []
        self._count = dict.fromkeys(KINDS, 0)
        self._taken: dict[str, deque[tuple[float, float]]] = {kind: deque(maxlen=WINDOW) for kind in KINDS}

    def begin(self, ahead: Ahead) -> None:
        """Take over what is ahead; from now on every second counts."""
        self.ahead, self._sizes = ahead, list(ahead.sizes)
        self.size = self._sizes[0] if self._sizes else (1.0 if ahead.goal is None else ahead.goal)
        self._count = {
            "scoring": len(ahead.sizes), "repair": ahead.repairs, "evaluation": ahead.evaluations, "step": ahead.steps,
            "closing": self.closing,
        }  # fmt: skip
        self._last = self.clock()

    def spent(self) -> None:
        """Something happened on the way to the next thing that is done."""
        now = self.clock()
        self._pending, self._last = self._pending + now - self._last, now

    def done(self, kind: str) -> None:
        """One of a kind is done: what passed since the last one was for it."""
        self.spent()
        taken = self._taken[kind]
        if kind == "step" and self._first_step:  # it warms up, and says little of the others
            taken.clear()
            self._first_step = False
        elif kind == "step" and not taken:
            self._first_step = True
        taken.append((self._pending, effort(self.size)))
        self._pending = 0.0
        self._count[kind] = max(self._count[kind] - 1, 0)
        if kind == "scoring" and self._sizes:
            self._sizes.pop(0)

    def resize(self, size: float) -> None:
        """The network has this share of its multiply-adds left."""
        self.size = size

    def stop(self) -> None:
        """Nothing more is removed."""
        self._count |= {"scoring": 0, "evaluation": 0, "repair": min(self._count["repair"], 1)}

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._opened

    def one(self, kind: str) -> float | None:
        """Seconds that one of a kind would take in the unpruned network; None if nothing is known of it."""
        rates = self.ahead.rates
        taken, guess = self._taken[kind], rates.guesses().get(kind)
        if kind == "repair" and guess is None and rates.scored and self._taken["scoring"]:
            # no pass was timed where nothing is fine-tuned: a scoring tells how long one is
            guess = (self.one("scoring") or 0.0) * REPAIR * rates.repaired / (SCORING * rates.scored)
        if not taken or (kind == "step" and self._first_step and guess is not None):
            return guess
        return sum(seconds for seconds, _ in taken) / sum(weight for _, weight in taken)

    def left(self) -> float | None:
        """Seconds until the end; None while nothing is known of something that is to be done."""
        goal = self.size if self.ahead.goal is None else min(self.ahead.goal, self.size)
        total, longest = 0.0, 0.0
        running = self._pending + self.clock() - self._last
        for kind, count in self._count.items():
            if not count:
                continue
            one = self.one(kind)
            if one is None:
                return None
            if kind == "scoring" and not self._taken[kind]:
                one = max(one, running / effort(self.size))  # the first one takes longer than was guessed
            items = self._efforts(kind, count, goal)
            total += one * items
            longest = max(longest, one * (effort(self.size) if kind == "scoring" else items / max(count, 1)))
        return max(total - min(running, longest), 0.0)

    def _efforts(self, kind: str, count: int, goal: float) -> float:
        """How much work some of a kind are, in those on the unpruned network."""
        if kind == "scoring":
            return sum(effort(min(size, self.size)) for size in self._sizes)
        if kind in ("repair", "closing") or (kind == "step" and self.ahead.at_end):
            return count * effort(goal)
        return count * (effort(goal) + effort(self.size)) / 2
