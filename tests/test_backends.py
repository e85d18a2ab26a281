"""What runs a network while it is timed: where the time of a pass goes, and that it is the same network."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, MissingPackageError
from singe_plugin.loop.times import Timing
from singe_plugin.run import backends
from singe_plugin.run.backends import Eager, OnnxRuntime
from singe_plugin.run.latency import Stopwatch, latency_of, timed_inputs

from fingerprint import assert_untouched, fingerprint


class Slow(nn.Module):
    """Takes so many seconds, on a clock that the test holds."""

    def __init__(self, clock: dict[str, float], seconds: float) -> None:
        super().__init__()
        self.weight, self.clock, self.seconds = nn.Parameter(torch.ones(1, 1)), [clock], seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0]["now"] += self.seconds
        return x


class Network(nn.Module):
    """Layers with something between them, before and after; one of them runs twice."""

    def __init__(self, clock: dict[str, float]) -> None:
        super().__init__()
        self.clock = [clock]
        self.first, self.second, self.idle = Slow(clock, 1.0), Slow(clock, 2.0), Slow(clock, 100.0)

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0]["now"] += 0.25
        x = self.first(x)
        self.clock[0]["now"] += 0.5
        x = self.first(self.second(x))
        self.clock[0]["now"] += 4.0
        return x


def test_what_runs_between_layers_belongs_to_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(backends, "now", lambda _: clock["now"])
    model = Network(clock)
    before = fingerprint(model)
    found = Eager().spread(model, torch.ones(1), ["first", "second", "idle"], 1)
    assert found == {"first": 1000 * (0.25 + 1 + 0.5 + 1 + 4), "second": 2000.0, "idle": 0.0}
    assert_untouched(before, model)


class Fused(nn.Module):
    """What a runtime fuses: normalisation, activations, a sum and a gate behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.shortcut = nn.Conv2d(16, 32, 1)
        self.main = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU6(), nn.Conv2d(32, 32, 3, padding=1))
        self.gate, self.fc = nn.Conv2d(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.main(x) + self.shortcut(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return torch.as_tensor(self.fc(x.mean((2, 3))))


LAYERS = ("stem.0", "shortcut", "main.0", "main.2", "gate", "fc")


def test_onnx_runtime_runs_the_same_network_and_every_layer_is_found() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    model, image = Fused().eval(), torch.randn(2, 3, 24, 24)
    before = fingerprint(model)
    outputs = OnnxRuntime().runner(model, image, 1)()
    np.testing.assert_allclose(outputs[0], model(image).detach().numpy(), rtol=1e-3, atol=1e-5)
    found = OnnxRuntime().spread(model, image, LAYERS, 1)
    assert set(found) == set(LAYERS)
    assert all(ms >= 0 for ms in found.values())  # a small one may take less than the clock shows
    assert sum(found.values()) > 0
    assert_untouched(before, model)


def test_every_operator_of_a_profile_has_the_layer_that_it_was_fused_from() -> None:
    pytest.importorskip("onnx")
    model = Fused().eval()
    owners = backends._Owners(backends.export_onnx(model, torch.randn(1, 3, 8, 8)), LAYERS)
    said = {
        "/stem/stem.0/Conv_kernel_time": "stem.0",
        "/stem/stem.2/Relu_output_0_nchwc_kernel_time": "stem.0",
        "/main/main.1/Clip_output_0_nchwc_kernel_time": "main.0",
        "/Relu_output_0_nchwc_kernel_time": "main.2",  # the sum was fused into the branch that is added last
        "/gate/Conv_output_0_nchwc_kernel_time": "gate",
        "/fc/Gemm_kernel_time": "fc",
        "/fc/Gemm/MatMulAddFusion_kernel_time": "fc",
        "ReorderOutput_kernel_time": None,
        "gemm_input_reshape_kernel_time": None,
    }
    assert {name: owners.of(name) for name in said} == said
    assert owners.first == "stem.0"


def test_inputs_by_name_are_fed_by_name() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.as_tensor(self.one(a) - self.two(b))

    model, inputs = Two().eval(), {"a": torch.randn(2, 3), "b": torch.randn(2, 5)}
    for given in (inputs, tuple(inputs.values())):
        outputs = OnnxRuntime().runner(model, given, 1)()
        np.testing.assert_allclose(outputs[0], model(**inputs).detach().numpy(), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_exported_is_said() -> None:
    pytest.importorskip("onnx")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i1e(self.fc(x))

    with pytest.raises(ConfigError, match=r"Odd cannot be exported to ONNX.*backend='torch'"):
        latency_of(Odd(), torch.zeros(1, 3), timing=Timing(backend="onnxruntime"))


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", nothing)
    with pytest.raises(MissingPackageError, match="pip install onnx onnxruntime"):
        latency_of(nn.Linear(3, 3), torch.zeros(1, 3), timing=Timing(backend="onnxruntime"))


@pytest.mark.slow
def test_a_compiled_network_is_timed_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    before = fingerprint(model)
    first, last = Stopwatch(model, torch.zeros(2, 3), Timing(backend="compile", repeats=3)).compare(model)
    assert first.median_ms > 0
    assert last.conditions == first.conditions
    assert_untouched(before, model)


def test_the_first_example_is_repeated() -> None:
    inputs = ({"x": torch.arange(6.0).view(2, 3), "scale": torch.tensor(2.0)}, torch.arange(2), "a word")
    nested, numbers, word = timed_inputs(inputs, 3)
    assert nested["x"].tolist() == [[0, 1, 2]] * 3
    assert numbers.tolist() == [0, 0, 0]
    assert (nested["scale"].item(), word) == (2.0, "a word")
    assert timed_inputs(inputs, None) is inputs


@pytest.mark.parametrize("inputs", [([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)],), {"scale": torch.tensor(1.0)}])
def test_what_is_no_batch_cannot_be_repeated(inputs: Any) -> None:
    with pytest.raises(ConfigError, match="latency batch=2 was asked for"):
        timed_inputs(inputs, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt"}, "latency backend"),
        ({"batch": 0}, "latency batch=0"),
        ({"threads": -1}, "latency threads=-1"),
        ({"repeats": 0.5}, "latency repeats=0.5"),
        ({"table": 3}, "table=3 is no latency table"),
    ],
)
def test_what_cannot_mean_anything_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Timing(**options)


def test_threads_are_what_was_asked_for_and_then_as_before() -> None:
    before, seen = torch.get_num_threads(), []
    model = nn.Linear(3, 3)
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    found = latency_of(model, torch.zeros(1, 3), repeats=2, timing=Timing(threads=before + 1))
    assert set(seen) == {before + 1}
    assert found.threads == before + 1
    assert torch.get_num_threads() == before
