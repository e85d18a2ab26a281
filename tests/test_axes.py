"""Groups from axes: whatever a network does with its channels, what is removed is what masking it computes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups
from singe_plugin.axes.layers import ADAPTERS, adapter, follow
from singe_plugin.axes.rules import RULES, rule
from singe_plugin.axes.tracked import TrackedInt
from singe_plugin.errors import GroupError, RemovalError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner

from axes_networks import CASES, IMAGES, MIXING, TOKENS, Attention, Cached, D, made, with_images, with_tokens
from masking import Masked
from references import Net
from small_nets import Trace


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_verified(name: str) -> None:
    model, x, expected = made(name)
    before = Trace(model)
    graph = AxisGraph(model, x)
    reasons = verify_groups(graph)
    before.assert_unchanged()
    assert not [k for m in model.modules() for k, v in m.__dict__.items() if isinstance(v, TrackedInt)]
    sizes = {name: group.size for name, group in graph.groups.items() if name not in reasons}
    assert {k: sizes.get(k) for k in expected} == expected, (sizes, reasons, graph.left_whole)


@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXING])
def test_what_is_removed_is_what_masking_computes(name: str) -> None:
    model, x, _ = made(name)
    model, x = model.double(), x.double()
    graph = AxisGraph(model, x)
    for group, reason in verify_groups(graph).items():
        graph.drop(group, reason)
    masked, rng, had = Masked(model), random.Random(1), with_gradient(model, x)
    for _ in range(2):
        for group in graph.groups.values():
            if group.size > 1:
                gone = rng.sample(range(group.size), rng.randint(1, group.size - 1))
                remove_units(graph, group, gone, Trackers(emas=[masked.tags]))
        with torch.no_grad():
            expected, found = masked.model()(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.original.parameters())
    assert with_gradient(model, x) == had  # what only training reads is right, too


def test_a_head_for_training_is_scored_by_its_weights() -> None:
    model, x, _ = made("a head for training")
    importance = SInGEImportance(nodes=2).bind(model, [(x, torch.tensor([0, 1]))])
    pruner = SInGEPruner(model, x, importance, pruning_ratio=0.5)
    assert [group.name for group in pruner.layers if group.only_training] == ["aux"]
    norms = torch.cat([model.aux.weight.flatten(1), model.aux.bias[:, None]], 1).norm(dim=1)
    kept = model.aux.bias[norms.argsort()[3:].sort().values].clone()
    pruner.step()
    torch.testing.assert_close(model.aux.bias, kept)
    assert model.conv.out_channels == 4


def with_gradient(model: nn.Module, x: Tensor) -> set[str]:
    made = copy.deepcopy(model).train()
    for module in made.modules():
        if isinstance(module, Cached):
            module.cache = {}
    out = made(x)
    sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,))).backward()
    return {name for name, p in made.named_parameters() if p.grad is not None}


def test_a_second_graph_on_the_pruned_model_finds_what_is_left() -> None:
    model, x, _ = made("fused qkv")
    graph = AxisGraph(model, x)
    for name, count in (("layer.qkv", 1), ("layer.qkv#2", 1), ("stem", 5)):
        remove_units(graph, graph.groups[name], range(count))
    again = AxisGraph(model, x)
    assert {n: g.size for n, g in again.groups.items()} == {n: g.size for n, g in graph.groups.items()}
    assert not verify_groups(again)


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"norm": True}, {"q_bias": True}], ids=["qkv", "norm", "bias"])
def test_narrower_heads_keep_the_softmax_temperature(how: dict[str, bool]) -> None:
    """Against attention written out, with the scale of the width that it was trained with."""
    model = with_tokens(Attention(**how)).eval().double()
    x = TOKENS.double()
    graph = AxisGraph(model, x)
    remove_units(graph, graph.groups["layer.qkv"], [2])
    assert model.layer.head_dim == 3
    literal = copy.deepcopy(model)
    own = literal.layer
    own.fused, own.scale = False, 3**-0.5  # what the rescaled parameters and the narrower default make together
    torch.testing.assert_close(model(x), literal(x))
    kept = with_tokens(Attention(**how)).double()
    before = AxisGraph(kept, x)
    assert before.scales[0].rows  # it is q that makes up for it, and nothing of v
    v_rows = slice(6 * 3, None)
    if "layer.qkv" in {before.names[m] for m, _, _ in before.scales[0].rows}:
        rows = next(r for m, a, r in before.scales[0].rows if a == "weight")
        assert not bool(rows[v_rows].any())


def test_an_average_keeps_the_temperature_too() -> None:
    model = with_tokens(Attention()).eval()
    average = copy.deepcopy(model)
    graph = AxisGraph(model, TOKENS)
    remove_units(graph, graph.groups["layer.qkv"], [1, 3], Trackers(emas=[average]))
    torch.testing.assert_close(average(TOKENS), model(TOKENS))


def test_a_scale_that_nothing_makes_up_for_keeps_the_width() -> None:
    net = Net(
        lambda m, x: m.p(functional.scaled_dot_product_attention(
            *[functional.normalize(f(x), dim=-1) for f in (m.q, m.k)], m.v(x)
        )),
        q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), p=nn.Linear(D, D),
    )  # fmt: skip
    graph = AxisGraph(with_tokens(net), TOKENS)
    assert "layer.q" not in graph.groups
    assert "no parameter makes up for it" in graph.left_whole["layer.q"]
    assert "layer.v" in graph.groups


def test_heads_are_groups_of_a_second_kind() -> None:
    graph = AxisGraph(with_tokens(Attention()), TOKENS)
    assert {n for n, g in graph.groups.items() if g.secondary} == {"layer.qkv#2"}
    assert graph.groups["layer.qkv#2"].is_heads
    assert {n for n, g in graph.groups.items() if g.in_heads} == {"layer.qkv"}
    graph.drop("layer.qkv", "for a test")
    assert not graph.groups["layer.qkv#2"].secondary


# --- decisions ----------------------------------------------------------------------------------------------------


def test_a_bias_for_all_channels_goes_with_the_unit() -> None:
    """Masked means: everything of the unit is zero, also what reads it. With only its producers zero, 0.4 is left."""
    model, x, _ = made("one bias for all channels")
    graph = AxisGraph(model, x)
    group = graph.groups["conv"]
    unit_only, all_of_it = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for net in (unit_only, all_of_it):
            net.conv.weight[0] = net.conv.bias[0] = net.bn.weight[0] = net.bn.bias[0] = 0.0
        all_of_it.last.weight[:, 0] = 0.0
        remove_units(graph, group, [0])
        torch.testing.assert_close(model(x), all_of_it(x), rtol=1e-5, atol=1e-6)
        assert float((model(x) - unit_only(x)).abs().max()) > 1e-3


# --- what is not understood is left whole -------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an operator without a rule": (lambda: with_images(lambda m, x: x + x.histc(5).sum()), "has no rule"),
    "a spectrum over channels": (lambda: with_images(lambda m, x: torch.fft.fft(x, dim=1).real), "_fft_r2c"),
    "a kernel that slides over channels": (
        lambda: with_images(lambda m, x: m.o(x.transpose(1, 3)).transpose(1, 3), o=nn.Conv2d(8, 8, 3, padding=1)),
        "convolution",
    ),
    "pooling over channels": (
        lambda: with_images(lambda m, x: functional.max_pool2d(x.transpose(1, 3), 2).transpose(1, 3), out=4),
        "max_pool2d",
    ),
    "roll": (lambda: with_images(lambda m, x: x.roll(1, 1)), "roll"),
    "flip": (lambda: with_images(lambda m, x: x.flip(1)), "flip"),
    "an index": (lambda: with_images(lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]]), "index"),
    "a cumulative sum": (lambda: with_images(lambda m, x: x.cumsum(1)), "cumsum"),
    "constants by position": (
        lambda: with_images(lambda m, x: x * torch.linspace(1, 2, 8).view(-1, 1, 1)), "linspace",
    ),
    "a size in the code": (lambda: with_images(lambda m, x: x.reshape(len(x), 8, 8, 8)), "forward pass fails"),
    "units that a group norm would not lose evenly": (
        lambda: with_images(
            lambda m, x: m.gn(torch.cat([x, m.other(x)], 1)), out=12, other=nn.Conv2d(8, 4, 1), gn=nn.GroupNorm(4, 12)
        ),
        "no units fit its groups of 3 and the parts 8 + 4 of cat in Net",
    ),
    "an outer product": (
        lambda: with_images(lambda m, x: (x.unsqueeze(1) * x.unsqueeze(2)).flatten(1, 2), out=64),
        "combined with each other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_is_left_whole_with_the_reason(name: str) -> None:
    make, reason = UNKNOWN[name]
    graph = AxisGraph(make().eval(), IMAGES)
    for group, why in verify_groups(graph).items():
        graph.drop(group, why)
    assert "conv" not in graph.groups
    assert reason in graph.left_whole["conv"]
    assert "last" in graph.groups  # the rest is not punished


def test_the_reason_names_the_class_that_needs_a_rule() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.histc(5).sum()

    graph = AxisGraph(with_images(lambda m, x: m.f(x), f=Spectrum()).eval(), IMAGES)
    assert "Spectrum" in graph.left_whole["conv"]
    assert "Spectrum" in set().union(*graph.trace.unknown.values())


def test_a_rule_for_an_operator_of_ones_own() -> None:
    @torch.library.custom_op("singe_test::mirror", mutates_args=())
    def mirror(x: Tensor) -> Tensor:
        return x.flip(2)

    graph = AxisGraph(with_images(lambda m, x: mirror(x)).eval(), IMAGES)
    assert "mirror" in graph.left_whole["conv"]

    @rule("mirror")
    def keeps_channels(trace: Any, args: Any, kwargs: Any, out: Any) -> None:
        axes = trace.of(args[0])
        trace.fix(axes[2])
        trace.set(out, axes)

    try:
        graph = AxisGraph(with_images(lambda m, x: mirror(x)).eval(), IMAGES)
        assert not verify_groups(graph)
        assert graph.groups["conv"].size == 8
    finally:
        RULES.pop("mirror")


def test_an_adapter_says_what_a_forward_pass_does_not_show() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold = nn.Conv2d(8, 6, 1)
            self.config = {"width": 6}

        def forward(self, x: Tensor) -> Tensor:
            return self.fold(x).reshape(len(x), self.config["width"], -1)[..., None]

    def net() -> nn.Module:
        return with_images(lambda m, x: m.l(x), out=6, l=Literal()).eval()

    graph = AxisGraph(net(), IMAGES)
    assert "l.fold" in verify_groups(graph)

    @adapter(Literal)
    def widths(graph: AxisGraph, layer: Any) -> None:
        follow(graph, layer, "config", graph.trace.of(layer.fold.weight)[0], ("width",))

    try:
        model = net()
        graph = AxisGraph(model, IMAGES)
        assert not verify_groups(graph)
        remove_units(graph, graph.groups["l.fold"], [0, 3])
        assert model.l.config == {"width": 4}
        assert model(IMAGES).shape == (2, 3)
    finally:
        ADAPTERS.pop(Literal)


# --- removal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "message"), [([8], "units 0 to 7"), ([-1], "units 0 to 7"), (range(8), "without any")]
)
def test_impossible_removals(units: Any, message: str) -> None:
    graph = AxisGraph(with_images(lambda m, x: torch.relu(x)), IMAGES)
    trace = Trace(graph.model)
    with pytest.raises(RemovalError, match=message):
        remove_units(graph, graph.groups["conv"], units)
    trace.assert_unchanged()


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(GroupError, match="could not be traced"):
        AxisGraph(nn.Linear(4, 2), torch.zeros(2, 3))


def test_what_is_kept_for_later_is_forgotten_when_it_is_cut() -> None:
    model, x, _ = made("biases that are kept")
    with torch.no_grad():
        model(x)
    assert model.layer.cache["cpu"].shape == (3, 5, 5)
    graph = AxisGraph(model, x)
    assert not verify_groups(graph)
    assert model.layer.cache["cpu"].shape == (3, 5, 5)
    heads = next(g for g in graph.groups.values() if g.is_heads)
    remove_units(graph, heads, [1])
    assert model.layer.cache == {}
    assert model(x).shape == (2, 3)
