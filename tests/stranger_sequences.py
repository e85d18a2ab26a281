"""Blocks of tokens and sequences, for ``strangers.py``: attention of every kind, recurrent layers, mixers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from references import Net
from stranger_truth import OverRest

Made = tuple[nn.Module, int, str]
LENGTH = 5


def _layers(*sizes: tuple[int, int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(i, o) for i, o in sizes)


def attention(r: random.Random, c: int) -> Made:
    kind = r.choice(
        ["mha", "encoder layer", "gqa", "gqa by hand", "einsum", "qkv", "cross", "linear", "rotary", "decoder"]
    )
    heads = 2
    if kind == "encoder layer":
        layer = nn.TransformerEncoderLayer(c, 2, 12, batch_first=True, norm_first=r.random() < 0.5)
        return layer, c, kind
    if kind == "decoder":
        layer = nn.TransformerDecoderLayer(c, 2, 12, batch_first=True)
        return Net(lambda m, x: m.layer(x, m.memory(x)), layer=layer, memory=nn.Linear(c, c)), c, kind

    def mha(m: Any, x: Tensor) -> Tensor:
        return x + m.mha(x, x, x, need_weights=False)[0]

    if kind == "mha":
        return Net(mha, mha=nn.MultiheadAttention(c, 2, batch_first=True)), c, kind

    def gqa(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (n, -1)).transpose(1, 2) for layer, n in zip(m.qkv, (4, 2, 2), strict=True))
        return m.out(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    def gqa_by_hand(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (n, -1)).transpose(1, 2) for layer, n in zip(m.qkv, (4, 2, 2), strict=True))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return m.out(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def einsum(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).reshape(len(x), x.shape[1], heads, -1) for layer in m.qkv)
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.4).softmax(-1)
        return x + m.out(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))

    def qkv(m: Any, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = m.one(x).reshape(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1) @ v
        return x + m.out(y.transpose(1, 2).reshape(b, n, width))

    def cross(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(2, (heads, -1)).transpose(1, 2)
            for layer, y in zip(m.qkv, (m.query.expand(len(x), -1, -1), x, x), strict=True)
        )
        return x + m.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def linear(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in m.qkv)
        return x + m.out(functional.elu(q) @ (functional.elu(k).mT @ v) / x.shape[1])

    def rotary(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (heads, -1)).transpose(1, 2) for layer in m.qkv)

        def turned(y: Tensor) -> Tensor:
            a, b = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
            angle = torch.arange(y.shape[-2]).view(-1, 1) * torch.ones(y.shape[-1] // 2)
            angle = torch.cat([angle, angle], 1)
            return y * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

        y = functional.scaled_dot_product_attention(turned(q), turned(k), v, scale=0.5)
        return x + m.out(y.transpose(1, 2).flatten(2))

    forwards = {
        "gqa": gqa, "gqa by hand": gqa_by_hand, "einsum": einsum, "qkv": qkv, "cross": cross, "linear": linear,
        "rotary": rotary,
    }  # fmt: skip
    if kind == "qkv":
        return Net(qkv, one=nn.Linear(c, 3 * c), out=nn.Linear(c, c)), c, kind
    if kind.startswith("gqa"):
        return Net(forwards[kind], qkv=_layers((c, 16), (c, 8), (c, 8)), out=nn.Linear(16, c)), c, kind
    net = Net(forwards[kind], qkv=_layers((c, 8), (c, 8), (c, 8)), out=nn.Linear(8, c))
    if kind == "cross":
        net.query = nn.Parameter(torch.randn(1, LENGTH, c))
    return net, c, kind


def feed_forward(r: random.Random, c: int) -> Made:
    h = r.choice([6, 8, 10])

    def halved(y: Tensor) -> Tensor:
        return torch.cat([torch.relu(y[..., : y.shape[-1] // 2]), y[..., y.shape[-1] // 2 :]], -1)

    def shifted(y: Tensor) -> Tensor:
        return torch.cat([y[..., : y.size(-1) // 4].roll(1, 1), y[..., y.size(-1) // 4 :]], -1)

    raw = {"w": nn.Parameter(torch.randn(c, h) / 3), "v": nn.Parameter(torch.randn(h, c) / 3)}
    made: dict[str, Callable[[], nn.Module]] = {
        "swiglu": lambda: Net(
            lambda m, x: x + m.out(functional.silu((y := m.fc(x).chunk(2, -1))[0]) * y[1]),
            fc=nn.Linear(c, 2 * h), out=nn.Linear(h, c),
        ),
        "two gates": lambda: Net(
            lambda m, x: x + m.out(functional.silu(m.fc(x)) * m.up(x)),
            fc=nn.Linear(c, h), up=nn.Linear(c, h), out=nn.Linear(h, c),
        ),
        "glu": lambda: nn.Sequential(nn.Linear(c, 2 * h), nn.GLU(), nn.Linear(h, c)),
        "raw": lambda: Net(lambda m, x: x + (x @ m.w).relu() @ m.v, **raw),
        "raw einsum": lambda: Net(
            lambda m, x: x + torch.einsum("bnh,hc->bnc", torch.einsum("bnc,ch->bnh", x, m.w).relu(), m.v), **raw
        ),
        "linear, raw out": lambda: Net(lambda m, x: x + m.fc(x).relu() @ m.v, fc=nn.Linear(c, h), v=raw["v"]),
        "mixer": lambda: Net(
            lambda m, x: x + m.out(m.act(m.fc(x.mT))).mT, fc=nn.Linear(LENGTH, h), act=nn.GELU(),
            out=nn.Linear(h, LENGTH),
        ),
        "gmlp": lambda: Net(
            lambda m, x: x + m.out((y := m.fc(x).chunk(2, -1))[0] * m.space(m.norm(y[1]).mT).mT),
            fc=nn.Linear(c, 2 * h), norm=nn.LayerNorm(h), space=nn.Linear(LENGTH, LENGTH), out=nn.Linear(h, c),
        ),
        "experts": lambda: Net(
            lambda m, x: (torch.stack([e(x) for e in m.experts], -1) * m.gate(x).softmax(-1)[..., None, :]).sum(-1),
            experts=nn.ModuleList(nn.Sequential(nn.Linear(c, h), nn.ReLU(), nn.Linear(h, c)) for _ in range(2)),
            gate=nn.Linear(c, 2),
        ),
        "rms": lambda: Net(
            lambda m, x: x + m.out(m.own(m.fc(x)) * m.g), fc=nn.Linear(c, h), out=nn.Linear(h, c),
            g=nn.Parameter(torch.randn(h)),
            own=OverRest(lambda x: x * (x.pow(2).mean(-1, True) + 1e-3).rsqrt(), h, dim=-1, spread=True),
        ),
        "cosine": lambda: Net(
            lambda m, x: x + m.out(m.own(m.fc(x))), fc=nn.Linear(c, h), out=nn.Linear(h, c),
            own=OverRest(lambda x: functional.normalize(x, dim=-1), h, dim=-1, spread=True),
        ),
        "bilinear": lambda: Net(
            lambda m, x: m.both(m.a(x), m.b(x)), a=nn.Linear(c, 4), b=nn.Linear(c, 6), both=nn.Bilinear(4, 6, c)
        ),
        "tied": lambda: Net(lambda m, x: x + functional.linear(m.fc(x).relu(), m.fc.weight.t()), fc=nn.Linear(c, h)),
        "half": lambda: Net(
            lambda m, x: x + m.out(torch.cat([torch.relu(m.fc(x)[..., : h // 2]), m.fc(x)[..., h // 2 :]], -1)),
            fc=nn.Linear(c, h), out=nn.Linear(h, c),
        ),
        "half of a shape": lambda: Net(
            lambda m, x: x + m.out(halved(m.fc(x))),
            fc=nn.Linear(c, h), out=nn.Linear(h, c),
        ),
        "token shift": lambda: Net(
            lambda m, x: x + m.out(shifted(m.fc(x))),
            fc=nn.Linear(c, h), out=nn.Linear(h, c),
        ),
    }  # fmt: skip
    kind = r.choice(list(made))
    return made[kind](), c, kind


def recurrent(r: random.Random, c: int) -> Made:
    h = r.choice([4, 6])
    kind = r.choice(
        ["lstm", "gru", "rnn", "two layers", "both ways", "lstm cell", "gru cell", "last state", "projected"]
    )

    def cells(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), m.cell.hidden_size)
        made, memory = [], state
        for step in m.fc(x).unbind(1):
            if isinstance(m.cell, nn.LSTMCell):
                state, memory = m.cell(step, (state, memory))
            else:
                state = m.cell(step, state)
            made.append(state)
        return m.out(torch.stack(made, 1))

    if kind in ("lstm cell", "gru cell"):
        cell = (nn.LSTMCell if kind == "lstm cell" else nn.GRUCell)(6, h)
        return Net(cells, fc=nn.Linear(c, 6), cell=cell, out=nn.Linear(h, c)), c, kind
    options: dict[str, dict[str, Any]] = {
        "two layers": {"num_layers": 2}, "both ways": {"bidirectional": True}, "projected": {"proj_size": 3},
    }  # fmt: skip
    layer = {"gru": nn.GRU, "rnn": nn.RNN}.get(kind, nn.LSTM)
    rnn = layer(6, h, batch_first=True, **options.get(kind, {}))
    width = {"both ways": 2 * h, "projected": 3}.get(kind, h)
    if kind == "last state":
        net = Net(
            lambda m, x: x + m.out(m.rnn(m.fc(x))[1][0][-1])[:, None],
            fc=nn.Linear(c, 6),
            rnn=rnn,
            out=nn.Linear(width, c),
        )
    else:
        net = Net(lambda m, x: x + m.out(m.rnn(m.fc(x))[0]), fc=nn.Linear(c, 6), rnn=rnn, out=nn.Linear(width, c))
    return net, c, kind


def convolved(r: random.Random, c: int) -> Made:
    """One-dimensional convolutions along the tokens."""
    h, kind = r.choice([6, 8]), r.choice(["causal", "depthwise", "shift", "glu", "dilated"])

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.one(x.mT)
        if kind == "causal":
            y = functional.pad(y, (2, 0)).unfold(2, 3, 1).amax(-1)
        elif kind == "shift":
            k = y.shape[1] // 3
            y = torch.cat([y[:, :k].roll(1, 2), y[:, k : 2 * k].roll(-1, 2), y[:, 2 * k :]], 1)
        elif kind == "glu":
            y = functional.glu(torch.cat([y, y.flip(2)], 1), 1)
        return x + m.two(torch.relu(m.middle(y))).mT

    middle = nn.Conv1d(h, h, 3, padding=1, groups=h if kind == "depthwise" else 1)
    if kind == "dilated":
        middle = nn.Conv1d(h, h, 3, padding=2, dilation=2)
    return Net(forward, one=nn.Conv1d(c, h, 1), middle=middle, two=nn.Conv1d(h, c, 1)), c, kind


BLOCKS: list[Callable[[random.Random, int], Made]] = [
    attention,
    attention,
    feed_forward,
    feed_forward,
    recurrent,
    convolved,
]
