"""A saved model is loaded bit for bit, without pickle, and damage is noticed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from singe_plugin import Builder, FineTune, Result, load, prune, save
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.files import seal, write_atomically
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner

from asked import asked
from references import Net
from small_nets import Chain, Dense, assert_same_values, images

FAST: dict[str, Any] = {
    "verify": False, "criterion": "l2", "units_per_step": "layer", "finetune_steps": 2, "target": "params=0.4",
}  # fmt: skip


def pictures(channels: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, channels, size, size, generator=generator), torch.arange(4) % 3)]


def timm_result(name: str, data: Any, builder: Builder | None = None, **options: Any) -> Result:
    result = prune(timm.create_model(name, num_classes=3, **options), data, **asked(**FAST))
    result.builder = builder or result.builder
    return result


def chain_result(model: nn.Module | None = None, factory: str = "small_nets:Chain", **options: Any) -> Result:
    made = {"dropout": 0.5} if model is None else {}
    model = Chain(dropout=0.5) if model is None else model
    result = prune(model, images(), **asked(**{**FAST, **options}))
    result.builder = Builder.factory(factory, **made)
    return result


def mixed() -> Chain:
    """A factory that a user might write: frozen layers, and tensors that the state dict leaves out."""
    model = Chain()
    model.conv1.weight.requires_grad_(False)
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    return model


def bf16() -> Chain:
    return Chain().to(torch.bfloat16)


def last_channels() -> Chain:
    return Chain().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def bf16_result() -> Result:
    data = [(x.to(torch.bfloat16), y) for x, y in images()]
    result = prune(bf16(), data, **asked(**FAST))
    result.builder = Builder.factory("test_artifact:bf16")
    return result


RESULTS: dict[str, Callable[[], Result]] = {
    "resnet10t": lambda: timm_result("resnet10t", pictures(1), in_chans=1),
    "mobilenetv2_035": lambda: timm_result("mobilenetv2_035", pictures(3)),
    "test_convnext": lambda: timm_result("test_convnext", pictures(3)),
    "test_resnet, told": lambda: timm_result(
        "test_resnet", pictures(3), Builder.timm("test_resnet", num_classes=3, global_pool="max"), global_pool="max"
    ),
    "factory": chain_result,
    "concat": lambda: chain_result(Dense(), "small_nets:Dense", target="params=0.41"),
    "frozen": lambda: chain_result(mixed(), "test_artifact:mixed"),
    "folded": lambda: chain_result(fold=True),
    "channels_last": lambda: chain_result(last_channels(), "test_artifact:last_channels"),
    "bf16": bf16_result,
}


def example_of(result: Result) -> Tensor:
    first = next(m for m in result.model.modules() if isinstance(m, nn.Conv2d))
    inputs = images() if first.in_channels == 2 else pictures(first.in_channels)
    return inputs[0][0].to(first.weight.dtype)


@pytest.mark.parametrize("name", RESULTS)
def test_round_trip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = RESULTS[name]()
    assert abs(result.removed_params - 0.4) <= 0.02

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was used")

    for module, attribute in [
        (torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"),
        (pickle, "Pickler"), (pickle, "Unpickler"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, attribute, forbidden)
    folder = save(result, tmp_path / "out" / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "singe.json"]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    loaded = load(folder, trust=result.builder.kind == "factory")
    assert torch.equal(torch.get_rng_state(), state)

    assert_same_values(loaded.model, result.model)
    assert not any(module.training for module in loaded.model.modules())
    with torch.no_grad():
        x = example_of(result)
        assert torch.equal(loaded.model(x), result.model.eval()(x))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in result.model.parameters()]
    assert [t.stride() for t in loaded.model.parameters()] == [t.stride() for t in result.model.parameters()]
    assert str(loaded.model) == str(result.model)
    for field in ("before", "after", "layers", "left_whole", "options", "versions", "builder", "structure"):
        assert getattr(loaded, field) == getattr(result, field), field
    assert loaded.history.rows == result.history.rows
    assert loaded.history.removals() == result.history.removals()
    assert loaded.summary() == result.summary()


def test_a_loaded_model_can_be_pruned_again_trained_and_saved(tmp_path: Path) -> None:
    first = load(save(chain_result(), tmp_path / "one"), trust=True)
    model = first.model.train()
    second = SInGEPruner(
        model, images()[0][0][:2], SInGEImportance().bind(model, images()), **asked(target="params=0.3",
        units_per_step="layer", finetune=FineTune(images(), 5)),
    ).run()  # fmt: skip
    assert second.params[0] == first.after.params
    assert abs(1 - second.params[1] / second.params[0] - 0.3) <= 0.01
    assert model(images()[0][0]).shape == (8, 3)


def test_a_factory_in_place_of_the_recorded_builder(tmp_path: Path) -> None:
    result = chain_result()
    folder = save(result, tmp_path)
    resealed(lambda r: r["builder"].update(name="a_module_that_is_gone:Chain"))(folder)
    with pytest.raises(ArtifactError, match=r"a_module_that_is_gone.*cannot be built"):
        load(folder, trust=True)
    assert_same_values(load(folder, factory=Chain).model, result.model)


# --- builders ---------------------------------------------------------------------------------------------------


def test_the_builder_of_a_timm_model_is_found() -> None:
    assert Builder.infer(timm.create_model("test_resnet", num_classes=7, in_chans=1)) == Builder.timm(
        "test_resnet", num_classes=7, in_chans=1
    )
    assert Builder.infer(timm.create_model("test_resnet")) == Builder.timm("test_resnet", num_classes=1000)
    assert Builder.infer(Chain()) is None


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"drop_rate": 0.3}, {"act_layer": "silu"}], ids=str)
def test_options_that_change_no_tensor_are_noticed(options: dict[str, Any]) -> None:
    """A builder that guessed wrong would load another function with the same weights."""
    model = timm.create_model("test_resnet", num_classes=3, **options)
    assert Builder.infer(model) is None
    with pytest.raises(ArtifactError, match=r"modules differ, the first is .*give the options it was made with"):
        Builder.timm("test_resnet", num_classes=3).check(model)
    Builder.timm("test_resnet", num_classes=3, **options).check(model)


def test_a_builder_that_builds_something_else_is_refused_before_saving(tmp_path: Path) -> None:
    wider = prune(Chain(widths=(16, 12, 8)), images(), **asked(**FAST))
    with pytest.raises(ArtifactError, match=r"small_nets:Chain .*does not build the unpruned model.*'conv1"):
        save(wider, tmp_path / "never", builder=Builder.factory("small_nets:Chain"))
    result = prune(Chain(), images(), **asked(**FAST))
    assert result.builder is None
    with pytest.raises(ArtifactError, match=r"small_nets:Dense .*does not build the unpruned model"):
        save(result, tmp_path / "never", builder=Builder.factory("small_nets:Dense"))
    assert not (tmp_path / "never").exists()
    save(result, tmp_path, builder=Builder.factory("small_nets:Chain"))
    assert_same_values(load(tmp_path, trust=True).model, result.model)


@pytest.mark.parametrize("name", ["Chain", "a:b:c", ":f", "m:", ""])
def test_names_of_factories(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not of the form 'package.module:function'"):
        Builder.factory(name)


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(chain_result(), tmp_path_factory.mktemp("saved"))


def edited(change: Callable[[Any], Any], close: Callable[[Any], Any] = lambda record: record) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        record = json.loads((folder / "singe.json").read_text())
        changed = change(record)
        (folder / "singe.json").write_text(json.dumps(close(record if changed is None else changed)))

    return act


def resealed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """What somebody does on purpose: with a checksum that is right."""
    return edited(change, lambda record: seal({k: v for k, v in record.items() if k != "checksum"}))


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return act


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["conv2.weight"]
    save_file(tensors, folder / "model.safetensors")


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no record": (lambda f: (f / "singe.json").unlink(), r"singe\.json does not exist.*save\(\) wrote"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
    "record cut": (cut("singe.json", 0.5), r"singe\.json is damaged"),
    "record empty": (cut("singe.json", 0), r"singe\.json is damaged"),
    "record binary": (lambda f: (f / "singe.json").write_bytes(b"\x80\x04\xff"), r"singe\.json is damaged"),
    "tensors cut": (cut("model.safetensors", 0.7), r"model\.safetensors is damaged"),
    "tensors header": (cut("model.safetensors", 0.01), r"model\.safetensors is damaged"),
    "foreign json": (lambda f: (f / "singe.json").write_text('{"model": 1}'), "has format None"),
    "json list": (lambda f: (f / "singe.json").write_text("[1, 2]"), "has format None"),
    "only a format": (lambda f: (f / "singe.json").write_text('{"format": 2}'), "its checksum is not that"),
    "later format": (edited(lambda r: r.update(format=99)), "has format 99, this version reads format 2"),
    "another number": (edited(lambda r: r["after"].update(params=1)), r"singe\.json is damaged: its checksum is not"),
    "no structure": (resealed(lambda r: r.pop("structure") and None), r"damaged: the record lacks 'structure'"),
    "more": (resealed(lambda r: r.update(code="os:system")), r"the record has an unknown 'code'"),
    "odd structure": (resealed(lambda r: r.update(structure=3)), "damaged: the record has 'structure': 3"),
    "odd builder": (resealed(lambda r: r["builder"].update(more=1)), "damaged: the record has 'builder'"),
    "odd metrics": (resealed(lambda r: r.update(before={"size": 1})), "damaged: the record has 'before'"),
    "negative": (resealed(lambda r: r["after"].update(params=-1)), "damaged: the record has 'after'"),
    "more left": (resealed(lambda r: r["layers"][0].update(units_after=99)), "damaged: the record has 'layers'"),
    "other model": (resealed(lambda r: r["builder"].update(name="small_nets:Dense", options={})), "no module 'conv1'"),
    "gone module": (resealed(lambda r: r["structure"]["attributes"].update(conv9={"x": 1})), "no module 'conv9'"),
    "lost tensor": (drop_tensor, "'conv2.weight' has another checksum there"),
    "deep": (lambda f: (f / "singe.json").write_text("[" * 10**5 + "]" * 10**5), "damaged: RecursionError"),
    "rather deep": (edited(lambda r: r.update(options=nested(100))), "nested more than 64 deep"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    assert load(folder, trust=True).after.params > 0
    act, message = DAMAGE[damage]
    act(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder, trust=True)


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    result = prune(Chain(), images(), **asked(**FAST))
    with pytest.raises(ArtifactError, match=r"Chain cannot be rebuilt.*Builder\.factory"):
        save(result, tmp_path / "x")
    result.builder, result.options["odd"] = Builder.factory("small_nets:Chain"), object()
    with pytest.raises(ArtifactError, match="not plain JSON"):
        save(result, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda p: _write(p, "old"))

    def fail(p: Path) -> None:
        p.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def test_sizes_kept_in_lists_and_tuples_are_restored(tmp_path: Path) -> None:
    result = prune(splitting(), images(), **asked(**{**FAST, "target": "params=0.41"}))
    result.builder = Builder.factory("test_artifact:splitting")
    assert result.structure["attributes"]["norm"] == {"normalized_shape": {"tuple": [7]}}
    loaded = load(save(result, tmp_path), trust=True)
    x = images()[0][0]
    assert torch.equal(loaded.model(x), result.model.eval()(x))


def splitting() -> nn.Module:
    """A convolution whose output is normalised over its channels, with the shape kept in a tuple."""
    return Net(_normalised, conv=nn.Conv2d(2, 12, 3, padding=1), norm=nn.LayerNorm(12), fc=nn.Linear(12, 3))


def _normalised(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(m.norm(m.conv(x).mean((2, 3)))))  # type: ignore[no-any-return]
