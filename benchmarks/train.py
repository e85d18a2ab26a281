"""Train a network for the tables, with the library's own fine-tuning loop.

    python benchmarks/train.py --network mobilenetv2_035 --data cifar10_jpeg.npz --epochs 12 --out mobilenet.safetensors

SGD with Nesterov momentum 0.9, cosine with two epochs of warm-up, from random weights or ``--start``; on a GPU in
mixed precision (``--amp none`` without) and with the loss as a graph. The 5,000 held-out training images are not
trained on. Writes ``OUT`` and ``OUT.json`` (how, and the accuracy).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.loop.tuner import Tuner
from singe_plugin.run.data import evaluate
from singe_plugin.run.staging import resolve_device

from graphs import graphed_loss
from records import environment, peak_mb
from settings import architecture, fingerprint, load_setting


class _Log(singe_plugin.Callback):
    def __init__(self, every: int) -> None:
        self.every, self.seen, self.total, self.start = every, 0, 0.0, time.perf_counter()

    def on_finetune_step(self, event: Any) -> None:
        self.seen, self.total = self.seen + 1, self.total + event.loss
        if self.seen % self.every == 0:
            spent = time.perf_counter() - self.start
            print(f"step {self.seen}: loss {self.total / self.every:.3f}, {spent:.0f} s", flush=True)
            self.total = 0.0


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--start", help="a safetensors file to go on from")
    parser.add_argument("--amp", choices=("auto", "bf16", "none"), default="auto")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--images", type=int, help="fewer test images, for a rehearsal")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    setting = load_setting(args.network, None, args.data, args.images)
    sample, _ = setting.test[0]
    model = architecture(args.network, setting.classes, sample.shape[-1] <= 32)
    if args.start:
        model.load_state_dict(load_file(args.start))
    model.to(resolve_device(None))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    loader = DataLoader(setting.train, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
    steps = args.epochs * len(loader)
    tuner = Tuner(singe_plugin.FineTune(
        loader, steps, "end", recipe=singe_plugin.Recipe(warmup=2 * len(loader)), label_smoothing=0.0, clip_grad=None,
        channels_last=args.channels_last, amp=None if args.amp == "none" else args.amp, step_fn=graphed_loss(0.0),
        optimizer=lambda p: torch.optim.SGD(p, args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay),
    ))  # fmt: skip
    start, about = time.perf_counter(), environment()
    tuner.prepare(model)
    tuner.run(model, steps, _Log(100))
    model.eval()
    found = {
        split: evaluate(model, DataLoader(images, 500))
        for split, images in (("test", setting.test), ("held_out", setting.held_out))
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, args.out)
    record = {"network": args.network, "data": setting.data, "steps": steps, "seed": args.seed,
              "start": fingerprint(args.start) if args.start else None, "weights": fingerprint(args.out), **found,
              "seconds": time.perf_counter() - start, "peak_mb": peak_mb(), **about}  # fmt: skip
    Path(f"{args.out}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
