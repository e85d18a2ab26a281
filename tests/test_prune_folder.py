"""What a run has written is where another one goes on, and a model may come from where timm reads its arguments."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import nn

import singe_plugin
from singe_plugin import ArtifactError, Builder, ConfigError, Pace
from singe_plugin.app.cli import main
from singe_plugin.app.datasets import data_config
from singe_plugin.app.models import create_model
from singe_plugin.run.architecture import origin_of

from small_nets import Chain, assert_same_values, images

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

TINY: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "num_classes": 10, "in_chans": 1}
KINDS = [f"--model-kwargs={key}={value}" for key, value in TINY.items() if key in ("layers", "channels")]
QUICK = ["--dataset", "digits", "--img-size", "16", "--finetune-steps", "1", "--no-curves", "--no-verify",
         "--criterion", "l2", "--min-width", "1", "--rounds", "1", "--no-repair", "-q"]  # fmt: skip
FAST: dict[str, Any] = {
    "scoring": "l2", "pace": Pace(rounds=1, min_width=1, verify=False), "finetune": 0, "repair": None,
}  # fmt: skip


def singe(*line: Any) -> Result:
    return CliRunner().invoke(main, [str(part) for part in line])


def widths(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the command has written."""
    folder = tmp_path_factory.mktemp("once") / "out"
    done = singe(
        "prune", "--model", "resnet18", "--in-chans", 1, *KINDS, *QUICK, "--target", "params=0.3", "--output", folder
    )
    assert done.exit_code == 0, done.output
    return folder


def test_a_pruned_folder_is_pruned_again(once: Path, tmp_path: Path) -> None:
    first = singe_plugin.load(once)
    out = tmp_path / "again"
    done = singe("prune", "--checkpoint", once, *QUICK, "--target", "params=0.3", "--output", out)
    assert done.exit_code == 0, done.output
    second = singe_plugin.load(out)
    assert second.before.params == first.after.params == sum(p.numel() for p in first.model.parameters())
    assert second.after.params == sum(p.numel() for p in second.model.parameters()) < first.after.params
    assert second.builder == first.builder
    assert all(now <= widths(first.model)[name] for name, now in widths(second.model).items())
    stated = {name.removesuffix(".out_channels") for name, values in second.structure["attributes"].items() if values}
    assert set(first.structure["attributes"]) <= stated
    report = json.loads((out / "report.json").read_text())
    assert report["weights"] == f"pruned model in {once}"
    x = torch.randn(3, 1, 16, 16)
    again = singe_plugin.load(out).model
    assert torch.equal(again(x), second.model(x))
    resumed = singe("prune", "--checkpoint", once, *QUICK, "--target", "params=0.3", "--output", out, "--resume")
    assert (resumed.exit_code, "is finished" in resumed.output) == (0, False)


def test_a_pruned_folder_is_inspected(once: Path) -> None:
    done = singe("inspect", "--checkpoint", once, "--img-size", 16, "--no-verify", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["model"], said["weights"]) == ("resnet18", f"pruned model in {once}")


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (["--checkpoint", "ONCE", "--model", "resnet34"], 1, "holds a pruned resnet18, and --model resnet34 was given"),
        (["--checkpoint", "ONCE", "--num-classes", "3"], 1, "with num_classes=10, and 3 was asked for; leave --num-c"),
        (["--checkpoint", "ONCE", "--in-chans", "3"], 1, "with in_chans=1, and 3 was asked for; leave --in-chans out"),
        (["--checkpoint", "ONCE", "--model-kwargs", "drop_rate=0.5"], 1, "drop_rate=None, and 0.5 was asked for"),
        (["--checkpoint", "EMPTY"], 1, "is a folder without singe.json; --checkpoint takes one that singe prune has"),
        (["--checkpoint", "ONCE", "--pretrained"], 1, "pretrained weights and a checkpoint were both asked for"),
        ([], 2, "Missing option '--model'"),
    ],
)
def test_what_does_not_fit_the_folder(line: list[str], code: int, message: str, once: Path, tmp_path: Path) -> None:
    places = {"ONCE": str(once), "EMPTY": str(tmp_path)}
    done = singe("inspect", *(places.get(part, part) for part in line))
    assert done.exit_code == code
    assert message in " ".join(done.stderr.split())


def test_the_new_result_has_a_folder_of_its_own(once: Path) -> None:
    before = (once / "singe.json").read_bytes()
    done = singe("prune", "--checkpoint", once, *QUICK, "--output", once)
    assert (done.exit_code, "needs a folder of its own" in done.stderr) == (1, True)
    assert (once / "singe.json").read_bytes() == before
    matching = create_model("resnet18", checkpoint=once, num_classes=10, in_chans=1, kwargs={"channels": (4, 4, 8, 8)})
    assert_same_values(matching.model, singe_plugin.load(once).model)


def test_in_python_a_loaded_model_is_pruned_and_saved_again(tmp_path: Path) -> None:
    """Batch-norms are folded the first time only; a copy knows as much as the model."""
    data = [(torch.randn(6, 1, 16, 16), torch.arange(6))]
    model = timm.create_model("resnet18", **TINY)
    first = singe_plugin.prune(model, data, target="params=0.2", fold=True, **FAST)
    first.builder = Builder.timm("resnet18", **TINY)
    singe_plugin.save(first, tmp_path / "one")
    loaded = singe_plugin.load(tmp_path / "one")
    second = singe_plugin.prune(copy.deepcopy(loaded.model), data, target="params=0.3", **FAST)
    singe_plugin.save(second, tmp_path / "two")
    third = singe_plugin.prune(second.model, data, target="params=0.2", **FAST)
    singe_plugin.save(third, tmp_path / "three")
    sizes = [singe_plugin.load(tmp_path / name).after.params for name in ("one", "two", "three")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    x, found = torch.randn(2, 1, 16, 16), singe_plugin.load(tmp_path / "three")
    assert torch.equal(found.model(x), third.model.eval()(x))
    assert found.structure["folded"] == first.structure["folded"] != []
    assert found.builder == first.builder


def test_a_model_of_ones_own_is_pruned_twice_before_it_is_saved(tmp_path: Path) -> None:
    net = Chain()
    first = singe_plugin.prune(net, images(), target="params=0.3", **FAST)
    assert first.builder is None
    second = singe_plugin.prune(first.model, images(), target="params=0.3", **FAST)
    singe_plugin.save(second, tmp_path, builder=Builder.factory("small_nets:Chain"))
    found = singe_plugin.load(tmp_path, trust=True)
    assert_same_values(found.model, second.model)
    assert origin_of(found.model)["builder"]["name"] == "small_nets:Chain"
    assert origin_of(singe_plugin.load(tmp_path, factory=Chain).model)["builder"] is None  # it is not trusted
    assert origin_of(pickle.loads(pickle.dumps(found.model))) == origin_of(found.model)


@pytest.fixture
def local(tmp_path: Path) -> tuple[Path, nn.Module]:
    """What timm's ``local-dir:`` reads: arguments, preprocessing and weights."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18", **TINY)
    config = {
        "architecture": "resnet18", "num_classes": 10, "model_args": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]},
        "pretrained_cfg": {"input_size": [1, 16, 16], "mean": [0.1], "std": [0.7], "num_classes": 10,
                           "first_conv": "conv1", "classifier": "fc", "url": "http://localhost/none"},
    }  # fmt: skip
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder, model


@pytest.mark.parametrize("hub", [False, True])
def test_models_that_timm_reads_from_elsewhere(
    hub: bool, local: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are pruned, and loaded again without what they were read from, with the same preprocessing."""
    folder, model = local
    if hub:

        def download(repo_id: str, filename: str, **options: Any) -> str:
            assert repo_id == "somebody/net"
            if not (folder / filename).is_file():
                raise FileNotFoundError(filename)
            return str(folder / filename)

        monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    name = "hf-hub:somebody/net" if hub else f"local-dir:{folder}"
    made = create_model(name, pretrained=True)
    assert_same_values(made.model, model)
    assert (made.builder.kind, made.builder.name) == ("timm", "resnet18")
    done = singe(
        "prune", "--model", name, "--pretrained", *QUICK, "--target", "params=0.3", "--output", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    resumed = singe(
        "prune", "--model", name, *QUICK, "--target", "params=0.3", "--output", tmp_path / "out", "--resume"
    )
    assert resumed.exit_code == 0, resumed.output
    (folder / "config.json").unlink()
    found = singe_plugin.load(tmp_path / "out")
    assert found.after.params < found.before.params
    config = data_config(found.model)
    assert (config.mean, config.std, config.size, config.channels) == ((0.1,), (0.7,), 16, 1)
    assert "http" not in (tmp_path / "out" / "singe.json").read_text()


@pytest.mark.parametrize("name", ["local-dir:nowhere", "hf-hub:", "local-dir:"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match=r"(timm cannot make|cannot be read)"):
        create_model(name)


def test_a_record_may_not_smuggle_a_place_into_the_preprocessing(local: tuple[Path, nn.Module], tmp_path: Path) -> None:
    made = create_model(f"local-dir:{local[0]}", pretrained=True)
    result = singe_plugin.prune(made.model, [(torch.randn(4, 1, 16, 16), torch.arange(4))], target="params=0.2", **FAST)
    options = made.builder.options
    for key, value in (("file", "/etc/passwd"), ("url", "http://localhost")):
        changed = {**options, "pretrained_cfg_overlay": {**options["pretrained_cfg_overlay"], key: value}}
        singe_plugin.save(result, tmp_path / key, Builder.timm("resnet18", **changed))
        with pytest.raises(ArtifactError, match="'pretrained_cfg_overlay', which makes timm read files"):
            singe_plugin.load(tmp_path / key)
