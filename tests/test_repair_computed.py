"""Layers whose weight is no parameter are not solved, and named: no layer with other inputs is passed over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torchvision.ops import DeformConv2d

from singe_plugin import Pace, SInGEPruner, hold_masks, prune, prune_weights, repair
from singe_plugin.loop.repair import Solved

from stranger_trial import copied


class Low(nn.Module):
    """A user's: the weight and a product of two thin matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def low() -> nn.Module:
    layer = nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "weight", Low())
    return layer


def computed_bias() -> nn.Module:
    layer = nn.Linear(8, 4)
    parametrize.register_parametrization(layer, "bias", Halved())
    return layer


class Experts(nn.Module):
    """Two layers at once, by a product of stacks of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.tables).sum(0)


class FromLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.table @ x.t()).t()


class Split(nn.Module):
    """One table of two layers, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.table.chunk(2)
        return functional.linear(x, one) * functional.linear(x, two)


class Turned(nn.Module):
    """Activations times activations: no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x @ x.t()).softmax(1) @ x)


class Fused(nn.Module):
    """A recurrent layer by the function that layers call."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(1, 1, 4)
        weights = [p for _, p in self.cells.named_parameters()]
        return torch.lstm(x[:, None], (state, state), weights, True, 1, 0.0, False, False, False)[0][:, 0]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(x, x)


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer = nn.Conv2d(8, 18, 3), DeformConv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :, None, None].expand(-1, -1, 3, 3)
        return self.layer(image, self.shift(image)).flatten(1)


COMPUTED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 4)), "parametrizations.weight.original1",
        "its weight is computed from 2.parametrizations.weight.original1, 2.parametrizations.weight.original0",
    ),
    "weight_norm of old": (
        lambda: nn.utils.weight_norm(nn.Linear(8, 4)), "weight_v", "its weight is computed from 2.weight_v, 2.weight_g",
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 4)), "parametrizations.weight.original",
        "its weight is computed from 2.parametrizations.weight.original",
    ),
    "a user's": (
        low, "parametrizations.weight.original",
        "its weight is computed from 2.parametrizations.weight.original, 2.parametrizations.weight.0.b, "
        "2.parametrizations.weight.0.a",
    ),
    "a bias": (computed_bias, "weight", "what it adds is computed"),
    "experts": (Experts, "tables", "bmm contracts it, which is not solved"),
    "from the left": (FromLeft, "table", "mm contracts it, which is not solved"),
    "a part": (Split, "table", "its weight is computed from 2.table"),
    "lstm": (Fused, "cells.weight_ih_l0", "mkldnn_rnn_layer contracts it, which is not solved"),
    "bilinear": (Pairs, "pairs.weight", "_trilinear contracts it, which is not solved"),
}  # fmt: skip


def other_inputs(make: Callable[[], nn.Module]) -> tuple[Any, Any, list[Solved]]:
    """A network whose first layer lost weights, repaired, and the weights that its second layer keeps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), make(), nn.Tanh(), nn.Linear(4, 3)).eval()
    masked, x = copied(net), torch.randn(96, 6)
    hold_masks(masked, {"0.weight": torch.rand(8, 6) > 0.6})
    before = copy.deepcopy(masked[2].state_dict())
    done = repair(masked, net, [x]).layers
    after = masked[2].state_dict()
    assert list(before) == list(after)
    return before, after, list(done)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", COMPUTED)
def test_it_keeps_its_weights_and_is_named_where_it_runs(kind: str) -> None:
    make, name, why = COMPUTED[kind]
    before, after, done = other_inputs(make)
    assert [layer.name for layer in done] == ["0.weight", f"2.{name}", "4.weight"]
    assert done[1].reason == f"{why}; it keeps its weights"
    assert (done[0].reason, done[2].reason, done[1].ridge) == (None, None, None)
    assert done[2].after <= done[2].before
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_deformable_convolution_is_named_beside_the_layer_of_its_shifts() -> None:
    _, _, done = other_inputs(Deformed)
    assert [layer.name for layer in done] == ["0.weight", "2.shift.weight", "2.layer.weight", "4.weight"]
    assert done[2].reason == "deform_conv2d contracts it, which is not solved; it keeps its weights"
    assert done[3].reason is None


def test_what_reads_units_by_an_unknown_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the record of operators misses, the axes know who reads the units that went."""
    monkeypatch.setattr("singe_plugin.axes.sources._OTHERS", {})
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Experts()).eval(), torch.randn(64, 6)
    smaller = copy.deepcopy(net)
    SInGEPruner(smaller, x, tp.importance.MagnitudeImportance()).host().remove("0", [1, 4])
    (layer,) = repair(smaller, net, [x]).layers
    assert layer.name == "2.tables"
    assert layer.reason == "it reads units that went, by an operator that is not known here; it keeps its weights"


def test_a_product_of_activations_is_no_layer() -> None:
    _, _, done = other_inputs(Turned)
    assert [(layer.name, layer.reason) for layer in done] == [
        ("0.weight", None),
        ("2.layer.weight", None),
        ("4.weight", None),
    ]


@pytest.mark.parametrize("kind", [ScaledStdConv2d, StdConv2d])
def test_a_standardised_convolution(kind: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), kind(8, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    smaller, x = copy.deepcopy(net), torch.randn(64, 3, 8, 8)
    SInGEPruner(smaller, x[:2], tp.importance.MagnitudeImportance()).host().remove("0", [1, 4])
    done = repair(smaller, net, [x]).layers
    names = "2.weight, 2.gain" if kind is ScaledStdConv2d else "2.weight"
    assert [layer.name for layer in done] == ["2.weight", "4.weight"]
    assert done[0].reason == f"its weight is computed from {names}; it keeps its weights"
    assert done[1].ridge is not None


def test_what_gets_the_same_inputs_is_not_named() -> None:
    """The first layer loses outputs, and a layer beside it nothing."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = (
                nn.Linear(6, 8),
                parametrizations.weight_norm(nn.Linear(6, 4)),
                nn.Linear(8, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.one(x).tanh()) + self.two(x)

    torch.manual_seed(0)
    net, x = Beside().eval(), torch.randn(64, 6)
    smaller = copy.deepcopy(net)
    SInGEPruner(smaller, x, tp.importance.MagnitudeImportance()).host().remove("one", [1, 4])
    assert [layer.name for layer in repair(smaller, net, [x]).layers] == ["last.weight"]


@pytest.mark.parametrize("name", ["test_nfnet", "test_vit", "test_efficientnet"])
def test_no_layer_of_a_network_is_passed_over(name: str) -> None:
    """Every matrix that lost columns, or reads what a later layer gave, is in the result."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=5, **size).eval()
    smaller, x = copy.deepcopy(net), torch.randn(8, 3, 32, 32)
    pace = Pace("layers", verify=False)
    SInGEPruner(smaller, x[:2], tp.importance.MagnitudeImportance(), pruning_ratio=0.4, pace=pace).step()
    done = {layer.name: layer for layer in repair(smaller, net, [x], 8).layers}
    whole = dict(net.named_parameters())
    lost = {n for n, p in smaller.named_parameters() if p.ndim > 1 and p.shape[1] != whole[n].shape[1]}
    assert lost
    assert lost <= done.keys()
    last = [n for n, p in net.named_parameters() if p.ndim > 1][-1]
    assert last in done
    if name == "test_nfnet":
        assert any("is computed from" in (layer.reason or "") for layer in done.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_copy_runs_the_operators_of_the_model(frozen: bool) -> None:
    """``matmul`` multiplies otherwise if the weight wants no gradient, and the copy's never do."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.Linear(6, 16), block, nn.Flatten(), nn.Linear(16 * 5, 3)).eval().requires_grad_(not frozen)
    batches = [(torch.randn(32, 5, 6), torch.arange(32) % 3) for _ in range(3)]
    every = {f"1.{name}.weight" for name in ("self_attn.out_proj", "linear1", "linear2")} | {"3.weight"}
    options: dict[str, Any] = {"scoring": "l1", "finetune": 0, "repair": 96}
    results = [
        prune_weights(copied(net), batches, sparsity=0.5, pace=Pace(rounds=1), **options),
        prune(copied(net), batches, target="params=0.3", **options),
    ]
    for result, expected in zip(results, (every, {"1.linear2.weight", "3.weight"}), strict=True):
        (event,) = result.history.select("repaired")
        assert expected <= event["layers"].keys()
        assert not any(row.get("reason") for row in event["layers"].values())
        assert all(p.requires_grad is not frozen for p in result.model.parameters())
