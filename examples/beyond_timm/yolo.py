"""A YOLO of ultralytics: pruned by its own loss, saved and loaded as ultralytics does it, and exported to TorchScript.

    pip install ultralytics
    python examples/beyond_timm/yolo.py

Random weights and images, so that it runs anywhere in a minute. With ``YOLO("yolov8n.pt")`` and the batches of its data
loader nothing else changes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

import singe_plugin
from singe_plugin import BatchObjective, Pace, Repair, Scoring


def batch_of(count: int, seed: int) -> dict[str, Any]:
    """What a data loader of ultralytics yields, apart from file names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "img": torch.randint(0, 255, (count, 3, 96, 96), generator=generator, dtype=torch.uint8),
        "cls": torch.randint(0, 80, (4 * count, 1), generator=generator).float(),
        "bboxes": torch.tensor([0.15, 0.3, 0.5, 0.8]).repeat(count)[:, None] * torch.ones(4),  # small to large
        "batch_idx": torch.arange(count).float().repeat_interleave(4),
    }


def loss(model: nn.Module, batch: Any) -> Tensor:
    """F: the loss of ultralytics' trainer."""
    found: Any = model.loss({**batch, "img": batch["img"].float() / 255})  # type: ignore[operator]
    total: Tensor = found[0].sum()
    return total


def main() -> None:
    torch.manual_seed(0)
    yolo = YOLO("yolov8n.yaml", verbose=False)
    model: Any = yolo.model
    model.args = get_cfg()  # what the loss weighs its parts by; a trained checkpoint has it
    model.requires_grad_(True)
    objective = BatchObjective(loss, train=True, inputs=lambda batch: batch["img"].float() / 255)
    result = singe_plugin.prune(
        model,
        [batch_of(2, seed) for seed in range(4)],
        target="macs=0.3",
        scoring=Scoring("ig_abs", objective=objective, batches=2),
        pace=Pace(rounds=1),
        finetune=2,
        repair=Repair(8),
    )
    print(result.summary())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.pt"
        yolo.save(path)
        again = YOLO(path)
        image = batch_of(1, 9)["img"].float() / 255
        model.eval()
        with torch.no_grad():
            mine, theirs = model(image)[0], again.model.float().eval()(image)[0]
        off = float((mine - theirs).abs().max() / mine.abs().max())
        print(f"a loaded copy, which ultralytics saves in half precision, is {off:.1e} off")
        print("exported:", Path(again.export(format="torchscript", imgsz=96)).name)


if __name__ == "__main__":
    main()
