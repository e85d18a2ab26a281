"""Parts of the channels with bounds computed from a width: they shrink as the code will cut, or stay whole."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups

from masking import Masked
from references import Net

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
relu = torch.relu


def network(function: Callable[[Any, Tensor], Tensor], width: int = 16, out: int | None = None, **layers: Any) -> Any:
    """``conv`` -> ``function`` -> ``last``, beside another branch, so that there are several groups."""
    net = Net(
        lambda m, x: m.head(m.last(function(m, m.bn(m.conv(x)))).mean((2, 3))),
        conv=nn.Conv2d(3, width, 3, padding=1), bn=nn.BatchNorm2d(width), last=nn.Conv2d(out or width, 6, 1),
        head=nn.Linear(6, 3), **layers,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 1.0))
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_(0.5, 1.5)
    return net.double().eval()


def halves(cut: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """The first part through an activation, the rest as it is."""

    def function(m: Any, x: Tensor) -> Tensor:
        bound = cut(m, x)
        return torch.cat([relu(x[:, :bound]), x[:, bound:]], 1)

    return function


def parts(cut: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """The parts, each times another number."""
    return lambda m, x: torch.cat([part * (i + 1) for i, part in enumerate(cut(x))], 1)


def in_place(m: Any, x: Tensor) -> Tensor:
    c = x.shape[1] // 2
    x = x.clone()
    x[:, :c] = relu(x[:, :c])
    x[:, c:] *= 2
    return x


def temporal_shift(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = x.view(b // 2, 2, c, h, w)
    fold, out = c // 8, torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.view(b, c, h, w)


def spatial_shift(m: Any, x: Tensor) -> Tensor:
    c, y = x.size(1), x.clone()
    y[:, : c // 4, 1:] = x[:, : c // 4, :-1]
    y[:, c // 4 : c // 2, :-1] = x[:, c // 4 : c // 2, 1:]
    y[:, c // 2 : c * 3 // 4, :, 1:] = x[:, c // 2 : c * 3 // 4, :, :-1]
    y[:, 3 * c // 4 :, :, :-1] = x[:, 3 * c // 4 :, :, 1:]
    return y


def partial(m: Any, x: Tensor) -> Tensor:
    c = x.shape[1] // 4
    return torch.cat([m.part(x[:, :c]), x[:, c:]], 1)


def by_divmod(m: Any, x: Tensor) -> int:
    half, rest = divmod(x.shape[1], 2)
    return half + rest


def ramp(m: Any, x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[1], dtype=x.dtype) + 1).view(1, -1, 1, 1)


LINKED: dict[str, tuple[Callable[[], Any], int]] = {  # and the units of the group of ``conv``
    "shape // 2": (lambda: network(halves(lambda m, x: x.shape[1] // 2)), 8),
    "shape // 4": (lambda: network(halves(lambda m, x: x.shape[1] // 4)), 4),
    "size(1) // 2": (lambda: network(halves(lambda m, x: x.size(1) // 2)), 8),
    "size(dim=-3) // 2": (lambda: network(halves(lambda m, x: x.size(dim=-3) // 2)), 8),
    "size()[1] // 2": (lambda: network(halves(lambda m, x: x.size()[1] // 2)), 8),
    "three quarters": (lambda: network(halves(lambda m, x: 3 * x.shape[1] // 4)), 4),
    "twice a quarter": (lambda: network(halves(lambda m, x: x.shape[1] // 4 * 2)), 4),
    "both halves": (lambda: network(halves(lambda m, x: x.shape[1] // 2 + x.shape[1] // 2)), 8),
    "shift": (lambda: network(halves(lambda m, x: x.shape[1] >> 1)), 8),
    "the other half": (lambda: network(halves(lambda m, x: x.shape[1] - x.shape[1] // 2)), 8),
    "numel": (lambda: network(halves(lambda m, x: x[0, :, 0, 0].numel() // 2)), 8),
    "numel of a bias": (lambda: network(halves(lambda m, x: m.conv.bias.numel() // 2)), 8),
    "out_channels // 2": (lambda: network(halves(lambda m, x: m.conv.out_channels // 2)), 8),
    "num_features // 2": (lambda: network(halves(lambda m, x: m.bn.num_features // 2)), 8),
    "in_channels // 4": (lambda: network(halves(lambda m, x: m.last.in_channels // 4)), 4),
    "weight.shape[0] // 2": (lambda: network(halves(lambda m, x: m.conv.weight.shape[0] // 2)), 8),
    "from behind": (lambda: network(lambda m, x: torch.cat([
        x[:, : -(x.shape[1] // 2)], relu(x[:, -(x.shape[1] // 2) :])], 1)), 8),
    "beside an index": (lambda: network(lambda m, x: torch.cat([
        x[torch.arange(4).view(2, 2), : x.shape[1] // 2].flatten(0, 1) * 2, x[:, x.shape[1] // 2 :]], 1)), 8),
    "narrow": (lambda: network(lambda m, x: torch.cat([
        relu(x.narrow(1, 0, x.shape[1] // 2)), x.narrow(1, x.shape[1] // 2, x.shape[1] // 2)], 1)), 8),
    "split(c // 2)": (lambda: network(parts(lambda x: x.split(x.shape[1] // 2, 1))), 8),
    "split into a list": (lambda: network(parts(lambda x: x.split([x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1))),
                          4),
    "tensor_split": (lambda: network(parts(lambda x: x.tensor_split(2, 1))), 8),
    "hsplit": (lambda: network(parts(lambda x: x.hsplit(4))), 4),
    "chunk": (lambda: network(parts(lambda x: x.chunk(4, 1))), 4),
    "in place": (lambda: network(in_place), 8),
    "temporal shift": (lambda: network(temporal_shift), 2),
    "spatial shift": (lambda: network(spatial_shift), 4),
    "partial convolution": (lambda: network(partial, part=nn.Conv2d(4, 4, 3, padding=1)), 4),
    "view by quotients": (lambda: network(lambda m, x: torch.cat(
        x.view(len(x), 2, x.shape[1] // 2, *x.shape[2:]).mul(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)).unbind(1),
        1)), 8),
    "a sum of widths": (lambda: network(
        lambda m, x: (y := torch.cat([x, m.more(x)], 1))[:, : m.conv.out_channels + m.more.out_channels] * 2 + y, 16,
        24, more=nn.Conv2d(16, 8, 1)), 16),
    "zeros of the rest": (lambda: network(lambda m, x: torch.cat(
        [relu(x[:, : x.shape[1] // 2]), x.new_zeros(len(x), x.shape[1] - x.shape[1] // 2, 6, 6)], 1)), 8),
}  # fmt: skip

WHOLE: dict[str, Callable[[], Any]] = {
    "shape // 3 of 16": lambda: network(halves(lambda m, x: x.shape[1] // 3)),
    "int(c * 0.5)": lambda: network(halves(lambda m, x: int(x.shape[1] * 0.5))),
    "int(c / 2)": lambda: network(halves(lambda m, x: int(x.shape[1] / 2))),
    "int(c) // 2": lambda: network(halves(lambda m, x: int(x.shape[1]) // 2)),
    "round": lambda: network(halves(lambda m, x: round(x.shape[1] * 0.3))),
    "the root": lambda: network(halves(lambda m, x: int(x.shape[1] ** 0.5))),
    "len(bias) // 2": lambda: network(halves(lambda m, x: len(m.conv.bias) // 2)),
    "divmod": lambda: network(halves(by_divmod)),
    "a remainder": lambda: network(halves(lambda m, x: x.shape[1] % 12)),
    "c - 3": lambda: network(halves(lambda m, x: x.shape[1] - 3)),
    "chunk(3) of 16": lambda: network(parts(lambda x: x.chunk(3, 1))),
    "chunk(2) of 9": lambda: network(parts(lambda x: x.chunk(2, 1)), 9),
    "tensor_split(3) of 16": lambda: network(parts(lambda x: x.tensor_split(3, 1))),
    "roll by a half": lambda: network(lambda m, x: x.roll(x.shape[1] // 2, 1)),
    "every other of c // 8": lambda: network(lambda m, x: x[:, :: x.shape[1] // 8], out=8),
    "one in the middle": lambda: network(lambda m, x: x + x[:, x.shape[1] // 2, None]),
    "the next power": lambda: network(halves(lambda m, x: 1 << (x.shape[1] - 1).bit_length() - 1)),
    "a divisor": lambda: network(lambda m, x: x / x.shape[1]),
    "a factor": lambda: network(lambda m, x: m.conv.out_channels * x),
    "a power": lambda: network(lambda m, x: x * x.shape[1] ** -0.5),
    "a ramp": lambda: network(ramp),
    "topk of a half": lambda: network(lambda m, x: x.topk(x.shape[1] // 2, 1).values, out=8),
    "a constant bound": lambda: network(halves(lambda m, x: 6)),
}  # fmt: skip

UNNOTICED: dict[str, Callable[[], Any]] = {  # what no integer can notice: the oracles do
    "0.5 * c": lambda: network(halves(lambda m, x: int(0.5 * x.shape[1]))),
    "isqrt": lambda: network(halves(lambda m, x: 2 * math.isqrt(x.shape[1]))),
    "the logarithm": lambda: network(halves(lambda m, x: int(math.log2(x.shape[1])))),
    "shape.numel()": lambda: network(halves(lambda m, x: x[0, :, 0, 0].shape.numel() // 2)),
    "a length": lambda: network(halves(lambda m, x: len(range(0, x.shape[1], 2)))),
    "a minimum": lambda: network(halves(lambda m, x: min(x.shape[1], 12))),
    "numpy": lambda: network(halves(lambda m, x: int(np.ceil(x.detach().numpy().shape[1] / 3)))),
    "the text": lambda: network(halves(lambda m, x: int(f"{x.shape[1]}") // 2)),
}  # fmt: skip


def graph_of(net: Any) -> tuple[AxisGraph, dict[str, str]]:
    graph = AxisGraph(net, X)
    wrong = verify_groups(graph)
    for name, reason in wrong.items():
        graph.drop(name, reason)
    return graph, wrong


def removes_what_masking_computes(net: Any, graph: AxisGraph, seed: int) -> None:
    """Random, uneven numbers from every group, twice."""
    masked, rng = Masked(net), random.Random(seed)
    for _ in range(2):
        for group in graph.groups.values():
            if group.size > 1:
                gone = rng.sample(range(group.size), rng.choice([1, group.size - 1, rng.randint(1, group.size - 1)]))
                remove_units(graph, group, gone, Trackers(emas=[masked.tags]))
        with torch.no_grad():
            torch.testing.assert_close(net(X), masked.model()(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LINKED)
def test_parts_shrink_as_the_code_will_cut(name: str) -> None:
    for seed in range(3):
        net = LINKED[name][0]()
        graph, wrong = graph_of(net)
        assert not wrong  # the trace knows it: the oracles are the last line
        assert graph.groups["conv"].size == LINKED[name][1], graph.left_whole
        assert "conv#2" not in graph.groups  # the parts themselves are no units
        removes_what_masking_computes(net, graph, seed)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "a constant bound"])
def test_the_trace_says_what_cannot_be_followed(name: str) -> None:
    graph = AxisGraph(WHOLE[name](), X)
    assert "conv" in graph.left_whole
    assert not [group for group in graph.groups if group.startswith("conv")]


@pytest.mark.parametrize("name", [*WHOLE, *UNNOTICED])
def test_what_cannot_be_followed_stays_whole(name: str) -> None:
    net = (WHOLE | UNNOTICED)[name]()
    graph, _ = graph_of(net)
    conv = [group for name, group in graph.groups.items() if name.startswith("conv")]
    behind = {"a constant bound": 10, "a minimum": 4}  # what is behind a bound that stays may go
    if name in behind:
        assert [group.size for group in conv] == [behind[name]]
    else:
        assert not conv
        assert "conv" in graph.left_whole
    removes_what_masking_computes(net, graph, 0)
