"""Data for the command line and the demo: the embedded digits, or what timm opens by name.

The preprocessing is the model's own (timm's ``resolve_data_config`` and ``create_transform``). What is imported
here beyond torch and timm (scikit-learn, Hugging Face's datasets) is imported when it is needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from singe_plugin.checks import check_choice
from singe_plugin.errors import ConfigError, DataError

__all__ = [
    "NO_DATA",
    "TORCHVISION",
    "DataConfig",
    "Splits",
    "data_config",
    "digits",
    "image_folder",
    "load_splits",
    "stratified_split",
]

TORCHVISION = ("torch/cifar10", "torch/cifar100", "torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/qmnist")
NO_DATA = (
    "there is no data: give what the model was trained on, --data-dir FOLDER (one folder of images per class) or "
    f"--dataset {'|'.join(TORCHVISION)} with --data-dir; --dataset digits is for trying things out"
)
_HFDS = "hfds/"
_UNFLIPPABLE = ("torch/mnist", "torch/kmnist", "torch/fashion_mnist", "torch/qmnist")
_VAL = ("val", "validation", "valid", "eval", "test")  # in this order


@dataclass(frozen=True)
class DataConfig:
    """How images become the model's input.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (colour).
        mean, std: one value per channel, for pixels in [0, 1].
        interpolation: of the resizing.
        crop_pct: the part of the resized image that the centre crop keeps.
    """

    size: int = 32
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def transform(self, training: bool, augment: bool = True) -> Any:
        """timm's transform: PIL image -> ``[channels, size, size]``; for training with its augmentation or without."""
        return create_transform(
            (self.channels, self.size, self.size),
            is_training=training and augment,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )


@dataclass(frozen=True)
class Splits:
    """A data source: a training and a validation set of ``(image, class)``.

    Attributes:
        name: what it is, for messages and the report.
        train, val: map-style datasets.
        classes: the number of classes.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: int


def data_config(model: nn.Module, img_size: int | None = None) -> DataConfig:
    """The preprocessing a timm model was made for, at another size if wanted.

    A model with one input channel gets the mean over the three that timm knows.

    Raises:
        ConfigError: if the model takes neither 1 nor 3 channels, or the size means nothing.

    Example:
        >>> import timm
        >>> data_config(timm.create_model("resnet18", in_chans=1), img_size=64).size
        64
    """
    if img_size is not None and img_size < 1:
        raise ConfigError(f"img_size={img_size} is not a number of pixels; give a whole number >= 1")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    if channels not in (1, 3):
        raise ConfigError(f"the model's first convolution takes {channels} channels; images have 1 or 3")
    found = resolve_data_config({} if img_size is None else {"img_size": img_size}, model=model)
    mean, std = tuple(map(float, found["mean"])), tuple(map(float, found["std"]))
    if channels == 1 and len(mean) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    crop_pct = float(found["crop_pct"]) if found["input_size"][-1] > 64 else 1.0
    return DataConfig(int(found["input_size"][-1]), channels, mean, std, str(found["interpolation"]), crop_pct)


def load_splits(
    config: DataConfig,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    seed: int = 0,
    augment: bool = True,
) -> Splits:
    """The data source that the options name.

    Args:
        config: the preprocessing.
        dataset: ``"digits"``, a name of ``TORCHVISION``, ``"hfds/NAME"`` (of Hugging Face's hub, or a folder that
            ``datasets`` opens), ``"folder"``, or None: the folder of ``data_dir``.
        data_dir: the folder of images, or where torchvision or ``datasets`` keep their files.
        download: let them download what is missing.
        seed: of the split where the source has none.
        augment: use timm's training augmentation (never for digits).

    Raises:
        ConfigError: for an unknown name, a missing ``data_dir``, or where nothing is named: a model is never trained on
            data that nobody chose.
        DataError: if the data is not there or not usable.

    Example:
        >>> splits = load_splits(DataConfig(size=8, channels=1, mean=(0.5,), std=(0.5,)), "digits")
        >>> len(splits.train), len(splits.val), splits.train[0][0].shape
        (1297, 500, torch.Size([1, 8, 8]))
    """
    if dataset is None and data_dir is None:
        raise ConfigError(NO_DATA)
    name = dataset or "folder"
    if name == "digits":
        return digits(config, seed=seed)
    if not name.startswith(_HFDS):
        check_choice("dataset", name, ["digits", "folder", *TORCHVISION], f", or {_HFDS}NAME")
    if data_dir is None:
        raise ConfigError(f"dataset {name!r} needs --data-dir, the folder its files are in")
    if name == "folder":
        return image_folder(data_dir, config, seed, augment)
    online = name.startswith(_HFDS) and not Path(name.removeprefix(_HFDS)).exists()
    if online and not download:
        raise DataError(
            f"{name} may have to be downloaded from Hugging Face's hub; give --dataset-download to let it (under "
            "HF_HUB_OFFLINE=1 it is looked for in --data-dir only)"
        )
    train, held_out = _open(name, data_dir, "train", download), "validation"
    if name.startswith(_HFDS):
        splits = train.dataset.info.splits or ["train"]
        held_out = next((split for split in _VAL if split in splits), "")
        if not held_out:
            raise DataError(f"{name} has only the splits {', '.join(splits)}; give one with {' or '.join(_VAL)}")
    val = _open(name, data_dir, held_out, download)
    return _splits(name, train, val, config, augment and name not in _UNFLIPPABLE)


def digits(config: DataConfig, val: int = 500, seed: int = 0) -> Splits:
    """scikit-learn's handwritten digits (1797 real 8x8 grey images, part of the package), scaled up bilinearly.

    Args:
        config: size, channels, mean and std.
        val: the number of validation images; the split is stratified.
        seed: of the split.

    Raises:
        DataError: if scikit-learn is not installed.

    Example:
        >>> digits(DataConfig(size=16, channels=1, mean=(0.5,), std=(0.5,))).classes
        10
    """
    found = _need("sklearn.datasets", "scikit-learn", "scikit-learn").load_digits()
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(found.target, dtype=torch.int64)
    if config.size != images.shape[-1]:
        images = functional.interpolate(images, size=config.size, mode="bilinear", align_corners=False)
    images = images.expand(-1, config.channels, -1, -1)
    shape = (1, config.channels, 1, 1)
    images = (images - torch.tensor(config.mean).view(shape)) / torch.tensor(config.std).view(shape)
    train, held_out = (TensorDataset(images[p], labels[p]) for p in stratified_split(labels.tolist(), val, seed))
    return Splits("digits (scikit-learn)", train, held_out, 10)


def image_folder(directory: str | Path, config: DataConfig, seed: int = 0, augment: bool = True) -> Splits:
    """A folder with one sub-folder of images per class.

    ``DIRECTORY/train`` and ``DIRECTORY/val`` (or ``validation``, ``valid``, ``eval``, and last ``test``) are used if
    they are there; else a fifth of the images, drawn per class with the seed, is the validation set.

    Raises:
        DataError: if the folder or a class is missing, or there is no image; it says what was found.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give --data-dir a folder with one sub-folder of images per class")
    train_dir = root / "train" if (root / "train").is_dir() else root
    val_dir = next((root / name for name in _VAL if train_dir != root and (root / name).is_dir()), None)
    train = _scan(train_dir)
    if val_dir is None:
        parts = stratified_split(train.targets, 0.2, seed)
        return _splits(f"folder {root.name}", train, train, config, augment, parts)
    val = _scan(val_dir)
    if val.classes != train.classes:
        odd = sorted(set(val.classes) ^ set(train.classes))
        raise DataError(
            f"{train_dir} has {len(train.classes)} classes and {val_dir} has {len(val.classes)}; "
            f"{odd[:5]} are in one of them only; give both the same sub-folders"
        )
    return _splits(f"folder {root.name}", train, val, config, augment)


def stratified_split(labels: Sequence[int], val: int | float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split positions in two so that each class has its share in both.

    Args:
        labels: one class per example.
        val: how many go into the second part: a whole number, or a fraction inside ]0, 1[.
        seed: of the draw.

    Returns:
        two sorted lists of positions.

    Raises:
        DataError: if a part would be empty.

    Example:
        >>> stratified_split([0, 0, 0, 0, 1, 1], 3, seed=0)[1].__len__()
        3
    """
    total = len(labels)
    count = round(val * total) if isinstance(val, float) else val
    if not 0 < count < total:
        raise DataError(
            f"{total} examples cannot be split into a training set and {count} for validation; add images, or give "
            "separate train and val folders"
        )
    classes: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        classes.setdefault(int(label), []).append(position)
    shares = {c: count * len(members) / total for c, members in classes.items()}
    taken = {c: int(share) for c, share in shares.items()}
    by_remainder = sorted(classes, key=lambda c: (taken[c] - shares[c], c))
    for c in by_remainder[: count - sum(taken.values())]:
        taken[c] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen: set[int] = set()
    for c in sorted(classes):
        order = torch.randperm(len(classes[c]), generator=generator).tolist()
        chosen.update(classes[c][i] for i in order[: taken[c]])
    return [i for i in range(total) if i not in chosen], sorted(chosen)


def _splits(
    name: str, train: Any, val: Any, config: DataConfig, augment: bool, parts: Sequence[Sequence[int]] | None = None
) -> Splits:
    """Two sources, or the parts of them that are used, as the model's input."""
    first, second = parts or (range(len(train)), range(len(val)))
    training = _Images(train, first, config.transform(True, augment), config)
    return Splits(name, training, _Images(val, second, config.transform(False), config), len(train.class_to_idx))


class _Images(Dataset[Any]):
    """Images of a source that timm opened, converted and transformed.

    timm's own dataset puts the next image in the place of one that cannot be read; here it is an error.
    """

    def __init__(self, source: Any, positions: Sequence[int], transform: Any, config: DataConfig) -> None:
        self.source, self.positions, self.transform = source, positions, transform
        self.mode = "L" if config.channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position = self.positions[index]
        try:
            image, label = self.source[position]
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            image = image.convert(self.mode)
        except OSError as error:
            samples = getattr(self.source, "samples", None)
            where = samples[position][0] if samples else f"example {position}"
            raise DataError(f"{where} cannot be read as an image: {error}; remove or replace it") from error
        return self.transform(image), int(label)


def _open(name: str, root: str | Path, split: str, download: bool) -> Any:
    """A source as timm opens it by name: images (or their files) and classes by number."""
    if name.startswith(_HFDS):
        _need("datasets", "Hugging Face's datasets", "datasets")
    try:
        found = create_dataset(name, str(root), split, download=download)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        remedy = "check the name, the network and the folder" if download else "give --dataset-download to fetch them"
        raise DataError(f"the files of {name} in {root} cannot be used ({error}); {remedy}") from error
    return getattr(found, "reader", found)


def _scan(directory: Path) -> Any:
    try:
        return create_dataset("torch/folder", str(directory), search_split=False)
    except (FileNotFoundError, RuntimeError) as error:
        inside = sorted(p.name for p in directory.iterdir())
        found = f"found {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else "it is empty"
        reason = " ".join(str(error).split())
        raise DataError(
            f"{directory} is no folder of classes ({found}: {reason}); put the images into one sub-folder per class"
        ) from error


def _need(module: str, name: str, package: str) -> Any:
    """Import what is not always installed, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{name} is needed here and cannot be imported ({error}); pip install {package}") from error
