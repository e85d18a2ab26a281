"""Batches to fine-tune on that are mixed of two examples each: mixup and cutmix, as timm has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import DataError
from singe_plugin.loop.finetune import FineTune, Recipe  # noqa: F401 - the second for the example
from singe_plugin.nested import call_model
from singe_plugin.state import preserved

__all__ = ["Mixing"]


class Mixing:
    """Mixes the examples of a batch; the targets become shares of classes, smoothed as the options say.

    Args:
        options: the fine-tuning, with a ``mixup`` or ``cutmix`` above zero.

    Example:
        >>> import numpy
        >>> numpy.random.seed(0)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> mix = Mixing(FineTune(label_smoothing=0.0, recipe=Recipe(mixup=1.0)))
        >>> mixed, targets = mix(net, (torch.ones(2, 1, 2, 2), torch.arange(2)))
        >>> mixed.shape, targets.shape, targets.sum(1).tolist(), targets[:, 2].tolist()
        (torch.Size([2, 1, 2, 2]), torch.Size([2, 3]), [1.0, 1.0], [0.0, 0.0])
    """

    def __init__(self, options: FineTune) -> None:
        self.options = options
        self._mix: Any = None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """The batch, mixed; of an odd number of examples the last is left out.

        Raises:
            DataError: if it is no batch of images and classes, or has one example.
        """
        images: Any
        classes: Any
        images, classes = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
        tensors = isinstance(images, Tensor) and isinstance(classes, Tensor)
        if not tensors or images.ndim != 4 or classes.ndim != 1 or classes.is_floating_point():
            raise DataError(
                "mixup and cutmix mix pairs (images, classes): a tensor [examples, channels, height, width] and one "
                "whole number for each; the fine-tuning data gives something else: leave them out"
            )
        even = len(images) - len(images) % 2
        if not even:
            raise DataError("mixup and cutmix mix two examples, and a batch of the fine-tuning data has one")
        if self._mix is None:
            from timm.data import Mixup

            self._mix = Mixup(
                self.options.added.mixup, self.options.added.cutmix, label_smoothing=self.options.label_smoothing,
                num_classes=_classes(model, images[:even]),
            )  # fmt: skip
        mixed: tuple[Tensor, Tensor] = self._mix(images[:even].clone(), classes[:even])  # it mixes in place
        return mixed


def _classes(model: nn.Module, images: Tensor) -> int:
    """The number of classes that a model tells apart."""
    with preserved(model), torch.no_grad():
        outputs = call_model(model.eval(), images[:2])
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise DataError("mixup and cutmix need a model that returns one score for each class; leave them out")
    return int(outputs.shape[1])
