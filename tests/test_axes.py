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
from singe_plugin.axes.algebra import concat, expand, fix, fresh, labels, leaves, size_of, split, split_concat, unify
from singe_plugin.axes.layers import ADAPTERS, adapter, follow
from singe_plugin.axes.rules import RULES, rule
from singe_plugin.axes.tracked import TrackedInt
from singe_plugin.errors import GroupError, RemovalError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner

from masking import Masked
from references import Net, randomise_norms
from small_nets import Trace

TOKENS, IMAGES = torch.randn(2, 5, 6), torch.randn(2, 3, 8, 8)
D = 12  # the width of the stream in the attention networks: 3 heads of 4


# --- the algebra --------------------------------------------------------------------------------------------------


def test_a_view_and_its_inverse_are_the_same_axis() -> None:
    rows, heads, width = fresh(12), fresh(3), fresh(4)
    unify(rows, heads + width, "")
    assert [expand(axis) for axis in split(rows, [3, 4], "")] == [expand(heads), expand(width)]
    assert labels(rows, heads[0].root()).tolist() == [u for u in range(3) for _ in range(4)]
    assert labels(rows, width[0].root()).tolist() == list(range(4)) * 3


def test_finer_factors_are_found_on_both_sides() -> None:
    a, b = fresh(6) + fresh(4), fresh(3) + fresh(8)
    unify(a, b, "")
    assert [atom.size for atom in expand(a)] == [atom.size for atom in expand(b)] == [3, 2, 4]
    assert expand(a) == expand(b)


def test_what_does_not_fit_is_fixed_with_the_reason() -> None:
    a, b = fresh(4) + fresh(6), fresh(6) + fresh(4)
    unify(a, b, "a strange view")
    assert [leaf.fixed for leaf in (*leaves(a), *leaves(b))] == ["a strange view"] * 4


def test_concatenations_are_cut_where_either_is() -> None:
    a = concat([fresh(2), fresh(6)])
    b = concat([fresh(5), fresh(3)])
    unify(a, b, "")
    assert [size_of(part) for part in expand(a)[0].parts or ()] == [2, 3, 3]
    assert leaves(a) == leaves(b)


def test_parts_of_a_product_keep_its_inner_factor() -> None:
    outer, inner = fresh(6), fresh(2)
    first, second = split_concat(outer + inner, [4, 8], "")
    assert (size_of(first), size_of(second)) == (4, 8)
    assert labels(outer + inner, inner[0]).tolist() == [0, 1] * 6
    fix(first, "told apart")
    assert [bool(leaf.fixed) for leaf in leaves(outer + inner)] == [True, False, True]


def test_fixing_reaches_everything_that_is_unified() -> None:
    a, b, c = fresh(8), fresh(8), fresh(8)
    unify(a, b, "")
    unify(b, c, "")
    fix(c, "it is over")
    assert {leaf.fixed for leaf in leaves(a)} == {"it is over"}


def test_a_shrinking_leaf_renumbers_the_positions_behind_it() -> None:
    first, second = fresh(3), fresh(4)
    both = concat([first, second])
    first[0].shrink(1)
    assert labels(both, second[0]).tolist() == [-1, -1, 0, 1, 2, 3]


def test_one_position_of_two_units_is_refused() -> None:
    leaf = fresh(3)
    with pytest.raises(ValueError, match="two units"):
        labels(leaf + leaf, leaf[0])


@pytest.mark.parametrize(
    ("size", "value", "places"),
    [
        (lambda a, b: a * b, 24, 2), (lambda a, b: a // b, 6, 2), (lambda a, b: 3 * a // 2, 18, 1),
        (lambda a, b: 36 // a, 3, 1),
    ],
)  # fmt: skip
def test_products_and_quotients_know_their_attributes(size: Any, value: int, places: int) -> None:
    from singe_plugin.axes.tracked import Place, attribute

    made = size(attribute(12, Place(nn.Identity(), "a")), attribute(2, Place(nn.Identity(), "b")))
    assert isinstance(made, TrackedInt)
    assert made == value and len(made.places) == places  # noqa: PT018


def test_what_is_not_exact_is_a_plain_number() -> None:
    from singe_plugin.axes.tracked import Place, attribute

    number = attribute(12, Place(nn.Identity(), "a"))
    assert [type(x) for x in (number // 5, number + 1, number * 2.0, number / 3, -number)] == [
        int,
        int,
        float,
        float,
        int,
    ]


# --- networks -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with everything that timm's variants do differently."""

    def __init__(self, fused: bool = True, **how: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.how = 3, 4, fused, how
        self.scale = self.head_dim**-0.5
        if how.get("separate"):
            self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        elif how.get("multi_query"):
            self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 8)
        else:
            self.qkv = nn.Linear(D, 3 * D, bias=not how.get("q_bias"))
        if how.get("q_bias"):
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
            self.register_buffer("k_bias", torch.zeros(D))
        if how.get("norm"):
            self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        if how.get("talking"):
            self.mix = nn.Linear(3, 3)
        if how.get("bias_table"):
            self.table = nn.Parameter(torch.randn(7, 3))
            self.register_buffer("index", torch.randint(0, 7, (5, 5)))
        if how.get("rope"):
            angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3])
            self.register_buffer("sin", torch.cat([angles.sin()] * 2, 1))
            self.register_buffer("cos", torch.cat([angles.cos()] * 2, 1))
        self.proj = nn.Linear(D, D)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        h = self.num_heads
        if self.how.get("separate"):
            return tuple(f(x).reshape(b, n, h, c // h).transpose(1, 2) for f in (self.q, self.k, self.v))  # type: ignore[return-value]
        if self.how.get("multi_query"):
            k, v = self.kv(x).unsqueeze(1).chunk(2, -1)
            return self.q(x).view(b, n, h, -1).transpose(1, 2), k.expand(b, h, -1, -1), v.expand(b, h, -1, -1)
        if self.how.get("q_bias"):
            qkv = functional.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        else:
            qkv = self.qkv(x)
        return qkv.reshape(b, n, 3, h, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.project(x)
        if self.how.get("norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.how.get("rope"):
            q, k = self.rotate(q), self.rotate(k)
        mask = self.table[self.index].permute(2, 0, 1) if self.how.get("bias_table") else None
        if self.fused:
            x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scale = q.shape[-1] ** -0.5 if self.how.get("dynamic_scale") else self.scale
            attn = (q * scale) @ k.transpose(-2, -1)
            attn = (attn if mask is None else attn + mask).softmax(-1)
            if self.how.get("talking"):
                attn = self.mix(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = attn @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


def with_tokens(layer: nn.Module) -> nn.Module:
    """A residual stream through one layer that mixes tokens."""
    return Net(
        lambda m, x: m.head(m.norm(_stream(m, x)).mean(1)),
        stem=nn.Linear(6, D), layer=layer, fc1=nn.Linear(D, 10), fc2=nn.Linear(10, D), norm=nn.LayerNorm(D),
        head=nn.Linear(D, 3),
    )  # fmt: skip


def _stream(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.layer(x)
    return x + m.fc2(functional.gelu(m.fc1(x)))


def with_images(function: Callable[[Any, Tensor], Tensor], out: int = 8, **layers: Any) -> nn.Module:
    """``conv`` -> ``function`` -> ``last``."""
    return Net(
        lambda m, x: m.head(m.last(function(m, m.bn(m.conv(x)))).flatten(2).mean(2)),
        conv=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), last=nn.Conv2d(out, 4, 1), head=nn.Linear(4, 3),
        **layers,
    )  # fmt: skip


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight over all inputs, as timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response norm: the mean of a norm over the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(1, keepdim=True) + 1e-6)
        return x + self.bias.view(1, -1, 1, 1) + self.weight.view(1, -1, 1, 1) * x * n


class Split(nn.Module):
    """Sizes that are computed from attributes: a difference, a quotient, elements of a tuple."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.dim, self.part, self.sizes, self.expanded = how, 8, 3, (3, 5), 16
        self.up = nn.Conv2d(8, 16, 1)
        self.left, self.right = (
            nn.Conv2d(8 if how == "quotient" else 3, 4, 1),
            nn.Conv2d(8 if how == "quotient" else 5, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "difference":
            a, b = torch.split(x, [self.part, self.dim - self.part], 1)
        elif self.how == "slices":
            a, b = x[:, : self.part], x[:, self.part :]
        elif self.how == "quotient":
            a, b = self.up(x).split(self.expanded // 2, dim=1)
        else:
            a, b = x.split(self.sizes, 1)
        return torch.cat([self.left(a), self.right(b)], 1)


class Auxiliary(nn.Module):
    """A head that only training reads, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(8, 3)
        self.aux_head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x))
        out = self.head(x.mean((2, 3)))
        return (out, self.aux_head(torch.relu(self.aux(x)).mean((2, 3)))) if self.training else out


class Cached(nn.Module):
    """Keeps the bias of every head that it computed, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(fused=False)
        self.biases = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("places", torch.arange(5).view(1, 5).repeat(5, 1))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.biases[:, self.places]
        a = self.attention
        q, k, v = a.project(x)
        attn = (q @ k.transpose(-2, -1) * a.scale + self.cache["cpu"]).softmax(-1)
        return a.proj((attn @ v).transpose(1, 2).flatten(2))


class Affine(nn.Module):
    """HGNet's learnable affine block: one scale and one bias for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([1.3])), nn.Parameter(torch.tensor([0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


def splitting(how: str) -> nn.Module:
    return with_images(lambda m, x: m.s(x), s=Split(how))


Case = tuple[Callable[[], nn.Module], Tensor, dict[str, int]]
CASES: dict[str, Case] = {
    "fused qkv": (lambda: with_tokens(Attention()), TOKENS, {"layer.qkv": 4, "layer.qkv#2": 3, "stem": D, "fc1": 10}),
    "attention by hand": (lambda: with_tokens(Attention(fused=False)), TOKENS, {"layer.qkv": 4, "layer.qkv#2": 3}),
    "talking heads": (lambda: with_tokens(Attention(fused=False, talking=True)), TOKENS, {"layer.qkv": 4}),
    "a bias for q and v": (lambda: with_tokens(Attention(q_bias=True)), TOKENS, {"layer.qkv": 4, "layer.qkv#2": 3}),
    "norms of q and k": (lambda: with_tokens(Attention(norm=True)), TOKENS, {"layer.qkv": 4, "layer.qkv#2": 3}),
    "a table of biases": (lambda: with_tokens(Attention(bias_table=True)), TOKENS, {"layer.qkv": 4, "layer.qkv#2": 3}),
    "rotary positions": (lambda: with_tokens(Attention(rope=True)), TOKENS, {"layer.qkv": 2, "layer.qkv#2": 3}),
    "one k and v for all heads": (
        lambda: with_tokens(Attention(multi_query=True)), TOKENS, {"layer.kv": 4, "layer.q": 3},
    ),
    "a width that is the stream's": (lambda: with_tokens(Attention(separate=True)), TOKENS, {"stem": 4, "stem#2": 3}),
    "a scale that follows the width": (
        lambda: with_tokens(Attention(fused=False, dynamic_scale=True)), TOKENS, {"layer.qkv": 3},
    ),
    "nn.MultiheadAttention": (
        lambda: with_tokens(Net(
            lambda m, x: m.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(D, 3, batch_first=True)
        )),
        TOKENS, {"stem": 4, "stem#2": 3, "fc1": 10},
    ),
    "an LSTM in both directions": (
        lambda: with_tokens(Net(
            lambda m, x: m.p(m.l(x)[0]), l=nn.LSTM(D, 5, batch_first=True, bidirectional=True), p=nn.Linear(10, D)
        )),
        TOKENS, {"stem": D, "fc1": 10},
    ),
    "tokens that are mixed": (
        lambda: with_tokens(Net(
            lambda m, x: m.b(torch.relu(m.a(x.transpose(1, 2)))).transpose(1, 2), a=nn.Linear(5, 7), b=nn.Linear(7, 5)
        )),
        TOKENS, {"stem": D, "layer.a": 7, "fc1": 10},
    ),
    "a gated layer": (
        lambda: with_tokens(Net(
            lambda m, x: m.o(torch.mul(*m.i(x).chunk(2, -1))), i=nn.Linear(D, 14), o=nn.Linear(7, D)
        )),
        TOKENS, {"layer.i": 7},
    ),
    "a kernel of one that slides over channels": (
        lambda: with_tokens(Net(
            lambda m, x: m.o(m.c(torch.relu(m.i(x)))), i=nn.Linear(D, 7), c=nn.Conv1d(5, 5, 1), o=nn.Linear(7, D)
        )),
        TOKENS, {"layer.i": 7, "stem": D},
    ),
    "einsum": (
        lambda: with_tokens(Net(
            lambda m, x: torch.einsum("bnc,dc->bnd", torch.relu(m.a(x)), m.b.weight),
            a=nn.Linear(D, 7), b=nn.Linear(7, D),
        )),
        TOKENS, {"layer.a": 7},
    ),
    "biases that are kept": (lambda: with_tokens(Cached()), TOKENS, {"layer.attention.qkv": 4}),
    "channel shuffle": (
        lambda: with_images(lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), IMAGES, {"conv": 4},
    ),
    "cat([b, a]) behind a chunk": (
        lambda: with_images(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1)), IMAGES, {"conv": 4},
    ),
    "pixel shuffle": (lambda: with_images(lambda m, x: functional.pixel_shuffle(x, 2), out=2), IMAGES, {"conv": 2}),
    "space to depth": (lambda: with_images(lambda m, x: functional.pixel_unshuffle(x, 2), out=32), IMAGES, {"conv": 8}),
    "grouped": (lambda: with_images(lambda m, x: m.g(x), g=nn.Conv2d(8, 8, 3, groups=2)), IMAGES, {"conv": 4, "g": 4}),
    "more outputs than groups": (
        lambda: with_images(lambda m, x: m.g(x), out=16, g=nn.Conv2d(8, 16, 3, groups=8)), IMAGES, {"conv": 8, "g": 2},
    ),
    "transposed and grouped": (
        lambda: with_images(lambda m, x: m.g(x), g=nn.ConvTranspose2d(8, 8, 2, groups=2)), IMAGES, {"conv": 4, "g": 4},
    ),
    "a standardised weight": (
        lambda: with_images(lambda m, x: m.s(torch.relu(x)), s=Standardised(8, 8, 1)), IMAGES, {"conv": 8, "s": 8},
    ),
    "a global response norm": (lambda: with_images(lambda m, x: m.g(x), g=ResponseNorm(8)), IMAGES, {"conv": 8}),
    "split attention": (
        lambda: with_images(
            lambda m, x: (
                x.unflatten(1, (2, -1)) * m.a(x.mean((2, 3))).unflatten(1, (2, -1)).softmax(1)[..., None, None]
            ).sum(1),
            out=4, a=nn.Linear(8, 8),
        ), IMAGES, {"conv": 4},
    ),
    "padding with zeros": (
        lambda: with_images(lambda m, x: functional.pad(x, (0, 0, 0, 0, 0, 4)) + m.w(x), out=12, w=nn.Conv2d(8, 12, 1)),
        IMAGES, {"conv": 8},
    ),
    "sizes: a difference": (lambda: splitting("difference"), IMAGES, {"conv": 3, "conv#2": 5}),
    "sizes: slices": (lambda: splitting("slices"), IMAGES, {"conv": 3, "conv#2": 5}),
    "sizes: a quotient": (lambda: splitting("quotient"), IMAGES, {"conv": 8, "s.up": 8}),
    "sizes: a tuple": (lambda: splitting("tuple"), IMAGES, {"conv": 3, "conv#2": 5}),
    "a head for training": (Auxiliary, IMAGES, {"conv": 8, "aux": 6}),
    "one bias for all channels": (
        lambda: with_images(lambda m, x: m.a(torch.relu(x)), a=Affine()), IMAGES, {"conv": 8},
    ),
    "instance norm": (
        lambda: with_images(lambda m, x: m.n(x), n=nn.InstanceNorm2d(8, affine=True)), IMAGES, {"conv": 8},
    ),
}  # fmt: skip

MIXING = {"a standardised weight", "a global response norm"}  # the masked reference knows nothing of these


def made(name: str) -> tuple[nn.Module, Tensor, dict[str, int]]:
    torch.manual_seed(0)
    make, x, expected = CASES[name]
    return randomise_norms(make()).eval(), x, expected


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
    "an operator without a rule": (lambda: with_images(lambda m, x: torch.fft.fft(x, dim=1).real), "has no rule"),
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
            lambda m, x: m.gn(torch.cat([x, m.other(x)], 1)), out=12, other=nn.Conv2d(8, 4, 1), gn=nn.GroupNorm(2, 12)
        ),
        "native_group_norm",
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
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x, dim=1).real

    graph = AxisGraph(with_images(lambda m, x: m.f(x), f=Fourier()).eval(), IMAGES)
    assert "Fourier" in graph.left_whole["conv"]
    assert "Fourier" in set().union(*graph.trace.unknown.values())


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
