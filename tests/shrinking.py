"""Masked models, references for shrinking them that know nothing of the package, and networks to shrink."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.densenet import DenseNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from singe_plugin.shrink import shrink

from masking import Masked
from references import Net

Masks = dict[str, dict[str, Tensor]]
SHRINK = sys.modules[shrink.__module__]  # the package's attribute of that name is the function


# --- references that know nothing of the package ------------------------------------------------------------------


def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    """The masked model: every parameter times its mask."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(name), target).mul_(mask)
    return model.double().eval()


def difference(masked: nn.Module, pruned: nn.Module, *shapes: tuple[int, ...]) -> float:
    """The largest relative change over inputs of several sizes, scales and offsets, in double precision."""
    pruned, worst = copy.deepcopy(pruned).double().eval(), 0.0
    generator = torch.Generator().manual_seed(99)
    for shape in shapes:
        for scale, offset in ((1.0, 0.0), (10.0, 3.0), (0.1, -2.0), (50.0, 0.0)):
            x = scale * torch.randn(shape, generator=generator, dtype=torch.float64) + offset
            with torch.no_grad():
                a, b = masked(x), pruned(x)
            assert a.shape == b.shape
            assert bool(torch.isfinite(b).all())
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)))
    return worst


def mask_of(parameter: Tensor, keep: Tensor, dim: int = 0) -> Tensor:
    shape = [1] * parameter.ndim
    shape[dim] = -1
    return keep.float().view(shape).expand_as(parameter).clone()


def rows(model: nn.Module, name: str, *gone: int, targets: tuple[str, ...] = ("weight", "bias")) -> dict[str, Tensor]:
    found = {}
    for target in targets:
        parameter = model.get_submodule(name)._parameters.get(target)
        if parameter is not None:
            found[target] = mask_of(parameter, ~torch.isin(torch.arange(len(parameter)), torch.tensor(gone)))
    return found


def filled(tensor: Tensor | None, value: float) -> None:
    assert tensor is not None
    tensor.data.fill_(value)


def one_in_four(model: nn.Module, *left: str, only: tuple[type[nn.Module], ...] = (nn.Module,)) -> Masks:
    """Channels 1, 5, 9, ... of every layer and norm, which fits streams, heads, groups and concatenations alike."""
    masks: Masks = {}
    for name, module in model.named_modules():
        if name in left or not isinstance(module, only):
            continue
        for target, parameter in module._parameters.items():
            dim = int(bool(getattr(module, "transposed", False)) and target == "weight")
            if parameter is not None and ("weight" in target or "bias" in target) and parameter.shape[dim] % 4 == 0:
                keep = torch.arange(parameter.shape[dim]) % 4 != 1
                masks.setdefault(name, {})[target] = mask_of(parameter, keep, dim)
    return masks


def random_masks(model: nn.Module, rng: random.Random) -> Masks:
    """Masks of every kind on some layers: rows, columns, single weights, everything, with or without the biases."""
    masks: Masks = {}
    alike: dict[int, Tensor] = {}
    consistent = rng.random() < 0.4
    for name, module in model.named_modules():
        own = {k: p for k, p in module._parameters.items() if p is not None}
        weight = own.get("weight")
        if weight is None or rng.random() < 0.3 or not weight.ndim:
            continue
        share, kind = rng.choice([0.0, 0.3, 0.6, 0.9]), rng.choice(["rows"] * 4 + ["columns", "both", "single", "all"])
        rows = torch.rand(len(weight)) >= share
        if consistent:
            rows = alike.setdefault(len(weight), rows)
        found = {"weight": torch.ones_like(weight)}
        if kind in ("rows", "both") or weight.ndim == 1:
            found["weight"] *= mask_of(weight, rows)
            if "bias" in own and len(own["bias"]) == len(rows) and rng.random() < 0.8:
                found["bias"] = mask_of(own["bias"], rows)
        if kind in ("columns", "both") and weight.ndim > 1:
            found["weight"] *= mask_of(weight, torch.rand(weight.shape[1]) >= share, 1)
        if kind == "single":
            found["weight"] *= (torch.rand(weight.shape) >= share).float()
        if kind == "all":
            found = {k: torch.zeros_like(p) for k, p in own.items()}
        masks[name] = found
    return masks


def with_tags(model: nn.Module, masks: Masks, monkeypatch: pytest.MonkeyPatch) -> Masked:
    """The masked model, and tags that are cut along with the next shrink, to see what was removed."""
    tags, trackers = Masked(masked_copy(model, masks).float()), SHRINK.Trackers
    monkeypatch.setattr(SHRINK, "Trackers", lambda emas: trackers(emas=[*emas, tags.tags]))
    return tags


def positions(tags: Masked, name: str, target: str) -> Tensor:
    """Where the elements of a parameter that is left were in the original."""
    tensor = getattr(tags.tags.get_submodule(name), target).detach()
    return (tensor.real / tensor.imag).round().long()


# --- networks -----------------------------------------------------------------------------------------------------


def two_branches() -> nn.Module:
    """A concatenation, a residual stream, a grouped convolution, a gate (f(0) is not 0), PReLU."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.act(m.bn(m.stem(x)))
        x = torch.cat([m.left(x), m.grouped(m.right(x))], 1)
        x = x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3))))))[:, :, None, None]
        x = torch.relu(x + m.body(x))
        return m.fc(m.back(m.out(x)).mean((2, 3)))

    return Net(
        forward, stem=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), act=nn.PReLU(8), left=nn.Conv2d(8, 8, 1),
        right=nn.Conv2d(8, 16, 1), grouped=nn.Conv2d(16, 8, 3, padding=1, groups=2), down=nn.Linear(16, 4),
        up=nn.Linear(4, 16), body=nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)),
        out=nn.Sequential(nn.Conv2d(16, 12, 3), nn.BatchNorm2d(12), nn.GELU()),
        back=nn.ConvTranspose2d(12, 8, 2, stride=2), fc=nn.Linear(8, 5),
    )  # fmt: skip


def attending() -> nn.Module:
    """nn.MultiheadAttention in a stream without norms."""
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(
        lambda m, x: m.fc((lambda y: y + m.mha(y, y, y, need_weights=False)[0])(m.stem(x)).mean(1)),
        stem=nn.Linear(6, 8), mha=mha, fc=nn.Linear(8, 5),
    )  # fmt: skip


def recurrent() -> nn.Module:
    return Net(
        lambda m, x: m.fc(m.lstm(m.stem(x))[0].mean(1)),
        stem=nn.Linear(6, 8), lstm=nn.LSTM(8, 12, batch_first=True), fc=nn.Linear(12, 5),
    )  # fmt: skip


def latent() -> nn.Module:
    """A parameter that is expanded to the batch: PyTorch's counter of MACs trips over it."""
    return Net(
        lambda m, x: m.fc(torch.relu(m.a(x) + m.q(m.latent.expand(len(x), -1)))),
        a=nn.Linear(6, 8), q=nn.Linear(4, 8), latent=nn.Parameter(torch.randn(1, 4)), fc=nn.Linear(8, 5),
    )  # fmt: skip


def group_normed(groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(groups, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4),
}  # fmt: skip
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "two branches": (two_branches, ((2, 3, 8, 8), (1, 3, 11, 9))),
    "lstm": (recurrent, ((2, 5, 6), (1, 9, 6))),
    "latent": (latent, ((3, 6), (1, 6))),
    "attention": (attending, ((2, 5, 6), (3, 4, 6))),
    "resnet18": (
        lambda: timm.create_model("resnet18", channels=[8, 16, 24, 32], num_classes=5), ((2, 3, 32, 32), (1, 3, 48, 40))
    ),
    "mobilenetv2": (lambda: timm.create_model("mobilenetv2_035", num_classes=5), ((2, 3, 32, 32), (1, 3, 64, 64))),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=5), ((2, 3, 32, 32), (1, 3, 40, 64))),
    "densenet": (
        lambda: DenseNet(growth_rate=8, block_config=(2, 2), num_classes=5), ((2, 3, 32, 32), (1, 3, 64, 32))
    ),
    "regnet": (lambda: timm.create_model("regnetx_002", num_classes=5), ((2, 3, 32, 32), (1, 3, 48, 48))),
}  # fmt: skip
MIXED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group norm": (group_normed, (2, 3, 8, 8)),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=5), (2, 3, 32, 32)),
    "vit": (lambda: timm.create_model("test_vit", num_classes=5, img_size=32), (2, 3, 32, 32)),
    "swin": (lambda: SwinTransformer(num_classes=5, **SWIN), (2, 3, 32, 32)),
}


def head_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "out_features", 0) == 5]
