"""Shrinking masked models: the smaller model computes what the masked one does, on any input, or the units stay."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import timm
import torch
from shrinking import (
    MIXED,
    NETS,
    Masks,
    difference,
    filled,
    head_of,
    mask_of,
    masked_copy,
    one_in_four,
    positions,
    random_masks,
    rows,
    with_tags,
)
from torch import nn

from singe_plugin.shrink import ShrinkResult, shrink, shrink_with_report

from masking import Masked
from networks import random_network, randomise
from references import Net
from small_nets import Chain, Grouped, Residual, assert_same_values, values_of

# --- equal to the masked model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_everything_that_is_masked_goes_and_the_outputs_are_those_of_the_masked_model(name: str) -> None:
    make, shapes = NETS[name]
    model = randomise(make())
    masks = one_in_four(model, *head_of(model), "lstm")  # the axes have no groups for hidden units
    masked, before = masked_copy(model, masks), values_of(model)
    result = shrink_with_report(model, masks, torch.randn(1, *shapes[0][1:]))
    assert difference(masked, model, *shapes) < 1e-6
    assert (result.still_masked, result.masks) == ({}, {})
    for layer, targets in masks.items():
        kept = getattr(model.get_submodule(layer), "weight", None)
        if kept is not None and "weight" in targets:
            dim = int(bool(getattr(model.get_submodule(layer), "transposed", False)))
            assert kept.shape[dim] == before[f"{layer}.weight"].shape[dim] * 3 // 4, layer
    assert result.after.params == sum(p.numel() for p in model.parameters()) < 0.96 * result.before.params


@pytest.mark.parametrize("name", MIXED)
def test_norms_over_channels_keep_their_channels_unless_they_may_change(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = MIXED[name]
    model = randomise(make())
    masks, x = one_in_four(model, *head_of(model)), torch.randn(shape)
    masked, other = masked_copy(model, masks), copy.deepcopy(model)
    result = shrink_with_report(model, masks, x)
    assert difference(masked, model, shape) < 1e-6
    assert any("allow_norms=True" in why for why in result.still_masked.values())
    assert result.masks
    tags = with_tags(other, masks, monkeypatch)
    again = shrink_with_report(other, masks, x, allow_norms=True, allow_constants=True)  # a position embedding is one
    assert again.still_masked == {}
    assert again.after.params < result.after.params <= result.before.params
    if name != "convnext":  # the reference takes every LayerNorm over the last dimension
        assert difference(tags.model().double(), other, shape) < 1e-6
    assert again.difference > 1e-6  # and it says so


def spoil(model: nn.Module, rng: random.Random) -> None:
    """Values by which units are silent or unread by luck: zeros, rectifiers that are off."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and rng.random() < 0.2:
                    parameter.zero_() if rng.random() < 0.4 else parameter.sub_(10.0 if parameter.ndim == 1 else 0.0)


@pytest.mark.parametrize("chunk", range(6))
def test_random_masks_of_random_networks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = 0
    for seed in range(300 + 10 * chunk, 310 + 10 * chunk):
        rng, network = random.Random(seed), random_network(seed)
        torch.manual_seed(seed)
        if seed % 2:
            spoil(network.model, rng)
        options = {"allow_constants": seed % 5 == 0, "allow_norms": seed % 5 in (0, 1)}
        masks = random_masks(network.model, rng)
        given, masked = copy.deepcopy(masks), masked_copy(network.model, masks)
        with monkeypatch.context() as patch:
            tags = with_tags(network.model, masks, patch)
            result = shrink_with_report(network.model, masks, network.inputs, **options)
        check_masks(tags, masks, result)
        assert all(torch.equal(m, given[name][k]) for name, targets in masks.items() for k, m in targets.items())
        expected = tags.model().double() if any(options.values()) else masked
        if network.inputs.is_floating_point():
            found = difference(expected, network.model, (4, *network.inputs.shape[1:]))
        else:
            ids = torch.randint(0, 7, (6, *network.inputs.shape[1:]))
            with torch.no_grad():
                found = float((expected(ids) - copy.deepcopy(network.model).double()(ids)).abs().max())
        assert found < 1e-6, f"seed {seed} ({network.description}): {found:.2g}"
        removed += sum(len(units) for units in result.history.removals().values())
    assert removed > 20


def check_masks(tags: Masked, masks: Masks, result: ShrinkResult) -> None:
    """What is left of the masks is exactly what is left of the parameters that were masked."""
    ones = copy.deepcopy(tags.original)
    for parameter in ones.parameters():
        parameter.data.fill_(1.0)
    expected = dict(masked_copy(ones, masks).named_parameters(remove_duplicate=False))
    for name, parameter in result.model.named_parameters(remove_duplicate=False):
        layer, _, target = name.rpartition(".")
        left = expected[name].float().flatten()[positions(tags, layer, target).flatten()].view(parameter.shape)
        found = result.masks.get(layer, {}).get(target)
        if found is None:
            assert bool((left == 1).all()), name
        else:
            assert torch.equal(found, left), name
            assert bool((found == 0).any()), name
            assert bool((parameter[found == 0] == 0).all()), name


# --- what must stay, and what must not ----------------------------------------------------------------------------


def off() -> tuple[nn.Module, Masks]:
    """A sum of a masked row and one whose rectifier is off on all ordinary inputs."""
    net = Net(lambda m, x: m.fc(torch.relu(m.a(x) + m.b(x))), a=nn.Linear(4, 6), b=nn.Linear(4, 6), fc=nn.Linear(6, 3))
    filled(net.b.bias, -100.0)
    return net, {"a": rows(net, "a", 1)}


def off_behind_a_norm() -> tuple[nn.Module, Masks]:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))
    filled(net[1].bias, -2.0)
    filled(net[1].weight, 0.9)
    return net, {"0": rows(net, "0", 1), "1": rows(net, "1", 1)}


def off_behind_a_sum() -> tuple[nn.Module, Masks]:
    net = Net(
        lambda m, x: m.fc(torch.relu((lambda y: y - y.sum(1, keepdim=True))(m.a(x)))), a=nn.Linear(4, 6),
        fc=nn.Linear(6, 3),
    )  # fmt: skip
    filled(net.a.bias, 5.0)
    return net, {"a": rows(net, "a", 1)}


def zero_head() -> tuple[nn.Module, Masks]:
    """Nobody reads the hidden units, but no mask says so."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    filled(net[2].weight, 0.0)
    single = torch.ones(6, 4)
    single[2, 1] = 0.0
    return net, {"0": {"weight": single}}


def zero_branch() -> tuple[nn.Module, Masks]:
    """A constant inside a residual branch that its last norm multiplies by zero, as many initialisations do."""
    branch = nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )  # fmt: skip
    net = Net(
        lambda m, x: m.fc((lambda y: y + m.branch(y))(m.stem(x[..., None, None])).mean((2, 3))),
        stem=nn.Conv2d(4, 4, 1), branch=branch, fc=nn.Linear(4, 3),
    )  # fmt: skip
    filled(branch[1].bias, 1.0)
    filled(branch[4].weight, 0.0)
    return net, {"branch.0": rows(net, "branch.0", 2)}


def constant_into_lstm() -> tuple[nn.Module, Masks]:
    net = Net(
        lambda m, x: m.fc(m.lstm(m.stem(x)[:, None])[0].mean(1)),
        stem=nn.Linear(4, 6), lstm=nn.LSTM(6, 5, batch_first=True), fc=nn.Linear(5, 3),
    )  # fmt: skip
    return net, {"stem": rows(net, "stem", 2, targets=("weight",))}


@pytest.mark.parametrize("make", [off, off_behind_a_norm, off_behind_a_sum, zero_head, zero_branch, constant_into_lstm])
def test_what_is_silent_or_unread_by_luck_stays(make: Callable[[], tuple[nn.Module, Masks]]) -> None:
    model, masks = make()
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, 0.1 * torch.randn(2, 4))
    assert result.history.removals() == {}
    assert_same_values(masked.float(), model)
    assert list(result.still_masked) == list(masks)[:1]  # under the name of the group
    assert result.masks.keys() == masks.keys()


def test_constants_are_removed_only_where_they_end_in_a_rectifier_or_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def net() -> Chain:
        model = randomise(Chain())
        filled(model.bn1.running_mean, 0.0)
        model.bn1.bias.data[:4] = torch.tensor([-1.0, -2.0, 0.5, 1.0])
        return model

    model, other = net(), net()
    masks = {"conv1": rows(model, "conv1", 0, 1, 2, 3)}
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, torch.randn(1, 2, 6, 6))
    assert result.history.removals() == {"conv1": [0, 1]}
    assert difference(masked, model, (2, 2, 6, 6), (1, 2, 9, 7)) < 1e-6
    assert "2 masked units still pass a constant on" in result.still_masked["conv1"]
    assert "allow_constants=True" in result.still_masked["conv1"]
    assert result.masks["conv1"]["weight"].flatten(1).amax(1).tolist() == [0, 0, 1, 1, 1, 1]
    other.load_state_dict(net().state_dict())
    tags = with_tags(other, masks, monkeypatch)
    result = shrink_with_report(other, masks, torch.randn(1, 2, 6, 6), allow_constants=True)
    assert result.history.removals() == {"conv1": [0, 1, 2, 3]}
    assert (result.still_masked, result.masks) == ({}, {})
    assert difference(tags.model().double(), other, (2, 2, 6, 6)) < 1e-6
    assert result.difference > 1e-4


def test_an_activation_of_zero_is_a_constant() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))
    masks, expected = {"0": rows(model, "0", 2, 4)}, copy.deepcopy(model).double()
    assert "constant" in shrink_with_report(copy.deepcopy(model), masks, torch.randn(2, 4)).still_masked["0"]
    shrink(model, masks, torch.randn(2, 4), allow_constants=True)
    expected[2].weight.data[:, [2, 4]] = 0.0
    assert model[0].out_features == 4
    assert difference(expected, model, (3, 4)) < 1e-6


def test_in_channel_masks_remove_units_that_nobody_reads() -> None:
    model = randomise(Chain())
    gone = torch.isin(torch.arange(8), torch.tensor([3, 6]))
    masks = {"conv2": {"weight": mask_of(model.conv2.weight, ~gone, 1)}}
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, torch.randn(1, 2, 6, 6))
    assert result.history.removals() == {"conv1": [3, 6]}
    assert (result.masks, model.conv1.out_channels, model.conv2.in_channels) == ({}, 6, 6)
    assert difference(masked, model, (2, 2, 6, 6)) < 1e-6


def test_the_last_unit_the_output_and_channels_that_others_write_stay() -> None:
    model = randomise(Residual())
    masks = {
        "blocks.0.0": rows(model, "blocks.0.0", *range(16)), "blocks.0.1": rows(model, "blocks.0.1", *range(16)),
        "stem": rows(model, "stem", 1, 2), "blocks.0.3": rows(model, "blocks.0.3", 1), "fc": rows(model, "fc", 0),
    }  # fmt: skip
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, torch.randn(1, 2, 6, 6))
    assert difference(masked, model, (2, 2, 6, 6)) < 1e-6
    assert model.blocks[0][0].out_channels == 1
    assert result.history.removals() == {"blocks.0.0": list(range(15))}
    assert "the last one stays" in result.still_masked["blocks.0.0"]
    assert "it reaches the model's output" in result.still_masked["fc"]
    assert "2 of 8 units" in result.still_masked["stem"]
    assert "blocks.1.3.weight" in result.still_masked["stem"]
    assert "1 of 8 units" in result.still_masked["blocks.0.3"]


def test_whole_heads_go_and_single_channels_of_one_head_stay() -> None:
    model = randomise(timm.create_model("test_vit", num_classes=5, img_size=32, num_heads=4))
    attn = model.blocks[0].attn
    heads, width = attn.num_heads, attn.head_dim
    inside = torch.arange(3 * heads * width) % (heads * width)
    keep = (inside // width != 1) & (inside != 3)
    masks = {"blocks.0.attn.qkv": {k: mask_of(p, keep) for k, p in attn.qkv.named_parameters()}}
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, torch.randn(1, 3, 32, 32))
    assert (attn.num_heads, attn.head_dim) == (heads - 1, width)
    assert attn.qkv.out_features == 3 * (heads - 1) * width
    assert difference(masked, model, (2, 3, 32, 32)) < 1e-6
    assert "other heads" in result.still_masked["blocks.0.attn.qkv"]
    assert int((result.masks["blocks.0.attn.qkv"]["bias"] == 0).sum()) == 3


def test_a_masked_depthwise_convolution_takes_the_layer_in_front_along() -> None:
    model = randomise(Grouped())
    masks = {"dw": rows(model, "dw", 0, 9), "bn": rows(model, "bn", 0, 9), "conv2": rows(model, "conv2", 8, 16, 24)}
    masks["dw"]["weight"][[8, 16, 24]] = masks["bn"]["weight"][[8, 16, 24]] = masks["bn"]["bias"][[8, 16, 24]] = 0.0
    masks["dw"]["bias"][[8, 16, 24]] = 0.0
    masked = masked_copy(model, masks)
    result = shrink_with_report(model, masks, torch.randn(1, 2, 6, 6))
    assert result.history.removals() == {"conv2": [0]}  # the same channel of all four groups; 9 is in one group only
    assert model.dw.groups == model.dw.out_channels == 28
    assert difference(masked, model, (2, 2, 6, 6)) < 1e-6


def test_a_model_that_insists_on_single_precision() -> None:
    model = Net(lambda m, x: m.fc(m.norm(torch.relu(m.a(x.float())))), a=nn.Linear(4, 8), norm=nn.BatchNorm1d(8),
                fc=nn.Linear(8, 3))  # fmt: skip
    model = randomise(model)
    masks, x = {"a": rows(model, "a", 1, 6), "norm": rows(model, "norm", 1, 6)}, torch.randn(64, 4)
    masked = masked_copy(model, masks).float()
    result = shrink_with_report(model, masks, x[:2])
    assert result.history.removals() == {"a": [1, 6]}
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x), rtol=1e-5, atol=1e-6)
