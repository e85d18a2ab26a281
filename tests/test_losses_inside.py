"""Losses that a forward pass computes, and codebooks that it compares with, lose channels like everything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.axes import AxisGraph, remove_units, verify_groups


def rounded(d: Any) -> Any:
    return np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5).sum()


LOSSES: dict[str, Any] = {
    "mse_loss": lambda d: (d**2).sum(), "l1_loss": lambda d: np.abs(d).sum(), "smooth_l1_loss": rounded,
    "huber_loss": rounded,
}  # fmt: skip


class Compared(nn.Module):
    """Two layers whose outputs are compared by a sum over all channels."""

    def __init__(self, loss: str, how: str) -> None:
        super().__init__()
        self.one, self.two, self.head, self.loss = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2), loss
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.one(x)), torch.tanh(self.two(x))
        found: Tensor = self.head(a) + getattr(functional, self.loss)(a, b, reduction=self.how)
        return found


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_inside_of_a_network_is_followed(loss: str, how: str) -> None:
    torch.manual_seed(0)
    net, x = Compared(loss, how).double(), torch.randn(2, 3, dtype=torch.float64)
    w = {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    (group,) = graph.groups.values()
    remove_units(graph, group, [0, 4])
    a, b = (
        np.tanh(x.numpy() @ np.delete(w[f"{n}.weight"], [0, 4], 0).T + np.delete(w[f"{n}.bias"], [0, 4]))
        for n in ("one", "two")
    )
    expected = (
        a @ np.delete(w["head.weight"], [0, 4], 1).T
        + w["head.bias"]
        + LOSSES[loss](a - b) / (1 if how == "sum" else a.size)
    )
    np.testing.assert_allclose(net(x).detach().numpy(), expected, atol=1e-12)


class Codebook(nn.Module):
    """A layer of which the distances to the rows of a buffer are what goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(4, 2)
        self.register_buffer("codes", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y, codes = self.stem(x), self.codes.t()
        far = y.pow(2).sum(1, keepdim=True) - 2 * y @ codes + codes.pow(2).sum(0, keepdim=True)
        found: Tensor = self.head((-far / 8).exp())
        return found


def test_a_codebook_that_is_compared_with_is_cut_along() -> None:
    torch.manual_seed(0)
    net, x = Codebook().double(), torch.randn(2, 3, dtype=torch.float64)
    w = {name: p.detach().numpy().copy() for name, p in net.state_dict().items()}
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    remove_units(graph, graph.groups["stem"], [1, 2])
    y = x.numpy() @ np.delete(w["stem.weight"], [1, 2], 0).T + np.delete(w["stem.bias"], [1, 2])
    far = ((y[:, None] - np.delete(w["codes"], [1, 2], 1)[None]) ** 2).sum(2)
    np.testing.assert_allclose(
        net(x).detach().numpy(), np.exp(-far / 8) @ w["head.weight"].T + w["head.bias"], atol=1e-12
    )
