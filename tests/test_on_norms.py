"""Criteria that read no norms let a batch-norm decay in the place of the layer before it: the same scores."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from singe_plugin import Scoring
from singe_plugin.axes import AxisGraph
from singe_plugin.method.decay import on_norms
from singe_plugin.method.folding import norm_scale_shift
from singe_plugin.method.scoring import score_groups
from singe_plugin.method.units import UnitGroup


def _seeded(norm: nn.Module, generator: torch.Generator) -> None:
    for name, low in (("running_mean", -1.0), ("running_var", 0.5), ("weight", -1.0), ("bias", -1.0)):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            tensor.data = low + 2 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)


def _net(layer: nn.Module, norm: nn.Module, last: bool = True) -> nn.Module:
    """A layer with its norm between two others; without the last, its width is the head's."""
    generator = torch.Generator().manual_seed(0)
    after = nn.Conv2d(6, 5, 3, bias=False) if last else nn.Identity()
    parts = [nn.Conv2d(3, 4, 1), nn.Tanh(), layer, norm, nn.Tanh(), after]
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5 if last else 6, 3)).double().eval()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    _seeded(norm, generator)
    return net


CASES: dict[str, tuple[nn.Module, nn.Module]] = {
    "a convolution": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "with a bias": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "in two groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6)),
    "transposed, in two groups": (nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
    "a norm without parameters": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "a norm that activates": (nn.Conv2d(4, 6, 3), timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)),
    "a frozen norm": (nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)),
}


def _literal(net: nn.Module, unit_of: dict[int, int], x: Tensor, targets: Tensor, options: Scoring) -> Tensor:
    """Sum |<uW, dF/d(uW)>| of layer 2 over the path: its batch-norm folded by hand, one channel after the other."""
    net = deepcopy(net)
    layer, norm = net[2], net[3]  # type: ignore[index]
    scale, shift = norm_scale_shift(norm)
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    per_group = layer.weight.shape[1] if dim else 0

    def rows(tensor: Tensor, unit: int) -> Tensor:
        if not dim:
            return tensor[unit]
        blocks = tensor.view(layer.groups, -1, *tensor.shape[1:])
        return blocks[unit // per_group, :, unit % per_group]

    folded = layer.weight.detach().clone()
    for unit in range(6):
        rows(folded, unit).mul_(scale[unit])
    bias = shift + scale * (0 if layer.bias is None else layer.bias.detach())
    plain: Any = nn.Identity()
    if isinstance(norm, timm.layers.BatchNormAct2d):
        plain = nn.SiLU()
    net[3] = plain  # type: ignore[index]
    path = options.settle().decay_path
    total = torch.zeros(len(set(unit_of.values())), dtype=torch.float64)
    for u, weight in zip(path.scales.tolist(), path.weights.tolist(), strict=True):
        layer.weight, layer.bias = nn.Parameter(u * folded), nn.Parameter(u * bias)
        value = nn.functional.cross_entropy(net(x), targets)
        of_weight, of_bias = torch.autograd.grad(value, [layer.weight, layer.bias])
        inner = torch.zeros_like(total)
        for row, unit in unit_of.items():
            inner[unit] += (rows(u * folded, row) * rows(of_weight, row)).sum() + u * bias[row] * of_bias[row]
        total += weight * inner.abs()
    return total


def _group(net: nn.Module, x: Tensor) -> UnitGroup:
    group = AxisGraph(net, x).groups.get("2")
    assert group is not None
    return group.unit_group()


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("case", list(CASES))
def test_scores_are_those_of_the_folded_weights(case: str, last: bool) -> None:
    layer, norm = deepcopy(CASES[case])
    net = _net(layer, norm, last)
    x, targets = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randint(0, 3, (4,))
    group, options = _group(net, x), Scoring("ig_abs", nodes=3, normalizer=None)
    root = next(producer for producer in group.producers if producer.name == "2")
    unit_of = dict(zip(root.rows.tolist(), root.units.tolist(), strict=True))
    expected = _literal(net, unit_of, x, targets, options)
    found = score_groups(net, {"2": group}, [(x, targets)], options)["2"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    moved = [p.is_norm for p in on_norms(group).producers if p.name == "2"]
    assert moved == [case != "a frozen norm"], "a frozen norm has no parameters that could decay"
    before = score_groups(net, {"2": group}, [(x, targets)], Scoring("ig", nodes=3, normalizer=None))["2"]
    assert (before.double() >= found.double() * (1 - 1e-6)).all()  # Eq. 5 is never below: Cauchy and Schwarz
