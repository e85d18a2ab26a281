"""The repair on a fast part of timm: no layer is worse on held-out rows, the network is nearer to the unpruned one."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
import torch_pruning as tp
from test_backbones import fast
from torch import Tensor, nn

import singe_plugin
from singe_plugin.integrations.torch_pruning import SInGEPruner

from small_nets import seeded


def off(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """How far the outputs are from the unpruned network's, relative to how much these vary."""
    with torch.no_grad():
        expected, got = original.eval()(x), model.eval()(x)
    return float((got - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("name", fast())
def test_a_repair_helps_every_layer_and_the_whole(name: str) -> None:
    net = seeded(lambda: timm.create_model(name, num_classes=10))
    size = timm.create_model(name).default_cfg["input_size"]
    torch.manual_seed(1)
    for module in net.modules():  # statistics and scales that are not all the same
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    batches, fresh = [torch.randn(16, *size) for _ in range(3)], torch.randn(16, *size)
    with torch.no_grad():
        net.train()
        for batch in batches:
            net(batch)
    net.eval()
    smaller = copy.deepcopy(net)
    SInGEPruner(smaller, batches[0], tp.importance.MagnitudeImportance(), pruning_ratio=0.3).step()
    before = off(smaller, net, fresh)
    done = singe_plugin.repair(smaller, net, batches)
    solved = [layer for layer in done.layers if layer.reason is None]
    assert solved
    assert all(layer.after <= layer.before for layer in solved if not math.isnan(layer.before))
    assert off(smaller, net, fresh) <= before
