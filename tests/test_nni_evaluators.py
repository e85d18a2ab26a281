"""NNI's evaluators: errors that say what to write, the user's loss, whole runs with Lightning and Transformers."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

import nni
import torch
from nni.compression.pruning import AGPPruner, LinearPruner
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.integrations.nni import (
    LightningEvaluator,
    SInGEPruner,
    TorchEvaluator,
    TransformersEvaluator,
    shrink_with_report,
)
from singe_plugin.integrations.nni.evaluators import BatchCollector, check_evaluator, step_of
from singe_plugin.loop.events import Callback

from asked import asked

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HALF = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]


def nothing(*_: Any) -> Tensor:
    return torch.zeros(())


def traced(model: nn.Module) -> Any:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)


# --- TorchEvaluator -----------------------------------------------------------------------------------------------


def raw_optimizer(model: nn.Module) -> dict[str, Any]:
    return {"optimizers": torch.optim.AdamW(model.parameters(), 0.1)}


def raw_scheduler(model: nn.Module) -> dict[str, Any]:
    optimizer = traced(model)
    return {"optimizers": optimizer, "lr_schedulers": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


WRONG: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "raw optimizer": (raw_optimizer, r"optimizer AdamW .* write nni\.trace\(torch\.optim\.AdamW\)\(\.\.\.\)"),
    "raw scheduler": (raw_scheduler, r"scheduler StepLR .* nni\.trace\(torch\.optim\.lr_scheduler\.StepLR\)"),
    "raw in a list": (lambda m: {"optimizers": [traced(m), torch.optim.SGD(m.parameters())]}, "the optimizer SGD"),
    "a class": (lambda m: {"optimizers": torch.optim.SGD}, "type is no optimizer; give one made by nni.trace"),
    "none": (lambda m: {"optimizers": None}, "NoneType is no optimizer"),
    "swapped": (lambda m: {"optimizers": traced(m), "lr_schedulers": traced(m)}, "SGD is no scheduler"),
    "no function": (lambda m: {"optimizers": traced(m), "training_step": 3}, "training_step must be a function"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_a_torch_evaluator(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        TorchEvaluator(**{"training_func": nothing, "training_step": nothing, **make(nn.Linear(2, 2))})


def test_a_right_torch_evaluator() -> None:
    model = nn.Linear(2, 2)
    optimizer = traced(model)
    scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 2)
    for optimizers, schedulers in ((optimizer, scheduler), ([optimizer], [scheduler]), (optimizer, None)):
        assert TorchEvaluator(nothing, optimizers, nothing, schedulers, torch.ones(1)).get_dummy_input() is not None


def test_what_is_an_evaluator() -> None:
    check_evaluator(None)
    check_evaluator(TorchEvaluator(nothing, traced(nn.Linear(2, 2)), nothing))
    with pytest.raises(ConfigError, match=r"must be one of NNI's .* got function"):
        check_evaluator(nothing)


# --- the user's own loss ------------------------------------------------------------------------------------------


def loss_of(batch: Any, model: nn.Module, scale: float = 2.0) -> Tensor:
    return scale * functional.cross_entropy(model(batch[0]), batch[1])


RIGHT: dict[str, Callable[..., Any]] = {
    "tensor": loss_of,
    "tuple": lambda batch, model: (loss_of(batch, model), "logits"),
    "list": lambda batch, model: [loss_of(batch, model)],
    "dict": lambda batch, model: {"other": 0, "loss": loss_of(batch, model)},
    "partial": functools.partial(loss_of, scale=2.0),
    "any arguments": lambda *args: loss_of(*args),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_the_loss_of_a_training_step(name: str) -> None:
    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    step = step_of(TorchEvaluator(nothing, traced(model), RIGHT[name]))
    assert step is not None
    assert torch.equal(step(model, batch), 2 * functional.cross_entropy(model(batch[0]), batch[1]))


def test_training_steps_that_scoring_cannot_call() -> None:
    def keyword(batch: Any, model: nn.Module, *, criterion: Any) -> None: ...

    steps: list[Callable[..., Any]] = [lambda batch, model, epoch: 0, lambda batch: 0, keyword]
    for step in steps:
        evaluator = TorchEvaluator(nothing, traced(nn.Linear(2, 2)), step)
        with pytest.raises(ConfigError, match=r"the training step takes \(batch.* defaults, or .*objective='loss'"):
            step_of(evaluator)
    for found in ("loss", 1.0, [], {"total": 0}, None):
        step = step_of(TorchEvaluator(nothing, traced(nn.Linear(2, 2)), lambda batch, model, y=found: y))
        assert step is not None
        with pytest.raises(ScoringError, match="must return the loss, a tuple that begins with it"):
            step(nn.Identity(), None)


def test_the_collector_keeps_the_latest_training_batches() -> None:
    patches: list[Callable[[Tensor, Any], Tensor]] = []
    collector = BatchCollector(types.SimpleNamespace(patch_loss=patches.append), 2)
    losses = [torch.tensor(float(n), requires_grad=n != 2) for n in range(4)]  # the third is an evaluation
    assert all(patches[0](loss, f"batch {n}") is loss for n, loss in enumerate(losses))
    assert list(collector.batches) == ["batch 1", "batch 3"]
    assert collector.loss == 3.0
    patches[0](losses[2], "evaluation")
    assert collector.loss == 3.0


class Scores(Callback):
    """All scores."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_layer_scored(self, event: Any) -> None:
        self.found.append(event.scores)


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning(optimizers: str = "one", **trainer: Any) -> tuple[Any, LightningEvaluator]:
    """A tiny module that counts its steps and logs, and an evaluator around it."""
    pl = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")

    class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            self.steps, self.logged = 0, []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            self.steps += 1
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.logged.append(float(self.trainer.callback_metrics["train_loss"]))

        def configure_optimizers(self) -> Any:
            optimizer = nni.trace(torch.optim.Adam)(self.parameters(), lr=1e-2)
            scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9)
            return {
                "one": optimizer, "lists": ([optimizer], [scheduler]),
                "dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}},
            }[optimizers]  # fmt: skip

    class Data(pl.LightningDataModule):  # type: ignore[name-defined,misc]
        def train_dataloader(self) -> Any:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(64, 8, generator=generator)
            data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
            return torch.utils.data.DataLoader(data, batch_size=8)

    quiet = {f"enable_{n}": False for n in ("checkpointing", "progress_bar", "model_summary")}
    made = nni.trace(pl.Trainer)(accelerator="cpu", devices=1, logger=False, **quiet, **trainer)
    return Module(), LightningEvaluator(made, nni.trace(Data)())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizers", ["one", "lists", "dict"])
def test_lightning(optimizers: str) -> None:
    model, evaluator = lightning(optimizers, max_epochs=3)
    batches = [tuple(batch) for batch, _ in zip(evaluator.data_module.train_dataloader(), range(5), strict=False)]
    step, plain = step_of(evaluator), functional.cross_entropy(model(batches[0][0]), batches[0][1])
    assert step is not None
    assert torch.equal(step(model, batches[0]), plain)
    assert "log" not in model.__dict__
    model.steps, before, scores = 0, model.net[0].weight.detach().clone(), Scores()
    pruner = SInGEPruner(model, HALF, evaluator, **asked(training_steps=5, nodes=2, callbacks=[scores]))
    _, masks = pruner.compress()
    assert len(model.logged) == 5  # five optimizer steps; what scoring computes is not logged
    assert "training_step" not in model.__dict__ or model.training_step.__func__ is type(model).training_step
    pruner.unwrap_model()
    assert not torch.equal(model.net[0].weight, before)  # it was trained
    again = Scores()
    SInGEPruner(model, HALF, **asked(batches=batches, nodes=2, callbacks=[again])).compress()[0]
    assert len(scores.found) == len(again.found) == 1
    torch.testing.assert_close(scores.found[0], again.found[0])  # of the batches it was trained on
    lowest = scores.found[0].argsort()[:8].sort().values
    assert torch.equal((masks["net.0"]["bias"] == 0).nonzero().flatten(), lowest)


@pytest.mark.filterwarnings("ignore")
def test_lightning_to_the_end() -> None:
    model, evaluator = lightning(max_epochs=4)
    pruner = AGPPruner(SInGEPruner(model, HALF, evaluator, **asked(training_steps=2, nodes=1)), 3, 3)
    _, masks = pruner.compress(max_steps=12, max_epochs=None)
    assert len(model.logged) == 12
    pruner.unwrap_model()
    result = shrink_with_report(model, masks, torch.randn(2, 8))
    assert (model.net[0].out_features, model.net[2].in_features, result.still_masked) == (8, 8, {})
    model, evaluator = lightning(max_epochs=4)
    pruner = SInGEPruner(model, HALF, evaluator, **asked(training_steps=6, nodes=1, order="layers", units_per_step=2))
    _, masks = pruner.compress()
    assert int(masks["net.0"]["bias"].sum()) == 8
    assert len(model.logged) == 6


@pytest.mark.filterwarnings("ignore")
def test_lightning_that_ends_too_early() -> None:
    model, evaluator = lightning(max_epochs=1)
    with pytest.raises(ScoringError, match="ended after 8 optimizer steps, but masks are made after 20"):
        SInGEPruner(model, HALF, evaluator, **asked(training_steps=20, nodes=1)).compress()


@pytest.mark.filterwarnings("ignore")
def test_lightning_repairs_on_what_its_step_gives_the_model() -> None:
    model, evaluator = lightning(max_epochs=4)
    pruner = SInGEPruner(model, HALF, evaluator, **asked(training_steps=6, nodes=1), repair=48)
    pruner.compress()
    (repaired,) = pruner.history.select("repaired")
    assert list(repaired["layers"]) == ["net.2.weight"]
    assert model.steps == len(model.logged) == 6  # what the repair computes is neither counted nor logged


# --- Transformers -------------------------------------------------------------------------------------------------

DENSE = [{"op_names_re": [r"bert\.encoder\.layer\..*\.intermediate\.dense"], "sparse_ratio": 0.5}]
IDS = torch.randint(0, 50, (64, 6), generator=torch.Generator().manual_seed(0))


def bert(folder: Path, optimizer: str = "traced", **options: Any) -> tuple[Any, TransformersEvaluator]:
    """A tiny BERT whose label is whether the first id is large."""
    hf = pytest.importorskip("transformers", reason="Transformers is not installed")
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": (x[0] > 25).long()} for x in IDS]
    arguments = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, num_train_epochs=3, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    given: dict[str, Any] = {}
    if optimizer != "default":
        made = nni.trace(torch.optim.AdamW)(model.parameters(), lr=1e-3)
        schedule = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(made, 0.9) if optimizer == "scheduled" else None
        given["optimizers"] = (made, schedule)
    trainer = nni.trace(hf.Trainer)(model=model, args=arguments, train_dataset=data, eval_dataset=data[:16], **given)
    return model, TransformersEvaluator(trainer, dummy_input={"input_ids": IDS[:2]})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["traced", "scheduled", "default"])
def test_transformers(optimizer: str, tmp_path: Path) -> None:
    model, evaluator = bert(tmp_path, optimizer)
    scores, seen = Scores(), []
    pruner = SInGEPruner(model, DENSE, evaluator, **asked(training_steps=3, nodes=1, callbacks=[scores]))
    real = BatchCollector._see

    def see(collector: BatchCollector, loss: Tensor, batch: Any) -> Tensor:
        seen.append({k: v.clone() for k, v in batch.items()})
        return real(collector, loss, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchCollector, "_see", see)
        _, masks = pruner.compress()
    assert len(seen) == 3
    assert set(seen[0]) == {"input_ids", "attention_mask", "labels"}
    pruner.unwrap_model()
    again = Scores()
    batches = [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]) for batch in seen]
    SInGEPruner(
        model, DENSE, **asked(batches=batches, nodes=1, callbacks=[again], example_inputs={"input_ids": IDS[:2]},
        objective=lambda outputs, labels: functional.cross_entropy(outputs.logits, labels)),
    ).compress()[1]  # fmt: skip
    for one, other in zip(scores.found, again.found, strict=True):
        torch.testing.assert_close(one, other)
    assert all(int(mask["bias"].sum()) == 16 for mask in masks.values())


@pytest.mark.filterwarnings("ignore")
def test_transformers_to_the_end(tmp_path: Path) -> None:
    model, evaluator = bert(tmp_path)
    pruner = LinearPruner(SInGEPruner(model, DENSE, evaluator, **asked(training_steps=2, nodes=1)), 3, 3)
    _, masks = pruner.compress(max_steps=9, max_epochs=None)
    pruner.unwrap_model()
    assert all(int(mask["bias"].sum()) == 16 for mask in masks.values())  # both ran at the optimizer's steps
    x = {"input_ids": IDS[:2], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    model.double().eval()
    for name, targets in masks.items():
        for target, mask in targets.items():
            getattr(model.get_submodule(name), target).data *= mask
    with torch.no_grad():
        expected = model(**x).logits
    result = shrink_with_report(model, masks, x)
    assert result.still_masked == {}
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 16
    with torch.no_grad():
        torch.testing.assert_close(model(**x).logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_a_transformers_evaluator(tmp_path: Path) -> None:
    """All tasks run, in order, at every step; evaluation collects nothing; reverting takes them out."""
    model, evaluator = bert(tmp_path, gradient_accumulation_steps=2)
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    events: list[str] = []
    evaluator.patch_optimizer_step([lambda: events.append("before")], [lambda: events.append("after")])
    evaluator.patch_optimizer_step([], [lambda: events.append("outer")])
    collector = BatchCollector(evaluator, 100)
    evaluator.train(max_steps=2)
    assert events == ["before", "after", "outer"] * 2
    assert len(collector.batches) == 4
    evaluator.evaluate()
    assert len(collector.batches) == 4
    evaluator.revert_optimizer_step()
    evaluator.revert_loss()
    evaluator.train(max_steps=2)
    assert (len(events), len(collector.batches)) == (6, 4)
    evaluator.unbind_model()


def test_transformers_wants_labels(tmp_path: Path) -> None:
    model, evaluator = bert(tmp_path)
    step = step_of(evaluator)
    assert step is not None
    assert step(model, {"input_ids": IDS[:2], "labels": torch.tensor([0, 1])}).ndim == 0
    with pytest.raises(DataError, match=r"a batch with labels, got dict with input_ids"):
        step(model, {"input_ids": IDS[:2]})


@pytest.mark.filterwarnings("ignore")
def test_transformers_repairs_on_what_the_model_was_called_with(tmp_path: Path) -> None:
    model, evaluator = bert(tmp_path)
    pruner = SInGEPruner(model, DENSE, evaluator, **asked(training_steps=3, nodes=1), repair=24)
    pruner.compress()
    (repaired,) = pruner.history.select("repaired")
    first = next(iter(repaired["layers"]))
    assert first == "bert.encoder.layer.0.output.dense.weight"
    assert repaired["layers"][first]["after"] < 0.7 * repaired["layers"][first]["before"]
    assert repaired["unsolved"] == {}
