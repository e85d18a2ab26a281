"""After a failure everything is as if it had never been: the next try is, to the byte, what a first one is.

And what a resumed run is given must be what the first one was given: another model or other data are noticed.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from singe_plugin import FineTune, fold_batchnorm, prune
from singe_plugin.errors import ArtifactError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.integrations.unstructured import UnstructuredPruner
from singe_plugin.loop.costs import count_params
from singe_plugin.loop.tuner import Tuner
from singe_plugin.run.staging import fingerprint_of

from asked import asked
from small_nets import Chain, Pairs, StopAt, Trace, assert_same_state, assert_same_values, images

BATCHES = images(4)


class Setting:
    """A model, its optimizer, scheduler, average and loader, and a pruner that uses them."""

    def __init__(self, granularity: str, own: bool, every: str) -> None:
        torch.manual_seed(0)
        self.net = Chain(dropout=0.5).train()
        self.ema = ModelEmaV3(self.net, decay=0.7)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.generator = torch.Generator().manual_seed(5)
        loader = DataLoader(Pairs(BATCHES, noise=0.1), batch_size=8, shuffle=True, generator=self.generator)
        given: dict[str, Any] = {}
        if own:
            schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
            del self.optimizer.param_groups[0]["initial_lr"]  # schedulers set it, too
            given = {"optimizer": schedule}
        self.tuning = Tuner(FineTune(loader, 9, every, lr=0.05, ema=self.ema, clip_grad=0.1, **given))
        self.granularity = granularity

    def run(self, *callbacks: Any) -> dict[str, torch.Tensor]:
        if self.granularity == "unit":
            importance = SInGEImportance(nodes=1).bind(self.net, BATCHES)
            SInGEPruner(
                self.net, BATCHES[0][0][:2], importance, **asked(target="params=0.5", order="rounds", rounds=3,
                finetune=self.tuning, callbacks=callbacks, verify=False),
            ).run()  # fmt: skip
        else:
            UnstructuredPruner(
                self.net, BATCHES, **asked(sparsity=0.7, rounds=3, nodes=1, finetune=self.tuning, callbacks=callbacks)
            ).run()
        average = {f"ema.{name}": t.clone() for name, t in self.ema.module.named_parameters()}
        return {name: t.detach().clone() for name, t in self.net.named_parameters()} | average

    def state(self) -> Any:
        """What no failure may leave different, besides what a Trace sees."""
        tuning = self.tuning
        return copy.deepcopy(
            [
                [(g["lr"], sorted(g)) for g in self.optimizer.param_groups],
                self.generator.get_state(),
                {name: t.clone() for name, t in self.ema.module.state_dict().items()},
                None if tuning.scheduler is None else tuning.scheduler.state_dict(),
                (tuning.done, tuning.optimizer is None, tuning.scaler is None, tuning.stream.taken),
                torch.get_rng_state(),
                list(random.getstate()[1]),
            ]
        )


PLACES = [("layer_scored", 1), ("removed", 3), ("finetune_step", 1), ("finetune_step", 7), ("run_end", 1)]


@pytest.mark.parametrize("granularity", ["unit", "weight"])
@pytest.mark.parametrize(("own", "every"), [(True, "layer"), (False, "end")])
def test_a_second_try_is_a_first_one(granularity: str, own: bool, every: str) -> None:
    torch.manual_seed(3)
    whole = Setting(granularity, own, every)
    torch.manual_seed(3)
    expected = whole.run()
    setting = Setting(granularity, own, every)
    torch.manual_seed(3)
    trace, before = Trace(setting.net, setting.optimizer), setting.state()
    for place in PLACES:
        with pytest.raises(KeyboardInterrupt):
            setting.run(StopAt(*place))
        trace.assert_unchanged()
        assert_same_state(setting.state(), before)
    assert_same_values(setting.run(), expected)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_interrupted_in_the_final_counting(
    granularity: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(granularity, True, "layer")
    trace, before = Trace(setting.net, setting.optimizer), setting.state()
    over = StopAt("run_end", 10)
    place = "loop.costs" if granularity == "unit" else "integrations.unstructured.pruner"
    name = f"singe_plugin.{place}.count_params"

    def interrupt(model: nn.Module) -> int:
        if over.left < 10:
            raise error
        return count_params(model)

    monkeypatch.setattr(name, interrupt)
    with pytest.raises(type(error)):
        setting.run(over)
    assert over.left == 9
    trace.assert_unchanged()
    assert_same_state(setting.state(), before)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_failure_after_the_run_puts_the_optimizer_back_too(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ``prune``, when the pruned model is measured; a resumed run goes back to before it was resumed."""
    setting = Setting("unit", True, "layer")
    trace, before = Trace(setting.net, setting.optimizer), setting.state()
    options: dict[str, Any] = {"finetune": setting.tuning.options, "nodes": 1, "verify": False, "out_dir": tmp_path}
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            prune(setting.net, BATCHES, **asked(callbacks=[StopAt("round_done", 3)], **options))
    module = sys.modules["singe_plugin.run.run"]
    over = StopAt("run_end", 10)
    measured = module.measure

    def interrupt(*arguments: Any) -> Any:
        if over.left < 10:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(module, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(setting.net, BATCHES, **asked(callbacks=[over], resume=resumed, **options))
    assert over.left == 9
    trace.assert_unchanged()
    assert_same_state(setting.state(), before)


# --- other models, other data -----------------------------------------------------------------------------------


def swapped() -> nn.Module:
    """The same values, the same sums, in other places."""
    net = chain()
    with torch.no_grad():
        net.conv2.weight.copy_(net.conv2.weight.flip(0))
    return net


def chain(**options: Any) -> Chain:
    torch.manual_seed(0)
    return Chain(**options)


def frozen() -> nn.Module:
    net = chain()
    net.conv1.weight.requires_grad_(False)
    return net


def counted() -> nn.Module:
    net = chain()
    net.bn1.running_mean.add_(0.1)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "other places": swapped,
    "another rate": lambda: chain(dropout=0.1),
    "frozen": frozen,
    "other statistics": counted,
}
DATA: dict[str, Any] = {
    "other images": images(4, seed=1),
    "other labels": [(x, (y + 1) % 3) for x, y in BATCHES],
    "another order": BATCHES[::-1],
    "another size": images(4, size=8),
    "more of it": [*BATCHES, *images(1, seed=2)],
    "another dtype": [(x.double().float() * (1 + 1e-6), y) for x, y in BATCHES],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        resume(chain(), BATCHES, folder, callbacks=[StopAt("round_done", 2)])
    return folder


def resume(net: nn.Module, data: Any, folder: Path, **options: Any) -> Any:
    return prune(net, data, **asked(verify=False, finetune_steps=4, nodes=1, out_dir=folder, resume=True, **options))


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_noticed(name: str, stopped: Path) -> None:
    net = MODELS[name]()
    trace = Trace(net)
    with pytest.raises(ArtifactError, match=r"other options \(model: .*unpruned model with the same weights"):
        resume(net, BATCHES, stopped)
    trace.assert_unchanged()


@pytest.mark.parametrize("name", DATA)
def test_other_data_are_noticed(name: str, stopped: Path) -> None:
    with pytest.raises(ArtifactError, match=r"other options \(data: data\.\w+ was .*use the same data"):
        resume(chain(), DATA[name], stopped)


def test_the_fingerprint_is_of_the_model_and_not_of_the_object() -> None:
    one = fingerprint_of(chain())
    assert fingerprint_of(chain().train()) == fingerprint_of(chain().eval()) == one
    assert fingerprint_of(copy.deepcopy(chain()).to(memory_format=torch.channels_last)) == one  # type: ignore[call-overload]
    fold_batchnorm(net := chain(), BATCHES[0][0][:2])
    assert fingerprint_of(net) != one
