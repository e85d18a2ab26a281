"""Fine-tuning with a moving average of the weights, and on mixed batches: against references written out."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
from singe_plugin import FineTune, Recipe
from singe_plugin.app.cli import main
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.events import Callback, FinetuneStep
from singe_plugin.loop.mixing import Mixing
from singe_plugin.loop.tuner import Tuner


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def batches(count: int = 2, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 1, 6, 6, generator=generator), torch.arange(size) % 3) for _ in range(count)]


class Keep(Callback):
    """The weights after every step."""

    def __init__(self, stop: int | None = None) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.model: nn.Module | None = None
        self.stop = stop

    def on_model(self, model: nn.Module) -> None:
        self.model = model

    def on_finetune_step(self, event: FinetuneStep) -> None:
        assert self.model is not None
        self.states.append({k: v.double().clone() for k, v in self.model.state_dict().items()})
        if event.step == self.stop:
            raise KeyboardInterrupt


def averaged(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average as it is defined: from the first step's weights on, with timm's warm-up."""
    found = states[0]
    for step, state in enumerate(states[1:], 2):
        now = min(1 - (1 + (step - 1)) ** (-2 / 3), decay)
        found = {k: now * found[k] + (1 - now) * v if "num_batches" not in k else v for k, v in state.items()}
    return found


def test_the_network_ends_with_the_average() -> None:
    keep, model = Keep(), net()
    parameter = model[5].bias
    result = singe_plugin.prune(
        model,
        batches(),
        target="params=0.2439",
        finetune=FineTune(steps=12, recipe=Recipe(ema_decay=0.6)),
        callbacks=[keep],
    )
    assert result.model[5].bias is parameter
    expected = averaged(keep.states, 0.6)
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result.model[0].weight.double(), keep.states[-1]["0.weight"], atol=1e-4)
    used = result.options["finetune"]
    assert (used["recipe"]["ema_decay"], used["ema"]) == (0.6, None)


def test_masked_weights_stay_masked_in_the_average() -> None:
    keep = Keep()
    finetune = FineTune(steps=8, every="end", recipe=Recipe(ema_decay=0.9))
    result = singe_plugin.prune_weights(net(), batches(), sparsity=0.5, finetune=finetune, callbacks=[keep])
    for name, mask in result.weight_masks.items():
        weight = result.model.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert int(mask.sum()) < mask.numel()
    bias = averaged([{"b": state["5.bias"]} for state in keep.states], 0.9)["b"]
    torch.testing.assert_close(result.model[5].bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


def test_a_run_with_both_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": "params=0.2439", "pace": singe_plugin.Pace(rounds=1)}
    options["finetune"] = FineTune(steps=220, recipe=Recipe(ema_decay=0.9, mixup=0.5, cutmix=1.0))
    whole = singe_plugin.prune(net(), batches(), **options)
    with pytest.raises(KeyboardInterrupt):
        singe_plugin.prune(net(), batches(), out_dir=tmp_path, callbacks=[Keep(stop=205)], **options)
    again = singe_plugin.prune(net(), batches(), out_dir=tmp_path, resume=True, **options)
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_mixup_is_what_it_is_defined_as() -> None:
    images, classes = batches(1, 5)[0]
    given = images.clone()
    np.random.seed(3)
    mixed, targets = Mixing(FineTune(label_smoothing=0.2, recipe=Recipe(mixup=0.4)))(net(), (images, classes))
    np.random.seed(3)
    np.random.rand()  # whether the batch is mixed at all
    share = np.random.beta(0.4, 0.4)
    even, labels = given[:4], classes[:4]
    torch.testing.assert_close(mixed, share * even + (1 - share) * even.flip(0))
    smooth = functional.one_hot(labels, 3) * 0.8 + 0.2 / 3
    torch.testing.assert_close(targets, (share * smooth + (1 - share) * smooth.flip(0)).float())
    assert torch.equal(images, given)


def test_a_step_minimises_the_cross_entropy_of_the_shares() -> None:
    model, (batch,) = net(), batches(1)
    reference = copy.deepcopy(model).train()
    tuner = Tuner(
        FineTune([batch], 1, lr=0.1, momentum=0.0, weight_decay=0.0, clip_grad=None, recipe=Recipe(cutmix=1.0))
    )
    tuner.prepare(model)
    np.random.seed(5)
    tuner.run(model, 1, Callback())
    np.random.seed(5)
    mixed, targets = Mixing(FineTune(recipe=Recipe(cutmix=1.0)))(net(), batch)
    loss = -(targets * functional.log_softmax(reference(mixed), 1)).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, [reference[5].weight])
    torch.testing.assert_close(model[5].weight, reference[5].weight - 0.1 * gradient)


def test_a_teacher_sees_the_mixed_images() -> None:
    finetune = FineTune(steps=3, recipe=Recipe(mixup=1.0), distill="unpruned")
    result = singe_plugin.prune(net(), batches(), target="params=0.2439", finetune=finetune)
    assert result.options["finetune"]["distils"] == "unpruned"
    assert all(np.isfinite(row["loss"]) for row in result.history.select("finetune_step"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)), "mix pairs (images, classes)"),
        ((torch.zeros(4, 1, 6, 6), torch.zeros(4, 3)), "mix pairs (images, classes)"),
        ({"image": torch.zeros(4, 1, 6, 6)}, "mix pairs (images, classes)"),
        ((torch.zeros(1, 1, 6, 6), torch.zeros(1, dtype=torch.int64)), "a batch of the fine-tuning data has one"),
    ],
)
def test_what_cannot_be_mixed(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        Mixing(FineTune(recipe=Recipe(mixup=1.0)))(net(), batch)


def test_what_does_not_go_together() -> None:
    for options, recipe, message in (
        ({"ema": net()}, {"ema_decay": 0.9}, "ema and ema_decay were both given"),
        ({}, {"ema_decay": 1.0}, "ema_decay=1.0 is not a decay of an average"),
        ({"loss": functional.mse_loss}, {"mixup": 1.0}, "with a loss or step_fn of your own mix in the loader"),
        ({}, {"cutmix": -1.0}, "cutmix=-1.0 is not a strength of mixing"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            FineTune(**options, recipe=Recipe(**recipe))
    with pytest.raises(ConfigError, match="is no Recipe"):
        FineTune(recipe=0.5)  # type: ignore[arg-type]


def test_from_the_shell(tmp_path: Path) -> None:
    arguments = ["prune", "--model", "resnet18", "--in-chans", "1", "--img-size", "16", "--dataset", "digits", "-q"]
    arguments += ["--model-kwargs", "channels=[8, 8, 8, 8]", "--criterion", "l2", "--rounds", "1", "--no-curves"]
    arguments += ["--finetune-steps", "2", "--device", "cpu", "--no-repair", "--output", str(tmp_path)]
    arguments += ["--opt", "adamw", "--weight-decay", "0.05", "--model-ema", "--mixup", "0.2", "--cutmix", "1.0"]
    done = CliRunner().invoke(main, [*arguments, "--label-smoothing", "0.2", "--distill", "unpruned"])
    assert done.exit_code == 0, done.output
    used = singe_plugin.load(tmp_path).options["finetune"]
    assert (used["optimizer"], used["weight_decay"], used["label_smoothing"]) == ("adamw", 0.05, 0.2)
    assert (used["recipe"]["ema_decay"], used["recipe"]["mixup"], used["recipe"]["cutmix"]) == (0.998, 0.2, 1.0)
    assert used["distils"] == "unpruned"
    for wrong, message in (
        (["--opt", "adamv"], "unknown optimizer 'adamv' (did you mean 'adam"),
        (["--model-ema-decay", "1"], "ema_decay=1.0 is not a decay"),
        (["--mixup", "-1"], "mixup=-1.0 is not a strength"),
    ):
        found = CliRunner().invoke(main, [*arguments, *wrong])
        assert (found.exit_code, message in " ".join(found.stderr.split())) == (2, True), found.stderr
