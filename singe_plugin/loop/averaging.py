"""The moving average of the weights while they are fine-tuned, which the network ends with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from singe_plugin.masks import named_tensors

__all__ = ["Average"]


class Average:
    """timm's exponential moving average of a model, with the warm-up of its decay; it is pruned along as an ``ema`` is.

    Args:
        model: what is averaged; a copy of it is.
        decay: of the average, once it is warm.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = Average(net, 0.5)
        >>> for step, value in enumerate((1.0, 2.0), 1):
        ...     _ = net.weight.data.fill_(value)
        ...     average.ema.update(net, step)
        >>> average.give_to(net)
        >>> 1.0 < float(net.weight) < 2.0
        True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        from timm.utils import ModelEmaV3

        self.ema: Any = ModelEmaV3(model, decay=decay, use_warmup=True)

    def give_to(self, model: nn.Module) -> None:
        """Put the average's values into the model, whose parameters and buffers stay the same objects."""
        held = dict(named_tensors(self.ema.module))
        with torch.no_grad():
            for name, tensor in named_tensors(model):
                tensor.copy_(held[name])
