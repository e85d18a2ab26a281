"""ResNet-56 for CIFAR-10 (He et al. 2016, option-A shortcuts) and the data, for the benchmarks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut strides and pads with zeros, without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.pad:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """3 stages of n blocks with 16, 32 and 64 channels; n = 9 is ResNet-56."""

    def __init__(self, blocks: int = 9, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = BasicBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [BasicBlock(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet56(weights: str | Path | None = None) -> CifarResNet:
    """ResNet-56, with weights from a safetensors file."""
    model = CifarResNet()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.eval()


def decode(path: str | Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]``, normalised, and labels from the ``.npz`` of JPEG files."""
    with np.load(path) as data:
        jpeg, offsets, labels = data[f"{split}_jpeg"], data[f"{split}_offsets"], data[f"{split}_labels"]
    total = len(labels) if count is None else min(count, len(labels))
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))) for i in range(total)]
    )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (tensor - mean) / std, torch.from_numpy(labels[:total].astype(np.int64))
