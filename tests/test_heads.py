"""What goes of attention: the dimensions of heads, whole heads, or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin import ConfigError, Pace, SInGEPruner, prune, prune_weights

from masking import Masked

BATCHES = [
    (torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(n)), torch.arange(8) % 10) for n in range(2)
]


def _vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=6, num_classes=10
    ).eval()


@pytest.mark.parametrize(
    ("heads", "order"), [("dims", "rounds"), ("whole", "rounds"), ("whole", "layers"), ("keep", "rounds")]
)
def test_what_goes_of_attention(heads: str, order: str) -> None:
    model = _vit()
    pace = Pace(order, heads=heads, rounds=2 if order == "rounds" else None)
    result = prune(model, BATCHES, target="params=0.4", pace=pace, finetune=0, scoring="ig_abs")
    numbers = [(block.attn.num_heads, block.attn.head_dim) for block in model.blocks]
    if heads == "dims":
        assert all(number == 6 for number, _ in numbers)
        assert any(dim < 8 for _, dim in numbers)
    else:
        assert all(dim == 8 for _, dim in numbers)
        assert all(number == 6 for number, _ in numbers) == (heads == "keep")
    for block, (number, dim) in zip(model.blocks, numbers, strict=True):
        assert block.attn.qkv.out_features == 3 * number * dim
        assert block.attn.proj.in_features == number * dim
    assert result.options["pace"]["heads"] == heads
    assert abs(result.removed_params - 0.4) < 0.011
    model(BATCHES[0][0]).sum().backward()


def test_whole_heads_are_removed_as_they_are_masked() -> None:
    model = _vit().double()
    masked = Masked(model)
    pruner = SInGEPruner(
        model, torch.randn(2, 3, 32, 32).double(), tp.importance.MagnitudeImportance(), target="params=0.3",
        pace=Pace("layers", heads="whole"), ema=masked.tags, ignored_layers=[model.patch_embed],
    )  # fmt: skip
    pruner.run()
    x: Tensor = BATCHES[0][0].double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked.model()(x), rtol=1e-9, atol=1e-9)


def test_what_heads_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="heads 'half'; choose one of dims, whole, keep"):
        Pace(heads="half")
    with pytest.raises(ConfigError, match=r"prune_head_dims=True and pace.heads='whole' were both given"):
        SInGEPruner(
            _vit(), torch.randn(2, 3, 32, 32), tp.importance.MagnitudeImportance(), pace=Pace(heads="whole"),
            prune_head_dims=True,
        )  # fmt: skip
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ConfigError, match="single weights are of no head"):
        prune_weights(net, [(torch.randn(4, 4), torch.arange(4) % 2)], pace=Pace(heads="keep"))
