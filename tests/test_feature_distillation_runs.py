"""Distillation from features in runs: nothing of it is left behind, and what cannot be is refused."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from test_distillation import take
from test_distillation_runs import Untouched, teaching, whole_or_not
from test_feature_distillation import DATA, IMAGES, literal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from singe_plugin import Callback, Distill, FineTune, Pace, SInGEImportance, SInGEPruner, prune, prune_weights
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.loop.distillation import distillation
from singe_plugin.loop.events import Removed
from singe_plugin.loop.features import Features
from singe_plugin.loop.tuner import Tuner

from killed import assert_same_run
from references import Net
from small_nets import CLASSES, Chain, StopAt, Trace, assert_same_values, images, mlp, seeded

# --- in runs ----------------------------------------------------------------------------------------------------


class Bookkeeper(Callback):
    """Notes by the events which units are gone, and computes every term again from what the layers gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group_of: dict[str, str]) -> None:
        self.gone: dict[str, set[int]] = {}
        self.widths: list[tuple[int, ...]] = []
        real = Features.loss

        def loss(features: Features, student: Any, teacher: Any) -> Tensor:
            found = real(features, student, teacher)
            terms: list[float] = []
            for name in features.names:
                gone = self.gone.get(group_of[name], set())
                left = [unit for unit in range(teacher[name].shape[1]) if unit not in gone]
                terms.append(literal(student[name].detach(), teacher[name], {1: left}))
            assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
            self.widths.append(tuple(student[name].shape[1] for name in features.names))
            return found

        monkeypatch.setattr(Features, "loss", loss)

    def on_removed(self, event: Removed) -> None:
        self.gone.setdefault(event.layer, set()).update(event.units)


SMALL = images(1, 3, 3)
LAYERS = {"bn1": "conv1", "conv2": "conv2"}


@pytest.mark.parametrize(("pace", "every"), [
    (Pace(rounds=3), "layer"), (Pace("layers", units_per_step=0.5), "removal"), (Pace(rounds=2), "end"),
])  # fmt: skip
def test_between_removals_it_is_compared_at_what_is_left_by_then(
    pace: Pace, every: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Bookkeeper(monkeypatch, LAYERS)
    ema = Averaged(seeded(Chain))
    tuning = FineTune(
        steps=6, every=every, distill=Distill(features=tuple(LAYERS)), ema=ema, channels_last=every == "layer",
        amp="bf16" if every == "end" else None,
    )  # fmt: skip
    prune(
        seeded(Chain), SMALL, target="params=0.5", scoring="norm_grad", pace=pace, finetune=tuning, callbacks=[book],
        repair=32,
    )  # fmt: skip
    tried, *steps = book.widths  # on a scoring batch, first
    assert tried == (8, 12)
    assert len(steps) == 6
    assert steps == sorted(steps, reverse=True)
    assert (len(set(steps)) > 1) == (every != "end")
    assert steps[-1] < (8, 12)
    assert ema.conv1.out_channels == steps[-1][0]
    assert ema.seen == 6


class Averaged(Chain):
    """An EMA that copies the model to see what is on it."""

    seen = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.load_state_dict(model.state_dict())

    def update(self, model: nn.Module) -> None:
        self.seen += 1
        assert all(not module._forward_hooks for module in copy.deepcopy(model).modules())


def test_a_pruner_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    book, model = Bookkeeper(monkeypatch, LAYERS), seeded(Chain)
    trace = Trace(model)
    for fails in (True, False):
        book.widths.clear()
        pruner = SInGEPruner(
            model, SMALL[0][0], SInGEImportance("l2"), target="params=0.5", pace=Pace("layers", units_per_step=0.5),
            finetune=FineTune(SMALL, 4, every="layer", distill=Distill(features=list(LAYERS))),
            callbacks=[book, *([StopAt("finetune_step", 3)] if fails else [])],
        )  # fmt: skip
        if fails:
            with pytest.raises(KeyboardInterrupt):
                pruner.run()
            trace.assert_unchanged()
            book.gone.clear()
        else:
            pruner.run()
            assert len(book.widths) == 4
            assert all(not module._forward_hooks for module in model.modules())


def test_masked_weights_leave_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    book, model = Bookkeeper(monkeypatch, LAYERS), seeded(Chain)
    tuning = FineTune(steps=3, every="layer", distill=Distill(features=tuple(LAYERS)))
    monkeypatch.setattr(book, "on_removed", lambda event: None)  # of weights
    prune_weights(model, SMALL, sparsity=0.6, pace=Pace(rounds=3), finetune=tuning, callbacks=[book])
    assert book.widths == [(8, 12)] * 4


@pytest.mark.parametrize(("weights", "every", "order", "stop", "module"), [
    (False, "layer", "rounds", ("finetune_step", 6), False),
    (False, "removal", "layers", ("removed", 4), True),
    (True, "layer", "rounds", ("finetune_step", 6), False),
])  # fmt: skip
def test_resumed_it_is_the_uninterrupted_run_to_the_byte(
    weights: bool, every: str, order: str, stop: tuple[str, int], module: bool, tmp_path: Path
) -> None:
    def run(folder: Path | None, features: Any = ("bn1", "conv3"), **more: Any) -> Any:
        how = Distill(seeded(Chain, 7) if module else "unpruned", features=features, feature_weight=0.5)
        return whole_or_not(folder, weights, every, order, how, **more)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[StopAt(*stop)])
    with pytest.raises(ArtifactError, match=r"finetune\.distill\.features was \['bn1', 'conv3'\], now \['conv3'\]"):
        run(tmp_path, features=["conv3"])
    resumed, whole = run(tmp_path), run(None)
    assert_same_run(resumed, whole)
    assert whole.options["finetune"]["distill"]["features"] == ["bn1", "conv3"]
    plain = whole_or_not(None, weights, every, order, seeded(Chain, 7) if module else "unpruned")
    losses = [[e["loss"] for e in result.history.select("finetune_step")] for result in (whole, plain)]
    assert losses[0][0] > losses[1][0]


# --- the model stays as it was ----------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["model", "teacher"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_behind_by_a_failure_inside_of_the_network(whose: str, error: type[BaseException]) -> None:
    model, teacher = seeded(Chain), seeded(Chain, 1)
    trace, other = Trace(model), Trace(teacher)
    calls: list[int] = []

    def fails(module: nn.Module, args: Any, output: Tensor) -> None:
        assert all(module._forward_hooks for module in (model.bn1, teacher.bn1)[whose == "teacher" :][:1])
        calls.append(1)
        if len(calls) > 1:
            raise error("mine")

    handle = (model if whose == "model" else teacher).conv2.register_forward_hook(fails)  # type: ignore[union-attr]
    tuner = Tuner(FineTune(IMAGES, 4, distill=Distill(teacher, features=("bn1", "conv3"))))
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError), match="mine"), tuner.taught(model):
        tuner.prepare(model)
        tuner.run(model, 4, Callback())
    handle.remove()
    assert all(not module._forward_hooks for net in (model, teacher) for module in net.modules())
    other.assert_unchanged(ignore=("rng",))
    assert trace.rest["hooks"] == Trace(model).rest["hooks"]


class Checkpointed(nn.Module):
    """A layer that is computed again for its gradient."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.reentrant = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.reentrant is None or not self.training:
            return self.fc(self.b(x))
        return self.fc(checkpoint(self.b, x, use_reentrant=self.reentrant))


def test_a_checkpointed_layer_is_learned_from_if_it_has_a_gradient() -> None:
    how = Distill(seeded(Checkpointed, 1), features="b")
    plain = seeded(Checkpointed)
    expected = take(plain, FineTune(DATA, 3, distill=how))
    model = seeded(lambda: Checkpointed(False))
    assert take(model, FineTune(DATA, 3, distill=how)) == expected
    assert_same_values(model, plain)
    with pytest.raises(ConfigError, match=r"'b' cannot be learned from: no gradient goes .* with use_reentrant=True"):
        take(seeded(lambda: Checkpointed(True)), FineTune(DATA, 3, distill=how))


def test_the_fused_layers_of_transformers_are_seen() -> None:
    """In eval mode and with a mask they would return nested tensors."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.arange(3).expand(len(x), 3) > torch.arange(len(x))[:, None]
        return m.fc(m.body(x[:, None].repeat(1, 3, 1), src_key_padding_mask=hidden).mean(1))

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        return Net(forward, body=nn.TransformerEncoder(layer, 2), fc=nn.Linear(4, CLASSES))

    model, teacher = seeded(make), seeded(make, 1)
    names = ["body.layers.0", "body.layers.1.linear1"]
    (loss,) = take(copy.deepcopy(model), FineTune(DATA, 1, distill=Distill(teacher, 4.0, 1.0, names)))
    made: dict[str, list[Tensor]] = {name: [] for name in names}
    for net, name in itertools.product((model.train(), teacher.train()), names):
        net.get_submodule(name).register_forward_hook(
            lambda m, a, output, name=name: made[name].append(output.detach())
        )
    soft = distillation(model(DATA[0][0]), teacher(DATA[0][0]), 4.0).item()
    assert loss == pytest.approx(soft + sum(literal(*pair, {}) for pair in made.values()) / 2, rel=1e-4)


# --- what cannot be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"features": ()}, r"features=\(\) are no names of modules, each given once; give e\.g\. features=\('lay"),
    ({"features": ""}, "features='' are no names"),
    ({"features": ["a", 1]}, r"features=\['a', 1\] are no names"),
    ({"features": ("a", "a")}, "are no names of modules, each given once"),
    ({"features": 3}, "features=3 are no names"),
    ({"features": "a", "feature_weight": 0}, r"feature_weight=0 is not a weight of the features: a number inside \]0"),
    ({"feature_weight": 0.5}, "feature_weight=0.5 is the weight of features, and none are named; give features, too"),
])  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Distill(**options)


def net(forward: Any, **parts: nn.Module) -> nn.Module:
    return seeded(lambda: Net(forward, first=nn.Linear(4, 8), fc=nn.Linear(8, CLASSES), **parts))


def outer(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.first(x))
    return m.fc(x * m.at((x[:, :, None] * x[:, None, :]).flatten(1)).sum(1, keepdim=True))


def by_head(m: Any, x: Tensor) -> Tensor:
    x = m.first(x).view(len(x), -1, 1, 2)
    return m.fc(m.at(x.flatten(0, 1)).view(len(x), -1, 2).flatten(1))


WRONG: list[tuple[Any, str, str]] = [
    (mlp, "1.x", r"features: the model has no module '1\.x'; it has 0, 1, 2, 3, 4$"),
    (lambda: net(lambda m, x: m.fc(m.first(x))), "frist",
     r"no module 'frist' \(did you mean 'first'\?\); it has first, fc"),
    (lambda: nn.Sequential(*mlp(), *[nn.Identity() for _ in range(50)]), "x", "it has 0, 1, .*, 39 and 15 more"),
    (lambda: net(lambda m, x: m.fc(m.at(m.at(m.first(x)))), at=nn.Tanh()), "at",
     r"'at' cannot be learned from: the .* calls it 2 times in a forward pass, and is to call it once; name another"),
    (lambda: net(lambda m, x: m.fc(m.first(x)), at=nn.Tanh()), "at", r"the .* calls it 0 times in a forward pass"),
    (lambda: net(lambda m, x: m.fc(m.at(m.first(x)[:, None])[0][:, 0]), at=nn.GRU(8, 8, batch_first=True)), "at",
     "'at' cannot be learned from: in the .* it returns 2 tensors, and is to return one"),
    (lambda: net(lambda m, x: m.fc(torch.relu(m.first(x)) * m.at((m.first(x) > 0).long())), at=nn.Identity()), "at",
     "'at' cannot be learned from: in the .* it returns torch.int64, and is to return floating-point numbers"),
    (lambda: net(lambda m, x: m.fc(torch.relu(m.first(m.at(x)))), at=nn.Linear(4, 4).requires_grad_(False)), "at",
     "'at' cannot be learned from: no gradient goes from it to a parameter that is trained"),
]  # fmt: skip
WRONG_UNITS: list[tuple[Any, str, str]] = [
    (lambda: net(outer, at=nn.Identity()), "at",
     "'at' cannot be learned from: along dimension 1 of its output, which has the units of 'first', a position belongs"
     " to two units, so that what is left of a unit is no position of its own"),
    (lambda: net(by_head, at=nn.Identity()), "at",
     r"'at' cannot be learned from: it returns \(32, 1, 2\), and for the example inputs dimension 0 has 8 positions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "make", "names", "message"),
    [*((False, *case) for case in WRONG + WRONG_UNITS), *((True, *case) for case in WRONG)],
)
def test_modules_that_cannot_be(weights: bool, make: Any, names: str, message: str) -> None:
    model = seeded(make)
    trace = Trace(model)
    options: dict[str, Any] = {"finetune": FineTune(steps=2, distill=Distill(features=names))}
    options |= {"callbacks": [Untouched()], "pace": Pace(rounds=1, verify=weights)}
    with pytest.raises(ConfigError, match=message):
        if weights:
            prune_weights(model, DATA, sparsity=0.5, **options)
        else:
            prune(model, DATA, target="params=0.3", repair=None, **options)
    trace.assert_unchanged()
    with pytest.raises(ConfigError):  # what is left open is whether there is a teacher, not what is learned from it
        prune(model, DATA, **options | {"finetune": FineTune(steps=2, distill=Distill("auto", features=names))})


@pytest.mark.parametrize(("make", "message"), [
    (lambda: mlp(12), r"'2' returns \(8, 16\) in the model and \(8, 12\) in the teacher, and is to return \(8, 16\)"),
    (lambda: nn.Linear(4, CLASSES), r"the teacher \(Linear\) has no module '2'; it has $"),
    (lambda: torch.jit.script(mlp()), r"'2' cannot be learned from: in the teacher .* it is compiled by torch\.jit"),
])  # fmt: skip
def test_given_teachers_that_cannot_be(make: Any, message: str) -> None:
    model, how = seeded(mlp), Distill(seeded(make, 1), features=("2",))
    trace = Trace(model)
    with pytest.raises(ConfigError, match=message):
        prune(model, DATA, target="params=0.5", finetune=FineTune(steps=2, distill=how), callbacks=[Untouched()])
    trace.assert_unchanged()


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_names_them() -> None:
    command, seen = teaching()
    start = ["--distill", "unpruned", "--distill-features", "layer2, layer3.0"]
    for more, weight in (([], 1.0), (["--distill-feature-weight", "0.5"], 0.5)):
        assert CliRunner().invoke(command, [*start, *more]).exit_code == 0
        assert seen[-1].distill == Distill("unpruned", features=("layer2", "layer3.0"), feature_weight=weight)
    for wrong in (["--distill-features", ","], ["--distill-feature-weight", "2"]):
        assert CliRunner().invoke(command, ["--distill", "unpruned", *wrong]).exit_code == 2
