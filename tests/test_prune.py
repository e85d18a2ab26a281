"""``singe_plugin.prune``: what it reports is true, it repeats bit for bit, and it resumes where it was stopped."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.data import DataLoader

from singe_plugin import Callback, FineTune, Recipe, Result, fold_batchnorm, prune
from singe_plugin.errors import ArtifactError
from singe_plugin.run.checkpoint import CHECKPOINT

from asked import asked
from small_nets import Chain, Pairs, StopAt, Trace, assert_same_values, images, mlp, untimed, values_of, vectors

BATCHES = images(4)
FAST: dict[str, Any] = {
    "target": "params=0.5", "verify": False, "nodes": 2, "units_per_step": 0.3, "finetune_steps": 9,
}  # fmt: skip


def chain(seed: int = 0, **options: Any) -> Chain:
    torch.manual_seed(seed)
    return Chain(**options)


def macs_of(model: Chain, size: int = 6) -> int:
    """Counted by hand: one multiply-add per weight and position."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(m.weight.numel() * size * size for m in convs) + model.fc.weight.numel()


def accuracy_of(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        right = [int(p == t) for x, y in batches for p, t in zip(model.eval()(x).argmax(1), y, strict=True)]
    return sum(right) / len(right)


def assert_same_run(one: Result, other: Result) -> None:
    """Two runs that must be the same in everything but the time they took."""
    assert_same_values(one.model, other.model)
    assert one.history.without_times() == other.history.without_times()
    assert untimed(one) == untimed(other)
    assert (one.layers, one.left_whole) == (other.layers, other.left_whole)
    assert (one.options, one.structure, one.versions) == (other.options, other.structure, other.versions)


# --- what is reported -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "loader", "dataset", "mappings"])
def test_the_result_is_true_for_every_form_of_data(form: str) -> None:
    forms: dict[str, Any] = {
        "list": BATCHES,
        "loader": DataLoader(Pairs(BATCHES), batch_size=8, shuffle=True),
        "dataset": Pairs(BATCHES),
        "mappings": [{"x": x, "labels": y} for x, y in BATCHES],
    }
    model = chain().train()
    before, accuracy = (sum(p.numel() for p in model.parameters()), macs_of(model)), accuracy_of(chain(), BATCHES)
    result = prune(model, forms[form], **asked(val_data=forms[form], **FAST))
    assert result.model is model
    assert model.training
    assert (result.before.params, result.before.macs) == before
    assert (result.after.params, result.after.macs) == (sum(p.numel() for p in model.parameters()), macs_of(model))
    assert (result.before.accuracy, result.after.accuracy) == (accuracy, accuracy_of(model, BATCHES))
    assert all(metrics.latency_ms is not None and metrics.latency_ms > 0 for metrics in (result.before, result.after))
    assert abs(result.removed_params - 0.5) <= 0.01
    rows = {row.name: row.units_after for row in result.layers}
    assert rows == {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert [row.units_before for row in result.layers] == [8, 12, 8]
    assert result.left_whole == {"fc": "it reaches the model's output"}
    assert (result.options["target"], result.options["finetune"]["steps"]) == ("params=0.5", 9)
    assert len(result.history.select("finetune_step")) == 9


def test_a_timm_model() -> None:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 1, 32, 32, generator=generator), torch.arange(4) % 3)]
    result = prune(model, data, **asked(target="macs=0.4", units_per_step="layer", nodes=2, finetune_steps=3))
    assert abs(result.removed_macs - 0.4) <= 0.01
    assert result.before.latency_ms is not None
    assert result.after.latency_ms is not None
    assert result.after.latency_ms > 0
    assert result.builder.name == "test_resnet"
    assert result.builder.options == {"num_classes": 3, "in_chans": 1}
    assert "MACs" in result.summary()
    assert "latency" in result.summary()
    assert model(data[0][0]).shape == (4, 3)


def test_fine_tuning_learns() -> None:
    torch.manual_seed(0)
    model, data = mlp(32), vectors(8, 32)
    result = prune(
        model,
        data,
        **asked(val_data=data, finetune_steps=200, lr=0.1, **{k: FAST[k] for k in ("target", "verify", "nodes")}),
    )
    assert result.after.accuracy is not None
    assert result.after.accuracy > 0.9  # an untrained classifier of three classes is right a third of the time


def test_folding_leaves_no_batchnorm() -> None:
    model = chain()
    folded = chain()
    fold_batchnorm(folded, BATCHES[0][0][:2])
    result = prune(model, BATCHES, **asked(fold=True, **FAST))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert result.structure["folded"] == [["conv1", "bn1"], ["conv2", "bn2"], ["conv3", "bn3"]]
    assert abs(result.removed_params - 0.5) <= 0.01
    assert_same_values(
        prune(folded, BATCHES, **asked(**FAST)).model, model
    )  # folding first and pruning then is the same


def test_any_importance_and_own_fine_tuning() -> None:
    model = chain()
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.Adam(parameters, lr=0.01))
        return made[-1]

    tuning = FineTune(BATCHES, 4, "removal", optimizer=optimizer)
    result = prune(
        model, BATCHES, **asked(target="params=0.5", finetune=tuning, criterion=tp.importance.GroupTaylorImportance(),
        verify=False),
    )  # fmt: skip
    assert abs(result.removed_params - 0.5) <= 0.01
    assert [type(optimizer) for optimizer in made] == [torch.optim.Adam]
    assert [row["step"] for row in result.history.select("finetune_step")] == [1, 2, 3, 4]


# --- repeating --------------------------------------------------------------------------------------------------


def sources() -> dict[str, Callable[[], Any]]:
    own = DataLoader(Pairs(BATCHES), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5))
    return {
        "dataset": lambda: Pairs(BATCHES, noise=0.1),
        "loader": lambda: DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True),
        "loader with its own generator": lambda: own,
        "list": lambda: BATCHES,
    }


@pytest.mark.parametrize("source", sources())
def test_the_seed_decides_everything(source: str) -> None:
    make = sources()[source]
    torch.manual_seed(11)
    one = prune(chain(dropout=0.5), make(), **asked(seed=3, **FAST))
    torch.manual_seed(12)
    assert_same_run(prune(chain(dropout=0.5), make(), **asked(seed=3, **FAST)), one)
    other = prune(chain(dropout=0.5), make(), **asked(seed=4, **FAST))
    assert not torch.equal(other.model.fc.weight, one.model.fc.weight)


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True, generator=generator)
    model = chain(dropout=0.5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), generator.get_state()
    prune(model, loader, **asked(**FAST))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.equal(generator.get_state(), states[3])


# --- stopping and resuming --------------------------------------------------------------------------------------


class Kill(Callback):
    """Ends the process without warning."""

    def __init__(self, count: int) -> None:
        self.left = count

    def on_removed(self, event: Any) -> None:
        self.left -= 1
        if not self.left:
            import os

            os.kill(os.getpid(), signal.SIGKILL)


def tuned(every: str = "layer", steps: int = 9) -> FineTune:
    """SGD with momentum on a shuffled, augmented loader: everything that has a state."""
    loader = DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True)
    return FineTune(loader, steps, every, lr=0.05, recipe=Recipe(warmup=2))


def entwined(model: nn.Module, folder: Path | None, **options: Any) -> Result:
    fine = options.pop("finetune", None) or tuned()
    settings = {name: value for name, value in FAST.items() if name != "finetune_steps"}
    given = {**settings, "finetune": fine, "val_data": BATCHES, **options}
    return prune(model, BATCHES, **asked(out_dir=folder, **given))


@pytest.fixture(scope="module")
def uninterrupted() -> Result:
    return entwined(chain(dropout=0.5), None)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_interrupted_in_any_layer_and_resumed(layer: int, uninterrupted: Result, tmp_path: Path) -> None:
    model = chain(dropout=0.5)
    trace = Trace(model)
    stop = StopAt("layer_done", layer) if layer < 4 else StopAt("run_end", 1)
    with pytest.raises(KeyboardInterrupt):
        entwined(model, tmp_path, callbacks=[stop])
    trace.assert_unchanged()
    assert (tmp_path / CHECKPOINT).exists() == (layer > 1)
    torch.manual_seed(99)  # the state of the new process does not matter
    resumed = entwined(model, tmp_path, resume=True)
    assert_same_run(resumed, uninterrupted)


@pytest.mark.parametrize("stops", [("removed", 3), ("finetune_step", 5), ("layer_scored", 2)])
def test_interrupted_inside_a_layer_twice(stops: tuple[str, int], uninterrupted: Result, tmp_path: Path) -> None:
    for count in (stops[1], 2):
        with pytest.raises(KeyboardInterrupt):
            entwined(chain(dropout=0.5), tmp_path, resume=True, callbacks=[StopAt(stops[0], count)])
    assert_same_run(entwined(chain(dropout=0.5), tmp_path, resume=True), uninterrupted)


@pytest.mark.parametrize("every", ["removal", "end"])
def test_resuming_under_other_schedules(every: str, tmp_path: Path) -> None:
    steps = {"removal": 20, "end": 210}[every]

    def run(folder: Path | None, **options: Any) -> Result:
        return entwined(chain(dropout=0.5), folder, finetune=tuned(every, steps), **options)

    # one checkpoint is written in the middle of the final phase, after 200 steps
    stop = StopAt("finetune_step", steps - 5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[stop])
    heard = StopAt("finetune_step", 10**9)
    resumed = run(tmp_path, resume=True, callbacks=[heard])
    assert 0 < 10**9 - heard.left < steps  # only the rest was done again
    assert_same_run(resumed, run(None))


def schedule(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)


def test_resuming_adam_a_scheduler_and_an_average(tmp_path: Path) -> None:
    def run(folder: Path | None, **options: Any) -> tuple[Result, nn.Module]:
        model, ema = chain(), timm.utils.ModelEmaV3(chain(), decay=0.7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tuning = FineTune(tuned().loader, 9, optimizer=schedule(optimizer), ema=ema)
        return entwined(model, folder, finetune=tuning, **options), ema

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[StopAt("layer_done", 2)])
    resumed, average = run(tmp_path, resume=True)
    whole, expected = run(None)
    assert_same_run(resumed, whole)
    assert_same_values(average, expected)


@pytest.mark.parametrize("fold", [True, False])
def test_resuming_a_folded_model_and_a_loader_with_its_own_generator(fold: bool, tmp_path: Path) -> None:
    loader = DataLoader(
        Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5)
    )

    def run(folder: Path | None, **options: Any) -> Result:
        return prune(chain(), loader, **asked(fold=fold, out_dir=folder, **FAST, **options))

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[StopAt("layer_done", 3)])
    assert_same_run(run(tmp_path, resume=True), whole)


def test_resuming_a_finished_run_gives_its_result(uninterrupted: Result, tmp_path: Path) -> None:
    assert_same_run(entwined(chain(dropout=0.5), tmp_path), uninterrupted)
    stop = StopAt("removed", 1)
    again = entwined(chain(dropout=0.5), tmp_path, resume=True, callbacks=[stop])
    assert_same_run(again, uninterrupted)
    assert stop.left == 1  # nothing was removed a second time by the algorithm


OTHERS: dict[str, dict[str, Any]] = {
    "target": {"target": "params=0.4"},
    "criterion": {"criterion": "sg"},
    "seed": {"seed": 1},
    "finetune": {"finetune": 18},
    "MagnitudeImportance": {"criterion": tp.importance.MagnitudeImportance()},
    "layers": {"ignored_layers": True},
    "model": {"model": True},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        entwined(chain(), folder, callbacks=[StopAt("layer_done", 2)])
    return folder


@pytest.mark.parametrize("other", OTHERS)
def test_resuming_with_other_options_is_refused(other: str, stopped: Path) -> None:
    options = dict(OTHERS[other])
    model = chain(1 if options.pop("model", False) else 0)
    if "finetune" in options:
        options["finetune"] = tuned(steps=options["finetune"])
    if options.pop("ignored_layers", False):
        options["ignored_layers"] = [model.conv2]
    trace, saved = Trace(model), (stopped / CHECKPOINT).read_bytes()
    with pytest.raises(ArtifactError, match=rf"other options \(.*{other}.*start anew in another folder"):
        entwined(model, stopped, resume=True, **options)
    trace.assert_unchanged()
    assert (stopped / CHECKPOINT).read_bytes() == saved


def test_a_damaged_checkpoint_is_refused(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes((stopped / CHECKPOINT).read_bytes()[:-100])
    model = chain()
    trace = Trace(model)
    with pytest.raises(ArtifactError, match="damaged or no checkpoint"):
        entwined(model, tmp_path, resume=True)
    trace.assert_unchanged()


def test_a_custom_importance_can_be_resumed_in_another_process(tmp_path: Path) -> None:
    class Own(tp.importance.Importance):  # type: ignore[misc]  # its repr contains an address
        def __call__(self, group: Any, **_: Any) -> torch.Tensor:
            return tp.importance.MagnitudeImportance()(group)

    whole = entwined(chain(), None, criterion=Own())
    with pytest.raises(KeyboardInterrupt):
        entwined(chain(), tmp_path, criterion=Own(), callbacks=[StopAt("layer_done", 2)])
    assert_same_run(entwined(chain(), tmp_path, criterion=Own(), resume=True), whole)


def killed_run(folder: str) -> None:
    """Run in a process of its own, until it is killed."""
    torch.set_num_threads(1)
    entwined(chain(dropout=0.5), Path(folder), callbacks=[Kill(3)])


def test_killed_and_resumed(uninterrupted: Result, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_prune as t; " + (
        f"t.killed_run({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, "run.lock"]  # which keeps nobody out any more
    steps = StopAt("finetune_step", 100)
    resumed = entwined(chain(dropout=0.5), tmp_path, resume=True, callbacks=[steps])
    assert 0 < 100 - steps.left < 9
    assert_same_run(resumed, uninterrupted)


def test_a_failure_undoes_folding_too() -> None:
    model = chain().train()
    model.bn2.eval()
    trace, before = Trace(model), values_of(model)
    with pytest.raises(KeyboardInterrupt):
        prune(model, BATCHES, **asked(fold=True, callbacks=[StopAt("layer_done", 3)], **FAST))
    trace.assert_unchanged()
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert set(before) == set(model.state_dict())
