"""Layers that compute their weights or take two inputs: what goes with a unit, and what is left whole by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups

from references import Net
from stranger_truth import Truth

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")
Make = Callable[[nn.Module], nn.Module]
NORMS: dict[str, Make] = {"parametrization": parametrizations.weight_norm, "hook": weight_norm}


def graph_of(model: nn.Module, x: Any) -> AxisGraph:
    graph = AxisGraph(model, x)
    for name, reason in verify_groups(graph).items():
        graph.drop(name, reason)
    return graph


def removed(model: nn.Module, x: Tensor, layer: str, units: list[int]) -> None:
    """Remove units and compare with the masked original."""
    truth = Truth(model)
    graph = graph_of(model, x)
    remove_units(graph, graph.groups[layer], units, Trackers(emas=[truth.tags]))
    torch.testing.assert_close(model(x), truth.model()(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", NORMS)
def test_a_weight_normed_reader_loses_columns(kind: str) -> None:
    with torch.no_grad():
        net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), NORMS[kind](nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))
    group = graph_of(net, torch.zeros(3, 4)).groups["0"].unit_group()
    assert [producer.name for producer in group.producers] == ["0"]  # who reads is not decayed
    removed(net, torch.randn(3, 4), "0", [1, 2, 6])


@pytest.mark.parametrize("kind", NORMS)
def test_a_weight_normed_writer_loses_rows(kind: str) -> None:
    with torch.no_grad():
        both = Net(lambda m, x: m.out(torch.relu(m.one(x) + m.two(x))), one=nn.Linear(4, 8), two=nn.Linear(4, 8))
        both.out = nn.Linear(8, 2)
        both.two = NORMS[kind](both.two)
    group = graph_of(both, torch.randn(3, 4)).groups["one"].unit_group()
    assert [producer.name for producer in group.producers] == ["one", "two"]
    removed(both, torch.randn(3, 4), "one", [0, 5])


def test_a_bilinear_layer_reads_two_inputs_and_its_attributes_follow() -> None:
    net = Net(
        lambda m, x: m.out(torch.tanh(m.both(m.one(x).sigmoid(), m.two(x).sigmoid()))),
        one=nn.Linear(4, 6), two=nn.Linear(4, 5), both=nn.Bilinear(6, 5, 7), out=nn.Linear(7, 2),
    )  # fmt: skip
    removed(net, torch.randn(3, 4), "one", [0, 2, 3])
    removed(net, torch.randn(3, 4), "two", [4])
    assert (net.both.in1_features, net.both.in2_features, net.both.out_features) == (3, 4, 7)
    assert net.both.weight.shape == (7, 3, 4)


def test_what_the_bilinear_layer_reads_is_not_decayed_in_it() -> None:
    net = Net(
        lambda m, x: m.both(m.one(x), m.two(x)), one=nn.Linear(4, 6), two=nn.Linear(4, 5), both=nn.Bilinear(6, 5, 2)
    )
    groups = graph_of(net, torch.zeros(3, 4)).groups
    assert {name: [p.name for p in g.unit_group().producers] for name, g in groups.items()} == {
        "one": ["one"], "two": ["two"],
    }  # fmt: skip


def gated(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 12), Net(lambda m, x: function(x)), nn.Linear(6, 2))


@pytest.mark.parametrize(
    "function", [functional.glu, nn.GLU(), lambda x: functional.glu(x.unsqueeze(1), dim=2).squeeze(1)]
)
def test_the_halves_of_a_gate_go_together(function: Callable[[Tensor], Tensor]) -> None:
    net = gated(function)
    assert graph_of(net, torch.randn(3, 4)).groups["0"].size == 6
    removed(net, torch.randn(3, 4), "0", [1, 2, 5])
    assert net[0].out_features == 6


@pytest.mark.parametrize("queries", [4, 8])
def test_the_widths_of_grouped_queries(queries: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (n, -1)).transpose(1, 2)
            for layer, n in zip((m.q, m.k, m.v), (queries, 2, 2), strict=True)
        )
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(y.transpose(1, 2).flatten(2)).mean(1)

    net = Net(
        forward, q=nn.Linear(5, queries * 4), k=nn.Linear(5, 8), v=nn.Linear(5, 8), out=nn.Linear(queries * 4, 3)
    ).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    assert {name: g.size for name, g in graph_of(net, x).groups.items()} == {"q": 4, "v": 4}
    removed(net, x, "q", [1, 2])  # the scale is 1 / sqrt(2) from now on, which q makes up for
    removed(net, x, "v", [0])
    assert (net.q.out_features, net.k.out_features, net.v.out_features) == (queries * 2, 4, 6)


def test_a_shuffle_by_the_operator_keeps_its_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 2, 2)
    assert graph_of(net, x).groups["0"].size == 4
    removed(net, x, "0", [0, 3])
    assert net[0].out_channels == 4
