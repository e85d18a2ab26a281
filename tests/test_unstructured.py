"""``UnstructuredPruner``: counts, rounds and Algorithm 1 against slow literal loops, and which layers there are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import FineTune, UnstructuredPruner
from singe_plugin.errors import BudgetError, SingeError
from singe_plugin.integrations.unstructured.pruner import SparseOutcome
from singe_plugin.loop.events import History
from singe_plugin.masks import masks_of

from asked import asked
from references import Net, randomise_norms
from small_nets import Chain, Grouped, images, mlp

BATCHES = images(2)
MU, STEPS = 0.7, 3
LITERAL: dict[str, Any] = {"mu": MU, "steps": STEPS, "quadrature": "geometric"}
NAMES = ["conv1", "conv2", "conv3", "fc"]


def chain() -> Chain:
    torch.manual_seed(0)
    net: Any = randomise_norms(Chain(widths=(4, 6, 4)))
    return net


def literal_ig(net: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eq. 5 for every weight by plain autograd: one layer decays at a time. (Batch-norm need not be folded for it.)"""
    found = {}
    for name in masks:
        total = torch.zeros(masks[name].shape, dtype=torch.float64)
        for inputs, targets in BATCHES:
            for s in range(STEPS + 1):
                other = copy.deepcopy(net).double().eval()
                with torch.no_grad():
                    for layer, mask in masks.items():
                        other.get_submodule(layer).weight.mul_(mask)
                    weight: Any = other.get_submodule(name).weight
                    weight.mul_(MU**s)
                functional.cross_entropy(other(inputs.double()), targets).backward()
                total += (weight.detach() * weight.grad).abs() / len(BATCHES)
        found[name] = total
    return found


def mask_lowest(scores: dict[str, Tensor], masks: dict[str, Tensor], count: int) -> None:
    """Mask the cheapest of all weights that are left, one by one."""
    ranked = sorted(
        (float(scores[name].flatten()[i]), name, i)
        for name, mask in masks.items()
        for i in mask.flatten().nonzero().flatten().tolist()
    )
    for _, name, i in ranked[:count]:
        masks[name].view(-1)[i] = False


def ones(net: nn.Module, names: list[str] = NAMES) -> dict[str, Tensor]:
    return {name: torch.ones_like(net.get_submodule(name).weight, dtype=torch.bool) for name in names}


def assert_masks(outcome: SparseOutcome, expected: dict[str, Tensor]) -> None:
    assert list(outcome.masks) == [f"{name}.weight" for name in expected]
    for name, mask in expected.items():
        assert torch.equal(outcome.masks[f"{name}.weight"], mask), name


# --- what is masked ---------------------------------------------------------------------------------------------


def test_one_shot_over_all_layers_is_a_sorted_list() -> None:
    net = chain()
    masks = ones(net)
    total = sum(m.numel() for m in masks.values())
    mask_lowest(literal_ig(net, masks), masks, round(0.7 * total))
    outcome = UnstructuredPruner(net, BATCHES, **asked(sparsity=0.7, **LITERAL)).run()
    assert_masks(outcome, masks)
    assert [layer.nonzero for layer in outcome.layers] == [int(m.sum()) for m in masks.values()]
    assert outcome.sparsity == pytest.approx(round(0.7 * total) / total)


@pytest.mark.parametrize("course", ["cubic", "linear"])
def test_rounds_with_fine_tuning_in_between(course: str) -> None:
    """Another implementation of it all: scores, the course of the sparsity, masks, plain gradient descent."""
    net, other = chain(), chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    tuning = FineTune(BATCHES, 4, optimizer=optimizer, label_smoothing=0.0, clip_grad=None)
    pruner = UnstructuredPruner(
        net, BATCHES, **asked(sparsity=0.8, rounds=2, course=course, finetune=tuning, ignored_layers=["fc"], **LITERAL)
    )
    history = History()
    outcome = pruner.run(history=history)

    masks = ones(other, NAMES[:3])
    total = sum(m.numel() for m in masks.values())
    for number, share in enumerate({"cubic": (0.875, 1.0), "linear": (0.5, 1.0)}[course]):
        gone = total - sum(int(m.sum()) for m in masks.values())
        mask_lowest(literal_ig(other, masks), masks, round(share * round(0.8 * total)) - gone)
        for inputs, targets in BATCHES:
            other.train().zero_grad()
            with torch.no_grad():
                for name, mask in masks.items():
                    other.get_submodule(name).weight.mul_(mask)
            functional.cross_entropy(other(inputs), targets).backward()
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter -= 0.05 * parameter.grad
        assert history.select("round_done")[number]["left"] == sum(int(m.sum()) for m in masks.values())
    assert_masks(outcome, masks)
    pruner.fold()
    with torch.no_grad():
        for name, mask in masks.items():
            other.get_submodule(name).weight.mul_(mask)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratios", ["uniform", "global", "dict"])
def test_algorithm_1_layer_by_layer(ratios: str) -> None:
    net = chain()
    masks = ones(net)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    if ratios == "global":
        first = ones(net)
        mask_lowest(literal_ig(net, first), first, round(0.5 * sum(sizes.values())))
        plan = {name: sizes[name] - int(mask.sum()) for name, mask in first.items()}
    else:
        plan = {name: round({"uniform": 0.5, "dict": 0.25}[ratios] * size) for name, size in sizes.items()}
    for name, count in plan.items():
        step = round(0.2 * sizes[name])
        for done in range(0, count, step):
            scores = literal_ig(net, masks)[name]
            mask_lowest({name: scores}, {name: masks[name]}, min(step, count - done))
    amount = {"ratios": dict.fromkeys(NAMES, 0.25)} if ratios == "dict" else {"ratios": ratios, "sparsity": 0.5}
    heard = History()
    outcome = UnstructuredPruner(net, BATCHES, **asked(order="layers", units_per_step=0.2, **amount, **LITERAL)).run(
        history=heard
    )
    assert outcome.plan == plan
    assert_masks(outcome, masks)
    assert [row["layer"] for row in heard.select("layer_done")] == NAMES


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("order", ["rounds", "layers"])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.9, 0.999])
def test_counts_are_exact(sparsity: float, order: str, rounds: int) -> None:
    for ratios in ("global", "uniform"):
        net = chain()
        sizes = {name: net.get_submodule(name).weight.numel() for name in NAMES}
        outcome = UnstructuredPruner(
            net,
            BATCHES[:1],
            **asked(
                sparsity=sparsity,
                ratios=ratios,
                order=order,
                rounds=rounds if order == "rounds" else None,
                units_per_step=1 / rounds if order == "layers" and rounds > 1 else None,
                nodes=1,
            ),
        ).run()
        masked = {layer.name: layer.weights - layer.nonzero for layer in outcome.layers}
        if ratios == "global":
            assert sum(masked.values()) == min(round(sparsity * sum(sizes.values())), sum(sizes.values()) - 4)
        else:
            assert masked == {name: min(round(sparsity * size), size - 1) for name, size in sizes.items()}
        assert all(layer.nonzero >= 1 for layer in outcome.layers)
        assert outcome.plan == {name: count for name, count in masked.items() if order == "layers" or count}
        assert {n: int((~m).sum()) for n, m in outcome.masks.items()} == {f"{n}.weight": c for n, c in masked.items()}


def test_magnitudes_are_those_of_the_folded_weights() -> None:
    net = chain()
    outcome = UnstructuredPruner(net, BATCHES, **asked(sparsity=0.5, criterion="l1", layers=["conv1"])).run()
    scale = (net.bn1.weight / (net.bn1.running_var + net.bn1.eps).sqrt()).detach()[:, None, None, None]
    weight = chain().conv1.weight.detach() * scale
    expected = weight.abs().flatten().argsort()[: weight.numel() // 2]
    assert sorted(expected.tolist()) == (~outcome.masks["conv1.weight"]).flatten().nonzero().flatten().tolist()
    assert not torch.equal(weight.abs().flatten().argsort(), chain().conv1.weight.detach().abs().flatten().argsort())


def test_without_data_magnitudes_do() -> None:
    net = mlp(6)
    outcome = UnstructuredPruner(net, **asked(criterion="l2", sparsity=0.5)).run()
    values = torch.cat([mlp_weight.abs().flatten() for mlp_weight in (net[0].weight, net[2].weight, net[4].weight)])
    assert outcome.nonzero == sum(p.numel() for p in net.parameters()) - round(0.5 * len(values))
    assert (outcome.macs, outcome.effective_macs) == (None, None)


def test_a_model_that_is_masked_already_goes_on_from_there() -> None:
    net = chain()
    one_go = UnstructuredPruner(chain(), BATCHES, **asked(sparsity=0.8, rounds=2, course="linear")).run()
    first = UnstructuredPruner(net, BATCHES, sparsity=0.4).run()
    second = UnstructuredPruner(net, BATCHES, sparsity=0.8).run()
    for name, mask in second.masks.items():
        assert not bool((mask & ~first.masks[name]).any())
        assert torch.equal(mask, one_go.masks[name])
    assert UnstructuredPruner(net, BATCHES, sparsity=0.3).run().masks.keys() == second.masks.keys()
    assert_masks(second, {name: masks_of(net)[f"{name}.weight"] for name in NAMES})  # nothing comes back


@pytest.mark.parametrize(
    ("options", "dense", "why"),
    [
        ({"ratios": {"conv1": 0.5, "conv2": 0.0, "fc": 0.25}}, {"conv2", "conv3"}, "ratios gives it no sparsity"),
        ({"ratios": {"conv1": 0.5, "conv2": 0.5, "fc": 0.5}, "pattern": "2:4"}, {"conv1", "conv3"}, "input channels"),
    ],
    ids=["ratio zero", "no fit"],
)
def test_ratios_may_name_layers_that_stay_whole(options: dict[str, Any], dense: set[str], why: str) -> None:
    net = chain()
    outcome = UnstructuredPruner(net, BATCHES, **asked(criterion="l1", **options)).run()
    assert {row.name: row.nonzero for row in outcome.layers} == {
        name: round(net.get_submodule(name).weight.numel() * (1 - options["ratios"][name]))
        for name in NAMES
        if name not in dense
    }
    assert all(name in outcome.left_whole for name in dense)
    assert any(why in outcome.left_whole[name] for name in dense)


def test_max_pruning_ratio() -> None:
    outcome = UnstructuredPruner(chain(), BATCHES, **asked(sparsity=0.74, max_pruning_ratio=0.75)).run()
    assert max(layer.sparsity for layer in outcome.layers) == 0.75
    assert outcome.sparsity == pytest.approx(0.74, abs=2e-3)
    with pytest.raises(BudgetError, match=r"sparsity=0.8 cannot be reached.*choose at most 0.7"):
        UnstructuredPruner(chain(), BATCHES, **asked(sparsity=0.8, max_pruning_ratio=0.75)).run()


def test_effective_macs_by_hand() -> None:
    net = Grouped()
    batch = (torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 2]))
    outcome = UnstructuredPruner(net, [batch], sparsity=0.6).run()
    positions = {"conv1": 64, "conv2": 64, "dw": 64, "conv3": 64, "fc": 1}
    assert {r.name: r.macs for r in outcome.layers} == {
        n: p * net.get_submodule(n).weight.numel() for n, p in positions.items()
    }
    by_hand = sum(p * int(net.get_submodule(n).weight.count_nonzero()) for n, p in positions.items())
    assert outcome.effective_macs == sum(r.effective_macs or 0 for r in outcome.layers) == by_hand
    assert outcome.macs == sum(r.macs or 0 for r in outcome.layers)
    assert outcome.nonzero == outcome.params - sum(r.weights - r.nonzero for r in outcome.layers)


def test_the_host_knows_what_a_weight_costs() -> None:
    net = chain()
    pruner = UnstructuredPruner(net, BATCHES, **asked(nodes=1))
    host = pruner.host()
    plan, params, macs = {"conv1": 10, "conv2": 50, "fc": 3}, host.params(), host.effective_macs()
    assert params == sum(p.numel() for p in net.parameters())
    positions: dict[str, int] = {}
    for name in NAMES:
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: positions.update({name: out[0, 0].numel()})
        )
    net(BATCHES[0][0])
    assert macs == sum(positions[name] * net.get_submodule(name).weight.numel() for name in NAMES)
    for name, count in plan.items():
        host.remove(name, range(count))
    assert host.params() == params - sum(plan.values())
    assert host.effective_macs() == macs - sum(positions[name] * count for name, count in plan.items())
    assert [(spec.name, spec.units) for spec in host.layers()] == [(n, host.left(n)) for n in NAMES]
    for units in ([host.left("fc")], [-1]):
        with pytest.raises(SingeError, match=rf"'fc' has {host.left('fc')} weights left, but number {units[0]} was"):
            host.remove("fc", units)


# --- which layers -----------------------------------------------------------------------------------------------


def test_layers_in_forward_order_and_everything_else_with_a_reason() -> None:
    net: Any = Net(
        lambda m, x: m.last(m.first(m.emb(x).mean(1) @ m.raw)) if not m.training else m.aux(m.emb(x).mean(1)),
        last=nn.Linear(4, 3), aux=nn.Linear(4, 3), first=nn.Linear(4, 4), emb=nn.Embedding(5, 4),
        raw=nn.Parameter(torch.randn(4, 4)), gain=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    batch = (torch.randint(0, 5, (6, 3)), torch.randint(0, 3, (6,)))
    pruner = UnstructuredPruner(net, [batch], sparsity=0.5)
    assert [layer.name for layer in pruner.layers] == ["first", "last"]
    assert pruner.left_whole == {
        "aux": "the model's output in eval mode does not depend on it",
        "emb.weight": "a parameter of Embedding, no convolution or linear layer",
        "raw": "a parameter of Net, no convolution or linear layer",
    }
    assert [layer.name for layer in UnstructuredPruner(net, [batch], layers=["last"]).layers] == ["last"]
    ignored = UnstructuredPruner(net, [batch], ignored_layers=[net.last])
    assert ignored.left_whole["last"] == "it is in ignored_layers"


def test_a_norm_behind_standardised_weights_is_not_folded() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True))

    net = nn.Sequential(Standardised(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten())
    batch = (torch.randn(2, 2, 3, 3), torch.tensor([0, 1]))
    randomise_norms(net)
    assert [layer.norm for layer in UnstructuredPruner(net, [batch]).layers] == [None, net[3]]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_timm_models(name: str) -> None:
    net = timm.create_model(name, num_classes=3, in_chans=1, img_size=32) if name == "test_vit" else timm.create_model(
        name, num_classes=3, in_chans=1
    )  # fmt: skip
    batch = (torch.randn(2, 1, 32, 32), torch.tensor([0, 2]))
    outcome = UnstructuredPruner(net, [batch], **asked(sparsity=0.9, nodes=1, max_pruning_ratio=0.99)).run()
    assert outcome.sparsity == pytest.approx(0.9, abs=1e-4)
    assert net(batch[0]).isfinite().all()


def test_attention_of_torch() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net: Any = Net(lambda m, x: m.head(m.block(x).mean(1)), block=block, head=nn.Linear(8, 3))
    batch = (torch.randn(4, 5, 8), torch.tensor([0, 1, 2, 0]))
    pruner = UnstructuredPruner(net, [batch], sparsity=0.5)
    outcome = pruner.run()
    assert {r.name for r in outcome.layers} == {"block.self_attn.out_proj", "block.linear1", "block.linear2", "head"}
    assert list(outcome.left_whole) == ["block.self_attn.in_proj_weight"]
    with torch.no_grad():
        before = net.eval()(batch[0])
        pruner.fold()
        torch.testing.assert_close(net(batch[0]), before)  # torch takes a fused kernel for plain weights
