"""Shrinking by the masks of real NNI pruners."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

import nni
import timm
import torch
from nni.compression.pruning import L1NormPruner, TaylorPruner
from shrinking import difference, masked_copy
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError
from singe_plugin.integrations.nni import SInGEPruner, TorchEvaluator, shrink, shrink_with_report

from asked import asked
from networks import randomise
from small_nets import Chain, assert_same_values, images

X = torch.zeros(1, 2, 6, 6)
SHAPES = ((2, 2, 6, 6), (1, 2, 9, 7))


# --- NNI's own pruners --------------------------------------------------------------------------------------------


def train(model: Any, optimizer: Any, step: Any, _: Any, max_steps: int | None, max_epochs: int | None) -> None:
    for number in range(max_steps or 3):
        optimizer.zero_grad()
        step(images(1, seed=number)[0], model).backward()
        optimizer.step()


def evaluator_of(model: nn.Module) -> TorchEvaluator:
    def step(batch: Any, model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-3), step)


def l1(model: nn.Module, config: list[dict[str, Any]]) -> L1NormPruner:
    return L1NormPruner(model, config)


def taylor(model: nn.Module, config: list[dict[str, Any]]) -> TaylorPruner:
    return TaylorPruner(model, config, evaluator_of(model), training_steps=3)


def config_of(align: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    for number in (1, 2, 3) if align else ():
        along = {"align": {"module_name": f"conv{number}", "target_name": "weight", "dims": [0]}}
        found.append({
            "op_names": [f"bn{number}"], "target_names": ["weight", "bias"],
            "target_settings": {"weight": along, "bias": along},
        })  # fmt: skip
    return found


@pytest.mark.parametrize("make", [l1, taylor])
@pytest.mark.parametrize("align", [True, False], ids=["align", "no-align"])
def test_masks_of_nni(make: Callable[..., Any], align: bool, tmp_path: Path) -> None:
    model = randomise(Chain()).train()
    pruner = make(model, config_of(align))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert isinstance(masks, defaultdict)
    torch.save(masks, tmp_path / "masks.pth")
    given = copy.deepcopy(masks)
    own = {name: {k: m for k, m in targets.items() if m is not None} for name, targets in masks.items()}
    masked, other = masked_copy(model, own), copy.deepcopy(model)
    result = shrink_with_report(model, masks, X)
    assert all(m is None or torch.equal(m, given[n][k]) for n, targets in masks.items() for k, m in targets.items())
    assert difference(masked, model, *SHAPES) < 1e-6
    widths = [model.conv1.out_channels, model.conv2.out_channels, model.conv3.out_channels]
    if align:
        assert (widths, result.still_masked, result.masks) == ([4, 6, 4], {}, {})
    else:  # constants of the batch-norms: those below zero end in the rectifiers
        left = {
            name: int(((conv.weight == 0).flatten(1).all(1) & (norm.bias - norm.running_mean * norm.weight
            / (norm.running_var + norm.eps).sqrt() > 0)).sum()) for name, conv, norm in
            ((f"conv{i}", getattr(masked, f"conv{i}").float(), getattr(masked, f"bn{i}").float()) for i in (1, 2, 3))
        }  # fmt: skip
        assert widths == [4 + left["conv1"], 6 + left["conv2"], 4 + left["conv3"]]
        assert all("constant" in why for why in result.still_masked.values())
        assert sum(left.values()) > 0
        assert shrink_with_report(copy.deepcopy(other), masks, X, allow_constants=True).masks == {}
    for path in (tmp_path / "masks.pth", str(tmp_path / "masks.pth")):
        again = shrink(copy.deepcopy(other), path, X)
        assert_same_values(again, model)


def test_masks_of_singe() -> None:
    model = randomise(timm.create_model("resnet18", channels=[8, 16, 24, 32], num_classes=3, in_chans=2))
    batch = (torch.randn(4, 2, 32, 32), torch.randint(0, 3, (4,)))
    pruner = SInGEPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], **asked(batches=[batch], nodes=1))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    masked = masked_copy(model, {n: {k: m for k, m in own.items() if m is not None} for n, own in masks.items()})
    result = shrink_with_report(model, masks, batch[0][:1])
    assert result.still_masked == {}
    assert (model.conv1.out_channels, model.layer1[0].conv1.out_channels, model.fc.in_features) == (32, 4, 16)
    assert difference(masked, model, (2, 2, 32, 32), (1, 2, 48, 40)) < 1e-6


def test_a_wrapped_model() -> None:
    model = Chain()
    pruner = L1NormPruner(model, config_of(False))
    _, masks = pruner.compress()
    with pytest.raises(ConfigError, match=r"'conv1' is still wrapped by NNI; call pruner.unwrap_model\(\)"):
        shrink(model, masks, X)
    pruner.unwrap_model()
    shrink(model, masks, X)
