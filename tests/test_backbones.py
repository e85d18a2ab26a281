"""A fast part of the sweep over backbones (``make backbones`` runs all of it), and what users do with a pruned one."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from backbones import check, prunable_share
from torch import nn

import singe_plugin
from singe_plugin import Builder, Pace
from singe_plugin.axes import AxisGraph
from singe_plugin.integrations.torch_pruning import SInGEPruner

from asked import asked

FAST = [
    "test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_coatnet", "test_nfnet", "test_resnet",
    "test_vit", "test_vit_relpos", "lcnet_035", "ghostnet_050", "efficientvit_m0", "regnetx_002",
]  # fmt: skip
LONG = {"ghostnet_050", "efficientvit_m0", "regnetx_002"}  # 15 to 50 s each: in `make slow`
MAGNITUDE = tp.importance.MagnitudeImportance()


def fast() -> list[Any]:
    """The names; timm did not always have all of them."""
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(not timm.is_model(name), reason="not in this timm"),
                *([pytest.mark.slow] if name in LONG else []),
            ],
        )
        for name in FAST
    ]


@pytest.mark.parametrize("name", fast())
def test_right_whole_and_worth_it(name: str) -> None:
    size = timm.create_model(name).default_cfg["input_size"]
    row = check(name, lambda: timm.create_model(name), Builder.timm(name), size)
    assert row.right == []
    assert row.whole == []
    assert row.share > 0.9
    assert row.removed > 0.4
    assert row.scored == f"{row.groups}/{row.groups}"


def test_a_backbone_without_a_classifier_keeps_its_features() -> None:
    model = timm.create_model("test_resnet", num_classes=0).eval()
    x = torch.randn(1, 3, 96, 96)
    width = model(x).shape[1]
    pruner = SInGEPruner(model, x, MAGNITUDE, pruning_ratio=0.5)
    pruner.step()
    assert model(x).shape == (1, width)
    assert model.num_features == width
    assert "it reaches the model's output" in pruner.left_whole.values()
    assert prunable_share(pruner.DG.axis_graph) > 0.5


def test_feature_maps_keep_their_channels() -> None:
    model = timm.create_model("test_resnet", features_only=True).eval()
    x = torch.randn(1, 3, 96, 96)
    shapes, before = [t.shape for t in model(x)], sum(p.numel() for p in model.parameters())
    SInGEPruner(model, x, MAGNITUDE, pruning_ratio=0.5).step()
    assert [t.shape for t in model(x)] == shapes
    assert model.feature_info.channels() == [s[1] for s in shapes]
    assert sum(p.numel() for p in model.parameters()) < before


def test_all_heads_of_a_distilled_model_are_left_alone() -> None:
    model = timm.create_model("levit_128s", num_classes=7).eval()
    x = torch.randn(1, 3, 224, 224)
    pruner = SInGEPruner(model, x, MAGNITUDE, pruning_ratio=0.5, pace=Pace(verify=False))
    pruner.step()
    assert {"head.linear", "head_dist.linear"} <= set(pruner.left_whole)
    assert model(x).shape == (1, 7)


def test_whole_heads_on_request() -> None:
    model = timm.create_model("test_vit").eval()
    heads = model.blocks[0].attn.num_heads
    pruner = SInGEPruner(
        model, torch.randn(1, 3, 160, 160), MAGNITUDE, prune_num_heads=True, prune_head_dims=False,
        head_pruning_ratio=0.5, pruning_ratio=0.25,
    )  # fmt: skip
    pruner.step()
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim) == (heads // 2, 32)
    assert attention.qkv.out_features == 3 * attention.num_heads * 32
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 1000)


def test_algorithm_1_prunes_attention_to_a_target() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    batches = [(torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 0]))]
    result: Any = singe_plugin.prune(
        model,
        batches,
        **asked(target="params=0.4", finetune_steps=2, nodes=1, units_per_step="layer", ratios="uniform"),
    )
    assert abs(1 - result.after.params / result.before.params - 0.4) <= 0.01
    assert any("attn.qkv" in row.name for row in result.layers)
    assert result.left_whole == {"head": "it reaches the model's output"}


def test_a_new_model_of_known_layers_needs_no_adapter() -> None:
    class Backbone(nn.Module):
        """Parts of three families that nobody has put together before."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = timm.layers.ConvNormAct(3, 24, 3, stride=4)
            self.se = timm.layers.SqueezeExcite(24)
            self.block = timm.models.vision_transformer.Block(24, 3)
            self.norm, self.head = timm.layers.RmsNorm(24), nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.se(self.stem(x)).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.block(x)).mean(1))

    model = Backbone().eval()
    graph = AxisGraph(model, torch.randn(1, 3, 32, 32))
    assert set(graph.left_whole) == {"head"}
    assert {"stem.conv", "se.fc1", "block.attn.qkv", "block.mlp.fc1"} <= set(graph.groups)
    assert prunable_share(graph) > 0.9


def test_widths_follow_where_an_image_is_as_wide_as_a_layer() -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_384", depth=1, num_classes=3).eval()
    x = torch.randn(1, 3, 384, 384)  # the stem halves it to 192, which is the embedding's width, too
    SInGEPruner(model, x, MAGNITUDE, pruning_ratio=0.5, pace=Pace(verify=False)).step()
    assert (model.embed_dim, model.num_features, model.head_hidden_size) == (96, 96, 96)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)
