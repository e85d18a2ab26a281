"""Algorithm 1 against a host in plain Python, and against a second, literal implementation on a real network."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.algorithm import prune_layers, units_per_removal
from singe_plugin.budget import CostModel, LayerSpec
from singe_plugin.errors import ConfigError, ScoringError
from singe_plugin.events import Callback, Callbacks, History
from singe_plugin.finetune import FineTune
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.progress import Progress
from singe_plugin.units import UnitGroup

from asked import asked


class FakeHost:
    """Layers that are lists of numbers; a unit's score is its number. Writes down what it is asked to do."""

    def __init__(self, log: list[Any], **layers: Sequence[float]) -> None:
        self.model: nn.Module = nn.Linear(1, 1)
        self.log, self.scores = log, {name: list(values) for name, values in layers.items()}

    def layers(self) -> list[LayerSpec]:
        return [LayerSpec(name, len(values), name) for name, values in self.scores.items()]

    def units(self, layer: str) -> UnitGroup:
        raise AssertionError("the algorithm has no need of the slices")

    def costs(self) -> CostModel:
        raise AssertionError("the plan is made before")

    def remove(self, layer: str, units: Sequence[int]) -> None:
        self.log.append(("remove", layer, [self.scores[layer][u] for u in units]))
        for unit in sorted(units, reverse=True):
            del self.scores[layer][unit]

    def score(self, layer: str) -> Tensor:
        self.log.append(("score", layer, len(self.scores[layer])))
        return torch.tensor(self.scores[layer])


class FakeTuning(FineTune):
    """Takes no steps, but writes down how many it was asked for."""

    def __init__(self, log: list[Any], steps: int, every: str) -> None:
        super().__init__([(torch.zeros(1, 1), torch.zeros(1))], steps, every)
        self.log = log

    def run(self, model: nn.Module, steps: int, callback: Callback, phase: tuple[int, int] | None = None) -> None:
        if phase is not None:  # a piece of the one phase that has all the steps
            assert phase[1] == self.steps
            assert 0 <= phase[0] <= self.steps - steps
        self.log.append(("tune", steps))


def run(plan: dict[str, int], layers: dict[str, Sequence[float]], **options: Any) -> tuple[list[Any], History]:
    log: list[Any] = []
    host, history = FakeHost(log, **layers), History()
    if "finetune" in options:
        options["finetune"] = FakeTuning(log, *options["finetune"])
    progress = prune_layers(host, host.score, Progress(dict(plan)), callback=history, **options)
    assert progress.finished
    return log, history


LAYERS = {"a": [3.0, 1.0, 2.0, 5.0], "b": [9.0, 8.0, 7.0], "c": [0.5, 0.25, 4.0, 0.75, 6.0]}


def test_layers_in_order_the_least_goes_and_all_is_scored_again() -> None:
    log, history = run({"a": 2, "b": 0, "c": 1}, LAYERS)
    assert log == [
        ("score", "a", 4), ("remove", "a", [1.0]), ("score", "a", 3), ("remove", "a", [2.0]),
        ("score", "c", 5), ("remove", "c", [0.25]),
    ]  # fmt: skip
    assert history.removals() == {"a": [1, 2], "c": [1]}
    assert [row["event"] for row in history.rows] == [
        "run_start", *["layer_scored", "removed"] * 2, "layer_done", "layer_scored", "removed", "layer_done", "run_end",
    ]  # fmt: skip
    assert [(row["lowest"], row["highest"], row["units"]) for row in history.select("layer_scored")] == [
        (1.0, 5.0, 4), (2.0, 5.0, 3), (0.25, 6.0, 5),
    ]  # fmt: skip
    assert [row["left"] for row in history.select("removed")] == [3, 2, 4]


def test_scores_that_change_are_read_again() -> None:
    """After the first removal the order turns round; a loop that scored once would take unit 1 second."""
    log: list[Any] = []
    host = FakeHost(log, a=[1.0, 2.0, 3.0, 4.0])

    def scorer(layer: str) -> Tensor:
        values = torch.tensor(host.scores[layer])
        return values if len(values) == 4 else -values

    history = History()
    prune_layers(host, scorer, Progress({"a": 3}), callback=history)
    assert history.removals() == {"a": [0, 3, 2]}


@pytest.mark.parametrize(("units_per_step", "sizes"), [
    (1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (10, [5]), (0.25, [2, 2, 1]), (0.01, [1, 1, 1, 1, 1]), ("layer", [5]),
])  # fmt: skip
def test_units_per_step(units_per_step: Any, sizes: list[int]) -> None:
    values = [5.0, 3.0, 8.0, 1.0, 7.0, 2.0, 6.0, 4.0]
    log, history = run({"a": 5}, {"a": values}, units_per_step=units_per_step)
    assert [len(row["units"]) for row in history.select("removed")] == sizes
    assert [entry[0] for entry in log] == ["score", "remove"] * len(sizes)
    assert sorted(values[unit] for unit in history.removals()["a"]) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_original_numbers_are_kept_through_many_removals() -> None:
    torch.manual_seed(1)
    values = torch.randperm(40).tolist()
    for units_per_step in (1, 3, 0.2):
        _, history = run({"a": 31}, {"a": values}, units_per_step=units_per_step)
        removed = history.removals()["a"]
        assert len(set(removed)) == 31
        assert sorted(values[u] for u in removed) == list(range(31))
        if units_per_step == 1:
            assert [values[u] for u in removed] == list(range(31))


def test_equal_scores_go_in_the_order_of_the_units() -> None:
    _, history = run({"a": 3}, {"a": [2.0, 1.0, 1.0, 1.0]}, units_per_step=2)
    assert [row["units"] for row in history.select("removed")] == [[1, 2], [3]]


@pytest.mark.parametrize("bad", [0, -1, 1.0, 0.0, 1.5, "all", True, None])
def test_units_per_removal_refuses(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"units_per_step=.*whole number >= 1, a fraction inside \]0, 1\[ or 'layer'"):
        units_per_removal(bad, 8)


# --- fine-tuning in between -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_removal(steps: int) -> None:
    log, _ = run({"a": 2, "b": 0, "c": 3}, LAYERS, finetune=(steps, "removal"))
    kinds = [entry[0] for entry in log]
    assert kinds == ["score", "remove", "tune"] * 5
    shares = [entry[1] for entry in log if entry[0] == "tune"]
    assert sum(shares) == steps
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_removal_of_several_units(steps: int) -> None:
    log, _ = run({"a": 3, "c": 4}, LAYERS, finetune=(steps, "removal"), units_per_step=2)
    assert [entry[0] for entry in log] == ["score", "remove", "tune"] * 4  # 2 + 1 of a, 2 + 2 of c
    assert sum(entry[1] for entry in log if entry[0] == "tune") == steps


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_layer(steps: int) -> None:
    log, _ = run({"a": 2, "b": 1, "c": 0}, LAYERS, finetune=(steps, "layer"))
    assert [entry[0] for entry in log] == [*["score", "remove"] * 2, "tune", "score", "remove", "tune"]
    assert sum(entry[1] for entry in log if entry[0] == "tune") == steps


def test_fine_tuning_at_the_end_in_pieces_that_can_be_saved() -> None:
    saved: list[tuple[int, int]] = []
    log, _ = run(
        {"a": 1, "b": 1}, LAYERS, finetune=(450, "end"), checkpoint_steps=200,
        checkpoint=lambda p: saved.append((p.next_layer, p.end_done)),
    )  # fmt: skip
    assert [entry[0] for entry in log] == ["score", "remove", "score", "remove", "tune", "tune", "tune"]
    assert [entry[1] for entry in log if entry[0] == "tune"] == [200, 200, 50]
    assert saved == [(1, 0), (2, 0), (2, 200), (2, 400), (2, 450), (2, 450)]


@pytest.mark.parametrize("every", ["removal", "layer", "end"])
def test_continuing_from_any_checkpoint_does_the_rest(every: str) -> None:
    plan = {"a": 3, "b": 1, "c": 2}
    states: list[Progress] = []
    whole, _ = run(
        plan, LAYERS, finetune=(500, every), units_per_step=2, checkpoint=lambda p: states.append(copy.deepcopy(p))
    )
    for state in states[:-1]:
        log: list[Any] = []
        host = FakeHost(log, **LAYERS)
        for layer, units in state.removals:
            host.remove(layer, units)
        log.clear()
        tuning = FakeTuning(log, 500, every)
        done = prune_layers(host, host.score, state, units_per_step=2, finetune=tuning)
        assert log == whole[len(whole) - len(log) :]
        assert done.removals == states[-1].removals
        assert done.alive == states[-1].alive


# --- wrong scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "message"), [
    (torch.zeros(3), r"'a' has 4 units.*\(3,\)"), (torch.zeros(4, 1), r"'a' has 4 units.*\(4, 1\)"),
    (torch.tensor(1.0), r"'a' has 4 units.*\(\)"), ([1.0] * 4, r"'a' has 4 units.*list"),
    (torch.tensor([1.0, math.nan, 2.0, 3.0]), r"'a'.*NaN"),
])  # fmt: skip
def test_scores_that_do_not_fit(answer: Any, message: str) -> None:
    log: list[Any] = []
    with pytest.raises(ScoringError, match=message):
        prune_layers(FakeHost(log, **LAYERS), lambda layer: answer, Progress({"a": 2}))
    assert log == []


def test_every_callback_sees_every_event() -> None:
    log: list[Any] = []
    host, one, two = FakeHost(log, **LAYERS), History(), History()
    prune_layers(host, host.score, Progress({"a": 2}), callback=Callbacks([one, two]))
    assert one.rows == two.rows
    assert len(one.rows) == 2 + 4 + 1


# --- the same, written down once more ---------------------------------------------------------------------------

MU, STEPS = 0.7, 4


class Small(nn.Module):
    """Two convolutions with batch-norm and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def folded_parts(model: Small) -> dict[str, tuple[Tensor, Tensor]]:
    """The convolutions' weights and biases with their batch-norm multiplied in, by hand."""
    parts = {}
    for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = torch.zeros_like(norm.bias) if conv.bias is None else conv.bias
        shift = (bias - norm.running_mean) * factor + norm.bias
        parts["conv1" if conv is model.conv1 else "conv2"] = (
            (conv.weight * factor[:, None, None, None]).detach(), shift.detach(),
        )  # fmt: skip
    return parts


def plain_loss(parts: dict[str, tuple[Tensor, Tensor]], fc: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    for weight, bias in parts.values():
        x = torch.relu(functional.conv2d(x, weight, bias))
    return functional.cross_entropy(functional.linear(x.mean((2, 3)), fc.weight.detach(), fc.bias.detach()), y)


def literal_algorithm_1(model: Small, batch: tuple[Tensor, Tensor], rates: dict[str, int], path: str) -> Any:
    """Algorithm 1 by masks: nothing is ever cut, removed units are zero. Eq. 5 is a loop over s."""
    parts = folded_parts(model)
    removed: dict[str, list[int]] = {"conv1": [], "conv2": []}
    for layer, count in rates.items():
        while len(removed[layer]) < count:
            weight, bias = parts[layer]
            alive = [n for n in range(len(bias)) if n not in removed[layer]]
            relevance = dict.fromkeys(alive, 0.0)
            for n in alive if path == "neuron" else [None]:
                for s in range(STEPS + 1):
                    moved_w, moved_b = weight.clone(), bias.clone()
                    for k in alive if n is None else [n]:
                        moved_w[k] *= MU**s
                        moved_b[k] *= MU**s
                    moved_w.requires_grad_()
                    moved_b.requires_grad_()
                    plain_loss({**parts, layer: (moved_w, moved_b)}, model.fc, *batch).backward()
                    for k in alive if n is None else [n]:
                        w = torch.cat([moved_w.detach()[k].flatten(), moved_b.detach()[k, None]])
                        g = torch.cat([moved_w.grad[k].flatten(), moved_b.grad[k, None]])
                        relevance[k] += float(w.square().sum().sqrt() * g.square().sum().sqrt())
            least = min(alive, key=relevance.__getitem__)
            removed[layer].append(least)
            weight[least] = 0
            bias[least] = 0
            if layer == "conv1":  # what read the unit is no part of the next layer's weights any more
                parts["conv2"][0][:, least] = 0
    return removed


@pytest.mark.parametrize("path", ["layer", "neuron"])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_units_go_as_in_a_literal_implementation(path: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Small().double()
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    batch = (torch.randn(8, 2, 7, 7, dtype=torch.float64), torch.randint(0, 3, (8,)))
    expected = literal_algorithm_1(model, batch, {"conv1": 4, "conv2": 3}, path)
    importance = SInGEImportance("ig", mu=MU, steps=STEPS, quadrature="geometric", path=path).bind(model, [batch])
    pruner = SInGEPruner(
        model,
        batch[0][:2],
        importance,
        **asked(units_per_step=1, ratios={"conv1": 4 / 6, "conv2": 3 / 5}, verify=False),
    )
    # layer "fc" has no batch-norm in front of it, and writes the output
    assert pruner.run().history.removals() == expected
    assert (model.conv1.out_channels, model.conv2.out_channels) == (2, 2)
