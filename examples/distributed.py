"""Pruning in several processes: scoring, repair and fine-tuning are divided among them.

    python examples/distributed.py                               starts two processes on the CPU
    torchrun --nproc-per-node 4 examples/distributed.py          is how it is run on four cards

Every process makes the same model and the same data, and calls prune alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import TensorDataset

import singe_plugin
from singe_plugin import FineTune, Pace, Scoring


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    from sklearn.datasets import load_digits

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same weights in every process
    digits = load_digits()
    images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    train, val = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[:1400]), labels[:1400]).backward()
        optimizer.step()
    result = singe_plugin.prune(
        net,
        train,
        target="params=0.7",
        scoring=Scoring(batches=4),  # a multiple of the number of processes
        pace=Pace(rounds=3),
        finetune=FineTune(steps=60),
        val_data=val,
    )
    if rank == 0:
        print(result.summary())
        with tempfile.TemporaryDirectory() as folder:
            singe_plugin.save(result, folder, builder=singe_plugin.Builder.factory("distributed:make_net"))


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        sys.exit(subprocess.run(launch, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode)
