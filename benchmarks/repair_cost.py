"""What the repair costs: in forward passes of the same images through the unpruned network, and in memory.

    python benchmarks/repair_cost.py --network resnet50 --size 224
    python benchmarks/repair_cost.py --network resnet56 --size 32 --weights resnet56.safetensors

Weights and images are random unless weights are given: the time does not depend on them, but for how many ridges are
tried. Half of the MACs go by L2 magnitude in one round. Prints a row and appends it to
``benchmarks/results/repair_cost.jsonl``. On a GPU the memory is what is allocated there; on the CPU it is the growth of
the process's resident set, sampled.
"""

from __future__ import annotations

import argparse
import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from repair import Kept
from safetensors.torch import load_file
from torch import Tensor

import singe_plugin
from singe_plugin.loop.pace import Pace
from singe_plugin.method.ridge import Moments

from records import append, environment
from settings import architecture

ROWS = Path(__file__).parent / "results" / "repair_cost.jsonl"


class Memory:
    """The most that is allocated while it is open, above what was there before, in MiB."""

    def __enter__(self) -> Memory:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = self._now()
        self.most, self.open = self.before, True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _now(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return float(fields["VmRSS"].split()[0]) / 2**10

    def _watch(self) -> None:
        while self.open:
            self.most = max(self.most, self._now())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self.open = False
        self.thread.join()
        self.mib = max(self.most, self._now()) - self.before


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, with what it left to the device."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _counted() -> tuple[list[float], list[float]]:
    """From now on: what every layer's moments take in MiB, and the floating-point operations of every batch's."""
    grams: list[float] = []
    flops: list[float] = []
    of, include = Moments.of, Moments.include

    def count(x: Tensor, y: Tensor) -> None:
        flops.append(2.0 * x.shape[0] * x.shape[1] * x.shape[2] * (x.shape[2] + y.shape[2]))

    def made(x: Tensor, y: Tensor) -> Moments:
        count(x, y)
        found = of(x, y)
        grams.append((found.xx.nbytes + found.xy.nbytes) / 2**20)
        return found

    def included(self: Moments, x: Tensor, y: Tensor) -> None:
        count(x, y)
        include(self, x, y)

    Moments.of = staticmethod(made)  # type: ignore[assignment, method-assign]
    Moments.include = included  # type: ignore[method-assign]
    return grams, flops


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = architecture(args.network, args.classes, args.size == 32).eval()
    if args.weights:
        model.load_state_dict(load_file(args.weights))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    original = copy.deepcopy(model)
    shape = (args.batch, 3, args.size, args.size)
    batches = [torch.randn(shape, device=device) for _ in range(args.images // args.batch)]
    kept = Kept()
    targets = [torch.randint(0, args.classes, (args.batch,)) for _ in batches]
    scored = list(zip(batches, targets, strict=True))[:1]
    result = singe_plugin.prune(
        model, scored, target="macs=0.5", scoring="l2", pace=Pace(rounds=1, verify=False), finetune=0, repair=None,
        callbacks=[kept],
    )  # fmt: skip
    grams, flops = _counted()
    count, left = len(batches) * args.batch, kept.left(result)
    with torch.no_grad():
        original(batches[0])
        with Memory() as one:
            original(batches[0])
        passes = [timed(lambda: [original(batch) for batch in batches]) for _ in range(3)]
        with Memory() as all_of_it:
            done: list[Any] = []
            seconds = timed(lambda: done.append(singe_plugin.repair(result.model, original, batches, count, kept=left)))
    return {
        "network": args.network, "size": args.size, "images": count, "batch": args.batch,
        "weights": Path(args.weights).name if args.weights else "random", "removed_macs": result.removed_macs,
        "solved": len(done[0].better), "layers": len(done[0].layers), "repair_seconds": seconds,
        "pass_seconds": median(passes), "passes": seconds / median(passes), "forward_mib": one.mib,
        "largest_gram_mib": max(grams), "repair_mib": all_of_it.mib, "gram_tflop": sum(flops) / 1e12,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="resnet56 or a timm name")
    parser.add_argument("--weights", help="a safetensors file")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    row = measure(args) | environment()
    append(ROWS, row)
    print(row)


if __name__ == "__main__":
    main()
