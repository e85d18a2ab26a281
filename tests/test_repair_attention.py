"""The repair behind queries and keys that lost dimensions: logits stay what they were, and are not made sharper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.axes import AxisGraph
from singe_plugin.axes.removal import remove_units
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.repairer import Repairer
from singe_plugin.nested import call_model

WIDTH, HEADS, DIMS = 12, 2, 4


class Attention(nn.Module):
    """Attention whose logits are divided by the square root of the width that it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIMS) for _ in range(3))
        self.proj = nn.Linear(HEADS * DIMS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Packed(nn.Module):
    """The same with one layer for all three, each of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * DIMS), nn.Linear(HEADS * DIMS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def silenced(net: nn.Module, dims: list[int]) -> None:
    """Let dimensions of queries and keys (in one layer, of values, too) give nothing: nothing is lost with them."""
    with torch.no_grad():
        for block in net.modules():
            layers = (
                [block.q, block.k] if isinstance(block, Attention) else [block.qkv] if isinstance(block, Packed) else []
            )
            for layer in layers:
                for tensor in (layer.weight, layer.bias):
                    tensor.unflatten(0, (-1, HEADS, DIMS))[:, :, dims] = 0


@pytest.mark.parametrize("make", [Attention, Packed])
def test_logits_are_as_sharp_as_they_were(make: Any) -> None:
    """Dimensions that give nothing go from all blocks: the function stays, and the repair finds nothing to mend."""
    torch.manual_seed(0)
    original = nn.Sequential(*(make() for _ in range(3)), nn.Linear(WIDTH, 5)).eval()
    silenced(original, [1, 3])
    pruned, x = copy.deepcopy(original), 3 * torch.randn(64, 6, WIDTH)
    own = AxisGraph(pruned, x)
    groups = [g for g in own.groups.values() if g.in_heads and not any("proj" in name for name in g.writers)]
    query_groups = [g for g in groups if any(name.endswith((".q", ".qkv")) for name in g.writers)]
    assert len(query_groups) == 3
    for group in query_groups:
        assert group.size == DIMS
        remove_units(own, group, [1, 3])
    before = (pruned(x) - original(x)).norm() / original(x).norm()
    assert before < 1e-5
    graph = AxisGraph(copy.deepcopy(original), x)
    kept = {name: list(own.groups[name].left) for name in graph.groups}
    solved = Repairer(original, graph, [x], Repair(positions=10_000), 0, call_model).repair(pruned, kept)
    queries = [layer for layer in solved if layer.name.endswith((".q.weight", ".qkv.weight"))]
    assert {layer.name.split(".")[0] for layer in queries} >= {"1", "2"}
    assert all(layer.before is not None and layer.before < 1e-6 for layer in queries)
    assert (pruned(x) - original(x)).norm() / original(x).norm() < 1e-5
