"""A torchvision detector: its own losses are what is scored, and a measure of one's own says how good it still is.

    python examples/beyond_timm/detector.py

Random weights and images of coloured squares, so that it runs anywhere in a minute; with a trained detector and its
data loader nothing else changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou

import singe_plugin
from singe_plugin import BatchObjective, Evaluate, Pace, Repair, Scoring

SIZE = 96


def batch_of(count: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one square each, and where it is: what a detection data loader yields."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for _ in range(count):
        image = 0.2 * torch.rand(3, SIZE, SIZE, generator=generator)
        x, y = torch.randint(4, 44, (2,), generator=generator).tolist()
        kind = int(torch.randint(1, 4, (1,), generator=generator))
        image[kind - 1, y : y + 40, x : x + 40] = 1.0
        images.append(image)
        targets.append(
            {"boxes": torch.tensor([[x, y, x + 40, y + 40]]).float(), "labels": torch.tensor([kind])},
        )
    return images, targets


def losses(model: nn.Module, batch: Any) -> Tensor:
    """F: the sum of the losses that the detector computes itself, in train mode."""
    images, targets = batch
    total: Tensor = sum(model(images, targets).values())
    return total


def overlap(model: nn.Module) -> dict[str, float]:
    """How well the best box of every image fits, on average: in the place of a mean average precision."""
    images, targets = batch_of(4, 99)
    found = model(images)
    best = [box_iou(f["boxes"], t["boxes"]).max() if len(f["boxes"]) else 0.0 for f, t in zip(found, targets)]
    return {"overlap": float(sum(best)) / len(best)}


def main() -> None:
    torch.manual_seed(0)
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=SIZE, max_size=SIZE
    )
    batches = [batch_of(2, seed) for seed in range(4)]
    objective = BatchObjective(losses, train=True, inputs=lambda batch: (batch[0],))
    result = singe_plugin.prune(
        detector,
        batches,
        target="macs=0.3",
        scoring=Scoring("ig_abs", objective=objective, batches=2),
        pace=Pace(rounds=1),
        finetune=2,
        repair=Repair(8),
        val_data=Evaluate(overlap),
    )
    print(result.summary())
    detector.eval()
    print({key: tuple(value.shape) for key, value in detector(batches[0][0])[0].items()})


if __name__ == "__main__":
    main()
