"""Small networks that do one thing each with their channels, and the groups that must be found in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from references import Net, randomise_norms

TOKENS, IMAGES = torch.randn(2, 5, 6), torch.randn(2, 3, 8, 8)
D = 12  # the width of the stream in the attention networks: 3 heads of 4


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
