"""A device whose times are written down, so that what a latency target reaches can be worked out."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
from torch import Tensor, nn

from singe_plugin.run import backends, latency
from singe_plugin.run.backends import Runner

TICK = 2.0**-30  # seconds; so that differences of times are exact

__all__ = ["Device", "install", "layer_ms", "whole_ms"]


def layer_ms(module: nn.Module, step: int) -> float:
    """What a layer takes on the device: something to start, and the rest by widths in whole steps."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    out, read = (step * math.ceil(size / step) for size in weight.shape[:2])
    return 0.02 + 1e-5 * out * read * weight[0, 0].numel() + 1e-3 * out


def whole_ms(model: nn.Module, step: int = 8) -> float:
    return sum(layer_ms(m, step) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


class Device:
    """A backend on which time passes as :func:`layer_ms` says."""

    def __init__(self, step: int) -> None:
        self.step, self.seconds, self.spreads = step, 0.0, 0

    def runner(self, model: nn.Module, inputs: Any, threads: int) -> Runner:
        def run() -> None:
            self.seconds += round(whole_ms(model, self.step) / 1000 / TICK) * TICK

        return run

    def spread(self, model: nn.Module, inputs: Any, layers: Collection[str], threads: int) -> dict[str, float]:
        self.spreads += 1
        return {name: layer_ms(model.get_submodule(name), self.step) for name in layers}

    def version(self) -> str:
        return "written down"


def install(monkeypatch: pytest.MonkeyPatch, step: int, backend: str = "torch") -> Device:
    """Put a device in the place of a backend."""
    made = Device(step)
    monkeypatch.setitem(backends.BACKENDS, backend, made)
    monkeypatch.setattr(latency, "now", lambda _: made.seconds)
    return made
