"""Damaged files, at random: refused in one line, or loaded to what was saved; and nothing that they name is run."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from singe_plugin import Builder, Result, load, prune, save
from singe_plugin.app.cli import main
from singe_plugin.errors import ArtifactError
from singe_plugin.files import describe, seal
from singe_plugin.integrations.unstructured import prune_weights
from singe_plugin.run import checkpoint
from singe_plugin.run.artifact import read

from asked import asked
from killed import RUNS
from small_nets import Chain, StopAt, assert_same_values, images

BATCHES = images()
FAST: dict[str, Any] = {"nodes": 1, "finetune_steps": 2}
CHAIN = Builder.factory("small_nets:Chain")
RECORD, TENSORS, MASKS = "singe.json", "model.safetensors", "masks.safetensors"


def write(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "units":
        return save(prune(Chain(), BATCHES, **asked(verify=False, fold=True, **FAST)), folder, CHAIN)
    return save(prune_weights(Chain(), BATCHES, **asked(sparsity=0.7, rounds=1, **FAST)), folder, CHAIN)


@pytest.fixture(scope="module", params=["units", "weights"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = write(tmp_path_factory.mktemp(request.param), request.param)
    return folder, load(folder, trust=True)


def assert_same_result(one: Result, other: Result) -> None:
    assert_same_values(one.model, other.model)
    assert_same_values(one.weight_masks, other.weight_masks)
    assert str(one.model) == str(other.model)
    for name in ("before", "after", "layers", "left_whole", "options", "versions", "builder", "structure", "history"):
        assert getattr(one, name) == getattr(other, name), name


# --- bytes ------------------------------------------------------------------------------------------------------


def spoil(data: bytes, draw: random.Random) -> bytes:
    """One accident: flipped bits, zeros, a part that is missing, twice there, moved, or other bytes."""
    size = len(data)
    at, length = draw.randrange(size), draw.choice([1, 4, 32, 400])
    kind = draw.choice(["flip", "flip", "zero", "cut", "short", "double", "noise", "swap", "append"])
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 8])):
            changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return bytes(changed)
    end = min(size, at + length)
    part = data[at:end]
    other = draw.randrange(size)
    return {
        "zero": data[:at] + bytes(len(part)) + data[end:],
        "cut": data[:at],
        "short": data[:at] + data[end:],
        "double": data[:end] + part + data[end:],
        "noise": data[:at] + draw.randbytes(len(part)) + data[end:],
        "swap": data[:at] + data[other : other + len(part)] + data[end:],
        "append": data + part,
    }[kind]


# --- values -----------------------------------------------------------------------------------------------------

ODD = [None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "os:system", [], {}, [[[[0]]]], {"tuple": 3}]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested lists and dictionaries: ``(container, key)``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def edit(record: Any, draw: random.Random) -> Any:
    """One value is another one, is gone, is negative, is nested, has changed places, or has company."""
    record = copy.deepcopy(record)
    part = record if draw.random() < 0.5 else {k: record[k] for k in draw.sample(list(record), 2)}  # history is long
    found = places(part)
    (holder, key), (other, its) = draw.choice(found), draw.choice(found)
    kind = draw.choice(["odd", "odd", "odd", "gone", "minus", "deep", "swap", "more"])
    old = holder[key]
    if kind == "odd":
        holder[key] = draw.choice(ODD)
    elif kind == "gone":
        del holder[key]
    elif kind == "minus":
        holder[key] = -old if isinstance(old, (int, float)) else [old]
    elif kind == "deep":
        for _ in range(draw.choice([3, 200])):
            old = [old]
        holder[key] = old
    elif kind == "swap":
        holder[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(old)
    else:
        (holder if isinstance(holder, dict) else record)[draw.choice(["forward", "_modules", "more"])] = old
    return {**record, **{k: v for k, v in part.items() if k in record}}


def refused_or(action: Callable[[], Any]) -> Any:
    """What comes out, or None where it was refused: by one clear error of one line."""
    try:
        return action()
    except ArtifactError as error:
        text = str(error)
    assert "\n" not in text.strip()
    return None


def copied(folder: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target))


@pytest.mark.parametrize("how", ["bytes", "values"])
def test_a_damaged_result_is_refused_or_is_the_result(how: str, saved: tuple[Path, Result], tmp_path: Path) -> None:
    folder, whole = saved
    refused = 0
    for seed in range(75):
        draw = random.Random(seed)
        broken = copied(folder, tmp_path / "broken")
        path = broken / draw.choice([RECORD, *(p.name for p in folder.iterdir())] if how == "bytes" else [RECORD])
        if how == "bytes":
            path.write_bytes(spoil(path.read_bytes(), draw))
        else:
            path.write_text(json.dumps(edit(json.loads(path.read_text()), draw), indent=draw.choice([None, 2])))
        loaded = refused_or(lambda broken=broken: load(broken, trust=True))
        refused += loaded is None
        if loaded is not None:
            assert_same_result(loaded, whole)
        shown = refused_or(lambda broken=broken: read(broken))
        assert loaded is None or shown.history == whole.history
    assert refused > 60
    path = copied(folder, tmp_path / "broken") / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))  # other white space is no damage
    assert_same_result(load(path.parent, trust=True), whole)


def test_a_record_that_was_changed_on_purpose_breaks_nothing(saved: tuple[Path, Result], tmp_path: Path) -> None:
    """With a right checksum, too: an error of one line, or the same tensors, and methods that are the class's."""
    folder, whole = saved
    refused = 0
    for seed in range(150):
        draw = random.Random(seed)
        path = copied(folder, tmp_path / "broken") / RECORD
        record = json.loads(path.read_text())
        del record["checksum"]
        changed = edit({k: v for k, v in record.items() if k != "history"}, draw)  # what is in there are words only
        changed["history"] = record["history"]
        path.write_text(json.dumps(seal(changed)))
        loaded = refused_or(lambda path=path: load(path.parent, factory=Chain))
        if loaded is None:
            refused += 1
            continue
        assert_same_values(loaded.model, whole.model)
        for module in loaded.model.modules():
            plain = {k for k in module.__dict__ if k[0] != "_"} - {"training"}
            assert not any(callable(getattr(type(module), key, None)) for key in plain)
    assert refused > 60


def test_a_record_beside_the_tensors_of_another_result(of_chain: Path) -> None:
    tensors = load_file(of_chain / TENSORS)
    tensors["fc.bias"][0] += 1
    save_file(tensors, of_chain / TENSORS)
    with pytest.raises(ArtifactError, match=r"belongs to another result than singe.json: 'fc.bias' has another"):
        load(of_chain, trust=True)


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        RUNS[6](folder, StopAt("round_done", 3))
    return folder / checkpoint.CHECKPOINT


def test_a_damaged_checkpoint_is_refused_or_is_the_checkpoint(stopped: Path, tmp_path: Path) -> None:
    fingerprint = checkpoint._read(stopped)[0]["fingerprint"]
    record, tensors = checkpoint.read_checkpoint(stopped, fingerprint)
    refused = 0
    for seed in range(150):
        path = tmp_path / "broken"
        path.write_bytes(spoil(stopped.read_bytes(), random.Random(seed)))
        found = refused_or(lambda path=path: checkpoint.read_checkpoint(path, fingerprint))
        assert checkpoint.is_checkpoint(path) == (found is not None)
        refused += found is None
        if found is not None:
            assert found[0] == record
            assert_same_values(found[1], tensors)
    assert refused > 120


def test_a_checkpoint_that_was_changed_on_purpose_is_one_error_at_most(stopped: Path, tmp_path: Path) -> None:
    shutil.copy(stopped, tmp_path)
    record, tensors = checkpoint._read(stopped)
    for key, value in {
        "finetune": {"state": {"conv9": {}}, "done": 0}, "rng": {"python": 3}, "progress": {}, "history": 5,
        "extra": {"before": {"size": 1}}, "finetune ": 1,
    }.items():  # fmt: skip
        changed = seal({**record, key: value, "tensors": describe(tensors)})
        save_file(tensors, tmp_path / checkpoint.CHECKPOINT, metadata={"singe": json.dumps(changed)})
        if key == "finetune ":
            RUNS[6](tmp_path)  # what nobody reads does not matter
            continue
        with pytest.raises(ArtifactError):
            RUNS[6](tmp_path)


# --- by the command ---------------------------------------------------------------------------------------------


def one_line(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    return lines[-1]


def test_damaged_results_are_one_line_each(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole", "weights")
    for seed in range(16):
        broken = copied(folder, tmp_path / "broken")
        path = broken / [RECORD, TENSORS, MASKS][seed % 3]
        data = path.read_bytes()
        draw = random.Random(seed)
        at = draw.randrange(len(data) // 2, len(data) - 200)
        path.write_bytes(data[:at] + bytes(b ^ 0x41 for b in data[at : at + 100]) + data[at + 100 :])
        assert str(path) in one_line("report", broken, "--json")
        assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in folder.iterdir())


def test_damaged_checkpoints_are_one_line_each(stopped: Path, tmp_path: Path) -> None:
    data = stopped.read_bytes()
    command = ("prune", "--model", "test_resnet", "--dataset", "digits", "--img-size", 16, "--no-curves", "--quiet",
               "--no-verify", "--device", "cpu", "--resume", "--output", tmp_path)  # fmt: skip
    for broken in (b"", data[:-1], data[:-40] + bytes(40), data[:200] + b"x" + data[201:]):
        (tmp_path / checkpoint.CHECKPOINT).write_bytes(broken)
        assert "start anew in another folder, or delete it" in one_line(*command)


# --- trust ------------------------------------------------------------------------------------------------------


def resealed(folder: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads((folder / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(seal({k: v for k, v in record.items() if k != "checksum"})))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of timm's, and one of a factory."""
    folder = tmp_path_factory.mktemp("made")
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    data = [(torch.randn(4, 1, 32, 32), torch.arange(4) % 3)]
    save(prune(model, data, **asked(verify=False, criterion="l2", finetune_steps=0, rounds=1)), folder / "timm")
    write(folder / "chain", "units")
    return folder


@pytest.fixture
def of_timm(made: Path, tmp_path: Path) -> Path:
    return copied(made / "timm", tmp_path / "of_timm")


@pytest.fixture
def of_chain(made: Path, tmp_path: Path) -> Path:
    return copied(made / "chain", tmp_path / "of_chain")


BUILDERS: dict[str, tuple[dict[str, Any], str]] = {
    "a program": ({"kind": "factory", "name": "os:system", "options": {"command": "touch ran"}}, "'os:system', code"),
    "a function": ({"kind": "factory", "name": "builtins:exec", "options": {}}, "code that load.. would import"),
    "an import": ({"kind": "factory", "name": "antigravity:fly", "options": {}}, "code that load.. would import"),
    "a hub": ({"kind": "timm", "name": "hf-hub:timm/resnet18", "options": {}}, "none of timm's own names"),
    "a hub, again": ({"kind": "timm", "name": "hf_hub:timm/resnet18", "options": {}}, "none of timm's own names"),
    "a folder": ({"kind": "timm", "name": "local-dir:/tmp/x", "options": {}}, "none of timm's own names"),
    "no model": ({"kind": "timm", "name": "resnet81", "options": {}}, "none of timm's own names"),
    "a pickle": (
        {"kind": "timm", "name": "test_resnet", "options": {"checkpoint_path": "x.pth"}}, "'checkpoint_path', which",
    ),
    "an address": (
        {"kind": "timm", "name": "test_resnet", "options": {"pretrained_cfg": {"url": "http://x"}}}, "'pretrained_cfg'",
    ),
    "another kind": ({"kind": "eval", "name": "1", "options": {}}, "unknown kind of builder 'eval'"),
    "terabytes": (
        {"kind": "timm", "name": "test_resnet", "options": {"num_classes": 10**11}}, "far larger than what was saved",
    ),
    "without end": (
        {"kind": "timm", "name": "resnet18", "options": {"layers": [10**9] * 4, "channels": [1] * 4}}, "far larger",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_runs_that_a_file_names(
    name: str, of_timm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, message = BUILDERS[name]
    resealed(of_timm, lambda record: record.update(builder=builder))
    monkeypatch.chdir(tmp_path)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("code of the file's choice was run")

    for module, attribute in ((os, "system"), (torch, "load"), (torch.hub, "load_state_dict_from_url")):
        monkeypatch.setattr(module, attribute, forbidden)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    with pytest.raises(ArtifactError, match=message):
        load(of_timm)
    result = CliRunner().invoke(main, ["report", str(of_timm)])  # which builds nothing at all
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "ran").exists()


def test_what_is_trusted_is_built(of_timm: Path, of_chain: Path) -> None:
    assert load(of_timm).model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
    folder = of_chain
    with pytest.raises(ArtifactError, match=r"pass factory=.*or trust=True if you trust who wrote the folder"):
        load(folder)
    assert_same_values(load(folder, trust=True).model, load(folder, factory=Chain).model)
    with pytest.raises(ArtifactError, match="ZeroDivisionError"):
        load(folder, factory=lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ArtifactError, match="int was made of it"):
        load(folder, factory=lambda: 1)  # type: ignore[arg-type,return-value]


ATTRIBUTES: dict[str, tuple[str, Any, str]] = {
    "forward": ("forward", 1, "'conv1.forward' to 1, and the architecture has <function"),
    "train": ("train", None, "'conv1.train'"),
    "_modules": ("_modules", {"dict": {}}, "'conv1._modules', which is no attribute that a removal"),
    "__class__": ("__class__", "x", "'conv1.__class__', which is no attribute"),
    "training": ("training", True, "'conv1.training', which is no attribute"),
    "weight": ("weight", 1, "'conv1.weight', which is a tensor or a layer"),
    "T_destination": ("T_destination", 1, "'conv1.T_destination'"),
    "no groups": ("groups", 0, "'conv1.groups' to 0"),
    "negative groups": ("groups", -1, "'conv1.groups' to -1"),
    "other groups": ("groups", 3, "'conv1.(in_channels|groups)' to"),
    "a wrong width": ("out_channels", 7, "'conv1.out_channels' to 7, which does not fit the tensors"),
    "a text": ("out_channels", "7", "'conv1.out_channels' to '7', and the architecture has 8"),
    "a flag": ("out_channels", True, "'conv1.out_channels' to True"),
    "a list": ("stride", [1, 1], r"'conv1.stride' to \[1, 1\]"),
    "no tuple": ("stride", {"tuple": 1}, "neither a tuple nor a dict"),
    "floats": ("stride", {"tuple": [1.5, 1]}, r"'conv1.stride' to \(1.5, 1\)"),
    "nan": ("more", float("nan"), "'conv1.more' to nan"),
    "huge": ("out_channels", 10**30, "'conv1.out_channels' to 10"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_take_the_place_of_their_kind(name: str, of_chain: Path) -> None:
    key, value, message = ATTRIBUTES[name]
    folder = of_chain
    resealed(folder, lambda record: record["structure"]["attributes"]["conv1"].update({key: value}))
    built: list[Chain] = []

    def factory() -> Chain:
        built.append(Chain())
        return built[0]

    with pytest.raises(ArtifactError, match=message):
        load(folder, factory=factory)
    if "does not fit the tensors" not in message and name != "other groups":
        assert str(built[0].conv1) == str(Chain().conv1)  # nothing was set before all was checked
        assert built[0].conv1.weight.shape == Chain().conv1.weight.shape


TENSOR_DAMAGE: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "wider": ("fc.weight", lambda t: torch.cat([t] * 8, 1), "pruning does not make that of it"),
    "flat": ("conv1.weight", torch.flatten, "pruning does not make that of it"),
    "empty": ("conv1.weight", lambda t: t[:0], "pruning does not make that of it"),
    "whole numbers": ("conv1.weight", lambda t: t.long(), "int64 .* and the architecture has float32"),
    "nan": ("fc.bias", lambda t: t * float("nan"), "'fc.bias' has values that are not finite, and had none"),
    "gone": ("fc.bias", lambda t: None, "lacks 1 tensors of the architecture, the first is 'fc.bias'"),
    "narrower": ("conv2.weight", lambda t: t[:1], "'conv2.out_channels' to"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_DAMAGE)
def test_tensors_have_to_fit(name: str, of_chain: Path) -> None:
    tensor, change, message = TENSOR_DAMAGE[name]
    folder = of_chain
    tensors = load_file(folder / TENSORS)
    changed = change(tensors.pop(tensor))
    if changed is not None:
        tensors[tensor] = changed.contiguous()
    save_file(tensors, folder / TENSORS)
    resealed(folder, lambda record: record.update(tensors=describe(tensors)))
    with pytest.raises(ArtifactError, match=message):
        load(folder, factory=Chain)


def test_values_that_were_not_finite_when_they_were_saved_are_loaded(tmp_path: Path) -> None:
    result = prune(Chain(), BATCHES, **asked(verify=False, **FAST))
    with torch.no_grad():
        result.model.fc.bias[0] = float("inf")
    assert bool(load(save(result, tmp_path, CHAIN), trust=True).model.fc.bias.isinf().any())
