"""Pruning in timm's way of training: the lines that go into a train loop like timm's own, on scikit-learn's digits.

The optimizer's state and the averaged weights are cut along, the scheduler goes on, and timm's checkpoints are of the
network as it is by then. Runs in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from singe_plugin.integrations.in_training import EpochPruning

EPOCHS, PRUNE_AT = 8, [3, 4, 5]


def digits() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    images = nn.functional.interpolate(torch.tensor(data.images[:, None]).float() / 16, size=16)
    labels = torch.tensor(data.target)
    train, val = TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])
    return DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(val, 256)


def evaluate(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        hits = [(accuracy(model(x), y)[0].item() * len(y), len(y)) for x, y in loader]
    return sum(hit for hit, _ in hits) / sum(count for _, count in hits)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train, val = digits()
    options = {"num_classes": 10, "in_chans": 1, "layers": [1, 1, 1, 1], "channels": [16, 24, 32, 48]}
    model = timm.create_model("resnet18", **options)
    whole = copy.deepcopy(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1)
    ema = ModelEmaV3(model, decay=0.9)
    pruning = EpochPruning(PRUNE_AT, target="macs=0.5", ema=ema)  # <- 1: what goes, and when
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
        updates = 0
        for epoch in range(EPOCHS):
            if pruning.prune(epoch, model, [optimizer], train):  # <- 2: at the beginning of an epoch
                print(f"epoch {epoch}: {sum(p.numel() for p in model.parameters()):,} parameters are left")
            model.train()
            for x, y in train:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
                optimizer.step()
                updates += 1
                ema.update(model, step=updates)
            scheduler.step(epoch + 1)
            top1 = evaluate(ema.module, val)
            print(f"epoch {epoch}: {top1:.2f} % with averaged weights")
            saver.save_checkpoint(epoch, metric=top1)
            torch.save(pruning.state(), f"{folder}/pruning.pt")  # <- 3: what was removed, beside the checkpoints
        # later: the architecture as it was, what was removed, then the weights
        again = EpochPruning(PRUNE_AT, target="macs=0.5")
        again.restore(whole, torch.load(f"{folder}/pruning.pt", weights_only=True))
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps the command's arguments there
            saved = torch.load(f"{folder}/last.pth.tar", weights_only=True)
        whole.load_state_dict(saved["state_dict_ema"])
        print(f"loaded again: {evaluate(whole, val):.2f} %")


if __name__ == "__main__":
    main()
