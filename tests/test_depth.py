"""Networks of twice the depth take twice the work: graphs, their verification, and what is left whole.

Work is counted in calls of Python functions of this package and in layers that run, never in seconds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.axes import AxisGraph, oracles, remove_units, verify_groups
from singe_plugin.axes.homes import home_of, parts_of

from small_nets import Trace

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Two queries for every key: a number that the model does not tell anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q = functional.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)), scale=0.5)
        return self.o(q.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(8), nn.LayerNorm(8), Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class Deep(nn.Module):
    """A transformer, between an embedding and a head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def graph_of(depth: int, spoiled: bool = False) -> AxisGraph:
    """Trace a transformer; if it is spoiled, two groups of every block miss their biases."""
    graph = AxisGraph(Deep(depth).eval(), X)
    for name in [name for name in graph.groups if spoiled and (".mlp." in name or name.endswith(".q"))]:
        places = graph.places[graph.groups[name].leaf.root()]
        places[:] = [(held, dim) for held, dim in places if held.attr != "bias"]
    graph.changed()
    return graph


def calls(work: Callable[[], Any]) -> int:
    """Count the calls of Python functions of the package, comprehensions included."""
    count = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "singe_plugin" in frame.f_code.co_filename

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def drop_all(graph: AxisGraph) -> None:
    for name in list(graph.groups):
        graph.drop(name, "for a test")
    assert len(graph.left_whole) >= len(graph.groups)


def remove_one_each(graph: AxisGraph) -> None:
    for group in graph.groups.values():
        remove_units(graph, group, [0], undo=False)


WORK: dict[str, Callable[[int], Callable[[], Any]]] = {
    "a graph": lambda depth: lambda: graph_of(depth),
    "verification": lambda depth: partial(verify_groups, graph_of(depth)),
    "what is left whole": lambda depth: partial(drop_all, graph_of(depth)),
    "removal": lambda depth: partial(remove_one_each, graph_of(depth)),
}


@pytest.mark.parametrize("work", WORK)
def test_work_grows_with_depth_and_not_faster(work: str) -> None:
    calls(WORK[work](1))  # what is looked up once for a class
    few, some, many = (calls(WORK[work](depth)) for depth in (2, 3, 5))
    assert few < some < many
    assert many - some <= 2.05 * (some - few)  # twice as many blocks more; with a square, 16 instead of 5


def test_runs_of_the_model_do_not_grow_with_the_number_of_wrong_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, blocks = Counter[int](), Counter[int]()
    depth, run, forward = 0, oracles.Bench._outputs, Attention.forward

    def counted_run(bench: Any) -> Any:
        runs[depth] += type(bench) is oracles.Bench  # and no part of the model
        return run(bench)

    def counted_forward(attention: Attention, x: Tensor) -> Tensor:
        blocks[depth] += 1
        return forward(attention, x)

    monkeypatch.setattr(oracles.Bench, "_outputs", counted_run)
    monkeypatch.setattr(Attention, "forward", counted_forward)
    for depth in (3, 6):
        graph = graph_of(depth, spoiled=True)
        assert len(verify_groups(graph)) == 2 * depth
    assert runs[6] == runs[3]
    assert blocks[6] <= 2 * blocks[3]


def test_what_is_wrong_is_what_the_whole_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts only find faster what the model finds with all of it."""
    found = verify_groups(graph_of(3, spoiled=True))
    monkeypatch.setattr(oracles, "parts_of", lambda bench, groups: iter(()))
    slowly = verify_groups(graph_of(3, spoiled=True))
    assert len(found) == 6
    assert {name: why[:30] for name, why in found.items()} == {name: why[:30] for name, why in slowly.items()}


def test_the_model_is_as_it_was() -> None:
    graph = graph_of(2, spoiled=True)
    trace = Trace(graph.model)
    rows = [list(scale.rows) for scale in graph.scales]
    verify_groups(graph)
    trace.assert_unchanged()
    assert {group.size for group in graph.groups.values()} == {2, 4, 8, 12}
    assert all(group.left == list(range(group.initial)) for group in graph.groups.values())
    assert rows == [list(scale.rows) for scale in graph.scales]


def test_homes() -> None:
    """The smallest module that holds all, runs once and neither takes nor gives the units."""
    graph = graph_of(2)
    blocks = dict(graph.model.named_modules())
    homes = {name: home_of(graph, group) for name, group in graph.groups.items()}
    assert homes["embed"] is None
    assert homes["blocks.1.mlp.0"] is blocks["blocks.1.mlp"]
    assert homes["blocks.0.attention.q"] is homes["blocks.0.attention.q#2"] is blocks["blocks.0.attention"]


def test_a_part_that_runs_twice_or_keeps_something_is_no_part() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    class Times(nn.Sequential):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    class Leaning(nn.Module):
        """Its hidden layer needs a number that the model gives it for a while."""

        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.block.mlp = Times(*self.block.mlp)

        def forward(self, x: Tensor) -> Tensor:
            self.block.mlp.factor = 3.0
            x = self.block(x)
            self.block.mlp.factor = 1.0
            return x

    graph = AxisGraph(Twice().eval(), X)
    assert {home_of(graph, group) for group in graph.groups.values()} == {None}
    graph = AxisGraph(Leaning().eval(), X)
    with oracles.opened_bench(graph, X) as bench:
        found = {part.module: inside for part, inside in parts_of(bench, list(graph.groups.values()))}
    assert set(found) == {graph.model.block.attention}


def test_dropping_one_at_a_time_ranks_as_anew() -> None:
    """Groups that share channels with one that is dropped are ranked again; the others stay as they are."""
    for name in ("blocks.0.attention.q", "blocks.0.attention.q#2", "blocks.1.mlp.0"):
        graph = graph_of(2)
        graph.drop(name, "for a test")
        kept = {key: (g.secondary, g.in_heads) for key, g in graph.groups.items()}
        graph._meet()
        graph._rank(graph.groups.values())
        assert kept == {key: (g.secondary, g.in_heads) for key, g in graph.groups.items()}
