"""Zeros that are true, zeros that are wrong, and questions that are none: what is ranked and trained by gradients.

The truth about a layer is taken from the model itself, without this package: F with its rows, and F with zeros there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import FineTune, Pace, prune, prune_weights
from singe_plugin.errors import DataError, ScoringError, SingeError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.events import Callback
from singe_plugin.loop.tuner import Tuner
from singe_plugin.masks import hold_masks
from singe_plugin.method.dependence import depends_on
from singe_plugin.method.objective import cross_entropy
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.method.units import Producer, Slot, UnitGroup

from asked import asked
from references import Net
from small_nets import StopAt, Trace, mlp, vectors

DATA = vectors(2)
X, Y = DATA[0]
FAST: dict[str, Any] = {"target": "params=0.5", "verify": False, "finetune_steps": 4, "nodes": 2}


# --- a layer whose scores are all zero ---------------------------------------------------------------------------


def group_of(layer: nn.Linear) -> UnitGroup:
    rows = torch.arange(layer.out_features)
    slots = (Slot(layer, "weight"), Slot(layer, "bias"))
    return UnitGroup("side", len(rows), (Producer("side", slots, rows, rows),))


def branched(through: Callable[[Any, Tensor], Tensor], **parts: Any) -> Any:
    """A main path, and a branch through ``side`` whose values go ``through`` something on their way to the sum."""
    torch.manual_seed(3)
    layers = {"main": nn.Linear(4, 6), "side": nn.Linear(4, 6), "head": nn.Linear(6, 3), **parts}
    return Net(lambda m, x: m.head(m.main(x) + through(m, m.side(x))), **layers)


def dead(m: Any, z: Tensor) -> Tensor:
    return torch.relu(z - 1e4)


def norm_of_zero() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(6)
    nn.init.zeros_(norm.weight)
    return norm


def low_rank() -> nn.Linear:
    layer = nn.Linear(6, 6, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


TRUE_ZEROS: dict[str, Callable[[], Any]] = {
    "a residual scale of zero": lambda: branched(lambda m, z: m.scale * z, scale=nn.Parameter(torch.zeros(()))),
    "a batch-norm of zero": lambda: branched(lambda m, z: m.norm(z), norm=norm_of_zero()),
    "a low-rank update of zero": lambda: branched(lambda m, z: m.up(z), up=low_rank()),
    "all units dead": lambda: _deadened(branched(lambda m, z: torch.relu(z))),
    "all units saturated at zero": lambda: _deadened(branched(lambda m, z: functional.hardswish(z))),
}
FALSE_ZEROS: dict[str, Callable[[], Any]] = {
    "round": lambda: branched(lambda m, z: torch.round(z * 8)),
    "sign": lambda: branched(lambda m, z: torch.sign(z)),
    "floor": lambda: branched(lambda m, z: torch.floor(z * 8)),
    "a comparison, kept in the graph": lambda: branched(lambda m, z: (z > 0).to(z.dtype) + z * 0),
    "one-hot of the largest": lambda: branched(
        lambda m, z: functional.one_hot((z + m.shift).argmax(1), 6) + z * 0, shift=nn.Parameter(torch.arange(6.0) / 4)
    ),
    "saturated at one": lambda: branched(lambda m, z: functional.hardtanh(z * 1e5)),
}
NO_QUESTION: dict[str, Callable[[], Any]] = {
    "times zero": lambda: branched(lambda m, z: z * 0.0),
    "its own difference": lambda: branched(lambda m, z: z - z),
    "an empty slice": lambda: branched(lambda m, z: z[:, :0].sum()),
    "under a maximum": lambda: branched(lambda m, z: torch.maximum(torch.tanh(z), torch.full_like(z, 2.0))),
}


def _deadened(net: Any) -> Any:
    nn.init.constant_(net.side.bias, -1e3)
    return net


def changes(net: Any) -> float:
    """How much F changes on the batches when the rows of ``side`` are zero."""
    removed = copy.deepcopy(net).eval()
    nn.init.zeros_(removed.side.weight)
    nn.init.zeros_(removed.side.bias)
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        return max(
            abs(float(functional.cross_entropy(net(x), y) - functional.cross_entropy(removed(x), y))) for x, y in DATA
        )


@pytest.mark.parametrize("path", ["layer", "neuron"])
@pytest.mark.parametrize("name", TRUE_ZEROS)
def test_a_layer_that_nothing_gets_through_scores_zero(name: str, path: str) -> None:
    net = TRUE_ZEROS[name]()
    assert changes(net) == 0.0
    trace = Trace(net)
    # batch-norm in front of a sum: vmap has no rule for it in every version
    scores = score_units(net, group_of(net.side), DATA, Scoring(path=path, unit_batch=1))
    assert scores.tolist() == [0.0] * 6
    trace.assert_unchanged()


@pytest.mark.parametrize("path", ["layer", "neuron"])
@pytest.mark.parametrize("name", FALSE_ZEROS)
def test_a_gradient_that_does_not_see_the_change_is_refused(name: str, path: str) -> None:
    net = FALSE_ZEROS[name]()
    assert changes(net) > 1e-4
    trace = Trace(net)
    with pytest.raises(
        ScoringError, match=r"'side': its scores are all zero, but F goes from .* use the objective 'logit'"
    ):
        score_units(net, group_of(net.side), DATA, Scoring(criterion="norm_grad", path=path, unit_batch=1))
    trace.assert_unchanged()


@pytest.mark.parametrize("path", ["layer", "neuron"])
@pytest.mark.parametrize("name", NO_QUESTION)
def test_a_layer_that_f_cannot_depend_on_is_refused(name: str, path: str) -> None:
    net = NO_QUESTION[name]()
    trace = Trace(net)
    with pytest.raises(ScoringError, match=r"'side': F does not depend on it.*ignored_layers"):
        score_units(net, group_of(net.side), DATA, Scoring(path=path, unit_batch=1))
    trace.assert_unchanged()


def test_outputs_so_sure_that_the_gradient_underflows() -> None:
    net = Net(lambda m, x: m.head(m.fc(x)) * 1e6, fc=nn.Linear(4, 5, bias=False), head=nn.Linear(5, 3, bias=False))
    rows = torch.arange(5)
    group = UnitGroup("fc", 5, (Producer("fc", (Slot(net.fc, "weight"),), rows, rows),))
    sure = [(x, net(x).argmax(1)) for x, _ in DATA]
    with pytest.raises(ScoringError, match=r"F goes from 0 to 1\.09861 on batch 0.*the objective 'logit'"):
        score_units(net, group, sure)
    assert float(score_units(net, group, sure, Scoring(objective="logit")).min()) > 0


def test_zero_weights_and_some_dead_units_are_scores_like_any_other() -> None:
    net = branched(lambda m, z: torch.relu(z))
    nn.init.constant_(net.side.bias[:2], -1e3)
    scores = score_units(net, group_of(net.side), DATA)
    assert (scores[:2] == 0).all()
    assert (scores[2:] > 0).any()
    for parameter in net.side.parameters():
        nn.init.zeros_(parameter)
    assert score_units(net, group_of(net.side), DATA).tolist() == [0.0] * 6


def test_a_layer_without_a_gradient_on_one_batch_only() -> None:
    net = branched(lambda m, z: torch.relu(z))
    nn.init.constant_(net.side.bias, -100)
    far = (X * 1e3, Y)
    scores = score_units(net, group_of(net.side), [(X * 0, Y), far])
    assert float(scores.max()) > 0


def test_what_f_depends_on_is_found_by_name() -> None:
    net = Net(lambda m, x: (m.a(m.stem(x)), m.b(m.stem(x))), stem=nn.Linear(4, 4), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    found = depends_on(net, lambda call: functional.cross_entropy(call(X)[0], Y))
    assert found == {"stem.weight", "stem.bias", "a.weight", "a.bias"}


# --- in front of a whole run -------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Two heads on one trunk, each with a hidden layer; what a callable reads decides what F depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 16)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out_one, self.out_two = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.trunk(x))
        return self.out_one(torch.relu(self.one(x))), self.out_two(torch.relu(self.two(x)))


def first(outputs: Any, targets: Any) -> Tensor:
    return cross_entropy(outputs[0], targets)


class Nothing(Callback):
    """Nothing may be pruned."""

    def on_removed(self, event: Any) -> None:
        raise AssertionError(f"{event.layer} was pruned")


ORDERS: dict[str, dict[str, Any]] = {"rounds": {}, "layers": {"units_per_step": "layer"}}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight", [0.0, None])
def test_a_head_that_the_objective_leaves_out(weight: float | None, order: str) -> None:
    def objective(outputs: Any, targets: Any) -> Tensor:
        left_out = 0.0 if weight is None else weight * outputs[1].sum()
        return first(outputs, targets) + left_out

    model = Twice()
    trace = Trace(model)
    with pytest.raises(ScoringError, match=r"'two': F does not depend on it.*ignored_layers"):
        prune(model, DATA, **asked(objective=objective, callbacks=[Nothing()], **FAST, **ORDERS[order]))
    trace.assert_unchanged()
    result = prune(
        model,
        DATA,
        **asked(objective=objective, ignored_layers=["two"], **{**FAST, "target": "params=0.3"}, **ORDERS[order]),
    )
    assert model.two.out_features == 16
    assert result.removed_params == pytest.approx(0.3, abs=0.01)


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def detached() -> nn.Module:
    return Net(lambda m, x: m.net(x).detach(), net=mlp())


def with_targets(make: Callable[[Tensor], Any]) -> list[Any]:
    return [(x, make(y)) for x, y in DATA]


MEAN = {"objective": lambda z, y: z.square().mean()}


def headless() -> nn.Module:
    model = mlp()
    model.num_classes = 0  # timm's word for a model without a classifier
    return model


CONSTANT: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "one output and classes": (one_output, with_targets(torch.zeros_like), {}, "has one output.*mse_loss"),
    "one output and probabilities": (
        one_output, with_targets(lambda y: torch.ones(len(y), 1)), {}, "has one output.*binary_cross_entropy"
    ),
    "one output and numbers": (one_output, with_targets(lambda y: y.float()), {}, "has one output.*mse_loss"),
    "numbers instead of classes": (mlp, with_targets(lambda y: y.float()), {}, r"float32 of shape \(8,\).*\.long\(\)"),
    "numbers instead of probabilities": (
        mlp, with_targets(lambda y: torch.randn(len(y), 3)), {}, "negative or do not add up to 1.*mse_loss"
    ),
    "several labels": (
        mlp, with_targets(lambda y: torch.ones(len(y), 3)), {}, "do not add up to 1.*binary_cross_entropy_with_logits"
    ),
    "features": (headless, DATA, {}, "num_classes=0.*features"),
    "a dimension too few": (
        lambda: nn.Sequential(one_output(), nn.Flatten(0)), with_targets(lambda y: y.float()), {}, "needs logits.*mse"
    ),
    "all ignored": (mlp, with_targets(lambda y: torch.full_like(y, -100)), {}, "every target of the batch is -100"),
    "a constant": (mlp, DATA, {"objective": lambda z, y: torch.zeros(())}, "does not depend.*objective"),
    "a constant with a graph": (mlp, DATA, {"objective": lambda z, y: z.sum() * 0}, "does not depend.*objective"),
    "the accuracy": (
        mlp, DATA, {"objective": lambda z, y: (z.argmax(1) == y).float().mean()}, "does not depend.*objective"
    ),
    "a rounded output": (mlp, DATA, {"objective": lambda z, y: (z * 0 + z.round()).mean()}, "(?s)gradient|depend"),
    "a detached output": (detached, DATA, {}, "does not depend"),
    "features of its own objective": (detached, DATA, MEAN, "does not depend"),
}  # fmt: skip


ENTRIES: dict[str, Callable[..., Any]] = {
    "rounds": lambda m, d, **o: prune(m, d, **asked(callbacks=[Nothing()], **FAST, **o)),
    "layers": lambda m, d, **o: prune(m, d, **asked(callbacks=[Nothing()], units_per_step="layer", **FAST, **o)),
    "taylor": lambda m, d, **o: prune(
        m, d, **asked(callbacks=[Nothing()], criterion=tp.importance.GroupTaylorImportance(), **FAST, **o)
    ),
    "magnitude": lambda m, d, **o: prune(m, d, **asked(callbacks=[Nothing()], criterion="l2", **FAST, **o)),
    "weights in rounds": lambda m, d, **o: prune_weights(
        m, d, **asked(rounds=2, finetune_steps=4, callbacks=[Nothing()], **o)
    ),
    "weights in layers": lambda m, d, **o: prune_weights(
        m, d, **asked(units_per_step="layer", finetune_steps=4, callbacks=[Nothing()], **o)
    ),
    "weights by magnitude": lambda m, d, **o: prune_weights(
        m, d, **asked(criterion="l1", rounds=2, finetune_steps=4, callbacks=[Nothing()], **o)
    ),
    "importance": lambda m, d, objective="loss": SInGEPruner(
        m, X, SInGEImportance(objective=objective).bind(m, d), pruning_ratio=0.5, pace=Pace(verify=False)
    ).step(),
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", CONSTANT)
def test_an_objective_that_cannot_move_is_refused_before_anything_is_pruned(name: str, entry: str) -> None:
    make, data, options, message = CONSTANT[name]
    model = make()
    trace = Trace(model)
    with pytest.raises(SingeError, match=f"(?s){message}"):
        ENTRIES[entry](model, data, **options)
    trace.assert_unchanged()


def test_features_have_objectives_of_their_own() -> None:
    def spread(features: Tensor, targets: Any) -> Tensor:
        return -features.var(0).mean()

    assert prune(headless(), DATA, **asked(objective=spread, **FAST)).removed_params == pytest.approx(0.5, abs=0.02)


def test_no_outputs_are_no_classes() -> None:
    with pytest.raises(DataError, match="has no outputs, and a cross-entropy over no classes"):
        cross_entropy(torch.zeros(4, 0), torch.zeros(4, 0))


def test_the_objectives_that_the_message_names_are_accepted() -> None:
    for objective, targets in (
        (functional.mse_loss, lambda y: y.float()[:, None]),
        (functional.binary_cross_entropy_with_logits, lambda y: (y[:, None] > 0).float()),
    ):
        result = prune(one_output(), with_targets(targets), **asked(objective=objective, **FAST))
        assert result.removed_params == pytest.approx(0.5, abs=0.02)
    soft = with_targets(lambda y: functional.one_hot(y, 3) * 0.8 + 0.2 / 3)
    assert prune(mlp(), soft, **asked(**FAST)).removed_params == pytest.approx(0.5, abs=0.02)


# --- a fine-tuning loss that cannot move -------------------------------------------------------------------------


def take(tuning: FineTune, steps: int) -> None:
    model, tuner = mlp(), Tuner(tuning)
    tuner.prepare(model)
    tuner.run(model, steps, Callback())


def test_a_loss_without_a_graph_fails_at_its_first_step() -> None:
    for loss in (lambda z, y: torch.zeros(()), lambda z, y: z.detach().sum()):
        with pytest.raises(DataError, match=r"does not depend on the parameters.*no gradient at step 1"):
            take(FineTune(DATA, 5, loss=loss), 5)
    with pytest.raises(DataError, match="no gradient at step 1"):
        take(FineTune(DATA, 5, step_fn=lambda m, b: m(b[0]).detach().sum()), 5)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_loss_whose_gradient_is_zero_at_every_step(steps: int) -> None:
    seen = StopAt("finetune_step", 10**6)
    tuning, model = Tuner(FineTune(DATA, steps, step_fn=lambda m, b: m(b[0]).sum() * 0)), mlp()
    tuning.prepare(model)
    with pytest.raises(DataError, match=f"no parameter had a gradient other than zero in {min(steps, 10)} steps"):
        tuning.run(model, steps, seen)
    assert 10**6 - seen.left == min(steps, 10) - 1


def test_a_loss_that_is_zero_for_a_while_is_none() -> None:
    turns = iter(range(100))

    def loss(z: Tensor, y: Tensor) -> Tensor:  # a margin that all examples of the first batches keep
        return z.square().mean() * (next(turns) > 4)

    take(FineTune(DATA, 8, loss=loss), 8)


def test_only_what_is_trained_counts() -> None:
    model = Twice()
    for layer in (model.trunk, model.one, model.out_one):
        layer.requires_grad_(False)
    with pytest.raises(DataError, match=r"does not depend on the parameters that are trained"):
        prune(model, DATA, **asked(objective=first, criterion="l2", callbacks=[Nothing()], **FAST))


def test_what_lies_behind_masked_weights_has_true_zeros() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    hold_masks(net, {"2.weight": torch.zeros(6, 6, dtype=torch.bool)})
    rows = torch.arange(6)
    group = UnitGroup("0", 6, (Producer("0", (Slot(net[0], "weight"), Slot(net[0], "bias")), rows, rows),))
    batch = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert score_units(net, group, [batch]).tolist() == [0.0] * 6
