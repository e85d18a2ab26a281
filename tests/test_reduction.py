"""Reductions and normalisers against torch-pruning's own, where they coincide, and against NaN where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st

from singe_plugin.errors import ConfigError
from singe_plugin.method.reduction import REDUCTIONS, check_normalizer, check_reduction, normalize, reduce_layers

NORMALIZERS = (
    "sum",
    "mean",
    "max",
    "standarization",
    "gaussian",
    "lamp",
    "sentinel_0.5",
    "sentinel_0.0",
    "sentinel_0.9",
)
SCORES = st.lists(st.floats(0.0625, 100, width=32), min_size=2, max_size=9, unique=True)


def theirs(reduction: str = "mean") -> Any:
    return tp.importance.GroupMagnitudeImportance(group_reduction=reduction)


@pytest.mark.parametrize("normalizer", [*NORMALIZERS, None])
@settings(max_examples=30, deadline=None)
@given(values=SCORES)
def test_normalisers_are_torch_prunings(normalizer: str | None, values: list[float]) -> None:
    scores = torch.tensor(values)
    expected = theirs()._normalize(scores.clone(), normalizer)
    torch.testing.assert_close(normalize(scores, normalizer), expected, rtol=1e-4, atol=1e-6)


def test_lamp_is_its_definition() -> None:
    scores = torch.rand(7)
    for i, x in enumerate(scores.tolist()):
        at_least = sum(y for y in scores.tolist() if y >= x)
        assert normalize(scores, "lamp")[i].item() == pytest.approx(x / at_least, rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_are_torch_prunings(reduction: str) -> None:
    layers = [torch.rand(5), torch.rand(5), torch.rand(5)]
    everywhere = [torch.ones(5, dtype=torch.bool)] * 3
    expected = theirs(reduction)._reduce(layers, [list(range(5))] * 3)
    torch.testing.assert_close(reduce_layers(layers, everywhere, reduction), expected)


@pytest.mark.parametrize("reduction", ["sum", "max", "prod", "first", "gate"])
def test_a_layer_with_some_of_the_units_is_torch_prunings(reduction: str) -> None:
    root, part = torch.rand(5), torch.rand(2)
    expected = theirs(reduction)._reduce([root, part], [list(range(5)), [1, 3]])
    wide, has = torch.zeros(5), torch.zeros(5, dtype=torch.bool)
    wide[[1, 3]], has[[1, 3]] = part, True
    got = reduce_layers([root, wide], [torch.ones(5, dtype=torch.bool), has], reduction)
    torch.testing.assert_close(got, expected)


def test_the_mean_counts_only_layers_that_have_the_unit() -> None:
    # torch-pruning divides by the number of layers everywhere, which favours units that few layers have
    layers = [torch.tensor([2.0, 4.0]), torch.tensor([0.0, 8.0])]
    has = [torch.tensor([True, True]), torch.tensor([False, True])]
    assert reduce_layers(layers, has, "mean").tolist() == [2.0, 6.0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_unit_that_no_layer_has(reduction: str) -> None:
    nowhere = torch.zeros(3, dtype=torch.bool)
    assert reduce_layers([torch.zeros(3)] * 2, [nowhere] * 2, reduction).tolist() == [0.0] * 3


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("size", [1, 4])
def test_zero_scores_never_become_nan(normalizer: str, size: int) -> None:
    assert normalize(torch.zeros(size), normalizer).tolist() == [0.0] * size
    assert torch.isfinite(normalize(torch.full((size,), 3.0), normalizer)).all()
    one_left = torch.zeros(size)
    one_left[0] = 1.0
    assert torch.isfinite(normalize(one_left, normalizer)).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalisers_keep_the_input_and_the_order(normalizer: str) -> None:
    scores = torch.rand(6) + 0.1
    before = scores.clone()
    ranks = normalize(scores, normalizer).argsort()
    assert torch.equal(scores, before)
    assert ranks.tolist() == scores.argsort().tolist()


def test_callables_and_none() -> None:
    scores = torch.rand(3)
    assert normalize(scores, None) is scores
    assert torch.equal(normalize(scores, lambda s: s + 1), scores + 1)


@pytest.mark.parametrize("name", ["softmax", "sentinel_", "sentinel_1", "sentinel_-0.1", "sentinel_x", "", 3, ["sum"]])
def test_unknown_normalisers(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown normalizer .*; choose one of sum, mean, max"):
        check_normalizer(name)


@pytest.mark.parametrize("name", ["median", "", None, ["sum"]])
def test_unknown_reductions(name: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown group_reduction .*; choose one of sum, mean, max, prod, first, gate"
    ):
        check_reduction(name)


def test_a_group_without_layers() -> None:
    with pytest.raises(ConfigError, match="a group without producing layers"):
        reduce_layers([], [], "sum")
