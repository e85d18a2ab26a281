"""Random networks of everything that couples channels, from a seed or from hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from references import Net

T = TypeVar("T")
CLASSES = 3


class Draw:
    """Where decisions come from: a seeded generator here, hypothesis (which can shrink) below."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def choice(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def flag(self) -> bool:
        return self.choice([False, True])


class HypothesisDraw(Draw):
    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def choice(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(list(options)))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))


@dataclass
class Network:
    """A network with an input, and how its tests call it."""

    model: nn.Module
    inputs: Tensor
    description: str

    def targets(self) -> Tensor:
        return torch.arange(len(self.inputs)) % CLASSES


Block = tuple[nn.Module, int]  # and its output channels


def width(d: Draw) -> int:
    return d.choice([4, 6, 8, 12])


def conv(d: Draw, i: int, o: int, k: int | None = None, **options: Any) -> nn.Conv2d:
    k = d.choice([1, 3]) if k is None else k
    return nn.Conv2d(i, o, k, padding=k // 2, bias=d.flag(), **options)


def layer_norm_2d(c: int) -> nn.Module:
    return Net(lambda m, x: m.ln(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), ln=nn.LayerNorm(c))


def norm(d: Draw, c: int) -> nn.Module:
    make: list[Callable[[], nn.Module]] = [lambda: nn.BatchNorm2d(c)] * 6
    make += [nn.Identity, nn.Identity, lambda: nn.BatchNorm2d(c, affine=False), lambda: layer_norm_2d(c)]
    make += [lambda: nn.GroupNorm(1 + (c % 2 == 0), c), lambda: nn.GroupNorm(1, c)]
    make += [lambda: nn.InstanceNorm2d(c, affine=True)]
    return d.choice(make)()


def act(d: Draw, c: int) -> nn.Module:
    make: list[Callable[[], nn.Module]] = [nn.ReLU] * 4 + [nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.Identity]
    make += [lambda: nn.PReLU(c), lambda: nn.PReLU(c), nn.PReLU]
    if d.integer(0, 9) == 0:  # f(0) != 0: masking is not removing, such a group must be left whole
        make = [nn.Sigmoid, nn.Softplus]
    return d.choice(make)()


def chain(d: Draw, c: int) -> Block:
    o = width(d)
    return nn.Sequential(conv(d, c, o, stride=d.choice([1, 1, 2])), norm(d, o), act(d, o)), o


def body(d: Draw, c: int, o: int, depth: int) -> nn.Module:
    """Any block, and a projection to ``o`` channels without changing the resolution."""
    inner, i = d.choice(FLAT if depth else [narrow])(d, c)
    return nn.Sequential(inner, conv(d, i, o, 1), norm(d, o))


def narrow(d: Draw, c: int) -> Block:
    o = width(d)
    return nn.Sequential(conv(d, c, o), norm(d, o), act(d, o)), o


def residual(d: Draw, c: int) -> Block:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.act(m.shortcut(x) + m.body(x))

    o = d.choice([c, width(d)])
    shortcut = nn.Identity() if o == c and d.flag() else nn.Sequential(conv(d, c, o, 1), norm(d, o))
    return Net(forward, body=body(d, c, o, 1), shortcut=shortcut, act=act(d, o)), o


def preactivation(d: Draw, c: int) -> Block:
    keep = d.flag()
    net = Net(
        lambda m, x: x + m.c2(m.a2(m.n2(m.c1(m.a1(m.n1(x)))))) if keep else m.c2(m.a2(m.n2(m.c1(m.a1(m.n1(x)))))),
        n1=norm(d, c), a1=act(d, c), c1=conv(d, c, 8), n2=norm(d, 8), a2=act(d, 8), c2=conv(d, 8, c),
    )  # fmt: skip
    return net, c


def inverted(d: Draw, c: int) -> Block:
    """Pointwise, depthwise, pointwise, maybe with a squeeze-excite in the middle."""
    o, h = d.choice([c, width(d)]), width(d)
    layers = [conv(d, c, h, 1), norm(d, h), act(d, h), conv(d, h, h, 3, groups=h), norm(d, h), act(d, h)]
    if d.flag():
        layers.append(gate(d, h)[0])
    main = nn.Sequential(*layers, conv(d, h, o, 1), norm(d, o))
    if o != c or d.flag():
        return main, o
    return Net(lambda m, x: x + m.main(x), main=main), o


def gate(d: Draw, c: int) -> Block:
    if d.flag():
        net = Net(
            lambda m, x: x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3)))))[:, :, None, None]),
            down=nn.Linear(c, 4), up=nn.Linear(4, c),
        )  # fmt: skip
    else:
        net = Net(
            lambda m, x: x * torch.sigmoid(m.up(m.act(m.down(functional.adaptive_avg_pool2d(x, 1))))),
            down=conv(d, c, 4, 1), act=act(d, 4), up=conv(d, 4, c, 1),
        )  # fmt: skip
    return net, c


def concat(d: Draw, c: int) -> Block:
    """Branches side by side; with ``dense`` the input is one of them."""
    dense, widths = d.flag(), [width(d) for _ in range(d.integer(1, 3))]
    branches = nn.ModuleList(nn.Sequential(conv(d, c, w), norm(d, w)) for w in widths)
    total = sum(widths) + (c if dense else 0)
    first = d.flag()

    def forward(m: Any, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in m.branches]
        if dense:
            parts.insert(0 if first else len(parts), x)
        return m.act(m.norm(torch.cat(parts, 1)))

    return Net(forward, branches=branches, norm=norm(d, total), act=act(d, total)), total


def split(d: Draw, c: int) -> Block:
    h = width(d)
    halves: Callable[[Tensor], Sequence[Tensor]] = d.choice([
        lambda y: y.chunk(2, 1), lambda y: y.chunk(2, 1), lambda y: y.split(h, 1), lambda y: (y[:, :h], y[:, h:]),
        lambda y: (y[:, ::2], y[:, 1::2]),
    ])  # fmt: skip
    merge: Callable[[Any, Tensor, Tensor], Tensor] = d.choice([
        lambda m, a, b: m.left(a + b), lambda m, a, b: m.left(a * torch.sigmoid(b)),
        lambda m, a, b: m.left(a) + m.right(b), lambda m, a, b: m.both(torch.cat([b, a], 1)),
        lambda m, a, b: m.both(torch.cat([a, m.same(b)], 1)), lambda m, a, b: m.left(m.same(a) + b),
        lambda m, a, b: m.both(torch.cat([a, a + b], 1)),
    ])  # fmt: skip
    net = Net(
        lambda m, x: merge(m, *halves(m.norm(m.conv(x)))),
        conv=conv(d, c, 2 * h), norm=norm(d, 2 * h), left=conv(d, h, 6), right=conv(d, h, 6), same=conv(d, h, h),
        both=conv(d, 2 * h, 6),
    )  # fmt: skip
    return net, 6


def uneven_split(d: Draw, c: int) -> Block:
    """Split where the consumers say, so that the sizes may change on their own."""
    a, b = width(d), width(d)
    halves: Callable[[Any, Tensor], Sequence[Tensor]] = d.choice([
        lambda m, y: y.split([a, b], 1), lambda m, y: y.split([m.left.in_channels, m.right.in_channels], 1),
        lambda m, y: (y[:, : m.left.in_channels], y[:, m.left.in_channels :]),
    ])  # fmt: skip
    add_left, add_right = d.flag(), d.flag()

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = halves(m, m.norm(m.conv(x)))
        left = left + m.on_left(x) if add_left else left
        right = right + m.on_right(x) if add_right else right
        return m.act(m.left(left) + m.right(right))

    net = Net(
        forward, conv=conv(d, c, a + b), norm=norm(d, a + b), on_left=conv(d, c, a), on_right=conv(d, c, b),
        left=conv(d, a, 8), right=conv(d, b, 8), act=act(d, 8),
    )  # fmt: skip
    return net, 8


def grouped(d: Draw, c: int) -> Block:
    o, groups = d.choice([4, 8, 12]), d.choice([2, 4])
    layers: list[nn.Module] = [conv(d, c, 8, 1), norm(d, 8), act(d, 8)]
    layers += [conv(d, 8, o, groups=groups), norm(d, o), act(d, o)]
    if d.flag():
        layers.append(conv(d, o, 8, groups=d.choice([2, 4])))
        return nn.Sequential(*layers), 8
    return nn.Sequential(*layers), o


def depth_multiplier(d: Draw, c: int) -> Block:
    o = 6 * d.choice([2, 3])
    return nn.Sequential(conv(d, c, 6), norm(d, 6), conv(d, 6, o, groups=6), norm(d, o), nn.ReLU()), o


def depth_divider(d: Draw, c: int) -> Block:
    """As many groups as outputs, but more inputs: depthwise only by its name."""
    return nn.Sequential(conv(d, c, 12), norm(d, 12), nn.ReLU(), conv(d, 12, 6, groups=6), norm(d, 6)), 6


def transposed(d: Draw, c: int) -> Block:
    o, groups = 8, d.choice([1, 1, 2])
    up = nn.ConvTranspose2d(8, o, 2, stride=d.choice([1, 2]), groups=groups, bias=d.flag())
    return nn.Sequential(conv(d, c, 8, 1), norm(d, 8), up, norm(d, o), act(d, o)), o


def shared(d: Draw, c: int) -> Block:
    """One module called twice, in a row or on two branches."""
    in_a_row = d.flag()

    def forward(m: Any, x: Tensor) -> Tensor:
        if in_a_row:
            return m.twice(torch.relu(m.twice(m.a(x))))
        return m.twice(m.a(x)) + m.twice(m.b(x))

    twice = nn.Sequential(conv(d, 8, 8), norm(d, 8))
    return Net(forward, a=conv(d, c, 8), b=conv(d, c, 8), twice=twice), 8


def tied(d: Draw, c: int) -> Block:
    """Two layers with one weight."""
    one, two = conv(d, 8, 8, 3), conv(d, 8, 8, 3)
    two.weight = one.weight
    net = Net(
        lambda m, x: m.two(torch.relu(m.one(m.stem(x)))) if m.row else m.one(m.stem(x)) + m.two(m.stem(x)),
        stem=conv(d, c, 8), one=one, two=two, row=d.flag(),
    )  # fmt: skip
    return net, 8


def layer_scale(d: Draw, c: int) -> Block:
    shape = d.choice([(c, 1, 1), (1, c, 1, 1)])
    return Net(lambda m, x: x + m.gamma * m.body(x), body=body(d, c, c, 0), gamma=nn.Parameter(torch.ones(shape))), c


class OverChannels(nn.Module):
    """A function of all channels together; a reference sets ``taken_over``, the channels it is to be taken over."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.taken_over: Tensor | None = None
        self.register_buffer("zeros", torch.zeros(8))  # cut along with the channels

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.zeros.view(-1, 1, 1)
        if self.kind == "largest":
            if self.taken_over is not None:
                gone = torch.ones(8, dtype=torch.bool).index_fill(0, self.taken_over, False)
                x = x.masked_fill(gone.view(-1, 1, 1), -torch.inf)
            return x.unflatten(1, (2, -1)).amax(1).clamp(min=-1e30)
        some = x if self.taken_over is None else x[:, self.taken_over]
        if self.kind == "mean":
            return x * torch.sigmoid(some.mean(1, keepdim=True))
        return (
            some.softmax(1)
            if self.taken_over is None
            else torch.zeros_like(x).index_copy(1, self.taken_over, some.softmax(1))
        )


def strange(d: Draw, c: int) -> Block:
    """Functions of the channels that are no layers; some cannot be pruned in front of."""
    function: Callable[[Tensor], Tensor] = d.choice([
        lambda y: y.roll(1, 1), lambda y: y.flip(1), lambda y: functional.pixel_shuffle(y, 2),
        OverChannels("mean"), lambda y: y[:, [1, 0, 2, 3, 4, 5, 6, 7]],
        lambda y: y.reshape(len(y), 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda y: y + torch.linspace(0, 1, 8).view(8, 1, 1), OverChannels("softmax"),
        OverChannels("largest"), lambda y: torch.stack([y, -y], 1).flatten(1, 2),
    ])  # fmt: skip
    head = nn.Sequential(conv(d, c, 8), norm(d, 8))
    out = function(torch.zeros(1, 8, 2, 2)).shape[1]
    own = {"own": function} if isinstance(function, nn.Module) else {}
    return Net(
        lambda m, x: m.last((m.own if own else function)(m.head(x))), head=head, last=conv(d, out, 6), **own
    ), 6  # fmt: skip


FLAT = [narrow, inverted, concat, split, uneven_split, grouped, depth_multiplier, shared, layer_scale, gate]
BLOCKS = [
    chain, chain, residual, residual, preactivation, inverted, gate, concat, split, uneven_split, grouped,
    depth_multiplier, depth_divider, transposed, shared, tied, layer_scale, strange,
]  # fmt: skip


def mlp(d: Draw, i: int) -> nn.Module:
    h = width(d)
    hidden_norm = d.choice([nn.BatchNorm1d, nn.LayerNorm, lambda _: nn.Identity()])
    kind = d.integer(0, 2)
    if kind == 0:
        return nn.Sequential(nn.Linear(i, h, bias=d.flag()), hidden_norm(h), act(d, h), nn.Linear(h, CLASSES))
    if kind == 1:  # gated: the halves of one layer are coupled
        return Net(lambda m, x: m.out(functional.glu(m.fc(x), 1)), fc=nn.Linear(i, 2 * h), out=nn.Linear(h, CLASSES))
    return Net(
        lambda m, x: m.out(m.norm(m.fc(x)) + m.f2(torch.relu(m.f1(m.fc(x))))),
        fc=nn.Linear(i, h), f1=nn.Linear(h, 6), f2=nn.Linear(6, h), norm=hidden_norm(h), out=nn.Linear(h, CLASSES),
    )  # fmt: skip


def image_network(d: Draw) -> tuple[nn.Module, Tensor, str]:
    blocks, c, names = [], 3, []
    if d.integer(0, 3):
        stem, c = narrow(d, c)
        blocks.append(stem)
    for _ in range(d.integer(1, 4)):
        make = d.choice(BLOCKS)
        block, c = make(d, c)
        names.append(make.__name__)
        blocks.append(block)
    features, x = nn.Sequential(*blocks), torch.randn(3, 3, 8, 8)
    tail = d.choice(["pool", "pool", "pool2", "flatten", "conv"])
    if tail == "conv":
        head: nn.Module = nn.Sequential(nn.Conv2d(c, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        size = {"pool": 1, "pool2": 2}.get(tail)
        pool = nn.Identity() if size is None else nn.AdaptiveAvgPool2d(size)
        with torch.no_grad():
            flat = pool(features.eval()(x)).flatten(1).shape[1]
        head = nn.Sequential(pool, nn.Flatten(), mlp(d, flat))
    return nn.Sequential(features, head), x, "-".join([*names, tail])


def attention(d: Draw, c: int) -> nn.Module:
    kind = d.integer(0, 2)
    if kind == 0:
        mha = nn.MultiheadAttention(c, 2, batch_first=True)
        return Net(lambda m, x: m.mha(x, x, x, need_weights=False)[0], mha=mha)
    heads = kind  # one head, or two that torch-pruning is not told about

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, 2))
        return m.proj(functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))

    return Net(forward, qkv=nn.Linear(c, 3 * c), proj=nn.Linear(c, c))


def token_network(d: Draw) -> tuple[nn.Module, Tensor, str]:
    c, length, words = d.choice([4, 8]), 5, d.flag()
    x = torch.randint(0, 7, (3, length)) if words else torch.randn(3, length, 6)
    stem: nn.Module = nn.Embedding(7, c) if words else nn.Linear(6, c)
    class_token, attend, final = d.flag(), d.flag(), d.choice([nn.LayerNorm(c), nn.Identity()])

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        if class_token:
            x = torch.cat([m.cls.expand(len(x), -1, -1), x], 1)
        x = x + m.pos
        x = x + m.gamma * m.f2(m.act(m.f1(m.n1(x))))
        if attend:
            x = x + m.attention(m.n2(x))
        x = m.final(x)
        return m.head(x[:, 0] if class_token else x.mean(1))

    net = Net(
        forward, stem=stem, pos=nn.Parameter(torch.randn(1, length + class_token, c)), n1=nn.LayerNorm(c),
        f1=nn.Linear(c, 8), act=nn.GELU(), f2=nn.Linear(8, c), gamma=nn.Parameter(torch.ones(c)), final=final,
        head=nn.Linear(c, CLASSES),
    )  # fmt: skip
    if class_token:
        net.cls = nn.Parameter(torch.randn(1, 1, c))
    if attend:
        net.n2, net.attention = nn.LayerNorm(c), attention(d, c)
    return net, x, f"tokens-words={words}-cls={class_token}-attention={attend}"


def plain_network(d: Draw) -> tuple[nn.Module, Tensor, str]:
    return mlp(d, 5), torch.randn(3, 5), "mlp"


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters far from the identity, so that nothing passes because it is all ones."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.numel() == max(parameter.shape):
                parameter.copy_((torch.rand_like(parameter) + 0.5) * torch.randn_like(parameter).sign())
    return model.eval()


def build(d: Draw) -> Network:
    make = d.choice([image_network] * 8 + [token_network, plain_network])
    with torch.random.fork_rng():
        torch.manual_seed(d.integer(0, 1000))
        model, inputs, description = make(d)
        return Network(randomise(model), inputs, description)


def random_network(seed: int) -> Network:
    """The same network for the same seed."""
    return build(Draw(seed))


@st.composite
def networks(draw: Any) -> Network:
    """A strategy: every decision is hypothesis' own, so that failures shrink to the smallest network."""
    return build(HypothesisDraw(draw))
