"""``UnstructuredPruner``: counts, rounds and Algorithm 1 against slow literal loops; training, failures, errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from singe_plugin import FineTune, ScoringOptions, UnstructuredPruner, hold_masks
from singe_plugin.errors import BudgetError, ConfigError, DataError, SingeError, TiedParameterError
from singe_plugin.events import History
from singe_plugin.integrations.unstructured.pruner import SparseOutcome
from singe_plugin.masks import masks_of

from references import Net, randomise_norms
from small_nets import Chain, Grouped, StopAt, Trace, assert_same_values, images, mlp, values_of, vectors

BATCHES = images(2)
MU, STEPS = 0.7, 3
LITERAL: dict[str, Any] = {"mu": MU, "steps": STEPS, "quadrature": "geometric"}
NAMES = ["conv1", "conv2", "conv3", "fc"]


def chain() -> Chain:
    torch.manual_seed(0)
    net: Any = randomise_norms(Chain(widths=(4, 6, 4)))
    return net


def literal_ig(net: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eq. 5 for every weight by plain autograd: one layer decays at a time. (Batch-norm need not be folded for it.)"""
    found = {}
    for name in masks:
        total = torch.zeros(masks[name].shape, dtype=torch.float64)
        for inputs, targets in BATCHES:
            for s in range(STEPS + 1):
                other = copy.deepcopy(net).double().eval()
                with torch.no_grad():
                    for layer, mask in masks.items():
                        other.get_submodule(layer).weight.mul_(mask)
                    weight: Any = other.get_submodule(name).weight
                    weight.mul_(MU**s)
                functional.cross_entropy(other(inputs.double()), targets).backward()
                total += (weight.detach() * weight.grad).abs() / len(BATCHES)
        found[name] = total
    return found


def mask_lowest(scores: dict[str, Tensor], masks: dict[str, Tensor], count: int) -> None:
    """Mask the cheapest of all weights that are left, one by one."""
    ranked = sorted(
        (float(scores[name].flatten()[i]), name, i)
        for name, mask in masks.items()
        for i in mask.flatten().nonzero().flatten().tolist()
    )
    for _, name, i in ranked[:count]:
        masks[name].view(-1)[i] = False


def ones(net: nn.Module, names: list[str] = NAMES) -> dict[str, Tensor]:
    return {name: torch.ones_like(net.get_submodule(name).weight, dtype=torch.bool) for name in names}


def assert_masks(outcome: SparseOutcome, expected: dict[str, Tensor]) -> None:
    assert list(outcome.masks) == [f"{name}.weight" for name in expected]
    for name, mask in expected.items():
        assert torch.equal(outcome.masks[f"{name}.weight"], mask), name


# --- what is masked ---------------------------------------------------------------------------------------------


def test_one_shot_over_all_layers_is_a_sorted_list() -> None:
    net = chain()
    masks = ones(net)
    total = sum(m.numel() for m in masks.values())
    mask_lowest(literal_ig(net, masks), masks, round(0.7 * total))
    outcome = UnstructuredPruner(net, BATCHES, sparsity=0.7, **LITERAL).run()
    assert_masks(outcome, masks)
    assert [layer.nonzero for layer in outcome.layers] == [int(m.sum()) for m in masks.values()]
    assert outcome.sparsity == pytest.approx(round(0.7 * total) / total)


@pytest.mark.parametrize("course", ["cubic", "linear"])
def test_rounds_with_fine_tuning_in_between(course: str) -> None:
    """Another implementation of it all: scores, the course of the sparsity, masks, plain gradient descent."""
    net, other = chain(), chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    tuning = FineTune(BATCHES, 4, optimizer=optimizer, label_smoothing=0.0, clip_grad=None)
    pruner = UnstructuredPruner(
        net, BATCHES, sparsity=0.8, rounds=2, schedule=course, finetune=tuning, ignored_layers=["fc"], **LITERAL
    )
    history = History()
    outcome = pruner.run(history=history)

    masks = ones(other, NAMES[:3])
    total = sum(m.numel() for m in masks.values())
    for number, share in enumerate({"cubic": (0.875, 1.0), "linear": (0.5, 1.0)}[course]):
        gone = total - sum(int(m.sum()) for m in masks.values())
        mask_lowest(literal_ig(other, masks), masks, round(share * round(0.8 * total)) - gone)
        for inputs, targets in BATCHES:
            other.train().zero_grad()
            with torch.no_grad():
                for name, mask in masks.items():
                    other.get_submodule(name).weight.mul_(mask)
            functional.cross_entropy(other(inputs), targets).backward()
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter -= 0.05 * parameter.grad
        assert history.select("round_done")[number]["left"] == sum(int(m.sum()) for m in masks.values())
    assert_masks(outcome, masks)
    pruner.fold()
    with torch.no_grad():
        for name, mask in masks.items():
            other.get_submodule(name).weight.mul_(mask)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global", "dict"])
def test_algorithm_1_layer_by_layer(scope: str) -> None:
    net = chain()
    masks = ones(net)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    if scope == "global":
        first = ones(net)
        mask_lowest(literal_ig(net, first), first, round(0.5 * sum(sizes.values())))
        plan = {name: sizes[name] - int(mask.sum()) for name, mask in first.items()}
    else:
        plan = {name: round({"layer": 0.5, "dict": 0.25}[scope] * size) for name, size in sizes.items()}
    for name, count in plan.items():
        step = round(0.2 * sizes[name])
        for done in range(0, count, step):
            scores = literal_ig(net, masks)[name]
            mask_lowest({name: scores}, {name: masks[name]}, min(step, count - done))
    amount = {"scope": dict.fromkeys(NAMES, 0.25)} if scope == "dict" else {"scope": scope, "sparsity": 0.5}
    heard = History()
    outcome = UnstructuredPruner(net, BATCHES, order="layers", units_per_step=0.2, **amount, **LITERAL).run(
        history=heard
    )
    assert outcome.plan == plan
    assert_masks(outcome, masks)
    assert [row["layer"] for row in heard.select("layer_done")] == NAMES


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("order", ["rounds", "layers"])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.9, 0.999])
def test_counts_are_exact(sparsity: float, order: str, rounds: int) -> None:
    for scope in ("global", "layer"):
        net = chain()
        sizes = {name: net.get_submodule(name).weight.numel() for name in NAMES}
        outcome = UnstructuredPruner(
            net, BATCHES[:1], sparsity=sparsity, scope=scope, order=order, rounds=rounds, nodes=1
        ).run()
        masked = {layer.name: layer.weights - layer.nonzero for layer in outcome.layers}
        if scope == "global":
            assert sum(masked.values()) == min(round(sparsity * sum(sizes.values())), sum(sizes.values()) - 4)
        else:
            assert masked == {name: min(round(sparsity * size), size - 1) for name, size in sizes.items()}
        assert all(layer.nonzero >= 1 for layer in outcome.layers)
        assert outcome.plan == {name: count for name, count in masked.items() if order == "layers" or count}
        assert {n: int((~m).sum()) for n, m in outcome.masks.items()} == {f"{n}.weight": c for n, c in masked.items()}


def test_magnitudes_are_those_of_the_folded_weights() -> None:
    net = chain()
    outcome = UnstructuredPruner(net, BATCHES, sparsity=0.5, criterion="l1", layers=["conv1"]).run()
    scale = (net.bn1.weight / (net.bn1.running_var + net.bn1.eps).sqrt()).detach()[:, None, None, None]
    weight = chain().conv1.weight.detach() * scale
    expected = weight.abs().flatten().argsort()[: weight.numel() // 2]
    assert sorted(expected.tolist()) == (~outcome.masks["conv1.weight"]).flatten().nonzero().flatten().tolist()
    assert not torch.equal(weight.abs().flatten().argsort(), chain().conv1.weight.detach().abs().flatten().argsort())


def test_without_data_magnitudes_do() -> None:
    net = mlp(6)
    outcome = UnstructuredPruner(net, criterion="l2", sparsity=0.5).run()
    values = torch.cat([mlp_weight.abs().flatten() for mlp_weight in (net[0].weight, net[2].weight, net[4].weight)])
    assert outcome.nonzero == sum(p.numel() for p in net.parameters()) - round(0.5 * len(values))
    assert (outcome.macs, outcome.effective_macs) == (None, None)


def test_a_model_that_is_masked_already_goes_on_from_there() -> None:
    net = chain()
    one_go = UnstructuredPruner(chain(), BATCHES, sparsity=0.8, rounds=2, schedule="linear").run()
    first = UnstructuredPruner(net, BATCHES, sparsity=0.4).run()
    second = UnstructuredPruner(net, BATCHES, sparsity=0.8).run()
    for name, mask in second.masks.items():
        assert not bool((mask & ~first.masks[name]).any())
        assert torch.equal(mask, one_go.masks[name])
    assert UnstructuredPruner(net, BATCHES, sparsity=0.3).run().masks.keys() == second.masks.keys()
    assert_masks(second, {name: masks_of(net)[f"{name}.weight"] for name in NAMES})  # nothing comes back


def test_max_sparsity() -> None:
    outcome = UnstructuredPruner(chain(), BATCHES, sparsity=0.74, max_sparsity=0.75).run()
    assert max(layer.sparsity for layer in outcome.layers) == 0.75
    assert outcome.sparsity == pytest.approx(0.74, abs=2e-3)
    with pytest.raises(BudgetError, match=r"sparsity=0.8 cannot be reached.*choose at most 0.7"):
        UnstructuredPruner(chain(), BATCHES, sparsity=0.8, max_sparsity=0.75).run()


def test_effective_macs_by_hand() -> None:
    net = Grouped()
    batch = (torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2]))
    outcome = UnstructuredPruner(net, [batch], sparsity=0.6).run()
    positions = {"conv1": 64, "conv2": 64, "dw": 64, "conv3": 64, "fc": 1}
    assert {r.name: r.macs for r in outcome.layers} == {
        n: p * net.get_submodule(n).weight.numel() for n, p in positions.items()
    }
    by_hand = sum(p * int(net.get_submodule(n).weight.count_nonzero()) for n, p in positions.items())
    assert outcome.effective_macs == sum(r.effective_macs or 0 for r in outcome.layers) == by_hand
    assert outcome.macs == sum(r.macs or 0 for r in outcome.layers)
    assert outcome.nonzero == outcome.params - sum(r.weights - r.nonzero for r in outcome.layers)


def test_the_host_knows_what_a_weight_costs() -> None:
    net = chain()
    pruner = UnstructuredPruner(net, BATCHES, nodes=1)
    host = pruner.host()
    costs, plan = host.costs(), {"conv1": 10, "conv2": 50, "fc": 3}
    assert costs.cost("params", {}) == sum(p.numel() for p in net.parameters()) == host.nonzero()
    for name, count in plan.items():
        host.remove(name, range(count))
    assert host.costs().cost("params", {}) == costs.cost("params", plan) == host.nonzero()
    assert round(costs.cost("macs", plan)) == host.effective_macs() == round(host.costs().cost("macs", {}))
    assert [(spec.name, spec.units) for spec in host.layers()] == [(n, host.left(n)) for n in NAMES]
    for units in ([host.left("fc")], [-1]):
        with pytest.raises(SingeError, match=rf"'fc' has {host.left('fc')} weights left, but number {units[0]} was"):
            host.remove("fc", units)


# --- which layers -----------------------------------------------------------------------------------------------


def test_layers_in_forward_order_and_everything_else_with_a_reason() -> None:
    net: Any = Net(
        lambda m, x: m.last(m.first(m.emb(x).mean(1) @ m.raw)) if not m.training else m.aux(m.emb(x).mean(1)),
        last=nn.Linear(4, 3), aux=nn.Linear(4, 3), first=nn.Linear(4, 4), emb=nn.Embedding(5, 4),
        raw=nn.Parameter(torch.randn(4, 4)), gain=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    batch = (torch.randint(0, 5, (6, 3)), torch.randint(0, 3, (6,)))
    pruner = UnstructuredPruner(net, [batch], sparsity=0.5)
    assert [layer.name for layer in pruner.layers] == ["first", "last"]
    assert pruner.left_whole == {
        "aux": "the model's output in eval mode does not depend on it",
        "emb.weight": "a parameter of Embedding, no convolution or linear layer",
        "raw": "a parameter of Net, no convolution or linear layer",
    }
    assert [layer.name for layer in UnstructuredPruner(net, [batch], layers=["last"]).layers] == ["last"]
    ignored = UnstructuredPruner(net, [batch], ignored_layers=[net.last])
    assert ignored.left_whole["last"] == "it is in ignored_layers"


def test_a_norm_behind_standardised_weights_is_not_folded() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True))

    net = nn.Sequential(Standardised(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten())
    batch = (torch.randn(2, 2, 3, 3), torch.tensor([0, 1]))
    randomise_norms(net)
    assert [layer.norm for layer in UnstructuredPruner(net, [batch]).layers] == [None, net[3]]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_timm_models(name: str) -> None:
    net = timm.create_model(name, num_classes=3, in_chans=1, img_size=32) if name == "test_vit" else timm.create_model(
        name, num_classes=3, in_chans=1
    )  # fmt: skip
    batch = (torch.randn(2, 1, 32, 32), torch.tensor([0, 2]))
    outcome = UnstructuredPruner(net, [batch], sparsity=0.9, nodes=1, max_sparsity=0.99).run()
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-4)
    assert net(batch[0]).isfinite().all()


def test_attention_of_torch() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net: Any = Net(lambda m, x: m.head(m.block(x).mean(1)), block=block, head=nn.Linear(8, 3))
    batch = (torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0]))
    pruner = UnstructuredPruner(net, [batch], sparsity=0.5)
    outcome = pruner.run()
    assert {r.name for r in outcome.layers} == {"block.self_attn.out_proj", "block.linear1", "block.linear2", "head"}
    assert list(outcome.left_whole) == ["block.self_attn.in_proj_weight"]
    with torch.no_grad():
        before = net.eval()(batch[0])
        pruner.fold()
        torch.testing.assert_close(net(batch[0]), before)  # torch takes a fused kernel for plain weights


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
    pruner = UnstructuredPruner(net, BATCHES, sparsity=0.7, rounds=2, finetune=tuning)
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
    pruner = UnstructuredPruner(net, BATCHES, sparsity=0.5, path=path, nodes=2)
    plain.assert_unchanged()
    host = pruner.host()
    host.remove("conv2", list(range(0, host.size("conv2"), 2)))
    masked = Trace(net)
    for layer in NAMES:
        assert len(pruner.score_layer(host, layer)) == host.left(layer)
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
    tuning = FineTune(BATCHES, 9, optimizer=optimizer, scheduler=scheduler, ema=ema)
    trace, averages, types = Trace(net, optimizer), values_of(ema), [type(m) for m in net.modules()]
    pruner = UnstructuredPruner(
        net, BATCHES, sparsity=0.7, order=order, rounds=3, units_per_step=0.3, finetune=tuning, nodes=1,
        callbacks=[StopAt(place, count, ValueError("mine"))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="mine"):
        pruner.run()
    trace.assert_unchanged(ignore=("rng",))
    assert_same_values(ema, averages)
    assert [type(m) for m in net.modules()] == types
    pruner.callbacks = []
    assert pruner.run().sparsity == pytest.approx(0.7, abs=2e-3)


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
    outcome = UnstructuredPruner(chain(), BATCHES, sparsity=0.5, rounds=2).run(history=history)
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
    "sparsity type": ({"sparsity": "a lot"}, "sparsity='a lot' is not a fraction"),
    "scope": ({"scope": "block"}, "unknown scope 'block'; choose one of global, layer or give {layer: ratio}"),
    "scope ratio": ({"scope": {"conv1": 2}}, r"scope\['conv1'\]=2 is not a fraction"),
    "scope name": ({"scope": {"conv9": 0.5}}, r"scope names \['conv9'\].*the layers are conv1, conv2, conv3, fc"),
    "both": ({"scope": {"conv1": 0.5}, "sparsity": 0.5}, "sparsity=0.5 and a scope with a ratio per layer"),
    "nothing": ({"scope": {"conv1": 0.0}}, "no layer is left to prune; 'conv1', for one: scope gives it no"),
    "pattern": ({"pattern": "4:2"}, "pattern='4:2' is not a pattern.*e.g. '2:4'"),
    "pattern type": ({"pattern": 2}, "pattern=2 is not a pattern"),
    "too dense": ({"pattern": "1:4", "sparsity": 0.5}, "sparsity=0.5 is less than the 0.75 that the pattern 1:4"),
    "no fit": ({"pattern": "5:7"}, "no layer is left to prune; 'conv1', for one: its 2 input channels"),
    "max": ({"max_sparsity": 0.5, "scope": "layer"}, "sparsity=0.9 is more than max_sparsity=0.5; raise that"),
    "max value": ({"max_sparsity": 0}, r"max_sparsity=0 is not a fraction inside \]0, 1\]"),
    "order": ({"order": "random"}, "unknown order 'random'; choose one of rounds, layers"),
    "rounds": ({"rounds": 0}, "rounds=0 is not a number of rounds; give a whole number >= 1"),
    "schedule": ({"schedule": "square"}, "unknown schedule 'square'; choose one of cubic, linear"),
    "units_per_step": ({"units_per_step": 0}, "units_per_step=0 is not a number of units"),
    "layers": ({"layers": ["conv9"]}, "layers: 'conv9' is no module of the model"),
    "layer types": ({"layers": ["bn1"]}, "layers names no convolution or linear layer"),
    "one layer": ({"layers": "conv1"}, "layers must be a list of modules or names, got 'conv1'"),
    "ignored": ({"ignored_layers": [nn.Linear(1, 1)]}, "ignored_layers: Linear.* is no module of the model"),
    "all ignored": ({"ignored_layers": NAMES}, "no convolution or linear layer whose weights can be pruned"),
    "option": ({"critrion": "ig"}, "unknown option 'critrion'; options of the scoring are criterion, p, mu"),
    "scoring": ({"scoring": ScoringOptions(), "mu": 0.5}, "scoring and 'mu' were both given"),
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
        UnstructuredPruner(net, BATCHES, **options)
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
