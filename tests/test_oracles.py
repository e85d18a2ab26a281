"""The two oracles: wrong groups fail, right ones pass, and the model does not notice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.axes import AxisGraph, oracles, substitutes, verify_groups
from singe_plugin.axes.algebra import concat, fresh
from singe_plugin.errors import BudgetError, GroupError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.pace import Pace
from singe_plugin.nested import relative_change

from asked import asked
from references import Net
from small_nets import Chain, Residual, Trace

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance()


def prune(model: nn.Module, x: Any = X, **options: Any) -> SInGEPruner:
    return SInGEPruner(model, x, MAGNITUDE, **asked(**options))


def names(pruner: SInGEPruner) -> list[str]:
    return [layer.name for layer in pruner.layers]


def around(function: Callable[[Any, Tensor], Tensor], out: int = 8, **layers: nn.Module) -> nn.Module:
    """``conv`` -> ``function`` -> ``last``: is the group of ``conv`` right?"""
    return Net(
        lambda m, x: m.head(m.last(function(m, m.bn(m.conv(x)))).mean((2, 3))),
        conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), last=nn.Conv2d(out, 4, 1), head=nn.Linear(4, 3), **layers,
    )  # fmt: skip


def attention() -> nn.Module:
    """Two heads of four, with the scale that scaled_dot_product_attention makes of their width."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.qkv, self.last = 2, nn.Linear(3, 24), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = (x := x.flatten(2).transpose(1, 2)).shape
            q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            x = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
            return self.last(x).mean(1)

    return Heads()


def forget(graph: AxisGraph, group: str, layer: str, attr: str, dim: int) -> None:
    """Take one slice out of a group."""
    leaf = graph.groups[group].leaf.root()
    places = graph.places[leaf]
    found = [p for p in places if (graph.names[p[0].owner], p[0].attr, p[1]) == (layer, attr, dim)]
    assert len(found) == 1
    places.remove(found[0])
    graph.changed()


def misread(graph: AxisGraph, group: str, layer: str) -> None:
    """Let a layer believe that the group's units come in another order."""
    leaf = graph.groups[group].leaf.root()
    number, (held, dim) = next(
        (i, p) for i, p in enumerate(graph.places[leaf]) if graph.names[p[0].owner] == layer and p[1] == 1
    )
    half = leaf.size // 2
    first, second = fresh(half), fresh(half)
    leaf.parts = (first, second)
    graph.places[first[0]] = graph.places.pop(leaf)
    axes = list(held.axes)
    axes[dim] = concat([second, first])
    graph.places[first[0]][number] = (replace(held, axes=tuple(axes)), dim)
    graph.groups[group].leaf = first[0]
    graph.changed()


WRONG: dict[str, tuple[Callable[[], nn.Module], Callable[[AxisGraph], None], str]] = {
    "a reader is missing": (
        lambda: around(lambda m, x: torch.relu(x)), lambda g: forget(g, "conv", "last", "weight", 1), "misses a slice",
    ),
    "a bias is missing": (
        lambda: around(lambda m, x: torch.relu(x)), lambda g: forget(g, "conv", "conv", "bias", 0), "misses a slice",
    ),
    "a running mean is missing": (
        lambda: around(lambda m, x: torch.relu(x)), lambda g: forget(g, "conv", "bn", "running_mean", 0),
        "misses a slice",
    ),
    "halves are exchanged": (
        lambda: around(lambda m, x: torch.relu(x)), lambda g: misread(g, "conv", "last"), "misses a slice",
    ),
    "an attribute does not follow": (
        lambda: around(lambda m, x: m.dw(x), dw=nn.Conv2d(8, 8, 3, groups=8)),
        lambda g: g.trace.links.clear(), "fails when its units are removed",
    ),
    "an attribute does not follow, and nothing fails": (
        lambda: around(lambda m, x: m.gn(x), gn=nn.GroupNorm(8, 8)), lambda g: g.trace.links.clear(), "removed",
    ),
    "the softmax temperature is not kept": (
        attention, lambda g: g.scales.clear(), "not the same as masking",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_groups_fail_and_the_others_pass(case: str) -> None:
    make, spoil, reason = WRONG[case]
    x = torch.randn(2, 3, 6, 6)
    model = make().eval()
    graph = AxisGraph(model, x)
    assert verify_groups(graph) == {}
    first = next(iter(graph.groups))
    spoil(graph)
    trace = Trace(model)
    found = verify_groups(graph)
    trace.assert_unchanged()
    assert list(found) == [first]
    assert reason in found[first]


def test_a_mistake_that_the_network_nearly_hides() -> None:
    """The wrong group does ten million times less to the output than another path does."""
    quiet = around(lambda m, x: torch.relu(x))
    loud = Net(lambda m, x: m.net(x) * 1e-6 + m.other(x.flatten(1)), net=quiet, other=nn.Linear(108, 3))
    graph = AxisGraph(loud.eval(), X)
    assert verify_groups(graph) == {}
    forget(graph, "net.conv", "net.bn", "running_mean", 0)
    assert list(verify_groups(graph)) == ["net.conv"]


def test_right_one_by_one_but_not_together() -> None:
    """Two groups whose removals spoil each other: one of them stays."""
    graph = AxisGraph(around(lambda m, x: torch.relu(x)).eval(), X)

    class Bench:
        def test(self, groups: Any) -> str | None:
            return "too many" if len(groups) > 1 else None

    right, wrong = oracles.sorted_out(Bench().test, list(graph.groups.values()))
    assert [g.name for g in right] == ["conv"]
    assert [(g.name, reason) for g, reason in wrong] == [("last", "too many")]


def test_rounding_that_a_network_amplifies_is_no_mistake() -> None:
    """The difference of nearly equal numbers, over and over."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        for _ in range(4):
            x = (x + 1e3) * 30 - 3e4
        return m.head(torch.sin(x).mean((2, 3)))

    graph = AxisGraph(Net(forward, conv=nn.Conv2d(3, 8, 3), head=nn.Linear(8, 3)).eval(), X)
    assert "conv" in graph.groups
    assert "permuting" not in verify_groups(graph).get("conv", "")


def test_models_that_compute_in_single_precision_are_verified_in_it() -> None:
    net = around(lambda m, x: torch.relu(x.float()).to(x.dtype))
    graph = AxisGraph(net.eval(), X)
    assert verify_groups(graph) == {}
    forget(graph, "conv", "last", "weight", 1)
    assert list(verify_groups(graph)) == ["conv"]


def test_a_large_image_is_verified_on_a_small_one() -> None:
    sizes = []
    net = around(lambda m, x: sizes.append(x.shape[-1]) or torch.relu(x)).eval()
    graph = AxisGraph(net, torch.randn(1, 3, 200, 200))
    sizes.clear()
    assert verify_groups(graph) == {}
    assert set(sizes) == {94, 110}  # and on another one of the small ones


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
    net = around(lambda m, x: x.reshape(len(x), 8, 4, 4))  # the sizes are in the code
    assert "conv" not in names(prune(net))
    assert "conv" in names(prune(net, pace=Pace(verify=False)))


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
    group = pruner.layers[0]
    target = substitutes.derangement(group.size, torch.Generator())
    trace = Trace(net)
    make: dict[str, Callable[[], Any]] = {
        "randomised": lambda: substitutes.randomised(net), "masked": lambda: substitutes.masked({group: [0]}),
        "exchanged": lambda: substitutes.exchanged({group: target}), "in_double": lambda: substitutes.in_double(net),
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


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["expected", "found", "both"])
def test_what_is_no_number_is_never_equal(wrong: float, side: str) -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, wrong, 1.0])
    expected, found = {"expected": (bad, good), "found": (good, bad), "both": (bad, bad)}[side]
    assert relative_change([expected], [found]) == float("inf")
    assert relative_change([good], [good * 1.5]) == 0.5


def test_every_trial_removes_another_number_from_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for _ in range(5) for layer in (nn.Linear(12, 12), nn.Tanh())]
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), *layers, nn.Linear(12, 3)).eval()
    trials: list[list[int]] = []
    removed = oracles.Trials._removed

    def watched(bench: Any, rounds: Any) -> str | None:
        trials.extend([len(units) for units in chosen.values()] for chosen in rounds)
        return removed(bench, rounds)

    monkeypatch.setattr(oracles.Trials, "_removed", watched)
    assert verify_groups(AxisGraph(net, torch.randn(2, 4))) == {}
    assert all(len(set(numbers)) > 1 for numbers in trials if len(numbers) == 6)
    counts = {number for numbers in trials for number in numbers}
    assert {1, 2, 3, 11} <= counts  # one, all but one, and numbers that do not divide
    assert {4, 6, 7, 8} & counts
