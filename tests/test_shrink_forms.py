"""Masks that do not come from NNI: of pruned weights, by parameter name, held by the model, of torch.nn.utils.prune."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shrinking import SHRINK, Masks, difference, masked_copy, one_in_four, random_masks, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from singe_plugin import Builder, hold_masks, load, prune_weights, save
from singe_plugin.errors import ConfigError
from singe_plugin.masks import mask_module, masks_of, weight_of
from singe_plugin.shrink import ShrinkResult, shrink, shrink_with_report

from asked import asked
from networks import random_network, randomise
from references import Net
from small_nets import Chain, Grouped, Residual, Trace, assert_same_values, images, mlp, values_of, vectors

SHAPES = ((2, 2, 6, 6), (1, 2, 6, 6))
X = torch.zeros(1, 2, 6, 6)
NETS: dict[str, Callable[[], nn.Module]] = {"sequential": Chain, "residual": Residual, "depthwise": Grouped}


def flat(masks: Masks, kind: Callable[[Tensor], Tensor] = Tensor.bool) -> dict[str, Tensor]:
    return {f"{name}.{target}": kind(mask) for name, own in masks.items() for target, mask in own.items()}


def weights_only(masks: Masks) -> dict[str, Tensor]:
    return {name: mask for name, mask in flat(masks).items() if name.endswith(".weight")}


def held_by_torch(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        layer, _, target = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(layer), target, mask)


# --- pruned weights whose masks empty whole channels --------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["held", "given"])
@pytest.mark.parametrize("name", NETS)
def test_rows_of_every_layer(name: str, held: bool) -> None:
    """Whole rows of the weights, biases and norms not: what ends in a rectifier goes, every other constant stays."""
    model = randomise(NETS[name]())
    masks = weights_only(one_in_four(model, "fc", only=(nn.Conv2d,)))
    wide = copy.deepcopy(model)
    hold_masks(wide, masks)
    masked = copy.deepcopy(wide).double().eval()
    if held:
        model = wide
    result = shrink_with_report(model, None if held else masks, X)
    assert difference(masked, model, *SHAPES) < 1e-12
    assert any("constant" in why for why in result.still_masked.values())
    hold_masks(model, result.weight_masks)
    assert difference(masked, model, *SHAPES) < 1e-12


@pytest.mark.parametrize("form", ["flat", "held", "torch"])
@pytest.mark.parametrize("name", NETS)
def test_rows_with_their_biases_and_norms(name: str, form: str) -> None:
    model = randomise(NETS[name]())
    masks = one_in_four(model, "fc")
    masked, before = masked_copy(model, masks), values_of(model)
    given: dict[str, Tensor] | None = flat(masks)
    if form == "held":
        weights = weights_only(masks)
        hold_masks(model, weights)
        given = {key: mask for key, mask in flat(masks).items() if key not in weights}
    elif form == "torch":
        held_by_torch(model, flat(masks, Tensor.float))
        given = None
    result = shrink_with_report(model, given, X)
    assert difference(masked, model, *SHAPES) < 1e-12
    assert (result.still_masked, result.masks, result.weight_masks) == ({}, {}, {})
    assert {key: len(p) for key, p in model.named_parameters() if key[:2] != "fc"} == {
        key: len(before[key]) * 3 // 4 for key, _ in model.named_parameters() if key[:2] != "fc"
    }


@pytest.mark.parametrize("name", NETS)
def test_what_nobody_reads(name: str) -> None:
    """The columns of all readers of a layer: its constants do not matter then."""
    model = randomise(NETS[name]())
    reader, writer = {"sequential": ("conv2", "conv1"), "residual": ("blocks.0.3", "blocks.0.0"),
                      "depthwise": ("conv3", "dw")}[name]  # fmt: skip
    mask = torch.ones_like(model.get_submodule(reader).weight, dtype=torch.bool)
    mask[:, [1, 9, 17, 25] if name == "depthwise" else [1, 6]] = False
    hold_masks(model, {f"{reader}.weight": mask})
    masked = copy.deepcopy(model).double().eval()
    width = len(model.get_submodule(writer).weight)
    result = shrink_with_report(model, None, X)
    assert len(model.get_submodule(writer).weight) == width - (4 if name == "depthwise" else 2)
    assert difference(masked, model, *SHAPES) < 1e-12
    assert result.masks == {}


@pytest.mark.parametrize("name", ["mlp", *NETS])
def test_what_prune_weights_gives(name: str, tmp_path: Path) -> None:
    model = randomise({"mlp": lambda: mlp(32), **NETS}[name]())
    data, shapes = (vectors(), ((5, 4),)) if name == "mlp" else (images(2), SHAPES)
    result = prune_weights(model, data, **asked(sparsity=0.95, rounds=1, finetune_steps=2, nodes=1))
    masked, x = copy.deepcopy(result.model).double().eval(), data[0][0]
    builder = Builder.factory("small_nets:mlp", width=32) if name == "mlp" else Builder.factory(
        f"small_nets:{NETS[name].__name__}"
    )  # fmt: skip
    save(result, tmp_path / "wide", builder=builder)
    small = shrink_with_report(result.model, result.weight_masks, x, builder=builder)
    assert difference(masked, small.model, *shapes) < 1e-12
    assert small.after.params < 0.75 * small.before.params
    for key, mask in small.weight_masks.items():
        assert not bool(small.model.get_parameter(key)[~mask].any())
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", trust=True)
    assert torch.equal(again.model(x), small.model.eval()(x))
    assert_same_values(again.weight_masks, small.weight_masks)
    wide = load(tmp_path / "wide", trust=True)  # what was saved is shrunk as well, by its file of masks
    assert_same_values(shrink(wide.model, tmp_path / "wide" / "masks.safetensors", x), small.model)
    torch.save(result.weight_masks, tmp_path / "masks.pth")
    assert_same_values(shrink(load(tmp_path / "wide", trust=True).model, tmp_path / "masks.pth", x), small.model)


# --- one mask in many forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(2))
def test_every_form_of_random_masks_gives_the_same(chunk: int) -> None:
    removed = 0
    for seed in range(700 + 4 * chunk, 704 + 4 * chunk):
        network = random_network(seed)
        torch.manual_seed(seed)
        masks = random_masks(network.model, random.Random(seed))
        forms: list[tuple[nn.Module, Any]] = [(copy.deepcopy(network.model), m) for m in (masks, flat(masks))]
        forms += [(copy.deepcopy(network.model), None)]
        held_by_torch(forms[-1][0], flat(masks, Tensor.float))
        weights = {name: mask for name, mask in weights_only(masks).items() if seed % 2 or mask.ndim > 1}
        forms += [(copy.deepcopy(network.model), {n: m for n, m in flat(masks).items() if n not in weights})]
        hold_masks(forms[-1][0], weights)
        made: list[ShrinkResult] = []
        for model, given in forms:
            if given is None and not masks:
                continue
            torch.manual_seed(seed)
            made.append(shrink_with_report(model, given, network.inputs))
            values, first = (dict(sorted(values_of(r.model).items())) for r in (made[-1], made[0]))
            assert_same_values(values, first)
            assert made[-1].history.removals() == made[0].history.removals(), f"seed {seed}"
            assert made[-1].masks.keys() == made[0].masks.keys()
        assert made[0].weight_masks == {}
        assert made[1].weight_masks.keys() == {f"{n}.weight" for n, own in made[1].masks.items() if "weight" in own}
        removed += sum(map(len, made[0].history.removals().values()))
    assert removed > 5


@pytest.mark.parametrize("steps", [1, 2])
def test_structured_pruning_by_torch(steps: int) -> None:
    """Its own methods, once and iterated (a container of methods); a layer under two names; frozen weights."""
    last = nn.Linear(8, 3)
    model = Net(
        lambda m, x: m.last(torch.tanh(m.two(torch.tanh(m.one(x))))),
        one=nn.Linear(4, 8), two=nn.Linear(8, 8), last=last, again=last,
    )  # fmt: skip
    x = torch.randn(2, 4)
    for _ in range(steps):
        prune.ln_structured(model.two, "weight", amount=2, n=2, dim=1)
        prune.random_structured(last, "weight", amount=1, dim=1)
    model.two.weight_orig.requires_grad_(False)
    with torch.no_grad():
        model(x)  # only then can such a model be copied
    masked = copy.deepcopy(model).double().eval()
    shrink(model, None, x)
    assert (model.one.out_features, model.two.out_features) == (8 - 2 * steps, 8 - steps)
    assert difference(masked, model, (5, 4)) < 1e-12
    assert not model.two.weight.requires_grad
    assert not prune.is_pruned(model)


def test_masks_of_other_dtypes_and_of_shapes_that_are_spread() -> None:
    """On a transposed convolution, and on one with groups."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2), nn.ReLU(),
        nn.Conv2d(12, 6, 1, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 3),
    )  # fmt: skip
    up, grouped = torch.arange(12) % 4 != 1, torch.arange(6) % 2 != 1  # the same places in every set of channels
    masks = {
        "2.weight": up.half().view(1, 12, 1, 1), "2.bias": up.int(), "4.weight": grouped.byte().view(6, 1, 1, 1),
        "4.bias": grouped.double(),
    }  # fmt: skip
    masked = masked_copy(model, {n: {t: masks[f"{n}.{t}"] for t in ("weight", "bias")} for n in ("2", "4")})
    result = shrink_with_report(model, masks, X)
    assert (model[2].out_channels, model[4].in_channels, model[4].out_channels) == (9, 9, 3)
    assert difference(masked, model, (2, 2, 6, 6)) < 1e-12
    assert result.masks == {}


def test_zeros_that_somebody_else_has_made() -> None:
    """Masks by the values of the weights: a bias of zero is no constant, one that is not zero stays."""
    model = randomise(Residual())
    inner = model.blocks[0]
    with torch.no_grad():
        for target in (inner[0].weight, inner[0].bias, inner[1].weight):
            target[[2, 5]] = 0.0
        inner[1].bias[2], inner[1].bias[5] = 0.0, 1.0
    masked = copy.deepcopy(model).double().eval()
    masks = {name: p != 0 for name, p in model.named_parameters() if p.ndim > 1}
    result = shrink_with_report(model, masks, X)
    assert result.history.removals() == {"blocks.0.0": [2]}
    assert "1 masked units still pass a constant on" in result.still_masked["blocks.0.0"]
    assert difference(masked, model, *SHAPES) < 1e-12


def test_a_model_that_is_one_layer_and_masks_that_mask_nothing() -> None:
    layer = nn.Linear(4, 3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 1] = False
    hold_masks(layer, {"weight": mask})
    result = shrink_with_report(layer, None, torch.randn(2, 4))
    assert type(layer) is nn.Linear
    assert torch.equal(result.weight_masks["weight"], mask)
    assert shrink_with_report(nn.Linear(4, 3), {"weight": torch.ones(3, 4)}, torch.randn(2, 4)).masks == {}
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got dict"):
        shrink({}, {}, torch.randn(2, 4))  # type: ignore[arg-type]


def test_a_weight_that_is_computed_has_no_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 3)))
    trace, message = Trace(model), r"the masks name 2.weight, which is no plain parameter of .*weight norm first"
    with pytest.raises(ConfigError, match=message):
        shrink(model, {"2.weight": torch.ones(3, 6)}, torch.zeros(2, 4))
    trace.assert_unchanged()


# --- what is held goes, or stays, whole ---------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_and_what_is_masked_may_have_drifted() -> None:
    model = randomise(Chain())
    masks = weights_only(one_in_four(model, "fc", only=(nn.Conv2d,)))
    hold_masks(model, masks)
    objects = {name: weight_of(model.get_submodule(name)) for name in ("conv1", "conv2", "conv3")}
    objects["conv2"].data[~masks["conv2.weight"]] = float("nan")  # no forward pass reads it
    masked = copy.deepcopy(model).double().eval()
    shrink(model, None, X)
    assert all(model.get_submodule(name).weight is own for name, own in objects.items())
    assert difference(masked, model, *SHAPES) < 1e-12
    assert masks_of(masked).keys() == masks.keys()  # a copy shares nothing with what was shrunk
    masked.conv1.weight.sum().backward()


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt()])
def test_a_failure_leaves_the_masks_on_the_model(
    by_torch: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(Chain()).train()
    masks = weights_only(one_in_four(model, "fc", only=(nn.Conv2d,)))
    if by_torch:
        held_by_torch(model, masks)
    else:
        hold_masks(model, masks)
        weight_of(model.conv2).data[~masks["conv2.weight"]] = 5.0
    model(torch.randn(2, 2, 6, 6)).sum().backward()
    parts = [mask_module(m) for m in model.modules()]
    hooks = [list(m._forward_pre_hooks.items()) for m in model.modules()]
    types, expected = [type(m) for m in model.modules()], model.eval()(X)
    model.train()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(SHRINK, "remove_units", fail)
    trace = Trace(model)
    for given in ({"bn1.weight": rows(model, "bn1", 1)["weight"]}, {"nowhere": torch.ones(1)}):
        with pytest.raises((type(error), ConfigError)):
            shrink(model, given, X, allow_constants=True)
        trace.assert_unchanged()
        assert [type(m) for m in model.modules()] == types
        assert all(a is b for a, b in zip(parts, [mask_module(m) for m in model.modules()], strict=True))
        assert [list(m._forward_pre_hooks.items()) for m in model.modules()] == hooks
    assert torch.equal(model.eval()(X), expected)
    model.conv1.weight.sum().backward()
