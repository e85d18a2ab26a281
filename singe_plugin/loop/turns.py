"""The two generators of turns that come with the loop: Algorithm 1, and rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from singe_plugin.loop.events import LayerDone, RoundDone, RunStarted
from singe_plugin.loop.loop import Allocation, Loop, Scores, Turn
from singe_plugin.loop.pace import Pace, units_per_turn

__all__ = ["in_layers", "in_rounds"]


def in_layers(loop: Loop, pace: Pace) -> Iterator[Turn]:
    r"""Algorithm 1: one layer after the other, in forward order.

    .. code-block:: text

        for l in 1..L
            while pruning_rate(W_l) <= rho_l
                M <- C(W_l, F, D)            # score
                n <- argmin M;  remove W_l^n # one unit, or units_per_step of them
                fine-tune                    # here (every="removal"), or after the loop (every="layer")

    The plan of the loop's progress says how many units of each layer go, ``next_layer`` how many layers are done.
    """
    progress, host, callback = loop.progress, loop.host, loop.callback
    layers = list(host.layers())
    progress.begin(layers)
    todo = [layer.name for layer in layers if progress.plan.get(layer.name, 0) > 0]
    assert pace.units_per_step is not None
    chunks = [units_per_turn(pace.units_per_step, progress.original(name)) for name in todo]
    removals = [math.ceil(progress.plan[name] / chunk) for name, chunk in zip(todo, chunks, strict=True)]
    if not progress.removals and not progress.next_layer and not progress.end_done:
        callback.on_run_start(RunStarted(dict(progress.plan), loop.steps))
    total, behind = sum(removals), sum(removals[: progress.next_layer])
    phases = (behind, total) if loop.every == "removal" else (progress.next_layer, len(todo))
    loop.look_ahead([number / total for number in range(behind, total)], *phases)
    for index in range(progress.next_layer, len(todo)):
        name, chunk, before = todo[index], chunks[index], sum(removals[:index])
        for number in range(removals[index]):
            # of what was planned so far, what is not gone yet: a host may have kept some back (see Bounded)
            gone = progress.original(name) - progress.left(name)
            count = min((number + 1) * chunk, progress.plan[name]) - gone
            steps = 0
            if loop.every == "removal":
                steps = loop.share(before + number, sum(removals))
            elif loop.every == "layer" and number == removals[index] - 1:
                steps = loop.share(index, len(todo))
            closing, last = number == removals[index] - 1, index == len(todo) - 1
            yield Turn((name,), lambda _, name=name, count=count: {name: count}, steps, closing, closing and last)  # type: ignore[misc]
        callback.on_layer_done(LayerDone(name, index, len(todo), host.params(), loop.shares()))
        progress.next_layer = index + 1
        loop.save(progress)


def in_rounds(
    loop: Loop, pace: Pace, allocate: Allocation, expect: Callable[[Scores], Mapping[str, int]] | None = None
) -> Iterator[Turn]:
    """All layers together, several times: units of different layers can be compared, and each loses a few every time.

    The progress counts the rounds that are done in ``next_layer``, and in ``plan`` what they removed.

    Args:
        loop: whose turns these are.
        pace: how many rounds there are, and how far each goes.
        allocate: how many units go now, given all scores and how far the rounds are.
        expect: what one round would do, for those who watch, where that is found with less than ``allocate``.
    """
    progress, host, callback = loop.progress, loop.host, loop.callback
    assert pace.rounds is not None
    progress.begin(host.layers())
    rounds = range(progress.next_layer, pace.rounds)
    loop.look_ahead([pace.share_after(number) for number in rounds], progress.next_layer, pace.rounds)
    for number in rounds:

        def decide(scores: Scores, number: int = number) -> dict[str, int]:
            share = pace.share_after(number + 1)
            counts = {name: count for name, count in allocate(scores, share).items() if count > 0}
            if number == 0 and not progress.end_done:
                # what one round would do; later scores may spread it otherwise
                if pace.rounds == 1:
                    expected = dict(counts)
                else:
                    expected = dict(allocate(scores, 1.0) if expect is None else expect(scores))
                callback.on_run_start(RunStarted(expected, loop.steps))
            return counts

        names = [layer.name for layer in host.layers()]
        before = {name: progress.left(name) for name in names}
        steps = 0 if loop.every == "end" else loop.share(number, pace.rounds)
        yield Turn(names, decide, steps, last=number + 1 == pace.rounds)
        gone = {name: units - progress.left(name) for name, units in before.items()}
        for name, count in gone.items():
            if count:
                progress.plan[name] = progress.plan.get(name, 0) + count
        left = sum(progress.left(name) for name in names)
        callback.on_round_done(RoundDone(number + 1, pace.rounds, sum(gone.values()), left, loop.shares()))
        progress.next_layer = number + 1
        if number + 1 == pace.rounds:
            for index, name in enumerate(names):
                callback.on_layer_done(LayerDone(name, index, len(names), host.params()))
        loop.save(progress)
