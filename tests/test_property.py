"""Random networks: what is removed through the host is exactly what masking it in the original computes."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from singe_plugin.errors import BudgetError, SingeError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.target import Target

from asked import asked
from masking import Masked
from networks import Network, networks, random_network
from small_nets import values_of

CHUNKS, PER_CHUNK = 10, 12
MAGNITUDE = tp.importance.MagnitudeImportance
REPRODUCIBLE = settings(
    derandomize=True, deadline=None, database=None, max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


def pruner_for(network: Network, importance: Any = None, ema: Any = None, **options: Any) -> SInGEPruner | None:
    """A pruner; None if the network is refused, which then must be as it was."""
    before = values_of(network.model)
    try:
        return SInGEPruner(network.model, network.inputs, importance or MAGNITUDE(), ema=ema, **asked(**options))
    except SingeError:
        return None
    finally:
        now = values_of(network.model)
        assert all(torch.equal(now[name], value) for name, value in before.items())


def fresh_inputs(network: Network) -> Tensor:
    return torch.randn_like(network.inputs) if network.inputs.is_floating_point() else network.inputs


def difference(masked: nn.Module, pruned: nn.Module, x: Tensor) -> float:
    """The largest difference, relative to the output; in double precision if rounding could explain it."""

    def relative(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        assert bool(torch.isfinite(b).all())
        return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))

    with torch.no_grad():
        found = relative(masked(x), pruned(x))
        if found > 1e-6:
            x = x.double() if x.is_floating_point() else x
            found = relative(masked.double()(x), copy.deepcopy(pruned).double()(x))
    return found


def remove_at_random(network: Network, seed: int, rounds: int = 2) -> int:
    """Remove random units of random layers, several times over, and compare with the masked original."""
    masked = Masked(network.model)
    pruner = pruner_for(network, ema=masked.tags)
    if pruner is None or not pruner.layers:
        return 0
    assert all(pruner.left_whole.values())
    host, rng, x, removals = pruner.host(), random.Random(seed), fresh_inputs(network), 0
    for _ in range(rounds):
        units = {layer.name: layer.units for layer in host.layers() if layer.units > 1}
        for name in rng.sample(sorted(units), rng.randint(min(1, len(units)), len(units))):
            count = rng.choice([1, rng.randint(1, units[name] - 1)])
            host.remove(name, rng.sample(range(units[name]), count))
            removals += 1
            units[name] -= count
        left = {layer.name: layer.units for layer in host.layers()}
        assert all(left[name] == count for name, count in units.items())
        found = difference(masked.model(), network.model, x)
        assert found < 1e-4, f"{network.description}: pruned and masked differ by {found:.2g}\n{network.model}"
    return removals


def trains(network: Network, had_gradient: set[str]) -> None:
    """Forward, backward and an optimizer step work, and every parameter that had a gradient has one now."""
    model = network.model.train()
    out = model(network.inputs)
    assert out.shape == (len(network.inputs), 3)
    model.zero_grad()
    nn.functional.cross_entropy(out, network.targets()).backward()
    for name, parameter in model.named_parameters():
        if name in had_gradient:
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape, name
    torch.optim.SGD(model.parameters(), 1e-3).step()
    with torch.no_grad():
        assert bool(torch.isfinite(model.eval()(network.inputs)).all())


def gradients_of(network: Network) -> set[str]:
    model = copy.deepcopy(network.model)
    nn.functional.cross_entropy(model(network.inputs), network.targets()).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def live(network: Network, seed: int) -> None:
    """``step`` twice, then ``run``: only :class:`SingeError` is raised, and the numbers that are reported are true."""
    had_gradient = gradients_of(network)
    importance = MAGNITUDE()
    if seed % 2:
        importance = SInGEImportance(nodes=1).bind(network.model, [(network.inputs, network.targets())])
    pruner = pruner_for(network, importance, iterative_steps=2, global_pruning=seed % 3 == 0)
    if pruner is None:
        return
    trains(network, had_gradient)
    for _ in range(2):
        before = sum(p.numel() for p in network.model.parameters())
        pruner.step()
        assert sum(p.numel() for p in network.model.parameters()) <= before
        trains(network, had_gradient)
    units = {} if not pruner.layers else {layer.name: layer.units for layer in pruner.host().layers()}
    before = sum(p.numel() for p in network.model.parameters())
    values = values_of(network.model)
    pruner.target = Target("params", 0.2)  # given from the start, step() would refuse it
    try:
        outcome = pruner.run()
    except BudgetError:  # these networks are small: one unit may be more than a point
        now = values_of(network.model)
        assert all(torch.equal(now[name], value) for name, value in values.items())
        return
    left = {layer.name: layer.units for layer in pruner.host().layers()}
    assert {name: units[name] - left[name] for name in units} == outcome.plan
    assert outcome.params == (before, sum(p.numel() for p in network.model.parameters()))
    assert abs(outcome.params[1] / before - 0.8) <= 0.01
    assert outcome.left_whole == pruner.left_whole
    trains(network, had_gradient)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_removed_is_masked(chunk: int) -> None:
    seeds = range(chunk * PER_CHUNK, (chunk + 1) * PER_CHUNK)
    assert sum(remove_at_random(random_network(seed), seed) for seed in seeds) > PER_CHUNK


@REPRODUCIBLE
@given(networks())
def test_removed_is_masked_in_networks_that_shrink(network: Network) -> None:
    remove_at_random(network, 0)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_step_and_run(chunk: int) -> None:
    for seed in range(10000 + chunk * 6, 10000 + (chunk + 1) * 6):
        live(random_network(seed), seed)


@REPRODUCIBLE
@given(networks())
def test_step_and_run_in_networks_that_shrink(network: Network) -> None:
    live(network, 1)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(100))
def test_thousands_of_networks(chunk: int) -> None:
    for seed in range(20000 + chunk * 40, 20000 + (chunk + 1) * 40):
        remove_at_random(random_network(seed), seed, rounds=3)
        live(random_network(seed), seed)
