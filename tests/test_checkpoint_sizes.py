"""The number of classes, and of input channels, that a checkpoint has: nobody needs to say it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from singe_plugin.app.cli import main
from singe_plugin.app.models import create_model
from singe_plugin.errors import ArtifactError

State = dict[str, Tensor]
SHAPE = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8}
KWARGS = [part for key, value in SHAPE.items() for part in ("--model-kwargs", f"{key}={value}")]
OTHER = timm.create_model("resnet18", num_classes=3, **SHAPE).state_dict()


def state(classes: int = 3, channels: int = 3) -> State:
    torch.manual_seed(1)
    found: State = timm.create_model("resnet18", num_classes=classes, in_chans=channels, **SHAPE).state_dict()
    return found


def singe(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six images."""
    root = tmp_path_factory.mktemp("images")
    for number, label in enumerate("abc"):
        (root / label).mkdir()
        for i in range(6):
            Image.new("RGB", (20, 20), (40 * i, 90 * number, 100)).save(root / label / f"{i}.png")
    return root


FORMS: dict[str, Callable[[State], Any]] = {
    "plain.pth": lambda s: s,
    "timm.pth": lambda s: {"state_dict": s, "epoch": 3},
    "model.pth": lambda s: {"model": s},
    "ema.pth": lambda s: {"state_dict": OTHER, "state_dict_ema": s},
    "ddp.pth": lambda s: {"state_dict": {f"module.{name}": tensor for name, tensor in s.items()}},
    "bare.safetensors": lambda s: s,
}


@pytest.mark.parametrize("form", FORMS)
def test_classes_are_read_off_every_form(tmp_path: Path, form: str) -> None:
    held = FORMS[form](state(classes=3, channels=1))
    save_file(held, tmp_path / form) if form.endswith("safetensors") else torch.save(held, tmp_path / form)
    if form == "ema.pth":  # the other weights in it have three channels, and are not looked at
        assert OTHER["conv1.weight"].shape[1] == 3
    made = create_model("resnet18", checkpoint=tmp_path / form, kwargs=SHAPE)
    assert made.sizes == {"num_classes": 3, "in_chans": 1}
    assert {k: made.builder.options[k] for k in made.sizes} == made.sizes
    expected = state(classes=3, channels=1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.model.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext2", "deit_tiny_distilled_patch16_224"])
def test_other_families_and_two_classifiers(tmp_path: Path, name: str) -> None:
    trained = timm.create_model(name, num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    made = create_model(name, checkpoint=tmp_path / "w.pth")
    assert made.sizes == {"num_classes": 7}
    assert made.model.num_classes == 7
    assert all(torch.equal(a, b) for a, b in zip(made.model.state_dict().values(), trained.state_dict().values()))
    if "distilled" in name:
        held = trained.state_dict()
        torch.save(held | {"head_dist.weight": torch.zeros(5, 192)}, tmp_path / "odd.pth")
        with pytest.raises(ArtifactError, match=r"contradicts itself: 'head.weight' is for 7 and 'head_dist.weight'"):
            create_model(name, checkpoint=tmp_path / "odd.pth")


def test_what_was_trained_as_usual_is_left_as_usual(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", **SHAPE).state_dict(), tmp_path / "w.pth")
    made = create_model("resnet18", checkpoint=tmp_path / "w.pth", kwargs=SHAPE)
    assert made.sizes == {}
    assert "num_classes" not in made.builder.options


def test_the_readmes_command(tmp_path: Path, images: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    command = ["prune", "--model", "resnet18", *KWARGS, "--checkpoint", tmp_path / "w.safetensors", "--img-size", 32]
    command += ["--finetune-steps", 1, "--rounds", 1, "--no-repair", "--no-curves", "--device", "cpu", "-b", 4]
    command += ["--criterion", "l2", "--min-width", 1, "--output", tmp_path / "out"]
    done = singe(*command, "--data-dir", images)
    assert done.exit_code == 0, done.output
    assert "note: 3 classes, as " in done.stdout
    found = singe("inspect", "--model", "resnet18", *KWARGS, "--checkpoint", tmp_path / "w.safetensors", "--json")
    assert json.loads(found.stdout)["from_checkpoint"] == {"num_classes": 3}
    two = shutil.copytree(images, tmp_path / "two", ignore=shutil.ignore_patterns("c"))
    for arguments, message in (
        (["--data-dir", two], "was trained for 3 classes, and folder two has 2; give the data"),
        (["--data-dir", images, "--num-classes", 2], "has 3 classes ('fc.weight'), and 2 were asked for; leave --num-"),
        (["--data-dir", images, "--in-chans", 1], "has 3 input channels ('conv1.weight'), and 1 were asked for"),
    ):
        wrong = singe(*command, *arguments)
        assert wrong.exit_code == 1
        (line,) = wrong.stderr.strip().splitlines()
        assert message in line
