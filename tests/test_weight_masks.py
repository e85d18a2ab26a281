"""Masks on weights: held, folded to the same bits, saved and loaded bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from singe_plugin import Builder, UnstructuredPruner, hold_masks, load, prune, prune_weights, save
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.masks import fold_masks, mask_module, masks_of, plain_tensors, weight_of

from asked import asked
from small_nets import Chain, Grouped, assert_same_values, images, mlp, values_of

BATCHES = images(2)
BUILDER = Builder.factory("small_nets:Chain")
FAST: dict[str, Any] = {"nodes": 1, "rounds": 2, "finetune_steps": 4}


def masked(model: nn.Module, share: float = 0.5) -> dict[str, torch.Tensor]:
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    masks = {f"{name}.weight": torch.rand_like(model.get_submodule(name).weight) > share for name in names}
    hold_masks(model, masks)
    return masks


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_folding_gives_the_same_bits(training: bool, last: bool) -> None:
    net = Chain()
    if last:
        net.to(memory_format=torch.channels_last)
    plain, names = copy.deepcopy(net), list(net.state_dict())
    parameters, places = list(net.parameters()), [p.data_ptr() for p in net.parameters()]
    masks = masked(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):  # what is masked drifts
        functional.cross_entropy(net(BATCHES[0][0]), BATCHES[0][1]).backward()
        optimizer.step()
    weight_of(net.conv1).data[~masks["conv1.weight"]] = float("nan")  # whatever it is
    twin = copy.deepcopy(net)
    expected = twin.train(training)(BATCHES[0][0])
    found = fold_masks(net)
    assert torch.equal(net.train(training)(BATCHES[0][0]), expected)
    assert {k: m.tolist() for k, m in found.items()} == {k: m.tolist() for k, m in masks.items()}
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    assert list(net.state_dict()) == names
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert [p.data_ptr() for p in net.parameters()] == places
    assert masks_of(net) == {}
    for name, mask in masks.items():
        assert not bool(net.get_parameter(name)[~mask].any())
    assert fold_masks(net) == {}
    assert torch.equal(twin(BATCHES[0][0]), expected)  # a copy has masks of its own


def test_masks_are_set_again_and_state_dicts_have_them() -> None:
    net, other = Chain(), Chain()
    masks = masked(net)
    masked(other, 0.9)
    state = net.state_dict()
    assert "conv1.parametrizations.weight.0.mask" in state
    other.load_state_dict(state)
    assert torch.equal(other(BATCHES[0][0]), net(BATCHES[0][0]))
    held = mask_module(net.conv1)
    hold_masks(net, {"conv1.weight": torch.zeros_like(masks["conv1.weight"])})
    assert mask_module(net.conv1) is held
    assert not bool(net.conv1.weight.any())
    net.fc.weight = torch.ones(3, 8)  # an assignment goes behind the mask
    assert torch.equal(net.fc.weight, masks["fc.weight"].float())


def test_masks_that_do_not_fit() -> None:
    net = Chain()
    right = torch.ones_like(net.conv1.weight, dtype=torch.bool)
    before = values_of(net)
    for masks, message in (
        ({"conv1.weight": right, "conv9.weight": right}, "the model has no weight 'conv9.weight'"),
        ({"conv1.weight": right, "conv2.bias": right}, "the model has no weight 'conv2.bias'"),
        ({"conv1.weight": right, "fc.weight": right}, r"'fc.weight' has a mask of torch.bool \(8, 2, 3, 3\).*\(3, 8\)"),
        ({"conv1.weight": right.float()}, "has a mask of torch.float32"),
    ):
        with pytest.raises(ConfigError, match=message):
            hold_masks(net, masks)
    assert_same_values(net, before)


def test_plain_tensors_are_those_of_the_folded_model() -> None:
    net = Grouped()
    net.again = net.conv1  # one module under two names
    masked(net)
    net.conv2.requires_grad_(False)
    found = {name: t.detach().clone() for name, t in plain_tensors(net)}
    frozen = {n for n, t in plain_tensors(net) if isinstance(t, nn.Parameter) and not t.requires_grad}
    assert frozen == {"conv2.weight", "conv2.bias"}
    fold_masks(net)
    assert_same_values(found, net)


# --- artifacts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_saved_and_loaded_bit_for_bit(last: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Chain()
    net.conv3.weight.requires_grad_(False)
    if last:
        net.to(memory_format=torch.channels_last)
    result = prune_weights(net, BATCHES, **asked(sparsity=0.6, val_data=BATCHES, **FAST))
    with torch.no_grad():
        net.conv2.weight[:2] = 0.0  # zeros that are not masked
    save(result, tmp_path, BUILDER)
    again = load(tmp_path, trust=True)
    assert_same_values(again.model, result.model)
    assert torch.equal(again.model(BATCHES[0][0]), result.model.eval()(BATCHES[0][0]))
    assert_same_values(again.weight_masks, result.weight_masks)
    assert bool((again.model.conv2.weight[again.weight_masks["conv2.weight"]] == 0).any())
    assert (again.before, again.after, again.layers) == (result.before, result.after, result.layers)
    assert again.summary() == result.summary()
    assert (again.sparsity, again.weight_sparsity) == (result.sparsity, result.weight_sparsity)
    assert not again.model.conv3.weight.requires_grad
    assert set(load_file(tmp_path / "model.safetensors")) == set(values_of(Chain()))
    # training goes on in the same way with what was loaded
    for model in (result.model, again.model):
        hold_masks(model, again.weight_masks)
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for inputs, targets in BATCHES * 2:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(inputs), targets).backward()
            optimizer.step()
    assert_same_values(again.model, result.model)


def test_a_model_whose_masks_are_on_is_saved_as_if_they_were_folded(tmp_path: Path) -> None:
    result = prune_weights(Chain(), BATCHES, **asked(sparsity=0.6, **FAST))
    save(result, tmp_path / "folded", BUILDER)
    hold_masks(result.model, result.weight_masks)
    save(result, tmp_path / "held", BUILDER)
    one, other = load(tmp_path / "folded", trust=True), load(tmp_path / "held", trust=True)
    assert_same_values(one.model, other.model)
    assert_same_values(one.weight_masks, other.weight_masks)


def test_masks_that_were_not_held_are_not_saved(tmp_path: Path) -> None:
    result = prune_weights(Chain(), BATCHES, **asked(sparsity=0.6, **FAST))
    with torch.no_grad():
        result.model.conv1.weight += 1
    with pytest.raises(ArtifactError, match=r"the mask of 'conv1.weight' does not fit.*hold_masks.*weight_masks = {}"):
        save(result, tmp_path, BUILDER)
    assert not (tmp_path / "singe.json").exists()
    result.weight_masks = {}
    assert load(save(result, tmp_path, BUILDER), trust=True).weight_masks == {}


def test_damaged_masks(tmp_path: Path) -> None:
    save(prune_weights(Chain(), BATCHES, **asked(sparsity=0.6, **FAST)), tmp_path, BUILDER)
    path = tmp_path / "masks.safetensors"
    masks = load_file(path)
    for damage, message in (
        ({**masks, "conv1.weight": ~masks["conv1.weight"]}, "'conv1.weight' has another checksum there"),
        ({**masks, "conv1.weight": masks["fc.weight"].clone()}, "'conv1.weight' has another checksum there"),
        ({k: v for k, v in masks.items() if k != "fc.weight"}, "'fc.weight' has another checksum there"),
    ):
        save_file(damage, path)
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path, trust=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"masks.safetensors is damaged"):
        load(tmp_path, trust=True)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"masks.safetensors is damaged or missing"):
        load(tmp_path, trust=True)


def test_units_have_no_masks_and_take_those_of_an_earlier_result_away(tmp_path: Path) -> None:
    save(prune_weights(Chain(), BATCHES, **asked(sparsity=0.6, **FAST)), tmp_path, BUILDER)
    assert (tmp_path / "masks.safetensors").exists()
    result = prune(Chain(), BATCHES, **asked(verify=False, finetune_steps=2, nodes=1, units_per_step="layer"))
    assert (result.sparsity, result.weight_sparsity, result.weight_masks) == (None, None, {})
    assert "sparsity" not in result.summary()
    save(result, tmp_path, BUILDER)
    assert not (tmp_path / "masks.safetensors").exists()
    assert load(tmp_path, trust=True).weight_masks == {}


def test_a_model_that_is_one_layer() -> None:
    net = nn.Linear(4, 4)
    outcome = UnstructuredPruner(net, [(torch.randn(3, 4), torch.tensor([0, 1, 2]))], sparsity=0.5).run()
    assert list(outcome.masks) == ["weight"]
    assert (outcome.macs, outcome.effective_macs) == (16, 8)
    hold_masks(other := nn.Linear(4, 4), outcome.masks)
    assert int(other.weight.count_nonzero()) == 8
    assert mask_module(mlp()) is None


def test_pruning_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """Saved, loaded, held and pruned further: the architecture is still recognised, and masks only grow."""
    first = prune_weights(Chain(), BATCHES, **asked(sparsity=0.5, **FAST))
    loaded = load(save(first, tmp_path / "first", BUILDER), trust=True)
    hold_masks(loaded.model, loaded.weight_masks)
    BUILDER.check(loaded.model)
    second = prune_weights(loaded.model, BATCHES, **asked(sparsity=0.8, **FAST))
    assert second.before.nonzero == first.after.nonzero
    assert second.before.effective_macs == first.after.effective_macs
    for name, mask in second.weight_masks.items():
        assert not bool((mask & ~first.weight_masks[name]).any())
    again = load(save(second, tmp_path / "second", BUILDER), trust=True)
    assert_same_values(again.model, second.model)
    with pytest.raises(ArtifactError, match="does not build this model"):
        Builder.factory("small_nets:Grouped").check(loaded.model)
