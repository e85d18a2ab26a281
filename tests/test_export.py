"""An exported file computes what the pruned model does, by the library that others run it with; or it is not there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import singe_plugin
from singe_plugin import ArtifactError, ConfigError, MissingPackageError, Pace, Result, export, prune
from singe_plugin.app.cli import main
from singe_plugin.app.export import run_export
from singe_plugin.nested import call_model, tensors_in
from singe_plugin.run import formats
from singe_plugin.run.inputs import are_described, describe_inputs, random_inputs, rows_of

from small_nets import Branching, assert_same_values, values_of

FORMATS = {"onnx": "net.onnx", "torch-export": "net.pt2", "torchscript": "net.pt"}
WRITTEN = pytest.mark.parametrize("format", list(FORMATS))


class Residual(nn.Module):
    """Two convolutions around a shortcut, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A pointwise convolution, one for each channel, and one back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Two(nn.Module):
    """Two inputs of different kinds, and named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(10, 6), nn.Linear(5, 6)
        self.hidden, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        mixed = self.hidden(self.words(tokens).mean(1) + self.numbers(numbers)).relu()
        return {"logits": self.out(mixed), "score": mixed.sum(1)}


def vit() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2, num_classes=4
    )
    return model


def pruned(model: nn.Module, size: int = 8) -> Result:
    """Half of a model is removed, by the size of the weights, and its batch-norms have statistics."""
    torch.manual_seed(0)
    data = [(torch.randn(6, 3, size, size), torch.arange(6) % 4)]
    model.train()
    model(data[0][0])
    pace = Pace(rounds=1, min_width=1, verify=False)
    return prune(model, data, target="params=0.3", scoring="l2", pace=pace, finetune=0, repair=None)


def run(path: Path, inputs: Any) -> list[Tensor]:
    """What a file gives, by the library that it is for and nothing of ours."""
    if path.suffix == ".onnx":
        session = __import__("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        named = inputs if isinstance(inputs, dict) else dict(zip([i.name for i in session.get_inputs()], inputs))
        return [torch.from_numpy(out) for out in session.run(None, {name: t.numpy() for name, t in named.items()})]
    model: Any = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(path)  # type: ignore[no-untyped-call]
    return list(tensors_in(call_model(model, inputs)))


def need(format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)


@WRITTEN
@pytest.mark.parametrize("make", [Residual, Depthwise, vit])
def test_a_pruned_network_runs_elsewhere_with_any_number_of_examples(make: Any, format: str, tmp_path: Path) -> None:
    need(format)
    size = 32 if make is vit else 8
    result = pruned(make(), size)
    assert result.after.params < result.before.params
    before, path = values_of(result.model), tmp_path / FORMATS[format]
    done = result.export(path)
    assert (done.format, done.batches, done.batch_size, done.real) == (format, (1, 2, 5), None, False)
    assert done.max_error <= done.allowed
    model = result.model.eval()
    for count in (1, 5, 7):
        x = torch.randn(count, 3, size, size)
        (made,), expected = run(path, (x,)), model(x).detach()
        assert made.shape == expected.shape
        assert float((made - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert_same_values(result.model, before)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@WRITTEN
@pytest.mark.parametrize("named", [True, False])
def test_several_inputs_by_position_or_by_name(named: bool, format: str, tmp_path: Path) -> None:
    need(format)
    model, path = Two().eval(), tmp_path / FORMATS[format]
    tokens, numbers = torch.randint(2, 9, (3, 4)), torch.randn(3, 5)
    real: Any = {"tokens": tokens, "numbers": numbers} if named else (tokens, numbers)
    done = export(model, path, example_inputs=real)
    assert done.real
    for count in (1, 5):
        inputs = rows_of(real, count)
        expected = call_model(model, inputs)
        for made, one in zip(run(path, inputs), expected.values(), strict=True):
            torch.testing.assert_close(made, one, rtol=1e-5, atol=1e-5)


def test_the_names_of_what_goes_in_and_comes_out_are_those_of_the_model(tmp_path: Path) -> None:
    need("onnx")
    import onnxruntime

    export(Two(), tmp_path / "a.onnx", example_inputs=(torch.randint(0, 9, (2, 4)), torch.randn(2, 5)), opset=18)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("tokens", ["batch", 4]), ("numbers", ["batch", 5])]
    assert [o.name for o in session.get_outputs()] == ["logits", "score"]


@WRITTEN
def test_one_number_of_examples(format: str, tmp_path: Path) -> None:
    """A network that counts its examples can be exported for one number of them, and for no other."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) * int(x.shape[0]) if int(x.shape[0]) != 4 else self.fc(x)
            return out

    need(format)
    x, path = torch.randn(3, 4), tmp_path / FORMATS[format]
    with pytest.raises(ArtifactError, match=r"Counting cannot be exported.*batch_size= fixes the number of examples"):
        export(Counting(), path, example_inputs=x)
    assert list(tmp_path.iterdir()) == []
    model = Counting()
    done = export(model, path, example_inputs=x, batch_size=3)
    assert (done.batches, done.batch_size) == ((3,), 3)
    torch.testing.assert_close(run(path, (x,))[0], model(x))


@WRITTEN
def test_half_precision_is_compared_with_the_model_as_it_is(format: str, tmp_path: Path) -> None:
    need(format)
    model, path, x = Residual().eval(), tmp_path / FORMATS[format], torch.randn(5, 3, 8, 8)
    done = export(model, path, example_inputs=x, half=True)
    expected = model(x).detach()
    (made,) = run(path, (x.half(),))
    assert made.dtype == torch.float16
    error = float((made.float() - expected).abs().max())
    assert 0 < error <= done.max_error <= done.allowed
    assert model.fc.weight.dtype == torch.float32
    with pytest.raises(ArtifactError, match=r"differs from the model by .* is allowed \(tolerance=1e-07 times"):
        export(model, tmp_path / f"exact{path.suffix}", example_inputs=x, half=True, tolerance=1e-7)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@WRITTEN
def test_what_cannot_be_exported_is_one_error_and_no_file(format: str, tmp_path: Path) -> None:
    need(format)
    path = tmp_path / FORMATS[format]
    path.write_text("what was there before")
    said = f"{path.name} was not written, Branching cannot be exported to {format}: "
    with pytest.raises(ArtifactError, match=said) as caught:
        export(Branching(), path, example_inputs=torch.ones(2, 4))
    assert "\n" not in str(caught.value)
    assert path.read_text() == "what was there before"
    assert len(list(tmp_path.iterdir())) == 1


@WRITTEN
def test_a_file_that_differs_is_not_written(format: str, tmp_path: Path) -> None:
    """The network computes something else while it is exported."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            away = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
            out: Tensor = self.fc(x) + (0.01 if away else 0.0)
            return out

    need(format)
    with pytest.raises(ArtifactError, match=r"the file differs from the model by 1\.0e-02 on \d (random|real) example"):
        export(Other(), tmp_path / FORMATS[format], example_inputs=torch.ones(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_the_older_exporter_writes_what_the_newer_cannot_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need("onnx")
    exporter = torch.onnx.export

    def failing(*args: Any, **options: Any) -> Any:
        if options["dynamo"]:
            raise RuntimeError("no such operator\nand more")
        return exporter(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", failing)
    x, path, model = torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", Residual().eval()
    done = export(model, path, example_inputs=x)
    assert done.way == "torch.onnx.export(dynamo=False)"
    assert done.notes == (
        "torch.onnx.export(dynamo=True) did not do it (RuntimeError: no such operator), "
        "torch.onnx.export(dynamo=False) did",
    )
    assert done.notes[0] in caplog.text
    assert done.notes[0] in str(done)
    torch.testing.assert_close(run(path, (x[:1],))[0], model(x[:1]), rtol=1e-5, atol=1e-5)


def test_weights_that_are_too_large_for_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("onnx")
    monkeypatch.setattr(formats, "LARGEST_ONNX", 1000)
    model, x = Residual().eval(), torch.randn(3, 3, 8, 8)
    export(model, tmp_path / "net.onnx", example_inputs=x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    torch.testing.assert_close(run(tmp_path / "net.onnx", (x,))[0], model(x), rtol=1e-5, atol=1e-5)


def test_masks_are_in_the_weights_that_are_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    singe_plugin.hold_masks(model, {"0.weight": torch.tensor([[True, False, True, False]] * 3)})
    x = torch.randn(3, 4)
    export(model, tmp_path / "net.pt2", example_inputs=x)
    program = torch.export.load(tmp_path / "net.pt2")
    assert list(program.state_dict) == ["0.weight", "0.bias"]
    assert not program.state_dict["0.weight"][:, 1::2].any()
    torch.testing.assert_close(run(tmp_path / "net.pt2", (x,))[0], model(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.bin", {}, r"does not say which format is meant.*onnx \(\.onnx\)"),
        ("net.bin", {"format": "onnx"}, r"net\.bin is no name for onnx; give one that ends with \.onnx"),
        ("net.pt2", {"format": "onxx"}, r"unknown format 'onxx'"),
        ("net.pt2", {"opset": 18}, "opset=18 is of ONNX, and torch-export has none"),
        ("net.pt2", {"batch_size": 0}, "batch_size=0"),
        ("net.pt2", {"tolerance": float("nan")}, "tolerance=nan is no difference"),
        ("net.pt2", {"example_inputs": None}, "what Linear is called with is not known; give example_inputs"),
        ("net.pt2", {"example_inputs": object()}, "example_inputs are not tensors alone"),
        ("net.pt2", {"example_inputs": torch.zeros(0, 4)}, "a batch of at least one example"),
    ],
)
def test_arguments_that_mean_nothing(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export(nn.Linear(4, 2), tmp_path / name, **{"example_inputs": torch.zeros(1, 4), **options})
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_the_model_does_not_take_and_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Linear itself fails on 2 real examples: RuntimeError: mat1 and mat2"):
        export(nn.Linear(4, 2), tmp_path / "a.pt2", example_inputs=torch.zeros(1, 5))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"a\.pt2 cannot be written"):
        export(nn.Linear(4, 2), tmp_path / "file" / "a.pt2", example_inputs=torch.zeros(1, 4))


def test_without_the_packages_of_onnx_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingPackageError, match=r"onnx needs onnxscript.*pip install onnx onnxruntime onnxscript$"):
        export(nn.Linear(4, 2), tmp_path / "a.onnx", example_inputs=torch.zeros(1, 4))


def test_inputs_are_described_and_drawn_again() -> None:
    example = ({"ids": torch.tensor([[3, 9], [4, 5]]), "flag": True}, [torch.zeros(7, dtype=torch.bool)], None)
    described = describe_inputs(example)
    assert are_described(json.loads(json.dumps(described)))
    drawn = random_inputs(described, 50)
    assert drawn[0]["ids"].shape == (50, 2)
    assert (int(drawn[0]["ids"].min()), int(drawn[0]["ids"].max())) == (3, 9)
    assert (drawn[1][0].shape, drawn[1][0].dtype, drawn[0]["flag"], drawn[2]) == ((7,), torch.bool, True, None)
    assert describe_inputs((torch.zeros(1), object())) is None
    for wrong in (3, {"tensor": [2**40], "dtype": "float32", "batched": True}, {"tuple": {}}, {"value": []}, {}):
        assert not are_described(wrong)


def test_the_command_exports_what_it_pruned(tmp_path: Path) -> None:
    result = pruned(timm.create_model("resnet18", num_classes=4, layers=[1, 1, 1, 1], channels=[4, 4, 8, 8]), 16)
    result.builder = singe_plugin.Builder.timm("resnet18", num_classes=4, layers=[1, 1, 1, 1], channels=[4, 4, 8, 8])
    singe_plugin.save(result, tmp_path / "out")
    assert singe_plugin.load(tmp_path / "out").inputs == {"tensor": [2, 3, 16, 16], "dtype": "float32", "batched": True}
    done = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--format", "torch-export", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["path"] == str(tmp_path / "out" / "model.pt2")
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(run(Path(said["path"]), (x,))[0], result.model.eval()(x))
    line = ["export", str(tmp_path / "out"), "--output", str(tmp_path / "x.pt2"), "--format", "onnx"]
    wrong = CliRunner().invoke(main, line)
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert "x.pt2 is no name for onnx" in wrong.stderr


def test_the_command_compares_on_real_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    model = timm.create_model("resnet18", in_chans=1, num_classes=4, layers=[1, 1, 1, 1], channels=[4, 4, 8, 8])
    kinds = {"in_chans": 1, "num_classes": 4, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    x = torch.randn(2, 1, 16, 16)
    metrics = singe_plugin.run.result.Metrics(1, 1)  # type: ignore[attr-defined]
    builder = singe_plugin.Builder.timm("resnet18", **kinds)
    structure: dict[str, Any] = {"attributes": {}, "folded": [], "channels_last": [], "frozen": []}
    result = Result(model, metrics, metrics, builder=builder, structure=structure, inputs=describe_inputs(x))
    singe_plugin.save(result, tmp_path)
    done = run_export(tmp_path, format="torchscript", dataset="digits")
    assert (done.path, done.real, done.batches) == (tmp_path / "model.pt", True, (1, 2, 5))
