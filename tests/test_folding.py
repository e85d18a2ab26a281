"""Folded models compute what they computed before; what cannot be folded is named, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from singe_plugin.axes import AxisGraph, verify_groups
from singe_plugin.errors import FoldingError
from singe_plugin.method.folding import fold_batchnorm, foldable_pairs, is_batchnorm, norm_scale_shift, replace_folded
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.method.units import Producer, Slot, UnitGroup

from references import CASES, Net, get_case, randomise_norms


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if is_batchnorm(m)]


def check_folding(model: nn.Module, inputs: torch.Tensor, tolerance: float = 1e-4) -> Any:
    """Fold a model with random statistics and compare its function before and after."""
    randomise_norms(model).eval()
    with torch.no_grad():
        before = model(inputs)
        report = fold_batchnorm(model, inputs)
        after = model(inputs)
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    return report


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 3), nn.BatchNorm3d(6)),
    "grouped transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "depthwise transposed": (nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)),
    "linear without affine": (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)),
    "conv without affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)),
    "grouped transposed without affine": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)),
    "large eps": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, eps=0.1)),
    "sync": (nn.Conv2d(4, 6, 1), nn.SyncBatchNorm(6)),
    "torchvision frozen": (nn.Conv2d(4, 6, 1), FrozenBatchNorm2d(6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer(name: str) -> None:
    layer, norm = copy.deepcopy(LAYERS[name])
    inputs = torch.randn(3, 4, *[5] * (layer.weight.ndim - 2))
    report = check_folding(nn.Sequential(layer, norm, nn.ReLU()), inputs, 1e-5)
    assert report.folded == (("0", "1"),)
    assert report.left == {}
    assert layer.bias is not None


@pytest.mark.parametrize("name", CASES)
def test_the_same_rows_as_by_hand(name: str) -> None:
    case = get_case(name)
    model = copy.deepcopy(case.model)
    report = fold_batchnorm(model, case.batches[0][0])
    by_hand = dict(case.folded.named_parameters())
    for layer, _ in report.folded:
        for attr in ("weight", "bias"):
            torch.testing.assert_close(model.get_submodule(layer)._parameters[attr], by_hand[f"{layer}.{attr}"])
    left = [n for n, m in case.model.named_children() if is_batchnorm(m) and n not in dict(report.folded).values()]
    assert sorted(report.left) == left


@pytest.mark.parametrize("name", CASES)
def test_scoring_folds_virtually_what_folding_folds_for_good(name: str) -> None:
    case = get_case(name)
    model = copy.deepcopy(case.model)
    fold_batchnorm(model, case.batches[0][0])
    producers = []
    for producer in case.group.producers:
        layer = getattr(model, producer.name)
        owner = model if isinstance(layer, nn.Parameter) else layer
        slots = tuple(Slot(owner, slot.attr, slot.layout) for slot in producer.slots)
        producers.append(Producer(producer.name, slots, producer.rows, producer.units, None, producer.is_norm))
    folded = UnitGroup(case.group.name, case.group.size, tuple(producers))
    for options in (Scoring(criterion="l2"), Scoring(nodes=3)):
        virtual = score_units(case.model, case.group, case.batches, options)
        torch.testing.assert_close(score_units(model, folded, case.batches, options), virtual)


@pytest.mark.parametrize(("name", "standing_alone"), [("resnet10t", 0), ("efficientnet_lite0", 0), ("repvgg_a0", 17)])
def test_timm_models(name: str, standing_alone: int) -> None:
    # float64 tells a wrong fold from rounding, which these deep models amplify
    model = timm.create_model(name, num_classes=7).double()
    before = len(norms(model))
    report = check_folding(model, torch.randn(2, 3, 64, 64).double(), 1e-9)
    assert len(report.folded) == before - standing_alone > 10
    assert len(report.left) == len(norms(model)) == standing_alone


@pytest.mark.parametrize("kind", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_the_activation_of_a_norm_survives(kind: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, act_layer=nn.SiLU), nn.Conv2d(4, 2, 1), kind(2, apply_act=False))
    report = check_folding(model, torch.randn(2, 3, 4, 4), 1e-5)
    assert len(report.folded) == 2
    assert isinstance(model[1], nn.SiLU)
    assert isinstance(model[3], nn.Identity)


def test_drop_layers_and_modes_survive() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer=nn.ReLU))
    model[1].eval()
    replace_folded(model, "1")
    assert [type(m) for m in model[1]] == [nn.Dropout, nn.ReLU]
    assert model.training
    assert not any(m.training for m in model[1].modules())


def test_parameters_keep_their_identity_precision_and_freedom() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model.half()
    weight = model[0].weight.requires_grad_(False)
    x = torch.randn(1, 3, 2, 2).half()
    fold_batchnorm(model, x)
    assert model[0].weight is weight
    assert model[0].bias.dtype == weight.dtype == torch.float16
    assert not model[0].bias.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_under_two_names_is_replaced_under_both() -> None:
    norm = nn.BatchNorm1d(3)
    model = Net(lambda m, x: m.seq(x), norm=norm, seq=nn.Sequential(nn.Linear(3, 3), norm))
    assert check_folding(model, torch.randn(4, 3), 1e-5).folded == (("seq.0", "norm"),)
    assert norms(model) == []


def once(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.bn(m.fc(x))


def tied() -> nn.Module:
    model = Net(
        lambda m, x: m.bn(m.fc(x)) + m.other(x), fc=nn.Linear(3, 3), other=nn.Linear(3, 3), bn=nn.BatchNorm1d(3)
    )
    model.other.weight = model.fc.weight
    return model


def layers(function: Any, norm: nn.Module | None = None, **more: nn.Module) -> nn.Module:
    return Net(function, **{"fc": nn.Linear(3, 3), "bn": norm or nn.BatchNorm1d(3), **more})


LEFT = {
    "did not run": (lambda: layers(lambda m, x: m.fc(x)), "did not run in the forward pass"),
    "no statistics": (
        lambda: layers(once, nn.BatchNorm1d(3, track_running_stats=False)), "keeps no running statistics"
    ),
    "called twice": (lambda: layers(lambda m, x: m.bn(m.bn(m.fc(x)))), "called more than once"),
    "reads an activation": (lambda: layers(lambda m, x: m.bn(m.fc(x).relu())), "not the output of a convolution"),
    "reads the input": (lambda: layers(lambda m, x: m.bn(x) + m.fc(x)), "not the output of a convolution"),
    "reads a sum": (lambda: layers(lambda m, x: m.bn(m.fc(x) + x)), "not the output of a convolution"),
    "layer called twice": (lambda: layers(lambda m, x: m.bn(m.fc(m.fc(x)))), "fc is called more than once"),
    "read elsewhere": (
        lambda: layers(lambda m, x: (lambda y: m.bn(y) + y)(m.fc(x))), "the output of fc is read elsewhere too"
    ),
    "read by the caller": (
        lambda: layers(lambda m, x: (lambda y: {"a": m.bn(y), "b": [y]})(m.fc(x))), "output of fc is read elsewhere"
    ),
    "read by two norms": (
        lambda: layers(lambda m, x: (lambda y: m.bn(y) + m.bn2(y))(m.fc(x)), bn2=nn.BatchNorm1d(3)),
        "the output of fc is read elsewhere too",
    ),
    "parametrized": (
        lambda: Net(once, fc=parametrizations.weight_norm(nn.Linear(3, 3)), bn=nn.BatchNorm1d(3)),
        "the weight of fc is computed",
    ),
    "tied": (tied, "fc shares a parameter with another layer"),
    "other width": (  # on [B, 3, 3] the norm runs over a dimension that the layer did not write
        lambda: Net(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(3, 5), bn=nn.BatchNorm1d(3)),
        "does not have one channel per output of fc",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str) -> None:
    build, reason = LEFT[name]
    model = build()
    x = torch.randn(4, 3, 3) if name == "other width" else torch.randn(4, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = fold_batchnorm(model, x)
    assert report.folded == ()
    assert "bn" in report.left
    assert reason in report.left["bn"], report.left
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(m.training for m in model.modules() if not isinstance(m, nn.Identity))


def test_finding_pairs_leaves_the_model_alone_even_when_it_fails() -> None:
    model = layers(once)
    model.bn.eval()
    with pytest.raises(RuntimeError):
        foldable_pairs(model, torch.randn(4, 7))
    assert [m.training for m in model.modules()] == [True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scale_and_shift_are_those_of_the_formula() -> None:
    norm = nn.BatchNorm1d(3)
    randomise_norms(norm)
    scale, shift = norm_scale_shift(norm)
    for c in range(3):
        factor = norm.weight[c].item() / (norm.running_var[c].item() + norm.eps) ** 0.5
        assert scale[c].item() == pytest.approx(factor, rel=1e-5)
        expected = norm.bias[c].item() - norm.running_mean[c].item() * factor
        assert shift[c].item() == pytest.approx(expected, rel=1e-5)
    assert norm_scale_shift(nn.BatchNorm1d(3).half())[0].dtype == torch.float32
    with pytest.raises(FoldingError, match="BatchNorm1d keeps no running statistics"):
        norm_scale_shift(nn.BatchNorm1d(3, track_running_stats=False))


def test_what_counts_as_a_batchnorm() -> None:
    yes = [nn.BatchNorm2d(2), nn.SyncBatchNorm(2), BatchNormAct2d(2), FrozenBatchNormAct2d(2), FrozenBatchNorm2d(2)]
    no = [nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2, track_running_stats=True), nn.ReLU(), "BatchNorm"]
    assert all(map(is_batchnorm, yes))
    assert not any(map(is_batchnorm, no))


def test_a_reader_outside_autograd_is_noticed_and_everything_is_put_back() -> None:
    """The trace follows autograd; a detached second reader is seen only in the output."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y.detach()

    model = Reader()
    nn.init.uniform_(model.norm.running_var, 2.0, 3.0)
    weight, before = model.conv.weight, copy.deepcopy(model.state_dict())
    data = weight.data_ptr()
    with pytest.raises(FoldingError, match=r"folding 1 batch-norms of Reader changes the output"):
        fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert model.conv.weight is weight
    assert weight.data_ptr() == data
    assert model.conv.bias is None
    assert type(model.norm) is nn.BatchNorm2d
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def frozen(function: Any, **more: nn.Module) -> Any:
    return lambda: layers(function, FrozenBatchNorm2d(3), fc=nn.Conv2d(3, 3, 1), **more)


FROZEN = {
    "frozen": frozen(once),
    "frozen, twice": frozen(lambda m, x: m.bn(m.bn(m.fc(x)))),
    "frozen, of two layers": frozen(lambda m, x: m.bn(m.fc(x)) + m.bn(m.other(x)), other=nn.Conv2d(3, 3, 1)),
    "frozen, read elsewhere": frozen(lambda m, x: (lambda y: m.bn(y) + y)(m.fc(x))),
    "frozen, of a sum": frozen(lambda m, x: m.bn(m.fc(x) + x)),
    "frozen, read by the caller": frozen(lambda m, x: (lambda y: (m.bn(y), y))(m.fc(x))),
}


def test_a_frozen_norm_is_scored_and_pruned_with_its_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    for name, value in net[1].named_buffers():
        value.copy_(torch.rand(6) + (0.5 if name != "bias" else 0.0))
    x = torch.randn(2, 3, 5, 5)
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    scores = score_units(net, graph.groups["0"].unit_group(), [], Scoring(criterion="l2"))
    fold_batchnorm(net, x)
    rows = torch.cat([net[0].weight.flatten(1), net[0].bias[:, None]], 1)
    torch.testing.assert_close(scores, rows.norm(dim=1).detach().to(scores.dtype))


@pytest.mark.parametrize("name", [*LAYERS, *CASES, *LEFT, *FROZEN])
def test_the_trace_and_autograd_agree_on_what_folds(name: str) -> None:
    """Whether it is found with the groups or by itself, a norm folds into the same layer."""
    if name in LAYERS:
        layer, norm = copy.deepcopy(LAYERS[name])
        model: nn.Module = nn.Sequential(layer, norm, nn.ReLU())
        x = torch.randn(3, 4, *[5] * (layer.weight.ndim - 2))
    elif name in CASES:
        model, x = get_case(name).model, get_case(name).batches[0][0]
    elif name in FROZEN:
        model, x = FROZEN[name](), torch.randn(4, 3, 2, 2)
    else:
        model, x = LEFT[name][0](), torch.randn(4, 3, 3) if name == "other width" else torch.randn(4, 3)
    names = {module: key for key, module in model.named_modules()}
    graph = AxisGraph(model, x)
    found = {(key, names[norm]) for module, key in names.items() if (norm := graph.norm_of(module)) is not None}
    assert found - set(foldable_pairs(model, x)[0]) <= MORE.get(name, set())
    assert set(foldable_pairs(model, x)[0]) <= found


MORE = {key: {("fc", "bn")} for key in ("tied", "parametrized")}  # scoring refuses the whole group, and says so
