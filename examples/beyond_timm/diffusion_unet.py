"""A UNet of diffusers: units are scored by how well it predicts the noise, and it still takes every step of sampling.

    pip install diffusers
    python examples/beyond_timm/diffusion_unet.py

A small UNet with random weights and images, so that it runs anywhere in a minute.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
from singe_plugin import BatchObjective, Evaluate, Pace, Repair, Scoring

SCHEDULER = DDPMScheduler(num_train_timesteps=100)


def noise(model: nn.Module, batch: Any) -> Tensor:
    """F: the error of the predicted noise. What is drawn here is drawn alike whenever a batch is looked at."""
    images = batch["images"]
    drawn = torch.randn_like(images)
    steps = torch.randint(0, 100, (len(images),), device=images.device)
    noisy = SCHEDULER.add_noise(images, drawn, steps)
    return functional.mse_loss(model(noisy, steps).sample, drawn)


def error(model: nn.Module) -> float:
    """How far the predicted noise is off, on images that nothing was scored on."""
    generator = torch.Generator().manual_seed(5)
    images, drawn = (torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2))
    steps = torch.arange(0, 96, 12)
    return float(functional.mse_loss(model(SCHEDULER.add_noise(images, drawn, steps), steps).sample, drawn))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # prune says what to save the model with
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    batches = [{"images": torch.randn(8, 3, 16, 16)} for _ in range(4)]
    objective = BatchObjective(noise, inputs=lambda batch: (batch["images"], torch.tensor([10])))
    result = singe_plugin.prune(
        unet,
        batches,
        target="macs=0.3",
        scoring=Scoring(objective=objective, batches=2),
        pace=Pace(rounds=2),
        finetune=20,
        repair=Repair(16),
        val_data=Evaluate(error, lower_is_better=True),
    )
    print(result.summary())
    x = torch.randn(1, 3, 16, 16)
    unet.eval()
    with torch.no_grad():
        for step in SCHEDULER.timesteps[::10]:
            x = SCHEDULER.step(unet(x, step).sample, step, x).prev_sample
        with tempfile.TemporaryDirectory() as folder:
            singe_plugin.save(result, folder)
            again = singe_plugin.load(folder, trust=True).model
            print("loaded, it computes the same:", torch.equal(again(x, 3).sample, unet(x, 3).sample))


if __name__ == "__main__":
    main()
