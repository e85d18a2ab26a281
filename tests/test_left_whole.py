"""Nothing with weights is left out in silence: a parameter loses units of its outputs, or is named with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups
from singe_plugin.errors import SingeError

from axes_networks import CASES, made
from networks import random_network

X, IDS, TOKENS = torch.randn(2, 4), torch.randint(0, 10, (2, 5)), torch.randn(2, 5, 4)
PARAMETRIZE = nn.utils.parametrizations


class Applied(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Conv1D(nn.Module):
    """The linear layer of transformers' GPT-2: its weight is ``[inputs, outputs]``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


def sandwich(layer: nn.Module, inputs: int = 8, outputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, inputs), nn.ReLU(), layer, nn.ReLU(), nn.Linear(outputs, 2))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    width = 12 if options.get("bidirectional") else 6
    return Applied(
        lambda m, x: m.fc(m.cells(m.table(x))[0][:, -1]),
        table=nn.Embedding(10, 8), cells=kind(8, 6, batch_first=True, **options), fc=nn.Linear(width, 2),
    )  # fmt: skip


def attending(**options: Any) -> nn.Module:
    return Applied(
        lambda m, x: m.fc(m.attention(*[m.embed(x)] * 3)[0].mean(1)),
        embed=nn.Linear(4, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True, **options), fc=nn.Linear(8, 2),
    )  # fmt: skip


def tied() -> nn.Module:
    net = Applied(
        lambda m, x: m.fc(torch.relu(m.inner(m.table(x))).mean(1)),
        table=nn.Embedding(10, 8), inner=nn.Linear(8, 8), fc=nn.Linear(8, 10),
    )  # fmt: skip
    net.fc.weight = net.table.weight
    return net


# the network, its input, and words of the reasons for what is named, if it is
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "LSTM": (lambda: recurrent(nn.LSTM), IDS, {"table": "its rows are the vocabulary", "fc": "output"}),
    "GRU": (lambda: recurrent(nn.GRU), IDS, {"table": "no matrix that reads something"}),
    "RNN": (lambda: recurrent(nn.RNN, num_layers=2), IDS, {"table": "no matrix that reads something"}),
    "two directions": (
        lambda: recurrent(nn.LSTM, bidirectional=True), IDS, {"table": "no matrix that reads something"},
    ),
    "a cell": (lambda: nn.Sequential(nn.GRUCell(4, 8), nn.Linear(8, 2)), X, {"1": "output"}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(4, 8), nn.GELU(), Conv1D(8, 2)), X, {}),
    "weight norm, old": (
        lambda: sandwich(nn.utils.weight_norm(nn.Linear(8, 8))), X, {},
    ),
    "weight norm": (lambda: sandwich(PARAMETRIZE.weight_norm(nn.Linear(8, 8))), X, {"2": "by a parametrization"}),
    "spectral norm": (lambda: sandwich(PARAMETRIZE.spectral_norm(nn.Linear(8, 8))), X, {"2": "by a parametrization"}),
    "orthogonal": (lambda: sandwich(PARAMETRIZE.orthogonal(nn.Linear(8, 8))), X, {"2": "by a parametrization"}),
    "bilinear": (
        lambda: Applied(lambda m, x: m.fc(m.two(m.a(x), m.a(x))), a=nn.Linear(4, 6), two=nn.Bilinear(6, 6, 8),
                        fc=nn.Linear(8, 2)),
        X, {"two": "no matrix that reads something writes its units", "fc": "output"},
    ),
    "attention": (attending, TOKENS, {"fc": "it reaches the model's output"}),
    "attention with more": (lambda: attending(add_bias_kv=True), TOKENS, {"attention.in_proj_weight": "kept whole"}),
    "a bag": (lambda: nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 2)), IDS, {"0": "_embedding_bag"}),
    "a table": (
        lambda: Applied(lambda m, x: m.fc((m.table(x) + m.places).mean(1)), table=nn.Embedding(10, 8),
                        places=torch.randn(1, 5, 8), fc=nn.Linear(8, 2)),
        IDS, {"table": "no matrix that reads something writes", "places": "no matrix that reads something writes"},
    ),
    "never read": (
        lambda: Applied(lambda m, x: m.fc(m.a(x)), a=nn.Linear(4, 8), spare=nn.Linear(8, 8), more=torch.zeros(3, 3),
                        fc=nn.Linear(8, 2)),
        X, {"spare": "no forward pass reads it", "more": "no forward pass reads it"},
    ),
    "one channel": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2)), X, {"0": "it has one output channel"}),
    "one channel, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 1, 2), nn.Conv2d(1, 2, 1)), torch.randn(2, 3, 4, 4),
        {"0": "it has one output channel"},
    ),
    "only a layer": (lambda: nn.Linear(4, 2), X, {"weight": "it reaches the model's output"}),
    "tied": (tied, IDS, {"fc": "vocabulary of an embedding"}),
    "a function without a rule": (
        lambda: Applied(lambda m, x: m.fc(torch.linalg.inv(m.a(x)[:, :, None] * torch.eye(8))[:, 0]),
                        a=nn.Linear(4, 8), fc=nn.Linear(8, 2)),
        X, {"a": "", "fc": "it reaches the model's output"},
    ),
    "a bare matrix": (
        lambda: Applied(lambda m, x: m.fc(torch.relu(torch.relu(m.a(x)) @ m.matrix)), a=nn.Linear(4, 8),
                        matrix=torch.randn(8, 6), fc=nn.Linear(6, 2)),
        X, {"fc": "it reaches the model's output"},
    ),
    "a bare matrix at the end": (
        lambda: Applied(lambda m, x: torch.relu(m.a(x)) @ m.matrix, a=nn.Linear(4, 8), matrix=torch.randn(8, 6)),
        X, {},
    ),
    "an encoder": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)),
        TOKENS, {"2": "it reaches the model's output"},
    ),
}  # fmt: skip


def unexplained(graph: AxisGraph) -> list[str]:
    """By a real removal of one unit of every group: the matrices whose outputs stay, and that no reason names.

    A matrix that lost positions of its inputs only counts as one that stays.
    """
    model = graph.model
    before = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    for group in list(graph.groups.values()):
        if not group.secondary and group.size > 1:
            remove_units(graph, group, [0], Trackers())
    after = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if p.ndim > 1}
    silent = []
    for name, shape in before.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        inputs = {nn.Linear: 1, nn.Conv1d: 1, nn.Conv2d: 1, nn.ConvTranspose2d: 0, nn.Conv3d: 1}.get(type(owner))
        shrunk = any(a < b for d, (a, b) in enumerate(zip(after[name], shape, strict=True)) if d != inputs)
        layer = name.rpartition(".parametrizations.")[0] or name.rpartition(".")[0]
        if not shrunk and not {name, layer} & {key for key, reason in graph.left_whole.items() if reason}:
            silent.append(name)
    return silent


def checked(model: nn.Module, inputs: Any) -> AxisGraph:
    graph = AxisGraph(model, inputs)
    for name, reason in verify_groups(graph).items():
        graph.drop(name, reason)
    return graph


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_matrix_is_pruned_or_named(name: str) -> None:
    make, inputs, reasons = NETWORKS[name]
    torch.manual_seed(0)
    graph = checked(make(), inputs)
    for layer, words in reasons.items():
        assert words in graph.left_whole.get(layer, words), graph.left_whole
    assert unexplained(graph) == [], (graph.groups, graph.left_whole)


@pytest.mark.parametrize("name", CASES)
def test_of_the_networks_with_axes_of_every_kind(name: str) -> None:
    model, inputs, _ = made(name)
    graph = checked(model, inputs)
    assert unexplained(graph) == [], (graph.groups, graph.left_whole)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 300))])
def test_of_random_networks(seed: int) -> None:
    network = random_network(seed)
    try:
        graph = checked(network.model, network.inputs)
    except SingeError:
        return  # refused as a whole, with its reason
    assert unexplained(graph) == [], (graph.groups, graph.left_whole)


def test_a_group_that_fails_an_oracle_names_all_its_layers() -> None:
    """Not only the first one, after which it is called."""
    graph = AxisGraph(attending(), TOKENS)
    for name in list(graph.groups):
        graph.drop(name, "dropped by the test")
    assert set(graph.left_whole) >= {"embed", "attention.in_proj_weight", "attention.out_proj", "fc"}
    assert unexplained(graph) == []


def test_what_is_ignored_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = AxisGraph(model, X, ignored=[model[2]], ignored_parameters=[model[0].weight])
    assert graph.left_whole == {
        "0": "it is in ignored_layers", "2": "it is in ignored_layers", "4": "it reaches the model's output"
    }  # fmt: skip
