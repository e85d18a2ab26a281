"""Units removed in rounds over all layers: which go, how many, and that a run can be stopped in any round."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from click.testing import CliRunner
from test_prune import assert_same_run, entwined
from torch import Tensor, nn

from singe_plugin import Callback, Result, SingeError, prune
from singe_plugin.app.cli import main
from singe_plugin.app.inspection import inspect_model
from singe_plugin.errors import ConfigError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.budget import GroupSpec, plan_removals
from singe_plugin.loop.costs import CostModel, TensorCost, count_params
from singe_plugin.loop.target import Target

from asked import asked
from small_nets import Chain, Residual, StopAt, images

BATCHES = images(2)


class Norms:
    """A torch-pruning importance: the L2 norm of the rows of all producers, and how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, group: Any) -> Tensor:
        self.asked.append(group.axis_group.name)
        rows = [m.weight.detach().flatten(1) for m in group.axis_group.writers.values()]
        return sum(w.pow(2).sum(1) for w in rows) ** 0.5


def pruner_of(model: nn.Module, importance: Any = None, **options: Any) -> SInGEPruner:
    return SInGEPruner(model, BATCHES[0][0], importance or Norms(), **asked(batches=BATCHES, **options))


def scores_of(model: nn.Module) -> dict[str, list[float]]:
    """The norms, by hand."""
    return {
        name: m.weight.detach().double().flatten(1).norm(dim=1).tolist()
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


def cheapest(model: Chain, scores: dict[str, list[float]], kind: str, fraction: float) -> dict[str, int]:
    """Take units one by one, the lowest score per cost first (costs of the unpruned model), until the target is met."""
    widths = {name: len(values) for name, values in scores.items()}

    def size(kept: dict[str, int]) -> int:
        a, b, c = kept["conv1"], kept["conv2"], kept["conv3"]
        weights, macs = (2 * a * 9, a * b * 9, b * c), 36
        if kind == "macs":
            return macs * sum(weights) + 3 * c
        return sum(weights) + b + c + 2 * (a + b + c) + 3 * c + 3

    whole = size(widths)
    each = {n: whole - size({**widths, n: widths[n] - 1}) for n in widths}
    ranked = sorted((s / each[n], n) for n, values in scores.items() for s in sorted(values)[:-1])
    kept, gone = dict(widths), dict.fromkeys(widths, 0)
    for _, name in ranked:
        if 1 - size(kept) / whole >= fraction:
            break
        kept[name] -= 1
        gone[name] += 1
    return gone


# --- which go, and how many --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", ["uniform", "block", {"conv1": 0.25, "conv3": 0.5}])
def test_one_round_takes_the_lowest_of_the_intact_model(ratios: Any) -> None:
    model = Chain()
    scores = scores_of(model)
    target = None if isinstance(ratios, dict) else "params=0.4"
    plan = pruner_of(copy.deepcopy(model), ratios=ratios, target=target).plan()
    before = copy.deepcopy(model)
    pruner_of(model, ratios=ratios, target=target, order="rounds").run()
    for name, values in scores.items():
        order = sorted(range(len(values)), key=values.__getitem__)
        kept = sorted(order[plan[name] :])
        rows = before.get_submodule(name).weight[kept]
        # the inputs follow the layer in front
        assert model.get_submodule(name).out_channels == len(kept)
        found = model.get_submodule(name).weight
        assert found.flatten(1)[:, 0].shape == rows[:, 0, 0, 0].shape
        if name == "conv1":
            assert torch.equal(found, rows)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("seed", range(4))
def test_units_are_worth_their_score_per_cost(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Chain(widths=(32, 48, 32))
    for module, scale in zip((model.conv1, model.conv2, model.conv3), torch.rand(3).tolist(), strict=True):
        module.weight.data *= 0.5 + scale
    expected = cheapest(model, scores_of(model), kind, 0.4)
    counts = pruner_of(model, target=f"{kind}=0.4", ratios="per_cost").plan()
    # the plan may move single units to come nearer to the target; for multiply-adds, by less than two steps of width
    near = 2 if kind == "params" else 7
    assert max(abs(counts[name] - expected[name]) for name in expected) <= near
    assert abs(sum(counts.values()) - sum(expected.values())) <= near


def test_the_cost_of_a_unit_decides_between_equal_scores() -> None:
    layers = [GroupSpec("dear", 10, "a"), GroupSpec("cheap", 10, "b")]
    cost = CostModel(
        (TensorCost((10, 90), ((0, "dear", 1),), 0.0), TensorCost((10, 10), ((0, "cheap", 1),), 0.0)), 0, 0
    )
    scores = {"dear": torch.linspace(1, 2, 10), "cheap": torch.linspace(1, 2, 10)}
    assert plan_removals(layers, cost, Target("params", 0.45), "per_cost", scores=scores) == {"dear": 5, "cheap": 0}
    assert plan_removals(layers, cost, Target("params", 0.5), "global", scores=scores) == {"dear": 5, "cheap": 5}


@pytest.mark.parametrize("ratios", ["global", "per_cost", "uniform", "block"])
@pytest.mark.parametrize("course", ["linear", "cubic"])
@pytest.mark.parametrize("target", ["params=0.5", "macs=0.5"])
def test_every_round_scores_the_model_as_it_is_and_the_target_is_met(ratios: str, course: str, target: str) -> None:
    model, importance = Residual(96, 512), Norms()  # units so small that the last round of the cubic course has some
    pruner = pruner_of(model, importance, ratios=ratios, target=target, order="rounds", rounds=4, course=course)
    sizes, layers = [count_params(model)], [group.name for group in pruner.layers]
    importance.asked.clear()

    class Rounds(Callback):
        def on_round_done(self, event: Any) -> None:
            sizes.append(count_params(model))

    pruner.callbacks.append(Rounds())
    outcome = pruner.run()
    assert importance.asked[-4 * len(layers) :] == layers * 4
    before, after = outcome.params if target.startswith("params") else outcome.macs
    assert abs(1 - after / before - 0.5) <= 0.01
    gone = [1 - size / sizes[0] for size in sizes]
    assert gone == sorted(gone)
    assert gone[1] < gone[-1]
    if target == "params=0.5" and ratios in ("global", "per_cost"):
        shares = [1 - (1 - r / 4) ** 3 if course == "cubic" else r / 4 for r in range(5)]
        assert gone == pytest.approx([0.5 * share for share in shares], abs=0.02)
    model(BATCHES[0][0])


def test_a_ratio_of_the_units_without_a_target() -> None:
    model = Residual(16, 32)
    pruner = pruner_of(model, ratios="global", pruning_ratio=0.5, order="rounds", rounds=3)
    units = sum(group.size for group in pruner.layers)
    assert sum(pruner.run().plan.values()) == units // 2


def test_the_largest_ratio_counts_from_the_unpruned_layer() -> None:
    model = Chain(widths=(16, 16, 16))
    model.conv1.weight.data *= 1e-3  # would go first
    pruner = pruner_of(
        model, ratios="per_cost", target="params=0.5", order="rounds", rounds=5, course="linear",
        max_pruning_ratio=0.5,
    )  # fmt: skip
    pruner.run()
    assert model.conv1.out_channels == 8
    assert min(model.conv2.out_channels, model.conv3.out_channels) >= 8


@pytest.mark.parametrize("kind", ["taylor", "hessian", "obdc"])
def test_gradients_are_computed_once_a_round_and_are_those_of_every_layer_alone(kind: str) -> None:
    importance = {
        "taylor": tp.importance.TaylorImportance, "hessian": tp.importance.HessianImportance,
        "obdc": lambda: tp.importance.OBDCImportance(num_classes=3),
    }[kind]  # fmt: skip
    model, passes, scored = Chain(), [], {}
    alone = pruner_of(copy.deepcopy(model), importance(), target="params=0.4")
    host = alone.host()
    expected = {spec.name: host.score([spec.name])[spec.name] for spec in host.layers()}

    class First(Callback):
        def on_layer_scored(self, event: Any) -> None:
            scored.setdefault(event.layer, torch.as_tensor(event.scores))

        def on_removed(self, event: Any) -> None:
            passes.append(0)

    pruner = pruner_of(
        model, importance(), target="params=0.4", ratios="block", order="rounds", rounds=2, callbacks=[First()]
    )
    counting = model.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    pruner.run()
    counting.remove()
    assert {n: s.tolist() for n, s in scored.items()} == {n: pytest.approx(s.tolist()) for n, s in expected.items()}
    assert sum(passes) == 2 * len(BATCHES)


@pytest.mark.parametrize("order", ["rounds", "layers"])
def test_an_importance_of_torch_pruning_that_fails_is_named(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp.importance.FPGMImportance, "_normalize", lambda *a: [][1])
    model = Chain()
    with pytest.raises(SingeError, match=r"layer 'conv1': .*FPGM.*IndexError.*put the layer in ignored_layers"):
        pruner_of(model, tp.importance.FPGMImportance(), target="params=0.4", order=order).run()
    assert model.conv1.out_channels == 8


# --- a whole run -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"order": "rounds", "rounds": 3, "units_per_step": None}


@pytest.mark.parametrize("ratios", ["block", "per_cost"])
@pytest.mark.parametrize("stop", [("round_done", 1), ("round_done", 2), ("finetune_step", 5), ("removed", 5)])
def test_interrupted_in_a_round_and_resumed(ratios: str, stop: tuple[str, int], tmp_path: Path) -> None:
    def run(folder: Path | None, **options: Any) -> Result:
        torch.manual_seed(0)
        return entwined(Chain(dropout=0.5), folder, ratios=ratios, **OPTIONS, **options)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[StopAt(*stop)])
    resumed, whole = run(tmp_path, resume=True), run(None)
    assert_same_run(resumed, whole)
    assert whole.removed_params == pytest.approx(0.5, abs=0.01)
    assert [e["event"] for e in whole.history.rows].count("round_done") == 3


def test_a_failed_round_undoes_all_of_them() -> None:
    model = Chain()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="enough"):
        prune(model, BATCHES, **asked(verify=False, nodes=2, finetune_steps=6, order="rounds", rounds=3,
              callbacks=[StopAt("round_done", 2, RuntimeError("enough"))]))  # fmt: skip
    after = model.state_dict()
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_the_order_decides_ratios_and_rounds_that_are_not_given() -> None:
    def same(given: dict[str, Any], meant: dict[str, Any]) -> None:
        net = Chain()
        results = [
            prune(copy.deepcopy(net), BATCHES, **asked(nodes=2, finetune_steps=0, verify=False, **how))
            for how in (given, meant)
        ]
        assert_same_run(*results)
        assert all(results[0].options["pace"][name] == value for name, value in meant.items())

    same({"order": "rounds"}, {"order": "rounds", "ratios": "per_cost", "rounds": 4})
    same({"order": "rounds", "ratios": "global"}, {"order": "rounds", "ratios": "global", "rounds": 4})
    same({"order": "layers"}, {"order": "layers", "ratios": "block", "rounds": 1})
    same({}, {"order": "rounds"})
    same({"units_per_step": 0.2}, {"order": "layers", "units_per_step": 0.2})


def test_inspect_counts_with_the_ratios_and_rounds_of_the_order() -> None:
    def cost(**how: Any) -> Any:
        return inspect_model(Chain(), BATCHES[0][0], **asked(target="params=0.4", finetune_steps=0, **how)).cost

    assert cost(order="rounds") == cost(order="rounds", ratios="per_cost", rounds=4) is not None
    assert cost(order="layers") == cost(order="layers", ratios="block") != cost()


@pytest.mark.parametrize(
    "wrong", [{"order": "both"}, {"rounds": 0}, {"rounds": 2.0}, {"course": "fast"}, {"ratios": "per_mac"}]
)
def test_options_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        pruner_of(Chain(), **{"order": "rounds", **wrong})


def test_a_point_is_one_of_the_whole_and_not_of_what_is_left() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        result = prune(Chain(), BATCHES, **asked(nodes=1, finetune_steps=0, verify=False, order="rounds", rounds=3,
                       target="params=0.4", min_width=1))  # fmt: skip
        assert result.removed_params == pytest.approx(0.4, abs=0.01)


def test_what_only_the_other_order_has_is_refused() -> None:
    for wrong, said in (
        ({"order": "rounds", "units_per_step": 1}, "units_per_step=1 is for order='layers'"),
        ({"order": "layers", "rounds": 4}, "rounds=4 is for order='rounds'"),
        ({"units_per_step": 1, "rounds": 2}, "rounds=2 is for order='rounds'"),
    ):
        with pytest.raises(ConfigError, match=said):
            prune(Chain(), BATCHES, **asked(**wrong))
        with pytest.raises(ConfigError, match=said):
            inspect_model(Chain(), BATCHES[0][0], **asked(**wrong))
    with pytest.raises(ConfigError, match="rounds=4 is for order='rounds'"):
        pruner_of(Chain(), order="layers", rounds=4)


@pytest.mark.parametrize("rounds", [4, 6])
@pytest.mark.parametrize("net", [Chain, Residual])
def test_whole_units_of_a_small_network_meet_the_target_in_rounds(net: Any, rounds: int) -> None:
    for target in (0.3, 0.45, 0.5, 0.7):
        torch.manual_seed(0)
        result = prune(net(), BATCHES, **asked(criterion="l2", finetune_steps=0, verify=False, rounds=rounds,
                       target=f"params={target}", min_width=1))  # fmt: skip
        assert result.removed_params == pytest.approx(target, abs=0.01)


def test_a_target_out_of_reach_is_refused_before_anything_is_removed() -> None:
    model = Chain()
    pruner = pruner_of(model, ratios="per_cost", target="params=0.9", order="rounds", rounds=3, max_pruning_ratio=0.2)
    with pytest.raises(SingeError, match="cannot be met within one point"):
        pruner.run()
    assert [m.out_channels for m in (model.conv1, model.conv2, model.conv3)] == [8, 12, 8]


def test_the_command(tmp_path: Path) -> None:
    options = {"model": "resnet10t", "model-kwargs": "channels=[16, 24, 32, 48]", "img-size": 32, "num-classes": 10,
               "in-chans": 1, "dataset": "digits",
               "target": "params=0.3", "order": "rounds", "rounds": 2, "finetune-steps": 0, "scoring-batches": 3,
               "criterion": "l2", "output": tmp_path}  # fmt: skip
    words = ["prune", "--no-curves", "--json", *(f"--{name}={value}" for name, value in options.items())]
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 0, found.output
    used = json.loads(found.stdout)["options"]
    assert [used["pace"][name] for name in ("order", "rounds", "ratios")] == ["rounds", 2, "per_cost"]
    assert used["scoring"]["batches"] == 3


@pytest.mark.parametrize(
    ("given", "nodes", "count"),
    [({"criterion": "ig"}, 1, 4), ({"order": "layers"}, 5, 1), ({"units_per_step": 2}, 5, 1),
     ({"criterion": "ig", "nodes": 3}, 3, 4), ({"criterion": "ig", "batches": 2}, 1, 2)],
)  # fmt: skip
def test_what_scoring_reads_by_default(given: dict[str, Any], nodes: int, count: int) -> None:
    """By the passes that are made: one for every node, batch and scoring of a layer.

    Where layers go one after the other, one more says before the first whether F depends on all of them.
    """
    batches = images(6)
    model, passes = Chain(), []
    model.conv3.register_forward_hook(lambda _, __, output: passes.append(1) if output.requires_grad else None)
    result = prune(model, batches, **asked(target="params=0.3", finetune_steps=0, verify=False, min_width=1, **given))
    scorings = len(result.history.select("layer_scored"))
    first = 0 if result.options["pace"]["order"] == "rounds" else 1
    assert sum(passes) - first == nodes * count * scorings > 0
    assert (result.options["scoring"]["nodes"], result.options["scoring"]["batches"]) == (nodes, count)
    found = inspect_model(Chain(), batches[0][0], **asked(target="params=0.3", finetune_steps=0, **given))
    assert found.cost is not None
    assert found.cost.scoring_passes == nodes * count * found.cost.scorings


@pytest.mark.parametrize(("given", "count"), [({}, 4), ({"batches": 2}, 2), ({"criterion": "obs", "batches": 1}, 1)])
def test_where_survivors_take_over_all_layers_are_scored_together(given: dict[str, Any], count: int) -> None:
    """One pass with gradients for every batch and round."""
    batches = images(6)
    model, passes = Chain(), []
    model.conv3.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
    result = prune(model, batches, **asked(target="params=0.3", finetune_steps=0, verify=False, min_width=1, **given))
    assert result.options["scoring"]["criterion"] == "obs"
    rounds = len(result.history.select("layer_scored")) / len(result.layers)
    assert sum(passes) == count * rounds == count * result.options["pace"]["rounds"]
    found = inspect_model(Chain(), batches[0][0], **asked(target="params=0.3", finetune_steps=0, **given))
    assert found.cost is not None
    assert (found.cost.scorings, found.cost.scoring_passes) == (rounds, sum(passes))


def test_the_command_scores_as_the_library_does() -> None:
    for words, per_scoring in (([], 4), (["--order", "layers"], 5), (["--criterion", "ig", "--nodes", "2"], 8),
                               (["--scoring-batches", "3"], 3)):  # fmt: skip
        found = CliRunner().invoke(main, ["inspect", "--model", "resnet10t", "--img-size", "32", "--json", *words])
        assert found.exit_code == 0, found.output
        cost = json.loads(found.stdout)["cost"]
        assert cost["scoring_passes"] == per_scoring * cost["scorings"]


def test_what_is_inspected_is_plain_values() -> None:
    """Ratios may be given by module; what is shown of them has names."""
    net = Chain()
    found = inspect_model(net, BATCHES[0][0], **asked(target=None, ratios={net.conv2: 0.5}, finetune_steps=0))
    shown = json.loads(json.dumps(found.as_dict()))
    assert shown["options"]["pace"]["ratios"] == {"conv2": 0.5}
    assert shown["cost"]["units_removed"] == net.conv2.out_channels // 2
