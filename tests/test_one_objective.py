"""One notion of F: what scores also trains, whatever the entry, and nothing of it is ignored in silence."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Callback, FineTune, Pace, Result, prune, prune_weights
from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.integrations.unstructured import UnstructuredPruner
from singe_plugin.method.batches import inputs_for
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.method.units import Producer, Slot, UnitGroup

from asked import asked
from references import Net
from small_nets import Trace, assert_same_values, mlp, vectors

DATA = vectors(3)
X = DATA[0][0]
FAST: dict[str, Any] = {"finetune_steps": 4, "nodes": 2}


def fast(options: dict[str, Any]) -> dict[str, Any]:
    """Few steps and nodes, unless the options say otherwise; an object that is given has its own."""
    without = {"finetune": {"finetune_steps"}, "scoring": {"nodes"}}
    gone = {name for key, names in without.items() if key in options for name in names}
    return {name: value for name, value in FAST.items() if name not in gone} | options


def one_hot(targets: Tensor) -> Tensor:
    return functional.one_hot(targets, 3).float()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, one_hot(targets))


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, one_hot(targets))


def made(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp()


def units(model: nn.Module, **options: Any) -> Result:
    return prune(model, DATA, **asked(target="params=0.5", verify=False, **fast(options)))


def layers(model: nn.Module, **options: Any) -> Result:
    return units(model, units_per_step="layer", **options)


def weights(model: nn.Module, **options: Any) -> Result:
    return prune_weights(model, DATA, **asked(rounds=2, **fast(options)))


RUNS = {"units": units, "layers": layers, "weights": weights}


def losses(result: Result) -> list[float]:
    return [row["loss"] for row in result.history.select("finetune_step")]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("objective", [squared, binary])
def test_a_function_is_scored_and_trained(objective: Any, run: str) -> None:
    """To the bit what a run does that is told to fine-tune with it."""
    result = RUNS[run](made(), objective=objective)
    told = RUNS[run](made(), objective=objective, finetune=FineTune(DATA, 4, loss=objective))
    assert_same_values(result.model, told.model)
    assert losses(result) == losses(told)
    assert result.options["finetune"]["minimises"] == objective.__name__
    other = RUNS[run](made(), objective=objective, finetune=FineTune(DATA, 4, loss=functional.cross_entropy))
    assert losses(other) != losses(result)  # a loss that is given goes before it
    assert other.options["finetune"]["minimises"] == "cross_entropy"


@pytest.mark.parametrize("run", RUNS)
def test_a_mean_logit_trains_cross_entropy(run: str) -> None:
    one, other = (RUNS[run](made(), criterion="l2", objective=o) for o in ("logit", "loss"))
    assert_same_values(one.model, other.model)
    assert losses(one) == losses(other)
    told = RUNS[run](
        made(), criterion="l2",
        finetune=FineTune(DATA, 4, loss=lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.1)),
    )  # fmt: skip
    assert losses(told) == losses(other)


def test_the_importance_of_a_pruner_says_what_its_fine_tuning_minimises() -> None:
    for tuning, expected in ((FineTune(DATA, 4), squared), (FineTune(DATA, 4, loss=binary), binary)):
        model, twin = made(), made()
        for net, fine in ((model, tuning), (twin, FineTune(DATA, 4, loss=expected))):
            importance = SInGEImportance(objective=squared).bind(net, DATA)
            SInGEPruner(net, X, importance, target="params=0.3", finetune=fine, pace=Pace(verify=False)).run()
        assert_same_values(model, twin)


def test_the_same_fine_tuning_follows_the_objective_of_each_run() -> None:
    tuning = FineTune(DATA, 4)
    units(made(), objective=squared, finetune=tuning)
    again = units(made(), finetune=tuning)
    assert losses(again) == losses(units(made()))


def test_single_weights_are_trained_with_what_they_are_scored_by() -> None:
    model, twin = made(), made()
    for net, loss in ((model, None), (twin, squared)):
        UnstructuredPruner(
            net, DATA, **asked(sparsity=0.5, objective=squared, finetune=FineTune(DATA, 4, loss=loss))
        ).run()
    assert_same_values(model, twin)


def test_an_importance_with_another_objective_is_refused() -> None:
    model = made()
    importance = SInGEImportance(objective=binary)
    with pytest.raises(ConfigError, match=r"objective=.*squared.* beside an importance whose F is .*binary"):
        units(model, scoring=Scoring(importance, objective=squared))
    result = units(model, scoring=importance)
    assert "binary" in result.options["scoring"]["objective"]
    assert losses(result) == losses(units(made(), objective=binary, criterion="ig", nodes=5))


# --- importances of torch-pruning --------------------------------------------------------------------------------


class Seen(tp.importance.GroupTaylorImportance):  # type: ignore[misc]
    """Taylor, which shows the gradients that it was given."""

    gradient: Tensor | None = None

    def __call__(self, group: Any, **options: Any) -> Any:
        if self.gradient is None:
            self.gradient = group[0].dep.target.module.weight.grad.clone()
        return super().__call__(group, **options)


def test_taylor_reads_gradients_of_the_objective() -> None:
    model = made()
    twin, importance = copy.deepcopy(model), Seen()
    result = units(model, criterion=importance, objective=squared, batches=3)
    torch.stack([squared(twin(x), y) for x, y in DATA]).mean().backward()
    torch.testing.assert_close(importance.gradient, twin[0].weight.grad)
    assert losses(result)[0] < 1.0  # a mean square of small numbers; the cross-entropy of three classes is above
    assert losses(units(made(), criterion=Seen()))[0] > 1.0


def test_what_needs_a_loss_for_every_example_says_so() -> None:
    hessian = tp.importance.GroupHessianImportance()
    assert units(made(), criterion=hessian).removed_params > 0.4
    model = made()
    trace = Trace(model)
    with pytest.raises(ScoringError, match="GroupHessianImportance needs a loss for every example"):
        units(model, criterion=hessian, objective=squared)
    trace.assert_unchanged()


# --- models that compute their own loss --------------------------------------------------------------------------


class Output(OrderedDict[str, Any]):
    """Transformers' ModelOutput: keys that are attributes, too; None is left out of the keys."""

    def __init__(self, **fields: Any) -> None:
        super().__init__({k: v for k, v in fields.items() if v is not None})
        self.__dict__.update(fields)


class OwnLoss(nn.Module):
    """A classifier as Transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made()

    def forward(self, values: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        logits = self.net(values)
        return Output(loss=None if labels is None else functional.cross_entropy(logits, labels), logits=logits)


class Logits(OwnLoss):
    def forward(self, values: Tensor) -> Tensor:  # type: ignore[override]
        return self.net(values)  # type: ignore[no-any-return]


def named(model: nn.Module, key: str = "labels") -> list[Any]:
    return [{"values": x, key: y} for x, y in DATA]


ENTRIES: dict[str, Callable[..., Result]] = {
    "units": lambda m, d, **o: prune(m, d, **asked(verify=False, **FAST, **o)),
    "layers": lambda m, d, **o: prune(m, d, **asked(verify=False, units_per_step=2, **FAST, **o)),
    "taylor": lambda m, d, **o: prune(m, d, **asked(criterion=tp.importance.GroupTaylorImportance(), **FAST, **o)),
    "weights": lambda m, d, **o: prune_weights(m, d, **asked(rounds=2, **FAST, **o)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_model_that_computes_its_loss_from_labels(entry: str) -> None:
    """To the bit what the same network does that returns logits, scored and trained by that loss."""
    own = ENTRIES[entry](OwnLoss(), named(OwnLoss()))
    plain = ENTRIES[entry](Logits(), named(Logits()), objective=functional.cross_entropy)
    assert_same_values(own.model, plain.model)
    assert losses(own) == losses(plain)


@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_its_units_are_scored_by_that_loss(path: str) -> None:
    rows, scores = torch.arange(16), []
    for model in (OwnLoss(), Logits()):
        slots = (Slot(model.net[0], "weight"), Slot(model.net[0], "bias"))
        group = UnitGroup("0", 16, (Producer("0", slots, rows, rows),))
        scores.append(score_units(model, group, named(model), Scoring(path=path)))
    torch.testing.assert_close(scores[0], scores[1])


def test_targets_stay_among_the_keywords_only_where_forward_names_them() -> None:
    batch = {"values": 1, "labels": 2}
    assert inputs_for(OwnLoss(), batch) == ({"values": 1, "labels": 2}, 2)
    assert inputs_for(Logits(), batch) == ({"values": 1}, 2)
    assert inputs_for(Net(lambda m, **k: k), batch) == ({"values": 1}, 2)  # **kwargs names nothing
    assert inputs_for(OwnLoss(), ({"values": 1}, 2)) == ({"values": 1}, 2)
    assert inputs_for(OwnLoss(), {"values": 1, "target": 2}) == ({"values": 1}, 2)
    scripted = torch.jit.script(nn.Linear(2, 2))
    assert inputs_for(scripted, {"input": 1, "labels": 2}) == ({"input": 1}, 2)


# --- outputs that nothing covers ---------------------------------------------------------------------------------


class Started(Callback):
    """Nothing may be scored, let alone pruned."""

    def on_layer_scored(self, event: Any) -> None:
        raise AssertionError(f"{event.layer} was scored")


class Auxiliary(nn.Module):
    """Returns a second output in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.side = made(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.net(x), self.side(x)) if self.training else self.net(x)


PAIRS = [({"values": x}, y) for x, y in DATA]
OUTPUTS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "a dict": (lambda: Net(lambda m, x: {"out": m.net(x)}, net=made()), DATA, {}, "returns dict"),
    "a tuple": (lambda: Net(lambda m, x: (m.net(x), x), net=made()), DATA, {}, "returns tuple"),
    "its loss without labels": (OwnLoss, PAIRS, {}, "returns Output.*mappings with"),
    "a tuple in train mode": (Auxiliary, DATA, {"criterion": "l2"}, "returns tuple.*objective"),
    "a dict and magnitudes": (
        lambda: Net(lambda m, x: {"out": m.net(x)}, net=made()), DATA, {"criterion": "l2"}, "returns dict.*objective"
    ),
    "no scalar": (made, DATA, {"objective": lambda z, y: z.sum(1), "criterion": "l2"}, r"one number.*\(8,\).*mean"),
}  # fmt: skip


@pytest.mark.parametrize("entry", ["units", "layers", "weights"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_other_outputs_are_refused_before_anything_is_scored(name: str, entry: str) -> None:
    make, data, options, message = OUTPUTS[name]
    model = make()
    trace = Trace(model)
    callbacks = [] if "criterion" in options and entry == "layers" else [Started()]
    with pytest.raises(DataError, match=f"(?s){message}"):
        ENTRIES[entry](model, data, callbacks=callbacks, **options)
    trace.assert_unchanged()


def test_the_remedies_of_the_messages_work() -> None:
    covered = prune(
        OwnLoss(), PAIRS, **asked(objective=lambda o, y: functional.cross_entropy(o.logits, y), verify=False, **FAST)
    )
    same = prune(OwnLoss(), named(OwnLoss()), **asked(verify=False, **FAST))
    assert losses(covered) == losses(same)
    loss = lambda o, y: functional.cross_entropy(o[0], y) + functional.cross_entropy(o[1], y)  # noqa: E731
    result = prune(Auxiliary(), DATA, **asked(criterion="l2", finetune=FineTune(DATA, 4, loss=loss), verify=False))
    assert len(losses(result)) == 4
