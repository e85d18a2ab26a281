"""Everything that a block may do to a model is undone, however the block is left."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from singe_plugin.state import RngState, model_device, preserved, train_mode_of


def draws() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def test_every_generator_repeats_itself() -> None:
    draws()
    state = RngState.capture()
    first = draws()
    draws()
    state.restore()
    assert draws() == first


def test_generators_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    state = RngState.capture()
    assert state.numpy is None
    first = torch.rand(1)
    state.restore()
    assert torch.rand(1) == first


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.Linear(1, 1, device="meta"), "meta"),
        (nn.BatchNorm1d(1, affine=False, device="meta"), "meta"),
        (nn.ReLU(), "cpu"),
    ],
)
def test_the_device_of_a_model(model: nn.Module, kind: str) -> None:
    assert model_device(model).type == kind


def test_modes_are_those_of_each_module() -> None:
    model = net()
    model[1].eval()
    assert [train_mode_of(model)[m] for m in model.modules()] == [True, True, False, True, True]


def vandalise(model: Any) -> None:
    """Touch everything that may be touched."""
    model.eval().requires_grad_(False)
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    model[0].bias = nn.Parameter(torch.zeros(3))
    del model[3].bias
    model[3].extra = nn.Parameter(torch.zeros(1))
    model[1].running_mean.add_(1)
    model[1].running_var = torch.zeros(3)
    model[1].register_buffer("more", torch.zeros(1))
    model[3].weight.grad = torch.ones(2, 3)
    model[0].register_forward_hook(lambda *_: None, always_call=True)
    model[0].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    model[3].register_full_backward_hook(lambda *_: None)
    model[2]._forward_hooks.clear()
    draws()


@pytest.mark.parametrize("leave", [None, ValueError, KeyboardInterrupt])
def test_whatever_is_done_is_undone(leave: type[BaseException] | None) -> None:
    model = net()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.full((3, 2), 5.0)
    model[2].register_forward_hook(lambda *_: None)

    def look() -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, module in model.named_modules():
            seen[f"{name} mode"] = module.training
            for table in (k for k in vars(module) if k.endswith("_hooks")):
                seen[f"{name} {table}"] = [(k, id(v)) for k, v in getattr(module, table).items()]
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    seen[f"{name} {key}"] = None
                    continue
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
                seen[f"{name} {key}"] = (id(tensor), tensor.tolist(), tensor.requires_grad, grad)
        return seen

    before, rng = look(), RngState.capture()
    if leave is None:
        with preserved(model):
            vandalise(model)
    else:
        with pytest.raises(leave), preserved(model):
            vandalise(model)
            raise leave
    assert look() == before
    after = draws()
    rng.restore()
    assert draws() == after
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.weight", "1.bias", "3.weight", "3.bias"]
