"""N:M patterns and the allocation over layers, against plain loops."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from singe_plugin import Callback, UnstructuredPruner
from singe_plugin.errors import ConfigError
from singe_plugin.integrations.unstructured.allocation import layer_ratios, lowest_counts
from singe_plugin.integrations.unstructured.layers import WeightGroup
from singe_plugin.integrations.unstructured.patterns import Pattern
from singe_plugin.loop.loop import lowest
from singe_plugin.masks import masks_of

from asked import asked
from references import Net
from small_nets import Chain, images

LAYERS: dict[str, Any] = {
    "linear": lambda m: nn.Linear(3 * m, 5),
    "conv": lambda m: nn.Conv2d(2 * m, 3, (2, 3)),
    "grouped": lambda m: nn.Conv2d(4 * m, 4, 1, groups=2),
    "transposed": lambda m: nn.ConvTranspose2d(2 * m, 3, 2),
    "grouped transposed": lambda m: nn.ConvTranspose2d(4 * m, 6, (1, 2), groups=2),
    "conv1d": lambda m: nn.Conv1d(m, 2, 3),
}


def literal_blocks(layer: nn.Module, m: int) -> list[list[tuple[int, ...]]]:
    """The places of every block of ``m`` consecutive inputs, by hand: which weights read them."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    inputs, outputs = (0, 1) if transposed else (1, 0)
    blocks = []
    kernel = [()]
    for size in weight.shape[2:]:
        kernel = [(*k, i) for k in kernel for i in range(size)]  # type: ignore[misc]
    for out in range(weight.shape[outputs]):
        for k in kernel:
            for first in range(0, weight.shape[inputs], m):
                block = []
                for i in range(first, first + m):
                    block.append((i, out, *k) if transposed else (out, i, *k))
                blocks.append(block)
    return blocks


def at(tensor: Tensor, place: tuple[int, ...]) -> Any:
    return tensor[place].item()


def one_layer(layer: nn.Module) -> tuple[nn.Module, list[Any]]:
    """A net whose output is the layer's."""
    net: Any = Net(lambda m, x: m.layer(x).flatten(2).mean(2) if x.ndim > 2 else m.layer(x), layer=layer)
    width = getattr(layer, "in_channels", None) or layer.in_features
    spatial = {2: (), 3: (4,), 4: (4, 4)}[layer.weight.ndim]  # type: ignore[union-attr, operator]
    return net, [(torch.randn(3, width, *spatial), torch.tensor([0, 1, 0]))]


@given(
    kind=st.sampled_from(list(LAYERS)), pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5)]),
    criterion=st.sampled_from(["l1", "ig"]), rounds=st.integers(1, 3), order=st.sampled_from(["rounds", "layers"]),
    extra=st.sampled_from([None, 0.0, 0.2]), ratios=st.sampled_from(["global", "uniform"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_at_most_n_of_m_always(
    kind: str, pattern: tuple[int, int], criterion: str, rounds: int, order: str, extra: float | None, ratios: str,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    n, m = pattern
    layer = LAYERS[kind](m)
    net, batches = one_layer(layer)
    weight, start = layer.weight.detach().clone(), 1 - n / m
    sparsity = None if extra is None else start + extra * (1 - start)
    pruner = UnstructuredPruner(
        net, batches,
        **asked(
            pattern=pattern, sparsity=sparsity, criterion=criterion, nodes=2, order=order, ratios=ratios,
            **({"rounds": rounds} if order == "rounds" else {"units_per_step": 0.3}),
        ),
    )  # fmt: skip
    mask = pruner.run().masks["layer.weight"]
    blocks = literal_blocks(layer, m)
    assert sorted(place for block in blocks for place in block) == sorted(
        tuple(p) for p in torch.ones_like(weight).nonzero().tolist()
    )
    kept = [[place for place in block if at(mask, place)] for block in blocks]
    if extra is None:
        assert {len(places) for places in kept} == {n}
    assert max(len(places) for places in kept) <= n
    total = round((start if sparsity is None else sparsity) * weight.numel())
    assert abs(int((~mask).sum()) - total) <= (0 if extra else 1)
    if criterion == "l1" and not extra:  # the largest of every block stay
        for block, places in zip(blocks, kept, strict=True):
            sizes = sorted((abs(at(weight, place)) for place in block), reverse=True)
            assert sorted((abs(at(weight, place)) for place in places), reverse=True) == sizes[:n]


def test_a_pattern_in_rounds_begins_with_what_it_has_no_place_for() -> None:
    """Half-way, only weights outside of the best two of their block are gone, the cheapest of them first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    pruner = UnstructuredPruner(net, **asked(pattern="2:4", criterion="l1", rounds=2, course="linear"))
    stop: list[dict[str, Tensor]] = []

    class Halfway(Callback):
        def on_round_done(self, event: Any) -> None:
            stop.append(masks_of(net))

    pruner.callbacks = [Halfway()]
    weights = {f"{i}.weight": net[i].weight.detach().clone() for i in (0, 1)}
    pruner.run()
    surplus = []
    for name, weight in weights.items():
        for r, row in enumerate(weight.view(-1, 4).abs().tolist()):
            for size in sorted(row)[:2]:
                surplus.append((size, name, 4 * r + row.index(size)))
    first = {(name, place) for _, name, place in sorted(surplus)[: len(surplus) // 2]}
    gone = {(n, p) for n, mask in stop[0].items() for p in (~mask).flatten().nonzero().flatten().tolist()}
    assert gone == first


def test_layers_that_a_pattern_does_not_fit_are_left_whole() -> None:
    net = Chain()
    outcome = UnstructuredPruner(net, images(1), **asked(pattern="2:4", nodes=1)).run()
    assert outcome.left_whole == {
        "conv1": "its 2 input channels per group are no multiple of 4, so it cannot have the pattern 2:4"
    }
    assert [(layer.name, layer.sparsity) for layer in outcome.layers] == [("conv2", 0.5), ("conv3", 0.5), ("fc", 0.5)]
    assert net.conv1.weight.ne(0).all()


def test_a_pattern_and_more_on_top_of_it() -> None:
    outcome = UnstructuredPruner(Chain(), images(1), **asked(pattern="2:4", sparsity=0.9, rounds=3, nodes=1)).run()
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-3)
    for name, mask in outcome.masks.items():
        layer = WeightGroup(name, Chain().get_submodule(name.rpartition(".")[0]))
        assert int(Pattern(2, 4).counts(mask, layer).max()) <= 2
    by_layer = UnstructuredPruner(Chain(), images(1), **asked(pattern="2:4", ratios={"conv2": 0.75}, nodes=1)).run()
    assert [(layer.name, layer.sparsity) for layer in by_layer.layers] == [("conv2", 0.75)]
    assert by_layer.left_whole["fc"] == "ratios gives it no sparsity"
    with pytest.raises(
        ConfigError, match=r"max_pruning_ratio=0.4 keeps 519 of the 864 weights of layer 'conv2'.*raise it"
    ):
        UnstructuredPruner(Chain(), images(1), **asked(pattern="2:4", max_pruning_ratio=0.4, nodes=1)).run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_torch_takes_it_as_semi_structured() -> None:
    net = nn.Sequential(nn.Linear(128, 128, bias=False)).half().cuda()
    batch = (torch.randn(64, 128).half().cuda(), torch.randint(0, 128, (64,)).cuda())
    pruner = UnstructuredPruner(net, [batch], sparsity="2:4")
    pruner.run()
    pruner.fold()
    expected = net(batch[0])
    net[0].weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(net[0].weight))
    torch.testing.assert_close(net(batch[0]), expected, rtol=1e-2, atol=1e-2)


# --- allocation -------------------------------------------------------------------------------------------------


@given(pools=st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=4), share=st.floats(0, 1))
@settings(deadline=None)
def test_the_lowest_of_all_are_counted_exactly(pools: list[list[int]], share: float) -> None:
    sizes = [len(pool) for pool in pools]
    count = round(share * sum(sizes))
    counts = lowest_counts([torch.tensor(pool, dtype=torch.float32) for pool in pools], count)
    assert sum(counts) == count
    assert all(0 <= c <= size for c, size in zip(counts, sizes, strict=True))
    if count:
        cut = sorted(value for pool in pools for value in pool)[count - 1]
        ties = [pool.count(cut) for pool in pools]
        taken = [c - sum(v < cut for v in pool) for c, pool in zip(counts, pools, strict=True)]
        for tie, took in zip(ties, taken, strict=True):  # equal scores go in proportion
            assert abs(took - sum(taken) * tie / sum(ties)) < 1


@given(pools=st.lists(st.lists(st.floats(0, 1), unique=True, max_size=9), min_size=1, max_size=4), data=st.data())
@settings(deadline=None)
def test_a_cap_leaves_the_highest_of_a_pool_out(pools: list[list[float]], data: Any) -> None:
    caps = [data.draw(st.integers(0, len(pool))) for pool in pools]
    count = data.draw(st.integers(0, sum(caps)))
    ranked = sorted((v, i) for i, (pool, cap) in enumerate(zip(pools, caps, strict=True)) for v in sorted(pool)[:cap])
    expected = [sum(i == number for _, i in ranked[:count]) for number in range(len(pools))]
    tensors = [torch.tensor(pool, dtype=torch.float64) for pool in pools]
    got = lowest_counts(tensors, count, caps)
    assert sum(got) == count
    if len({v for v, _ in ranked}) == len(ranked):
        assert got == expected


@given(values=st.lists(st.integers(0, 4), max_size=12), count=st.integers(0, 12))
@settings(deadline=None)
def test_the_lowest_are_the_first_of_a_stable_sort(values: list[int], count: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    assert lowest("layer", torch.tensor(values, dtype=torch.float32), count).tolist() == sorted(order[:count])


def test_ratios_of_the_innermost_name_hold() -> None:
    names = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"]
    random.shuffle(names)
    found = layer_ratios(names, {"blocks": 0.5, "blocks.0": 0.6, "blocks.0.conv2": 0.7})
    assert found == {"stem": 0.0, "blocks.0.conv1": 0.6, "blocks.0.conv2": 0.7, "blocks.1.conv1": 0.5}
    with pytest.raises(ConfigError, match=r"ratios names \['blocks.2'\]"):
        layer_ratios(names, {"blocks.2": 0.5})
