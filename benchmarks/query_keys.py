"""Whether it pays to repair queries and keys: no layer reads them, so the library's repair leaves what is lost there.

    python benchmarks/query_keys.py run --seeds 0 1 2 --networks FOLDER     # trained networks are kept in the folder
    python benchmarks/query_keys.py table

A small timm ViT is trained on scikit-learn's digits. Head dimensions of queries and keys go (dimension d of both, in
all heads; the least product of norms), or units of all widths, and nothing is trained afterwards. With the survivors S
the logits Q K' of every head are fitted again by a matrix that is folded into the queries, block after block:
M = argmin Σ_images ‖Q_S M K_S' − Q K'‖² + λ ‖M − I‖², with Q_S and K_S as the pruned network has them by then. It is
centred: what is the same for all keys, which the softmax does not see, is left out, and a shift of the queries is
fitted, too. "l" stands for the same without that. Every chain of letters is done from left to right.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from repair import Kept
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
import singe_plugin.loop.repairer as repairs
from singe_plugin.app.datasets import data_config, digits
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.axes.removal import remove_units
from singe_plugin.loop.pace import Pace
from singe_plugin.nested import call_model

from records import append, environment, read

ROWS = Path(__file__).parent / "results" / "query_keys.jsonl"
Pair = tuple[Tensor, Tensor]
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
CHAINS = {
    "": "as pruned", "N": "repaired, as the library stands", "l": "logits, not centred", "L": "logits", "R": "repaired",
    "LR": "logits, then repaired", "LH": "logits, then repaired with q and k held", "RL": "repaired, then logits",
    "RH": "repaired, again with q and k held", "RLH": "repaired, logits, again with q and k held",
}  # fmt: skip
CASES = (
    ("separate", "qk", 0.5), ("separate", "qk", 0.75), ("separate", "params", 0.5), ("separate", "params", 0.8),
    ("packed", "params", 0.5), ("packed", "params", 0.8), ("fused", "params", 0.5), ("fused", "params", 0.8),
)  # fmt: skip


class Separate(nn.Module):
    """timm's attention with a layer each for queries, keys and values, whose widths differ after a removal."""

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self.num_heads, self.scale, self.proj = packed.num_heads, packed.scale, packed.proj
        parts = zip(packed.qkv.weight.chunk(3), packed.qkv.bias.chunk(3), strict=True)
        self.q, self.k, self.v = (nn.Linear(weight.shape[1], weight.shape[0]) for weight, _ in parts)
        for layer, n in ((self.q, 0), (self.k, 1), (self.v, 2)):
            layer.weight.data = packed.qkv.weight.data.chunk(3)[n].clone()
            layer.bias.data = packed.qkv.bias.data.chunk(3)[n].clone()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).reshape(b, n, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


def _lost_any(mine: Tensor, theirs: Tensor, _: int) -> bool:
    """Whether a parameter changed, its outputs included: what depends on lost queries and keys is solved, too."""
    return mine.shape != theirs.shape or not torch.equal(mine, theirs)


class Held(repairs.Repairer):
    """The library's repair, in which some layers keep their weights."""

    held: Collection[str] = ()

    def _stages(self, *players: Any) -> Iterator[Any]:
        for stage in super()._stages(*players):
            for site in stage:
                site.reason = "it is held" if site.name in self.held else site.reason
            yield stage


def trained(seed: int, steps: int, folder: Path) -> tuple[Any, Any]:
    """The network, from the folder if it is there, and the digits."""
    torch.manual_seed(seed)
    model: Any = VisionTransformer(24, 4, in_chans=1, num_classes=10, embed_dim=96, depth=4, num_heads=4)
    splits = digits(data_config(model, 24), seed=seed)
    file = folder / f"digits_vit_{steps}_{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval(), splits
    images, labels = (torch.stack([torch.as_tensor(pair[n]) for pair in splits.train]) for n in (0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval(), splits


def query_and_key(attn: Any) -> tuple[nn.Linear, nn.Linear]:
    return (attn.q, attn.k) if isinstance(attn, Separate) else (attn.qkv, attn.qkv)


def seen(model: Any, batches: list[Tensor], fit: Callable[[int, Tensor, Tensor], None] | None = None) -> list[Pair]:
    """Queries, times the scale of the logits, and keys of every block: ``[images, heads, tokens, width]`` each.

    Args:
        model: a VisionTransformer.
        batches: images.
        fit: is given them block after block, and can change the block before anything behind it is computed.
    """
    inputs: list[Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        model(batch)
    hook.remove()
    found = []
    for number, block in enumerate(model.blocks):
        attn = block.attn
        x = block.norm1(torch.cat(inputs))
        q, k = (attn.q(x), attn.k(x)) if isinstance(attn, Separate) else attn.qkv(x).chunk(3, -1)[:2]
        q, k = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2).double() for t in (q, k))
        found.append((q * scale_of(attn, q.shape[-1]), k))
        if fit is not None:
            fit(number, *found[-1])
        inputs = [block(x) for x in inputs]
    return found


def scale_of(attn: Any, width: int) -> float:
    """timm's fused attention divides by the square root of the width that it finds."""
    return float(width**-0.5 if getattr(attn, "fused_attn", False) else attn.scale)


def sums(q: Tensor, k: Tensor, q0: Tensor, k0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the squared error of one head's logits is made of: vec(M)' A vec(M) - 2 vec(M)' r + c."""
    a = torch.einsum("bpr,bde->pdre", q.mT @ q, k.mT @ k).flatten(2).flatten(0, 1)
    r = ((q.mT @ q0) @ (k0.mT @ k)).sum(0).flatten()
    return a, r, ((q0.mT @ q0) * (k0.mT @ k0)).sum()


def fitted(q: Tensor, k: Tensor, q0: Tensor, k0: Tensor, centred: bool) -> Tensor:
    """M of one head, with a row for the shift; the ridge is the best on the last quarter of the images, M of all."""
    if centred:
        k, k0 = (t - t.mean(1, keepdim=True) for t in (k, k0))
        q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    start = torch.eye(q.shape[-1], k.shape[-1], dtype=q.dtype).flatten()
    cut = len(q) * 3 // 4
    fit, held = (sums(*(t[part] for t in (q, k, q0, k0))) for part in (slice(cut), slice(cut, None)))

    def at(parts: tuple[Tensor, ...], ridge: float) -> Tensor:
        a, r, _ = parts
        weight = ridge * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
        return start + torch.linalg.solve(a + weight, r - a @ start)

    def error(m: Tensor) -> float:
        return float(m @ held[0] @ m - 2 * m @ held[1] + held[2])

    best = min(RIDGES, key=lambda ridge: error(at(fit, ridge)))
    if error(at(fit, best)) >= error(start):
        return start.view(-1, k.shape[-1])
    everything = tuple(one + other for one, other in zip(fit, held, strict=True))
    return at(everything, best).view(-1, k.shape[-1])


def fit_logits(pruned: Any, batches: list[Tensor], wanted: list[Pair], centred: bool) -> None:
    """Fold a matrix per head into the queries, block after block; ``wanted`` is of the unpruned network."""

    def fit(block: int, q: Tensor, k: Tensor) -> None:
        attn = pruned.blocks[block].attn
        layer, width = query_and_key(attn)[0], q.shape[-1]
        for head in range(attn.num_heads):
            m = fitted(*(t[:, head] for t in (q, k, *wanted[block])), centred).to(layer.weight)
            rows = slice(head * width, (head + 1) * width)
            layer.weight.data[rows] = m[:width].mT @ layer.weight[rows]
            layer.bias.data[rows] = m[:width].mT @ layer.bias[rows]
            if centred:
                layer.bias.data[rows] += m[width] / scale_of(attn, width)

    seen(pruned, batches, fit)


def cut(model: Any, kind: str, amount: float, splits: Any, seed: int) -> dict[str, list[int]]:
    """Remove units; those of every group that are left."""
    if kind == "params":
        kept = Kept()
        result = singe_plugin.prune(
            model, splits.train, target=f"params={amount}", scoring="obs", finetune=0, repair=None, seed=seed,
            pace=Pace(verify=False), callbacks=[kept], device="cpu",
        )  # fmt: skip
        return kept.left(result)
    graph = AxisGraph(model, splits.val[0][0][None])
    for number, block in enumerate(model.blocks):
        writers = {f"blocks.{number}.attn.{name}" for name in ("q", "k")}
        (group,) = (g for g in graph.groups.values() if g.in_heads and set(g.writers) == writers)
        heads = [layer.weight.unflatten(0, (block.attn.num_heads, -1)) for layer in query_and_key(block.attn)]
        scores = (heads[0].norm(dim=2) * heads[1].norm(dim=2)).sum(0)
        remove_units(graph, group, scores.argsort()[: round(amount * group.size)].tolist())
    return {name: list(group.left) for name, group in graph.groups.items()}


def measured(model: Any, original: Any, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1, and relative errors: of the outputs, and of the logits as the softmax sees them, per block."""
    errors = []
    for pairs in zip(seen(model, [images]), seen(original, [images]), strict=True):
        one, other = (q @ (k - k.mean(2, keepdim=True)).mT for q, k in pairs)
        errors.append(float((one - other).square().sum() / other.square().sum()))
    out, wanted = model(images), original(images)
    accuracy = float((out.argmax(1) == labels).double().mean())
    return {"top1": accuracy, "outputs": float((out - wanted).square().sum() / wanted.square().sum()), "logits": errors}


@torch.no_grad()
def compute(
    case: tuple[str, str, float], network: Any, splits: Any, seed: int, count: int, chains: list[str]
) -> Iterator[dict[str, Any]]:
    attention, kind, amount = case
    original = copy.deepcopy(network)
    for block in original.blocks:
        block.attn.fused_attn = attention == "fused"
        block.attn = Separate(block.attn) if attention == "separate" else block.attn
    pruned = copy.deepcopy(original)
    with torch.enable_grad():
        kept = cut(pruned, kind, amount, splits, seed)
    chosen = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))[:count]
    batches = list(torch.stack([splits.train[int(i)][0] for i in chosen]).split(64))
    images, labels = (torch.stack([torch.as_tensor(pair[n]) for pair in splits.val]) for n in (0, 1))
    about = {"attention": attention, "kind": kind, "amount": amount, "seed": seed, "images": len(chosen)}
    about["left"] = {name: len(units) for name, units in kept.items()}
    yield about | {"chain": "unpruned", **measured(original, original, images, labels)}
    networks = {"": pruned}
    layers = {id(layer) for block in original.blocks for layer in query_and_key(block.attn)}
    held = {f"{name}.weight" for name, layer in original.named_modules() if id(layer) in layers}
    wanted = seen(original, batches)
    for chain in chains:
        if chain == "N" and kind != "qk":
            continue
        start = time.perf_counter()
        if chain:
            model = networks[chain] = copy.deepcopy(networks[chain[:-1]])
            if chain[-1] in "lL":
                fit_logits(model, batches, wanted, chain[-1] == "L")
            else:
                graph, options = AxisGraph(original, batches[0]), singe_plugin.Repair(count)
                repairer = Held(original, graph, batches, options, seed, call_model)
                repairer.held = held if chain[-1] == "H" else ()
                follows = (
                    nullcontext() if chain == "N" or kind != "qk" else patch.object(repairs, "_differs", _lost_any)
                )
                with follows:
                    about["solved"] = sum(layer.ridge is not None for layer in repairer.repair(model, kept))
        seconds = time.perf_counter() - start
        yield about | {"chain": chain, "seconds": seconds, **measured(networks[chain], original, images, labels)}
        about.pop("solved", None)


def table(rows: list[dict[str, Any]]) -> None:
    """Means and deviations over the seeds."""

    def cell(values: list[float]) -> str:
        return f"{100 * mean(values):5.1f}" + (f" ± {100 * stdev(values):4.1f}" if len(values) > 1 else "")

    for case in CASES:
        attention, kind, amount = case
        print(f"\n| {attention} {kind} -{amount:.0%} | top-1 | outputs | logits of each block | s | seeds |")
        for chain, name in {"unpruned": "unpruned", **CHAINS}.items():
            mine = [r for r in rows if (r["attention"], r["kind"], r["amount"], r["chain"]) == (*case, chain)]
            if mine:
                logits = ", ".join(f"{100 * mean(v):.1f}" for v in zip(*(r["logits"] for r in mine), strict=True))
                numbers = [cell([r[what] for r in mine]) for what in ("top1", "outputs")]
                seconds = mean(r.get("seconds", 0.0) for r in mine)
                print(f"| {name} | {' | '.join(numbers)} | {logits} | {seconds:.1f} | {len(mine)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of the training")
    parser.add_argument("--images", type=int, default=512, help="to repair on")
    usual = list(CHAINS)
    parser.add_argument("--chains", nargs="+", default=usual, help="what is done; each with all that it begins with")
    parser.add_argument("--networks", type=Path, default=Path("networks"), help="a folder for the trained networks")
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.what == "table":
        return table(read(args.rows))
    torch.set_num_threads(1)
    args.chains = sorted({chain[:n] for chain in args.chains for n in range(len(chain) + 1)}, key=usual.index)
    for seed in args.seeds:
        network, splits = trained(seed, args.steps, args.networks)
        about = {"data": splits.name, "steps": args.steps, **environment()}
        stored = {(row["attention"], row["kind"], row["amount"], row["seed"]) for row in read(args.rows)}
        for case in (case for case in CASES if (*case, seed) not in stored):
            for row in compute(case, network, splits, seed, args.images, args.chains):
                append(args.rows, row | about)
                print({k: v for k, v in row.items() if k not in ("images", "left")}, flush=True)
    return None


if __name__ == "__main__":
    main()
