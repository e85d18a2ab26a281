"""Weights that a layer computes are pruned as what comes out: what is left of it is left as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from singe_plugin import Builder, load, save
from singe_plugin import prune as prune_model
from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups
from singe_plugin.computed import computed_in, plain_layer
from singe_plugin.errors import RemovalError
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_groups
from singe_plugin.rollback import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*_norm.*is deprecated:FutureWarning")


class Doubled(nn.Module):
    """Some parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tanh()


class Softened(nn.Module):
    """One that shares something out between the columns, which is another weight when some are gone."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.softmax(1) + 0.1 * weight


def parametrized(layer: nn.Module, step: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", step)
    return layer


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of taps": lambda layer: parametrizations.weight_norm(layer, dim=2),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "older weight norm": nn.utils.weight_norm,
    "older weight norm of taps": lambda layer: nn.utils.weight_norm(layer, dim=2),
    "spectral norm": parametrizations.spectral_norm,
    "older spectral norm": nn.utils.spectral_norm,
    "two steps": lambda layer: parametrizations.spectral_norm(parametrized(layer, Doubled())),
    "one's own": lambda layer: parametrized(layer, Doubled()),
    "a mask of torch.nn.utils.prune": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}


class Taps(nn.Sequential):
    """Three convolutions along a sequence, the middle one with a computed weight."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        torch.manual_seed(3)
        layers = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 7, 3, padding=1, bias=bias), nn.Conv1d(7, 2, 1)
        super().__init__(layers[0], nn.Tanh(), KINDS[kind](layers[1]), nn.ReLU(), layers[2])


def slow(x: Tensor, layers: list[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[Any]:
    """The network of :class:`Taps` as loops over numbers, of weights and biases."""
    y = x.numpy()
    for number, (weight, bias) in enumerate(layers):
        side = weight.shape[2] // 2
        out = np.zeros((y.shape[0], weight.shape[0], y.shape[2]))
        for n, o, t in np.ndindex(*out.shape):
            out[n, o, t] = bias[o]
            for i, k in np.ndindex(weight.shape[1], weight.shape[2]):
                if 0 <= t + k - side < y.shape[2]:
                    out[n, o, t] += weight[o, i, k] * y[n, i, t + k - side]
        y = np.tanh(out) if number == 0 else np.maximum(out, 0) if number == 1 else out
    return y


def effective(net: nn.Module) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The weights and biases of the layers, as plain numbers."""
    found = []
    for layer in (net[0], net[2], net[4]):  # type: ignore[index]
        weights = [w.value() for w in computed_in(layer)]
        weight = weights[0] if weights else layer.weight.detach()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        found.append((weight.numpy().copy(), bias.numpy().copy()))
    return found


def without(layers: list[tuple[NDArray[Any], NDArray[Any]]], first: list[int], second: list[int]) -> list[Any]:
    (a, b), (c, d), (e, f) = layers
    a, b, c = np.delete(a, first, 0), np.delete(b, first), np.delete(np.delete(c, first, 1), second, 0)
    return [(a, b), (c, np.delete(d, second)), (np.delete(e, second, 1), f)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_of_a_computed_weight_is_as_it_was(kind: str, bias: bool) -> None:
    net = Taps(kind, bias).double().eval()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    before, held = effective(net), list(net.parameters())
    np.testing.assert_allclose(net(x).detach().numpy(), slow(x, before), atol=1e-12)
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    assert set(graph.groups) == {"0", "2"}
    assert graph.groups["2"].writers == {"2": net[2]}
    remove_units(graph, graph.groups["0"], [1, 4])
    remove_units(graph, graph.groups["2"], [0, 2, 3])
    remove_units(graph, graph.groups["0"], [0])
    expected = without(before, [0, 1, 4], [0, 2, 3])
    for (weight, shift), (known, offset) in zip(effective(net), expected, strict=True):
        np.testing.assert_allclose(weight, known, atol=1e-12)
        np.testing.assert_allclose(shift, offset, atol=1e-12)
    np.testing.assert_allclose(net(x).detach().numpy(), slow(x, expected), atol=1e-12)
    assert all(one is other for one, other in zip(net.parameters(), held, strict=True))
    assert (net[2].in_channels, net[2].out_channels) == (3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_network_with_a_computed_weight_is_whole(kind: str) -> None:
    net, x = Taps(kind).eval(), torch.randn(2, 3, 5)
    for _ in range(2):
        graph = AxisGraph(net, x)
        assert verify_groups(graph) == {}
        remove_units(graph, graph.groups["2"], [1])
        remove_units(graph, graph.groups["0"], [2, 0])
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()
    net.eval().zero_grad()
    twin = copy.deepcopy(net) if "older" not in kind and "mask" not in kind else None
    if twin is not None:
        torch.testing.assert_close(twin(x), net(x))
    again = Taps(kind).eval()
    graph = AxisGraph(again, x)
    remove_units(graph, graph.groups["0"], [0, 1, 2, 3])
    remove_units(graph, graph.groups["2"], [0, 1])
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x))


def test_a_weight_that_cannot_be_left_as_it_is_stays_whole_and_is_named() -> None:
    net = nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(), parametrized(nn.Linear(6, 7), Softened()), nn.ReLU(), nn.Linear(7, 2)
    )
    graph = AxisGraph(net, torch.randn(2, 3))
    wrong = verify_groups(graph)
    assert list(wrong) == ["0"]  # its rows are as they were without others
    assert all(words in wrong["0"] for words in ("'2' is computed by Softened", "remove_parametrizations"))
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RemovalError, match="cannot give what is left of it"):
        remove_units(graph, graph.groups["0"], [1])
    for one, other in zip(net.parameters(), before, strict=True):
        assert torch.equal(one, other)


def test_what_has_no_rule_is_named_with_the_remedy() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), parametrizations.orthogonal(nn.Linear(6, 7)), nn.Linear(7, 2))
    graph = AxisGraph(net, torch.randn(2, 3))
    assert not graph.groups
    assert "remove_parametrizations(layer, 'weight')" in graph.left_whole["2"]
    parametrize.remove_parametrizations(net[2], "weight")
    assert set(AxisGraph(net, torch.randn(2, 3)).groups) == {"0", "2"}


@pytest.mark.parametrize("criterion", ["l2", "grad", "norm_grad", "ig_abs"])
@pytest.mark.parametrize("kind", ["weight norm", "weight norm of taps", "older weight norm", "spectral norm"])
def test_units_are_scored_as_those_of_a_plain_layer(kind: str, criterion: str) -> None:
    net, x = Taps(kind).eval(), torch.randn(4, 3, 5)
    plain = Taps("one's own").eval()
    parametrize.remove_parametrizations(plain[2], "weight")
    with torch.no_grad():
        (weight,) = computed_in(net[2])
        plain[2].weight.copy_(weight.value())
        plain[2].bias.copy_(net[2].bias)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [(x, torch.zeros(4, dtype=torch.int64))]
    options = Scoring(criterion=criterion, objective=lambda outputs, _: outputs.square().mean())
    found = [
        score_groups(n, {name: g.unit_group() for name, g in AxisGraph(n, x).groups.items()}, batches, options)
        for n in (net, plain)
    ]
    for name in ("0", "2"):
        torch.testing.assert_close(found[0][name], found[1][name])
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert type(net[2]).__name__ == ("Conv1d" if "older" in kind else "ParametrizedConv1d")


def test_averaged_weights_and_optimizers_are_cut_along() -> None:
    net, x = Taps("weight norm").eval(), torch.randn(2, 3, 5)
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for p in ema.parameters():
            p.add_(0.1 * torch.randn_like(p))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(x).square().sum().backward()
    optimizer.step()
    expected = without(effective(ema), [1, 2], [])
    graph = AxisGraph(net, x)
    remove_units(graph, graph.groups["0"], [1, 2], Trackers([optimizer], [ema]))
    np.testing.assert_allclose(effective(ema)[1][0], expected[1][0], rtol=1e-5, atol=1e-6)
    for p in net.parameters():
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape


@pytest.mark.parametrize("kind", ["weight norm", "older weight norm", "spectral norm", "older spectral norm"])
def test_a_snapshot_goes_back_behind_what_was_rescaled(kind: str) -> None:
    net, x = Taps(kind).eval(), torch.randn(2, 3, 5)
    graph = AxisGraph(net, x)
    before, outputs = {k: v.clone() for k, v in net.state_dict().items()}, net(x).detach()
    undo = Snapshot(net, graph)
    remove_units(graph, graph.groups["0"], [1, 2])
    undo.restore()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net(x), outputs)


def test_a_direction_of_which_nothing_is_left_gives_zeros() -> None:
    net = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 2)).double()
    with torch.no_grad():
        net[1].parametrizations.weight.original1[2, 1:] = 0.0
    graph = AxisGraph(net, torch.randn(2, 3, dtype=torch.float64))
    expected = net[1].weight.detach()[:, 1:].clone()
    remove_units(graph, graph.groups["0"], [0])
    torch.testing.assert_close(net[1].weight.detach(), expected)
    assert not expected[2].any()


def test_tied_directions_are_refused() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), *(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)), nn.Linear(4, 2)
    )
    net[2].parametrizations.weight.original1 = net[1].parametrizations.weight.original1
    graph = AxisGraph(net, torch.randn(2, 3))
    assert not graph.groups
    assert "are one tensor" in graph.left_whole["1"]


def test_layers_that_are_plain_for_a_while_are_put_back() -> None:
    for kind in ("weight norm", "older spectral norm"):
        net = Taps(kind).eval()
        x = torch.randn(2, 3, 5)
        state, out = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
        with pytest.raises(KeyboardInterrupt), plain_layer(net[2]):
            assert isinstance(net[2]._parameters["weight"], nn.Parameter)
            torch.testing.assert_close(net(x), out)
            raise KeyboardInterrupt
        assert list(net.state_dict()) == list(state)
        assert torch.equal(net(x), out)


def test_pickling_of_what_can_be_pickled() -> None:
    net, x = Taps("older weight norm").eval(), torch.randn(2, 3, 5)
    graph = AxisGraph(net, x)
    remove_units(graph, graph.groups["2"], [1])
    twin = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(twin(x), net(x))


@pytest.mark.parametrize("kind", ["weight norm", "older weight norm", "spectral norm", "older spectral norm"])
def test_pruned_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Wide(kind)
    data = [(torch.randn(4, 3, 5), torch.randint(0, 2, (4, 5))) for _ in range(2)]
    result = build_pruned(net, data)
    assert net.middle.in_channels < 12
    assert net.middle.out_channels < 14
    save(result, tmp_path / "pruned", builder=Builder("factory", f"{__name__}:Wide", {"kind": kind}))
    loaded = load(tmp_path / "pruned", trust=True).model
    x = data[0][0]
    torch.testing.assert_close(loaded.eval()(x), net.eval()(x))
    weights = [w.value() for layer in (loaded.middle, net.middle) for w in computed_in(layer)]
    torch.testing.assert_close(*weights)


class Wide(nn.Module):
    """As :class:`Taps`, with more units, and a norm in front of the computed weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.Conv1d(14, 2, 1)
        self.middle = KINDS[kind](nn.Conv1d(12, 14, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.relu(self.middle(torch.relu(self.norm(self.first(x))))))
        return found


def build_pruned(net: nn.Module, data: Any) -> Any:
    scoring = Scoring(criterion="ig_abs", objective=lambda y, t: nn.functional.cross_entropy(y, t))
    return prune_model(net, data, target="macs=0.5", scoring=scoring)
