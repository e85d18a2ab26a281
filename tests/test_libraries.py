"""Models of ultralytics and diffusers, where these are installed: pruned, and used as the library uses them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from backbones import prunable_share
from torch import nn

from singe_plugin import Builder, Pace
from singe_plugin.integrations.diffusers import follow_config
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.nested import relative_change, tensors_in

from masking import Masked


def halved(model: nn.Module, inputs: Any) -> tuple[float, nn.Module]:
    """Prune half of every group; return the share that could be pruned, and the reference."""
    masked = Masked(model.eval())
    pruner = SInGEPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ema=masked.tags, pace=Pace(verify=False)
    )
    share = prunable_share(pruner.DG.axis_graph)
    pruner.step()
    return share, masked.model()


def test_a_detector_of_ultralytics_is_exact_and_can_be_exported() -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model, images = tasks.DetectionModel("yolov8n.yaml", verbose=False).eval(), torch.rand(1, 3, 64, 64)
    model(images)  # it keeps the grid of this shape
    share, reference = halved(model, images)
    assert share > 0.95
    same = copy.deepcopy(model).double()(images.double()), reference.double()(images.double())
    assert relative_change(*(list(tensors_in(out)) for out in same)) < 1e-12
    before = model(images)[0]
    for module in model.modules():  # what the exporter of the library does
        if hasattr(module, "forward_split"):
            module.forward = module.forward_split
    assert relative_change([before], [model(images)[0]]) < 1e-6


def of_diffusers(name: str, **config: Any) -> nn.Module:
    made: nn.Module = getattr(pytest.importorskip("diffusers"), name)(**config)
    return made


def test_a_configuration_of_diffusers_follows_where_the_class_can_say_it(tmp_path: Path) -> None:
    model = of_diffusers(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=8,
        out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 12),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([10, 20]),
    }  # fmt: skip
    share, _ = halved(model, inputs)
    told = follow_config(model, inputs)
    assert share > 0.8
    assert told.endswith("(attention_head_dim=4, caption_projection_dim=16): save_pretrained works")
    assert model.config.attention_head_dim == 4  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert torch.equal(model(**inputs).sample, again(**inputs).sample)


def test_an_autoencoder_comes_back_with_its_configuration(tmp_path: Path) -> None:
    """Layers behind concatenations read sums of two numbers; with one of them doubled, the class has other layers."""
    model = of_diffusers(
        "AutoencoderKL", block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    share, _ = halved(model, x)
    told = follow_config(model, x)
    assert share > 0.8
    assert told.endswith("(block_out_channels=[16, 32], latent_channels=2): save_pretrained works")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert again.config.latent_channels == 2
    assert torch.equal(model(x).sample, again(x).sample)


def test_what_a_configuration_of_diffusers_cannot_say_is_said() -> None:
    model = of_diffusers(
        "UNet2DModel", sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([10, 20])}
    assert Builder.infer(model) == Builder.diffusers(model)
    config = dict(model.config)  # type: ignore[arg-type]
    share, _ = halved(model, inputs)
    told = follow_config(model, inputs)
    assert share > 0.8
    # everything is halved but the sines of the time, whose number is that of the first block
    assert "cannot say the widths that are left (time_embedding.linear_1.weight has the shape" in told
    assert "use singe_plugin.save" in told
    assert dict(model.config) == config  # type: ignore[arg-type]
