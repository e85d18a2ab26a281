"""The objective F by hand arithmetic, and the forms of batches that are understood."""

from __future__ import annotations

import math
from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.method.batches import materialise, split_batch
from singe_plugin.method.objective import cross_entropy, get_objective, true_class_logit
from singe_plugin.nested import call_model, to_device


def test_cross_entropy_is_the_mean_negative_log_probability() -> None:
    logits, targets = torch.randn(5, 3), torch.randint(0, 3, (5,))
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist()):
        expected -= math.log(math.exp(row[target]) / sum(math.exp(v) for v in row)) / 5
    assert cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    soft = nn.functional.one_hot(targets, 3).double()
    assert cross_entropy(logits, soft).item() == pytest.approx(expected, rel=1e-5)


def test_the_logit_of_the_true_class() -> None:
    logits, targets = torch.randn(5, 3), torch.randint(0, 3, (5,))
    expected = sum(row[target] for row, target in zip(logits.tolist(), targets.tolist())) / 5
    assert true_class_logit(logits, targets).item() == pytest.approx(expected, rel=1e-5)
    shares = torch.rand(5, 3)
    expected = sum(z * s for a, b in zip(logits.tolist(), shares.tolist()) for z, s in zip(a, b)) / 5
    assert true_class_logit(logits, shares).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [cross_entropy, true_class_logit])
def test_dense_targets(objective: Any) -> None:
    logits, targets = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    flat = objective(logits.movedim(1, 3).reshape(-1, 3), targets.flatten())
    torch.testing.assert_close(objective(logits, targets), flat)


@pytest.mark.parametrize("objective", [cross_entropy, true_class_logit])
@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_objective_is_never_rounded_below_float32(
    objective: Any, given: torch.dtype, expected: torch.dtype
) -> None:
    value = objective(torch.randn(2, 3).to(given), torch.tensor([0, 2]))
    assert value.dtype == expected


def test_named_objectives_and_callables() -> None:
    assert get_objective("loss") is cross_entropy
    assert get_objective("logit") is true_class_logit

    def own(outputs: Any, targets: Any) -> Any:
        return outputs

    assert get_objective(own) is own
    for unknown in ("mse", None, 3):
        with pytest.raises(ConfigError, match=r"unknown objective .*; choose one of loss, logit or pass a callable"):
            get_objective(unknown)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["loss", "logit"])
def test_a_model_with_other_outputs_is_told_what_to_pass(name: str) -> None:
    with pytest.raises(DataError, match=f"objective='{name}' needs a tensor of logits, but the model returns dict"):
        get_objective(name)({"logits": torch.ones(1, 2)}, torch.tensor([0]))


def test_split_batch() -> None:
    assert split_batch([1, 2]) == (1, 2)
    assert split_batch((None, 2)) == (None, 2)
    for key in ("labels", "label", "targets", "target", "y"):
        assert split_batch(UserDict({key: 3, "mask": 4})) == ({"mask": 4}, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((1, 2, 3), "got a tuple of 3"),
        ([1], "got a list of 1"),
        (torch.ones(2), "got a Tensor"),
        ({"pixels": 1, "mask": 2}, r"keys \['mask', 'pixels'\], none of which is a target"),
    ],
)
def test_batches_without_targets(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_batch(batch)


def test_call_model() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
            return x * by

    x = torch.ones(2)
    assert call_model(Scaled(), x).tolist() == [1, 1]
    assert call_model(Scaled(), (x, 2.0)).tolist() == [2, 2]
    assert call_model(Scaled(), [x, 3.0]).tolist() == [3, 3]
    assert call_model(Scaled(), {"x": x, "by": 4.0}).tolist() == [4, 4]


def test_to_device_keeps_the_nesting() -> None:
    image, ids = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.long)
    batch = {"a": [image, "text"], "b": (ids, {"c": torch.ones(2, 2)})}
    moved = to_device(batch, torch.device("cpu"), channels_last=True)
    assert moved["a"][1] == "text"
    assert isinstance(moved["b"], tuple)
    assert moved["a"][0].is_contiguous(memory_format=torch.channels_last)
    assert moved["b"][0].is_contiguous()  # integers are no images
    assert to_device(image, torch.device("cpu")).is_contiguous()
    assert to_device(image, torch.device("meta")).device.type == "meta"


def test_materialise_reads_one_shot_iterators_once() -> None:
    batches = [(1, 2), (3, 4)]
    assert materialise(batches) is batches
    assert materialise(iter(batches)) == batches
    for wrong in (torch.ones(3), "abc", None, 4):
        with pytest.raises(DataError, match=r"batches must be an iterable of \(inputs, targets\)"):
            materialise(wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"one mapping; wrap a single batch in a list"):
        materialise({"x": 1, "y": 2})


def test_a_named_tuple_stays_one() -> None:
    pair = namedtuple("pair", "inputs targets")(torch.ones(1), torch.zeros(1))
    assert to_device(pair, torch.device("cpu")).targets is not None
