"""Small models that keep all kinds of things: what a forward pass computed, counted, appended, wrote in place."""

from __future__ import annotations

import random
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

__all__ = ["NASTY", "FrozenDict", "batches_for"]

Pair = namedtuple("Pair", "first second")


class FrozenDict(OrderedDict):  # type: ignore[type-arg]
    """A dictionary that refuses changes, as the configurations of diffusers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.frozen = True

    def __setitem__(self, key: Any, value: Any) -> None:
        if getattr(self, "frozen", False):
            raise TypeError("frozen")
        super().__setitem__(key, value)

    def clear(self) -> None:
        raise TypeError("frozen")

    def __deepcopy__(self, memo: Any) -> FrozenDict:
        return self  # shared by all copies of a model

    update = pop = popitem = setdefault = clear  # type: ignore[assignment]


class AttributeDict(dict):  # type: ignore[type-arg]
    """A dictionary whose entries are attributes, as Lightning's ``hparams`` are."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


class Base(nn.Module):
    """Two layers that can be pruned, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 1), nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Grid(Base):
    """A grid cached by shape, as in all heads of detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: Any = None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.shape != x.shape:
            height, width = x.shape[2:]
            self.anchors = torch.arange(height * width).view(1, 1, height, width).to(x) / (height * width)
            self.strides = self.anchors.flatten() + 1
            self.shape = x.shape
        return self.head((x + self.anchors).mean((2, 3)))


class Configured(Base):
    """Configurations that are dictionaries of classes of their own, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.config = FrozenDict(width=6, inner=FrozenDict(names=["a", "b"], size=(2, [3])))
        self.hparams = AttributeDict(scale=0.5, more=AttributeDict(width=6))
        self.order = OrderedDict(a=1, b=2)

    def forward(self, x: Tensor) -> Tensor:
        self.hparams.seen = x.shape[2]
        self.hparams.more.width = x.shape[1]
        self.order.move_to_end("a")
        self.config["inner"]["names"].append(x.shape[0])
        return self.head(self.features(x).mean((2, 3)) * self.hparams["scale"])


class Counting(Base):
    """Attributes that a forward sets from shapes; what it appends, and to what."""

    shared: dict[str, Any] = {}  # noqa: RUF012 - the mistake is meant
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.height, self.log, self.recent = 0, [], deque(maxlen=2)
        self.names: set[Any] = set()
        self.pair: Any = Pair([1], {"a": 1})

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        self.batch, self.height, self.width = x.shape[0], x.shape[2], x.shape[1]
        self.log.append(x.shape)
        self.recent.append(self.width)
        self.names.add(self.height)
        self.pair.first.append(self.width)
        self.pair = Pair(self.pair.first, {"a": self.width})
        Counting.shared[x.shape[3]] = x.detach()
        Counting.calls += 1
        return self.head(x.mean((2, 3)))


@dataclass
class Inner:
    width: int = 6
    sizes: list[Any] = field(default_factory=list)


@dataclass
class Settings:
    inner: Inner = field(default_factory=Inner)
    scale: float = 0.5


class Slotted:
    __slots__ = ("last", "unset")

    def __init__(self) -> None:
        self.last: Any = None


class State:
    """What generating models keep."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.length = 0


class Nested(Base):
    """Objects in attributes: nested dataclasses, slots, namespaces, a state of its own, arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.slotted, self.state = Settings(), Slotted(), State()
        self.space = SimpleNamespace(shape=None, inner=SimpleNamespace(n=0))
        self.array, self.hidden = np.zeros(3), [nn.Linear(2, 2)]
        self.me = [self]

    def forward(self, x: Tensor) -> Tensor:
        self.settings.inner.width = x.shape[2]
        self.settings.inner.sizes.append(x.shape[3])
        self.slotted.last, self.slotted.unset = x.shape, 1
        self.state.keys.append(x.detach())
        self.state.length += x.shape[2]
        self.space.shape, self.space.inner.n = x.shape, self.space.inner.n + 1
        self.array += 1
        self.hidden.append(self.hidden[0])
        return self.head(self.features(x).mean((2, 3)) * self.settings.scale)


class InPlace(Base):
    """Tensors in plain attributes and buffers, persistent or not, written in place and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.held = torch.zeros(3), {"a": [torch.zeros(2)]}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.tensor([float("nan"), 1.0]), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.plain += 1
        self.held["a"][0].add_(2)
        self.count += 1
        self.scratch[1] = x.shape[0]
        self.replaced = self.replaced + 1
        x = self.head(self.features(x).mean((2, 3)))
        self.last = x.detach()
        return x


class Drawing(Base):
    """Random generators of its own, and noise in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy = np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        self.python.random(), self.numpy.random()
        x = functional.dropout(x, 0.3, training=True) + 0.1 * torch.randn_like(x)
        x = self.head(x.mean((2, 3)))
        return x + 0.1 * torch.rand(x.shape, generator=self.generator) + random.random() + float(np.random.rand())


class Lived(Base):
    """Hooks, frozen and shared parts, parametrizations, gradients, modes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.second = parametrizations.weight_norm(self.second)
        self.norm = nn.BatchNorm2d(5)
        self.again = self.norm
        self.seen: list[Any] = []
        self.first.register_forward_hook(self.note)
        self.head.register_forward_pre_hook(lambda module, args: None)
        self.first.weight.marked = ["by the user"]  # type: ignore[attr-defined]
        self.norm.eval().requires_grad_(False)
        self.first.weight.grad = torch.randn_like(self.first.weight)
        self.head.bias.requires_grad_(False)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.norm(self.features(x))).mean((2, 3)))


NASTY: dict[str, type[Base]] = {
    kind.__name__: kind for kind in (Grid, Configured, Counting, Nested, InPlace, Drawing, Lived)
}


def batches_for(count: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Always the same batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 2, size, size, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]
