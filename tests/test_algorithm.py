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

from singe_plugin.errors import ConfigError, ScoringError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.events import Callback, Callbacks, History
from singe_plugin.loop.loop import Loop
from singe_plugin.loop.pace import Pace, units_per_turn
from singe_plugin.loop.progress import Progress
from singe_plugin.loop.turns import in_layers

from asked import asked
from memory_host import MemoryHost, MemoryTuner, RepairingHost


def run(
    plan: dict[str, int],
    layers: dict[str, Sequence[float]],
    units_per_step: Any = 1,
    finetune: Any = None,
    **options: Any,
) -> tuple[list[Any], History]:
    log: list[Any] = []
    history = History()
    tuner = None if finetune is None else MemoryTuner(log, *finetune)
    progress = taken(MemoryHost(log, **layers), Progress(dict(plan)), units_per_step, tuner, history, **options)
    assert progress.finished
    return log, history


def taken(
    host: Any, progress: Progress, units_per_step: Any = 1, tuner: Any = None, callback: Any = None, **options: Any
) -> Progress:
    loop = Loop(host, progress, None if tuner is None else tuner.options, callback, **options)
    return loop.run(in_layers(loop, Pace("layers", units_per_step=units_per_step)), tuner)


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

    class Turning(MemoryHost):
        def score(self, layers: Sequence[str]) -> dict[str, Tensor]:
            return {k: v if len(v) == 4 else -v for k, v in super().score(layers).items()}

    history = History()
    taken(Turning(a=[1.0, 2.0, 3.0, 4.0]), Progress({"a": 3}), callback=history)
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
def test_units_per_turn_refuses(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"units_per_step=.*whole number >= 1, a fraction inside \]0, 1\[ or 'layer'"):
        units_per_turn(bad, 8)


# --- fine-tuning in between -------------------------------------------------------------------------------------


def kinds_of(log: list[Any]) -> list[str]:
    return [entry[0] for entry in log]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_removal(steps: int) -> None:
    log, _ = run({"a": 2, "b": 0, "c": 3}, LAYERS, finetune=(steps, "removal"))
    shares = [(i + 1) * steps // 5 - i * steps // 5 for i in range(5)]
    assert kinds_of(log) == [kind for share in shares for kind in ["score", "remove", *["tune"] * (share > 0)]]
    assert [entry[1] for entry in log if entry[0] == "tune"] == [share for share in shares if share]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_removal_of_several_units(steps: int) -> None:
    log, _ = run({"a": 3, "c": 4}, LAYERS, finetune=(steps, "removal"), units_per_step=2)
    shares = [(i + 1) * steps // 4 - i * steps // 4 for i in range(4)]  # 2 + 1 of a, 2 + 2 of c
    assert kinds_of(log) == [kind for share in shares for kind in ["score", "remove", *["tune"] * (share > 0)]]
    assert sum(entry[1] for entry in log if entry[0] == "tune") == steps


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100])
def test_fine_tuning_after_every_layer(steps: int) -> None:
    log, _ = run({"a": 2, "b": 1, "c": 0}, LAYERS, finetune=(steps, "layer"))
    first, second = (["tune"] * (share > 0) for share in (steps // 2, steps - steps // 2))
    assert kinds_of(log) == [*["score", "remove"] * 2, *first, "score", "remove", *second]
    assert sum(entry[1] for entry in log if entry[0] == "tune") == steps


def test_fine_tuning_at_the_end_in_pieces_that_can_be_saved() -> None:
    saved: list[tuple[int, int]] = []
    log, _ = run(
        {"a": 1, "b": 1}, LAYERS, finetune=(450, "end"), save_steps=200,
        save=lambda p: saved.append((p.next_layer, p.end_done)),
    )  # fmt: skip
    assert [entry[0] for entry in log] == ["score", "remove", "score", "remove", "tune", "tune", "tune"]
    assert [entry[1] for entry in log if entry[0] == "tune"] == [200, 200, 50]
    assert saved == [(1, 0), (2, 0), (2, 200), (2, 400), (2, 450), (2, 450)]


@pytest.mark.parametrize("every", ["removal", "layer", "end"])
def test_continuing_from_any_checkpoint_does_the_rest(every: str) -> None:
    plan = {"a": 3, "b": 1, "c": 2}
    states: list[Progress] = []
    whole, _ = run(
        plan, LAYERS, finetune=(500, every), units_per_step=2, save=lambda p: states.append(copy.deepcopy(p))
    )
    for state in states[:-1]:
        log: list[Any] = []
        host = MemoryHost(log, **LAYERS)
        for layer, units in state.removals:
            host.remove(layer, units)
        log.clear()
        done = taken(host, state, 2, MemoryTuner(log, 500, every))
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

    class Wrong(MemoryHost):
        def score(self, layers: Sequence[str]) -> Any:
            return dict.fromkeys(layers, answer)

    with pytest.raises(ScoringError, match=message):
        taken(Wrong(log, **LAYERS), Progress({"a": 2}))
    assert log == []


def test_every_callback_sees_every_event() -> None:
    one, two = History(), History()
    taken(MemoryHost(**LAYERS), Progress({"a": 2}), callback=Callbacks([one, two]))
    assert one.rows == two.rows
    assert len(one.rows) == 2 + 4 + 1


def test_a_host_that_can_repairs_after_every_layer_before_fine_tuning() -> None:
    log: list[Any] = []
    host = RepairingHost(log, a=[3.0, 1.0, 2.0], b=[5.0, 4.0])
    taken(host, Progress({"a": 2, "b": 1}), tuner=MemoryTuner(log, 6, "removal"))
    last = ["score", "remove", "repair", "tune"]  # of a layer
    assert kinds_of(log) == ["score", "remove", "tune", *last, *last]
    assert [entry[1:] for entry in log if entry[0] == "repair"] == [(3, False), (2, True)]


def test_a_callback_gets_the_model_and_may_act_before_fine_tuning() -> None:
    class Act(Callback):
        def on_model(self, model: nn.Module) -> None:
            self.model: Any = model

        def on_removed(self, event: Any) -> None:
            log.append(("act", event.layer))
            torch.nn.init.zeros_(self.model.weight)

    log: list[Any] = []
    host = MemoryHost(log, a=[3.0, 1.0, 2.0])
    taken(host, Progress({"a": 2}), tuner=MemoryTuner(log, 4, "removal"), callback=Callbacks([Act()]))
    assert kinds_of(log) == ["score", "remove", "act", "tune"] * 2
    assert not host.model.weight.any()


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
