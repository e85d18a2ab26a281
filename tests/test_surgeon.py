"""What a removal costs when the others take over: against least squares solved anew for every choice of units."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Pace, Scoring, SInGEPruner, prune, prune_weights
from singe_plugin.axes import AxisGraph
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.readers import costs_of_removal
from singe_plugin.method.surgeon import Reading, removal_costs, shrinkage

from small_nets import Trace, seeded

OPTIONS = Scoring("obs")


def reading(units: list[int], outputs: int, given: list[int] | None = None, seed: int = 0) -> tuple[Reading, Any]:
    """A reading with its rows: inputs, targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, len(units))) @ rng.normal(size=(len(units), len(units)))
    weight, h = rng.normal(size=(outputs, len(units))), rng.uniform(0.1, 2.0, outputs)
    parts = (torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(weight), torch.from_numpy(h))
    return Reading(*parts, torch.tensor(units), torch.tensor(given or [-1] * outputs), 1e-12), (x, x @ weight.T)


def by_least_squares(readings: list[tuple[Reading, Any]], size: int) -> list[float]:
    """The cost of every unit in its turn, from least squares without the features of what is gone."""

    def error(gone: set[int], outputs_gone: set[int]) -> float:
        total = 0.0
        for one, (x, y) in readings:
            stays = [f for f, unit in enumerate(one.units.tolist()) if unit not in gone]
            best = np.linalg.lstsq(x[:, stays], y, rcond=None)[0] if stays else np.zeros((0, y.shape[1]))
            errors = ((x[:, stays] @ best - y) ** 2).mean(0)
            for o, h in enumerate(one.curvature.tolist()):
                total += 0.5 * h * errors[o] * (int(one.given[o]) not in outputs_gone)
        return float(total)

    gone: set[int] = set()
    found = [0.0] * size
    last = 0.0
    while len(gone) < size:
        # what goes with a unit is no error any more, of this removal or of earlier ones
        costs = {
            unit: error(gone | {unit}, gone | {unit}) - error(gone, gone | {unit})
            for unit in range(size) if unit not in gone
        }  # fmt: skip
        unit = min(costs, key=lambda u: costs[u])
        last = max(last, costs[unit])
        found[unit] = last
        gone.add(unit)
    return found


@pytest.mark.parametrize(
    ("units", "outputs", "given"),
    [
        ([0, 1, 2, 3], 3, None),
        ([0, 0, 1, 1, 2, 2], 2, None),
        ([0, -1, 1, 1, -1, 2, 2, 2], 4, None),  # units of one, two and three features, and features of none
        ([2, 0, 1, 0], 3, [0, 1, -1]),  # outputs that go together with units
        ([1, 1], 2, None),  # units 0 and 2 are not read
    ],
)
def test_units_go_as_least_squares_says(units: list[int], outputs: int, given: list[int] | None) -> None:
    size = max(max(units) + 1, 3)
    made = [reading(units, outputs, given, 1), reading([u for u in units for _ in range(2)], 2, None, 2)]
    for some in (made[:1], made):
        got = removal_costs([one for one, _ in some], size)
        np.testing.assert_allclose(got.numpy(), by_least_squares(some, size), rtol=1e-4, atol=1e-7)


def test_of_two_units_that_say_the_same_one_stays() -> None:
    one, _ = reading([0, 1, 2], 2)
    gram = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 1.0]]).double()
    costs = removal_costs([Reading(gram, one.weight, one.curvature, one.units, one.given)], 3)
    assert float(costs.min()) < 1e-2 * float(costs.sort().values[1])


def test_many_units_go_several_at_once() -> None:
    one, _ = reading(list(range(300)), 5)
    costs = removal_costs([one], 300)
    assert len(costs.unique()) == 300
    assert bool((costs > 0).all())


def literal_shrinkage(x: Any) -> float:
    """Of examples ``[N, rows, F]``."""
    grams = [one.T @ one / len(one) for one in x]
    gram = sum(grams) / len(grams)
    target = np.trace(gram) / len(gram) * np.eye(len(gram))
    noise = sum(((one - gram) ** 2).sum() for one in grams) / len(grams) ** 2
    share = min(noise / ((gram - target) ** 2).sum(), 0.999)
    return float(share / (1 - share))


def test_a_gram_matrix_of_few_examples_is_shrunk_more() -> None:
    rng, found = np.random.default_rng(0), []
    mixed = rng.normal(size=(6, 6))
    for count in (3, 30, 300):
        x = rng.normal(size=(count, 4, 6)) @ mixed
        grams = torch.from_numpy(np.stack([one.T @ one / 4 for one in x]))
        got = shrinkage(grams.mean(0)[None], grams.square().sum()[None], count)
        assert float(got) == pytest.approx(literal_shrinkage(x), rel=1e-6)
        found.append(float(got))
    assert found[0] > found[1] > found[2] > 0


class Grouped(nn.Module):
    """A stream with a depthwise, a grouped and a strided reader, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 6, 1, bias=False)
        self.strided = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.depthwise(x)).relu()
        return self.head(self.strided(self.wide(x).tanh()).relu().mean((2, 3)))


def test_readers_get_what_they_get_and_move_what_they_move() -> None:
    net = seeded(Grouped).eval()
    batches = [(torch.randn(6, 3, 5, 5), torch.randint(0, 3, (6,))) for _ in range(2)]
    seen: dict[str, Tensor] = {}
    for name in ("wide", "strided", "head"):
        net.get_submodule(name).register_forward_pre_hook(lambda m, x, name=name: seen.update({name: x[0].detach()}))
    rows: dict[str, list[Tensor]] = {}
    moves: dict[str, Any] = {}
    for x, y in batches:
        net.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        for name, inputs in seen.items():
            layer: Any = net.get_submodule(name)
            if name != "head":
                inputs = functional.unfold(inputs, layer.kernel_size, stride=layer.stride).transpose(1, 2).flatten(0, 1)
            rows.setdefault(name, []).append(inputs.double())
            moves[name] = moves.get(name, 0) + layer.weight.grad.flatten(1).double().square().sum(1)
    net.zero_grad()
    graph = AxisGraph(net, batches[0][0])
    got = costs_of_removal(graph, list(graph.groups), batches, OPTIONS)
    assert list(got) == ["stem", "wide", "strided"]
    for name, reader in (("stem", "wide"), ("wide", "strided"), ("strided", "head")):
        weight = net.get_parameter(f"{reader}.weight").detach().flatten(1).double()
        x = torch.cat(rows[reader])
        h = moves[reader] / x.square().mean(0).sum()
        ridge = max(literal_shrinkage(x.numpy().reshape(12, -1, x.shape[1])), 1e-3)
        if reader != "wide":  # a bias makes up for the mean
            x = x - x.mean(0)
        size = graph.groups[name].size
        units = torch.arange(size).repeat_interleave(weight.shape[1] // size)
        one = Reading(x.T @ x / len(x), weight, h, units, -torch.ones(len(weight), dtype=torch.int64), ridge)
        torch.testing.assert_close(got[name].double(), removal_costs([one], size), rtol=1e-4, atol=1e-9)


def test_a_unit_that_the_others_can_say_is_free() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    batches = [(torch.randn(4096, 5), torch.randint(0, 3, (4096,)))]  # six units of a space of five dimensions
    costs = costs_of_removal(AxisGraph(net, batches[0][0]), ["0"], batches, OPTIONS)["0"]
    assert float(costs.min()) < 0.1 * float(costs.sort().values[1])  # not nothing: the matrices are shrunk


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit", "test_convnext"])
def test_backbones_are_scored_and_left_as_they_were(name: str) -> None:
    narrow = {"channels": (16, 24, 32, 48)} if name == "resnet10t" else {}  # 512 units would take half a minute
    net = seeded(lambda: timm.create_model(name, num_classes=3, **narrow))
    size = 160 if name == "test_vit" else 32
    batches = [(torch.randn(2, 3, size, size), torch.tensor([0, 2])) for _ in range(2)]
    graph = AxisGraph(net, batches[0][0])
    before = Trace(net)
    scores = costs_of_removal(graph, list(graph.groups), batches, OPTIONS)
    before.assert_unchanged()
    for group, values in scores.items():
        assert values.shape == (graph.groups[group].size,)
        assert bool(torch.isfinite(values).all())
        assert bool((values >= 0).all())
    again = costs_of_removal(graph, list(graph.groups), batches, OPTIONS)
    assert all(torch.equal(values, again[group]) for group, values in scores.items())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.cells, self.head = nn.Linear(4, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cells(self.first(x).relu())[0][:, -1])
        return out


def test_what_is_read_by_something_else_is_scored_by_its_product(caplog: pytest.LogCaptureFixture) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.own, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(len(x), 6)
            for step in x.unbind(1):
                state = (self.enter(step) + self.own(state)).tanh()
            out: Tensor = self.head(state)
            return out

    net = seeded(Cell).eval()
    batches = [(torch.randn(6, 4, 4), torch.randint(0, 3, (6,)))]
    graph = AxisGraph(net, batches[0][0])
    (name,) = graph.groups
    with caplog.at_level(logging.INFO, "singe_plugin"):
        got = costs_of_removal(graph, [name], batches, OPTIONS)[name]
    assert f"{name!r} are scored without what reads them, because own.weight is not followed" in caplog.text
    assert bool((got > 0).all())


class Stepwise(Recurrent):
    """The same, and the layer in front of it is read step by step."""

    def forward(self, x: Tensor) -> Tensor:
        c, inputs = self.cells, self.first(x).relu()
        h = cell = x.new_zeros(len(x), 5)
        for step in inputs.unbind(1):
            gates = functional.linear(step, c.weight_ih_l0, c.bias_ih_l0) + h @ c.weight_hh_l0.t() + c.bias_hh_l0
            i, f, g, o = gates.chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
        out: Tensor = self.head(h)
        return out


def test_a_layer_that_is_read_in_steps_is_read_once() -> None:
    nets = [seeded(kind).eval() for kind in (Recurrent, Stepwise)]
    nets[1].load_state_dict(nets[0].state_dict())
    batches = [(torch.randn(6, 4, 4), torch.randint(0, 3, (6,))) for _ in range(2)]
    together, stepwise = (
        costs_of_removal(AxisGraph(net, batches[0][0]), ["first"], batches, OPTIONS)["first"] for net in nets
    )
    torch.testing.assert_close(stepwise, together, rtol=1e-4, atol=1e-8)


def test_a_network_is_pruned_by_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    batches = [(torch.randn(32, 4), torch.randint(0, 3, (32,))) for _ in range(2)]
    for pace in (None, Pace("layers", units_per_step="layer")):
        result = prune(copy.deepcopy(net), batches, target="params=0.5", scoring="obs", pace=pace, finetune=0)
        assert result.removed_params == pytest.approx(0.5, abs=0.02)


def test_an_importance_scores_one_group_as_all_of_them() -> None:
    net = seeded(Grouped).eval()
    batches = [(torch.randn(6, 3, 8, 8), torch.randint(0, 3, (6,)))]
    importance = tp.importance.SInGEImportance("obs").bind(net, batches)
    host = SInGEPruner(net, batches[0][0], importance).host()
    names = [layer.name for layer in host.layers()]
    together = host.score(names)
    for name in names:
        view = host.graph.get_pruning_group(net.get_submodule(name), tp.prune_conv_out_channels, [0])
        assert torch.equal(importance.score_units(view, None), together[name])


def test_where_readers_are_not_known_it_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    with pytest.raises(ConfigError, match="'obs' is computed from the layers that read units"):
        prune_weights(net, [batch], scoring="obs", finetune=0)
    importance = tp.importance.SInGEImportance("obs").bind(net, [batch])
    group = tp.DependencyGraph().build_dependency(net, batch[0]).get_pruning_group(
        net[0], tp.prune_linear_out_channels, list(range(8))
    )  # fmt: skip
    with pytest.raises(ConfigError, match="'obs' is computed from the layers that read units"):
        importance(group)
    with pytest.raises(DataError, match="'obs' needs data"):
        SInGEPruner(net, batch[0], tp.importance.SInGEImportance("obs"), pruning_ratio=0.5).run()


def test_what_never_changes_costs_next_to_nothing_and_is_no_error() -> None:
    for gram in (torch.full((6, 6), -2.8e-17), torch.zeros(6, 6), 1e-20 * torch.ones(6, 6) - 1e-19 * torch.eye(6)):
        reading = Reading(
            gram.double(),
            torch.randn(2, 6).double(),
            torch.ones(2).double(),
            torch.arange(6) // 2,
            torch.tensor([-1, -1]),
        )
        costs = removal_costs([reading], 3)
        assert bool(torch.isfinite(costs).all())
        assert float(costs.max()) < 1e-12
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # dead: its readers get zeros, and give the same for every input
    batches = [(torch.randn(16, 4), torch.arange(16) % 3) for _ in range(2)]
    result = prune(net, batches, target="params=0.5", finetune=0)
    assert bool(torch.isfinite(result.model(batches[0][0])).all())
