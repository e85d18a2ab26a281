"""Mask single weights instead of removing channels: 90 % of them, then the 2:4 pattern."""

import copy

import timm
import torch

import singe_plugin

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=10, layers=[1, 1, 1, 1], channels=[16, 16, 32, 32])
train = [(torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))) for _ in range(4)]  # your DataLoader

for sparsity, rounds in (0.9, 3), ("2:4", 1):
    pace = singe_plugin.Pace(rounds=rounds)
    result = singe_plugin.prune_weights(copy.deepcopy(model), train, sparsity=sparsity, pace=pace, finetune=6)
    print(result.summary())  # sparsity, and the multiply-adds that are left

# the model is an ordinary one with zeros in it; hold them when training goes on
singe_plugin.hold_masks(result.model, result.weight_masks)
