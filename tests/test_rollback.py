"""Blocks that put everything back, alone and inside of each other: the weights are copied once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from singe_plugin import FineTune, prune, prune_weights, rollback
from singe_plugin.axes import AxisGraph, remove_units
from singe_plugin.rollback import Trackers, all_or_nothing

from asked import asked
from fingerprint import assert_untouched, fingerprint
from small_nets import mlp, vectors

X = vectors()[0][0]


class Broken(Exception):
    pass


def net_of() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def spoil(net: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """Another step, other statistics, a unit less, another mode."""
    optimizer.zero_grad()
    net.train()(X).sum().backward()
    optimizer.step()
    graph = AxisGraph(net, X)
    remove_units(graph, next(iter(graph.groups.values())), [1], Trackers([optimizer]))
    torch.rand(3)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every record of a model's content, whether it has a copy of the weights."""
    made: list[bool] = []

    class Counted(rollback.Contents):
        def __init__(self, *args: Any, parameters: bool = False, **kwargs: Any) -> None:
            made.append(parameters)
            super().__init__(*args, parameters=parameters, **kwargs)

    monkeypatch.setattr(rollback, "Contents", Counted)
    return made


@pytest.mark.parametrize("run", [prune, prune_weights])
@pytest.mark.parametrize("given", [True, False])
def test_a_run_copies_the_weights_once(run: Any, given: bool, copies: list[bool]) -> None:
    target = {"target": "params=0.5"} if run is prune else {"sparsity": 0.5}
    finetune = {"finetune": FineTune(vectors(), 2)} if given else {"finetune_steps": 2}
    run(mlp(), vectors(), **asked(nodes=1, **target, **finetune))
    assert copies.count(True) == 1


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("caught", ["outside", "inside"])
@pytest.mark.parametrize("covered", [True, False])
def test_a_block_inside_of_another_one(covered: bool, caught: str, error: Any, copies: list[bool]) -> None:
    net = net_of()
    optimizer = torch.optim.Adam(net.parameters())
    inner = nn.Linear(1, 1)  # something that the outer block does not put back
    net(X).sum().backward()
    optimizer.step()
    before = fingerprint(net, vars(optimizer), versions=False)
    after_inner: list[bool] = []
    with pytest.raises(error), all_or_nothing(net, None, Trackers([optimizer])):
        try:
            with all_or_nothing(net, None, Trackers([optimizer], [] if covered else [inner])):
                spoil(net, optimizer)
                nn.init.zeros_(inner.weight)
                raise error
        except error:
            after_inner.append(bool(inner.weight))
            if caught == "outside":
                raise
        raise error
    assert_untouched(before, net, vars(optimizer), versions=False)
    assert copies.count(True) == (1 if covered else 2)
    assert after_inner == [not covered]
    assert rollback._open == []


def test_blocks_over_other_models_copy_for_themselves(copies: list[bool]) -> None:
    one, two = net_of(), net_of()
    before = fingerprint(two, versions=False)
    with all_or_nothing(one, None, Trackers()):
        with pytest.raises(Broken), all_or_nothing(two, None, Trackers()):
            nn.init.zeros_(two[0].weight)
            raise Broken
        assert_untouched(before, two, versions=False)
    assert copies.count(True) == 2
