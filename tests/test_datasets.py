"""The data sources: right pixels, right splits, and errors that say what to do."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from singe_plugin.app.datasets import DataConfig, data_config, digits, image_folder, load_splits, stratified_split
from singe_plugin.errors import ConfigError, DataError

GREY = DataConfig(size=8, channels=1, mean=(0.25,), std=(0.5,))


def write_images(directory: Path, classes: dict[str, list[int]], size: int = 12) -> None:
    """One PNG of one grey value per number, in a sub-folder per class."""
    for name, values in classes.items():
        (directory / name).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.new("RGB", (size, size), (value,) * 3).save(directory / name / f"{i}.png")


def test_digits_are_scikit_learns_pixels() -> None:
    found = load_digits()
    splits = digits(GREY, seed=3)
    labels = found.target.tolist()
    train, val = stratified_split(labels, 500, seed=3)
    for dataset, positions in ((splits.train, train), (splits.val, val)):
        assert len(dataset) == len(positions)
        for i in (0, 17, len(positions) - 1):
            image, label = dataset[i]
            expected = (found.images[positions[i]] / 16 - 0.25) / 0.5
            assert np.allclose(image[0].numpy(), expected, atol=1e-6)
            assert int(label) == labels[positions[i]]


def test_digits_scale_up_bilinearly_into_every_channel() -> None:
    small, large = digits(GREY), digits(DataConfig(size=16, channels=3, mean=(0.25,) * 3, std=(0.5,) * 3))
    image, wide = small.train[5][0], large.train[5][0]
    expected = torch.nn.functional.interpolate(image[None], size=16, mode="bilinear", align_corners=False)[0]
    assert wide.shape == (3, 16, 16)
    assert torch.allclose(wide, expected.expand(3, -1, -1), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_split_is_stratified_disjoint_and_complete(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(labels) - 1))
    train, val = stratified_split(labels, count, seed=0)
    assert sorted(train + val) == list(range(len(labels)))
    assert len(val) == count
    for label in set(labels):
        share = count * labels.count(label) / len(labels)
        assert abs(sum(labels[i] == label for i in val) - share) < 1
    assert (train, val) == stratified_split(labels, count, seed=0)


def test_split_depends_on_the_seed_and_refuses_empty_parts() -> None:
    labels = [0, 1] * 20
    assert stratified_split(labels, 0.2, seed=0) != stratified_split(labels, 0.2, seed=1)
    with pytest.raises(DataError, match="1 examples cannot be split"):
        stratified_split([0], 1)


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": [0, 64], "dog": [128]})
    write_images(tmp_path / "validation", {"cat": [255], "dog": [51]})
    splits = image_folder(tmp_path, GREY, augment=False)
    assert splits.classes == 2
    assert [(label, round(image.mean().item(), 4)) for image, label in splits.train] == [
        (0, -0.5),
        (0, round((64 / 255 - 0.25) / 0.5, 4)),
        (1, round((128 / 255 - 0.25) / 0.5, 4)),
    ]
    assert [(label, round(image.mean().item(), 4)) for image, label in splits.val] == [(0, 1.5), (1, -0.1)]
    assert splits.val[0][0].shape == (1, 8, 8)


def test_folder_without_val_is_split_per_class(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": [0] * 10, "b": [255] * 5})
    splits = load_splits(GREY, data_dir=tmp_path, augment=False)
    assert (len(splits.train), len(splits.val)) == (12, 3)
    assert sorted(label for _, label in splits.val) == [0, 0, 1]


@pytest.mark.parametrize(
    ("held_out", "used"),
    [
        ("val", "val"),
        ("valid", "valid"),
        ("eval", "eval"),
        ("test", "test"),
        ("test val", "val"),
        ("test eval", "eval"),
    ],
)
def test_the_held_out_folder_has_many_names(tmp_path: Path, held_out: str, used: str) -> None:
    """And ``test`` is only taken where there is nothing else."""
    write_images(tmp_path / "train", {"a": [0, 0], "b": [0, 0]})
    for name in held_out.split():
        write_images(tmp_path / name, {"a": [255 if name == used else 0], "b": [255 if name == used else 0]})
    splits = image_folder(tmp_path, GREY, augment=False)
    assert (len(splits.train), len(splits.val)) == (4, 2)
    assert all(image.mean().item() == pytest.approx(1.5) for image, _ in splits.val)


def test_a_folder_that_hugging_faces_datasets_opens(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_images(tmp_path / "images" / "train", {"cat": [0, 64], "dog": [128]})
    name = f"hfds/{tmp_path / 'images'}"
    with pytest.raises(DataError, match="has only the splits train"):
        load_splits(GREY, name, tmp_path / "cache")
    write_images(tmp_path / "images" / "test", {"cat": [255], "dog": [51]})
    splits = load_splits(GREY, name, tmp_path / "cache", augment=False)
    assert (splits.classes, len(splits.train)) == (2, 3)
    assert [(label, round(image.mean().item(), 4)) for image, label in splits.val] == [(0, 1.5), (1, -0.1)]


def test_what_hugging_face_has_is_not_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--dataset-download"):
        load_splits(GREY, "hfds/mnist", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_splits(GREY, "hfds/mnist", tmp_path, download=True)


def test_augmentation_changes_training_images_only(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    splits = image_folder(tmp_path, DataConfig(size=8))
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.val[0][0], splits.val[0][0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "is not a folder"),
        (lambda root: root.mkdir(), "it is empty"),
        (lambda root: (root / "a").mkdir(parents=True), "found a"),
        (lambda root: (write_images(root / "train", {"a": [1]}), write_images(root / "val", {"b": [1]})), "'a', 'b'"),
        (lambda root: write_images(root, {"a": [1]}), "cannot be split"),
    ],
)
def test_unusable_folders(tmp_path: Path, make: object, message: str) -> None:
    root = tmp_path / "images"
    make(root)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        image_folder(root, GREY)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": [1]})
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"not an image")
    write_images(tmp_path / "val", {"a": [1]})
    splits = image_folder(tmp_path, GREY)
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        splits.train[0]


def test_torchvision_by_timms_name(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 28, 28), dtype=np.uint8)
    for prefix, count in (("train", 6), ("t10k", 2)):
        images, labels = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
        images.write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels[:count].tobytes())
        labels.write_bytes(struct.pack(">II", 0x801, count) + bytes(range(count)))
    config = DataConfig(size=28, channels=1, mean=(0.5,), std=(0.5,))
    splits = load_splits(config, "torch/mnist", tmp_path)
    assert (len(splits.train), len(splits.val), splits.classes) == (6, 2, 10)
    image, label = splits.train[4]
    assert label == 4
    assert torch.allclose(image[0], torch.from_numpy(pixels[4] / 255).float() * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dataset": "imagenet"},
            ConfigError,
            "unknown dataset 'imagenet'; choose one of digits, folder",
        ),
        ({"dataset": "torch/cifar10"}, ConfigError, "needs --data-dir"),
        ({"dataset": "torch/cifar10", "data_dir": "nowhere"}, DataError, "--dataset-download"),
    ],
)
def test_unusable_options(tmp_path: Path, arguments: dict[str, str], error: type[Exception], message: str) -> None:
    if "data_dir" in arguments:
        arguments = {**arguments, "data_dir": str(tmp_path)}
    with pytest.raises(error, match=message):
        load_splits(GREY, **arguments)  # type: ignore[arg-type]


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits(GREY)


def test_data_config_is_timms() -> None:
    model = timm.create_model("resnet18")
    resolved = timm.data.resolve_data_config({}, model=model)
    config = data_config(model)
    assert (config.size, config.channels) == (resolved["input_size"][-1], 3)
    assert (config.mean, config.std, config.crop_pct) == (resolved["mean"], resolved["std"], resolved["crop_pct"])
    grey = data_config(timm.create_model("resnet18", in_chans=1), img_size=32)
    assert grey.mean == (pytest.approx(sum(resolved["mean"]) / 3),)
    with pytest.raises(ConfigError, match="takes 4 channels"):
        data_config(timm.create_model("resnet18", in_chans=4))
    with pytest.raises(ConfigError, match="img_size=0"):
        data_config(model, 0)
