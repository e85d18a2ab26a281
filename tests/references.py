"""Slow, literal references: small nets, batch-norm folded by hand, and Eq. 5 as a triple loop.

Nothing here uses the package's folding, row layouts, norms or quadrature: rows are named by plain indices, norms are
sums over Python floats. Everything is float64, so that a wrong formula cannot hide behind rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Slice = tuple[str, tuple[Any, ...]]
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A module made of a function and the layers or parameters that it uses."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class ScaleShift(nn.Module):
    """What a batch-norm is in eval mode, computed by hand."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        scale = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach().clone()
        scale = scale / (norm.running_var + norm.eps).sqrt()
        shift = -norm.running_mean * scale
        self.weight = nn.Parameter(scale)
        self.bias = nn.Parameter(shift if norm.bias is None else shift + norm.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.ndim - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


@dataclass
class Spec:
    """One producer in words: a layer or raw parameter, the rows in the group and their units."""

    name: str
    rows: Sequence[int]
    units: Sequence[int]
    norm: str = ""
    is_norm: bool = False
    dim: int = 0
    blocks: int = 1


@dataclass
class Case:
    """A net, its group, the same net folded by hand, and which slices of that belong to [producer][unit]."""

    model: nn.Module
    group: UnitGroup
    folded: nn.Module
    slices: list[list[list[Slice]]]
    batches: list[Batch] = field(default_factory=list)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every batch- and layer-norm statistics and affine parameters that are far from the identity."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if (getattr(module, "running_mean", None) is not None or isinstance(module, nn.LayerNorm)) and (
            module.weight is not None
        ):
            with torch.no_grad():
                module.weight.copy_(torch.empty_like(module.weight).uniform_(0.5, 1.5))
                module.weight[::2].neg_()
                module.bias.copy_(torch.randn_like(module.bias) * 0.5)
    return model


def row_index(layer: nn.Module, channel: int, dim: int = 0) -> tuple[Any, ...]:
    """The index of the weights that produce one output channel of a layer."""
    if isinstance(layer, TRANSPOSED):
        per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        block, column = divmod(channel, per_group)
        return (slice(block * inputs, (block + 1) * inputs), column)
    return (slice(None),) * dim + (channel,)


def fold_by_hand(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """Multiply each row of a layer by gamma / sigma, shift its bias, and drop the batch-norm."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    affine = ScaleShift(norm)
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(affine.bias))
    with torch.no_grad():
        for channel in range(len(affine.weight)):
            layer.weight[row_index(layer, channel)] *= affine.weight[channel]
            layer.bias[channel] = layer.bias[channel] * affine.weight[channel] + affine.bias[channel]
    setattr(model, norm_name, nn.Identity())


def build_case(model: nn.Module, specs: Sequence[Spec], batches: list[Batch]) -> Case:
    """Describe the same group twice: to the package, and as literal slices of a hand-folded copy."""
    randomise_norms(model.double())
    folded = copy.deepcopy(model).eval()
    producers, slices = [], []
    size = 1 + max(unit for spec in specs for unit in spec.units)
    for spec in specs:
        if spec.norm:
            fold_by_hand(folded, spec.name, spec.norm)
        if spec.is_norm:
            setattr(folded, spec.name, ScaleShift(folded.get_submodule(spec.name)))
        raw = isinstance(getattr(model, spec.name), nn.Parameter)
        layer = model if raw else model.get_submodule(spec.name)
        plain = RowLayout(dim=spec.dim, blocks=spec.blocks)
        layout = RowLayout(dim=1, groups=layer.groups) if isinstance(layer, TRANSPOSED) else plain
        slots = [Slot(layer, spec.name if raw else "weight", layout)]
        if "bias" in layer._parameters and not raw:
            slots.append(Slot(layer, "bias", RowLayout(blocks=spec.blocks)))
        norm = model.get_submodule(spec.norm) if spec.norm else None
        rows, units = torch.tensor(spec.rows), torch.tensor(spec.units)
        producers.append(Producer(spec.name, tuple(slots), rows, units, norm, spec.is_norm))

        owned: list[list[Slice]] = [[] for _ in range(size)]
        names = dict(folded.named_parameters())
        for row, unit in zip(spec.rows, spec.units, strict=True):
            if raw:
                owned[unit].append((spec.name, row_index(layer, row, spec.dim)))
                continue
            width = names[f"{spec.name}.weight"].shape[spec.dim]
            for channel in range(row, width if spec.blocks > 1 else row + 1, width // spec.blocks):
                owned[unit].append((f"{spec.name}.weight", row_index(layer, channel, spec.dim)))
                if f"{spec.name}.bias" in names:
                    owned[unit].append((f"{spec.name}.bias", (channel,)))
        slices.append(owned)
    return Case(model, UnitGroup(specs[0].name, size, tuple(producers)), folded, slices, batches)


def _images(channels: int = 2, size: int = 4) -> list[Batch]:
    return [(torch.randn(n, channels, size, size).double(), torch.randint(0, 3, (n,))) for n in (3, 2)]


def _vectors(width: int = 3) -> list[Batch]:
    return [(torch.randn(n, width).double(), torch.randint(0, 3, (n,))) for n in (4, 2)]


def _pooled(m: Any, x: Tensor) -> Tensor:
    return m.head(x.flatten(2).mean(2))


def chain() -> Case:
    net = Net(
        lambda m, x: m.head(torch.relu(m.bn(m.conv(x))).flatten(1)),
        conv=nn.Conv2d(2, 4, 3, bias=False), bn=nn.BatchNorm2d(4), head=nn.Linear(16, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4), "bn")], _images())


def residual() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.bn1(m.stem(x)))
        return _pooled(m, torch.relu(x + m.bn2(m.conv(x))))

    net = Net(
        forward, stem=nn.Conv2d(2, 4, 3), bn1=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(4), head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(
        net, [Spec("stem", range(4), range(4), "bn1"), Spec("conv", range(4), range(4), "bn2")], _images()
    )


def depthwise() -> Case:
    net = Net(
        lambda m, x: m.last(torch.relu(m.bn2(m.dw(torch.relu(m.bn1(m.conv(x))))))).flatten(2).mean(2),
        conv=nn.Conv2d(2, 4, 1, bias=False), bn1=nn.BatchNorm2d(4), dw=nn.Conv2d(4, 4, 3, groups=4),
        bn2=nn.BatchNorm2d(4, affine=False), last=nn.Conv2d(4, 3, 1),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4), "bn1"), Spec("dw", range(4), range(4), "bn2")], _images())


def grouped() -> Case:
    net = Net(
        lambda m, x: _pooled(m, m.last(torch.relu(m.bn(m.conv(x))))),
        conv=nn.Conv2d(4, 8, 3, groups=2), bn=nn.BatchNorm2d(8), last=nn.Conv2d(8, 4, 1, groups=2),
        head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", [0, 4, 1, 5, 2, 6, 3, 7], [0, 0, 1, 1, 2, 2, 3, 3], "bn")], _images(4))


def transposed() -> Case:
    net = Net(
        lambda m, x: _pooled(m, torch.relu(m.bn(m.conv(x)))),
        conv=nn.ConvTranspose2d(2, 4, 2), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4), "bn")], _images())


def grouped_transposed() -> Case:
    net = Net(
        lambda m, x: _pooled(m, torch.relu(m.bn(m.conv(x)))),
        conv=nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), bn=nn.BatchNorm2d(6), head=nn.Linear(6, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(6), [0, 1, 2, 0, 1, 2], "bn")], _images(4))


def layernorm() -> Case:
    net = Net(
        lambda m, x: m.head(functional.gelu(m.ln(m.fc(x)))),
        fc=nn.Linear(3, 5), ln=nn.LayerNorm(5), head=nn.Linear(5, 3),
    )  # fmt: skip
    return build_case(net, [Spec("fc", range(5), range(5)), Spec("ln", range(5), range(5))], _vectors())


def preactivation(affine: bool = True) -> Case:
    net = Net(
        lambda m, x: _pooled(m, torch.relu(m.bn(functional.avg_pool2d(m.conv(x), 2)))),
        conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4, affine=affine), head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4)), Spec("bn", range(4), range(4), is_norm=True)], _images())


def layer_scale() -> Case:
    net = Net(
        lambda m, x: m.head(torch.tanh(m.stem(x) + m.gamma * m.fc(torch.relu(m.stem(x))))),
        stem=nn.Linear(3, 4), fc=nn.Linear(4, 4), gamma=nn.Parameter(torch.rand(4)), head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(net, [Spec(name, range(4), range(4)) for name in ("stem", "fc", "gamma")], _vectors())


def embedding() -> Case:
    net = Net(
        lambda m, x: m.head(torch.tanh(m.emb(x) + m.pos).mean(1)),
        emb=nn.Embedding(7, 4), pos=nn.Parameter(torch.randn(1, 5, 4)), head=nn.Linear(4, 3),
    )  # fmt: skip
    specs = [Spec("emb", range(4), range(4), dim=1), Spec("pos", range(4), range(4), dim=2)]
    return build_case(net, specs, [(torch.randint(0, 7, (n, 5)), torch.randint(0, 3, (n,))) for n in (3, 2)])


def concat() -> Case:
    net = Net(
        lambda m, x: _pooled(m, torch.relu(torch.cat([m.bn(m.a(x)), m.b(x)], 1) + m.c(x))),
        c=nn.Conv2d(2, 6, 1), a=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4), b=nn.Conv2d(2, 2, 1, bias=False),
        head=nn.Linear(6, 3),
    )  # fmt: skip
    specs = [Spec("c", range(6), range(6)), Spec("a", range(4), range(4), "bn"), Spec("b", range(2), [4, 5])]
    return build_case(net, specs, _images())


def subset() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.bn(m.conv(x)).split([2, 3], 1)
        return _pooled(m, torch.relu(m.mix(first) + second))

    net = Net(
        forward, conv=nn.Conv2d(2, 5, 1), bn=nn.BatchNorm2d(5), mix=nn.Conv2d(2, 3, 1), head=nn.Linear(3, 3)
    )  # fmt: skip
    return build_case(net, [Spec("mix", range(3), range(3)), Spec("conv", [2, 3, 4], range(3), "bn")], _images())


def packed() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.bn(m.qkv(x)).chunk(3, 1)
        return m.head(torch.tanh(q * k) + v)

    net = Net(forward, qkv=nn.Linear(3, 9, bias=False), bn=nn.BatchNorm1d(9), head=nn.Linear(3, 3))
    return build_case(net, [Spec("qkv", range(3), range(3), "bn", blocks=3)], _vectors())


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        chain, residual, depthwise, grouped, transposed, grouped_transposed, layernorm, preactivation, layer_scale,
        embedding, concat, subset, packed,
    )
} | {"preactivation_without_affine": lambda: preactivation(affine=False)}  # fmt: skip


@cache
def get_case(name: str) -> Case:
    """A case by name, the same one at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CASES[name]()


def scale_slices(model: nn.Module, slices: Sequence[Slice], factor: float) -> None:
    """Multiply slices of the parameters in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, index in slices:
            parameters[name][index] *= factor


# [batch][step][producer][unit] -> (decayed weights, gradients), as lists of floats
Walk = list[list[list[list[tuple[list[float], list[float]]]]]]


def literal_walk(case: Case, mu: float, steps: int, path: str, objective: Any = functional.cross_entropy) -> Walk:
    """Eq. 4 and 5 to the letter: for each batch, step and unit, set the weights to mu^s W and call backward."""
    original = copy.deepcopy(case.folded.state_dict())
    parameters = dict(case.folded.named_parameters())
    producers, units = range(len(case.slices)), range(case.group.size)
    result: Walk = []
    for inputs, targets in case.batches:
        result.append([])
        for s in range(steps + 1):
            found: list[list[Any]] = [[None for _ in units] for _ in producers]
            for unit in units:
                case.folded.load_state_dict(original)
                for decayed in [unit] if path == "neuron" else units:
                    for owned in case.slices:
                        scale_slices(case.folded, owned[decayed], mu**s)
                case.folded.zero_grad()
                objective(case.folded(inputs), targets).backward()
                for i in producers:
                    weights = [parameters[name].detach()[index] for name, index in case.slices[i][unit]]
                    grads = [parameters[name].grad[index] for name, index in case.slices[i][unit]]
                    found[i][unit] = (_floats(weights), _floats(grads))
            result[-1].append(found)
    case.folded.load_state_dict(original)
    return result


def _floats(tensors: Sequence[Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def literal_norm(values: Sequence[float], p: float) -> float:
    """The p-norm of a list of floats."""
    if not values:
        return 0.0
    return max(abs(v) for v in values) if math.isinf(p) else sum(abs(v) ** p for v in values) ** (1 / p)


def literal_scores(walk: Walk, criterion: str, p: float) -> list[list[float]]:
    """The scores [producer][unit] of a criterion, averaged over the batches."""
    p = {"l1": 1.0, "l2": 2.0}.get(criterion, p)
    scores = [[0.0 for _ in layer] for layer in walk[0][0]]
    for batch in walk:
        for s, found in enumerate(batch):
            for i, layer in enumerate(found):
                for n, (weights, grads) in enumerate(layer):
                    norm, slope = literal_norm(weights, p), literal_norm(grads, p)
                    at_start = {"l1": norm, "l2": norm, "lp": norm, "grad": slope, "norm_grad": norm * slope}
                    inner = abs(sum(w * g for w, g in zip(weights, grads, strict=True)))
                    summed = {"sg": slope, "ig": norm * slope, "ig_abs": inner}
                    term = summed[criterion] if criterion in summed else at_start[criterion] * (s == 0)
                    scores[i][n] += term / len(walk)
    return scores


def literal_reduction(case: Case, scores: list[list[float]], reduction: str) -> list[float]:
    """One score per unit, over the producers that have it."""
    result = []
    for n in range(case.group.size):
        having = [scores[i][n] for i in range(len(scores)) if case.slices[i][n]]
        choices = {"sum": sum(having), "mean": sum(having) / len(having), "max": max(having)}
        choices |= {"prod": math.prod(having), "first": scores[0][n], "gate": scores[-1][n]}
        result.append(choices[reduction])
    return result
