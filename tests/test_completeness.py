"""Along the path of one unit alone, the signed integral is the change of F, for every group that is found anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Group
from singe_plugin.axes.substitutes import double_inputs, masked
from singe_plugin.method import scoring
from singe_plugin.method.options import Scoring
from singe_plugin.method.path import decay_path
from singe_plugin.method.units import subgroup
from singe_plugin.nested import call_model, tensors_in

from axes_networks import CASES, made
from networks import random_network, randomise
from references import Net
from strangers import stranger

NODES = 24


def objective(outputs: Any, _: Any) -> Tensor:
    """A random projection of all outputs, bent so that it is not linear in them."""
    total = torch.zeros((), dtype=torch.float64)
    for number, output in enumerate(tensors_in(outputs)):
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        total = total + (torch.sin(output) * probe).sum() / probe.norm()
    return total


def integral(model: nn.Module, group: Group, units: list[int], x: Any) -> Tensor:
    """The signed integral of <W, grad F(uW)> over u in [0, 1], for each unit alone, by the scoring engine."""
    path = decay_path(mu=0.9, quadrature="gauss", nodes=NODES)
    options = Scoring(path="neuron", unit_batch=1, objective=objective)
    part = subgroup(group.unit_group(), torch.tensor(units))
    (stats,) = scoring._walk(model, part, [(x, torch.zeros(1))], options, path)
    share = path.weights / path.weights.mul(path.scales).sum()
    return torch.stack([(share[:, None] * layer.inner).sum(0) for layer in stats]).sum(0)


def complete(model: nn.Module, x: Any, most: int = 8) -> int:
    """Compare the last unit of every group with what F really loses without it; how many groups were compared.

    Whether a group may be removed is another question (the oracles'): its units decay by themselves in any case.
    """
    model, x = model.double().eval(), double_inputs(x)
    graph = AxisGraph(model, x)
    compared = 0
    for group in list(graph.groups.values())[:most]:
        if group.only_training:
            continue  # F is taken in eval mode
        producers = group.unit_group().producers
        if any(p.is_norm and p.slots[0].tensor is None for p in producers):
            continue  # a norm without an affine part cannot be masked by its parameters
        if any(p.norm is not None and p.norm.weight is None for p in producers):
            continue
        units = [group.size - 1]
        with torch.no_grad():
            start = objective(call_model(model, x), None)
            changes = []
            for unit in units:
                with masked({group: [unit]}, producers_only=True):
                    changes.append(start - objective(call_model(model, x), None))
        found, change = integral(model, group, units, x), torch.stack(changes)
        # kinks of ReLU on the way leave an error of the quadrature
        torch.testing.assert_close(found, change, rtol=2e-2, atol=2e-3 * float(start.abs()) + 1e-6, msg=group.name)
        compared += 1
    return compared


# a standardised weight does not depend on its own size: F jumps at the very end of its path
@pytest.mark.parametrize("name", [name for name in CASES if name != "a standardised weight"])
def test_groups_of_small_networks(name: str) -> None:
    model, x, _ = made(name)
    complete(model, x)


@pytest.mark.parametrize("chunk", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 16))])
def test_groups_of_generated_networks(chunk: int) -> None:
    networks = [random_network(seed) for seed in range(chunk * 8, chunk * 8 + 8)]
    assert sum(complete(network.model, network.inputs, 4) for network in networks) > 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_groups_of_strangers(seed: int) -> None:
    network = stranger(seed)
    complete(network.model, network.inputs, 4)


QUICK, OTHERS = ("test_resnet", "test_vit"), ("test_efficientnet", "test_convnext", "test_mambaout", "test_byobnet")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_groups_of_backbones(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip("not in this timm")
    model = randomise(timm.create_model(name, num_classes=4))
    assert complete(model, torch.randn(2, 3, 64 if "vit" not in name else 160, 64 if "vit" not in name else 160), 4)


def attention() -> nn.Module:
    return Net(
        lambda m, x: m.head((s := m.stem(x)) + m.mha(s, s, s, need_weights=False)[0]).mean(1),
        stem=nn.Linear(6, 8), mha=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Net(lambda m, x: m.head(m.layer(m.stem(x))).mean(1), stem=nn.Linear(6, 8), layer=layer, head=nn.Linear(8, 3))


def bare(how: str) -> nn.Module:
    """``x @ W`` and its like, between two linear layers of one width."""
    weight = nn.Parameter(torch.randn(8, 8))

    def forward(m: Any, x: Tensor) -> Tensor:
        s = m.stem(x)
        y = {
            "matmul": lambda: s @ m.w, "transposed": lambda: s @ m.w.T, "linear": lambda: nn.functional.linear(s, m.w),
            "einsum": lambda: torch.einsum("bti,io->bto", s, m.w), "scaled": lambda: s @ (m.w * 2.0),
            "bmm": lambda: torch.bmm(s, m.w.expand(len(s), -1, -1)), "parts": lambda: s @ torch.cat(m.w.chunk(2, 0), 0),
            "low rank": lambda: nn.functional.linear(s, m.b @ m.a),
        }[how]()  # fmt: skip
        return m.head(torch.tanh(s + y)).mean(1)

    net = Net(forward, stem=nn.Linear(6, 8), head=nn.Linear(8, 3))
    net.w, net.a, net.b = weight, nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 4))
    return net


BARE = ["matmul", "transposed", "linear", "einsum", "scaled", "bmm", "parts", "low rank"]
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [attention, encoder])
def test_groups_of_attention(make: Any) -> None:
    assert complete(make(), TOKENS)


@pytest.mark.parametrize("how", BARE)
def test_groups_around_a_bare_parameter(how: str) -> None:
    assert complete(bare(how), TOKENS)


def readers(graph: AxisGraph, group: str) -> Iterator[tuple[str, int]]:
    for part in graph.groups[group].slices():
        if part.reads:
            yield f"{graph.names[part.owner]}.{part.attr}".strip("."), part.dim


@pytest.mark.parametrize("how", BARE)
def test_who_contracts_reads(how: str) -> None:
    graph = AxisGraph(bare(how), TOKENS)
    dim = 1 if how in ("transposed", "linear") else 0
    expected = {("head.weight", 1), ("a", 1)} if how == "low rank" else {("head.weight", 1), ("w", dim)}
    assert set(readers(graph, "stem")) == expected


def test_what_is_added_and_contracted_produces() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        s = m.stem(x)
        return m.head(torch.tanh(s + m.v)).mean(1) + (s @ m.v).mean(1, keepdim=True)

    net = Net(forward, stem=nn.Linear(6, 8), head=nn.Linear(8, 3))
    net.v = nn.Parameter(torch.randn(8))
    assert set(readers(AxisGraph(net, TOKENS), "stem")) == {("head.weight", 1)}
    assert complete(net, TOKENS)


def test_attention_reads_along_the_second_dimension() -> None:
    found = set(readers(AxisGraph(attention(), TOKENS), "stem"))  # it is as wide inside as outside
    assert found == {("head.weight", 1), ("mha.in_proj_weight", 1), ("mha.out_proj.weight", 1)}


def test_every_kind_of_producer_is_met() -> None:
    networks = [random_network(seed) for seed in range(32)]
    models = [made(name)[:2] for name in CASES] + [(n.model, n.inputs) for n in networks] + [(attention(), TOKENS)]
    graphs = [AxisGraph(model.eval(), x) for model, x in models]
    slots = [slot for graph in graphs for group in graph.groups.values() for slot in group.unit_group().slots()]
    kinds = {f"{type(slot.owner).__name__}.{slot.attr}" for slot in slots}
    assert {f"{kind}.weight" for kind in ("Conv2d", "Linear", "BatchNorm2d", "LayerNorm", "ConvTranspose2d")} <= kinds
    assert {"MultiheadAttention.in_proj_weight", "Embedding.weight"} <= kinds
    assert any(not kind.endswith(("weight", "bias")) for kind in kinds)  # a parameter that some module holds
