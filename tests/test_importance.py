"""``SInGEImportance`` on torch-pruning's own groups: literal references, special cases, and life in ``BasePruner``."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError, GroupError, TiedParameterError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner, groups, register_slots
from singe_plugin.method.units import RowLayout, Slot

from references import (
    CASES,
    Case,
    Net,
    Spec,
    Walk,
    build_case,
    literal_reduction,
    literal_scores,
    literal_walk,
)
from small_nets import Chain, Residual, images, mlp, vectors

MU, STEPS = 0.7, 3
PATH: dict[str, Any] = {"mu": MU, "steps": STEPS, "quadrature": "geometric"}
CRITERIA = ("l1", "l2", "lp", "grad", "norm_grad", "sg", "ig", "ig_abs")
BATCHES = images()
X = BATCHES[0][0][:2]


def pictures(channels: int = 2) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, channels, 4, 4).double(), torch.randint(0, 3, (n,))) for n in (3, 2)]


def groupnorm() -> Case:
    net = Net(
        lambda m, x: m.head(torch.relu(m.gn(m.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(2, 6, 3), gn=nn.GroupNorm(2, 6), head=nn.Linear(6, 3),
    )  # fmt: skip
    nn.init.normal_(net.gn.weight)
    return build_case(net, [Spec(n, range(6), [0, 1, 2, 0, 1, 2]) for n in ("conv", "gn")], pictures())


def instancenorm() -> Case:
    net = Net(
        lambda m, x: m.head(torch.relu(m.inorm(m.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(2, 4, 1), inorm=nn.InstanceNorm2d(4, affine=True), head=nn.Linear(4, 3),
    )  # fmt: skip
    nn.init.normal_(net.inorm.weight)
    return build_case(net, [Spec(n, range(4), range(4)) for n in ("conv", "inorm")], pictures())


def prelu() -> Case:
    net = Net(
        lambda m, x: m.head(m.act(m.bn(m.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(2, 4, 3), bn=nn.BatchNorm2d(4), act=nn.PReLU(4), head=nn.Linear(4, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4), "bn")], pictures())  # a slope produces nothing


def flatten() -> Case:
    net = Net(
        lambda m, x: m.head(torch.tanh(m.conv(x)).flatten(1)), conv=nn.Conv2d(2, 4, 3), head=nn.Linear(16, 3)
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(4), range(4))], pictures())


def split() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.bn(m.conv(x)).chunk(2, 1)
        return m.head(torch.relu(first + second).mean((2, 3)))

    net = Net(forward, conv=nn.Conv2d(2, 6, 1), bn=nn.BatchNorm2d(6), head=nn.Linear(3, 3))
    return build_case(net, [Spec("conv", range(6), [0, 1, 2, 0, 1, 2], "bn")], pictures())


def depth_multiplier() -> Case:
    net = Net(
        lambda m, x: m.head(torch.relu(m.bn(m.conv(x))).mean((2, 3))),
        conv=nn.Conv2d(4, 8, 3, groups=4), bn=nn.BatchNorm2d(8), head=nn.Linear(8, 3),
    )  # fmt: skip
    return build_case(net, [Spec("conv", range(8), range(8), "bn")], pictures(4))


OWN = {f.__name__: f for f in (groupnorm, instancenorm, prelu, flatten, split, depth_multiplier)}
# "packed" and "subset" are no groups of torch-pruning's: it couples the whole of the layer in front of the split
ON_GRAPH = {name: make for name, make in CASES.items() if name not in ("packed", "subset")} | OWN


@cache
def case_of(name: str) -> tuple[Case, Walk]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        case = ON_GRAPH[name]()
        return case, literal_walk(case, MU, STEPS, "layer")


def group_of(model: nn.Module, name: str, x: Any, idxs: list[int] | None = None) -> Any:
    graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
    root = model.get_submodule(name)
    pruner = graph.get_pruner_of_module(root)
    count = pruner.get_out_channels(root)
    return graph.get_pruning_group(root, pruner.prune_out_channels, list(range(count)) if idxs is None else idxs)


def contents(group: Any) -> list[Any]:
    return [(id(group[i].dep), list(group[i].idxs), list(group[i].root_idxs)) for i in range(len(group))]


# --- literal references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_GRAPH)
def test_every_criterion_agrees_with_the_literal_loop(name: str) -> None:
    case, walk = case_of(name)
    group = group_of(case.model, case.group.name, case.batches[0][0])
    root = next(p for p in case.group.producers if p.name == case.group.name)
    units = [[int(r) for r, u in zip(root.rows, root.units, strict=True) if u == n] for n in range(case.group.size)]
    before = contents(group)
    for criterion in CRITERIA:
        p = 3.0 if criterion == "lp" else 2.0
        scores = literal_scores(walk, criterion, p)
        for reduction in ("sum", "mean", "max"):
            imp = SInGEImportance(criterion, p=p, group_reduction=reduction, **PATH).bind(case.model, case.batches)
            expected = torch.tensor(literal_reduction(case, scores, reduction))
            got = imp.score_units(group, units)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7, msg=f"{criterion} {reduction}")
    assert contents(group) == before
    if all(len(members) == 1 for members in units):
        torch.testing.assert_close(imp(group), got)


def test_a_subset_of_the_channels_is_scored_in_the_order_of_its_indices() -> None:
    case, _ = case_of("chain")
    imp = SInGEImportance("l2").bind(case.model, case.batches)
    full = imp(group_of(case.model, "conv", case.batches[0][0]))
    some = imp(group_of(case.model, "conv", case.batches[0][0], [3, 1]))
    torch.testing.assert_close(some, full[[3, 1]])


def test_multihead_attention_is_finite() -> None:
    mha = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Net(
        lambda m, x: m.fc(m.mha(*[m.stem(x)] * 3, need_weights=False)[0].mean(1)),
        stem=nn.Linear(3, 4), mha=mha, fc=nn.Linear(4, 3),
    )  # fmt: skip
    batch = (torch.randn(2, 5, 3), torch.tensor([0, 1]))
    scores = SInGEImportance(nodes=2).bind(net, [batch])(group_of(net, "stem", batch[0]))
    assert scores.shape == (4,)
    assert bool(torch.isfinite(scores).all() and (scores > 0).all())


# --- torch-pruning's importances as special cases ---------------------------------------------------------------


def plain() -> nn.Module:
    return Net(
        lambda m, x: m.head(torch.relu(m.two(torch.relu(m.one(x)))).mean((2, 3))),
        one=nn.Conv2d(2, 6, 3, bias=False), two=nn.Conv2d(6, 6, 1, bias=False), head=nn.Linear(6, 3, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_is_a_special_case(p: int) -> None:
    net = plain()
    group = group_of(net, "one", X)
    theirs = tp.importance.GroupMagnitudeImportance(p=p, group_reduction="first", normalizer=None)(group)
    ours = SInGEImportance("lp", p=p, group_reduction="first")(group)
    torch.testing.assert_close(ours**p, theirs)  # torch-pruning leaves out the root


def test_taylor_is_a_special_case() -> None:
    net = plain()
    x, y = BATCHES[0]
    group = group_of(net, "one", X)
    functional.cross_entropy(net(x), y).backward()
    theirs = tp.importance.GroupTaylorImportance(group_reduction="first", normalizer=None, multivariable=True)(group)
    grads = [p.grad.clone() for p in net.parameters()]
    imp = SInGEImportance("ig_abs", steps=0, quadrature="geometric", group_reduction="first")
    ours = imp.bind(net, [(x, y)])(group)
    torch.testing.assert_close(ours, theirs.to(ours.dtype))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))


# --- customized pruners -----------------------------------------------------------------------------------------


class Gain(nn.Module):
    """A layer that torch-pruning does not know: every channel times a number, plus a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(1, width, 1, 1)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.shift[:, None, None]


class GainPruner(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    def prune_out_channels(self, layer: Gain, idxs: list[int]) -> nn.Module:
        raise AssertionError("nothing is pruned here")

    def get_out_channels(self, layer: Gain) -> int:
        return len(layer.shift)

    prune_in_channels, get_in_channels = prune_out_channels, get_out_channels


def test_a_customized_pruner_is_told_which_parameters_it_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_SLOTS", dict(groups._SLOTS))
    net = Net(
        lambda m, x: m.head(m.own(m.conv(x)).mean((2, 3))), conv=nn.Conv2d(2, 4, 1), own=Gain(4), head=nn.Linear(4, 3)
    )  # fmt: skip
    own = GainPruner()
    graph = tp.DependencyGraph().build_dependency(net, pictures()[0][0].float(), customized_pruners={Gain: own})
    group = graph.get_pruning_group(net.conv, tp.prune_conv_out_channels, [3, 0])
    imp = SInGEImportance("l2", group_reduction="sum")
    with pytest.raises(GroupError, match=r"GainPruner.prune_out_channels cuts of a Gain.*register_slots"):
        imp(group)
    register_slots(
        own.prune_out_channels, lambda layer, dim: [Slot(layer, "gain", RowLayout(1)), Slot(layer, "shift")]
    )  # fmt: skip
    expected = [
        float(torch.cat([net.conv.weight[n].flatten(), net.conv.bias[n : n + 1]]).norm())
        + float(torch.stack([net.own.gain[0, n, 0, 0], net.own.shift[n]]).norm())
        for n in (3, 0)
    ]
    assert imp(group).tolist() == pytest.approx(expected)


# --- inside BasePruner ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruner", [tp.pruner.BasePruner, SInGEPruner])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"iterative_steps": 3},
        {"round_to": 4},
        {"scopes": True},
        {"scopes": True, "global_pruning": True},
    ],
    ids=lambda o: "-".join(o) or "local",
)
def test_works_wherever_an_importance_is_taken(pruner: Any, options: dict[str, Any]) -> None:
    net = Residual()
    options = dict(options)
    if options.pop("scopes", False):
        first, second = (block[0] for block in net.blocks)
        options["pruning_ratio_dict"] = {(first, second): 0.25, net.stem: 0.5}
    imp = SInGEImportance(nodes=2).bind(net, BATCHES)
    made = pruner(net, X, imp, ignored_layers=[net.fc], **options)
    sizes = [sum(p.numel() for p in net.parameters())]
    for _ in range(options.get("iterative_steps", 1)):
        made.step()
        sizes.append(sum(p.numel() for p in net.parameters()))
        assert bool(torch.isfinite(net(X)).all())
    assert all(a > b for a, b in itertools.pairwise(sizes))
    if options.get("round_to"):
        assert all(m.out_channels % 4 == 0 for m in net.modules() if isinstance(m, nn.Conv2d))
    if "pruning_ratio_dict" in options and not options.get("global_pruning"):
        assert [block[0].out_channels for block in net.blocks] == [12, 12]
        assert net.stem.out_channels == 4


def test_scores_follow_the_model_as_it_shrinks() -> None:
    net = Chain()
    imp = SInGEImportance(nodes=2).bind(net, BATCHES)
    pruner = SInGEPruner(net, X, imp)
    host = pruner.host()
    before = host.score(["conv2"])["conv2"]
    host.remove("conv1", [0, 1])
    host.remove("conv2", [int(before.argmin())])
    after = host.score(["conv2"])["conv2"]
    assert len(after) == len(before) - 1
    with torch.no_grad():
        torch.testing.assert_close(host.score(["conv2"])["conv2"], after, rtol=0, atol=0)


# --- never NaN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", [None, "sum", "max", "gaussian", "lamp", "standarization", "sentinel_0.5"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_dead_layers_do_not_give_nan(criterion: str, normalizer: str | None) -> None:
    net = mlp()
    group = group_of(net, "2", torch.zeros(2, 4))
    imp = SInGEImportance(criterion, normalizer=normalizer, nodes=2).bind(net, vectors())
    for name in ("2.weight", "2.bias", "4.weight"):  # zero rows first, then zero gradients as well
        nn.init.zeros_(net.get_parameter(name))
        assert bool(torch.isfinite(imp(group)).all())


# --- errors -----------------------------------------------------------------------------------------------------


def test_unbound() -> None:
    net = mlp()
    with pytest.raises(DataError, match=r"none is bound.*bind"):
        SInGEImportance()(group_of(net, "0", torch.zeros(2, 4)))
    with pytest.raises(DataError, match="needs data"):
        SInGEImportance().error(group_of(net, "0", torch.zeros(2, 4)))


def test_bound_to_another_model() -> None:
    net = mlp()
    imp = SInGEImportance().bind(copy.deepcopy(net), vectors())
    with pytest.raises(ConfigError, match="another model"):
        imp(group_of(net, "0", torch.zeros(2, 4)))


@pytest.mark.parametrize("batches", [[], iter([])])
def test_bound_to_nothing(batches: Any) -> None:
    with pytest.raises(DataError, match="empty"):
        SInGEImportance().bind(mlp(), batches)
    with pytest.raises(ConfigError, match=r"needs a torch\.nn\.Module"):
        SInGEImportance().bind("model", vectors())  # type: ignore[arg-type]


def test_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    imp = SInGEImportance().bind(net, vectors())
    with pytest.raises(TiedParameterError, match=r"'0\.weight' and '2\.weight'"):
        imp(group_of(net, "0", torch.zeros(2, 4)))


def test_lstm_and_parametrized_layers_are_refused() -> None:
    net = Net(
        lambda m, x: m.fc(m.lstm(m.stem(x))[0][:, -1]),
        stem=nn.Linear(3, 4), lstm=nn.LSTM(4, 4, batch_first=True), fc=nn.Linear(4, 3),
    )  # fmt: skip
    batch = (torch.randn(2, 5, 3), torch.tensor([0, 1]))
    with pytest.raises(GroupError, match="LSTM"):
        SInGEImportance().bind(net, [batch])(group_of(net, "lstm", batch[0]))
    normed = mlp()
    torch.nn.utils.parametrizations.weight_norm(normed[2])
    with pytest.raises(GroupError, match="parametriz"):
        SInGEImportance().bind(normed, vectors())(group_of(normed, "2", torch.zeros(2, 4)))
