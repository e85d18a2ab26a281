"""Blocks of images that ``networks.py`` does not make: operators over channels, other layouts, raw parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

from references import Net
from stranger_parts import in_place, part, scale
from stranger_truth import OverRest

Made = tuple[nn.Module, int, str]  # a block, its output channels, its name

OVER_CHANNELS: dict[str, Callable[[int], OverRest]] = {
    "median": lambda h: OverRest(lambda x: x.median(1, keepdim=True).values, h),
    "mode": lambda h: OverRest(lambda x: x.mode(1, keepdim=True).values, h),
    "kthvalue": lambda h: OverRest(lambda x: x.kthvalue(2, 1, keepdim=True).values, h),
    "topk": lambda h: OverRest(lambda x: x.topk(2, 1).values, h),
    "sort": lambda h: OverRest(lambda x: x.sort(1).values, h, spread=True),
    "least": lambda h: OverRest(lambda x: x.sort(1).values[:, :1], h),
    "logsumexp": lambda h: OverRest(lambda x: x.logsumexp(1, keepdim=True), h),
    "cumsum": lambda h: OverRest(lambda x: x.cumsum(1), h, spread=True),
    "cumprod": lambda h: OverRest(lambda x: x.cumprod(1), h, spread=True),
    "logcumsumexp": lambda h: OverRest(lambda x: x.logcumsumexp(1), h, spread=True),
    "cummax": lambda h: OverRest(lambda x: x.cummax(1).values, h, spread=True),
    "maxout": lambda h: OverRest(lambda x: x.unflatten(1, (2, -1)).amax(1), h, fill=-torch.inf),
    "maxout 2": lambda h: OverRest(lambda x: x.view(len(x), -1, 2, *x.shape[2:]).max(2).values, h, fill=-torch.inf),
    "mean": lambda h: OverRest(lambda x: x.mean(1, keepdim=True), h),
    "sum / shape": lambda h: OverRest(lambda x: x.sum(1, keepdim=True) / x.shape[1], h),
    "std": lambda h: OverRest(lambda x: x.var(1, keepdim=True, unbiased=False), h),
    "max and mean": lambda h: OverRest(lambda x: torch.cat([x.amax(1, True), x.mean(1, True)], 1), h),
    "quantile": lambda h: OverRest(lambda x: x.quantile(0.3, 1, keepdim=True), h),
    "norm": lambda h: OverRest(lambda x: x.norm(dim=1, keepdim=True), h),
    "normalize": lambda h: OverRest(lambda x: functional.normalize(x, dim=1), h, spread=True),
    "softmax": lambda h: OverRest(lambda x: x.softmax(1), h, spread=True),
    "rms": lambda h: OverRest(lambda x: x * (x.pow(2).mean(1, True) + 1e-3).rsqrt(), h, spread=True),
    "prod": lambda h: OverRest(lambda x: x.sigmoid().prod(1, keepdim=True), h),
    "index of largest": lambda h: OverRest(lambda x: x * x.argmax(1, keepdim=True), h, spread=True),
    "order": lambda h: OverRest(lambda x: x * x.argsort(1), h, spread=True),
    "max pool": lambda h: OverRest(
        lambda x: functional.max_pool3d(x[:, None], (2, 1, 1)).squeeze(1), h, fill=-torch.inf
    ),
    "local response": lambda h: OverRest(lambda x: functional.local_response_norm(x, 3), h, spread=True),
}  # fmt: skip


def over_channels(r: random.Random, c: int) -> Made:
    h, kind = 8, r.choice(list(OVER_CHANNELS))
    own = OVER_CHANNELS[kind](h)
    out = own(torch.randn(2, h, 6, 6)).shape[1]
    gate = out == 1 and r.random() < 0.5

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.last(x * torch.sigmoid(m.own(x)) if gate else m.own(x))

    net = Net(
        forward,
        conv=nn.Conv2d(c, h, 3, padding=1), own=own, last=nn.Conv2d(h if gate else out, 6, 1),
    )  # fmt: skip
    return net, 6, f"over channels[{kind}]"


def glu(r: random.Random, c: int) -> Made:
    h, layer = r.choice([4, 6, 9]), r.choice([nn.GLU(1), None])
    net = Net(
        lambda m, x: m.last(m.glu(m.norm(m.conv(x))) if layer else functional.glu(m.norm(m.conv(x)), dim=1)),
        conv=nn.Conv2d(c, 2 * h, 3, padding=1), norm=r.choice([nn.BatchNorm2d(2 * h), nn.Identity()]),
        last=nn.Conv2d(h, 6, 1), glu=layer or nn.Identity(),
    )  # fmt: skip
    return net, 6, "glu"


def option_a(r: random.Random, c: int) -> Made:
    """Shortcuts that fill up with channels of zeros."""
    more = r.choice([2, 4])
    o, kind = c + more, r.choice(["behind", "around", "cat", "new_zeros", "from the shapes"])
    pads: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "behind": lambda x, y: functional.pad(x, (0, 0, 0, 0, 0, more)),
        "around": lambda x, y: functional.pad(x, (0, 0, 0, 0, more // 2, more // 2)),
        "cat": lambda x, y: torch.cat([x, torch.zeros(len(x), more, *x.shape[2:], dtype=x.dtype)], 1),
        "new_zeros": lambda x, y: torch.cat([x, x.new_zeros(len(x), y.shape[1] - x.shape[1], *x.shape[2:])], 1),
        "from the shapes": lambda x, y: functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])),
    }  # fmt: skip
    pad = pads[kind]

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        y = m.body(x)
        return m.last(torch.relu(pad(x, y) + y))

    body = nn.Sequential(nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 1))
    return Net(forward, conv=nn.Conv2d(c, c, 1), body=body, last=nn.Conv2d(o, 6, 1)), 6, f"option A[{kind}]"


def shuffle(r: random.Random, c: int) -> Made:
    g = r.choice([2, 4])
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "native": lambda x: functional.channel_shuffle(x, g),
        "native ": nn.ChannelShuffle(g),
        "by hand": lambda x: x.view(len(x), g, x.shape[1] // g, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        "pixels up": lambda x: functional.pixel_shuffle(x, 2),
        "pixels down": lambda x: functional.pixel_unshuffle(x, 2),
        "pixels there and back": lambda x: functional.pixel_unshuffle(functional.pixel_shuffle(x, 2) * 2, 2),
        "pixels by hand": lambda x: (
            x.view(len(x), -1, 2, 2, 6, 6).permute(0, 1, 4, 2, 5, 3).reshape(len(x), -1, 12, 12)
        ),
        "space to depth": lambda x: torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
    }  # fmt: skip
    kind = r.choice(list(kinds))
    function = kinds[kind]
    own = function if isinstance(function, nn.Module) else nn.Identity()
    out = function(torch.zeros(1, 8, 6, 6)).shape[1]
    net = Net(
        lambda m, x: m.last(function(torch.relu(m.conv(x)))),
        conv=nn.Conv2d(c, 8, 3, padding=1, groups=r.choice([1, 2]) if c % 2 == 0 else 1),
        last=nn.Conv2d(out, 6, 1), own=own,
    )  # fmt: skip
    return net, 6, f"shuffle[{kind.strip()}]"


def patches(r: random.Random, c: int) -> Made:
    """A convolution by hand, and patches that are put together again."""
    fold = r.random() < 0.5
    if fold:

        def there_and_back(m: Any, x: Tensor) -> Tensor:
            x = m.conv(x) if x.shape[2:] == (6, 6) else functional.adaptive_avg_pool2d(m.conv(x), 6)
            windows = torch.tanh(functional.unfold(x, 2, stride=2))
            return m.last(functional.fold(windows, (6, 6), 2, stride=2))

        net = Net(
            there_and_back,
            conv=nn.Conv2d(c, 8, 3, padding=1), last=nn.Conv2d(8, 6, 1),
        )  # fmt: skip
        return net, 6, "unfold and fold"
    kind = r.choice(["linear", "matmul", "unfold of a dimension"])
    if kind == "unfold of a dimension":
        net = Net(
            lambda m, x: m.last(m.conv(x).unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2))),
            conv=nn.Conv2d(c, 8, 3, padding=1), last=nn.Conv2d(8, 6, 1),
        )  # fmt: skip
        return net, 6, "Tensor.unfold"

    def forward(m: Any, x: Tensor) -> Tensor:
        windows = functional.unfold(torch.relu(m.conv(x)), 3, padding=1)
        made = m.fc(windows.mT).mT if kind == "linear" else m.w @ windows
        return made.unflatten(2, x.shape[2:])

    net = Net(forward, conv=nn.Conv2d(c, 8, 1), fc=nn.Linear(72, 6), w=nn.Parameter(torch.randn(6, 72) / 8))
    delattr(net, "w" if kind == "linear" else "fc")
    return net, 6, f"unfold[{kind}]"


def normed(r: random.Random, c: int) -> Made:
    kind = r.choice(["new", "old", "new, next", "new, reader"])
    make = weight_norm if kind == "old" else parametrizations.weight_norm
    first, last = nn.Conv2d(c, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
    if kind != "new, reader":
        first = make(first)
    if kind in ("new, reader", "new, next"):
        last = make(last)
    middle = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) if kind == "old" else nn.Identity()
    return nn.Sequential(first, nn.ReLU(), middle, last), 6, f"weight norm[{kind}]"


def transposed(r: random.Random, c: int) -> Made:
    g = r.choice([1, 2, 8])
    up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=g, bias=r.random() < 0.5)
    norm = r.choice([nn.GroupNorm(2, 8), nn.GroupNorm(8, 8), nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False)])
    return nn.Sequential(nn.Conv2d(c, 8, 1), nn.ReLU(), up, norm, nn.SiLU(), nn.Conv2d(8, 6, 1)), 6, f"transposed[{g}]"


def raw(r: random.Random, c: int) -> Made:
    """Parameters that no layer holds."""
    kind = r.choice(["einsum", "F.conv2d", "F.linear", "matmul", "weight of a layer", "two in a row", "scaled weight"])
    w, v = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8, 8) / 3)
    uses: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "einsum": lambda m, x: torch.einsum("bchw,cd->bdhw", x, m.w),
        "F.conv2d": lambda m, x: functional.conv2d(x, m.w[:, :, None, None]),
        "F.linear": lambda m, x: functional.linear(x.movedim(1, -1), m.w).movedim(-1, 1),
        "matmul": lambda m, x: (m.w @ x.flatten(2)).unflatten(2, x.shape[2:]),
        "weight of a layer": lambda m, x: x * m.conv.weight.sum((1, 2, 3)).view(-1, 1, 1),
        "two in a row": lambda m, x: ((x.movedim(1, -1) @ m.w).relu() @ m.v).movedim(-1, 1),
        "scaled weight": lambda m, x: functional.conv2d(x, m.w[:, :, None, None] * m.v[:, :, None, None]),
    }  # fmt: skip
    use = uses[kind]
    net = Net(
        lambda m, x: m.last(torch.relu(use(m, torch.relu(m.conv(x))))),
        conv=nn.Conv2d(c, 8, 3, padding=1), last=nn.Conv2d(8, 6, 1),
    )  # fmt: skip
    if kind != "weight of a layer":
        net.w = w
    if kind in ("two in a row", "scaled weight"):
        net.v = v
    return net, 6, f"raw[{kind}]"


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    return functional.conv2d(x, kernel / 9, groups=kernel.shape[0])


def _half_of(y: Tensor) -> Tensor:
    return torch.cat([y[:, : y.shape[1] // 2].relu(), y[:, y.shape[1] // 2 :]], 1)


def places(r: random.Random, c: int) -> Made:
    """Indices that are constants, and channels that change places."""
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "gather": lambda x: x.gather(1, torch.tensor(order).view(1, 8, 1, 1).expand(len(x), 8, *x.shape[2:])),
        "list": lambda x: x[:, order],
        "some": lambda x: x[:, [0, 2, 5]],
        "roll": lambda x: x.roll(2, 1),
        "roll, space": lambda x: x.roll((1, 1), (2, 3)) + x,
        "flip": lambda x: x.flip(1),
        "take_along_dim": lambda x: x.take_along_dim(torch.tensor(order).view(1, 8, 1, 1), 1),
        "scatter": lambda x: torch.zeros_like(x).scatter_add(1, torch.arange(8).view(1, 8, 1, 1).expand(x.shape), x),
        "constant": lambda x: x * torch.linspace(0.5, 1.5, 8).view(8, 1, 1),
        "arange": lambda x: x * (1 + torch.arange(x.shape[1])).view(-1, 1, 1),
        "batch": lambda x: x.reshape(-1, 1, *x.shape[2:]).tanh().view(x.shape),
        "batch, half": lambda x: x.reshape(len(x) * 2, -1, *x.shape[2:]).tanh().view(x.shape),
        "transposed": lambda x: x.transpose(1, 2).cumsum(2).transpose(1, 2),
        "diff": lambda x: torch.diff(x, dim=1, prepend=x[:, :1]),
        "one of them": lambda x: x * torch.sigmoid(x[:, 2:3]),
        "last": lambda x: x * torch.sigmoid(x[:, -1:]),
        "stacked": lambda x: torch.stack([x, -x], 2).flatten(1, 2),
        "repeated": lambda x: x.repeat(1, 2, 1, 1),
        "interleaved": lambda x: x.repeat_interleave(2, 1),
        "outer": lambda x: (x[:, :, None] * x[:, None]).flatten(1, 2),
        "correlated": lambda x: (x.flatten(2) @ x.flatten(2).mT / 36).sum(2)[:, :, None, None],
        "blur": lambda x: _blur(x, torch.ones(1, 1, 3, 3, dtype=x.dtype).repeat(x.shape[1], 1, 1, 1)),
        "blur, constant": lambda x: _blur(x, torch.ones(8, 1, 3, 3, dtype=x.dtype)),
        "group norm": lambda x: functional.group_norm(x, x.shape[1]),
        "group norm of four": lambda x: functional.group_norm(x, x.shape[1] // 4 or 1),
        "positions": lambda x: x + torch.sin(torch.arange(x.shape[1]) / x.shape[1]).view(-1, 1, 1),
        "frequencies": lambda x: (
            x * torch.exp(torch.arange(0, x.shape[1], 2) * -0.3).repeat(2)[: x.shape[1]].view(-1, 1, 1)
        ),
        "eye": lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(x.shape[1], dtype=x.dtype)),
        "one hot": lambda x: x * functional.one_hot(torch.arange(8) % 3, 3).sum(1).view(8, 1, 1),
        "half of all": lambda x: _half_of(x.flatten(1)).view(x.shape),
        "channels with rows": lambda x: x.reshape(len(x), x.shape[1] * x.shape[2], x.shape[3]).tanh().view(x.shape),
        "last, then back": lambda x: (
            x.movedim(1, 3).reshape(-1, x.shape[1]).tanh().view(len(x), *x.shape[2:], -1).movedim(3, 1)
        ),
        "loop": lambda x: torch.stack([x[:, i] * (1 + i % 2) for i in range(x.shape[1])], 1),
        "loop of parts": lambda x: torch.cat([x[:, i : i + 2].roll(1, 3) for i in range(0, x.shape[1], 2)], 1),
        "split in a loop": lambda x: torch.cat([p * n for n, p in enumerate(x.split(max(x.shape[1] // 4, 1), 1))], 1),
        "triangle": lambda x: x * torch.ones(8, 8).tril().sum(0).view(8, 1, 1),
    }  # fmt: skip
    kind = r.choice(list(kinds))
    function = kinds[kind]
    out = function(torch.zeros(2, 8, 6, 6)).shape[1]
    net = Net(
        lambda m, x: m.last(function(torch.relu(m.conv(x)))), conv=nn.Conv2d(c, 8, 3, padding=1),
        last=nn.Conv2d(out, 6, 1),
    )  # fmt: skip
    return net, 6, f"places[{kind}]"


def branches(r: random.Random, c: int) -> Made:
    """Blocks that people publish."""
    kind = r.choice(
        ["res2net", "ghost", "csp", "split attention", "dynamic", "coordinate", "eca", "non-local", "shared"]
    )
    bn = nn.BatchNorm2d

    def conv(i: int, o: int, k: int = 1) -> nn.Module:
        return nn.Conv2d(i, o, k, padding=k // 2)

    def res2net(m: Any, x: Tensor) -> Tensor:
        parts = m.one(x).chunk(4, 1)
        made = [parts[0]]
        for layer, piece in zip(m.more, parts[1:], strict=True):
            made.append(layer(piece + made[-1]))
        return m.last(torch.cat(made, 1))

    def ghost(m: Any, x: Tensor) -> Tensor:
        y = torch.relu(m.one(x))
        return m.last(torch.cat([y, m.more[0](y)], 1)[:, : m.width])

    def csp(m: Any, x: Tensor) -> Tensor:
        a, b = m.one(x).split(8, 1)
        for layer in m.more:
            b = b + layer(b)
        return m.last(torch.cat([a, b], 1))

    def split_attention(m: Any, x: Tensor) -> Tensor:
        y = m.one(x).view(len(x), 2, -1, *x.shape[2:])
        gates = m.more[0](y.sum(1).mean((2, 3), keepdim=True)).view(len(x), 2, -1, 1, 1).softmax(1)
        return m.last((y * gates).sum(1))

    def dynamic(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        kernels = m.more[0](y.mean((2, 3), keepdim=True)).view(-1, 1, 1, 1)
        return m.last(functional.conv2d(y.reshape(1, -1, *y.shape[2:]), kernels, groups=kernels.shape[0]).view(y.shape))

    def coordinate(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        h, w = y.shape[2:]
        both = torch.relu(m.more[0](torch.cat([y.mean(3), y.mean(2)], 2)[..., None]))
        a, b = both.squeeze(-1).split([h, w], 2)
        return m.last(y * m.more[1](a[..., None]).sigmoid() * m.more[2](b[..., None]).sigmoid().transpose(2, 3))

    def eca(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        return m.last(y * torch.sigmoid(m.more[0](y.mean((2, 3))[:, None]))[:, 0, :, None, None])

    def non_local(m: Any, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in m.more)
        return m.last(m.one(x) + (v @ (q.mT @ k * 0.2).softmax(1)).view(len(x), -1, *x.shape[2:]))

    def shared(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        return m.last(m.more[0](torch.relu(m.more[0](x))) + m.more[1](x))

    made: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module, list[nn.Module], int]] = {
        "res2net": (res2net, conv(c, 8), [nn.Sequential(conv(2, 2, 3), bn(2), nn.ReLU()) for _ in range(3)], 8),
        "ghost": (ghost, conv(c, 5), [nn.Conv2d(5, 5, 3, padding=1, groups=5)], 9),
        "csp": (csp, conv(c, 16), [nn.Sequential(conv(8, 4), bn(4), nn.ReLU(), conv(4, 8, 3))], 16),
        "split attention": (split_attention, conv(c, 12, 3), [nn.Sequential(conv(6, 4), nn.ReLU(), conv(4, 12))], 6),
        "dynamic": (dynamic, conv(c, 6, 3), [conv(6, 6)], 6),
        "coordinate": (coordinate, conv(c, 8), [conv(8, 4), conv(4, 8), conv(4, 8)], 8),
        "eca": (eca, conv(c, 8), [nn.Conv1d(1, 1, 3, padding=1)], 8),
        "non-local": (non_local, conv(c, 8), [conv(c, 4), conv(c, 4), conv(c, 8)], 8),
        "shared": (shared, conv(c, 8), [nn.Sequential(conv(8, 8, 3), bn(8)), conv(8, 8)], 8),
    }  # fmt: skip
    forward, one, more, width = made[kind]
    net = Net(forward, one=one, more=nn.ModuleList(more), last=conv(width, 6), width=width)
    return net, 6, f"branches[{kind}]"


BLOCKS: list[Callable[[random.Random, int], Made]] = [
    part, part, part, part, in_place, in_place, scale, over_channels, over_channels, over_channels, glu, option_a,
    shuffle, patches, normed, transposed, raw, places, places, branches, branches,
]  # fmt: skip
