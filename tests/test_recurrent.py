"""Hidden units of recurrent layers are removed from all gates, directions and layers at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from singe_plugin import Builder, Scoring, load, prune, save
from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups
from singe_plugin.loop.costs import count_macs
from singe_plugin.method.scoring import score_groups

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:dropout option")

Numbers = NDArray[Any]
STEPS, INPUTS, WIDTH, HIDDEN = 4, 3, 5, 6
LENGTHS = [4, 3, 1]


def sigmoid(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))


class Tagger(nn.Module):
    """A linear layer, a recurrent one, and a linear one for every step."""

    def __init__(
        self, kind: str = "LSTM", packed: bool = False, given: bool = False, width: int = WIDTH, hidden: int = HIDDEN,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Linear(INPUTS, width)
        self.cells = getattr(nn, kind)(width, hidden, batch_first=True, **options)
        made = (options.get("proj_size") or hidden) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(made, 2)
        self.packed = packed
        if given:
            self.start = nn.Parameter(torch.randn(1, 1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        y: Any = torch.tanh(self.stem(x))
        state = None
        if hasattr(self, "start"):
            state = self.start.expand(-1, len(x), -1).contiguous()
            state = (state, 2 * state) if isinstance(self.cells, nn.LSTM) else state
        if self.packed:
            lengths = [*LENGTHS, *[1] * len(x)][: len(x)]
            packed, _ = self.cells(pack_padded_sequence(y, torch.tensor(lengths), batch_first=True), state)
            y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        else:
            y, _ = self.cells(y, state)
        made: Tensor = self.head(y)
        return made


def slow_step(
    kind: str, w: dict[str, Numbers], end: str, x: Numbers, h: Numbers, c: Numbers
) -> tuple[Numbers, Numbers]:
    """One step, unit by unit and gate by gate. The state h may be a projection."""
    hidden, new_h, new_c = len(c), np.zeros_like(c), np.zeros_like(c)

    def gate(number: int, unit: int, reset: float | None = None) -> Any:
        row = number * hidden + unit
        one = sum(w[f"weight_ih{end}"][row, j] * x[j] for j in range(len(x)))
        two = sum(w[f"weight_hh{end}"][row, j] * h[j] for j in range(len(h)))
        one += w[f"bias_ih{end}"][row] if f"bias_ih{end}" in w else 0.0
        two += w[f"bias_hh{end}"][row] if f"bias_hh{end}" in w else 0.0
        return one + two if reset is None else one + reset * two

    for unit in range(hidden):
        if kind == "LSTM":
            new_c[unit] = sigmoid(gate(1, unit)) * c[unit] + sigmoid(gate(0, unit)) * np.tanh(gate(2, unit))
            new_h[unit] = sigmoid(gate(3, unit)) * np.tanh(new_c[unit])
        elif kind == "GRU":
            z = sigmoid(gate(1, unit))
            new_h[unit] = (1 - z) * np.tanh(gate(2, unit, sigmoid(gate(0, unit)))) + z * h[unit]
        else:
            new_h[unit] = np.tanh(gate(0, unit))
    if f"weight_hr{end}" in w:
        new_h = w[f"weight_hr{end}"] @ new_h
    return new_h, new_c


def slow(net: Tagger, kind: str, x: Tensor, w: dict[str, Numbers], hidden: int) -> Numbers:
    """The whole network of plain numbers, example by example."""
    cells, found = net.cells, []
    for n, example in enumerate(x.numpy()):
        steps = LENGTHS[n] if net.packed else len(example)
        y = [np.tanh(w["stem.weight"] @ step + w["stem.bias"]) for step in example[:steps]]
        for layer in range(cells.num_layers):
            made: list[Any] = []
            for turn in ("", "_reverse") if cells.bidirectional else ("",):
                mine = {k.removeprefix("cells."): v for k, v in w.items() if k.startswith("cells.")}
                end = f"_l{layer}{turn}"
                wide = len(mine[f"weight_hr{end}"]) if f"weight_hr{end}" in mine else hidden
                h, c = np.zeros(wide), np.zeros(hidden)
                if "start" in w:
                    h, c = w["start"][0, 0], 2 * w["start"][0, 0]
                out: list[Any] = [None] * steps
                for t in range(steps)[::-1] if turn else range(steps):
                    h, c = out[t], _ = slow_step(kind, mine, end, y[t], h, c)
                made.append(out)
            y = [np.concatenate(parts) for parts in zip(*made, strict=True)]
        y += [np.zeros_like(y[0])] * (len(example) - steps)
        found.append([w["head.weight"] @ step + w["head.bias"] for step in y])
    return np.array(found)


def without(net: Tagger, kind: str, units: list[int], inputs: list[int]) -> dict[str, Numbers]:
    """The weights without some hidden units and some units of the stem, each by its name."""
    cells, gates, found = net.cells, {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], {}
    hidden, turns = cells.hidden_size, 2 if cells.bidirectional else 1
    rows = [gate * hidden + unit for gate in range(gates) for unit in units]
    outputs = [turn * hidden + unit for turn in range(turns) for unit in units]
    projected = bool(getattr(cells, "proj_size", 0))
    for name, tensor in net.state_dict().items():
        value, attr = tensor.numpy().copy(), name.removeprefix("cells.")
        if name.startswith("stem."):
            value = np.delete(value, inputs, 0)
        elif name == "start":
            value = np.delete(value, units, 2)
        elif name == "head.weight" and not projected:
            value = np.delete(value, outputs, 1)
        elif attr.startswith("weight_hr"):
            value = np.delete(value, units, 1)
        elif name.startswith("cells."):
            value = np.delete(value, rows, 0)
            if attr.startswith("weight_hh") and not projected:
                value = np.delete(value, units, 1)
            elif attr.startswith("weight_ih_l0"):
                value = np.delete(value, inputs, 1)
            elif attr.startswith("weight_ih") and not projected:
                value = np.delete(value, outputs, 1)
        found[name] = value
    return found


FORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "no bias": {"bias": False}, "both ways": {"bidirectional": True}, "given": {"given": True},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "packed": {"packed": True, "bidirectional": True},
}  # fmt: skip
CASES = [(kind, form, FORMS[form]) for kind in ("LSTM", "GRU", "RNN") for form in FORMS]
CASES += [("LSTM", "projected", {"proj_size": 2, "num_layers": 2, "bidirectional": True})]


@pytest.mark.parametrize(("kind", "form", "options"), CASES, ids=lambda c: c if isinstance(c, str) else "")
def test_removed_units_leave_what_the_loop_over_gates_computes(kind: str, form: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = Tagger(kind, **options).double().eval()
    x = torch.randn(3, STEPS, INPUTS, dtype=torch.float64)
    whole = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    np.testing.assert_allclose(net(x).detach().numpy(), slow(net, kind, x, whole, HIDDEN), atol=1e-12)
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    names = {"stem", "cells", "cells#2"} if form == "projected" else {"stem", "cells"}
    assert (set(graph.groups), list(graph.left_whole)) == (names, ["head"])
    name = next(n for n, group in graph.groups.items() if n != "stem" and group.size == HIDDEN)
    expected = without(net, kind, [1, 4, 5], [0, 3])
    held = list(net.parameters())
    remove_units(graph, graph.groups[name], [4, 1])
    remove_units(graph, graph.groups["stem"], [0, 3])
    remove_units(graph, graph.groups[name], [HIDDEN - 3])  # the last of those that are left
    for key, tensor in net.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[key])
    np.testing.assert_allclose(net(x).detach().numpy(), slow(net, kind, x, expected, HIDDEN - 3), atol=1e-12)
    assert (net.cells.hidden_size, net.cells.input_size) == (HIDDEN - 3, WIDTH - 2)
    assert all(one is other for one, other in zip(net.parameters(), held, strict=True))
    assert all(any(w is p for p in net.cells.parameters()) for w in net.cells._flat_weights)


def test_units_of_a_projection_go_and_one_more_hidden_unit_than_those_stays() -> None:
    net = Tagger("LSTM", proj_size=3, num_layers=2).double().eval()
    x = torch.randn(2, STEPS, INPUTS, dtype=torch.float64)
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    hidden, projected = (next(g for n, g in graph.groups.items() if n != "stem" and g.size == s) for s in (HIDDEN, 3))
    assert (hidden.least, projected.least) == (4, 1)
    whole = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    remove_units(graph, projected, [1])
    for end in ("_l0", "_l1"):
        whole[f"cells.weight_hr{end}"] = np.delete(whole[f"cells.weight_hr{end}"], 1, 0)
        whole[f"cells.weight_hh{end}"] = np.delete(whole[f"cells.weight_hh{end}"], 1, 1)
    for name in ("cells.weight_ih_l1", "head.weight"):
        whole[name] = np.delete(whole[name], 1, 1)
    np.testing.assert_allclose(net(x).detach().numpy(), slow(net, "LSTM", x, whole, HIDDEN), atol=1e-12)
    assert (net.cells.hidden_size, net.cells.proj_size) == (HIDDEN, 2)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_rows_at_the_end_of_the_path_are_removed_units(kind: str) -> None:
    """All gates of a unit at zero: with a state that begins at zero, the unit is zero at every step."""
    torch.manual_seed(1)
    net = Tagger(kind, num_layers=2, bidirectional=True).double().eval()
    x = torch.randn(3, STEPS, INPUTS, dtype=torch.float64)
    graph = AxisGraph(net, x)
    ended, (producer,) = copy.deepcopy(net), graph.groups["cells"].unit_group().producers
    rows = producer.rows[torch.isin(producer.units, torch.tensor([0, 2]))]
    assert len(rows) == 2 * {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    for slot in producer.slots:
        assert (slot.layout.dim, slot.owner) == (0, net.cells)
        getattr(ended.cells, slot.attr).data[rows] = 0.0
    assert {slot.attr for slot in producer.slots} == set(dict(net.cells.named_parameters()))
    remove_units(graph, graph.groups["cells"], [0, 2])
    torch.testing.assert_close(net(x), ended(x), rtol=1e-12, atol=1e-12)


def test_scores_are_of_the_rows_of_all_gates() -> None:
    torch.manual_seed(1)
    net, x = Tagger("GRU", bidirectional=True).eval(), torch.randn(3, STEPS, INPUTS)
    group = AxisGraph(net, x).groups["cells"].unit_group()
    options = Scoring(criterion="norm_grad", p=2.0, normalizer=None, objective=lambda y, _: y.square().mean())
    found = score_groups(net, {"cells": group}, [(x, torch.zeros(3, dtype=torch.int64))], options)["cells"]
    net(x).square().mean().backward()
    expected = np.ones(HIDDEN)
    for read in (lambda p: p, lambda p: p.grad):
        rows = [read(p).detach().numpy().reshape(3, HIDDEN, -1) for p in net.cells.parameters()]
        expected *= [sum((matrix[:, unit] ** 2).sum() for matrix in rows) ** 0.5 for unit in range(HIDDEN)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("steps", [1, 3])
def test_cells_lose_units(cell: Any, steps: int) -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cell, self.head = nn.Linear(INPUTS, WIDTH), cell(WIDTH, HIDDEN), nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in self.stem(x)[:, :steps].unbind(1):
                state = self.cell(step, state)
            found: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
            return found

    torch.manual_seed(1)
    net, x = Unrolled().double().eval(), torch.randn(2, STEPS, INPUTS, dtype=torch.float64)
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    assert list(graph.groups) == ["stem", "cell"]
    w = {name.replace("cell.", ""): p.detach().numpy().copy() for name, p in net.named_parameters()}
    gates = len(w["bias_ih"]) // HIDDEN
    rows = [gate * HIDDEN + unit for gate in range(gates) for unit in (0, 4)]
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        w[name] = np.delete(w[name], rows, 0)
    w["weight_hh"], w["head.weight"] = np.delete(w["weight_hh"], [0, 4], 1), np.delete(w["head.weight"], [0, 4], 1)
    expected = []
    for example in x.numpy():
        h, c = np.zeros(HIDDEN - 2), np.zeros(HIDDEN - 2)
        for step in example[:steps]:
            y = w["stem.weight"] @ step + w["stem.bias"]
            h, c = slow_step({4: "LSTM", 3: "GRU", 1: "RNN"}[gates], w, "", y, h, c)
        expected.append(w["head.weight"] @ h + w["head.bias"])
    remove_units(graph, graph.groups["cell"], [0, 4])
    np.testing.assert_allclose(net(x).detach().numpy(), np.array(expected), atol=1e-12)
    assert (net.cell.hidden_size, net.cell.input_size) == (HIDDEN - 2, WIDTH)


class Applied(nn.Module):
    """Layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def test_a_state_that_comes_from_outside_keeps_the_units() -> None:
    net = Applied(lambda m, x, h: m.head(m.cells(x, h)[0]), cells=nn.GRU(3, 6), head=nn.Linear(6, 2))
    graph = AxisGraph(net, (torch.randn(4, 2, 3), torch.randn(1, 2, 6)))
    assert not graph.groups
    assert graph.left_whole["cells"] == "it is a dimension of the model's input"


def test_an_encoder_and_a_decoder_that_hand_a_state_on_lose_the_same_units() -> None:
    net = Applied(
        lambda m, x, y: m.head(m.decoder(m.table(y), m.encoder(m.stem(x))[1])[0]), stem=nn.Linear(3, 5),
        encoder=nn.LSTM(5, 6, 2), decoder=nn.LSTM(4, 6, 2), table=nn.Embedding(9, 4), head=nn.Linear(6, 2),
    )  # fmt: skip
    inputs = (torch.randn(4, 2, 3), torch.randint(0, 9, (3, 2)))
    graph = AxisGraph(net, inputs)
    assert verify_groups(graph) == {}
    assert set(graph.groups["encoder"].writers) == {"encoder", "decoder"}
    remove_units(graph, graph.groups["encoder"], [1, 2])
    assert net.encoder.hidden_size == net.decoder.hidden_size == 4
    assert net(*inputs).shape == (3, 2, 2)


def test_a_packed_sequence_is_one_input() -> None:
    net = Applied(
        lambda m, x: m.head(pad_packed_sequence(m.cells(x)[0])[0]), cells=nn.GRU(3, 6, bidirectional=True),
        head=nn.Linear(12, 2),
    )  # fmt: skip
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    graph = AxisGraph(net, packed)
    assert verify_groups(graph) == {}
    remove_units(graph, graph.groups["cells"], [0, 3])
    assert net(packed).shape == (4, 2, 2)


def test_macs_are_those_of_the_matrices_at_every_step() -> None:
    net = Tagger("LSTM", num_layers=2, bidirectional=True)
    per_step = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert count_macs(net, torch.zeros(2, STEPS, INPUTS)) == 2 * STEPS * per_step


def test_pruned_saved_loaded_and_pruned_again(tmp_path: Any) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"kind": "LSTM", "width": 12, "hidden": 16, "num_layers": 2, "bidirectional": True}
    net = Tagger(**options)
    data = [(torch.randn(4, STEPS, INPUTS), torch.randn(4, STEPS, 2)) for _ in range(2)]
    scoring = Scoring(criterion="ig_abs", objective=lambda y, t: (y - t).square().mean())
    result = prune(net, data, target="macs=0.5", scoring=scoring, repair=None)
    x = data[0][0]
    assert abs(result.after.macs / result.before.macs - 0.5) < 0.02
    assert result.after.macs == count_macs(net, x[:1])
    twin = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(twin(x), net(x))
    save(result, tmp_path / "pruned", builder=Builder("factory", f"{__name__}:Tagger", options))
    loaded = load(tmp_path / "pruned", trust=True).model
    torch.testing.assert_close(loaded(x), net.eval()(x))
    assert loaded.cells.hidden_size == net.cells.hidden_size
    optimizer = torch.optim.Adam(net.parameters())
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()
    width = net.cells.hidden_size
    graph = AxisGraph(net, x)
    remove_units(graph, graph.groups["cells"], [0], Trackers([optimizer]))
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in net.parameters())
    prune(net, data, target="macs=0.2", scoring=scoring, repair=None)
    assert net.cells.hidden_size < width


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_recurrent_weights_that_are_computed_follow(norm: Callable[..., nn.Module]) -> None:
    net = Tagger("GRU", bidirectional=True).double().eval()
    net.cells = norm(norm(net.cells, "weight_hh_l0"), "weight_ih_l0_reverse")
    x = torch.randn(2, STEPS, INPUTS, dtype=torch.float64)
    plain = Tagger("GRU", bidirectional=True).double().eval()
    with torch.no_grad():
        for name in dict(plain.named_parameters()):
            owner, attr = name.split(".")
            getattr(getattr(plain, owner), attr).copy_(getattr(getattr(net, owner), attr))
    expected = without(plain, "GRU", [0, 4], [1])
    graph = AxisGraph(net, x)
    assert verify_groups(graph) == {}
    remove_units(graph, graph.groups["cells"], [4, 0])
    remove_units(graph, graph.groups["stem"], [1])
    np.testing.assert_allclose(net(x).detach().numpy(), slow(net, "GRU", x, expected, HIDDEN - 2), atol=1e-12)
    assert (net.cells.hidden_size, net.cells.input_size) == (HIDDEN - 2, WIDTH - 1)
