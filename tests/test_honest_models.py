"""Models that draw random numbers, keep what they computed, have fused or checkpointed layers or tensors of a subclass.

They are verified like any others, and what is pruned computes what the masked model computes.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from singe_plugin.axes import AxisGraph, remove_units, verify_groups
from singe_plugin.axes.substitutes import SharedNoise, double_inputs, random_inputs
from singe_plugin.errors import GroupError
from singe_plugin.loop.costs import count_macs
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.nested import call_model, tensors_in, to_device

from fingerprint import assert_untouched, fingerprint
from references import Net

Noise = Any


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def verified(net: nn.Module, inputs: Any) -> AxisGraph:
    """The graph, after verification, which leaves no trace."""
    before = fingerprint(net)
    graph = AxisGraph(net, inputs)
    for name, reason in verify_groups(graph).items():
        graph.drop(name, reason)
    assert_untouched(before, net)
    return graph


def share(graph: AxisGraph) -> float:
    """The share of the parameters that are in some group."""
    sizes = {id(p.tensor): p.tensor.numel() for g in graph.groups.values() for p in g.slices() if p.is_parameter}
    return sum(sizes.values()) / sum(p.numel() for p in graph.model.parameters())


# -- random forward passes --------------------------------------------------------------------------------------------


def vae(noise: Noise) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.encode(x))
        mean, spread = m.mean(hidden), torch.exp(m.log_variance(hidden) / 2)
        return m.out(torch.relu(m.decode(noise(mean, spread))))

    return Net(
        forward, encode=nn.Linear(12, 16), mean=nn.Linear(16, 8), log_variance=nn.Linear(16, 8),
        decode=nn.Linear(8, 16), out=nn.Linear(16, 12),
    )  # fmt: skip


NOISES: dict[str, Noise] = {
    "randn_like": lambda mean, spread: mean + torch.randn_like(mean) * spread,
    "randn of the shape": lambda mean, spread: mean + torch.randn(mean.shape) * spread,
    "rsample": lambda mean, spread: torch.distributions.Normal(mean, spread).rsample(),
    "normal": lambda mean, spread: torch.normal(mean, spread.detach()),
    "in place": lambda mean, spread: mean + torch.empty_like(mean).normal_(0.1, 2.0) * spread,
    "uniform": lambda mean, spread: mean + (torch.rand_like(mean) - 0.5) * spread,
    "exponential": lambda mean, spread: mean + torch.zeros_like(spread).exponential_() * spread,
}


@pytest.mark.parametrize("noise", NOISES)
def test_a_reparameterisation_is_verified_and_its_units_go(noise: str) -> None:
    net = vae(NOISES[noise])
    graph = verified(net, torch.randn(3, 12))
    assert list(graph.groups) == ["encode", "mean", "decode"]
    remove_units(graph, graph.groups["mean"], [0, 3, 7])
    assert net.mean.out_features == net.log_variance.out_features == net.decode.in_features == 5
    assert net(torch.randn(3, 12)).shape == (3, 12)


def monte_carlo(m: Any, x: Tensor) -> Tensor:
    x = functional.dropout(torch.relu(m.first(x)), 0.5, training=True)
    x = functional.dropout2d(torch.relu(m.second(x)), 0.3, training=True)
    x = functional.alpha_dropout(x, 0.1, training=True)
    return m.head(functional.dropout(x.mean((2, 3)), 0.2, training=True))


def test_dropout_that_is_on_in_eval_mode() -> None:
    net = Net(monte_carlo, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 8, 3), head=nn.Linear(8, 5)).eval()
    assert list(verified(net, torch.randn(2, 3, 16, 16)).groups) == ["first", "second"]


def masked_autoencoder(m: Any, x: Tensor) -> Tensor:
    x = m.embed(x)
    count, length, width = x.shape
    kept = torch.argsort(torch.rand(count, length), 1)[:, : length // 2]
    x = torch.gather(x, 1, kept.unsqueeze(-1).repeat(1, 1, width))
    return m.out(m.second(torch.relu(m.first(x))))


def test_a_masked_autoencoder() -> None:
    net = Net(masked_autoencoder, embed=nn.Linear(6, 16), first=nn.Linear(16, 32), second=nn.Linear(32, 16),
              out=nn.Linear(16, 6))  # fmt: skip
    assert list(verified(net, torch.randn(2, 10, 6)).groups) == ["embed", "first", "second"]


def test_noise_does_not_depend_on_the_shape() -> None:
    def draws(width: int) -> list[float]:
        x = torch.zeros(3, width)
        with SharedNoise():
            made = [torch.randn_like(x), torch.rand(2, width), x.clone().uniform_(), torch.normal(x, 1.0)]
            made += [torch.nn.functional.dropout(x + 1, 0.5), torch.bernoulli(x + 0.7)]
        assert all(len(t.unique()) == 1 for t in made)
        return [float(t.flatten()[0]) for t in made]

    assert draws(4) == draws(40)


def test_a_single_number_may_be_drawn() -> None:
    with SharedNoise():  # as a layer that is left out at random is decided on
        drawn = [torch.rand([]), torch.rand(()), torch.rand(1), torch.randn(2, 0)]
    assert [tuple(t.shape) for t in drawn] == [(), (), (1,), (2, 0)]


# -- inputs -----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@dataclass
class Inputs:
    left: Tensor
    right: Tensor


class Attributes(OrderedDict):  # type: ignore[type-arg]
    def __getattr__(self, key: str) -> Any:
        return self[key]


def siamese() -> nn.Module:
    def forward(m: Any, pair: Any) -> Tensor:
        return m.head(torch.relu(m.body(pair.left)) - torch.relu(m.body(pair.right)))

    return Net(forward, body=nn.Linear(6, 16), head=nn.Linear(16, 3))


@pytest.mark.parametrize("kind", [Pair, Inputs, lambda a, b: Attributes(left=a, right=b)])
def test_every_input_has_random_numbers_of_its_own_and_keeps_its_class(kind: Any) -> None:
    given = (kind(torch.zeros(4, 6), torch.zeros(4, 6)),)
    for made in (random_inputs(given), double_inputs(given), to_device(given, torch.device("cpu"))):
        assert type(made[0]) is type(given[0])
    drawn = random_inputs(given)[0]
    assert not torch.equal(drawn.left, drawn.right)
    assert float(given[0].left.abs().sum()) == 0
    graph = verified(siamese(), given)
    assert list(graph.groups) == ["body"]
    batch = (kind(torch.randn(4, 6), torch.randn(4, 6)),), torch.tensor([0, 1, 2, 0])
    assert float(score_units(graph.model, graph.groups["body"].unit_group(), [batch]).sum()) > 0


def test_dict_inputs_get_different_numbers() -> None:
    inputs = random_inputs({"a": torch.zeros(5), "b": [torch.zeros(5), {"c": torch.zeros(5)}], "n": 3})
    a, b, c = tensors_in(inputs)
    assert not any(torch.equal(x, y) for x, y in ((a, b), (a, c), (b, c)))
    net = Net(lambda m, left, right: m.head(torch.relu(m.body(left)) - torch.relu(m.body(right))),
              body=nn.Linear(6, 16), head=nn.Linear(16, 3))  # fmt: skip
    assert list(verified(net, {"left": torch.ones(4, 6), "right": torch.ones(4, 6)}).groups) == ["body"]


# -- tensors of other classes -----------------------------------------------------------------------------------------


class Labelled(Tensor):
    """A subclass without behaviour of its own."""


def mlp() -> Any:
    net: Any = Net(lambda m, x: m.head(torch.relu(m.body(x)) * m.scale), body=nn.Linear(6, 16), head=nn.Linear(16, 3))
    net.scale = torch.ones(1)
    return net


@pytest.mark.parametrize("where", ["input", "attribute", "parameter", "buffer"])
def test_tensors_of_a_subclass(where: str) -> None:
    net, x = mlp(), torch.randn(4, 6)
    if where == "input":
        x = x.as_subclass(Labelled)
    elif where == "attribute":
        net.scale = torch.full((1,), 2.0).as_subclass(Labelled)
    elif where == "parameter":
        net.body.weight = nn.Parameter(net.body.weight.data.as_subclass(Labelled))
    else:
        del net.scale
        net.register_buffer("scale", torch.rand(16).as_subclass(Labelled))
    graph = verified(net, x)
    assert list(graph.groups) == ["body"]
    assert graph.left_whole == {"head": "it reaches the model's output"}
    scores = score_units(net, graph.groups["body"].unit_group(), [(x, torch.tensor([0, 1, 2, 0]))])
    assert type(scores) is Tensor
    remove_units(graph, graph.groups["body"], [1, 4])
    assert net(x).shape == (4, 3)


def test_a_tensor_made_of_others_is_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    net = mlp()
    net.head.weight = nn.Parameter(TwoTensor(net.head.weight.data, net.head.weight.data.clone()))
    with pytest.raises(GroupError, match=r"head\.weight is a TwoTensor"):
        AxisGraph(net, torch.randn(4, 6))


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_a_dictionary_of_constants_is_no_cache() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if "bias" not in m.kept:
            m.kept["bias"] = m.bias * 2
        return m.head(torch.relu(m.body(x)) * m.tables["scale"] + m.kept["bias"])

    net: Any = Net(forward, body=nn.Linear(6, 16), head=nn.Linear(16, 3), bias=nn.Parameter(torch.randn(16)))
    net.tables, net.kept = {"scale": torch.full((1,), 2.0)}, {}
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    fresh = verified(net, x)
    expected = score_units(net, fresh.groups["body"].unit_group(), [(x, y)], Scoring(nodes=2))
    with torch.no_grad():
        net(x)  # now it keeps something that does not follow the weights
    graph = verified(net, x)
    assert list(graph.groups) == ["body"]
    torch.testing.assert_close(
        score_units(net, graph.groups["body"].unit_group(), [(x, y)], Scoring(nodes=2)), expected
    )
    kept = net.kept
    remove_units(graph, graph.groups["body"], [0])
    assert net.kept is kept
    assert kept == {}
    assert net(x).shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_that_was_cached_in_single_precision(dtype: torch.dtype) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.body(x))
        if m.shape != x.shape:
            m.grid, m.shape = torch.rand(x.shape[-1:], generator=torch.Generator().manual_seed(1)).to(x), x.shape
        return m.head((x + m.grid).mean((2, 3)))

    net: Any = Net(forward, body=nn.Conv2d(2, 8, 3), head=nn.Linear(8, 3))
    net.shape, net.grid = None, torch.empty(0)
    net(torch.randn(2, 2, 7, 7))
    assert list(verified(net.to(dtype), torch.randn(2, 2, 7, 7, dtype=dtype)).groups) == ["body"]


# -- fused and checkpointed layers ------------------------------------------------------------------------------------


def encoder(mode: bool | None = None) -> Any:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return Net(lambda m, x: m.head(m.encoder(m.embed(x)).mean(1)), embed=nn.Linear(6, 16),
               encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(16, 4)).eval()  # fmt: skip


def test_the_layers_of_a_transformer_encoder_can_be_pruned_in_eval_mode() -> None:
    net, x = encoder(), torch.randn(2, 7, 6)
    graph = verified(net, x)
    assert share(graph) > 0.95
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_macs(net, x) == count_macs(net.train(), x)  # the fused operator has no count
    net.eval()
    for group in graph.groups.values():
        if not group.secondary:
            remove_units(graph, group, range(group.size // 4))
    with torch.no_grad():
        fused = net(x)
    torch.testing.assert_close(fused, net.requires_grad_(True)(x).detach())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        count, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(count, length, -1))


def transformer(reentrant: bool | None) -> nn.Module:
    def run(part: Any, x: Tensor) -> Tensor:
        return part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        x = x + run(m.attention, x)
        x = x + run(lambda y: m.second(functional.gelu(m.first(y))), x)
        return m.head(x.mean(1))

    torch.manual_seed(0)
    return Net(forward, embed=nn.Linear(6, 16), attention=Attention(), first=nn.Linear(16, 32),
               second=nn.Linear(32, 16), head=nn.Linear(16, 4)).eval()  # fmt: skip


def scores_of(net: nn.Module, **options: Any) -> Iterator[Tensor]:
    graph = verified(net, torch.randn(2, 7, 6))
    batch = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    for group in graph.groups.values():
        before = fingerprint(net)
        yield score_units(net, group.unit_group(), [batch], Scoring(nodes=2, **options))
        assert_untouched(before, net)


@pytest.mark.parametrize("options", [{}, {"path": "neuron", "unit_batch": 1}])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_is_scored_as_without(reentrant: bool, options: dict[str, Any]) -> None:
    expected, scores = (list(scores_of(transformer(mode), **options)) for mode in (None, reentrant))
    assert len(scores) == 4  # heads, their dimensions, and two widths
    for a, b in zip(scores, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert "apply" not in vars(CheckpointFunction)


# -- errors -----------------------------------------------------------------------------------------------------------


class Broken(Exception):
    """An error of the user's."""


def breaking(at: int, error: BaseException, once: bool = False) -> nn.Module:
    calls = [0]

    def forward(m: Any, x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == at or (calls[0] > at and not once):
            raise error
        return m.head(torch.relu(m.body(x)))

    return Net(forward, body=nn.Linear(6, 16), head=nn.Linear(16, 3))


@pytest.mark.parametrize("at", [2, 4, 6, 8])
@pytest.mark.parametrize("error", [MemoryError(), OSError("no such file"), KeyboardInterrupt(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_errors_of_the_machine_are_nobody_elses(error: BaseException, at: int) -> None:
    net = breaking(at, error)
    with pytest.raises(type(error)) as caught:
        verify_groups(AxisGraph(net, torch.randn(2, 6)))
    assert caught.value is error


@pytest.mark.parametrize("at", [3, 4, 6, 8])
def test_a_model_that_begins_to_fail_is_no_reason_to_leave_layers_whole(at: int) -> None:
    with pytest.raises(GroupError, match="Broken: by itself"):
        verify_groups(AxisGraph(breaking(at, Broken("by itself")), torch.randn(2, 6)))


def test_a_failure_that_comes_of_the_removal_is_a_reason() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.body(x))
        if x.detach().numpy().shape[1] % 4:  # which nobody sees; of x.shape[1] it would be known
            raise Broken("widths are multiples of 4")
        return m.head(x)

    net = Net(forward, body=nn.Linear(6, 16), head=nn.Linear(16, 3))
    reasons = verify_groups(AxisGraph(net, torch.randn(2, 6)))
    assert "Broken: widths are multiples of 4" in reasons["body"]


def test_a_model_that_fails_on_its_own_example() -> None:
    with pytest.raises(GroupError, match="Broken: always"):
        AxisGraph(breaking(0, Broken("always")), torch.randn(2, 6))
    assert call_model(mlp(), torch.randn(2, 6)).shape == (2, 3)
