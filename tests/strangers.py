"""A second generator of networks, from a seed: other building blocks than those of ``networks.py``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import stranger_blocks
import stranger_sequences
from references import Net

CLASSES, SIDE = 3, 6


@dataclass
class Stranger:
    """A network with its inputs: what ``call_model`` takes."""

    model: nn.Module
    inputs: Any
    description: str

    def fresh_inputs(self, seed: int, batch: int) -> Any:
        """Other inputs of the same kind, with another number of examples."""
        generator = torch.Generator().manual_seed(seed)

        def again(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return torch.randint(0, 7, (batch, *x.shape[1:]), generator=generator)
            return torch.randn(batch, *x.shape[1:], generator=generator)

        if isinstance(self.inputs, dict):
            return {name: again(x) for name, x in self.inputs.items()}
        if isinstance(self.inputs, tuple):
            return tuple(again(x) for x in self.inputs)
        return again(self.inputs)


def image_body(r: random.Random, c: int) -> tuple[nn.Module, str]:
    """``c`` channels to three classes, through one to three strange blocks."""
    width = r.choice([5, 6, 8])
    layers: list[nn.Module] = [
        nn.Conv2d(c, width, 3, padding=1),
        r.choice([nn.BatchNorm2d(width), nn.Identity()]),
        nn.ReLU(),
    ]
    names = []
    for _ in range(r.choice([1, 1, 2, 3])):
        block, width, name = r.choice(stranger_blocks.BLOCKS)(r, width)
        layers += [block, r.choice([nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity])()]
        names.append(name)
        if "pixels up" in name or "by hand" in name or "fold" in name or "down" in name or "space to" in name:
            layers.append(nn.AdaptiveAvgPool2d(SIDE))
    heads: list[Callable[[], list[nn.Module]]] = [
        lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)],
        lambda: [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)],
        lambda: [nn.Conv2d(width, CLASSES, 1), Net(lambda m, x: x.mean((2, 3)))],
    ]
    return nn.Sequential(*layers, *r.choice(heads)()), " ".join(names)


def image(r: random.Random) -> Stranger:
    model, names = image_body(r, 3)
    return Stranger(model, torch.randn(4, 3, SIDE, SIDE), f"image {names}")


def token_body(r: random.Random, c: int) -> tuple[nn.Module, str]:
    layers: list[nn.Module] = []
    names = []
    for _ in range(r.choice([1, 1, 2])):
        block, c, name = r.choice(stranger_sequences.BLOCKS)(r, c)
        layers += [block, r.choice([nn.LayerNorm(c), nn.Identity()])]
        names.append(name)
    return nn.Sequential(*layers, Net(lambda m, x: m.head(x.mean(1)), head=nn.Linear(c, CLASSES))), " ".join(names)


def tokens(r: random.Random) -> Stranger:
    words, c = r.random() < 0.4, 8
    stem = nn.Embedding(7, c) if words else nn.Linear(4, c)
    length = stranger_sequences.LENGTH
    x = torch.randint(0, 7, (3, length)) if words else torch.randn(3, length, 4)
    body, names = token_body(r, c)
    return Stranger(nn.Sequential(stem, body), x, f"tokens {names}")


def volume(r: random.Random) -> Stranger:
    g = r.choice([1, 2])
    up = nn.ConvTranspose3d(8, 8, 2, groups=g)
    model = nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), up, nn.GroupNorm(2, 8), nn.Conv3d(8, 6, 1),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    return Stranger(model, torch.randn(2, 2, 4, 4, 4), "volume")


def several(r: random.Random) -> Stranger:
    """Two inputs, by position or by name; one tensor, a tuple or a dict comes out."""
    kind = r.choice(["siamese", "towers", "film", "bilinear", "images"])
    named, output = r.random() < 0.5, r.choice(["tensor", "dict", "tuple"])

    def out(m: Any, x: Tensor) -> Any:
        if output == "dict":
            return {"logits": m.head(x), "features": m.head(x * 2)} if kind == "film" else {"logits": m.head(x)}
        return (m.head(x), m.head2(x)) if output == "tuple" else m.head(x)

    a, b = torch.randn(3, 4), torch.randn(3, 4 if kind == "siamese" else 5)
    h = r.choice([6, 8])
    heads = {"head": nn.Linear(h, CLASSES)}
    if output == "tuple":
        heads["head2"] = nn.Linear(h, 2)
    names = ""
    if kind == "siamese":
        net = Net(
            lambda m, a, b: out(m, (m.f(a) - m.f(b)).abs()),
            f=nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, h)), **heads,
        )  # fmt: skip
    elif kind == "towers":
        net = Net(
            lambda m, a, b: out(m, torch.relu(m.join(torch.cat([m.f(a), m.g(b)], 1)))),
            f=nn.Linear(4, 6), g=nn.Linear(5, 8), join=nn.Linear(14, h), **heads,
        )  # fmt: skip
    elif kind == "film":

        def film(m: Any, a: Tensor, b: Tensor) -> Any:
            gain, shift = m.g(b).chunk(2, 1)
            return out(m, torch.relu(m.f(a) * gain + shift))

        net = Net(film, f=nn.Linear(4, h), g=nn.Linear(5, 2 * h), **heads)
    elif kind == "bilinear":
        net = Net(
            lambda m, a, b: out(m, m.both(m.f(a).relu(), m.g(b))), f=nn.Linear(4, 6), g=nn.Linear(5, 4),
            both=nn.Bilinear(6, 4, h), **heads,
        )  # fmt: skip
    else:
        a, b = torch.randn(3, 3, SIDE, SIDE), torch.randn(3, 5)
        block, width, names = r.choice(stranger_blocks.BLOCKS)(r, 6)
        net = Net(
            lambda m, a, b: out(m, m.block(torch.relu(m.stem(a)) * m.g(b)[:, :, None, None]).mean((2, 3)) @ m.w),
            stem=nn.Conv2d(3, 6, 3, padding=1), block=block, g=nn.Linear(5, 6), w=nn.Parameter(torch.randn(width, h)),
            **heads,
        )  # fmt: skip
    inputs: Any = {"a": a, "b": b} if named else (a, b)
    return Stranger(net, inputs, f"several[{kind}, {output}] {names}".strip())


def video(r: random.Random) -> Stranger:
    """Frames as a batch: two frames of each of some clips."""
    body, names = image_body(r, 3)
    net = Net(lambda m, x: m.body(x.flatten(0, 1)).unflatten(0, (-1, 2)).mean(1), body=body)
    return Stranger(net, torch.randn(2, 2, 3, SIDE, SIDE), f"video {names}")


KINDS = [image] * 11 + [tokens] * 6 + [several] * 3 + [video, volume]


def randomise(model: nn.Module) -> nn.Module:
    """Statistics, biases and affine parameters far from the identity."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("original0", "weight_g")):
                parameter.copy_((torch.rand_like(parameter) + 0.5) * torch.randn_like(parameter).sign())
    return model.eval()


def stranger(seed: int) -> Stranger:
    """The same network for the same seed."""
    r = random.Random(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        made = r.choice(KINDS)(r)
        randomise(made.model)
    return made
