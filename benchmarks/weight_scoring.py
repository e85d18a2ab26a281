"""What scoring every single weight costs, against plain forward-and-backward passes of the same network.

    python benchmarks/weight_scoring.py [--size 64] [--batch 16] [--nodes 5] [--layers 0]

ResNet-18 (11.2 million weights in 21 layers), each layer scored by Eq. 5 with every weight a unit of its own. A plain
pass is one forward and one backward through all parameters; a scoring has ``nodes`` of them. One thread.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from singe_plugin.scoring import ScoringOptions, score_units
from singe_plugin.units import BlockLayout, Producer, Slot, UnitGroup


def weights_of(layer: nn.Module, name: str) -> UnitGroup:
    """Every weight of a layer as a unit."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    units = torch.arange(weight.numel())
    slot = Slot(layer, "weight", BlockLayout(kernel=(1,) * weight.ndim))
    return UnitGroup(name, weight.numel(), (Producer(name, (slot,), units, units),))


def plain_pass(model: nn.Module, batch: tuple[Tensor, Tensor], repeats: int = 5) -> float:
    """The median time of a forward and a backward pass in eval mode."""
    times = []
    for _ in range(repeats):
        model.zero_grad()
        start = time.perf_counter()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a row per layer and the ratio over all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--layers", type=int, default=0, help="only the last so many layers; 0 is all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    batch = (torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 10)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-options.layers :]
    scoring = ScoringOptions(criterion="ig", nodes=options.nodes)
    once = plain_pass(model, batch)
    print(f"one plain forward and backward: {once:.3f} s")
    total = 0.0
    for name, layer in layers:
        group = weights_of(layer, name)
        start = time.perf_counter()
        score_units(model, group, [batch], scoring)
        seconds = time.perf_counter() - start
        total += seconds
        print(f"{name:24s}{group.size:10,d} weights {seconds:8.3f} s {seconds / (options.nodes * once):6.2f} a pass")
    ratio = total / (len(layers) * options.nodes * once)
    print(f"all {len(layers)} layers: {total:.2f} s, {ratio:.2f} plain passes per node")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
