"""What language models are made of: tied tables, bare matrices, experts, grouped queries; removal is masking."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Scoring
from singe_plugin.axes import AxisGraph, Group, Trackers, remove_units, verify_groups
from singe_plugin.axes.grouped import PlainGroups, grouped_product
from singe_plugin.errors import RemovalError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.method.scoring import score_groups
from singe_plugin.nested import results_in

from masking import Masked
from references import Net

IDS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))


class Conv1D(nn.Module):
    """A linear layer that keeps its weight the other way round, as GPT-2's."""

    def __init__(self, width: int, made: int) -> None:
        super().__init__()
        self.nf = made
        self.weight, self.bias = nn.Parameter(torch.randn(width, made)), nn.Parameter(torch.randn(made))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def tied(how: str = "modules") -> Any:
    """A table, a residual block of bare matrices, and the table again as the classifier."""
    torch.manual_seed(1)

    def compute(m: Any, x: Tensor) -> Tensor:
        stream = m.table(x)
        stream = stream + m.down(torch.relu(m.up(stream)))
        return m.head(stream) if how == "modules" else functional.linear(stream, m.table.weight)

    net = Net(compute, table=nn.Embedding(11, 6), up=Conv1D(6, 8), down=Conv1D(8, 6))
    if how == "modules":
        net.head = nn.Linear(6, 11, bias=False)
        net.head.weight = net.table.weight
    return net.double()


def verified(model: nn.Module, inputs: Any) -> AxisGraph:
    graph = AxisGraph(model, inputs)
    assert verify_groups(graph) == {}
    return graph


def group_of(graph: AxisGraph, size: int) -> Group:
    (found,) = (g for g in graph.groups.values() if g.size == size and not g.secondary)
    return found


def left(size: int, gone: Sequence[int]) -> list[int]:
    return [n for n in range(size) if n not in gone]


def test_tied_weights_are_one_parameter() -> None:
    model = tied()
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    graph = verified(model, IDS)
    optimizer = torch.optim.Adam(model.parameters())
    model(IDS).sum().backward()
    optimizer.step()
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    remove_units(graph, group_of(graph, 6), [1, 4], Trackers([optimizer]))
    remove_units(graph, group_of(graph, 8), [0], Trackers([optimizer]))
    s, h = left(6, [1, 4]), left(8, [0])
    table = weights["table.weight"][:, s]
    x = table[IDS.numpy()]
    hidden = np.maximum(x @ weights["up.weight"][np.ix_(s, h)] + weights["up.bias"][h], 0)
    expected = (x + hidden @ weights["down.weight"][np.ix_(h, s)] + weights["down.bias"][s]) @ table.T
    np.testing.assert_allclose(model(IDS).detach().numpy(), expected, rtol=1e-12)
    assert model.head.weight is model.table.weight
    assert (model.head.in_features, model.table.embedding_dim, model.up.nf, model.down.nf) == (4, 4, 7, 4)
    assert optimizer.state[model.table.weight]["exp_avg"].shape == (11, 4)


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_tied_weights_decay_in_both_places(path: Any) -> None:
    batches = [(IDS, IDS)]
    options = Scoring("ig", nodes=3, path=path, objective=lambda out, t: functional.cross_entropy(out.mT, t))
    found = []
    for how in ("modules", "function"):  # in the second, there is only one place
        graph = AxisGraph(model := tied(how), IDS)
        groups = {str(size): group_of(graph, size).unit_group() for size in (6, 8)}
        before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        found.append(score_groups(model, groups, batches, options))
        assert before == {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, scores in found[0].items():
        assert bool((scores > 0).all())
        torch.testing.assert_close(scores, found[1][name])


def test_two_layers_with_one_weight_and_biases_of_their_own() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    model = model.double()
    x = torch.randn(4, 5, dtype=torch.float64)
    graph, reference = verified(model, x), Masked(model)
    (group,) = graph.groups.values()
    assert [p.name for p in group.unit_group().producers] == ["0", "2", "4.bias"]
    remove_units(graph, group, [2, 3, 7], Trackers(emas=[reference.tags]))
    torch.testing.assert_close(model(x), reference.model()(x), rtol=1e-12, atol=0)


def test_an_ignored_classifier_keeps_its_outputs_and_no_more() -> None:
    model = tied()
    assert group_of(AxisGraph(model, IDS, ignored=[model.head]), 6).size == 6


@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
def test_importances_of_torch_pruning_see_bare_matrices_as_layers(dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(8, 3))
    if dims == (1, 0):
        first, second = nn.Parameter(first.detach().t().clone()), nn.Parameter(second.detach().t().clone())
    model = Net(
        lambda m, x: torch.relu(x @ m.a) @ m.b if dims == (0, 1) else torch.relu(x @ m.a.t()) @ m.b.t(),
        a=first, b=second,
    )  # fmt: skip
    pruner = SInGEPruner(model, torch.randn(2, 4), tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5)
    a, b = (p.detach().numpy().T if dims == (1, 0) else p.detach().numpy() for p in (first, second))
    norms = (a**2).sum(0) + (b**2).sum(1)
    pruner.step()
    kept = np.sort(np.argsort(norms)[4:])
    np.testing.assert_array_equal(first.detach().numpy() if dims == (0, 1) else first.detach().numpy().T, a[:, kept])
    np.testing.assert_array_equal(second.detach().numpy() if dims == (0, 1) else second.detach().numpy().T, b[kept])


# -- experts ----------------------------------------------------------------------------------------------------------


def routed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    chosen = m.router(x).softmax(-1).topk(2, -1)
    return chosen.values, chosen.indices


def by_einsum(m: Any, x: Tensor) -> Tensor:
    values, indices = routed(m, x)
    gates = torch.zeros(len(x), 3, dtype=x.dtype).scatter(1, indices, values)
    hidden = torch.relu(torch.einsum("nd,efd->nef", x, m.up))
    return torch.einsum("nef,edf,ne->nd", hidden, m.down, gates)


def by_bmm(m: Any, x: Tensor) -> Tensor:
    values, indices = routed(m, x)
    up, down = m.up[indices.flatten()], m.down[indices.flatten()]
    hidden = torch.relu(torch.bmm(up, x.repeat_interleave(2, 0)[:, :, None]))
    return (torch.bmm(down, hidden)[:, :, 0].view(len(x), 2, -1) * values[:, :, None]).sum(1)


def by_loop(m: Any, x: Tensor) -> Tensor:
    values, indices = routed(m, x)
    out = torch.zeros_like(x)
    for expert in range(3):
        rows, place = torch.where(indices == expert)
        made = functional.linear(torch.relu(functional.linear(x[rows], m.up[expert])), m.down[expert])
        out.index_add_(0, rows, made * values[rows, place, None])
    return out


def grouped(m: Any, x: Tensor) -> Tensor:
    values, indices = routed(m, x)
    experts, order = torch.sort(indices.flatten())
    ends = torch.searchsorted(experts, torch.arange(3), right=True).to(torch.int32)
    hidden = torch.relu(torch._grouped_mm(x[order // 2], m.up.mT, offs=ends))
    made = torch._grouped_mm(hidden, m.down.mT, offs=ends) * values.flatten()[order, None]
    return made[torch.argsort(order)].view(len(x), 2, -1).sum(1)


def mixture(experts: Callable[[Any, Tensor], Tensor]) -> Any:
    torch.manual_seed(3)
    return Net(
        lambda m, x: m.head(m.stem(x) + experts(m, m.stem(x))), stem=nn.Linear(5, 8), router=nn.Linear(8, 3),
        up=nn.Parameter(torch.randn(3, 16, 8)), down=nn.Parameter(torch.randn(3, 8, 16)), head=nn.Linear(8, 2),
    )  # fmt: skip


def by_hand(model: Any, x: np.ndarray[Any, Any], s: list[int], f: list[int]) -> np.ndarray[Any, Any]:
    """The mixture with some of its stream and of its hidden units, token by token."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    made = []
    for row in x:
        h = w["stem.weight"][s] @ row + w["stem.bias"][s]
        logits = w["router.weight"][:, s] @ h + w["router.bias"]
        gates = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        out = h.copy()
        for e in np.argsort(gates)[-2:]:
            out += gates[e] * w["down"][e][np.ix_(s, f)] @ np.maximum(w["up"][e][np.ix_(f, s)] @ h, 0)
        made.append(w["head.weight"][:, s] @ out + w["head.bias"])
    return np.stack(made)


@pytest.mark.parametrize("experts", [by_einsum, by_bmm, by_loop, grouped], ids=lambda f: f.__name__)
def test_experts_in_one_table_lose_units_of_the_stream_and_inside(experts: Any) -> None:
    model = mixture(experts) if experts is grouped else mixture(experts).double()
    x = torch.randn(9, 5, dtype=model.head.weight.dtype)
    graph = verified(model, x)
    assert set(graph.left_whole) == {"router", "head"}
    original = copy.deepcopy(model)
    remove_units(graph, group_of(graph, 8), stream := [1, 2, 4, 7])
    remove_units(graph, group_of(graph, 16), inside := [0, 5, 6, 9, 10, 11, 13, 15])
    expected = by_hand(original, x.numpy(), left(8, stream), left(16, inside))
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-4 if experts is grouped else 1e-10)


def test_widths_that_an_operator_takes_in_multiples_stay_so() -> None:
    model = mixture(grouped)
    graph = verified(model, torch.randn(9, 5))
    group = group_of(graph, 16)
    assert (group.multiple, group_of(graph, 8).multiple) == (4, 4)  # 16 bytes
    with pytest.raises(RemovalError, match=r"no multiple of 4, and _grouped_mm in Net takes no others"):
        remove_units(graph, group, [3])
    assert model.up.shape == (3, 16, 8)
    pruner = SInGEPruner(model, torch.randn(9, 5), tp.importance.MagnitudeImportance(), pruning_ratio=0.3)
    pruner.step()
    assert sorted(g.size for g in pruner.layers) == [4, 8]
    assert bool(model(torch.randn(9, 5)).isfinite().all())


def test_grouped_products() -> None:
    rng, ends = np.random.default_rng(0), [2, 2, 5]
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(3, 3, 4))
    of = np.searchsorted(ends, np.arange(5), side="right")
    found = grouped_product(torch.from_numpy(a), torch.from_numpy(b), torch.tensor(ends)).numpy()
    np.testing.assert_allclose(found, np.stack([a[i] @ b[g] for i, g in enumerate(of)]))
    c, d = rng.normal(size=(3, 4, 2)), rng.normal(size=(2, 5))
    found = grouped_product(torch.from_numpy(c), torch.from_numpy(d), torch.tensor(ends)).numpy()
    np.testing.assert_allclose(found, np.stack([c[g] @ d[:, i] for i, g in enumerate(of)], 1))
    found = grouped_product(torch.from_numpy(a.T), torch.from_numpy(a), torch.tensor(ends)).numpy()
    np.testing.assert_allclose(found, [sum(np.outer(a[i], a[i]) for i in range(5) if of[i] == g) + 0 * np.eye(3)
                                       for g in range(3)])  # fmt: skip
    one, two = torch.randn(5, 8), torch.randn(2, 8, 4)
    ends32 = torch.tensor([1, 5], dtype=torch.int32)
    with PlainGroups():
        plain = torch._grouped_mm(one, two, offs=ends32)
    torch.testing.assert_close(plain, torch._grouped_mm(one, two, offs=ends32))


# -- grouped queries --------------------------------------------------------------------------------------------------


def shared_by_expand(x: Tensor, times: int) -> Tensor:
    b, heads, n, d = x.shape
    return x[:, :, None].expand(b, heads, times, n, d).reshape(b, heads * times, n, d)


SHARING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": shared_by_expand,
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "enable_gqa": lambda x, n: x,
}


class Queries(nn.Module):
    """Queries in groups that share keys and values, turned in pairs by where they are."""

    def __init__(self, sharing: str) -> None:
        super().__init__()
        self.head_dim, self.groups, self.sharing = 8, 2, sharing
        self.q, self.k, self.v = (nn.Linear(12, n * 8, bias=False) for n in (6, 3, 3))
        self.out = nn.Linear(48, 12, bias=False)
        self.register_buffer("frequencies", torch.from_numpy(10.0 ** -np.arange(0, 1, 0.25)))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).to(x)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (SHARING[self.sharing](t, self.groups) for t in (self.turned(k), v))
        options = {"enable_gqa": True} if self.sharing == "enable_gqa" else {}
        made = functional.scaled_dot_product_attention(self.turned(q), k, v, is_causal=True, scale=8**-0.5, **options)
        return self.out(made.transpose(1, 2).reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize("sharing", SHARING)
def test_grouped_queries_and_rotary_pairs_go_in_step(sharing: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 12), Queries(sharing), nn.Linear(12, 3)).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    graph = verified(model, x)
    pairs, heads = (group_of(graph, 4), next(g for g in graph.groups.values() if g.size == 3 and g.secondary))
    assert (pairs.in_heads, heads.is_heads) == (True, True)
    original = copy.deepcopy(model[1])
    remove_units(graph, pairs, [2])
    remove_units(graph, heads, [1])
    assert [m.out_features for m in (model[1].q, model[1].k, model[1].v)] == [4 * 6, 2 * 6, 2 * 6]
    h = model[0](x).detach().numpy()
    kept_dims = [d for d in range(8) if d % 4 != 2]
    weights = {n: p.detach().numpy() for n, p in original.named_parameters()}
    angle = np.arange(6)[:, None] * np.tile(10.0 ** -np.arange(0, 1, 0.25), 2)[kept_dims]

    def turn(t: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return t * np.cos(angle) + np.concatenate([-t[:, 3:], t[:, :3]], 1) * np.sin(angle)

    expected = np.zeros((2, 6, 12))
    for b in range(2):
        for head in (0, 1, 4, 5):  # the queries of the second group are gone
            rows, shared = [head * 8 + d for d in kept_dims], [head // 2 * 8 + d for d in kept_dims]
            q, k = turn(h[b] @ weights["q.weight"][rows].T), turn(h[b] @ weights["k.weight"][shared].T)
            logits = np.where(np.tri(6) > 0, q @ k.T / math.sqrt(8), -np.inf)
            even = np.exp(logits - logits.max(1, keepdims=True))
            value = even / even.sum(1, keepdims=True) @ (h[b] @ weights["v.weight"][shared].T)
            expected[b] += value @ weights["out.weight"][:, rows].T
    np.testing.assert_allclose(model[1](torch.from_numpy(h)).detach().numpy(), expected, rtol=1e-10)


# -- what a model says of its sizes, and gives back -------------------------------------------------------------------


def test_attributes_that_sizes_are_checked_against_follow() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d_model, self.other = 8, 8
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if x.size(-1) != self.d_model:
                raise ValueError(f"{x.size(-1)} is not {self.d_model}")
            made: Tensor = self.fc(x)
            return made

    model: Any = nn.Sequential(nn.Linear(5, 8), Checked(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    graph, reference = verified(model, x), Masked(model)
    remove_units(graph, graph.groups["0"], [1, 5, 6], Trackers(emas=[reference.tags]))
    assert (model[1].d_model, model[1].other) == (5, 8)
    torch.testing.assert_close(model(x), reference.model()(x), rtol=1e-12, atol=0)


def test_a_whole_transformer() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(m.body(m.stem(x), m.stem(x[:, :2]))), stem=nn.Linear(5, 8),
        body=nn.Transformer(8, 2, 1, 1, 12, batch_first=True), head=nn.Linear(8, 3),
    )  # fmt: skip
    x = torch.randn(2, 4, 5)
    graph = verified(model, x)
    written = {id(s.tensor) for g in graph.groups.values() if not g.secondary for s in g.slices() if not s.reads}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    assert sum(p.numel() for p in matrices if id(p) in written) > 0.9 * sum(p.numel() for p in matrices)
    (stream,) = (g for g in graph.groups.values() if "stem" in g.writers and not g.secondary)
    remove_units(graph, stream, [1])  # a dimension of both heads
    assert model.body.d_model == model.stem.out_features == model.head.in_features == 6
    assert model(x).shape == (2, 2, 3)


@pytest.mark.parametrize("read", [False, True])
def test_one_position_that_only_its_shape_is_asked_of_can_go(read: bool) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        last = h[:, :, -1]
        return m.b(h + torch.arange(last.shape[1]).to(h)[:, None] + (last.mean() if read else 0))

    model = Net(compute, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    graph = AxisGraph(model, torch.randn(2, 4, 5))
    assert ("a" in graph.groups) != read
    if read:
        assert graph.left_whole["a"] == "select in Net tells its positions apart, so that none of them can go"


def test_inner_states_beside_logits_are_no_results() -> None:
    states = {"encoder_last_hidden_state": torch.zeros(3), "decoder_hidden_states": (torch.zeros(4),)}
    assert [len(t) for t in results_in({"logits": torch.zeros(1), "pred_boxes": torch.zeros(2), **states})] == [1, 2]
    assert [len(t) for t in results_in(states)] == [3, 4]
    assert [len(t) for t in results_in((torch.zeros(1), states))] == [1, 3, 4]

    def compute(m: Any, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(m.a(x))
        return {"logits": m.b(h), "last_hidden_state": h}

    graph = verified(model := Net(compute, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), torch.randn(2, 5))
    remove_units(graph, graph.groups["a"], [1])
    assert model(torch.randn(2, 5))["last_hidden_state"].shape == (2, 7)
