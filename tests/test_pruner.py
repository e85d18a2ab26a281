"""``SInGEPruner.run``: the target is met, everything around the model survives, and failures leave no trace."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from singe_plugin.errors import BudgetError, ScoringError
from singe_plugin.integrations.torch_pruning import PruningOutcome, SInGEImportance, SInGEPruner
from singe_plugin.loop.costs import count_macs, count_params
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.shown import LogCallback, ProgressBar

from asked import asked
from small_nets import (
    Chain,
    Dense,
    Grouped,
    Residual,
    StopAt,
    Trace,
    assert_same_values,
    images,
    mlp,
    values_of,
    vectors,
)

BATCHES = images()
X = BATCHES[0][0][:2]
NETS = {"chain": Chain, "residual": Residual, "dense": lambda: Dense(12), "grouped": Grouped}
MAGNITUDE = tp.importance.MagnitudeImportance()


def bound(model: nn.Module, **options: Any) -> SInGEImportance:
    return SInGEImportance(nodes=2, **options).bind(model, BATCHES)


def widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def reached(outcome: PruningOutcome, kind: str) -> float:
    before, after = getattr(outcome, kind)
    return 1 - after / before


# --- the target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("net", NETS)
def test_the_target_is_met_within_one_point_and_the_counts_are_true(net: str, kind: str) -> None:
    model = NETS[net]()
    before = count_params(model), count_macs(model, X)
    outcome = SInGEPruner(model, X, bound(model), **asked(target=f"{kind}=0.4", units_per_step="layer")).run()
    assert abs(reached(outcome, kind) - 0.4) <= 0.01
    assert outcome.model is model
    assert (outcome.params[0], outcome.macs[0]) == before
    assert (outcome.params[1], outcome.macs[1]) == (sum(p.numel() for p in model.parameters()), count_macs(model, X))
    assert {k: len(v) for k, v in outcome.history.removals().items()} == {k: v for k, v in outcome.plan.items() if v}
    for x, y in BATCHES:
        nn.functional.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("ratios", ["uniform", "block", "global"])
def test_round_to(ratios: str) -> None:
    model = Chain(widths=(32, 32, 32))
    outcome = SInGEPruner(model, X, MAGNITUDE, **asked(target="params=0.5", ratios=ratios, round_to=4)).run()
    assert all(width % 4 == 0 for width in widths(model).values())
    assert abs(reached(outcome, "params") - 0.5) <= 0.01


def test_a_target_out_of_reach_changes_nothing() -> None:
    model = Residual()
    pruner = SInGEPruner(model, X, MAGNITUDE, **asked(target="params=0.5", round_to=8))
    trace, history = Trace(model), len(pruner.DG._pruning_history)
    with pytest.raises(BudgetError, match=r"nearest that these ratios reach is params=0\.\d{4}"):
        pruner.run()
    trace.assert_unchanged()
    assert len(pruner.DG._pruning_history) == history


def test_without_a_target_every_layer_loses_the_ratio() -> None:
    model = Chain()
    outcome = SInGEPruner(model, X, MAGNITUDE, **asked(ratios="uniform", pruning_ratio=0.25)).run()
    assert outcome.plan == {"conv1": 2, "conv2": 3, "conv3": 2}
    assert widths(model) == {"conv1": 6, "conv2": 9, "conv3": 6}


def test_pruning_ratio_dict_of_modules() -> None:
    model = Chain()
    SInGEPruner(
        model, X, MAGNITUDE, **asked(ratios="uniform", pruning_ratio=0.25, pruning_ratio_dict={model.conv2: 0.5})
    ).run()
    assert widths(model) == {"conv1": 6, "conv2": 6, "conv3": 6}


@pytest.mark.parametrize("key", ["name", "block", "module"])
def test_ratios_by_name_block_and_module(key: str) -> None:
    model = Residual()
    keys = {"name": "blocks.1.0", "block": "blocks.1", "module": model.blocks[1][0]}
    outcome = SInGEPruner(model, X, MAGNITUDE, **asked(ratios={keys[key]: 0.25})).run()
    assert outcome.plan == {"stem": 0, "blocks.0.0": 0, "blocks.1.0": 4}


def test_max_pruning_ratio_and_ignored_layers() -> None:
    model = Chain(widths=(20, 20, 20))
    pruner = SInGEPruner(
        model,
        X,
        MAGNITUDE,
        **asked(ratios="uniform", pruning_ratio=0.9, max_pruning_ratio=0.6, ignored_layers=[model.conv2]),
    )
    assert pruner.run().plan == {"conv1": 12, "conv3": 12}
    assert widths(model)["conv2"] == 20


# --- the order and the choice -----------------------------------------------------------------------------------


class Recorder(Callback):
    """The names of the events, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        for name in ("run_start", "layer_scored", "removed", "finetune_step", "layer_done", "run_end"):
            setattr(self, f"on_{name}", lambda event, name=name: self.seen.append((name, event)))


class Backwards(nn.Module):
    """Modules are registered in the opposite order of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.last, self.first = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.last(torch.relu(self.first(x)))))


def test_layers_are_pruned_in_forward_order() -> None:
    model, recorder = Backwards(), Recorder()
    pruner = SInGEPruner(
        model, torch.zeros(2, 4), MAGNITUDE, **asked(ratios="uniform", pruning_ratio=0.25, callbacks=[recorder],
        finetune=FineTune(vectors(), 2)),
    )  # fmt: skip
    pruner.run()
    assert [layer.name for layer in pruner.layers] == ["first", "last"]
    one = ["layer_scored", "removed", "layer_scored", "removed", "finetune_step", "layer_done"]
    assert [name for name, _ in recorder.seen] == ["run_start", *one, *one, "run_end"]
    assert [e.layer for n, e in recorder.seen if n == "removed"] == ["first", "first", "last", "last"]


def test_callbacks_hear_every_event_in_the_order_they_were_given() -> None:
    heard: list[tuple[int, str]] = []

    class Numbered(Callback):
        def __init__(self, number: int) -> None:
            self.on_removed = lambda event: heard.append((number, event.layer))  # type: ignore[method-assign]

    SInGEPruner(
        mlp(),
        torch.zeros(2, 4),
        MAGNITUDE,
        **asked(ratios={"0": 0.1}, callbacks=[Numbered(1), Numbered(2), ProgressBar()]),
    ).run()
    assert heard == [(1, "0"), (2, "0")] * 2


def test_the_log_has_one_line_per_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    before = count_params(model)
    with caplog.at_level("INFO", "singe_plugin"):
        SInGEPruner(
            model, torch.zeros(2, 4), MAGNITUDE, **asked(ratios="uniform", pruning_ratio=0.5, callbacks=[LogCallback()])
        ).run()
    assert caplog.messages[0] == "removing 16 units from 2 layers, 0 fine-tuning steps"
    left = count_params(model)
    assert [m.split(":")[0] for m in caplog.messages[1:]] == ["1/2 0 done", "2/2 2 done"]
    share = f"{100 * left / before:.1f} % of the parameters, 50.0 % of the units"
    assert caplog.messages[2] == f"2/2 2 done: {left} parameters left ({share})"


def test_the_smallest_norms_go_first() -> None:
    model = Chain()
    norms = model.conv1.weight.detach().flatten(1).norm(dim=1)
    expected = norms.argsort()[:3].tolist()
    imp = SInGEImportance("l2", group_reduction="first")
    model.bn1.running_var.fill_(1 - model.bn1.eps)  # an identity, so that folding leaves the norms as they are
    kept = [n for n in range(8) if n not in expected]
    weights = model.conv1.weight.detach().clone()
    outcome = SInGEPruner(model, X, imp, **asked(ratios={"conv1": 0.375})).run()
    assert outcome.history.removals() == {"conv1": expected}
    assert torch.equal(model.conv1.weight.detach(), weights[kept])


# --- other importances ------------------------------------------------------------------------------------------

OTHERS = {
    "random": tp.importance.RandomImportance,
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "bnscale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "obdc": lambda: tp.importance.OBDCImportance(num_classes=3),
    **({"fpgm": tp.importance.FPGMImportance} if hasattr(tp.importance, "FPGMImportance") else {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_importance_of_torch_pruning_stands_in(name: str) -> None:
    model = Chain()
    for norm in (model.bn1, model.bn2, model.bn3):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    model.conv1.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    outcome = SInGEPruner(
        model, X, OTHERS[name](), **asked(target="params=0.4", batches=BATCHES, units_per_step=0.5)
    ).run()
    assert abs(reached(outcome, "params") - 0.4) <= 0.01
    assert all(row["lowest"] < row["highest"] for row in outcome.history.select("layer_scored") if row["units"] > 1)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_taylor_removes_what_its_gradients_say() -> None:
    model = Chain().eval()
    for x, y in BATCHES:
        (nn.functional.cross_entropy(model(x), y) / len(BATCHES)).backward()
    products = (model.conv1.weight * model.conv1.weight.grad).abs().flatten(1).sum(1)
    expected = int(products.argmin())
    model.zero_grad(set_to_none=True)
    imp = tp.importance.GroupTaylorImportance(group_reduction="first", normalizer=None)
    outcome = SInGEPruner(model, X, imp, **asked(batches=BATCHES, ratios={"conv1": 0.125})).run()
    assert outcome.history.removals() == {"conv1": [expected]}


# --- what is left alone -----------------------------------------------------------------------------------------


def test_flags_modes_and_parameter_objects_survive() -> None:
    model = Chain()
    model.train()
    model.bn2.eval()
    for parameter in model.bn1.parameters():
        parameter.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    objects = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    tuning = FineTune(BATCHES, 3)
    SInGEPruner(model, X, bound(model), **asked(target="params=0.4", units_per_step="layer", finetune=tuning)).run()
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == objects
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def shared() -> nn.Sequential:
    """4 and 6 have one weight: what 2, 4 and 6 write is one group; 8 is the output."""
    widths = [4, 8, 8, 8, 8, 3]
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    layers[6].weight = layers[4].weight  # type: ignore[assignment]
    return nn.Sequential(*layers[:-1])


def test_what_is_left_whole_is_reported_with_the_reason() -> None:
    model = shared()
    pruner = SInGEPruner(model, torch.zeros(2, 4), MAGNITUDE, **asked(pruning_ratio=0.5, ratios="uniform"))
    outcome = pruner.run()
    assert outcome.left_whole == pruner.left_whole
    assert outcome.left_whole == {"8": "it reaches the model's output"}
    assert outcome.plan == {"0": 4, "2": 4}
    assert [model[i].out_features for i in (0, 2, 4, 6, 8)] == [4, 4, 4, 4, 3]
    assert model[4].weight is model[6].weight


class Averaged(nn.Module):
    """An exponential moving average, as timm's: a wrapper around a copy."""

    def __init__(self, model: nn.Module, decay: float = 0.5) -> None:
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            for mine, live in zip(self.module.parameters(), model.parameters(), strict=True):
                mine.lerp_(live, 1 - self.decay)


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9), lambda ps: torch.optim.Adam(ps, lr=0.001),
])  # fmt: skip
def test_optimizer_and_average_live_through_an_entwined_run(make: Any) -> None:
    model = Residual()
    optimizer, ema = make(model.parameters()), Averaged(model)
    for x, y in BATCHES:  # they have a past
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    tuning = FineTune(BATCHES, 6, "removal", optimizer=optimizer, ema=ema)
    pruner = SInGEPruner(model, X, bound(model), **asked(target="params=0.4", units_per_step=0.3, finetune=tuning))
    pruner.run()
    for parameter in model.parameters():
        buffers = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor) and v.ndim]
        assert buffers
        assert all(v.shape == parameter.shape for v in buffers)
    assert {n: p.shape for n, p in ema.module.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert ema.module(X).shape == (2, 3)
    assert pruner.tuner is not None
    assert pruner.tuner.done == 6


def test_momentum_is_cut_along_with_its_own_channel() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
    optimizer.step()
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    outcome = SInGEPruner(model, torch.zeros(2, 4), MAGNITUDE, optimizer=optimizer, **asked(ratios={"0": 0.5})).run()
    keep = [n for n in range(16) if n not in outcome.history.removals()["0"]]
    now = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    assert torch.equal(now["0.weight"], momentum["0.weight"][keep])
    assert torch.equal(now["0.bias"], momentum["0.bias"][keep])
    assert torch.equal(now["2.weight"], momentum["2.weight"][:, keep])
    assert torch.equal(now["4.weight"], momentum["4.weight"])


# --- failures ---------------------------------------------------------------------------------------------------


class Failing(tp.importance.Importance):  # type: ignore[misc]
    """Magnitudes, until the k-th layer that is scored."""

    def __init__(self, layer: int, error: BaseException) -> None:
        self.layer, self.error, self.seen = layer, error, list[Any]()

    def __call__(self, group: Any, **_: Any) -> torch.Tensor:
        root = group[0].dep.target.module
        if root not in self.seen:
            self.seen.append(root)
        if len(self.seen) == self.layer:
            raise self.error
        return MAGNITUDE(group)


ERRORS = {"error": ValueError("mine"), "interrupt": KeyboardInterrupt(), "exit": SystemExit(1)}
PLACES = [
    ("importance", 1, "interrupt"), ("importance", 3, "error"), ("removed", 1, "exit"), ("removed", 5, "interrupt"),
    ("finetune_step", 4, "error"), ("finetune_step", 8, "interrupt"), ("layer_done", 2, "error"),
    ("run_end", 1, "error"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "count", "error"), PLACES)
def test_a_failure_anywhere_is_rolled_back_and_a_second_run_works(place: str, count: int, error: str) -> None:
    model = Chain().train()
    model.bn3.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nn.functional.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ema = Averaged(model)
    failure = ERRORS[error]
    imp = Failing(count, failure) if place == "importance" else MAGNITUDE
    stop = [] if place == "importance" else [StopAt(place, count, failure)]
    tuning = FineTune(BATCHES, 9, optimizer=scheduler, ema=ema)
    pruner = SInGEPruner(
        model, X, imp, **asked(target="params=0.5", units_per_step=0.2, finetune=tuning, callbacks=stop)
    )
    trace, averages, graph = Trace(model, optimizer), values_of(ema), graph_of(pruner)
    rate = scheduler.state_dict()
    with pytest.raises(type(failure)) as caught:
        pruner.run()
    assert caught.value is failure  # the user's own exception, not one of ours around it
    trace.assert_unchanged(ignore=("rng",))
    assert_same_values(ema, averages)
    assert graph_of(pruner) == graph
    assert pruner.tuner is not None
    assert (pruner.tuner.done, scheduler.state_dict()) == (0, rate)

    again = copy.deepcopy(model)
    pruner.importance, pruner.callbacks = MAGNITUDE, []
    outcome = pruner.run()
    assert abs(reached(outcome, "params") - 0.5) <= 0.01
    # ... and does what a run that never failed does
    fresh = torch.optim.SGD(again.parameters(), lr=0.05, momentum=0.9)
    for mine, old in zip(again.parameters(), trace.states[0]["state"].values(), strict=True):
        fresh.state[mine] = copy.deepcopy(old)
    decay = torch.optim.lr_scheduler.StepLR(fresh, 2)
    other = FineTune(BATCHES, 9, optimizer=decay)
    SInGEPruner(again, X, MAGNITUDE, **asked(target="params=0.5", units_per_step=0.2, finetune=other)).run()
    assert_same_values(model, again)


def graph_of(pruner: SInGEPruner) -> Any:
    """The dependency graph in plain values: nodes, edges and history."""
    graph = pruner.DG
    nodes = {name: id(module) for module, name in graph._module2name.items()}
    edges = sorted((node.name, len(node.dependencies)) for node in graph.module2node.values())
    names = {name: id(parameter) for parameter, name in graph._param_to_name.items()}
    stand_ins = [
        (node.name, sorted((k, str(v)) for k, v in node.module.__dict__.items() if k in ("split_sizes", "offsets")))
        for node in graph.module2node.values()
        if isinstance(node.module, nn.Module)
    ]
    return nodes, edges, names, sorted(stand_ins), list(graph._pruning_history)


def test_the_graph_of_a_concat_is_rolled_back_too() -> None:
    model = Dense(12)
    pruner = SInGEPruner(model, X, Failing(3, ValueError("mine")), **asked(target="params=0.4", units_per_step="layer"))
    trace, graph = Trace(model), graph_of(pruner)
    with pytest.raises(ValueError, match="mine"):
        pruner.run()
    trace.assert_unchanged()
    assert graph_of(pruner) == graph
    pruner.importance = MAGNITUDE
    assert abs(reached(pruner.run(), "params") - 0.4) <= 0.01
    assert model(X).shape == (2, 3)


def test_scores_that_do_not_fit_are_refused_in_the_middle_of_a_run() -> None:
    class Short(tp.importance.Importance):  # type: ignore[misc]
        def __call__(self, group: Any, **_: Any) -> torch.Tensor:
            scores = MAGNITUDE(group)
            return scores[:-1] if group[0].dep.target.module is model.conv3 else scores

    model = Chain()
    trace = Trace(model)
    with pytest.raises(ScoringError, match=r"'conv3' has 8 channels.*\(7,\)"):
        SInGEPruner(model, X, Short(), target="params=0.5").run()
    trace.assert_unchanged()
