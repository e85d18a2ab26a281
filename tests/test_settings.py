"""Where the tables' networks and images come from."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import cifar_resnet
import settings

COLOURS = [(20 * i, 255 - 20 * i, 128) for i in range(12)]


def plain(colour: tuple[int, ...], size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@pytest.fixture
def jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 plain images in each split, image i of class i % 3."""
    files = []
    for colour in COLOURS:
        stream = io.BytesIO()
        plain(colour).save(stream, "JPEG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_jpeg"] = np.concatenate(files)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(12, dtype=np.uint8) % 3
    np.savez(tmp_path / "images.npz", **arrays)
    monkeypatch.setattr(settings, "HELD_OUT", 4)
    return tmp_path / "images.npz"


def colour_of(image: torch.Tensor) -> torch.Tensor:
    """Of the middle, in [0, 255], with the normalisation undone."""
    mean, std = torch.tensor(cifar_resnet.MEAN), torch.tensor(cifar_resnet.STD)
    return 255 * (image[:, 16, 16] * std + mean)


def test_jpeg_images_are_split_and_normalised(jpegs: Path) -> None:
    torch.manual_seed(0)
    setting = settings.load_setting("resnet56", None, str(jpegs))
    assert [len(d) for d in (setting.train, setting.held_out, setting.test)] == [8, 4, 12]
    for images, first in ((setting.train, 0), (setting.held_out, 8), (setting.test, 0)):
        for position in range(4):
            image, label = images[position]
            wanted = torch.tensor(COLOURS[first + position], dtype=torch.float)
            assert torch.allclose(colour_of(image), wanted, atol=4)  # JPEG rounds
            assert label == (first + position) % 3


def test_a_batch_of_crops_is_what_its_images_are_one_by_one() -> None:
    images = settings.Augmented(torch.randn(20, 3, 32, 32), torch.arange(20))
    torch.manual_seed(1)
    together = images.__getitems__([3, 19, 0, 3])
    torch.manual_seed(1)
    for index, (image, label) in zip([3, 19, 0, 3], together, strict=True):
        top, left, flip = torch.randint(0, 18, (3,)).tolist()
        cut = images.padded[index, :, top % 9 : top % 9 + 32, left % 9 : left % 9 + 32]
        assert torch.equal(image, cut.flip(-1) if flip < 9 else cut)
        assert label == index
    torch.manual_seed(1)
    assert all(torch.equal(images[i][0], image) for i, (image, _) in zip([3, 19, 0, 3], together, strict=True))


def test_a_network_has_the_weights_of_its_file_and_the_row_says_which(jpegs: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = cifar_resnet.resnet56().state_dict()
    save_file(state, tmp_path / "net.safetensors")
    setting = settings.load_setting("resnet56", str(tmp_path / "net.safetensors"), str(jpegs), images=3)
    first, second = setting.make(), setting.make()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert first.conv1.weight.data_ptr() != second.conv1.weight.data_ptr()
    digest = hashlib.sha256((tmp_path / "net.safetensors").read_bytes()).hexdigest()
    assert setting.weights == f"net.safetensors (SHA-256 {digest[:12]})"
    assert len(setting.test) == 3
    assert settings.load_setting("resnet56", None, str(jpegs)).weights == "timm's"


def test_a_folder_of_classes(tmp_path: Path) -> None:
    """Choices are made on training images that are not trained on; the tests are the folder's own."""
    for split, count in (("train", 20), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                plain((number, 0, 0), 40).save(tmp_path / split / name / f"{number}.png")
    weights = tmp_path / "net.safetensors"
    save_file(settings.architecture("mobilenetv2_035", 2, False).state_dict(), weights)
    setting = settings.load_setting("mobilenetv2_035", str(weights), str(tmp_path))
    assert isinstance(setting.train, Subset)
    assert isinstance(setting.held_out, Subset)
    assert sorted([*setting.train.indices, *setting.held_out.indices]) == list(range(40))
    assert sorted(label for _, label in setting.held_out) == [0, 0, 1, 1]
    assert sorted(label for _, label in setting.test) == [0, 0, 0, 1, 1, 1]
    image = setting.test[0][0]
    assert image.shape == (3, 224, 224)
    assert setting.make()(image[None]).shape == (1, setting.classes) == (1, 2)
    assert next(m for m in setting.make().modules() if isinstance(m, nn.Conv2d)).stride == (2, 2)
