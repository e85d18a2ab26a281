"""``pace="layers"``: Algorithm 1 inside the evaluator's own training loop."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, LinearPruner

from singe_plugin.errors import ConfigError, DataError
from singe_plugin.integrations.nni import SInGEPruner
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune, phase_share

from asked import asked
from nni_nets import BATCHES, Loop, channel_masks, evaluator_of, make_net, nni_asked
from small_nets import Residual, images

pytestmark = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # NNI overrides it
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
COUNTS = {"conv1": 4, "conv2": 5, "conv3": 3}  # of 8, 10 and 6 channels


def entwined(model: nn.Module, config: Any = HALF, loop: Loop | None = None, **options: Any) -> SInGEPruner:
    rates = {key: options.pop(key) for key in ("lr", "decay") if key in options}
    options = {"training_steps": 7, "nodes": 2, "units_per_step": 2, **options}
    return SInGEPruner(model, config, evaluator_of(model, loop, **rates), **nni_asked(order="layers", **options))


def masked(pruner: SInGEPruner) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in sorted(channel_masks(pruner.get_masks()).items())}


def kinds(history: Any) -> list[tuple[str, Any, Any]]:
    """What happened, without numbers that depend on the training."""
    return [
        (row["event"], row.get("layer"), row.get("left", row.get("units", row.get("step")))) for row in history.rows
    ]


class Watch(Callback):
    """Keeps the scores and what was removed; checks that it was the least of them."""

    def __init__(self) -> None:
        self.scores: Any = None
        self.alive: dict[str, list[int]] = {}
        self.removals = 0

    def on_layer_scored(self, event: Any) -> None:
        self.scores = event.scores

    def on_removed(self, event: Any) -> None:
        alive = self.alive.setdefault(event.layer, list(range(len(self.scores))))
        least = sorted(alive[i] for i in self.scores.argsort(stable=True)[: len(event.units)].tolist())
        assert list(event.units) == least
        assert len(self.scores) == len(alive)
        self.alive[event.layer] = [unit for unit in alive if unit not in least]
        self.removals += 1


@pytest.mark.parametrize("units_per_step", [1, 0.25, "layer"])
@pytest.mark.parametrize("every", ["removal", "layer", "end"])
def test_layer_by_layer_in_forward_order_with_all_the_steps_and_the_planned_counts(
    every: str, units_per_step: Any
) -> None:
    model, loop, watch = make_net("chain"), Loop(), Watch()
    pruner = entwined(model, loop=loop, every=every, units_per_step=units_per_step, callbacks=[watch])
    _, masks = pruner.compress()
    assert masked(pruner) == COUNTS | {"bn1": 4, "bn2": 5, "bn3": 3}
    rows = pruner.history.rows
    assert rows[0]["event"] == "run_start"
    assert rows[0]["plan"] == COUNTS
    assert rows[0]["finetune_steps"] == 6
    assert rows[-1]["event"] == "run_end"
    assert [row["layer"] for row in pruner.history.select("layer_done")] == ["conv1", "conv2", "conv3"]
    order = [row["layer"] for row in pruner.history.select("removed")]
    assert order == sorted(order)
    assert {layer: len(units) for layer, units in pruner.history.removals().items()} == COUNTS
    for layer, units in pruner.history.removals().items():
        assert (~channel_masks(masks)[layer]).nonzero().flatten().tolist() == sorted(units)
    assert [row["step"] for row in pruner.history.select("finetune_step")] == [1, 2, 3, 4, 5, 6]
    assert loop.steps == 7
    chunk = {1: dict.fromkeys(COUNTS, 1), 0.25: {"conv1": 2, "conv2": 2, "conv3": 2}, "layer": COUNTS}[units_per_step]
    removals = [-(-COUNTS[name] // chunk[name]) for name in COUNTS]
    assert watch.removals == len(pruner.history.select("layer_scored")) == sum(removals)
    assert steps_after_each_removal(rows) == expected_steps(every, removals)


def steps_after_each_removal(rows: list[dict[str, Any]]) -> list[int]:
    found: list[int] = []
    for row in rows:
        if row["event"] == "removed":
            found.append(0)
        elif row["event"] == "finetune_step":
            found[-1] += 1
    return found


def expected_steps(every: str, removals: list[int]) -> list[int]:
    if every == "removal":
        return [phase_share(6, i, sum(removals)) for i in range(sum(removals))]
    last = [phase_share(6, i, 3) for i in range(3)] if every == "layer" else [0, 0, 6]
    return [steps if n == count - 1 else 0 for count, steps in zip(removals, last, strict=True) for n in range(count)]


@pytest.mark.parametrize("every", ["removal", "layer", "end"])
def test_events_are_those_of_the_pruner_of_torch_pruning(every: str) -> None:
    model = Residual()
    other = copy.deepcopy(model)
    batches = images()
    loop = Loop(batches)
    pruner = entwined(model, loop=loop, every=every, units_per_step=3)
    pruner.compress()
    importance = tp.importance.SInGEImportance(nodes=2).bind(other, batches[:1])
    physical = tp.pruner.SInGEPruner(
        other, batches[0][0], importance, **asked(pruning_ratio=0.5, ratios="uniform", units_per_step=3,
        finetune=FineTune(batches, 6, every)),
    )  # fmt: skip
    outcome = physical.run()
    assert kinds(pruner.history) == kinds(outcome.history)
    assert pruner.history.rows[0] == outcome.history.rows[0]
    fields = [set(row) - {"shares"} for row in outcome.history.rows]  # masks leave all parameters where they are
    assert [set(row) for row in pruner.history.rows] == fields


def test_optimizer_momentum_and_scheduler_live_through_the_whole_run() -> None:
    model, loop = make_net("chain"), Loop()
    pruner = entwined(model, loop=loop, lr=0.1, decay=0.9)
    pruner.compress(9, None)
    assert len({id(optimizer) for optimizer in loop.optimizers}) == 1
    assert loop.steps == 9
    assert loop.rates == pytest.approx([0.1 * 0.9**i for i in range(9)])
    parameters = len(list(model.parameters()))
    assert loop.momenta == [parameters] * 9  # every parameter has its buffer from the first step on
    rates = [row["lr"] for row in pruner.history.select("finetune_step")]
    assert rates == pytest.approx([0.1 * 0.9**i for i in range(1, 7)])


def test_training_is_that_of_the_same_loop_with_the_same_masks() -> None:
    """Weights after a run are those of a plain loop that multiplies the masks in at the same steps."""
    model = make_net("chain")
    plain = copy.deepcopy(model)
    pruner = entwined(model, every="end", units_per_step="layer", training_steps=4)
    _, masks = pruner.compress()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    plain.train()
    for number in range(4):
        optimizer.zero_grad()
        x, y = BATCHES[number % 3]
        held = {
            f"{name}.{target}": plain.get_parameter(f"{name}.{target}") * (mask if number else 1)
            for name, targets in masks.items() for target, mask in targets.items() if mask is not None
        }  # fmt: skip
        nn.functional.cross_entropy(torch.func.functional_call(plain, held, (x,)), y).backward()
        optimizer.step()
    pruner.unwrap_model()
    for name, expected in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), expected)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_loop_that_ends_early_reaches_the_sparsity_with_a_warning(
    stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    pruner = entwined(make_net("chain"), loop=Loop(stop=stop))
    pruner.compress()
    assert masked(pruner) == COUNTS | {"bn1": 4, "bn2": 5, "bn3": 3}
    assert f"the training loop ended after {stop - 1} of 6 steps" in caplog.text
    assert pruner.history.rows[-1]["event"] == "run_end"
    assert len(pruner.history.select("finetune_step")) == stop - 1


def test_a_loop_without_a_single_step_is_an_error() -> None:
    with pytest.raises(DataError, match="no batch has been seen"):
        entwined(make_net("chain"), loop=Loop(stop=0)).compress()


def test_a_loop_that_goes_on_keeps_the_masks_and_a_short_one_is_refused() -> None:
    model = make_net("chain")
    pruner = entwined(model)
    with pytest.raises(ConfigError, match="max_steps=6, but pruning is entwined with training_steps=7"):
        pruner.compress(6, None)
    _, masks = pruner.compress(None, 4)
    assert {name: masked(pruner)[name] for name in COUNTS} == COUNTS
    assert len(pruner.history.select("finetune_step")) == 6
    assert pruner.history.rows[-1]["event"] == "run_end"
    out = model.bn1.train()(torch.randn(4, 8, 3, 3))
    assert torch.equal(out.abs().amax((0, 2, 3)) > 0, masks["bn1"]["weight"].bool())


@pytest.mark.parametrize("config", [
    [{"op_types": ["Conv2d"], "sparse_ratio": 0.4, "global_group_id": 1}],
    [{"op_types": ["Conv2d"], "sparse_threshold": 1.0, "min_sparse_ratio": 0.2, "max_sparse_ratio": 0.6}],
])  # fmt: skip
def test_global_ratios_and_thresholds_become_a_plan_by_the_first_scores(config: Any) -> None:
    model = make_net("chain")
    pruner = entwined(model, config, lr=0.0, units_per_step="layer")
    pruner.compress()
    assert pruner.history.rows[0]["event"] == "run_start"
    plan = pruner.history.rows[0]["plan"]
    assert {name: masked(pruner)[name] for name in COUNTS} == plan
    assert sum(plan.values()) > 0
    model = make_net("chain").train()
    model(BATCHES[0][0])  # the statistics that the first step has left
    once = SInGEPruner(model, config, **asked(batches=BATCHES[:1], nodes=2))
    once.compress()
    assert {name: masked(once)[name] for name in COUNTS} == plan


def test_fused_with_a_distiller_and_over_coupled_layers() -> None:
    model = Residual()
    batches = images()
    teacher = Residual()
    distiller = DynamicLayerwiseDistiller(
        model, [{"op_names": ["fc"], "lambda": 0.5, "apply_method": "kl"}], evaluator_of(model, Loop(batches)), teacher,
        lambda batch, net: net(batch[0]),
    )  # fmt: skip
    pruner = SInGEPruner.from_compressor(
        distiller, HALF, 5, **nni_asked(order="layers", nodes=1, units_per_step="layer", every="layer")
    )
    _, masks = pruner.compress(5, None)
    kept = channel_masks(masks)
    assert torch.equal(kept["stem"], kept["blocks.0.3"])
    assert torch.equal(kept["stem"], kept["blocks.1.3"])
    assert {name: int(mask.sum()) for name, mask in kept.items() if "0.0" in name or name == "stem"} == {
        "stem": 4, "blocks.0.0": 8,
    }  # fmt: skip
    assert [row["layer"] for row in pruner.history.select("layer_done")] == ["stem", "blocks.0.0", "blocks.1.0"]
    assert len(pruner.history.select("finetune_step")) == 4


def test_what_is_masked_stays_masked_all_the_way() -> None:
    model = make_net("chain")
    seen: list[dict[str, Any]] = []

    class Look(Callback):
        def on_finetune_step(self, event: Any) -> None:
            seen.append(channel_masks(pruner.get_masks()))

    pruner = entwined(model, every="removal", units_per_step=1, training_steps=12, callbacks=[Look()])
    pruner.compress()
    assert len(seen) == 11
    totals = [sum(int(mask.sum()) for mask in masks.values()) for masks in seen]
    assert len(set(totals)) > 8
    assert totals == sorted(totals, reverse=True)
    for before, after in itertools.pairwise(seen):
        assert all(bool((before[name] | ~after[name]).all()) for name in before)


@pytest.mark.parametrize("kind", [AGPPruner, LinearPruner])
def test_it_cannot_be_scheduled_twice(kind: Any) -> None:
    with pytest.raises(ConfigError, match="a pruner with a pace prunes by a schedule of its own"):
        kind(entwined(make_net("chain")), 3, 2)
