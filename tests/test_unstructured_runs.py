"""``UnstructuredPruner``: masks held in training, no trace of scoring, failures rolled back, errors that help."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from singe_plugin import FineTune, Scoring, UnstructuredPruner, hold_masks
from singe_plugin.errors import ConfigError, DataError, SingeError, TiedParameterError
from singe_plugin.loop.events import History
from singe_plugin.masks import masks_of

from asked import asked
from references import Net, randomise_norms
from small_nets import Chain, StopAt, Trace, assert_same_values, images, values_of, vectors

BATCHES = images(2)
NAMES = ["conv1", "conv2", "conv3", "fc"]


def chain() -> Chain:
    torch.manual_seed(0)
    net: Any = randomise_norms(Chain(widths=(4, 6, 4)))
    return net


# --- training, leaving no trace, failing ------------------------------------------------------------------------


OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_optimizer_revives_a_weight(kind: str) -> None:
    net = chain().train()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for inputs, targets in BATCHES * 3:  # momentum before there is a mask
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    ids = [id(p) for p in net.parameters()]
    ema = timm.utils.ModelEmaV3(net, decay=0.5)
    tuning = FineTune(BATCHES, 8, optimizer=optimizer, ema=ema)
    pruner = UnstructuredPruner(net, BATCHES, **asked(sparsity=0.7, rounds=2, finetune=tuning))
    masks = pruner.run().masks
    before = values_of(net)
    for inputs, targets in BATCHES * 5:
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        ema.update(net)
        for name, mask in masks.items():
            for model in (net, ema.module):
                layer = model.get_submodule(name.rpartition(".")[0])
                assert not bool(layer.weight[~mask].any())
                assert bool(layer.weight[mask].any())
    after = values_of(net)
    assert any(bool((after[k] != before[k]).any()) for k in before if k.endswith("original"))
    assert sorted(id(p) for p in net.parameters()) == sorted(ids)
    with torch.no_grad():
        outputs, averages = net.eval()(BATCHES[0][0]), ema.module.eval()(BATCHES[0][0])
        pruner.fold()
        assert torch.equal(net(BATCHES[0][0]), outputs)
        assert torch.equal(ema.module(BATCHES[0][0]), averages)
    assert [id(p) for p in net.parameters()] == ids
    assert list(net.state_dict()) == list(chain().state_dict()) == list(ema.module.state_dict())


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_scoring_leaves_no_trace(path: str) -> None:
    net = chain().train()
    net.bn2.eval()
    functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
    plain = Trace(net)
    pruner = UnstructuredPruner(net, BATCHES, **asked(sparsity=0.5, path=path, nodes=2))
    plain.assert_unchanged()
    host = pruner.host()
    host.remove("conv2", list(range(0, host.size("conv2"), 2)))
    masked = Trace(net)
    for layer in NAMES:
        assert len(host.score([layer])[layer]) == host.left(layer)
    masked.assert_unchanged()


PLACES = [
    ("removed", 1, "rounds"), ("removed", 6, "rounds"), ("finetune_step", 5, "rounds"), ("round_done", 2, "rounds"),
    ("layer_scored", 6, "rounds"), ("layer_done", 1, "rounds"), ("removed", 3, "layers"), ("layer_done", 2, "layers"),
    ("run_end", 1, "layers"),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("place", "count", "order"), PLACES)
def test_a_failure_anywhere_is_rolled_back(place: str, count: int, order: str, masked: bool) -> None:
    net = chain().train()
    if masked:
        hold_masks(net, {"conv2.weight": torch.rand_like(net.conv2.weight) > 0.3})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ema = timm.utils.ModelEmaV3(net)
    tuning = FineTune(BATCHES, 9, optimizer=scheduler, ema=ema)
    trace, averages, types = Trace(net, optimizer), values_of(ema), [type(m) for m in net.modules()]
    pruner = UnstructuredPruner(
        net, BATCHES, **asked(sparsity=0.7, finetune=tuning, nodes=1,
        **({"rounds": 3} if order == "rounds" else {"units_per_step": 0.3}),
        callbacks=[StopAt(place, count, ValueError("mine"))]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="mine"):
        pruner.run()
    trace.assert_unchanged(ignore=("rng",))
    assert_same_values(ema, averages)
    assert [type(m) for m in net.modules()] == types
    pruner.callbacks = []
    assert pruner.run().sparsity == pytest.approx(0.7, abs=2e-3)


def test_a_second_run_that_fails_leaves_a_pruner_that_works() -> None:
    """Masks were on before the failing run, so what was counted in it is not of the masks that come back."""
    net = chain()
    pruner = UnstructuredPruner(net, BATCHES, **asked(sparsity=0.5, rounds=3, nodes=1))
    pruner.run()
    before = {name: mask.clone() for name, mask in masks_of(net).items()}
    pruner.sparsity, pruner.callbacks = 0.8, [StopAt("round_done", 2, ValueError("mine"))]
    with pytest.raises(ValueError, match="mine"):
        pruner.run()
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(net).items())
    pruner.callbacks = []
    outcome = pruner.run()
    assert outcome.sparsity == pytest.approx(0.8, abs=2e-3)
    assert sum(int((~mask).sum()) for mask in outcome.masks.values()) == round(
        0.8 * sum(mask.numel() for mask in outcome.masks.values())
    )


def test_frozen_weights_are_masked_and_stay_frozen() -> None:
    net = chain()
    net.conv2.requires_grad_(False)
    tuning = FineTune(BATCHES, 4)
    before = net.conv2.weight.detach().clone()
    outcome = UnstructuredPruner(net, BATCHES, sparsity=0.6, finetune=tuning).run()
    frozen = net.conv2.parametrizations.weight.original
    assert not frozen.requires_grad
    assert torch.equal(frozen, before * outcome.masks["conv2.weight"])
    assert 0 < outcome.masks["conv2.weight"].float().mean() < 1
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        UnstructuredPruner(chain().requires_grad_(False), BATCHES, finetune=FineTune(BATCHES, 4)).run()


def test_events_count_what_is_not_masked() -> None:
    history = History()
    outcome = UnstructuredPruner(chain(), BATCHES, **asked(sparsity=0.5, rounds=2)).run(history=history)
    assert history.select("run_end")[0]["params"] == outcome.nonzero
    assert [row["units"] for row in history.select("removed")] == [[]] * len(history.select("removed"))
    assert sum(row["count"] for row in history.select("removed")) == sum(outcome.plan.values())
    (start,) = history.select("run_start")
    assert sum(start["plan"].values()) == sum(outcome.plan.values())
    assert [row["event"] for row in history.rows[:2]] == ["run_start", "layer_scored"]
    assert len(history.select("layer_scored")) == 8


# --- errors -----------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": 1.0}, r"sparsity=1.0 is not a fraction of weights inside \[0, 1\["),
    "sparsity type": ({"sparsity": "a lot"}, "sparsity='a lot' is neither a fraction of weights nor a pattern"),
    "ratios": ({"ratios": "blocks"}, "unknown ratios 'blocks'.*or give a dict"),
    "ratios of units": (
        {"ratios": "block"},
        "ratios='block' is for units.*choose one of global, uniform or give {layer: ratio}",
    ),
    "a ratio": ({"ratios": {"conv1": 2}}, r"ratios must be inside \[0, 1\[, got 2 for 'conv1'"),
    "name": ({"ratios": {"conv9": 0.5}}, r"ratios names \['conv9'\].*the layers are conv1, conv2, conv3, fc"),
    "both": ({"ratios": {"conv1": 0.5}, "sparsity": 0.5}, "sparsity=0.5 and ratios with one for each layer"),
    "nothing": ({"ratios": {"conv1": 0.0}}, "no layer is left to prune; 'conv1', for one: ratios gives it no"),
    "pattern": ({"pattern": "4:2"}, "sparsity='4:2' is neither.*nor a pattern.*e.g. '2:4'"),
    "pattern type": ({"sparsity": (2, 4, 8)}, r"sparsity=\(2, 4, 8\) is neither a fraction"),
    "too dense": ({"pattern": "1:4", "sparsity": 0.5}, "sparsity=0.5 is less than the 0.75 that the pattern 1:4"),
    "no fit": ({"pattern": "5:7"}, "no layer is left to prune; 'conv1', for one: its 2 input channels"),
    "max": (
        {"max_pruning_ratio": 0.5, "ratios": "uniform"},
        "sparsity=0.9 is more than max_pruning_ratio=0.5; raise that",
    ),
    "max value": ({"max_pruning_ratio": 0}, r"max_pruning_ratio=0 is not a fraction inside \]0, 1\]"),
    "order": ({"order": "random"}, "unknown order 'random'; choose one of rounds, layers"),
    "rounds": ({"rounds": 0}, "rounds=0 is not a number of rounds; give a whole number >= 1"),
    "course": ({"course": "square"}, "unknown course 'square'; choose one of cubic, linear"),
    "units_per_step": ({"units_per_step": 0}, "units_per_step=0 is not a number of units"),
    "units in rounds": ({"order": "rounds", "units_per_step": 7}, "units_per_step=7 is for order='layers'"),
    "rounds of layers": ({"order": "layers", "rounds": 5}, "rounds=5 is for order='rounds'"),
    "layers": ({"layers": ["conv9"]}, "layers: 'conv9' is no module of the model"),
    "layer types": ({"layers": ["bn1"]}, "layers names no convolution or linear layer"),
    "one layer": ({"layers": "conv1"}, "layers must be a list of modules or names, got 'conv1'"),
    "ignored": ({"ignored_layers": [nn.Linear(1, 1)]}, "ignored_layers: Linear.* is no module of the model"),
    "all ignored": ({"ignored_layers": NAMES}, "no convolution or linear layer whose weights can be pruned"),
    "width": ({"min_width": 4}, "min_width=4 is for units .channels, heads.*leave it out"),
    "rounding": ({"round_to": 8}, "round_to=8 is for units .channels, heads.*leave it out"),
    "scoring": ({"scoring": {"criterion": "ig"}}, "scoring must be a Scoring, or its criterion, got dict"),
    "pace": ({"pace": Scoring()}, "pace must be a Pace, or its order, got Scoring"),
    "criterion": ({"criterion": "magic"}, "unknown criterion 'magic'"),
    "finetune": ({"finetune": 100}, "finetune must be a FineTune, got int"),
    "callbacks": ({"callbacks": [print]}, "callbacks must be singe_plugin.Callback objects"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    options, message = BAD[case]
    net = chain()
    trace = Trace(net)
    with pytest.raises(ConfigError, match=message):
        UnstructuredPruner(net, BATCHES, **asked(**options))
    trace.assert_unchanged()


def test_bad_data_and_models() -> None:
    net = chain()
    for batches in (None, []):
        with pytest.raises(DataError, match="criterion 'ig' differentiates F on data, and there is none"):
            UnstructuredPruner(net, batches)
    with pytest.raises(DataError, match=r"Chain fails on the first batch with RuntimeError.*example_inputs"):
        UnstructuredPruner(net, vectors())
    with pytest.raises(ConfigError, match=r"DataParallel wraps the model; prune model.module"):
        UnstructuredPruner(nn.DataParallel(net), BATCHES)
    with pytest.raises(ConfigError, match="Sequential has no convolution or linear layer"):
        UnstructuredPruner(nn.Sequential(nn.BatchNorm2d(2)), BATCHES)
    with pytest.raises(ConfigError, match=r"finetune.ema \(Linear\) has no layer 'conv1'"):
        UnstructuredPruner(net, BATCHES, finetune=FineTune(BATCHES, 2, ema=nn.Linear(1, 1))).run()
    nan = [(torch.full((2, 2, 6, 6), math.nan), torch.tensor([0, 1]))]
    with pytest.raises(SingeError, match="'conv1': F is not finite on batch 0"):
        UnstructuredPruner(net, nan, sparsity=0.5).run()
    assert masks_of(net) == {}


def test_weights_that_are_computed_tied_or_not_there_yet() -> None:
    net = chain()
    parametrizations.weight_norm(net.conv2)
    with pytest.raises(
        ConfigError, match=r"'conv2': its weight is already computed by a parametrization \(_WeightNorm"
    ):
        UnstructuredPruner(net, BATCHES)
    assert "conv2" not in {x.name for x in UnstructuredPruner(net, BATCHES, ignored_layers=["conv2"]).layers}
    net = chain()
    torch_prune.random_unstructured(net.conv3, "weight", 0.5)
    with pytest.raises(ConfigError, match=r"'conv3': its weight is computed.*torch.nn.utils.prune.remove\(layer"):
        UnstructuredPruner(net, BATCHES)
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ConfigError, match=r"'0' has no weights yet \(it is lazy\); run the model"):
        UnstructuredPruner(lazy, vectors())
    tied: Any = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    tied.b.weight = tied.a.weight
    with pytest.raises(TiedParameterError, match=r"'a': the parameters 'a.weight' and 'b.weight' are one tensor"):
        UnstructuredPruner(tied, vectors())
    twice: Any = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 4))
    twice.b = twice.a  # one module, one weight, one place for the mask
    assert UnstructuredPruner(twice, vectors(), sparsity=0.5).run().layers[0].nonzero == 8
