"""Residual blocks removed as a whole: which can go, that nothing else changes, what they are worth, what follows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from test_prune import assert_same_run
from torch import Tensor, nn

import singe_plugin
from singe_plugin import FineTune, Pace, Result, Scoring, SingeError, prune
from singe_plugin.app.inspection import inspect_model
from singe_plugin.axes import AxisGraph, Trackers, find_blocks, remove_block
from singe_plugin.errors import ConfigError, RemovalError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.budget import GroupSpec, plan_removals
from singe_plugin.loop.costs import CostModel, TensorCost, count_macs, count_params
from singe_plugin.loop.target import Target

from fingerprint import assert_untouched, fingerprint
from small_nets import CLASSES, StopAt, images

BATCHES = images(2)


class Basic(nn.Module):
    """relu(x + branch(x)); with a stride or another width the shortcut is a projection."""

    def __init__(self, given: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(given, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Conv2d(given, width, 1, stride) if stride > 1 or given != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + out)


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))


class Net(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, *blocks: nn.Module, width: int = 8, last: int | None = None) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(2, width, 3, padding=1), nn.ModuleList(blocks)
        self.fc = nn.Linear(last or width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


def basic() -> Net:
    return Net(Basic(8, 8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), last=12)


def pre_activation() -> Net:
    return Net(PreActivation(8), PreActivation(8))


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


# what is built, the image, the blocks that can go, and what has to be zero in each
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str], tuple[str, ...]]] = {
    "basic": (basic, (2, 8, 8), ["blocks.0", "blocks.1", "blocks.3"], ("bn2",)),
    "pre_activation": (pre_activation, (2, 8, 8), ["blocks.0", "blocks.1"], ("conv2",)),
    "convnext": (
        of_timm("convnext_atto", depths=(1, 2, 1, 1), dims=(8, 8, 8, 16), ls_init_value=0.1), (3, 32, 32),
        ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.3.blocks.0"],
        ("mlp.fc2",),
    ),
    "vit": (
        of_timm("test_vit", img_size=32, depth=3, drop_path_rate=0.3), (3, 32, 32),
        ["blocks.0", "blocks.1", "blocks.2"], ("attn.proj", "mlp.fc2"),
    ),
    "mobilenetv2": (
        of_timm("mobilenetv2_035"), (3, 32, 32),
        ["blocks.1.1", "blocks.2.1", "blocks.2.2", "blocks.3.1", "blocks.3.2", "blocks.3.3", "blocks.4.1", "blocks.4.2",
         "blocks.5.1", "blocks.5.2"], ("bn3",),
    ),
}  # fmt: skip


def varied(model: nn.Module) -> nn.Module:
    """The model with statistics and affine parameters that are not those of a new one, in double precision."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.ndim < 2:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model.double()


def zeroed(model: nn.Module, blocks: list[str], layers: tuple[str, ...]) -> nn.Module:
    """A copy with everything at zero that writes the results of these blocks' branches."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for block in blocks:
            for layer in layers:
                for parameter in found.get_submodule(f"{block}.{layer}").parameters():
                    parameter.zero_()
    return found


@pytest.mark.parametrize("name", NETS)
def test_without_a_block_is_with_its_branch_at_zero(name: str) -> None:
    make, shape, blocks, layers = NETS[name]
    model = varied(make())
    x = torch.randn(3, *shape, dtype=torch.float64)
    graph = AxisGraph(model, x[:2])
    assert list(find_blocks(graph)) == blocks
    gone = blocks[::2]
    reference = zeroed(model, gone, layers)
    for block in gone:
        remove_block(graph, graph.blocks[block])
    for training in (False, True):
        outputs = []
        for network in (reference, model):
            torch.manual_seed(5)  # of what is dropped on the paths that are left
            outputs.append(network.train(training)(x))
        if training and name == "vit":  # another draw for every path
            continue
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    assert not any(n.startswith(f"{b}.") for n, _ in model.named_parameters() for b in gone)
    torch.export.export(model.eval().float(), (x[:2].float(),))


def test_a_block_with_a_projection_stays_and_it_is_said_why() -> None:
    graph = AxisGraph(basic(), torch.randn(2, 2, 8, 8))
    find_blocks(graph)
    assert graph.left_whole["blocks.2"] == "it is given 8x8x8 and returns 12x4x4: its shortcut is no identity"
    same_width = Net(Basic(8, 8), Basic(8, 8))
    same_width.blocks[1].shortcut = nn.Conv2d(8, 8, 1)
    graph = AxisGraph(same_width, torch.randn(2, 2, 8, 8))
    assert list(find_blocks(graph)) == ["blocks.0"]
    assert "its shortcut is no identity" in graph.left_whole["blocks.1"]


class Peeping(Net):
    """Its forward pass asks a block for more than its results."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.blocks[0].bn1.weight.sum()


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return self.fc(x.mean((2, 3)))


def hooked() -> Net:
    net = Net(Basic(8, 8), Basic(8, 8))
    net.blocks[0].register_forward_hook(lambda *_: None)
    return net


def tied() -> Net:
    net = Net(Basic(8, 8), Basic(8, 8))
    net.fc2 = nn.Conv2d(8, 8, 3)
    net.fc2.weight = net.blocks[0].conv1.weight
    return net


def listed() -> Net:
    net = Net(Basic(8, 8), Basic(8, 8))
    net.again = nn.ModuleList([net.blocks[0]])
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Peeping(Basic(8, 8), Basic(8, 8)), "the forward pass fails when its units are removed"),
        (Twice(Basic(8, 8), Basic(8, 8)), "the model calls it 2 times in a forward pass"),
        (hooked(), "it has hooks, which would go with it"),
        (tied(), "it shares a parameter with 'fc2.weight'"),
        (listed(), "a module in it is registered in more than one place"),
    ],
    ids=["peeping", "twice", "hooked", "tied", "listed"],
)
def test_what_cannot_go_without_harm_stays(net: Net, reason: str) -> None:
    graph = AxisGraph(net, torch.randn(2, 2, 8, 8))
    assert list(find_blocks(graph)) == ["blocks.1"]
    assert graph.left_whole["blocks.0"].startswith(reason)


def test_the_graph_is_that_of_a_model_without_the_block() -> None:
    """Group by group, as if the smaller model had been traced anew; and everything comes back."""
    model, x = basic(), torch.randn(2, 2, 8, 8)
    graph = AxisGraph(model, x)
    find_blocks(graph)
    before = fingerprint(model)

    def known() -> Any:
        parts = [[(p.owner, p.attr, p.dim, p.units.tolist()) for p in g.slices()] for g in graph.groups.values()]
        return dict(graph.groups), dict(graph.blocks), parts, graph.left_whole, graph.trace.contractions

    back, was = graph.rewinder(), known()
    child = model.blocks[1]
    remove_block(graph, graph.blocks["blocks.1"])
    fresh = AxisGraph(model, x)
    assert list(graph.groups) == list(fresh.groups)
    assert graph.left_whole == {**fresh.left_whole, "blocks.2": graph.left_whole["blocks.2"]}
    assert len(graph.trace.contractions) == len(fresh.trace.contractions)
    for name, group in graph.groups.items():
        assert group.matrices() == fresh.groups[name].matrices()
        assert group.readers() == fresh.groups[name].readers()
        assert list(group.writers) == list(fresh.groups[name].writers)
    model.blocks._modules["1"] = child
    back()
    assert known() == was
    assert_untouched(before, model)


def test_optimizer_and_average_lose_what_is_gone_and_nothing_else() -> None:
    model, x = basic(), BATCHES[0][0]
    ema = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    kept = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters() if not n.startswith("blocks.1.")}
    graph = AxisGraph(model, x)
    find_blocks(graph)
    remove_block(graph, graph.blocks["blocks.1"], Trackers([optimizer], [ema]))
    named = dict(model.named_parameters())
    assert named.keys() == kept.keys()
    assert all(optimizer.state[named[n]]["exp_avg"] is state for n, state in kept.items())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in named.values()} == {id(p) for p in optimizer.state}
    assert [n for n, _ in ema.module.named_parameters()] == list(named)
    model(x).square().sum().backward()
    optimizer.step()
    ema.update_parameters(model)
    with pytest.raises(RemovalError, match="is not there"):
        remove_block(graph, find_blocks(AxisGraph(basic(), x))["blocks.1"])


# -- scores -----------------------------------------------------------------------------------------------------


def test_the_score_of_a_block_is_equation_5_of_the_rows_that_write_its_results() -> None:
    model = varied(basic()).float().eval()
    x, y = BATCHES[0]
    graph = AxisGraph(model, x)
    block = find_blocks(graph)["blocks.1"]
    layer = model.blocks[1]
    factor = layer.bn2.weight / (layer.bn2.running_var + layer.bn2.eps).sqrt()
    weight = (layer.conv2.weight * factor[:, None, None, None]).detach()
    bias = (layer.bn2.bias - layer.bn2.running_mean * factor).detach()
    expected = 0.0
    for step in range(4):
        scaled = [(0.5**step * part).requires_grad_() for part in (weight, bias)]
        h = model.blocks[0](torch.relu(model.stem(x)))
        inner = torch.relu(layer.bn1(layer.conv1(h)))
        h = torch.relu(h + nn.functional.conv2d(inner, *scaled, padding=1))
        loss = nn.functional.cross_entropy(model.fc(model.blocks[3](model.blocks[2](h)).mean((2, 3))), y)
        gradients = torch.autograd.grad(loss, scaled)
        norms = [torch.cat([part.flatten() for part in parts]).norm() for parts in (scaled, gradients)]
        expected += float((norms[0] * norms[1]).detach())
    options = Scoring("ig", mu=0.5, steps=3, quadrature="geometric")
    from singe_plugin.method.scoring import score_units

    (found,) = score_units(model, block.unit_group(), [(x, y)], options).tolist()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "criterion", ["ig", "ig_abs", "l2", "grad", "sg", "obs", "fast", "taylor", "hessian", "magnitude"]
)
def test_every_criterion_scores_blocks_beside_channels(criterion: str) -> None:
    theirs = {
        "taylor": tp.importance.TaylorImportance, "hessian": tp.importance.HessianImportance,
        "magnitude": tp.importance.MagnitudeImportance,
    }  # fmt: skip
    scoring: Any = Scoring.fast() if criterion == "fast" else Scoring(criterion if criterion not in theirs else "l2")
    if criterion in theirs:
        scoring = theirs[criterion](normalizer=None, group_reduction="sum")
    importance = scoring if criterion in theirs else singe_plugin.SInGEImportance(**vars(scoring))
    pruner = SInGEPruner(basic(), BATCHES[0][0], importance, target="macs=0.5", pace=Pace(blocks=True), batches=BATCHES)
    pruner.check()
    host = pruner.host()
    scores = host.score([spec.name for spec in host.layers()])
    for name in ("blocks.0", "blocks.1", "blocks.3"):
        assert scores[name].shape == (1,)
        assert float(scores[name]) > 0
    if criterion == "magnitude":
        layer = pruner.model.blocks[1]
        expected = layer.conv2.weight.square().sum() + layer.bn2.weight.square().sum()
        torch.testing.assert_close(scores["blocks.1"], expected.detach().reshape(1))


# -- how many go ------------------------------------------------------------------------------------------------


def test_blocks_and_channels_are_ranked_together_by_score_per_cost() -> None:
    """Costs by hand: a block of 100 for 1, one of 200 for 70; channels of 10, which are worth 1 to 10, and of 20."""
    tensors = [TensorCost((10, 10), ((0, "a", 1.0),)), TensorCost((100,), ((0, "one", 100.0),))]
    tensors += [TensorCost((10, 20), ((0, "b", 1.0), (0, "two", 10.0)))]
    layers = [GroupSpec("a", 10, "a"), GroupSpec("b", 10, "b", inside="two")]
    layers += [GroupSpec(name, 1, name, min_units=0) for name in ("one", "two")]
    scores = {"a": torch.arange(1.0, 11), "b": torch.full((10,), 180.0)}
    scores |= {"one": torch.tensor([1.0]), "two": torch.tensor([70.0])}
    costs = CostModel(tuple(tensors))
    found = plan_removals(layers, costs, Target("params", 120 / 400), "per_cost", scores=scores)
    assert found == {"a": 2, "b": 0, "one": 1, "two": 0}
    found = plan_removals(layers, costs, Target("params", 340 / 400), "per_cost", scores=scores)
    assert found == {"a": 4, "b": 0, "one": 1, "two": 1}  # nothing of b is removed before the block it is in


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_what_a_block_costs_is_what_is_gone_without_it(kind: str) -> None:
    for make, shape, blocks, _ in (NETS["basic"], NETS["vit"]):
        model, x = make().eval(), torch.randn(2, *shape)
        pruner = SInGEPruner(
            model, x, tp.importance.MagnitudeImportance(), target=f"{kind}=0.5", pace=Pace(blocks=True)
        )
        host = pruner.host()
        costs, plan = host.costs(kind), {blocks[0]: 1, blocks[-1]: 1}
        predicted, tried, before = costs.cost(kind, plan), host.trial(plan, kind), fingerprint(model)
        for name in plan:
            host.remove(name, [0])
        measured = count_params(model) if kind == "params" else count_macs(model, x)
        assert predicted == tried == measured
        assert fingerprint(model) != before


# -- whole runs -------------------------------------------------------------------------------------------------


def run(folder: Path | None = None, model: nn.Module | None = None, **options: Any) -> Result:
    given: dict[str, Any] = {
        "target": "macs=0.6", "scoring": Scoring("l2", batches=1), "pace": Pace(blocks=True, rounds=3, min_width=2),
        "finetune": FineTune(steps=4, every="layer", optimizer=torch.optim.AdamW), "repair": None, "val_data": BATCHES,
    }  # fmt: skip
    return prune(basic() if model is None else model, BATCHES, out_dir=folder, **{**given, **options})


def test_a_run_says_which_blocks_went_and_comes_back_from_its_files(tmp_path: Path) -> None:
    options = {"num_classes": CLASSES, "in_chans": 2, "layers": [2, 2, 1, 1], "channels": [8, 8, 12, 12]}
    model = timm.create_model("resnet18", **options)
    result = run(model=model)
    gone = result.removed_blocks
    assert gone
    assert abs(result.removed_macs - 0.6) <= 0.01
    rows = {row.name: (row.block, row.units_before, row.units_after) for row in result.layers}
    assert all(rows[name] == (name, 1, 0) for name in gone)
    assert all(rows[f"{name}.conv1"][2] == 0 for name in gone)
    assert "layer2.0" in result.left_whole
    assert not any(name.startswith(f"{b}.") for name in result.left_whole for b in gone)
    assert f"removed as a whole: {gone[0]}" in result.summary()
    assert not any("has 0 of" in text for text in result.warnings)
    assert {name for name in result.history.removals() if rows[name][1] == 1} == set(gone)
    assert {type(model.get_submodule(name)) for name in gone} == {nn.ReLU}
    builder = singe_plugin.Builder.factory("timm:create_model", model_name="resnet18", **options)
    singe_plugin.save(result, tmp_path, builder)
    loaded = singe_plugin.load(tmp_path, trust=True)
    assert loaded.removed_blocks == gone
    assert torch.equal(loaded.model(BATCHES[0][0]), model.eval()(BATCHES[0][0]))
    again = prune(
        loaded.model, BATCHES, target="macs=0.3", pace=Pace(blocks=True, min_width=1), finetune=0, repair=None
    )
    assert abs(again.removed_macs - 0.3) <= 0.01


@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupted_run_goes_on_where_it_was(count: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    start = basic()
    whole = run(model=copy.deepcopy(start))
    assert whole.removed_blocks
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, copy.deepcopy(start), callbacks=[StopAt("round_done", count + 1)])
    resumed = run(tmp_path, copy.deepcopy(start), resume=True)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("event", ["removed", "round_done"])
def test_a_failure_leaves_the_model_as_it_was(event: str) -> None:
    model = basic()
    optimizer = torch.optim.AdamW(model.parameters())
    model(BATCHES[0][0]).square().sum().backward()
    optimizer.step()
    before = fingerprint(model, vars(optimizer), versions=False)
    with pytest.raises(SingeError):
        stop = StopAt(event, 2, SingeError("stop"))
        run(model=model, callbacks=[stop], finetune=FineTune(steps=4, every="layer", optimizer=optimizer))
    assert_untouched(before, model, vars(optimizer), versions=False)


def test_a_round_that_is_undone_brings_its_blocks_back() -> None:
    model = basic()
    judged = iter([1.0, 0.9, 0.0, 0.0, 0.0])
    evaluate = singe_plugin.Evaluate(lambda _: next(judged), every="round", max_drop=0.2)
    result = run(model=model, val_data=evaluate, finetune=0, repair=None)
    assert result.stopped
    removed = result.history.removals()
    assert {name for name in removed if name in ("blocks.0", "blocks.1", "blocks.3")} == set(result.removed_blocks)
    assert model(BATCHES[0][0]).shape == (len(BATCHES[0][0]), CLASSES)


def test_the_survivors_take_over_from_a_block() -> None:
    """The layers behind give what they gave, as far as they can, and the repair is that of a masked network."""
    torch.manual_seed(2)
    model, x = basic().eval(), torch.randn(64, 2, 8, 8)
    for block in model.blocks:
        block.bn2.running_var.fill_(4.0)
    original = copy.deepcopy(model)
    graph = AxisGraph(model, x)
    remove_block(graph, find_blocks(graph)["blocks.1"])
    before = float((model(x) - original(x)).square().mean())
    done = singe_plugin.repair(model, original, [x])
    assert float((model(x) - original(x)).square().mean()) < 0.5 * before
    assert "blocks.3.conv1.weight" in [solved.name for solved in done.better]
    assert not any(solved.name.startswith("blocks.1.") for solved in done.layers)
    assert isinstance(model.blocks[1], nn.ReLU)
    run(repair=64, finetune=0, scoring="obs")


# -- what is asked for ------------------------------------------------------------------------------------------


def test_blocks_need_rounds_and_ratios_by_score() -> None:
    for given in ({"order": "layers"}, {"units_per_step": 1}, {"ratios": "uniform"}, {"ratios": {"fc": 0.5}}):
        with pytest.raises(ConfigError, match="blocks=True is for"):
            Pace(blocks=True, **given)
    with pytest.raises(ConfigError, match="blocks=True is for units"):
        singe_plugin.prune_weights(basic(), BATCHES, pace=Pace(blocks=True))
    with pytest.raises(ConfigError, match="normalizer='mean'"):
        run(scoring=Scoring("l2", normalizer="mean"))
    pruner = SInGEPruner(basic(), BATCHES[0][0], tp.importance.MagnitudeImportance(), pace=Pace(blocks=True))
    with pytest.raises(ConfigError, match=r"pace\.blocks"):
        pruner.step()


def test_a_model_without_blocks_is_pruned_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    with caplog.at_level(logging.WARNING, "singe_plugin"):
        run(model=net)
    assert "no residual block of Sequential can go as a whole" in caplog.text


def test_ignored_layers_keep_their_block() -> None:
    result = run(ignored_layers=["blocks.0.conv1"])
    assert result.left_whole["blocks.0"] == "a layer in it is in ignored_layers"
    assert "blocks.0" not in result.removed_blocks


def test_features_that_are_learned_from_keep_their_block() -> None:
    """A block itself may go: what is left of it is compared. A layer in it would not be there any more."""
    distill = singe_plugin.Distill("unpruned", features=("blocks.0.conv2", "blocks.1"))
    result = run(finetune=FineTune(steps=2, every="layer", distill=distill))
    assert result.left_whole["blocks.0"] == "the fine-tuning learns from the features of a layer in it"
    assert "blocks.1" not in result.left_whole


def test_the_inspection_lists_blocks() -> None:
    found = inspect_model(basic(), BATCHES[0][0], pace=Pace(blocks=True, min_width=1))
    rows = {group.name: group for group in found.groups}
    block = rows["blocks.1"]
    assert (block.units, block.params) == (1, count_params(basic().blocks[1]))
    assert block.producers == ("blocks.1.conv2",)
    assert "blocks.2" in found.left_whole
    assert found.cost is not None
