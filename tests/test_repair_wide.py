"""Layers that read more features than a matrix can be kept of: solved from rows, to the same solution."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singe_plugin import Repair, hold_masks, repair
from singe_plugin.loop import sites
from singe_plugin.method import dual, ridge
from singe_plugin.method.dual import Rows
from singe_plugin.method.ridge import Moments, solve


def thin(x: np.ndarray, y: np.ndarray, w0: np.ndarray, r: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ridge towards ``w0 [O, F]`` by the singular values of x: all that other features see is the way back."""
    mx, my = (x.mean(0), y.mean(0)) if bias else (np.zeros(x.shape[1]), np.zeros(y.shape[1]))
    xc = x - mx
    u, s, v = np.linalg.svd(xc, full_matrices=False)
    factor = s / (s**2 + r * (xc**2).sum() / x.shape[1])
    w = w0 + ((y - my - xc @ w0.T).T @ u * factor) @ v
    return w, my - w @ mx


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("shape", [(1, 30, 50), (3, 30, 50), (2, 50, 11)], ids=["wide", "grouped", "tall"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_solution_from_moments(
    bias: bool, shape: tuple[int, int, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dual, "_BLOCK", 7)
    monkeypatch.setattr(ridge, "_ENOUGH", 1e-15)
    torch.manual_seed(0)
    groups, rows, features = shape
    x, y = torch.randn(*shape).double() + 1, torch.randn(groups, rows, 4).double()
    kept = torch.rand(groups, 4, features) > 0.5 if masked else None
    w0 = torch.randn(groups, 4, features).double() * (1 if kept is None else kept)
    b0, scale = torch.randn(groups, 4).double() if bias else None, torch.rand(groups, 4).double()
    cut, half, found = int(0.7 * rows), rows // 3, {}
    for kind in (Moments, Rows):
        fitted: Any = kind.of(x[:, :half], y[:, :half])
        fitted.include(x[:, half:cut], y[:, half:cut])
        held: Any = kind.of(x[:, cut:], y[:, cut:])
        assert held.error(w0, b0, scale) == pytest.approx(
            float(
                (
                    ((x @ w0.transpose(1, 2) + (0 if b0 is None else b0[:, None]) - y)[:, cut:] * scale[:, None]) ** 2
                ).sum()
            )
        )
        found[kind] = solve(w0, b0, fitted, held, [1e-3, 1e-2, 1.0], kept, scale)
    a, b = found.values()
    assert a.ridge == b.ridge is not None
    assert (a.before, a.after) == pytest.approx((b.before, b.after), rel=1e-8)
    np.testing.assert_allclose(a.weight.numpy(), b.weight.numpy(), atol=1e-8)
    if a.bias is not None and b.bias is not None:
        np.testing.assert_allclose(a.bias.numpy(), b.bias.numpy(), atol=1e-8)
    if kept is not None:
        assert not b.weight[~kept].any()


def changed(net: nn.Module) -> Any:
    """The network with zeros for a third of what its second layer gets, which stay: zeros that came since."""
    other: Any = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight[::3] = 0.0
    return other


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_nine_thousand_features(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Flatten(), nn.Linear(9 * 1000, 3, bias=bias)).double().eval()
    x = (torch.randn(64, 6) @ torch.randn(6, 3000)).view(64, 3, 25, 40).double()
    other, options = changed(net), Repair(64, ridge=0.1, positions=10_000)
    start = other[2].weight.detach().clone()
    names = {layer.name: layer for layer in repair(other, net, x.split(16), options).layers}
    assert (names["2.weight"].ridge, names["2.weight"].reason) == (0.1, None)
    assert names["2.weight"].after < names["2.weight"].before
    with torch.no_grad():
        inputs, targets = other[:2](x).numpy(), net(x).numpy()
    w, b = thin(inputs, targets, start.numpy(), 0.1, bias)
    np.testing.assert_allclose(other[2].weight.detach().numpy(), w, atol=1e-8)
    if bias:
        np.testing.assert_allclose(other[2].bias.detach().numpy(), b, atol=1e-8)


def test_the_rows_are_drawn_evenly_over_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two batches of nine rows, four each: the first, the last, and two in between."""
    monkeypatch.setattr(sites, "LARGEST", 8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 2)).double().eval()
    x, other = torch.randn(18, 4).double(), changed(net)
    start = other[2].weight.detach().clone()
    done = {layer.name: layer for layer in repair(other, net, x.split(9), Repair(18, ridge=0.01)).layers}
    assert done["2.weight"].ridge is not None
    chosen = [0, 3, 5, 8, 9, 12, 14, 17]
    with torch.no_grad():
        inputs, targets = other[:2](x).numpy()[chosen], net(x).numpy()[chosen]
    w, b = thin(inputs, targets, start.numpy(), 0.01, True)
    np.testing.assert_allclose(other[2].weight.detach().numpy(), w, atol=1e-9)
    np.testing.assert_allclose(other[2].bias.detach().numpy(), b, atol=1e-9)


def test_a_wide_layer_under_a_mask() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9000, 3)).eval()
    x: Tensor = torch.randn(48, 6) @ torch.randn(6, 9000) / 50
    other = copy.deepcopy(net)
    mask = torch.rand(3, 9000) > 0.8
    hold_masks(other, {"1.weight": mask})
    (layer,) = repair(other, net, [x]).layers
    assert layer.after < 0.1 * layer.before
    weight: Any = other[1].weight
    assert not weight[~mask].any()


def test_a_convolution_that_reads_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "LARGEST", 40)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 5, 3, groups=1)).eval()
    other, x = changed(net), torch.randn(32, 3, 5, 5)
    done = {layer.name: layer for layer in repair(other, net, x.split(8)).layers}
    assert done["2.weight"].reason is None
    assert done["2.weight"].after <= done["2.weight"].before
