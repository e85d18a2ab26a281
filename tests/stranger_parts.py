"""Uses of a part of the channels: every way that was seen of computing where the part ends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from references import Net

Block = tuple[nn.Module, int]  # and its output channels
Bound = Callable[[Any, Tensor], int]
Pair = tuple[Tensor, Tensor]

BOUNDS: dict[str, Bound] = {
    "shape // 2": lambda m, x: x.shape[1] // 2,
    "shape // 3": lambda m, x: x.shape[1] // 3,
    "shape // 4": lambda m, x: x.shape[1] // 4,
    "shape[-3] // 2": lambda m, x: x.shape[-3] // 2,
    "size(1) // 2": lambda m, x: x.size(1) // 2,
    "size()[1] // 3": lambda m, x: x.size()[1] // 3,
    "unpacked": lambda m, x: (lambda b, c, h, w: c // 2)(*x.shape),
    "int(c * 0.5)": lambda m, x: int(x.shape[1] * 0.5),
    "int(c / 2)": lambda m, x: int(x.shape[1] / 2),
    "c >> 1": lambda m, x: x.shape[1] >> 1,
    "round": lambda m, x: round(x.shape[1] * 0.3),
    "ceil": lambda m, x: math.ceil(x.shape[1] / 3),
    "floor": lambda m, x: math.floor(x.shape[1] * 0.7),
    "square root": lambda m, x: int(x.shape[1] ** 0.5),
    "isqrt": lambda m, x: math.isqrt(x.shape[1]),
    "numel": lambda m, x: x.numel() // (2 * x.shape[0] * x.shape[2] * x.shape[3]),
    "out_channels // 2": lambda m, x: m.conv.out_channels // 2,
    "len(bias) // 2": lambda m, x: len(m.conv.bias) // 2,
    "weight.shape[0] // 4": lambda m, x: m.conv.weight.shape[0] // 4,
    "bias.numel() // 2": lambda m, x: m.conv.bias.numel() // 2,
    "c - c // 2": lambda m, x: x.shape[1] - x.shape[1] // 2,
    "c - 2": lambda m, x: x.shape[1] - 2 if x.shape[1] > 2 else 1,
    "divmod": lambda m, x: divmod(x.shape[1], 2)[0],
    "(c + 1) // 2": lambda m, x: (x.shape[1] + 1) // 2,
    "-(-c // 2)": lambda m, x: -(-x.shape[1] // 2),
    "3 * c // 8": lambda m, x: 3 * x.shape[1] // 8,
    "c // 2 // 2": lambda m, x: x.shape[1] // 2 // 2,
    "c - c % 4": lambda m, x: x.shape[1] - x.shape[1] % 4 - 1,
    "min": lambda m, x: min(x.shape[1] // 2, 4),
    "max": lambda m, x: max(1, x.shape[1] // 4),
    "another tensor": lambda m, x: x.mean((2, 3)).shape[-1] // 2,
    "len(x[0]) // 2": lambda m, x: len(x[0]) // 2,
    "a range": lambda m, x: len(range(0, x.shape[1], 2)),
    "a tensor": lambda m, x: int(torch.tensor(x.shape[1]) // 2),
    "of the shape": lambda m, x: x.shape[1:2].numel() // 2,
    "prod": lambda m, x: math.prod(x.shape[1:]) // 72,
    "nelement": lambda m, x: x[0, :, 0, 0].nelement() // 2,
    "size(dim=1)": lambda m, x: x.size(dim=1) // 2,
    "c & ~3": lambda m, x: (x.shape[1] & ~3) // 2,
    "c ^ 1": lambda m, x: (x.shape[1] ^ 1) // 2,
    "abs": lambda m, x: abs(4 - x.shape[1]) or 1,
    "bit_length": lambda m, x: x.shape[1].bit_length(),
    "a string": lambda m, x: int(f"{x.shape[1]}") // 2,
    "a sum": lambda m, x: sum(x.shape[1:2]) // 2,
    "sorted": lambda m, x: sorted([x.shape[1] // 2, 100])[0],
    "a fraction": lambda m, x: int(Fraction(1, 2) * x.shape[1]),
    "numpy": lambda m, x: int(np.floor(np.array(x.shape)[1] / 2)),
    "an array's length": lambda m, x: len(np.arange(x.shape[1])) // 2,
    "a list's length": lambda m, x: len(m.conv.bias.tolist()) // 2,
    "an index": lambda m, x: int(torch.arange(x.shape[1])[x.shape[1] // 2]),
    "an item": lambda m, x: max(int(torch.ones(x.shape[1]).sum().item()) // 2, 1),
    "a mean": lambda m, x: round(float(torch.arange(x.shape[1], dtype=torch.float64).mean())),
    "of the input": lambda m, x: m.conv.in_channels // 2 + 1,
    "of a new tensor": lambda m, x: x.new_zeros(2, x.shape[1] // 2).shape[1],
    "of the norm": lambda m, x: getattr(m.norm, "num_features", m.h) // 2,
    "a comparison": lambda m, x: 2 if x.shape[1] > 5 else 1,
    "a loop": lambda m, x: next(n for n in range(100) if 2 * n + 1 >= x.shape[1]),
    "reversed": lambda m, x: list(reversed(x.shape))[2] // 2,
    "einops": lambda m, x: dict(zip("bchw", x.shape, strict=True))["c"] // 2,
    "an attribute's product": lambda m, x: int(m.h * m.ratio * 2),
    "a constant": lambda m, x: 3,
    "an attribute": lambda m, x: m.k,
    "an attribute // 2": lambda m, x: m.h // 2,
    "a float attribute": lambda m, x: int(x.shape[1] * m.ratio),
}


def _masked(x: Tensor, k: int) -> Pair:
    first = torch.arange(x.shape[1]) < k
    return x[:, first], x[:, ~first]


AT: dict[str, Callable[[Tensor, int], Any]] = {
    "slices": lambda x, k: (x[:, :k], x[:, k:]),
    "slices ": lambda x, k: (x[:, :k], x[:, k:]),
    "narrow": lambda x, k: (x.narrow(1, 0, k), x.narrow(1, k, x.shape[1] - k)),
    "split": lambda x, k: x.split([k, x.shape[1] - k], 1),
    "tensor_split": lambda x, k: x.tensor_split([k], 1),
    "hsplit": lambda x, k: torch.hsplit(x, [k]),
    "from behind": lambda x, k: (x[:, :-k], x[:, -k:]) if k else (x, x[:, :0]),
    "index_select": lambda x, k: (
        x.index_select(1, torch.arange(k)), x.index_select(1, torch.arange(k, x.shape[1]))
    ),
    "a list": lambda x, k: (x[:, list(range(k))], x[:, k:]),
    "a mask": _masked,
}  # fmt: skip


def _first_of(parts: Any) -> Pair:
    return parts[0], torch.cat(list(parts[1:]), 1)


CUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor_split(2)": lambda x: x.tensor_split(2, 1),
    "tensor_split(3)": lambda x: _first_of(x.tensor_split(3, 1)),
    "hsplit(1 of 3)": lambda x: _first_of(torch.hsplit(x, [1, 3])),
    "chunk(2)": lambda x: x.chunk(2, 1),
    "chunk(3)": lambda x: _first_of(x.chunk(3, 1)),
    "split(c // 2)": lambda x: _first_of(x.split(max(x.shape[1] // 2, 1), 1)),
    "split(ceil)": lambda x: x.split(-(-x.shape[1] // 2), 1) if x.shape[1] > 1 else (x, x[:, :0]),
    "strides": lambda x: (x[:, ::2], x[:, 1::2]),
    "thirds": lambda x: (x[:, ::3], torch.cat([x[:, 1::3], x[:, 2::3]], 1)),
}

USES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "activation": lambda m, a, b: m.last(torch.cat([torch.relu(a), b], 1)),
    "scale": lambda m, a, b: m.last(torch.cat([a * 0.5, b], 1)),
    "partial convolution": lambda m, a, b: m.last(torch.cat([m.part(a), b], 1)),
    "spatial shift": lambda m, a, b: m.last(torch.cat([a.roll(1, 3), b.roll(1, 2)], 1)),
    "temporal shift": lambda m, a, b: m.last(torch.cat([a.roll(1, 0), b], 1)),
    "swapped": lambda m, a, b: m.last(torch.cat([b, a], 1)),
    "two readers": lambda m, a, b: m.left(a) + m.right(b),
    "dropped": lambda m, a, b: m.left(a),
    "raw scale": lambda m, a, b: m.last(torch.cat([a * m.scale, b], 1)),
    "negated rest": lambda m, a, b: m.last(torch.cat([a, -torch.tanh(b)], 1)),
}


def part(r: random.Random, c: int) -> tuple[nn.Module, int, str]:
    """A part of the channels of a convolution is treated otherwise than the rest."""
    h = r.choice([8, 9, 12, 16])
    conv = nn.Conv2d(c, h, r.choice([1, 3]), padding="same")
    probe = Net(lambda m: None, conv=conv, norm=nn.Identity(), k=h // 2, h=h, ratio=0.25)
    if r.random() < 0.7:
        bound, cut = r.choice(list(BOUNDS)), r.choice(list(AT))
        where, at = BOUNDS[bound], AT[cut]
        name = f"part[{bound}; {cut.strip()}"
        halves: Callable[[Any, Tensor], Any] = lambda m, x: at(x, where(m, x))  # noqa: E731
    else:
        cut = r.choice(list(CUTS))
        name, parts = f"part[{cut}", CUTS[cut]
        halves = lambda m, x: parts(x)  # noqa: E731
    use = r.choice(list(USES))
    function = USES[use]
    before = r.choice([torch.relu, lambda y: y])
    a, b = (t.shape[1] for t in halves(probe, torch.zeros(2, h, 6, 6)))
    net = Net(
        lambda m, x: function(m, *halves(m, before(m.norm(m.conv(x))))),
        conv=conv, norm=r.choice([nn.BatchNorm2d(h), nn.Identity()]), k=h // 2, h=h, ratio=0.25,
        last=nn.Conv2d(h, 6, 1), part=nn.Conv2d(a, a, 3, padding=1), left=nn.Conv2d(a, 6, 1),
        right=nn.Conv2d(b, 6, 1), scale=nn.Parameter(torch.randn(a, 1, 1)),
    )  # fmt: skip
    return drop_unused(net, use), 6, f"{name}; {use}]"


def drop_unused(net: nn.Module, use: str) -> nn.Module:
    """Leave out the layers that a use does not read."""
    read = {
        "partial convolution": {"last", "part"}, "two readers": {"left", "right"}, "dropped": {"left"},
        "raw scale": {"last", "scale"},
    }.get(use, {"last"})  # fmt: skip
    for name in {"last", "part", "left", "right", "scale"} - read:
        delattr(net, name)
    return net


def _add(x: Tensor, k: int) -> Tensor:
    x = x.clone()
    x[:, :k] += 1.0
    return x


def _activate(x: Tensor, k: int) -> Tensor:
    x = x.clone()
    x[:, k:] = torch.relu(x[:, k:])
    return x


def _halve(x: Tensor, k: int) -> Tensor:
    x = x.clone()
    x[:, :k].mul_(0.5)
    return x


def _shift(x: Tensor, k: int) -> Tensor:
    out = torch.zeros_like(x)
    out[1:, :k] = x[:-1, :k]
    out[:, k:] = x[:, k:]
    return out


def _shift_in_space(x: Tensor, k: int) -> Tensor:
    out = x.clone()
    out[:, :k, 1:] = x[:, :k, :-1]
    out[:, k:, :, :-1] = x[:, k:, :, 1:]
    return out


def _fill(x: Tensor, k: int) -> Tensor:
    x = x.clone()
    x[:, :k] = 0
    return x


IN_PLACE = {"+=": _add, "=": _activate, "mul_": _halve, "time": _shift, "space": _shift_in_space, "fill": _fill}


def in_place(r: random.Random, c: int) -> tuple[nn.Module, int, str]:
    """A slice of the channels is written to."""
    h = r.choice([8, 9, 12, 16])
    bound, kind = r.choice(list(BOUNDS)), r.choice(list(IN_PLACE))
    where, change = BOUNDS[bound], IN_PLACE[kind]

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.conv(x))
        return m.last(change(x, where(m, x)))

    net = Net(
        forward, norm=nn.Identity(),
        conv=nn.Conv2d(c, h, 3, padding=1), last=nn.Conv2d(h, 6, 1), k=h // 2, h=h, ratio=0.25,
    )  # fmt: skip
    return net, 6, f"in place[{bound}; {kind}]"


SCALES: dict[str, Bound | Callable[[Any, Tensor], float]] = {
    "shape": lambda m, x: x.shape[1],
    "root": lambda m, x: x.shape[1] ** 0.5,
    "sqrt": lambda m, x: math.sqrt(m.conv.out_channels),
    "half": lambda m, x: x.shape[1] // 2,
    "log": lambda m, x: math.log(x.size(1)),
    "len": lambda m, x: len(m.conv.bias) / 4,
    "numel": lambda m, x: x.numel() / 1000,
    "float": lambda m, x: float(x.shape[1]),
    "tensor": lambda m, x: torch.tensor(x.shape[1]),
    "plus": lambda m, x: x.shape[1] + 1,
    "remainder": lambda m, x: 1 + x.shape[1] % 5,
    "comparison": lambda m, x: 2.0 if x.shape[1] > 7 else 1.0,
    "modulo 2": lambda m, x: 2.0 if x.shape[1] % 2 else 1.0,
    "attribute": lambda m, x: m.h,
}


def scale(r: random.Random, c: int) -> tuple[nn.Module, int, str]:
    """A divisor that is computed from a width."""
    h, kind = r.choice([8, 9, 12, 16]), r.choice(list(SCALES))
    function = SCALES[kind]

    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.conv(x))
        return m.last(x / function(m, x))

    net = Net(
        forward,
        conv=nn.Conv2d(c, h, 3, padding=1), last=nn.Conv2d(h, 6, 1), h=h,
    )  # fmt: skip
    return net, 6, f"scale[{kind}]"
