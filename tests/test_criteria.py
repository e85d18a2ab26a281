"""The criteria as pure functions: norms and sums against plain Python arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from singe_plugin.errors import ConfigError, SingeError
from singe_plugin.method import criteria
from singe_plugin.method.criteria import CRITERIA, get_criterion, p_norm

FLOATS = st.floats(-10, 10, width=32)


def measured(nodes: int = 4, units: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decayed weight norms, gradient norms, inner products (all [K, N]) and node weights [K]."""
    shape = (nodes, units)
    return torch.rand(shape), torch.rand(shape), torch.randn(shape), torch.rand(nodes, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=6), st.sampled_from([1, 1.5, 2, 3, 7.5]))
def test_p_norm_is_its_definition(values: list[float], p: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert p_norm(tensor, p).item() == pytest.approx(sum(abs(v) ** p for v in values) ** (1 / p), rel=1e-9, abs=1e-12)
    assert p_norm(tensor, math.inf).item() == max(abs(v) for v in values)


def test_p_norm_along_a_dimension() -> None:
    values = torch.randn(2, 5, 3)
    for i in range(2):
        for k in range(3):
            expected = sum(abs(v) ** 3 for v in values[i, :, k].tolist()) ** (1 / 3)
            assert p_norm(values, 3, dim=1)[i, k].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [0.99, 0, -1, math.nan, True, "2", None])
def test_a_degree_below_one_is_refused(p: Any) -> None:
    with pytest.raises(ConfigError, match=r"p=.* is not the degree of a norm"):
        p_norm(torch.ones(2), p)


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if not criterion.of_readers])
def test_every_criterion_is_its_formula(name: str) -> None:
    weights, grads, inner, omega = measured()
    got = get_criterion(name).combine(weights, grads, inner, omega)
    for n in range(weights.shape[1]):
        w, g, d = (x[:, n].tolist() for x in (weights, grads, inner))
        q = omega.tolist()
        expected = {
            "l1": w[0], "l2": w[0], "lp": w[0], "grad": g[0], "norm_grad": w[0] * g[0],
            "sg": sum(q[s] * g[s] for s in range(4)),
            "ig": sum(q[s] * w[s] * g[s] for s in range(4)),
            "ig_abs": sum(q[s] * abs(d[s]) for s in range(4)),
        }[name]  # fmt: skip
        assert got[n].item() == pytest.approx(expected, rel=1e-5)


def test_what_each_criterion_needs() -> None:
    assert [n for n, c in CRITERIA.items() if not c.needs_gradient] == ["l1", "l2", "lp"]
    assert [n for n, c in CRITERIA.items() if c.needs_path] == ["sg", "ig", "ig_abs"]
    assert {n: c.degree for n, c in CRITERIA.items() if c.degree is not None} == {"l1": 1.0, "l2": 2.0}
    assert [n for n, c in CRITERIA.items() if c.measure == "gradient"] == ["sg"]


def test_scores_do_not_alias_what_was_measured() -> None:
    norms = torch.ones(3)
    for function in (criteria.magnitude, criteria.gradient_norm):
        function(norms).zero_()
    assert norms.tolist() == [1.0] * 3


def test_node_weights_take_the_precision_of_the_values() -> None:
    weights, grads, _, omega = measured()
    assert criteria.integrated_norm_gradient(weights, grads, omega).dtype == torch.float32
    assert criteria.summed_gradient_norms(grads.double(), omega.float()).dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "omega"), [((3,), (3,)), ((4, 3), (3,)), ((4, 3), (4, 1))], ids=["no nodes", "count", "matrix"]
)
def test_shapes_that_are_not_a_path(values: tuple[int, ...], omega: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"values \[K, N\] and node weights \[K\], got \("):
        criteria.summed_gradient_norms(torch.ones(values), torch.ones(omega))


@pytest.mark.parametrize("name", ["IG", "", None, ["ig"]])
def test_an_unknown_criterion_lists_the_known(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown criterion .*l1, l2, lp, grad, norm_grad, sg, ig, ig_abs") as caught:
        get_criterion(name)
    assert isinstance(caught.value, SingeError)
    assert isinstance(caught.value, ValueError)
