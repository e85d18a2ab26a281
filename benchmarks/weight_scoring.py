"""What scoring every single weight costs, against plain forward-and-backward passes of the same network.

    python benchmarks/weight_scoring.py [--size 64] [--batch 16] [--nodes 5] [--sparsity 0] [--bare]

ResNet-18 (11.2 million weights in 21 layers), each layer scored by Eq. 5 with every weight a unit of its own, through
the masks of ``UnstructuredPruner`` and with batch-norm folded. A plain pass is one forward and one backward through
all parameters of the plain model; a scoring has ``nodes`` of them per layer. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from singe_plugin import Scoring, UnstructuredPruner
from singe_plugin.loop.loop import Host
from singe_plugin.masks import hold_mask
from singe_plugin.method.scoring import score_units


def plain_pass(model: nn.Module, batch: tuple[Tensor, Tensor], repeats: int = 15) -> float:
    """The median time of a forward and a backward pass in eval mode."""
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = time.process_time()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        times.append(time.process_time() - start)
    return statistics.median(times)


def score_of(host: Host, layer: str) -> Tensor:
    """The scores of one layer."""
    return host.score([layer])[layer]


def main() -> None:
    """Print a row per layer and the ratio over all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.0, help="masked at random before")
    parser.add_argument("--bare", action="store_true", help="the engine alone: no masks, nothing folded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    batch = (torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 10)
    once = plain_pass(model, batch)
    print(f"one plain forward and backward: {once:.3f} s")
    pruner = UnstructuredPruner(model, [batch], scoring=Scoring(nodes=options.nodes))
    if options.bare:
        bare = {x.name: replace(x, norm=None).group() for x in pruner.layers}
        score = {n: partial(score_units, model, group, [batch], pruner.scoring) for n, group in bare.items()}
    else:
        host = pruner.host()
        for layer in pruner.layers:
            hold_mask(layer.module, torch.rand(layer.weight.shape) >= options.sparsity)
        score = {x.name: partial(score_of, host, x.name) for x in pruner.layers}
    total = 0.0
    for name, call in score.items():
        start = time.process_time()
        scores = call()
        seconds = time.process_time() - start
        total += seconds
        print(f"{name:24s}{len(scores):10,d} weights {seconds:8.3f} s {seconds / (options.nodes * once):6.2f} a node")
    ratio = total / (len(score) * options.nodes * once)
    print(f"all {len(score)} layers: {total:.2f} s, {ratio:.2f} plain passes per node")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
