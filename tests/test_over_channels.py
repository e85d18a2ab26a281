"""Operators that take channels together, one by one: over those that are left, or the layer in front stays whole."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups

from references import Net
from stranger_blocks import OVER_CHANNELS
from stranger_truth import OverRest, Truth

REST = {  # the other functions of OVER_CHANNELS leave the layer whole
    "median", "mode", "logsumexp", "maxout", "maxout 2", "mean", "std", "max and mean", "norm", "normalize", "softmax",
    "rms", "prod",
}  # fmt: skip
MORE: dict[str, Callable[[int], OverRest]] = {
    "where the largest is": lambda h: OverRest(lambda x: x * x.max(1, keepdim=True).indices, h, spread=True),
    "where the median is": lambda h: OverRest(lambda x: x + x.median(1, keepdim=True).indices, h, spread=True),
    "the largest, taken": lambda h: OverRest(lambda x: x.gather(1, x.max(1, keepdim=True).indices), h),
    "third largest": lambda h: OverRest(lambda x: x.topk(3, 1).values[:, 2:], h),
    "msort": lambda h: OverRest(lambda x: x.transpose(0, 1).msort().transpose(0, 1), h, spread=True),
    "nanmedian": lambda h: OverRest(lambda x: x.nanmedian(1, keepdim=True).values, h),
    "softmin": lambda h: OverRest(lambda x: nn.functional.softmin(x, 1), h, spread=True),
    "log softmax": lambda h: OverRest(lambda x: x.log_softmax(1), h, spread=True),
    "cosine": lambda h: OverRest(lambda x: torch.cosine_similarity(x, x.roll(1, 2), 1)[:, None], h),
    "range": lambda h: OverRest(lambda x: x.amax(1, True) - x.amin(1, True), h),
    "aminmax": lambda h: OverRest(lambda x: x.aminmax(dim=1, keepdim=True).max, h),
    "cdist": lambda h: OverRest(lambda x: torch.cdist(x.flatten(2).mT, x.flatten(2).mT).sum(2).view(-1, 1, 6, 6), h),
}  # fmt: skip
MORE_REST = {"nanmedian", "softmin", "log softmax", "cosine", "range", "aminmax"}


def network(kind: str) -> nn.Module:
    torch.manual_seed(len(kind))
    own = {**OVER_CHANNELS, **MORE}[kind](8)
    with torch.no_grad():
        out = own(torch.randn(2, 8, 6, 6)).shape[1]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(torch.tanh(m.own(m.act(m.conv(x))))).mean((2, 3))  # type: ignore[operator]

    return Net(
        forward, conv=nn.Conv2d(3, 8, 3, padding=1), act=nn.Sigmoid(), own=own, last=nn.Conv2d(out, 3, 1)
    ).double()  # fmt: skip


@pytest.mark.parametrize("kind", [*OVER_CHANNELS, *MORE])
def test_over_the_rest_or_whole(kind: str) -> None:
    """Behind a sigmoid, which makes one half of a zero: only what is really left out is left out."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 4, 7):
        model = network(kind)
        truth = Truth(model)
        graph = AxisGraph(model, x)
        for name, reason in verify_groups(graph).items():
            graph.drop(name, reason)
        groups = [group for group in graph.groups.values() if "conv" in group.writers]
        assert bool(groups) == (kind in REST | MORE_REST), graph.left_whole
        if not groups:
            assert graph.left_whole["conv"]
            return
        group = groups[0]  # of "maxout 2", the couples
        gone = random.Random(count).sample(range(group.size), min(count, group.size - 1))
        remove_units(graph, group, gone, Trackers(emas=[truth.tags]))
        torch.testing.assert_close(model(x), truth.model()(x), rtol=1e-9, atol=1e-9)
