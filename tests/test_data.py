"""Accuracy: counted as by hand, whatever a model wraps its scores in."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singe_plugin.run.data import evaluate

Pair = namedtuple("Pair", "loss logits")


class ModelOutput(OrderedDict[str, Any]):
    """As Transformers has it: keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(5, 4), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda z: z,
    "half precision": lambda z: z.half(),
    "a mapping": lambda z: {"logits": z},
    "more than that": lambda z: {"loss": z.sum(), "hidden": z, "logits": z},
    "Transformers'": lambda z: ModelOutput(loss=None, logits=z),
    "an object": lambda z: SimpleNamespace(logits=z),
    "a named pair": lambda z: Pair(z.sum(), z),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_accuracy_is_counted_over_batches_of_any_size(wrap: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(WRAPS[wrap])
    batches = [(torch.randn(n, 5), torch.randint(0, 4, (n,))) for n in (1, 7, 3)]
    right = 0
    for inputs, targets in batches:
        for x, y in zip(inputs, targets, strict=True):
            scores = model.fc(x[None])[0].tolist()
            right += scores.index(max(scores)) == int(y)
    assert 0 < right < 11
    assert evaluate(model, batches) == right / 11


@pytest.mark.parametrize(
    "wrap", [lambda z: {"scores": z}, lambda z: (z, z), lambda z: {"logits": z[:, None]}, lambda z: {"logits": None}]
)
def test_what_is_no_class_score_has_no_accuracy(wrap: Callable[[Tensor], Any]) -> None:
    assert evaluate(Wrapped(wrap), [(torch.randn(3, 5), torch.tensor([0, 1, 2]))]) is None
