"""How many quadrature nodes does the path need? Evidence for the default, on a trained ResNet-56.

For every inner layer (the first convolution of each block) and several random batches, the ranking of a rule with
few nodes is compared with the paper's sum (mu = 0.95, S = 90, 91 passes). Prints a markdown table and writes it.

    python benchmarks/quadrature.py --weights resnet56.safetensors --data cifar10.npz
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch
import torch_pruning as tp
from scipy.stats import spearmanr

from singe_plugin.integrations.torch_pruning.groups import unit_group
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import path_gradient_norms

from cifar_resnet import decode, resnet56
from records import commit

RULES = [("gauss", 2), ("gauss", 3), ("gauss", 4), ("gauss", 5), ("gauss", 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--criteria", nargs="+", default=["ig", "sg"], choices=["ig", "sg"])
    parser.add_argument("--every", type=int, default=4, help="score every n-th inner layer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mu", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="benchmarks/results/quadrature.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = resnet56(args.weights)
    images, labels = decode(args.data, "train", 20000)
    graph = tp.DependencyGraph().build_dependency(model, images[:2])
    layers = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(9)][:: args.every]
    found: dict[tuple[str, str], list[float]] = {}
    bottom: dict[tuple[str, str], list[float]] = {}
    started = time.time()
    for seed in range(args.seeds):
        draw = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: args.batch_size]
        batch = (images[draw], labels[draw])
        for name in layers:
            conv = model.get_submodule(name)
            group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels)))
            units = unit_group(group)
            walks = {}  # the paper's path serves both criteria; gauss has its own nodes for each
            for criterion in args.criteria:
                scores = {}
                for rule, nodes in [("geometric", 1), *RULES]:
                    options = Scoring(criterion, mu=args.mu, quadrature=rule, nodes=nodes)
                    key = (rule, nodes, None if rule == "geometric" else criterion)
                    if key not in walks:
                        walks[key] = path_gradient_norms(model, units, [batch], options)
                    norms, grads = walks[key]
                    scores[f"{rule}-{nodes}"] = options.rule.combine(norms, grads, grads, options.decay_path.weights)
                paper = scores.pop("geometric-1")
                half = len(paper) // 2
                for key, value in scores.items():
                    found.setdefault((criterion, key), []).append(float(spearmanr(paper, value).statistic))
                    same = set(paper.argsort()[:half].tolist()) & set(value.argsort()[:half].tolist())
                    bottom.setdefault((criterion, key), []).append(len(same) / half)
            print(f"seed {seed} {name} {time.time() - started:.0f}s", file=sys.stderr, flush=True)
    lines = [
        "| criterion | rule | passes | Spearman mean | Spearman worst | same half removed, mean |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (criterion, key), values in found.items():
        share = bottom[criterion, key]
        lines.append(
            f"| {criterion} | {key} | {key.split('-')[1]} | {sum(values) / len(values):.4f} | {min(values):.4f} | "
            f"{sum(share) / len(share):.3f} |"
        )
    head = {
        "command": "python benchmarks/quadrature.py " + " ".join("PATH" if "/" in a else a for a in sys.argv[1:]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "seeds": args.seeds,
        "data": "JPEG CIFAR-10 (train), ResNet-56 adapted to it, 90.0 % top-1",
        "reference": f"geometric sum, mu={args.mu}, 91 passes for mu=0.95",
        "layers": layers,
        "batch": args.batch_size,
    }
    text = "# Quadrature nodes\n\n```json\n" + json.dumps(head, indent=1) + "\n```\n\n" + "\n".join(lines) + "\n"
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
