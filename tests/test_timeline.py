"""Many groups scored together have the scores of each alone, and nothing in front of a layer is computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_prefix import Counter, InPlaceStem, Reused
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from singe_plugin import Scoring
from singe_plugin.axes import AxisGraph
from singe_plugin.errors import ScoringError
from singe_plugin.method.scoring import score_groups, score_units
from singe_plugin.method.timeline import Timeline

from networks import random_network
from stranger_trial import copied

CRITERIA: dict[str, Any] = {
    "l2": {}, "grad": {}, "norm_grad": {}, "ig": {"nodes": 3}, "ig_abs": {"nodes": 1},
    "sg": {"steps": 2, "quadrature": "geometric"},
}  # fmt: skip


def squared(outputs: Any, targets: Any) -> Tensor:
    tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return sum((t.double() - 0.3).square().mean() for t in tensors)  # type: ignore[return-value]


def batches_of(inputs: Any) -> list[Any]:
    more = inputs.flip(0) if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    return [(inputs, None), (more, None)]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seed", [1, 4, 6, 9, 12, 17])
def test_scored_together_and_alone(seed: int, criterion: str) -> None:
    network = random_network(seed)
    model, inputs = network.model, network.inputs
    groups = {name: group.unit_group() for name, group in AxisGraph(model, inputs).groups.items()}
    options = Scoring(criterion, objective=squared, **CRITERIA[criterion])
    before = copied(model)
    together = score_groups(model, groups, batches_of(inputs), options)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert list(together) == list(groups)
    exact = criterion not in ("grad", "norm_grad")  # one pass of a network that is folded everywhere rounds otherwise
    for name, group in groups.items():
        alone = score_units(model, group, batches_of(inputs), options)
        torch.testing.assert_close(
            together[name], alone, rtol=0.0 if exact else 1e-3, atol=0.0 if exact else 1e-5 * float(alone.abs().max())
        )


class Deep(nn.Module):
    """A chain whose layers count their calls."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Counter()) for _ in range(depth))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("criterion", "nodes"), [("ig", 3), ("ig_abs", 1)])
def test_what_is_in_front_is_computed_once(criterion: str, nodes: int) -> None:
    depth, batch = 6, (torch.randn(3, 4), torch.tensor([0, 1, 0]))
    model = Deep(depth).eval()
    groups = {name: group.unit_group() for name, group in AxisGraph(model, batch[0]).groups.items()}
    counters = [layer[2] for layer in model.layers]
    before = [counter.calls for counter in counters]
    score_groups(model, groups, [batch], Scoring(criterion, nodes=nodes))
    calls = [counter.calls - b for counter, b in zip(counters, before, strict=True)]
    # one plain pass for the timeline; with the layers up to this one, all nodes; with the next one, the first
    assert calls == [1 + nodes * (i + 1) + (i + 1 < depth) for i in range(depth)]


@pytest.mark.parametrize("options", [Scoring("grad"), Scoring("norm_grad"), Scoring.fast()])
def test_one_pass_for_all_layers(options: Scoring) -> None:
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 0]))
    model = Deep(6).eval()
    groups = {name: group.unit_group() for name, group in AxisGraph(model, batch[0]).groups.items()}
    passes: list[int] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is functional.cross_entropy or getattr(func, "__name__", "") == "cross_entropy":
                passes.append(1)
            return func(*args, **(kwargs or {}))

    with Count():
        score_groups(model, groups, [batch, batch], options)
    assert len(groups) == 6
    assert len(passes) == 2


class Early(nn.Module):
    """The weight of a late layer is read by an early one, which is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.first(x) + self.late.bias.sum()
        return self.out(torch.relu(self.late(torch.relu(shifted))))  # type: ignore[no-any-return]


class Borrowed(nn.Module):
    """Adds up the bias of another layer, which runs later."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self.lender = [lender]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lender[0].bias.square().sum()  # type: ignore[operator,union-attr]


class Lending(nn.Module):
    """A module ends before a layer begins, and has read of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = Borrowed(self.late)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.late(torch.relu(self.between(self.first(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Early, Lending, InPlaceStem, Reused])
def test_layers_that_others_read_early_or_late(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn({Early: (2, 4), Lending: (2, 4), InPlaceStem: (2, 3, 6, 6), Reused: (2, 6)}[make])
    groups = {name: group.unit_group() for name, group in AxisGraph(model, x).groups.items()}
    options = Scoring("ig", nodes=2, objective=squared)
    together = score_groups(model, groups, batches_of(x), options)
    for name, group in groups.items():
        assert torch.equal(together[name], score_units(model, group, batches_of(x), options))


def test_a_parameter_counts_from_when_it_is_read() -> None:
    model = Early().eval()
    line = Timeline(model, lambda: model(torch.zeros(1, 4)))
    assert line.start([model.late]) < line.began[model.late]
    assert line.kept(line.start([model.late])) == [model.first]
    assert line.kept(line.start([model.out])) == [model.first, model.late]
    unread = nn.Linear(1, 1)
    assert line.kept(line.start([unread])) == []


def test_an_error_names_the_layer_and_nothing_is_left_in_the_model() -> None:
    model = Deep(3).eval()
    groups = {name: group.unit_group() for name, group in AxisGraph(model, torch.zeros(2, 4)).groups.items()}
    hooks = {module: len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()}
    with pytest.raises(ScoringError, match=r"group 'layers.0.0'.*batch 0.*failed with"):
        score_groups(model, groups, [(torch.zeros(2, 5), torch.tensor([0, 1]))], Scoring("ig"))
    with pytest.raises(ScoringError, match=r"group 'layers.0.0' and 2 more.*7 is out of bounds"):
        score_groups(model, groups, [(torch.zeros(2, 4), torch.tensor([0, 7]))], Scoring("grad"))
    assert hooks == {m: len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()}
    assert all("forward" not in module.__dict__ for module in model.modules())
