"""Biases that another operator adds are solved along, and what shares one is not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Repair, SInGEPruner, hold_masks, repair
from singe_plugin.axes.tape import Tape
from singe_plugin.state import plain_layers

from cuda_cells import gru_cell, lstm_cell
from stranger_trial import copied

PINNED = Repair(images=10_000, ridge=1e-6, positions=10_000)


def without(net: nn.Module, x: Tensor, layer: str = "0", gone: tuple[int, ...] = (1, 4)) -> nn.Module:
    """A copy that lost units of a layer."""
    smaller = copy.deepcopy(net)
    SInGEPruner(smaller, x[:2], tp.importance.MagnitudeImportance()).host().remove(layer, list(gone))
    return smaller


class Mixing(nn.Module):
    """Tokens are mixed by a layer over a turned tensor, for which PyTorch adds the bias by an operator of its own."""

    def __init__(self, turned: bool, extra: bool = False) -> None:
        super().__init__()
        self.widen, self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        self.turned = turned
        self.shift = nn.Parameter(torch.randn(5)) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.widen(x).tanh().transpose(0, 1)
        hidden = self.layer(hidden if self.turned else hidden.contiguous())
        return self.last((hidden if self.shift is None else hidden + self.shift).tanh())


@pytest.mark.parametrize("extra", [False, True])
def test_a_bias_that_is_added_behind_is_solved_as_one_that_is_added_within(extra: bool) -> None:
    nets = []
    for turned in (True, False):
        torch.manual_seed(0)
        nets.append(Mixing(turned, extra).eval())
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(40, 7, 6) + 1
    smaller = [without(net, x, "widen") for net in nets]
    sites = [Tape.of(net, x).sites[1] for net in nets]
    assert [site[:2] for site in sites] == [("layer.weight", None), ("layer.weight", "layer.bias")]  # what is tried
    done = [repair(a, b, [x], PINNED).better for a, b in zip(smaller, nets, strict=True)]
    assert "layer.weight" in {layer.name for layer in done[0]}
    for key, value in smaller[0].state_dict().items():
        torch.testing.assert_close(value, smaller[1].state_dict()[key], rtol=1e-4, atol=1e-5)
    if extra:
        assert torch.equal(smaller[0].shift, nets[0].shift)  # type: ignore[arg-type]


def test_it_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    net, x = Mixing(True).eval(), torch.randn(40, 7, 6) + 1
    smaller = without(net, x, "widen")
    repair(smaller, net, [x], Repair(images=10_000, ridge=1e-13, positions=10_000))
    with torch.no_grad():
        inputs, outputs = smaller.widen(x).tanh().flatten(0, 1), net.layer(net.widen(x).tanh()).flatten(0, 1)
    rows = np.concatenate([inputs.double().numpy(), np.ones((len(inputs), 1))], 1)
    expected = np.linalg.lstsq(rows, outputs.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(smaller.layer.weight.detach().numpy(), expected[:, :-1], atol=1e-4)
    np.testing.assert_allclose(smaller.layer.bias.detach().numpy(), expected[:, -1], atol=1e-4)


def test_a_stream_is_made_up_for_behind_such_a_bias() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(self.one(x).tanh().transpose(0, 1)).transpose(0, 1)

    class Straight(Block):
        def forward(self, x: Tensor) -> Tensor:
            turned = x.transpose(0, 1)
            return turned + self.two(self.one(turned).tanh())

    for block, expected in ((Block, 0), (Straight, 1)):  # what is turned again is another tensor
        assert len(Tape.of(block(), torch.randn(3, 5, 6)).sums) == expected


def test_a_product_that_something_else_reads_keeps_its_mean() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.bias = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            bare = x @ self.matrix
            first: Tensor = bare + self.bias
            return first * first.tanh() * (bare if self.training else 1)

    net, x = Twice(), torch.randn(3, 4)
    assert Tape.of(net, x).added == {}
    assert Tape.of(net.eval(), x).added[0][0] == "bias"  # what is biased may be read by two


# -- recurrent layers: on CUDA, the matrices are multiplied step by step, and the cells add the biases -----------


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.stem, self.cells, self.head = nn.Linear(4, 8), kind(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.stem(x))[-1])

    def run(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class OnCuda(Sequence):
    """The operators that CUDA runs for it without cuDNN."""

    def run(self, x: Tensor) -> Tensor:
        c: Any = self.cells
        h = cell = x.new_zeros(x.shape[1], 6)
        found = []
        for step in x.unbind(0):
            if isinstance(c, nn.RNN):
                own = functional.linear(h, c.weight_hh_l0, c.bias_hh_l0)
                h = (functional.linear(step, c.weight_ih_l0, c.bias_ih_l0) + own).tanh()
            else:
                gates = step @ c.weight_ih_l0.t(), h @ c.weight_hh_l0.t()
                if isinstance(c, nn.LSTM):
                    h, cell, _ = lstm_cell(*gates, cell, c.bias_ih_l0, c.bias_hh_l0)
                else:
                    h, _ = gru_cell(*gates, h, c.bias_ih_l0, c.bias_hh_l0)
            found.append(h)
        return torch.stack(found)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_repaired_alike_everywhere(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    here, there = Sequence(kind).eval(), OnCuda(kind).eval()
    there.load_state_dict(here.state_dict())
    x = torch.randn(5, 60, 4) + 0.5
    results = []
    for net in (here, there):
        masked = copied(net)
        hold_masks(masked, {"stem.weight": torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) > 0.5})
        done = repair(masked, net, [x], PINNED)
        results.append(({layer.name: layer.reason for layer in done.layers}, masked.state_dict()))
    assert results[0][0] == results[1][0]
    assert results[0][0]["cells.weight_ih_l0"] is None
    assert "recurrent" in str(results[0][0]["cells.weight_hh_l0"])
    assert not torch.equal(results[0][1]["cells.bias_ih_l0"], here.cells.bias_ih_l0)
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_show_their_operators(kind: type[nn.RNNBase]) -> None:
    net, x = Sequence(kind).eval(), torch.randn(5, 3, 4)
    with plain_layers(net):
        assert {weight for weight, *_ in Tape.of(net, x).sites} >= {"cells.weight_ih_l0", "cells.weight_hh_l0"}
    assert torch.backends.mkldnn.enabled


# -- biases that belong to two -------------------------


class Shared(nn.Module):
    """Two layers with one bias, added within or behind."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.widen, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.two.bias = self.one.bias
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.widen(x).tanh()
        hidden = hidden.transpose(0, 1) if self.behind else hidden
        return self.one(hidden) * self.two(hidden)


@pytest.mark.parametrize("behind", [False, True])
def test_a_bias_of_two_layers_stays(behind: bool) -> None:
    torch.manual_seed(0)
    net, x = Shared(behind).eval(), torch.randn(40, 7, 6)
    smaller = without(net, x, "widen")
    done = {layer.name: layer for layer in repair(smaller, net, [x], PINNED).layers}
    assert torch.equal(smaller.one.bias, net.one.bias)
    if behind:
        assert all(layer.ridge is not None for layer in done.values())
    else:
        assert {layer.reason for layer in done.values()} == {"its bias is read by addmm, too"}


# -- what no layer reads -------------------------


class Attention(nn.Module):
    """One head, with queries, keys and values of layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.queries(x) @ self.keys(x).transpose(1, 2) / 3).softmax(-1)
        return self.last(weights @ self.values(x))


def test_what_comes_after_queries_and_keys_that_went_is_solved() -> None:
    """No layer reads them, but what they were multiplied for is another number."""
    torch.manual_seed(0)
    net, x = Attention().eval(), 2 * torch.randn(64, 7, 6)
    smaller = without(net, x, "queries", (0, 1, 2, 3, 4, 5))
    assert (smaller.queries.out_features, smaller.keys.out_features) == (2, 2)
    before = copy.deepcopy(smaller.state_dict())
    (layer,) = repair(smaller, net, [x]).layers
    assert layer.name == "last.weight"
    assert layer.after < layer.before
    assert all(torch.equal(before[key], value) for key, value in smaller.state_dict().items() if "last" not in key)
