"""Rows and units against plain indices, ties between parameters, and slots that are no plain parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from singe_plugin.errors import GroupError, TiedParameterError
from singe_plugin.method.units import Producer, RowLayout, Slot, UnitGroup, refuse_tied, tied_parameters

from references import row_index


@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((5, 3), 0), ((4, 5, 3), 0), ((3, 5), 1), ((2, 5, 3, 3), 1), ((1, 4, 6), 2)]
)
def test_rows_along_a_dimension(shape: tuple[int, ...], dim: int) -> None:
    tensor, layout = torch.randn(shape), RowLayout(dim)
    assert layout.count(tensor) == shape[dim]
    factors = torch.randn(shape[dim])
    scaled = tensor * layout.spread(factors, tensor)
    for row in range(shape[dim]):
        index = (slice(None),) * dim + (row,)
        assert layout.rows(tensor)[row].tolist() == tensor[index].flatten().tolist()
        torch.testing.assert_close(scaled[index], tensor[index] * factors[row])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_transposed_convolutions(groups: int) -> None:
    layer = nn.ConvTranspose2d(8, 12, 3, groups=groups)
    layout = RowLayout(dim=1, groups=groups)
    weight, factors = layer.weight.detach(), torch.randn(12)
    assert layout.count(weight) == 12
    scaled = weight * layout.spread(factors, weight)
    for row in range(12):
        index = row_index(layer, row)
        assert layout.rows(weight)[row].tolist() == weight[index].flatten().tolist()
        torch.testing.assert_close(scaled[index], weight[index] * factors[row])


def test_a_row_of_a_grouped_transposed_convolution_makes_one_channel() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    x = torch.randn(1, 4, 5)
    before = layer(x)
    for row in range(6):
        factors = torch.ones(6)
        factors[row] = 0
        weight = layer.weight * RowLayout(1, 2).spread(factors, layer.weight)
        after = nn.functional.conv_transpose1d(x, weight, layer.bias, groups=2)
        changed = (after - before).abs().sum((0, 2)) > 1e-6
        assert changed.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_rows_that_repeat_in_blocks(shape: tuple[int, ...]) -> None:
    tensor, layout = torch.randn(shape), RowLayout(blocks=3)
    assert layout.count(tensor) == 2
    factors = torch.randn(2)
    scaled = tensor * layout.spread(factors, tensor)
    for row in range(2):
        parts = [tensor[row + 2 * block].flatten() for block in range(3)]
        assert layout.rows(tensor)[row].tolist() == torch.cat(parts).tolist()
        for block in range(3):
            torch.testing.assert_close(scaled[row + 2 * block], tensor[row + 2 * block] * factors[row])


def test_the_unit_of_each_row() -> None:
    layer = nn.Conv2d(1, 6, 1)
    producer = Producer("conv", (Slot(layer, "weight"),), torch.tensor([4, 1, 3]), torch.tensor([0, 0, 1]))
    assert producer.unit_of_row().tolist() == [-1, 0, -1, 1, 0, -1]


def test_the_unit_of_each_row_of_a_layer_without_a_weight() -> None:
    norm = nn.BatchNorm2d(5, affine=False)
    slots = (Slot(norm, "weight"), Slot(norm, "bias"))
    producer = Producer("bn", slots, torch.tensor([1, 2]), torch.tensor([0, 1]), is_norm=True)
    assert producer.unit_of_row().tolist() == [-1, 0, 1, -1, -1]


def test_slots_follow_the_parameter_that_is_there_now() -> None:
    layer = nn.Linear(2, 3, bias=False)
    weight, bias = Slot(layer, "weight"), Slot(layer, "bias")
    assert bias.tensor is None
    layer.weight = nn.Parameter(torch.zeros(1, 2))
    assert weight.tensor is layer.weight
    group = UnitGroup("fc", 3, (Producer("fc", (weight, bias), torch.arange(3), torch.arange(3)),))
    assert list(group.slots()) == [weight, bias]


def test_a_computed_weight_is_what_comes_out() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 3))
    weight = Slot(layer, "weight")
    assert weight.tensor is not None
    torch.testing.assert_close(weight.tensor, layer.weight.detach())
    assert weight.parameters() == list(layer.parametrizations.parameters())


def test_a_tensor_that_is_no_parameter_is_no_slot() -> None:
    layer = nn.Linear(2, 3)
    del layer.weight
    layer.weight = torch.ones(3, 2)
    with pytest.raises(GroupError, match=r"Linear.weight is no parameter.*remove_parametrizations"):
        _ = Slot(layer, "weight").tensor


def test_ties() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert tied_parameters(model) == {}
    model.append(model[0])  # the same module twice has one weight, in one place
    assert tied_parameters(model) == {}
    model[2].weight, model[1].bias = model[0].weight, model[0].bias
    model.own = model[0].bias
    assert sorted(tied_parameters(model).values()) == [("0.weight", "2.weight"), ("own", "0.bias", "1.bias")]

    rows = torch.arange(2)
    group = UnitGroup("1", 2, (Producer("1", (Slot(model[1], "weight"), Slot(model[1], "bias")), rows, rows),))
    with pytest.raises(TiedParameterError, match=r"group '1': the parameters 'own' and '0.bias' and '1.bias'.*untie"):
        refuse_tied(group, tied_parameters(model))
    refuse_tied(group, {})
