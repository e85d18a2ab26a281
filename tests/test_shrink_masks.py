"""Masks in every form, what does not fit, what a failure leaves, and the report."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from shrinking import NETS, SHRINK, Masks, difference, head_of, masked_copy, one_in_four, rows
from torch import Tensor, nn

from singe_plugin import Builder, load, save
from singe_plugin.errors import ConfigError, GroupError, SingeError
from singe_plugin.shrink import shrink, shrink_with_report
from singe_plugin.shrink.masks import apply_masks, checked_masks, read_masks

from networks import randomise
from references import Net
from small_nets import Chain, Residual, Trace, assert_same_values, values_of

X = torch.zeros(1, 2, 6, 6)
SHAPES = ((2, 2, 6, 6), (1, 2, 9, 7))


def test_a_file_of_plain_dictionaries(tmp_path: Path) -> None:
    model, masks = Chain(), {"conv1": rows(Chain(), "conv1", 1)}
    torch.save(masks, tmp_path / "masks.pth")
    found = checked_masks(model, read_masks(tmp_path / "masks.pth"))
    assert torch.equal(found["conv1"]["weight"], masks["conv1"]["weight"])


# --- what does not fit --------------------------------------------------------------------------------------------

WEIGHT = torch.ones(8, 2, 3, 3)
WRONG: dict[str, tuple[Any, str]] = {
    "name": ({"convX": {"weight": WEIGHT}}, "'convX', which is no module of Chain"),
    "target": ({"conv1": {"bias": torch.ones(8)}}, "conv1.bias, but Conv2d has no such parameter"),
    "shape": ({"conv1": {"weight": torch.ones(9, 2, 3, 3)}}, "shape (9, 2, 3, 3), the parameter (8, 2, 3, 3)"),
    "list": ({"conv1": {"weight": [1, 0]}}, "conv1.weight is list, not a tensor"),
    "near name": ({"conv": {"weight": WEIGHT}}, "'conv', which is no module of Chain (did you mean 'conv"),
    "mixed": ({"conv1.weight": WEIGHT, "conv2": {}}, "masks must be {parameter name: tensor}"),
    "flat name": ({"convX.weight": WEIGHT}, "'convX', which is no module of Chain"),
    "flat target": (
        {"bn1.weigth": torch.ones(8)},
        "bn1.weigth, but BatchNorm2d has no such parameter (did you",
    ),
    "flat shape": ({"conv1.weight": torch.ones(9, 2, 3, 3)}, "shape (9, 2, 3, 3), the parameter (8, 2, 3, 3)"),
    "flat values": ({"conv1.weight": 0.5 * WEIGHT}, "'conv1.weight' has values other than 0 and 1"),
    "a state dict": (Chain().state_dict(), "'conv1.weight' has values other than 0 and 1"),
    "buffer": ({"bn1.running_mean": torch.ones(8)}, "bn1.running_mean, which is no plain parameter of BatchNorm2d"),
    "no names": ({0: WEIGHT}, "masks must be {parameter name: tensor}"),
    "number": (3, "masks must be {parameter name: tensor}, as prune_weights() and masks_of() give them, or {module: {"),
    "none": (None, "this Chain holds none"),
    "output of a norm": ({"bn1": {"_output_0": torch.zeros(1, 8, 1, 1)}}, "cannot be folded into BatchNorm2d"),
    "input of one pixel": ({"conv1": {"_input_0": torch.rand(1, 2, 6, 6).round()}}, "not one factor for each of 2"),
    "short input": ({"conv1": {"_input_0": torch.zeros(2)}}, "not one factor for each of 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_masks_that_do_not_fit(name: str) -> None:
    masks, message = WRONG[name]
    model = Chain().train()
    trace = Trace(model)
    with pytest.raises(ConfigError, match=re.escape(message)):
        shrink(model, masks, X)
    trace.assert_unchanged()


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no pickle")
    (tmp_path / "text.safetensors").write_text("hello, these are no tensors")
    (tmp_path / "empty").touch()
    torch.save(Chain(), tmp_path / "model")
    torch.save(Chain().state_dict(), tmp_path / "state")
    for name, message in (
        ("text", r"write one with torch.save\(masks, path\)"), ("empty", "is not a file of masks"),
        ("model", "is not a file of masks"), ("state", "values other than 0 and 1"), ("none", "cannot be read"),
        (".", "cannot be"), ("none.safetensors", "cannot be read"), ("text.safetensors", "is not a file of masks"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            shrink(Chain(), tmp_path / name, X)
        assert "weights_only" not in str(caught.value)  # PyTorch's advice is to load it unsafely


def test_options_and_inputs_that_cannot_be() -> None:
    for tolerance in (0, -1.0, "1e-6", float("nan")):
        with pytest.raises(ConfigError, match="tolerance"):
            shrink(Chain(), {}, X, tolerance=tolerance)  # type: ignore[arg-type]
    model = Chain()
    trace = Trace(model)
    with pytest.raises(GroupError, match="could not be traced"):
        shrink(model, {"conv2": rows(model, "conv2", 1)}, torch.zeros(1, 5, 6, 6))
    model.bn1.running_var.fill_(-1.0)
    trace.values["bn1.running_var"].fill_(-1.0)
    with pytest.raises(GroupError, match="NaN"):
        shrink(model, {"conv2": rows(model, "conv2", 1)}, X)
    trace.assert_unchanged()


@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
@pytest.mark.parametrize("count", [1, 3])
def test_a_failure_leaves_no_trace(error: BaseException, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Chain()).train()
    model.bn2.eval()
    model.conv2.weight.requires_grad_(False)
    model(torch.randn(2, 2, 6, 6)).sum().backward()
    real, calls = SHRINK.remove_units, []

    def remove(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == count:
            raise error
        real(*args, **options)

    monkeypatch.setattr(SHRINK, "remove_units", remove)
    trace = Trace(model)
    with pytest.raises(type(error)):
        shrink(model, one_in_four(model, "fc"), X)
    assert len(calls) == count
    trace.assert_unchanged()


# --- what is folded, and how --------------------------------------------------------------------------------------


def test_masks_of_inputs_and_outputs_are_what_nni_does_with_them() -> None:
    model = randomise(Chain())
    torch.manual_seed(1)
    masks: Masks = {
        "conv2": {"_input_0": torch.rand(1, 8, 1, 1).round(), "_output_0": torch.rand(1, 12, 1, 1).round()},
        "fc": {"_input_0": torch.rand(1, 8).round(), "weight": torch.ones(3, 1), "bias": None},  # type: ignore[dict-item]
    }
    expected = copy.deepcopy(model).double()
    for name, own in masks.items():
        layer, seen, made = expected.get_submodule(name), own["_input_0"], own.get("_output_0")
        layer.register_forward_pre_hook(lambda _, args, m=seen: (args[0] * m,))
        layer.register_forward_hook(lambda _, args, y, m=made: y if m is None else y * m)
    folded = copy.deepcopy(model)
    apply_masks(folded, checked_masks(folded, masks))
    assert difference(expected, folded, *SHAPES) < 1e-6
    result = shrink_with_report(model, masks, X)
    assert difference(expected, model, *SHAPES) < 1e-6
    assert len(result.history.removals()["conv1"]) == int((masks["conv2"]["_input_0"] == 0).sum())
    assert len(result.history.removals()["conv3"]) == int((masks["fc"]["_input_0"] == 0).sum())
    left = result.masks["conv2"]["bias"] == 0  # what has become a mask of the parameters is still one
    assert bool((model.conv2.bias[left] == 0).all())
    assert int(left.sum()) == int((masks["conv2"]["_output_0"] == 0).sum()) - len(result.history.removals()["conv2"])


def test_narrow_boolean_and_double_masks_are_spread() -> None:
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1])
    for mask in (keep.view(8, 1, 1, 1).bool(), keep.double().view(8, 1, 1, 1), keep.view(8, 1, 1, 1)):
        found = checked_masks(Chain(), {"conv1": {"weight": mask}})["conv1"]["weight"]
        assert (found.shape, found.dtype) == ((8, 2, 3, 3), torch.float32)
        assert torch.equal(found[:, 0, 0, 0], keep.float())


# --- the report ---------------------------------------------------------------------------------------------------


def test_numbers_and_history() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    masks = {"0": rows(model, "0", 1, 4, 5), "2": rows(model, "2", 0, 3)}
    result = shrink_with_report(model, masks, torch.randn(5, 4))
    assert (result.before.params, result.before.macs) == (40 + 54 + 21, 32 + 48 + 18)
    assert (result.after.params, result.after.macs) == (25 + 24 + 15, 20 + 20 + 12)
    assert result.history.removals() == {"0": [1, 4, 5], "2": [0, 3]}
    assert [(r.name, r.units_before, r.units_after) for r in result.layers] == [("0", 8, 5), ("2", 6, 4)]
    assert result.left_whole == {"4": "it reaches the model's output"}
    assert result.difference < 1e-12
    assert result.model is model


def test_nothing_is_masked() -> None:
    model = randomise(Residual())
    trace = Trace(model)
    result = shrink_with_report(model, {"stem": {"weight": torch.ones(8, 2, 3, 3)}}, X)
    trace.assert_unchanged()
    assert (result.before, result.masks, result.still_masked) == (result.after, {}, {})


@pytest.mark.parametrize("name", ["two branches", "resnet18"])
def test_a_second_time_nothing_happens(name: str) -> None:
    model, shape = randomise(NETS[name][0]()), NETS[name][1][0]
    masks, last = one_in_four(model, *head_of(model)), head_of(model)[0]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    masks[layers[1]] = {k: torch.zeros_like(p) for k, p in model.get_submodule(layers[1]).named_parameters()}
    masks[layers[2]]["weight"][:, 0] = 0.0
    masks[last] = rows(model, last, 2)
    x, other = torch.randn(shape), torch.randn(shape)
    first = shrink_with_report(model, masks, x)
    trace = Trace(model)
    again = shrink_with_report(model, first.masks, other)
    trace.assert_unchanged()
    assert again.history.removals() == {}
    assert again.after == first.after
    assert again.still_masked.keys() == first.still_masked.keys()
    assert {n: t.keys() for n, t in again.masks.items()} == {n: t.keys() for n, t in first.masks.items()}
    assert all(torch.equal(m, first.masks[n][k]) for n, targets in again.masks.items() for k, m in targets.items())


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"channels": [8, 16, 24, 32], "num_classes": 5}
    model = randomise(timm.create_model("resnet18", **options))
    masks = one_in_four(model, "fc") | {"fc": rows(model, "fc", 1)}
    result = shrink_with_report(model, masks, torch.randn(1, 3, 32, 32), builder=Builder.timm("resnet18", **options))
    for path in (save(result, tmp_path / "a"), save(result, tmp_path / "b", Builder.timm("resnet18", **options))):
        again = load(path)
        assert_same_values(again.model, model)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again.model(x), model.eval()(x))
        assert (again.after, again.history.removals()) == (result.after, result.history.removals())


def test_modes_flags_and_objects_stay() -> None:
    model = randomise(Chain()).train()
    model.bn2.eval()
    model.conv3.weight.requires_grad_(False)
    objects = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    masks = one_in_four(model, "fc")
    assert shrink(model, masks, X) is model
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == objects
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.conv1.out_channels == 6
    before = values_of(model)
    nn.functional.cross_entropy(model(torch.randn(4, 2, 6, 6)), torch.tensor([0, 1, 2, 0])).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(before["conv1.weight"], model.conv1.weight)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs(form: str) -> None:
    """A float and ids, whose number is not the batch size."""

    def forward(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        return m.fc(torch.relu(m.a(x)[:, None] + m.b(m.words(ids))).mean(1))

    net = Net(forward, a=nn.Linear(4, 8), words=nn.Embedding(7, 6), b=nn.Linear(6, 8), fc=nn.Linear(8, 3))
    masks = {"a": rows(net, "a", 1, 2), "b": rows(net, "b", 2, 5)}
    masked, x, ids = masked_copy(net, masks), torch.randn(3, 4), torch.tensor([0, 3, 6, 1, 2])
    result = shrink_with_report(net, masks, (x, ids) if form == "tuple" else {"x": x, "ids": ids})
    assert result.history.removals() == {"a": [2]}
    assert "b.weight, b.bias are not masked along" in result.still_masked["a"]
    with torch.no_grad():
        x = 30 * torch.randn(9, 4, dtype=torch.float64)
        assert torch.allclose(net.double()(x, ids), masked(x, ids), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_what_reads_with_a_computed_weight_computes_the_same() -> None:
    """Such a weight is a result that autograd keeps: a model with one cannot simply be copied."""
    linear = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), linear, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    model(torch.ones(1, 4))
    before = linear.weight.detach().clone()
    masks, x = {"0": rows(model, "0", 1), "4": rows(model, "4", 2)}, torch.randn(5, 4)
    with torch.no_grad():
        for layer, mine in masks.items():
            for attr, mask in mine.items():
                model.get_submodule(layer).get_parameter(attr).mul_(mask)
        expected = model(x)
    result = shrink_with_report(model, masks, x)
    assert result.history.removals() == {"0": [1], "4": [2]}
    torch.testing.assert_close(model[2].weight, before[:, [0, *range(2, 8)]])  # lengths make up for the directions
    torch.testing.assert_close(model(x), expected)


def test_every_error_is_ours(tmp_path: Path) -> None:
    assert issubclass(ConfigError, SingeError)
    with pytest.raises(SingeError):
        shrink(Chain(), tmp_path, X)
