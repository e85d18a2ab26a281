"""Pruning inside of the training loops of Lightning, transformers and timm, against a loop written out here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from singe_plugin import Pace
from singe_plugin.errors import ArtifactError, ConfigError, DataError
from singe_plugin.integrations.in_training import EpochPruning

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
DATA = TensorDataset(X, Y)
EPOCHS = [1, 2]
EVEN = Pace(course="linear")  # of networks this small, the usual course would leave nothing for the second round


def loader() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)
    )


def optimizers(parameters: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)


def plain_loop(epochs: int, pruning: EpochPruning) -> tuple[nn.Sequential, Any, Any]:
    """What a training with pruning comes to, without anybody's trainer."""
    model = net()
    optimizer, scheduler = optimizers(model.parameters())
    for epoch in range(epochs):
        pruning.prune(epoch, model, [optimizer], loader())
        for x, y in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


# --- rounds -------------------------------------------------------------------------------------------------------


def test_rounds_reach_the_target_and_cut_the_optimizer_along() -> None:
    pruning = EpochPruning(EPOCHS, "params=0.5", pace=EVEN)
    model = net()
    before = sum(p.numel() for p in model.parameters())
    optimizer, _ = optimizers(model.parameters())
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    weight, rows = model[0].weight, {}
    rows = {
        row.sum().item(): state for row, state in zip(weight.detach(), optimizer.state[weight]["exp_avg"], strict=True)
    }
    widths = [(model[0].out_features, model[3].out_features)]
    for epoch in range(4):
        assert pruning.prune(epoch, model, [optimizer], loader()) is (epoch in EPOCHS)
        widths.append((model[0].out_features, model[3].out_features))
    assert widths[0] == widths[1] > widths[2] > widths[3] == widths[4]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(before / 2, abs=0.05 * before)
    assert model[0].weight is weight
    for row, state in zip(weight.detach(), optimizer.state[weight]["exp_avg"], strict=True):
        assert torch.equal(rows[row.sum().item()], state)  # a unit's momentum is its own
    assert model.training


def test_a_state_says_what_was_removed() -> None:
    first, pruning = net(), EpochPruning(EPOCHS, "params=0.5", pace=EVEN)
    for epoch in range(2):
        pruning.prune(epoch, first, [], loader())
    state = copy.deepcopy(pruning.state())
    other, again = net(), EpochPruning(EPOCHS, "params=0.5", pace=EVEN)
    again.restore(other, state)
    same(first, other)
    assert again.done == 1
    pruning.prune(2, first, [], loader())
    again.prune(2, other, [], loader())
    same(first, other)
    with pytest.raises(ArtifactError, match="pruned already"):
        again.restore(other, state)
    with pytest.raises(ArtifactError, match="does not fit"):
        EpochPruning(EPOCHS).restore(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), state)


def test_a_failed_round_leaves_everything_as_it_was() -> None:
    model, pruning = net(), EpochPruning([0], "params=0.5", batches=[(X, Y), (X * float("nan"), Y)])
    before = copy.deepcopy(model)
    with pytest.raises(Exception, match="not finite"):
        pruning.prune(0, model, [], None)
    same(model, before)
    assert pruning.done == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": []}, "not the epochs to prune at"),
        ({"epochs": [2, 1]}, "in ascending order"),
        ({"epochs": [1.5]}, "epochs"),
        ({"epochs": [1], "pace": Pace(rounds=3)}, "a round in each of the 1 epochs"),
        ({"epochs": [1], "pace": Pace("layers")}, "a round in each of the 1 epochs"),
    ],
)
def test_what_cannot_mean_anything(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EpochPruning(**options)


def test_batches_that_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="cannot be drawn from a generator"):
        EpochPruning([0]).prune(0, net(), [], (batch for batch in [(X, Y)]))


# --- Lightning ----------------------------------------------------------------------------------------------------


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

        def test_step(self, batch: Any, index: int) -> None:
            x, y = batch
            self.log("loss", nn.functional.cross_entropy(self(x), y))

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = optimizers(self.parameters())
            return [optimizer], [scheduler]

    return Module()


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    from lightning import Trainer

    usual = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    usual |= {"enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": True}
    return Trainer(callbacks=list(callbacks), **(usual | options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["net", ""])
def test_lightning_prunes_trains_saves_and_goes_on(tmp_path: Path, part: str) -> None:
    module = lightning_module()
    from lightning.pytorch.callbacks import ModelCheckpoint

    from singe_plugin.integrations.lightning import SInGEPruning

    reference, optimizer, scheduler = plain_loop(4, EpochPruning(EPOCHS, "params=0.5", pace=EVEN))
    callback = SInGEPruning(EPOCHS, "params=0.5", module=part, pace=EVEN)
    keeps = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fitted = trainer(tmp_path, callback, keeps)
    fitted.fit(module, loader())
    same(module.net, reference)
    state = fitted.optimizers[0].state_dict()["state"]
    for number, values in optimizer.state_dict()["state"].items():
        assert torch.equal(values["exp_avg_sq"], state[number]["exp_avg_sq"])
    assert fitted.lr_scheduler_configs[0].scheduler.get_last_lr() == scheduler.get_last_lr()
    assert "on_load_checkpoint" not in vars(module)

    other = lightning_module()
    trainer(tmp_path, SInGEPruning(EPOCHS, "params=0.5", module=part, pace=EVEN)).fit(
        other, loader(), ckpt_path=tmp_path / "epoch=1.ckpt"
    )
    same(other, module)

    last = tmp_path / "epoch=3.ckpt"
    loaded = SInGEPruning(EPOCHS, "params=0.5", module=part, pace=EVEN).load(last, lightning_module())
    same(loaded, module)
    tested = trainer(tmp_path, SInGEPruning(EPOCHS, "params=0.5", module=part, pace=EVEN))
    (found,) = tested.test(lightning_module(), loader(), ckpt_path=last, verbose=False)
    reference.eval()
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(reference(X), Y)), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses(tmp_path: Path) -> None:
    module = lightning_module()
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from singe_plugin.integrations.lightning import SInGEPruning

    with pytest.raises(ConfigError, match="its parts are 'net'"):
        trainer(tmp_path, SInGEPruning([1], module="backbone")).fit(module, loader())
    with pytest.raises(ConfigError, match="EMAWeightAveraging keeps an averaged copy"):
        trainer(tmp_path, SInGEPruning([1]), EMAWeightAveraging()).fit(module, loader())
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(module, loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ArtifactError, match="no state of SInGEPruning"):
        SInGEPruning([1]).load(tmp_path / "plain.ckpt", lightning_module())
    assert "on_load_checkpoint" not in vars(module)


# --- transformers -------------------------------------------------------------------------------------------------

IDS = torch.randint(0, 50, (32, 6), generator=torch.Generator().manual_seed(0))


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=8, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def hf_trainer(model: Any, folder: Path, callback: Any, epochs: int = 3) -> Any:
    import transformers

    args = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, save_strategy="epoch", report_to=[],
        learning_rate=0.01, disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": int(ids[0] > 25)} for ids in IDS]
    return transformers.Trainer(model, args, train_dataset=rows, callbacks=[callback])


@pytest.mark.filterwarnings("ignore")
def test_transformers_prunes_trains_saves_and_goes_on(tmp_path: Path) -> None:
    model = bert()
    from singe_plugin.integrations.transformers import SInGEPruningCallback

    before = sum(p.numel() for p in model.bert.encoder.parameters())
    callback = SInGEPruningCallback([1, 2], "params=0.2", pace=EVEN)
    fitted = hf_trainer(model, tmp_path, callback)
    fitted.train()
    assert callback.pruning.done == 2
    assert sum(p.numel() for p in model.bert.encoder.parameters()) < 0.8 * before
    for parameter, state in fitted.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape

    other, again = bert(), SInGEPruningCallback([1, 2], "params=0.2", pace=EVEN)
    folder = tmp_path / "checkpoint-8"  # two epochs of four steps: one round was over
    again.restore(other, folder)
    assert again.pruning.done == 1
    assert sum(p.numel() for p in other.bert.encoder.parameters()) < before
    hf_trainer(other, tmp_path, again).train(resume_from_checkpoint=str(folder))
    same(other, model)

    from safetensors.torch import load_file

    loaded = bert()
    SInGEPruningCallback([1, 2], "params=0.2", pace=EVEN).restore(loaded, tmp_path / "checkpoint-12")
    loaded.load_state_dict(load_file(tmp_path / "checkpoint-12" / "model.safetensors"))
    same(loaded, model)
    with pytest.raises(ArtifactError, match="without this callback"):
        again.restore(bert(), tmp_path)


# --- timm ---------------------------------------------------------------------------------------------------------


def test_timm_s_average_and_scheduler_go_along() -> None:
    """The average of a unit stays its own, and goes on to be the average of the weights that are left."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    model = net()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=5, warmup_epochs=0)
    ema = ModelEmaV3(model, decay=0.9)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    ema.update(model)
    rows = dict(zip(model[0].weight.sum(1).tolist(), ema.module[0].weight.clone(), strict=True))
    EpochPruning([0], "params=0.5", ema=ema).prune(0, model, [optimizer], loader())
    mine, average = model[0].weight, ema.module[0].weight.clone()
    assert len(mine) < 64
    for row, other in zip(mine, average, strict=True):
        assert torch.equal(rows[row.sum().item()], other)
    scheduler.step(3)
    rates = {group["lr"] for group in optimizer.param_groups}
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    ema.update(model)
    assert torch.allclose(ema.module[0].weight, 0.9 * average + 0.1 * model[0].weight)
    assert max(rates) < 0.05
