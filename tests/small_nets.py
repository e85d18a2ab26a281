"""Small networks, batches and bitwise comparisons that several test files use."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singe_plugin.loop.events import Callback
from singe_plugin.loop.repairer import Repairer
from singe_plugin.run.result import Metrics, Result

CLASSES = 3


class Chain(nn.Module):
    """conv-bn-relu three times with dropout in front of the head: one layer of 8, 12 and 8 channels each."""

    def __init__(self, dropout: float = 0.0, widths: tuple[int, int, int] = (8, 12, 8)) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1, self.bn1 = nn.Conv2d(2, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.conv2, self.bn2 = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)
        self.conv3, self.bn3 = nn.Conv2d(b, c, 1), nn.BatchNorm2d(c)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(c, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Residual(nn.Module):
    """A stem, two residual blocks of an inner width of their own, and a head."""

    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, width, 1))
            for _ in range(2)
        )
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads the concatenation of all earlier ones, as in DenseNet."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (i + 1)), nn.ReLU(), nn.Conv2d(growth * (i + 1), growth, 3, padding=1)
            )
            for i in range(3)
        )
        self.norm, self.fc = nn.BatchNorm2d(growth * 4), nn.Linear(growth * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution, a depthwise one, and a head behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.dw, self.bn = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 8, 1)
        self.fc = nn.Linear(8 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = torch.relu(self.conv3(torch.relu(self.bn(self.dw(x)))))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Recurrent(nn.Module):
    """A layer in front of a recurrent one, and a head on its last step."""

    def __init__(self, kind: type[nn.RNNBase], width: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.cells = nn.Linear(4, width), kind(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.stem(x))[0][:, -1])


def mlp(width: int = 16) -> nn.Sequential:
    """Two hidden layers: the fastest thing that can be pruned."""
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, CLASSES))


def fail_to_solve(monkeypatch: pytest.MonkeyPatch, parameter: str) -> None:
    """Let a repair raise ``RuntimeError("mine")`` when it comes to a parameter."""
    solved = Repairer._solved

    def fails(self: Repairer, model: nn.Module, site: Any) -> Any:
        if site.name == parameter:
            raise RuntimeError("mine")
        return solved(self, model, site)

    monkeypatch.setattr(Repairer, "_solved", fails)


def seeded(make: Callable[[], nn.Module] = mlp, seed: int = 0) -> nn.Module:
    """A network whose random weights are the same every time."""
    torch.manual_seed(seed)
    return make()


def images(count: int = 2, size: int = 6, examples: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of random two-channel images with labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        x = torch.randn(examples, 2, size, size, generator=generator)
        batches.append((x, (x.mean((1, 2, 3)) * 12).round().long().clamp(-1, 1) + 1))
    return batches


def vectors(count: int = 2, examples: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of random vectors of four numbers."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(examples, 4, generator=generator) for _ in range(count)]
    return [(x, x[:, :CLASSES].argmax(1)) for x in inputs]


def sequences() -> list[tuple[Tensor, Tensor]]:
    """The vectors, each five times in a row."""
    return [(x[:, None].repeat(1, 5, 1), y) for x, y in vectors()]


class Pairs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A map-style dataset of the examples of some batches, with an augmentation drawn from the global generator."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], noise: float = 0.0) -> None:
        self.x, self.y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.x[index]
        return (x + self.noise * torch.randn(x.shape) if self.noise else x), int(self.y[index])


class StopAt(Callback):
    """Raises ``error`` at the ``count``-th event (from 1) of one kind: ``removed``, ``layer_scored``, ..."""

    def __init__(self, event: str, count: int, error: BaseException | None = None) -> None:
        self.left, self.error = count, error or KeyboardInterrupt()
        setattr(self, f"on_{event}", self._count)

    def _count(self, event: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def untimed(result: Result) -> tuple[Metrics, Metrics]:
    """What was measured before and after, but for the latency, which is never twice the same."""
    before, after = (
        replace(m, latency_ms=None, latency_iqr_ms=None, latency_change=None) for m in (result.before, result.after)
    )
    return before, after


def assert_same_values(got: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> None:
    """Every tensor equal, bit for bit."""
    a = values_of(got) if isinstance(got, nn.Module) else got
    b = values_of(expected) if isinstance(expected, nn.Module) else expected
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


class Trace:
    """Everything about a model, an optimizer and the random generators that a failure must leave as it was."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model, self.optimizers = model, optimizers
        self.values, self.rest, self.states = values_of(model), self._rest(), self._states()

    def _rest(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules())
        numpy = np.random.get_state()
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "parameters": {name: id(p) for name, p in self.model.named_parameters()},
            "requires_grad": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "grads": {
                name: None if p.grad is None else p.grad.clone().tolist() for name, p in self.model.named_parameters()
            },
            "modes": {name: module.training for name, module in modules.items()},
            "hooks": {
                name: [len(t) for k, t in sorted(module.__dict__.items()) if k.endswith("_hooks") and t is not None]
                for name, module in modules.items()
            },
            "widths": {
                name: {k: v for k, v in module.__dict__.items() if k[0] != "_" and isinstance(v, (int, float, tuple))}
                for name, module in modules.items()
            },
            "rng": (torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]),
        }

    def _states(self) -> list[Any]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]

    def assert_unchanged(self, ignore: tuple[str, ...] = ()) -> None:
        """Compare with the model as it is now."""
        assert_same_values(self.model, self.values)
        now = self._rest()
        for key, value in self.rest.items():
            assert key in ignore or now[key] == value, key
        for before, after in zip(self.states, self._states(), strict=True):
            assert_same_state(after, before)


def assert_same_state(got: Any, expected: Any) -> None:
    """Nested dictionaries and lists with tensors in them are equal, bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            assert_same_state(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same_state(a, b)
    else:
        assert got == expected


class Branching(nn.Module):
    """What is computed depends on the values: a trace sees one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x) if x.sum() > 0 else self.fc(-x)
        return out
