"""Checkpoints in the forms that training scripts leave behind, and those that are refused."""

from __future__ import annotations

import argparse
import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from singe_plugin.app.weights import load_weights
from singe_plugin.errors import ArtifactError

State = dict[str, Tensor]


def net(seed: int = 0, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        collections.OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), fc=nn.Linear(4, outputs), model=nn.Linear(1, 1)
        )
    )


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def lightning(attribute: str, state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**under(attribute, state), "criterion.weight": torch.ones(3), "metric.total": torch.zeros(())},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [torch.optim.Adam(net().parameters()).state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }


def timm_train(state: State, **more: Any) -> dict[str, Any]:
    """What timm's ``CheckpointSaver`` writes."""
    optimizer = torch.optim.SGD(net().parameters(), 0.1, 0.9).state_dict()
    args = argparse.Namespace(model="resnet18", lr=0.1, mean=None)
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": optimizer, "version": 2, "args": args,
            "metric": 71.5, **more}  # fmt: skip


def averaged(state: State) -> State:
    """``torch.optim.swa_utils.AveragedModel.state_dict()``"""
    model = net()
    model.load_state_dict(state)
    return dict(torch.optim.swa_utils.AveragedModel(model).state_dict())


FORMS: dict[str, tuple[Callable[[State, State], Any], str]] = {
    "plain": (lambda s, _: s, ""),
    "DDP": (lambda s, _: under("module.", s), ""),
    "compiled": (lambda s, _: under("_orig_mod.", s), ""),
    "compiled in DDP": (lambda s, _: under("module._orig_mod.", s), ""),
    "DDP in compiled": (lambda s, _: under("_orig_mod.module.", s), ""),
    "a part compiled": (lambda s, _: {n.replace("stem.", "stem._orig_mod."): t for n, t in s.items()}, ""),
    "timm": (lambda s, _: timm_train(s, amp_scaler={"scale": 65536.0}), ""),
    "timm, averaged": (lambda s, o: timm_train(o, state_dict_ema=s), "its averaged weights, state_dict_ema"),
    "timm, not averaged": (lambda s, _: timm_train(under("module.", s), state_dict_ema=None), ""),
    "DeiT": (lambda s, _: {"model": s, "args": argparse.Namespace(lr=1), "epoch": 3, "scaler": {}}, ""),
    "DeiT, averaged": (lambda s, o: {"model": o, "model_ema": s}, "its averaged weights, model_ema"),
    "Lightning": (lambda s, _: lightning("model.", s), "what 'model.' has"),
    "Lightning, compiled": (lambda s, _: lightning("net._orig_mod.", s), "what 'net.' has"),
    "deep inside": (lambda s, _: {"state_dict": under("module.ema.model.", s)}, "what 'module.ema.model.' has"),
    "torch's average": (lambda s, _: averaged(s), ""),
    "an ordered dictionary": (lambda s, _: collections.OrderedDict(s), ""),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_as_scripts_leave_them(tmp_path: Path, form: str) -> None:
    make, note = FORMS[form]
    right, wrong, model = net(1), net(2), net(3)
    torch.save(make(dict(right.state_dict()), dict(wrong.state_dict())), tmp_path / "w.pth")
    said = load_weights(model, tmp_path / "w.pth")
    assert said == "checkpoint w.pth" + (f" ({note})" if note else "")
    assert model.state_dict().keys() == right.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), right.state_dict().values(), strict=True))


def test_safetensors_with_a_prefix_and_tensors_as_large_as_they_should_be(tmp_path: Path) -> None:
    right, model = net(1), net(3)
    save_file(under("_orig_mod.", dict(right.state_dict())), tmp_path / "w.safetensors")
    assert load_weights(model, tmp_path / "w.safetensors") == "checkpoint w.safetensors"
    assert torch.equal(model.get_parameter("fc.weight"), right.get_parameter("fc.weight"))


class Evil:
    """Its pickle makes a folder when it is read."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.where,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: [1, 2], "holds list, not a dictionary of named tensors"),
        (lambda s: {}, "holds dict, not a dictionary of named tensors"),
        (lambda s: {"state_dict": {"epoch": 3}}, "holds dict, not a dictionary of named tensors"),
        (lambda s: {"state_dict": {**under("a.", s), **under("b.", s)}}, "several such models ('a.', 'b.')"),
        (lambda s: lightning("model.", {**s, "more": s["fc.bias"]}), "1 are not the model's (it has 'more')"),
        (lambda s: lightning("model.", {n: t for n, t in s.items() if n != "fc.bias"}), "it lacks 'fc.bias'"),
        (lambda s: lightning("model.", {**s, "fc.bias": torch.ones(7)}), "'fc.bias' has shape (7,), the model's is"),
        (lambda s: {**s, "fc.bias": 7}, "'fc.bias' has shape 7, the model's is (3,)"),
        (lambda s: {"x": torch.ones(1)}, "it lacks 'fc.bias'"),
        (lambda s: {f"{i}.fc.{k}": s["fc." + k] for i in "ab" for k in ("bias", "weight")}, "not of this"),
        (lambda s: timm_train(s, metric=np.float64(3)), "it is a pickle that may run code (numpy"),
        (lambda s: net(), "torch.save(torch.load(path, weights_only=False)['state_dict'], new_path)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, make: Callable[[State], Any], message: str) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(make(dict(net(1).state_dict())), tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=re.escape(message)):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": dict(net().state_dict()), "args": Evil(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="may run code"):
        load_weights(net(), tmp_path / "w.pth")
    assert not (tmp_path / "made").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_what_timms_saver_writes_of_a_compiled_model_and_its_average(tmp_path: Path) -> None:
    made, average, found = (timm.create_model("test_resnet", num_classes=3) for _ in range(3))
    optimizer = torch.optim.SGD(made.parameters(), 0.1, 0.9)
    args = argparse.Namespace(model="test_resnet", lr=0.1)
    for ema, expected in ((None, made), (ModelEmaV3(average), average)):
        saver = CheckpointSaver(torch.compile(made), optimizer, args, ema, checkpoint_dir=str(tmp_path))
        saver.save_checkpoint(3, metric=0.5)
        note = " (its averaged weights, state_dict_ema)" if ema is not None else ""
        assert load_weights(found, tmp_path / "last.pth.tar") == f"checkpoint last.pth.tar{note}"
        pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
