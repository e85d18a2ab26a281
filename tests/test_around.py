"""What a run spends around scoring: forward passes, countings and copies, counted; and the values they give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import singe_plugin
from singe_plugin.axes import AxisGraph, bench, oracles, verify_groups
from singe_plugin.axes.values import Copies, Values
from singe_plugin.integrations.torch_pruning import host
from singe_plugin.loop import costs
from singe_plugin.loop.costs import Counted, count_macs
from singe_plugin.loop.events import Callback, RunStarted

from small_nets import images


def net_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10), nn.ReLU(), nn.Linear(10, 3),
    )  # fmt: skip


class Starts(Callback):
    """Keeps what a run was expected to remove."""

    def __init__(self) -> None:
        self.plans: list[dict[str, int]] = []

    def on_run_start(self, event: RunStarted) -> None:
        self.plans.append({layer: count for layer, count in event.plan.items() if count})


def pruned(target: str, rounds: int = 4, ratios: str = "per_cost") -> tuple[Any, Starts]:
    starts = Starts()
    found = singe_plugin.prune(
        net_of(), images(count=2, size=8, examples=2), target=target, scoring="l2", finetune=0, repair=None,
        pace=singe_plugin.Pace("rounds", rounds=rounds, ratios=ratios, min_width=1), callbacks=[starts],
    )  # fmt: skip
    return found, starts


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often MACs were counted, and units removed on trial."""
    found = {"macs": 0, "trials": 0}
    count, trial = costs.count_macs_by_module, host.TorchPruningHost.trial

    def count_macs_by_module(model: nn.Module, inputs: Any) -> dict[str, int]:
        found["macs"] += 1
        return count(model, inputs)

    def tried(self: Any, plan: dict[str, int], kind: str) -> float:
        found["trials"] += 1
        return trial(self, plan, kind)

    monkeypatch.setattr(costs, "count_macs_by_module", count_macs_by_module)
    monkeypatch.setattr(host.TorchPruningHost, "trial", tried)
    return found


def test_macs_are_counted_for_the_result_alone_where_the_target_is_in_parameters(counted: dict[str, int]) -> None:
    found, _ = pruned("params=0.5")
    assert counted["macs"] == 2
    assert counted["trials"] <= 4
    one = torch.zeros(1, 2, 8, 8)
    assert (found.before.macs, found.after.macs) == (count_macs(net_of(), one), count_macs(found.model, one))


def test_macs_are_counted_once_for_every_candidate_where_the_target_is_in_them(counted: dict[str, int]) -> None:
    found, _ = pruned("macs=0.5")
    assert counted["macs"] <= 1 + counted["trials"] <= 6
    assert found.after.macs == count_macs(found.model, torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("target", ["params=0.5", "macs=0.5"])
@pytest.mark.parametrize("ratios", ["per_cost", "global", "uniform"])
def test_what_a_run_is_expected_to_remove_is_what_one_round_would(target: str, ratios: str) -> None:
    several, one = pruned(target, 3, ratios)[1], pruned(target, 1, ratios)[1]
    assert several.plans == one.plans
    assert sum(one.plans[0].values())


def test_a_structure_is_counted_again_when_it_changes() -> None:
    net, example = net_of(), torch.zeros(1, 2, 8, 8)
    counted = Counted(net, example)
    before = counted.macs
    net[0].stride, net[6] = (2, 2), nn.Linear(16, 10)
    assert counted.macs == count_macs(net, example) != before
    assert counted.by_module["6"] == 160


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often verification ran a model, and recorded what can be reached from it."""
    found = {"passes": 0, "records": 0}

    class Record(bench.Contents):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            found["records"] += 1
            super().__init__(*args, **kwargs)

    for module in (bench, singe_plugin.state, singe_plugin.rollback):
        monkeypatch.setattr(module, "Contents", Record)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: found.update(passes=found["passes"] + isinstance(module, nn.Sequential))
    )
    yield found
    hook.remove()


def test_verification_runs_few_times_and_records_the_model_once_for_every_bench(runs: dict[str, int]) -> None:
    graph = AxisGraph(net_of(), torch.zeros(2, 2, 8, 8))
    runs.update(passes=0, records=0)
    assert not verify_groups(graph)
    assert runs["passes"] <= 15
    assert runs["records"] <= 8  # two benches, their random values, and a few single passes; not one a removal


def test_effects_are_gradient_times_parameter_by_position() -> None:
    graph = AxisGraph(net_of(), torch.zeros(2, 2, 8, 8))
    with bench.opened_bench(graph, graph.inputs) as opened:
        found = oracles._effects(opened)
        parameters = list(graph.model.parameters())
        assert not any(p.requires_grad is False or p.grad is not None for p in parameters)
        with torch.enable_grad():
            out = graph.model(opened.inputs)
            probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
            gradients = torch.autograd.grad((out * probe).sum() / (out.detach() * probe).norm(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            moved = np.abs(gradient.numpy() * parameter.detach().numpy())
            for dim in range(moved.ndim):
                expected = moved.sum(tuple(d for d in range(moved.ndim) if d != dim))
                np.testing.assert_allclose(found[id(parameter), dim].numpy(), expected, rtol=1e-9, atol=1e-15)


def test_units_are_numbered_anew_behind_those_that_are_gone() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(20):
        order = drawn.permutation(30).tolist()
        first, second = order[: drawn.integers(0, 12)], order[: drawn.integers(12, 29)]
        left = [unit for unit in range(30) if unit not in first]
        expected = [left.index(unit) for unit in second if unit not in first]
        assert bench._renumbered(second, first) == expected


def copies_of(*sources: Tensor) -> tuple[list[nn.Parameter], Copies]:
    tensors = [nn.Parameter(source.double()) for source in sources]
    return tensors, Copies({id(t): source for t, source in zip(tensors, sources, strict=True)})


def test_a_copy_is_written_in_place_and_made_again_of_its_source() -> None:
    (tensor, cut), values = copies_of(torch.randn(4, 3), torch.randn(5, 2))
    sources, place = dict(values.sources), tensor.data_ptr()
    values.zero(tensor, 1, torch.tensor([0, 2]))
    values.keep(cut)
    cut.data = cut.data[1:3].clone()
    assert tensor.data_ptr() == place
    assert not tensor[:, [0, 2]].any()
    assert tensor[:, 1].all()
    values.restore()
    for one in (tensor, cut):
        assert torch.equal(one, sources[id(one)].double())
        assert one.requires_grad


def test_what_is_no_copy_is_never_written() -> None:
    other, (_, values) = nn.Parameter(torch.randn(4, 3)), copies_of()
    data, before = other.data, other.detach().clone()
    values.zero(other, 0, torch.tensor([1]))
    values.scale(other, torch.tensor([2.0]))
    assert torch.equal(data, before)
    assert not other[1].any()
    assert torch.equal(other[0], 2 * before[0])
    values.restore()
    assert other.data_ptr() == data.data_ptr()
    assert torch.equal(other, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_are_taken_over_and_over(transposed: bool) -> None:
    values, factors = Values(), torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    tensor = torch.randn(4, 6)
    tensor = tensor.t() if transposed else tensor
    expected = tensor.numpy() * np.resize(factors.numpy(), tensor.numel()).reshape(tuple(tensor.shape))
    values.scale(tensor, factors)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6)
