"""Single weights as units: against a loop over the weights, batch-norm folded, and the fast path of the engine."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError
from singe_plugin.method import decay
from singe_plugin.method.criteria import CRITERIA
from singe_plugin.method.options import PATHS, Scoring
from singe_plugin.method.scoring import path_gradient_norms, score_units
from singe_plugin.method.units import BlockLayout, Producer, Slot, UnitGroup, subgroup

from references import (
    TRANSPOSED,
    Case,
    Net,
    fold_by_hand,
    literal_scores,
    literal_walk,
    randomise_norms,
)
from small_nets import Chain, assert_same_values, images, values_of

MU, STEPS = 0.7, 3
GEOMETRIC = Scoring(mu=MU, steps=STEPS, quadrature="geometric")


def layer_group(layer: nn.Module, norm: nn.Module | None = None, name: str = "layer") -> UnitGroup:
    """Every weight of a layer as a unit, in row-major order."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dim, groups = (1, layer.groups) if isinstance(layer, TRANSPOSED) else (0, 1)
    slot = Slot(layer, "weight", BlockLayout(dim, groups, kernel=(1,) * weight.ndim))
    units = torch.arange(weight.numel())
    bias = None if norm is None else Slot(layer, "bias")
    return UnitGroup(name, weight.numel(), (Producer(name, (slot,), units, units, norm, bias=bias),))


def _pooled(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.relu(m.norm(m.layer(x))).flatten(2).mean(2))


LAYERS: dict[str, Any] = {
    "conv": lambda: (nn.Conv2d(2, 3, (2, 1), bias=False), nn.BatchNorm2d(3), 2),
    "conv with bias": lambda: (nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False), 2),
    "grouped": lambda: (nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), 4),
    "transposed": lambda: (nn.ConvTranspose2d(2, 3, 1), nn.BatchNorm2d(3), 2),
    "grouped transposed": lambda: (nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), nn.BatchNorm2d(6), 4),
    "linear": lambda: (nn.Linear(3, 4), nn.BatchNorm1d(4), 3),
    "no norm": lambda: (nn.Conv2d(2, 3, (1, 2)), None, 2),
}


@cache
def get_case(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layer, norm, inputs = LAYERS[name]()
        shape = (inputs,) if isinstance(layer, nn.Linear) else (inputs, 3, 3)
        width = len(norm.running_mean) if norm is not None else 3
        if isinstance(layer, nn.Linear):
            net = Net(lambda m, x: m.head(torch.relu(m.norm(m.layer(x)))), head=nn.Linear(width, 3))
        else:
            net = Net(_pooled, head=nn.Linear(width, 3))
        net.layer, net.norm = layer, norm if norm is not None else nn.Identity()
        randomise_norms(net.double())
        folded = copy.deepcopy(net).eval()
        if norm is not None:
            fold_by_hand(folded, "layer", "norm")
        places = itertools.product(*(range(s) for s in layer.weight.shape))
        slices: list[Any] = [[[("layer.weight", place)] for place in places]]
        batches = [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in (3, 2)]
        return Case(net, layer_group(layer, norm), folded, slices, batches)


@cache
def walk_of(name: str, path: str) -> Any:
    return literal_walk(get_case(name), MU, STEPS, path)


@pytest.mark.parametrize("criterion", [name for name, one in CRITERIA.items() if not one.of_readers])
@pytest.mark.parametrize("name", list(LAYERS))
def test_every_criterion_against_a_loop_over_the_weights(name: str, criterion: str) -> None:
    case = get_case(name)
    before = values_of(case.model)
    for path, p, unit_batch in (("layer", 2.0, 1), ("layer", 3.0, 1), ("layer", math.inf, 1), ("neuron", 2.0, 20)):
        expected = torch.tensor(literal_scores(walk_of(name, path), criterion, p)[0])
        options = replace(GEOMETRIC, criterion=criterion, path=path, p=p, unit_batch=unit_batch)
        got = score_units(case.model, case.group, case.batches, options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert_same_values(case.model, before)


@pytest.mark.parametrize("path", PATHS)
def test_the_norm_scales_weights_up_and_gradients_down(path: str) -> None:
    r"""Folding multiplies w by :math:`\gamma/\sigma` and divides its gradient: products do not see it, factors do."""
    torch.manual_seed(0)
    net = randomise_norms(Chain(widths=(3, 2, 2)).eval())
    scale = net.bn2.weight / (net.bn2.running_var + net.bn2.eps).sqrt()
    spread = scale.detach().abs()[:, None, None, None].expand_as(net.conv2.weight).reshape(-1)
    powers = {"l1": 1, "l2": 1, "lp": 1, "grad": -1, "sg": -1, "norm_grad": 0, "ig": 0, "ig_abs": 0}
    for criterion, power in powers.items():
        options = Scoring(criterion=criterion, path=path, nodes=3)
        folded, plain = (
            score_units(net, layer_group(net.conv2, norm, "conv2"), images(2), options) for norm in (net.bn2, None)
        )
        torch.testing.assert_close(folded, plain * spread**power, rtol=2e-4, atol=1e-8)


def test_a_scale_of_zero_leaves_the_gradient() -> None:
    torch.manual_seed(0)
    net = Chain(widths=(3, 2, 2)).eval()
    with torch.no_grad():
        net.bn2.weight[0] = 0.0
        net.bn2.bias.fill_(0.5)
    group = layer_group(net.conv2, net.bn2, "conv2")
    grad, ig = (score_units(net, group, images(2), Scoring(criterion=c)).view(2, -1) for c in ("grad", "ig"))
    assert bool((grad > 0).any(1).all())
    assert bool((ig[0] == 0).all())
    assert bool((ig[1] > 0).any())


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["all", "some", "shuffled"])
@pytest.mark.parametrize("criterion", ["l2", "grad", "sg", "ig", "ig_abs"])
def test_the_fast_path_gives_what_the_general_one_gives(
    criterion: str, kind: str, amp: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = randomise_norms(Chain().eval())
    group = layer_group(net.conv2, net.bn2, "conv2")
    if kind != "all":
        chosen = torch.randperm(group.size)[: group.size // (2 if kind == "some" else 1)]
        group = subgroup(group, chosen.sort().values if kind == "some" else chosen)
    options = Scoring(criterion=criterion, p=2, amp=amp)
    fast = score_units(net, group, images(2), options)
    curves = path_gradient_norms(net, group, images(2), options)
    monkeypatch.setattr(decay, "_elements", lambda *_: None)
    torch.testing.assert_close(fast, score_units(net, group, images(2), options), rtol=1e-6, atol=0)
    for one, other in zip(curves, path_gradient_norms(net, group, images(2), options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_fast_path_is_taken_where_it_holds_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Chain().eval()
    seen: list[Any] = []
    original = decay._elements
    monkeypatch.setattr(decay, "_elements", lambda *a: seen.append(original(*a)) or seen[-1])
    every = layer_group(net.conv2, net.bn2, "conv2")
    options = Scoring(criterion="l2")
    score_units(net, every, None, options)
    score_units(net, subgroup(every, torch.tensor([5, 2])), None, options)
    assert seen[0] == slice(None)
    assert seen[1].tolist() == [5, 2]
    (producer,) = every.producers
    pairs = replace(producer, units=producer.units // 2)  # two weights a unit
    score_units(net, UnitGroup("conv2", every.size // 2, (pairs,)), None, options)
    one_each = layer_group(net.fc, None, "fc").producers[0]
    half = replace(one_each, rows=one_each.rows[:4], units=one_each.units[:4])
    score_units(net, UnitGroup("both", every.size, (producer, half)), None, options)  # not in every layer
    assert seen[2] is None
    assert seen[3] == slice(None)
    assert seen[4] is None


def test_the_largest_layers_need_no_table_of_nodes() -> None:
    """91 steps of the paper's sum over a layer keep one number per weight, not 91."""
    layer = nn.Linear(400, 250)
    group = layer_group(layer)
    batch = (torch.randn(2, 400), torch.randint(0, 250, (2,)))
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    with Watch():
        score_units(layer, group, [batch], Scoring(mu=0.95, quadrature="geometric"))
    assert max(sizes) == group.size


def test_a_norm_without_a_place_for_its_shift() -> None:
    net = Chain()
    group = layer_group(net.conv2, net.bn2, "conv2")
    bare = UnitGroup("conv2", group.size, (replace(group.producers[0], bias=None),))
    with pytest.raises(GroupError, match=r"'conv2': a batch-norm is to be folded in.*Producer\(bias=...\)"):
        score_units(net, bare, images(1))
