"""A pass that is played from a record computes what a whole pass computes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from singe_plugin.axes.contractions import Contraction
from singe_plugin.axes.rows import inputs_at, matrix_of, positions_of, results_at, weights_of
from singe_plugin.axes.tape import Playback, Strayed, Tape
from singe_plugin.nested import call_model, map_tensors, tensors_in
from singe_plugin.state import RngState, plain_layers, preserved

from strangers import stranger


def played(net: nn.Module, inputs: Any, tape: Tape, **options: Any) -> tuple[list[Tensor], Playback, int]:
    """Outputs, the playback, and how many contractions ran."""
    seen: list[Contraction] = []
    state, given = RngState.capture(), map_tensors(torch.clone, inputs)
    with torch.no_grad(), Playback(net, tape, seen.append, **options) as run:
        out = call_model(net, given)
    state.restore()
    return [t.clone() for t in tensors_in(out)], run, len(seen)


def check(net: nn.Module, inputs: Any, starts: int, seed: int) -> int:
    """Play from some operators; how many contractions that saved."""
    saved = 0
    with preserved(net), plain_layers(net), torch.no_grad():
        net.eval()
        tape = Tape.of(net, map_tensors(torch.clone, inputs))
        if tape.why_not is not None:
            return 0
        whole, _, runs = played(net, inputs, tape)
        assert runs == len(tape.sites)
        kept, start = {}, 0
        for keep in sorted(random.Random(seed).choices(range(1, len(tape.steps)), k=starts)):
            first, run, _ = played(net, inputs, tape, start=start, kept=kept, keep=keep)
            assert all(torch.equal(a, b) for a, b in zip(first, whole, strict=True))
            if run.kept:
                kept, start = run.kept, keep
                try:
                    again, _, mine = played(net, inputs, tape, start=start, kept=kept)
                except Strayed:  # some operators come and go with how a tensor lies in memory: it is noticed in time
                    return saved
                assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
                saved += runs - mine
    return saved


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:LSTM with projections")
def test_strangers_are_the_same_from_anywhere() -> None:
    assert sum(check(net.model, net.inputs, 3, seed) for seed, net in ((s, stranger(s)) for s in range(60))) > 60


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_maxvit"])
def test_timms_networks_are_the_same_from_anywhere(name: str) -> None:
    torch.manual_seed(0)
    assert check(timm.create_model(name), torch.randn(2, 3, 160, 160), 4, 0) > 0


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.drawn = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.zeros(2, 4))
        self.function = function
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self, x)
        return out


def in_view(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    x[:, :2] = 0
    return m.b(x) + x


def entangled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    part, y = x[:, :2], m.b(x)
    part.add_(1)
    return y + x


SAME: dict[str, Any] = {
    "in place": lambda m, x: m.b(torch.relu_(m.a(x))) + x,
    "in a view": in_view,
    "entangled": entangled,
    "added in place": lambda m, x: m.b(m.a(x)).add_(x),
}
OTHERS: dict[str, tuple[Any, str]] = {
    "values": (lambda m, x: m.b(m.a(x)) if float(m.a(x).sum()) > 1e9 else m.a(x), "depends on values"),
    "random": (lambda m, x: m.b(m.a(x) + torch.rand(4)), "depends on values"),
    "a buffer": (lambda m, x: m.b(m.a(x)) + m.count.add_(1), "outlives the pass"),
    "any size": (lambda m, x: m.b(m.a(x)[m.a(x).sum(1) > -1e9]), "depends on values"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_written_in_place_is_right(name: str) -> None:
    torch.manual_seed(0)
    for seed in range(8):
        check(Net(SAME[name]), torch.randn(3, 4), 3, seed)


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_from_pass_to_pass_is_not_played(name: str) -> None:
    function, why = OTHERS[name]
    with torch.no_grad():
        assert why in str(Tape.of(Net(function), torch.randn(3, 4)).why_not)


def names(found: Iterable[Any]) -> list[str | None]:
    return [site[0] for site in found]


def test_who_contracts_what_and_where_results_are_added() -> None:
    with torch.no_grad():
        tape = Tape.of(Net(lambda m, x: m.b(m.a(x) @ m.b.weight) + x @ m.drawn.t() @ m.drawn), torch.randn(3, 4))
        assert names(tape.sites) == ["a.weight", "b.weight", "b.weight", "drawn", "drawn"]
        assert [site[2] for site in tape.sites] == [1, 0, 1, 1, 0]
        assert tape.depends[2] == {0, 1}
        assert set(tape.sums) == {4}  # the sum is the last one's to make up
        sums = {
            "added": lambda m, x: m.b(torch.relu(m.a(x))) + x,
            "used besides": lambda m, x: (y := m.b(x)) + m.a(y),
            "behind something": lambda m, x: torch.relu(m.b(m.a(x))) + x,
            "with another factor": lambda m, x: torch.add(m.b(m.a(x)), x, alpha=2),
        }
        found = {name: set(Tape.of(Net(function), torch.randn(3, 4)).sums) for name, function in sums.items()}
    assert found == {"added": {1}, "used besides": {1}, "behind something": set(), "with another factor": set()}


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), (2, 1)), (2, 4, 8, 7)),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 3, 4)),
    (nn.ConvTranspose1d(4, 3, 4, 3, 1, dilation=2), (2, 4, 5)),
    (nn.Linear(4, 3), (2, 5, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_rows_times_weights_are_the_results(layer: Any, shape: tuple[int, ...]) -> None:
    layer, x = layer.double(), torch.randn(shape).double()

    def see(found: Contraction) -> None:
        count = positions_of(found)
        chosen = torch.randperm(count)[: count // 2 + 1].sort().values
        rows, matrix = inputs_at(found, layer.weight.shape[2:], chosen), matrix_of(found, layer.weight)
        made = (rows @ matrix.transpose(1, 2)).transpose(0, 1).flatten(1) + layer.bias
        torch.testing.assert_close(made, results_at(found, found.out, chosen))
        assert torch.equal(weights_of(found, matrix, layer.weight.shape), layer.weight)

    with torch.no_grad(), Playback(layer, Tape.of(layer, x), see):
        layer(x)
