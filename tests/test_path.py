"""The nodes of the path: the number of steps by brute force, exact integrals, refinement, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singe_plugin.errors import ConfigError
from singe_plugin.method.criteria import Measure
from singe_plugin.method.path import decay_path, default_steps

MEASURES: tuple[Measure, ...] = ("product", "gradient")


def brute_force_steps(mu: float, floor: float) -> int:
    steps = 1
    while mu**steps > floor:
        steps += 1
    return steps


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 0.9999), st.floats(1e-4, 0.9))
def test_default_steps_are_those_of_brute_force(mu: float, floor: float) -> None:
    assert default_steps(mu, floor) == brute_force_steps(mu, floor)


@pytest.mark.parametrize("mu", [k / 1000 for k in range(1, 1000, 7)] + [10 ** (-2 / k) for k in range(1, 60)])
def test_default_steps_on_a_grid_and_at_ties(mu: float) -> None:
    assert default_steps(mu) == brute_force_steps(mu, 0.01)


@pytest.mark.parametrize("mu", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("steps", [0, 1, 7, None])
def test_the_geometric_rule_is_the_sum_of_the_paper(mu: float, steps: int | None) -> None:
    path = decay_path(mu, steps, "geometric")
    last = brute_force_steps(mu, 0.01) if steps is None else steps
    assert path.scales.tolist() == [mu**s for s in range(last + 1)]
    assert path.weights.tolist() == [1.0] * (last + 1)
    assert path.scales.dtype == torch.float64
    assert path.nodes == last + 1


@pytest.mark.parametrize("steps", [6, 44, None])
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 12])
def test_gauss_is_exact_for_polynomials_in_u(nodes: int, steps: int | None) -> None:
    path = decay_path(0.9, steps, "gauss", nodes)
    mass = sum(0.9**s for s in range(45))
    for degree in range(2 * nodes):
        # what is summed is w * u * h(u), which stands for mass * integral of h over [0, 1], or, with S given, for the
        # integral over [mu^(S+1), 1] over 1 - mu
        got = (path.weights * path.scales * path.scales**degree).sum().item()
        integral = mass if steps is None else (1 - 0.9 ** ((steps + 1) * (degree + 1))) / 0.1
        assert got == pytest.approx(integral / (degree + 1), rel=1e-9)
    assert path.scales.tolist() == sorted(path.scales.tolist(), reverse=True)
    assert path.scales.min() > 0
    assert path.scales.max() < 1


@pytest.mark.parametrize("nodes", [2, 5, 12])
def test_gauss_over_s_is_exact_for_polynomials_in_s(nodes: int) -> None:
    path = decay_path(0.9, 44, "gauss", nodes, "gradient")
    s = torch.log(path.scales) / math.log(0.9)
    for degree in range(2 * nodes):
        got = (path.weights * (s / 44) ** degree).sum().item()
        assert got == pytest.approx(45 / (degree + 1), rel=1e-9)
    assert path.scales.tolist() == sorted(path.scales.tolist(), reverse=True)


def test_gauss_nodes_are_those_of_numpy() -> None:
    points, shares = np.polynomial.legendre.leggauss(4)
    for steps, end in ((2, 0.5**3), (None, 0.0)):  # a given S stops at mu^(S+1), as the sum does
        path = decay_path(0.5, steps, "gauss", 4)
        mass = 1.75 if steps else 2 - 0.5 ** brute_force_steps(0.5, 0.01)
        np.testing.assert_allclose(sorted(path.scales.tolist()), end + (1 - end) * (points + 1) / 2)
        np.testing.assert_allclose((path.weights * path.scales).flip(0).numpy(), shares / 2 * mass)


@pytest.mark.parametrize("steps", [0, 3, 20, 200])
def test_gauss_stops_where_the_sum_stops(steps: int) -> None:
    """The sum is a left Riemann sum in u with intervals of (1 - mu) mu^s: fine ones are the integral."""

    def total(path: Any) -> float:
        return float((path.weights * path.scales * torch.exp(-3 * path.scales)).sum())

    path = decay_path(0.98, steps, "gauss", 8)
    fine = 0.98 ** (torch.arange(100 * (steps + 1), dtype=torch.float64) / 100)  # the same interval, 100 times finer
    truth = float((fine * (1 - 0.98**0.01) * torch.exp(-3 * fine)).sum()) / 0.02
    assert total(path) == pytest.approx(truth, rel=1e-3)
    assert total(path) == pytest.approx(total(decay_path(0.98, steps, "geometric")), rel=0.04)
    assert total(path.refined()) == pytest.approx(total(path), rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("quadrature", ["geometric", "gauss"])
@pytest.mark.parametrize("mu", [0.3, 0.8, 0.95])
def test_refining_keeps_what_a_constant_gradient_adds_up_to(mu: float, quadrature: str, measure: Measure) -> None:
    path = decay_path(mu, None, quadrature, 3, measure)
    steps = brute_force_steps(mu, 0.01)
    expected = sum(mu**s for s in range(steps + 1)) if measure == "product" else steps + 1.0
    for _ in range(3):
        factors = path.scales if measure == "product" else torch.ones_like(path.scales)
        assert (path.weights * factors).sum().item() == pytest.approx(expected, rel=1e-12)
        finer = path.refined()
        assert finer.nodes in (2 * path.nodes, 2 * path.nodes + 1)
        assert finer.measure == measure
        path = finer


def test_the_refined_sum_visits_the_nodes_of_the_coarse_one() -> None:
    path = decay_path(0.8, 5, "geometric")
    torch.testing.assert_close(path.refined().scales[::2], path.scales)


@pytest.mark.parametrize("measure", MEASURES)
def test_refining_comes_closer_to_the_integral(measure: Measure) -> None:
    def total(path: Any) -> float:
        values = torch.exp(-3 * path.scales)
        return float((path.weights * values * (path.scales if measure == "product" else 1.0)).sum())

    for quadrature in ("geometric", "gauss"):
        path = decay_path(0.7, 12, quadrature, 1, measure)
        truth = total(decay_path(0.7, 12, "gauss", 60, measure))
        if quadrature == "geometric":  # its limit is the integral over [mu^(S+1), 1], or [0, S] shifted by half a step
            truth = total(path.refined().refined().refined().refined().refined().refined())
        first, second = path.refined(), path.refined().refined()
        assert abs(total(path) - truth) > abs(total(first) - truth) > abs(total(second) - truth)


@pytest.mark.parametrize("mu", [0, 1, 1.5, -0.1, math.nan, "0.9", True, None])
def test_a_rate_outside_the_interval(mu: Any) -> None:
    for function in (default_steps, decay_path):
        with pytest.raises(ConfigError, match=r"mu=.* is not inside \]0, 1\["):
            function(mu)


@pytest.mark.parametrize("floor", [0.0, -1.0, 1.0, math.nan])
def test_a_floor_outside_the_interval(floor: float) -> None:
    with pytest.raises(ConfigError, match=r"floor=.* is not inside \]0, 1\["):
        default_steps(0.9, floor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.0}, r"steps=2\.0"),
        ({"steps": True}, "steps=True"),
        ({"quadrature": "simpson"}, "unknown quadrature 'simpson'; choose one of geometric, gauss"),
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 2.5}, r"nodes=2\.5"),
        ({"nodes": True}, "nodes=True"),
    ],
)
def test_arguments_without_a_meaning(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decay_path(**arguments)
