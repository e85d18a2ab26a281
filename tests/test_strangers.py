"""Networks that nobody made the rules for: none is pruned wrongly, none breaks, hardly any is refused."""

from __future__ import annotations

from functools import cache

import pytest

from stranger_trial import Outcome, attempt, fuzz, summary

CHUNKS, PER_CHUNK, SLOW = 6, 50, 60
MOST_REFUSED = 0.05

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:LSTM with projections")


@cache
def outcomes_of(first: int) -> tuple[Outcome, ...]:
    return tuple(fuzz(range(first, first + PER_CHUNK)))


def check(first: int) -> None:
    outcomes = outcomes_of(first)
    text = summary(outcomes)
    assert not [o for o in outcomes if o.verdict in ("wrong", "crash")], text
    assert sum(o.removals for o in outcomes) > 2 * PER_CHUNK, text


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_removed_is_what_the_masked_original_computes(chunk: int) -> None:
    check(chunk * PER_CHUNK)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(SLOW))
def test_thousands_of_strangers(chunk: int) -> None:
    check(10_000 + chunk * PER_CHUNK)


def test_few_are_refused() -> None:
    outcomes = [*outcomes_of(0), *outcomes_of(PER_CHUNK)]
    refused = [o for o in outcomes if o.verdict == "refused"]
    assert all(o.detail for o in refused)
    assert len(refused) <= MOST_REFUSED * len(outcomes), summary(outcomes)


def test_the_same_seed_is_the_same_network() -> None:
    assert attempt(7) == attempt(7)


@pytest.mark.parametrize("seed", [10437, 11361, 11719])
def test_a_part_whose_seam_moves_with_the_whole_is_found(seed: int) -> None:
    """The seam fell where it was meant to in every trial, or between channels of one sign, where nobody felt it."""
    assert attempt(seed).verdict == "fine"
