"""Scores against literal loops, closed forms, completeness, and the true error of the quadrature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError, GroupError, ScoringError, TiedParameterError
from singe_plugin.method import scoring
from singe_plugin.method.options import Scoring
from singe_plugin.method.path import decay_path
from singe_plugin.method.reduction import REDUCTIONS
from singe_plugin.method.scoring import path_gradient_norms, score_error, score_units
from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup

from references import CASES, Net, Walk, get_case, literal_reduction, literal_scores, literal_walk, scale_slices

MU, STEPS = 0.7, 2
GEOMETRIC = Scoring(mu=MU, steps=STEPS, quadrature="geometric")
PATHS = ("layer", "neuron")
CRITERIA = ("l1", "l2", "lp", "grad", "norm_grad", "sg", "ig", "ig_abs")


@cache
def walk_of(name: str, path: str) -> Walk:
    return literal_walk(get_case(name), MU, STEPS, path)


def linear_group(layer: nn.Linear, name: str = "fc") -> UnitGroup:
    rows = torch.arange(layer.out_features)
    return UnitGroup(name, len(rows), (Producer(name, (Slot(layer, "weight"), Slot(layer, "bias")), rows, rows),))


def small_net() -> tuple[nn.Module, UnitGroup, list[tuple[Tensor, Tensor]]]:
    net = Net(lambda m, x: m.head(torch.tanh(m.fc(x))), fc=nn.Linear(3, 4), head=nn.Linear(4, 2))
    return net, linear_group(net.fc), [(torch.randn(n, 3), torch.randint(0, 2, (n,))) for n in (5, 3)]


def image_net() -> tuple[nn.Module, UnitGroup, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    rows = torch.arange(8)
    slots = (Slot(net[0], "weight"), Slot(net[0], "bias"))
    return net, UnitGroup("0", 8, (Producer("0", slots, rows, rows, net[1]),)), [(torch.randn(4, 3, 8, 8), rows[:4])]


# --- the literal triple loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_folding_by_hand_keeps_the_function(name: str) -> None:
    case = get_case(name)
    model = copy.deepcopy(case.model).eval()
    torch.testing.assert_close(case.folded(case.batches[0][0]), model(case.batches[0][0]))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_literal_loop(name: str, path: str, criterion: str) -> None:
    case = get_case(name)
    expected = literal_reduction(case, literal_scores(walk_of(name, path), criterion, 2), "sum")
    got = score_units(case.model, case.group, case.batches, replace(GEOMETRIC, criterion=criterion, path=path))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("p", [1, 3, math.inf])
@pytest.mark.parametrize("criterion", ["lp", "grad", "norm_grad", "sg", "ig"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["concat", "preactivation"])
def test_any_degree_of_the_norm(name: str, path: str, criterion: str, p: float) -> None:
    case = get_case(name)
    expected = literal_reduction(case, literal_scores(walk_of(name, path), criterion, p), "sum")
    got = score_units(case.model, case.group, case.batches, replace(GEOMETRIC, criterion=criterion, path=path, p=p))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["residual", "concat"])
def test_reductions_over_the_layers_of_a_group(name: str, path: str, reduction: str) -> None:
    case = get_case(name)
    expected = literal_reduction(case, literal_scores(walk_of(name, path), "ig", 2), reduction)
    got = score_units(case.model, case.group, case.batches, replace(GEOMETRIC, path=path, group_reduction=reduction))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_figure_2_curves(path: str) -> None:
    case, walk = get_case("residual"), walk_of("residual", path)
    norms, slopes = path_gradient_norms(case.model, case.group, case.batches, replace(GEOMETRIC, path=path))
    for s in range(STEPS + 1):
        for n in range(case.group.size):
            weights, _ = walk[0][s][0][n]
            assert float(norms[s, n]) == pytest.approx(sum(w * w for w in weights) ** 0.5)
            expected = sum(sum(g * g for g in batch[s][0][n][1]) ** 0.5 for batch in walk) / len(walk)
            assert float(slopes[s, n]) == pytest.approx(expected)


def test_the_logit_objective() -> None:
    case = get_case("chain")
    walk = literal_walk(case, MU, STEPS, "layer", lambda z, y: sum(z[b, y[b]] for b in range(len(y))) / len(y))
    got = score_units(case.model, case.group, case.batches, replace(GEOMETRIC, objective="logit"))
    torch.testing.assert_close(got, torch.tensor(literal_scores(walk, "ig", 2)[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("unit_batch", [1, 3, 100])
def test_the_size_of_the_unit_batches_does_not_matter(unit_batch: int) -> None:
    case = get_case("residual")
    options = replace(GEOMETRIC, path="neuron", unit_batch=unit_batch)
    expected = literal_reduction(case, literal_scores(walk_of("residual", "neuron"), "ig", 2), "sum")
    got = score_units(case.model, case.group, case.batches, options)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-9)


# --- closed forms, completeness, convergence --------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("quadrature", ["geometric", "gauss"])
@pytest.mark.parametrize("mu", [0.8, 0.9])
def test_a_constant_gradient_has_a_closed_form(mu: float, quadrature: str, path: str) -> None:
    layer = nn.Linear(4, 3)
    inputs, coefficients = torch.randn(6, 4), torch.randn(6, 3)
    batches = [(inputs, coefficients)]
    options = Scoring(mu=mu, quadrature=quadrature, path=path, objective=lambda z, c: (z * c).sum())
    steps = {0.8: 21, 0.9: 44}[mu]
    ig, sg = (score_units(layer, linear_group(layer), batches, replace(options, criterion=c)) for c in ("ig", "sg"))
    for n in range(3):
        slope = math.hypot(*(inputs.T @ coefficients[:, n]).tolist(), float(coefficients[:, n].sum()))
        norm = math.hypot(*layer.weight[n].tolist(), layer.bias[n].item())
        assert ig[n].item() == pytest.approx(norm * slope * (1 - mu ** (steps + 1)) / (1 - mu), rel=1e-5)
        assert sg[n].item() == pytest.approx(slope * (steps + 1), rel=1e-5)


@pytest.mark.parametrize("name", ["layer_scale", "embedding", "packed", "layernorm"])
def test_the_integral_along_one_unit_is_the_change_of_f_at_its_removal(name: str) -> None:
    case = get_case(name)
    path = decay_path(mu=0.9, quadrature="gauss", nodes=40)
    (stats,) = scoring._walk(case.model, case.group, case.batches[:1], Scoring(path="neuron"), path)
    # the nodes' weights carry the mass of the geometric sum and 1 / u: undone, they integrate over u in [0, 1]
    share = path.weights / path.weights.mul(path.scales).sum()
    integral = sum((share[:, None] * layer.inner).sum(0) for layer in stats)
    inputs, targets = case.batches[0]
    before = functional.cross_entropy(case.folded(inputs), targets)
    for unit in range(case.group.size):
        removed = copy.deepcopy(case.folded)
        for owned in case.slices:
            scale_slices(removed, owned[unit], 0.0)
        change = before - functional.cross_entropy(removed(inputs), targets)
        assert float(integral[unit]) == pytest.approx(change.item(), abs=1e-4)


@pytest.mark.parametrize("criterion", ["ig", "sg"])
def test_gauss_converges_to_the_integral(criterion: str) -> None:
    case = get_case("embedding")
    options = Scoring(criterion=criterion, mu=0.9, steps=40, quadrature="gauss")
    # a very fine trapezoid of the same integral, from the measured curve
    count = 251
    grid = torch.linspace(0.9**41 if criterion == "ig" else 0, 1, count, dtype=torch.float64)
    scales = grid if criterion == "ig" else 0.9 ** (40 * grid)
    mass = 1 / 0.1 if criterion == "ig" else 41.0
    dense = replace(decay_path(steps=1), scales=scales, weights=torch.ones_like(scales))
    (stats,) = scoring._walk(case.model, case.group, case.batches[:1], options, dense)
    truth = sum(
        mass * (layer.norms if criterion == "ig" else 1.0) * torch.trapezoid(layer.grads, grid, dim=0)
        for layer in stats
    )
    errors = []
    for nodes in (2, 5, 12):
        got = score_units(case.model, case.group, case.batches[:1], replace(options, nodes=nodes)).double()
        errors.append(float(((got - truth) / truth).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 5e-4


def test_a_fine_geometric_sum_is_gauss() -> None:
    case = get_case("layernorm")
    geometric, gauss = (
        score_units(case.model, case.group, case.batches, Scoring(mu=0.95, quadrature=rule, nodes=8))
        for rule in ("geometric", "gauss")
    )
    torch.testing.assert_close(geometric, gauss, rtol=0.03, atol=0)


@pytest.mark.parametrize("criterion", ["ig", "sg"])
@pytest.mark.parametrize("quadrature", ["geometric", "gauss"])
def test_the_error_estimate_tracks_the_true_error(quadrature: str, criterion: str) -> None:
    case = get_case("embedding")
    options = Scoring(criterion=criterion, mu=0.8, quadrature=quadrature, nodes=2)
    scores, estimate = score_error(case.model, case.group, case.batches, options)
    path = options.decay_path
    for _ in range(2 if quadrature == "geometric" else 3):
        path = path.refined()
    (truth,) = scoring._score(case.model, {"it": case.group}, case.batches, options, path).values()
    error = (scores - truth).abs()
    # halving the step of the sum halves its error, so the estimate is about half of it; gauss gains far more
    low, high = (0.3, 1.0) if quadrature == "geometric" else (0.7, 1.3)
    assert low < float(estimate.sum() / error.sum()) < high


def test_the_error_estimate_of_criteria_without_a_path_is_zero() -> None:
    net, group, batches = small_net()
    scores, error = score_error(net, group, batches, Scoring(criterion="norm_grad", normalizer="sum"))
    torch.testing.assert_close(scores, score_units(net, group, batches, Scoring(criterion="norm_grad")))
    assert error.tolist() == [0.0] * 4
    assert score_error(net, group, iter(batches))[1].max() > 0  # a one-shot iterator is read twice


# --- batches, models, precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("criterion", ["grad", "sg", "ig", "ig_abs"])
def test_several_batches_give_the_mean_of_their_scores(criterion: str, path: str) -> None:
    net, group, batches = small_net()
    options = Scoring(criterion=criterion, path=path)
    single = torch.stack([score_units(net, group, [batch], options) for batch in batches])
    torch.testing.assert_close(score_units(net, group, iter(batches), options), single.mean(0))


@pytest.mark.parametrize("path", PATHS)
def test_forms_of_batches_and_outputs(path: str) -> None:
    net, group, batches = small_net()
    expected = score_units(net, group, batches, Scoring(path=path))

    def loss(pick: Callable[[Any], Tensor]) -> Scoring:
        return Scoring(path=path, objective=lambda z, y: functional.cross_entropy(pick(z), y))

    mapping = [{"pixels": x, "labels": y} for x, y in batches]
    by_name = Net(lambda m, pixels: m.net(pixels), net=net)
    several = Net(lambda m, x, gain: m.net(x) * gain, net=net)
    with_tuple = Net(lambda m, x: (None, m.net(x)), net=net)
    with_dict = Net(lambda m, x: {"logits": m.net(x)}, net=net)
    for got in (
        score_units(by_name, group, mapping, Scoring(path=path)),
        score_units(several, group, [((x, torch.ones(())), y) for x, y in batches], Scoring(path=path)),
        score_units(with_tuple, group, batches, loss(lambda z: z[1])),
        score_units(with_dict, group, batches, loss(lambda z: z["logits"])),
        score_units(net, group, batches, replace(loss(lambda z: z), unit_batch=1)),
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_is_close_to_full_precision(amp: str, path: str) -> None:
    net, group, batches = image_net()
    expected = score_units(net, group, batches, Scoring(path=path))
    # batch-norm in mixed precision has no rule for vmap on a CPU
    got = score_units(net, group, batches, Scoring(path=path, amp=amp, unit_batch=1))
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0)
    assert not torch.equal(got, expected)  # it did run in another precision


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_fp16_scales_the_loss_up_and_down(size: float, path: str) -> None:
    net, group, batches = small_net()
    options = Scoring(path=path, objective=lambda z, y: functional.cross_entropy(z.float(), y) * size)
    expected = score_units(net, group, batches, options)
    torch.testing.assert_close(
        score_units(net, group, batches, replace(options, amp="fp16")), expected, rtol=0.02, atol=0
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_double_model_is_scored_in_double(path: str) -> None:
    net, group, batches = small_net()
    net.double()
    soft = [(x.double(), functional.one_hot(y, 2).double()) for x, y in batches]
    hard = [(x.double(), y) for x, y in batches]
    for objective in ("loss", "logit"):
        options = Scoring(path=path, objective=objective)
        torch.testing.assert_close(score_units(net, group, soft, options), score_units(net, group, hard, options))


@pytest.mark.parametrize("path", PATHS)
def test_channels_last_changes_nothing(path: str) -> None:
    net, group, batches = image_net()
    expected = score_units(net, group, batches, Scoring(path=path))
    net.to(memory_format=torch.channels_last)
    got = score_units(net, group, batches, Scoring(path=path, channels_last=True))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_half_precision_batchnorm_that_stands_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    rows = torch.arange(4)
    slots = (Slot(net[1], "weight"), Slot(net[1], "bias"))
    group = UnitGroup("1", 4, (Producer("1", slots, rows, rows, is_norm=True),))
    batch = (torch.randn(6, 3), torch.randint(0, 2, (6,)))
    expected = score_units(net, group, [batch])
    got = score_units(net.bfloat16(), group, [(batch[0].bfloat16(), batch[1])])
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.01)


def test_a_callable_normalizer_is_applied_last() -> None:
    net, group, batches = small_net()
    plain = score_units(net, group, batches)
    torch.testing.assert_close(score_units(net, group, batches, Scoring(normalizer="sum")), plain / plain.sum())
    got = score_units(net, group, batches, Scoring(normalizer=lambda s: 2 * s))
    torch.testing.assert_close(got, 2 * plain)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "taylor"}, "unknown criterion 'taylor'.*ig"),
        ({"path": "both"}, "unknown path 'both'.*layer, neuron"),
        ({"amp": "int8"}, "unknown amp 'int8'.*bf16"),
        ({"quadrature": "simpson"}, "unknown quadrature 'simpson'"),
        ({"criterion": "l2", "quadrature": "simpson"}, "unknown quadrature 'simpson'"),
        ({"objective": "mse"}, "unknown objective 'mse'"),
        ({"group_reduction": "median"}, "unknown group_reduction 'median'"),
        ({"normalizer": "softmax"}, "unknown normalizer 'softmax'"),
        ({"unit_batch": 0}, "unit_batch=0"),
        ({"mu": 1.0}, "mu=1.0"),
        ({"nodes": 0}, "nodes=0"),
        ({"steps": -1}, "steps=-1"),
        ({"p": 0.5}, "p=0.5"),
    ],
)
def test_options_are_checked_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scoring(**options)


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_scored_says_why(path: str) -> None:
    net, group, batches = small_net()
    detached = Net(lambda m, x: m.net(x).detach(), net=net)
    infinite = [(torch.full((2, 3), math.inf), torch.zeros(2, dtype=torch.long))]

    def options(objective: Any) -> Scoring:
        return Scoring(path=path, objective=objective)

    def fails(kind: type[Exception], message: str, model: nn.Module, data: Any, objective: Any = "loss") -> None:
        with pytest.raises(kind, match=message):
            score_units(model, group, data, options(objective))

    fails(DataError, "criterion 'ig' differentiates F on data, and none is bound", net, None)
    fails(DataError, "batches is empty", net, [])
    fails(DataError, "got a Tensor", net, [batches[0][0]])
    fails(
        DataError, "objective='loss' needs a tensor of logits.*tuple", Net(lambda m, x: (m.net(x),), net=net), batches
    )
    fails(ScoringError, "'fc': F does not depend on its weights", detached, batches)
    fails(ScoringError, "'fc': F is not finite on batch 0", net, infinite)
    fails(ScoringError, "'fc': F is not finite on batch 0", net, batches, lambda z, y: z.sum() + math.inf)
    fails(ScoringError, "'fc': a gradient is not finite", net, batches, lambda z, y: (z.sum() * 0).sqrt())
    fails(ScoringError, r"one number \(a scalar tensor\), got \(5,\)", net, batches, lambda z, y: z.sum(1))
    fails(ScoringError, "one number.*got float", net, batches, lambda z, y: 1.0)
    fails(ScoringError, "'fc'.*RuntimeError", net, [(torch.randn(2, 7), torch.zeros(2, dtype=torch.long))])


def test_groups_that_cannot_be_scored() -> None:
    net, group, batches = small_net()
    rows = torch.arange(4)
    with pytest.raises(ConfigError, match="'fc' has no layer that produces"):
        score_units(net, UnitGroup("fc", 4, ()), batches)
    slots = (Slot(net.fc, "weight", RowLayout(dim=1)), Slot(net.fc, "bias"))
    uneven = UnitGroup("fc", 3, (Producer("fc", slots, rows[:3], rows[:3]),))
    with pytest.raises(ScoringError, match=r"fc.bias has 4 rows, expected 3"):
        score_units(net, uneven, batches)
    bare = Producer("ln", (Slot(nn.LayerNorm(4, elementwise_affine=False), "weight"),), rows, rows)
    with pytest.raises(GroupError, match="'ln' has no parameter that could decay"):
        score_units(net, UnitGroup("ln", 4, (bare,)), batches)
    with pytest.raises(ConfigError, match=r"returned shape \(1,\) for 4 units of group 'fc'"):
        score_units(net, group, batches, Scoring(normalizer=lambda s: s.sum()[None]))
    with pytest.raises(ScoringError, match="'fc': the scores are not finite"):
        score_units(net, group, batches, Scoring(normalizer=lambda s: s / 0))
    net.copy = nn.Linear(3, 4)
    net.copy.weight = net.fc.weight
    with pytest.raises(TiedParameterError, match=r"'fc.weight' and 'copy.weight' are one tensor"):
        score_units(net, group, batches)


def test_a_forward_that_vmap_cannot_follow_is_explained() -> None:
    net, group, batches = small_net()
    branching = Net(lambda m, x: m.net(x) if m.net(x).sum().item() < math.inf else x, net=net)
    with pytest.raises(ScoringError, match=r"'fc'.*several units at once.*use unit_batch=1 or path='layer'"):
        score_units(branching, group, batches, Scoring(path="neuron"))
    expected = score_units(net, group, batches, Scoring(path="neuron"))
    got = score_units(branching, group, batches, Scoring(path="neuron", unit_batch=1))
    torch.testing.assert_close(got, expected)
