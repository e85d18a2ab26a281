"""Trained networks and their images, for the benchmarks.

A network is ``resnet56`` (``cifar_resnet.py``) or any timm name; a timm network that sees 32 x 32 images gets a stem of
stride 1. ``NAME_converged`` is the same network with weights of its own, trained for longer. Its weights are a
safetensors file, or timm's own. Images are an ``.npz`` of JPEG files, torchvision's CIFAR-10
(``torch/cifar10:FOLDER``) or a folder of classes (``FOLDER/train`` and ``FOLDER/val``, as ImageNet's).
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from singe_plugin.app.datasets import data_config, load_splits, stratified_split
from singe_plugin.run.staging import resolve_device

from cifar_resnet import MEAN, STD, decode, resnet56

__all__ = ["HELD_OUT", "Augmented", "Setting", "architecture", "load_setting", "setting_options"]

HELD_OUT = 5000  # training images that neither scoring nor fine-tuning sees: what choices are made on


@dataclass
class Setting:
    """A trained network and its images.

    Attributes:
        name: of the network.
        make: a new copy, trained, in eval mode, on the GPU if there is one.
        train: images to score and fine-tune on, augmented.
        held_out: training images for choices.
        test: for the tables.
        data: what the images are, in words.
        classes: how many.
        weights: which ones, in words: the file's name and the start of its SHA-256.
    """

    name: str
    make: Callable[[], nn.Module]
    train: Dataset[Any]
    held_out: Dataset[Any]
    test: Dataset[Any]
    data: str
    classes: int
    weights: str = ""


class Augmented(Dataset[Any]):
    """Images with random crops (4 pixels of padding) and flips, as He et al. 2016 train on CIFAR-10."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.padded, self.labels, self.size = nn.functional.pad(images, (4, 4, 4, 4)), labels, images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A loader's batch at once; the same draws as one after the other."""
        drawn = torch.randint(0, 18, (len(indices), 3)).tolist()
        padded, size = self.padded.numpy(), self.size
        images = torch.empty(len(indices), padded.shape[1], size, size)
        for image, index, (top, left, flip) in zip(images.numpy(), indices, drawn, strict=True):
            cut = padded[index, :, top % 9 : top % 9 + size, left % 9 : left % 9 + size]
            image[:] = cut[..., ::-1] if flip < 9 else cut
        return list(zip(images, self.labels[torch.tensor(indices)], strict=True))


class Resized(Dataset[Any]):
    """Images as an ImageNet network takes them: bilinear to a size, mean and deviation 0.5."""

    def __init__(self, images: Dataset[Any], size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.images[index]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        larger = nn.functional.interpolate(image[None], (self.size, self.size), mode="bilinear")[0]
        return (larger * std + mean - 0.5) / 0.5, label


def architecture(name: str, classes: int, small_images: bool, pretrained: bool = False) -> nn.Module:
    """The network before its weights are loaded."""
    name = name.removesuffix("_converged")
    if name == "resnet56":
        return resnet56()
    model = timm.create_model(name, num_classes=classes, pretrained=pretrained)
    if small_images:
        stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        stem.stride = (1, 1)
    return model


def setting_options(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    """The options that say which setting :func:`load_setting` loads.

    Args:
        parser: they are added to it.
        needed: whether the data must be given.
    """
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--weights", help="a safetensors file; default: timm's pretrained weights")
    data = "an .npz of JPEG files, torch/cifar10:FOLDER, or an image folder"
    parser.add_argument("--data", required=needed, help=data)
    parser.add_argument("--size", type=int, help="resize the images of an .npz")
    parser.add_argument("--test-images", type=int, help="fewer, for a rehearsal; not for results")


def load_setting(
    name: str, weights: str | None, data: str, images: int | None = None, size: int | None = None
) -> Setting:
    """A network with its images.

    Args:
        name: ``resnet56`` or a timm name.
        weights: a safetensors file; None: as timm gives it, pretrained.
        data: see the module.
        images: fewer test and held-out images, for a rehearsal.
        size: of the images of an ``.npz``, where the network takes larger ones.
    """
    if data.endswith(".npz"):
        pixels, labels = decode(data, "train")
        cut, classes, text = len(labels) - HELD_OUT, 10, "JPEG CIFAR-10"
        train: Dataset[Any] = Augmented(pixels[:cut], labels[:cut])
        held_out: Dataset[Any] = TensorDataset(pixels[cut:], labels[cut:])
        test: Dataset[Any] = TensorDataset(*decode(data, "test"))
    else:
        kind, _, folder = data.partition(":") if data.startswith("torch/") else ("folder", "", data)
        config = data_config(architecture(name, 10, False), 32 if kind.startswith("torch/cifar") else None)
        loud, plain = (load_splits(config, kind, folder, augment=augment) for augment in (True, False))
        classes, text = loud.classes, loud.name
        targets = [int(label) for label in _targets(loud.train)]
        first, second = stratified_split(targets, min(HELD_OUT, len(targets) // 10), 0)
        train, held_out, test = Subset(loud.train, first), Subset(plain.train, second), plain.val
    if images is not None:
        held_out, test = (Subset(d, range(min(images, len(d)))) for d in (held_out, test))  # type: ignore[arg-type]
    if size is not None:
        train, held_out, test = (Resized(part, size) for part in (train, held_out, test))
        text = f"{text} at {size} px"
    small = test[0][0].shape[-1] <= 32

    def make() -> nn.Module:
        model = architecture(name, classes, small, pretrained=weights is None)
        if weights is not None:
            model.load_state_dict(load_file(weights))
        return model.eval().to(resolve_device(None))

    return Setting(name, make, train, held_out, test, text, classes, fingerprint(weights))


def fingerprint(weights: str | None) -> str:
    """A file of weights in words, so that rows of two networks are not taken for those of one."""
    if weights is None:
        return "timm's"
    return f"{Path(weights).name} (SHA-256 {hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]})"


def _targets(dataset: Any) -> list[int]:
    """The classes of a dataset of the library, without reading its images."""
    return [dataset.source.targets[i] for i in dataset.positions]
