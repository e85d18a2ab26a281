"""The two oracles: wrong groups fail, right ones pass, and the model does not notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import BudgetError, GroupError
from singe_plugin.integrations.torch_pruning import SInGEPruner, oracles, substitutes

from references import Net
from small_nets import Chain, Residual, Trace

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance()


def prune(model: nn.Module, x: Any = X, **options: Any) -> SInGEPruner:
    return SInGEPruner(model, x, MAGNITUDE, **options)


def names(pruner: SInGEPruner) -> list[str]:
    return [layer.name for layer in pruner.layers]


class Gain(nn.Module):
    """A per-channel buffer that torch-pruning knows nothing of."""

    def __init__(self, channels: int, dynamic: bool) -> None:
        super().__init__()
        self.register_buffer("gain", torch.rand(channels, 1, 1) + 0.5)
        self.dynamic = dynamic

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[: x.shape[1]] if self.dynamic else x * self.gain


def around(function: Callable[[Any, Tensor], Tensor], out: int = 8, **layers: nn.Module) -> nn.Module:
    """``conv`` -> ``function`` -> ``last``: is the group of ``conv`` right?"""
    return Net(
        lambda m, x: m.head(m.last(function(m, m.bn(m.conv(x)))).mean((2, 3))),
        conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), last=nn.Conv2d(out, 4, 1), head=nn.Linear(4, 3), **layers,
    )  # fmt: skip


def swapped(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b, a], 1)


def uneven(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([m.left(a), m.right(b)], 1)


def half_by_half(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


def interleaved(m: Any, x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


WRONG: dict[str, Callable[[], nn.Module]] = {
    "cat([b, a]) after a split": lambda: around(swapped),
    "halves of a chunk that would become uneven": lambda: around(
        uneven, left=nn.Conv2d(4, 4, 1), right=nn.Conv2d(4, 4, 1)
    ),
    "attention over the mean of the channels": lambda: around(
        lambda m, x: x * torch.sigmoid(m.attend(x.mean(1, keepdim=True))), attend=nn.Conv2d(1, 1, 3, padding=1)
    ),
    "the same behind a group norm": lambda: around(
        lambda m, x: m.gn(x) * torch.sigmoid(x.mean(1, keepdim=True)), gn=nn.GroupNorm(2, 8)
    ),
    "roll": lambda: around(lambda m, x: x.roll(1, 1)),
    "flip": lambda: around(lambda m, x: x.flip(1)),
    "softmax": lambda: around(lambda m, x: x.softmax(1)),
    "channel shuffle": lambda: around(interleaved),
    "pixel shuffle": lambda: around(lambda m, x: functional.pixel_shuffle(x, 2), out=2),
    "a buffer that is not sliced": lambda: around(lambda m, x: m.gain(x), gain=Gain(8, dynamic=False)),
    "a buffer that is sliced, but not by channel": lambda: around(lambda m, x: m.gain(x), gain=Gain(8, dynamic=True)),
    "one bias for all channels": lambda: around(lambda m, x: x + 0.5),
    "an activation with f(0) != 0": lambda: around(lambda m, x: torch.sigmoid(x)),
    "the same behind a layer norm": lambda: around(
        lambda m, x: torch.sigmoid(m.ln(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2), ln=nn.LayerNorm(8)
    ),
    "constants by position": lambda: around(lambda m, x: x * torch.linspace(1, 2, x.shape[1]).view(-1, 1, 1)),
    "as many groups as outputs, but more inputs": lambda: around(
        lambda m, x: m.divide(x), out=4, divide=nn.Conv2d(8, 4, 3, groups=4)
    ),
    "more outputs than groups": lambda: around(lambda m, x: m.times(x), out=16, times=nn.Conv2d(8, 16, 3, groups=8)),
    "a grouped transposed convolution": lambda: around(
        lambda m, x: m.up(x), up=nn.ConvTranspose2d(8, 8, 2, groups=2)
    ),
    "units spread unevenly over the groups of a group norm": lambda: around(
        lambda m, x: m.gn(torch.cat([x, m.other(x)], 1)), out=12, other=nn.Conv2d(8, 4, 1), gn=nn.GroupNorm(2, 12)
    ),
}  # fmt: skip

RIGHT: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: around(lambda m, x: torch.relu(x)),
    "halves of a chunk": lambda: around(half_by_half, out=4),
    "halves of a chunk and another layer": lambda: around(
        lambda m, x: half_by_half(m, x) + m.same(x), out=4, same=nn.Conv2d(8, 4, 1)
    ),
    "a gate": lambda: around(lambda m, x: x * torch.sigmoid(m.up(x.mean((2, 3))))[..., None, None], up=nn.Linear(8, 8)),
    "a group norm": lambda: around(lambda m, x: torch.relu(m.gn(x)), gn=nn.GroupNorm(2, 8)),
    "a layer norm": lambda: around(
        lambda m, x: m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), ln=nn.LayerNorm(8)
    ),
    "depthwise": lambda: around(lambda m, x: m.dw(x), dw=nn.Conv2d(8, 8, 3, groups=8)),
    "grouped": lambda: around(lambda m, x: m.grouped(x), grouped=nn.Conv2d(8, 8, 3, groups=2)),
    "transposed": lambda: around(lambda m, x: m.up(x), up=nn.ConvTranspose2d(8, 8, 2, stride=2)),
    "a slope per channel": lambda: around(lambda m, x: m.act(x), act=nn.PReLU(8)),
    "concat with itself": lambda: around(lambda m, x: torch.cat([x, torch.relu(x)], 1), out=16),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_groups_are_left_whole(case: str) -> None:
    pruner = prune(WRONG[case]())
    assert "conv" not in names(pruner)
    assert len(pruner.left_whole["conv"]) > 20
    assert "last" in names(pruner)  # the rest is not punished


@pytest.mark.parametrize("case", RIGHT)
def test_right_groups_pass(case: str) -> None:
    pruner = prune(RIGHT[case]())
    assert {"conv", "last"} <= set(names(pruner))
    assert set(pruner.left_whole) == {"head"}
    before = pruner.host().layers()
    pruner.step()
    assert all(a.units > b.units for a, b in zip(before, pruner.host().layers(), strict=True))
    assert pruner.model(X).shape == (2, 3)


def test_a_mistake_that_the_network_nearly_hides() -> None:
    """The wrong group does less to the output than any fixed tolerance: what counts is its share of the effect."""
    net = WRONG["attention over the mean of the channels"]()
    loud = Net(lambda m, x: m.net(x) * 1e-4 + m.other(x.flatten(1)), net=net, other=nn.Linear(108, 3))
    assert "net.conv" in prune(loud).left_whole


def test_two_groups_with_the_same_first_layer_have_two_names() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.conv(x).split([m.left.in_channels, m.right.in_channels], 1)
        out = m.right(b + m.on_right(x)) + m.left(a + m.on_left(x))  # the order that torch-pruning reads right
        return m.head(torch.relu(out).mean((2, 3)))

    net = Net(
        forward, conv=nn.Conv2d(3, 10, 1), on_left=nn.Conv2d(3, 6, 1), on_right=nn.Conv2d(3, 4, 1),
        left=nn.Conv2d(6, 8, 1), right=nn.Conv2d(4, 8, 1), head=nn.Linear(8, 3),
    )  # fmt: skip
    pruner = prune(net)
    found = names(pruner) + list(pruner.left_whole)
    assert len(found) == len(set(found)) == 4
    assert {layer.units for layer in pruner.host().layers()} == {6, 4, 8}


def test_unverified_groups_are_the_users_own_risk() -> None:
    assert "conv" in names(prune(WRONG["flip"](), verify=False))


def test_dead_units_cannot_be_verified() -> None:
    net = around(lambda m, x: x * 0)
    assert "cannot be verified" in prune(net).left_whole["conv"]


def test_nothing_to_prune() -> None:
    pruner = prune(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)))
    assert pruner.left_whole == {"1": "it reaches the model's output"}
    with pytest.raises(BudgetError, match="reaches the model's output"):
        pruner.run()
    pruner.step()


# --- the model does not notice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["nothing", "a layer", "everything"])
def test_the_model_is_unchanged_bit_for_bit(frozen: str, training: bool) -> None:
    net = Residual()
    net.train(training)
    net.blocks[0][1].train(not training)  # a frozen batch-norm in a training model
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.randn(4, 2, 6, 6)).sum().backward()
    optimizer.step()
    net.stem.requires_grad_(frozen == "nothing")
    net.requires_grad_(frozen != "everything" and net.fc.weight.requires_grad)
    if frozen == "a layer":
        net.stem.requires_grad_(False)
    net.stem.register_forward_hook(lambda *_: None)
    trace = Trace(net, optimizer)
    pruner = prune(net, torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert len(pruner.layers) == 3
    trace.assert_unchanged()


def test_a_fully_frozen_model_is_pruned_and_stays_frozen() -> None:
    net = Chain().requires_grad_(False)
    pruner = prune(net, torch.randn(2, 2, 6, 6))
    pruner.step()
    assert net.conv1.out_channels == 4
    pruner.host().remove("conv2", [0])
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in pruner.model.parameters())


def test_gradients_and_generators_are_left_alone_when_the_model_cannot_be_verified() -> None:
    net = Net(lambda m, x: m.b(torch.relu(m.a(x)).log()), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    net.b(torch.randn(2, 6)).sum().backward()
    trace = Trace(net)
    with pytest.raises(GroupError, match="not finite on random inputs"):
        prune(net, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))
    trace.assert_unchanged()


@pytest.mark.parametrize("context", ["randomised", "masked", "exchanged", "in_double"])
def test_what_is_substituted_is_put_back_after_an_error(context: str) -> None:
    net = Chain()
    pruner = prune(net, torch.randn(2, 2, 6, 6))
    group, units = pruner.host().full_group("conv1")
    slices = oracles.unit_slices(group, units)
    target = substitutes.derangement(len(units), torch.Generator())
    trace = Trace(net)
    make: dict[str, Callable[[], Any]] = {
        "randomised": lambda: substitutes.randomised(net), "masked": lambda: substitutes.masked(slices, {0}),
        "exchanged": lambda: substitutes.exchanged(slices, target), "in_double": lambda: substitutes.in_double(net),
    }  # fmt: skip
    values = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), make[context]():
        now = net.state_dict()
        assert any(v.dtype != now[k].dtype or not torch.equal(v, now[k]) for k, v in values.items())
        random.random(), np.random.rand(), torch.rand(1) if context == "randomised" else None
        raise ZeroDivisionError
    trace.assert_unchanged(ignore=() if context == "randomised" else ("rng",))


@pytest.mark.parametrize("count", [2, 3, 7, 64])
def test_a_derangement_moves_every_unit(count: int) -> None:
    target = substitutes.derangement(count, torch.Generator().manual_seed(count))
    assert sorted(target) == list(range(count))
    assert all(here != there for here, there in enumerate(target))
