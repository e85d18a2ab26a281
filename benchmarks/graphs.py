"""Fine-tuning steps of small networks on a GPU without their launches: forward and backward pass as one CUDA graph.

A step of a narrow ResNet-56 is a thousand kernels of a few microseconds each, and launching them one by one takes
longer than running them. The numbers are those of the same step launched one by one, to rounding.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from singe_plugin.loop.distill import Distill
from singe_plugin.loop.distillation import distillation

__all__ = ["GraphedLoss", "graphed_loss"]


class _Net(nn.Module):
    """Holds the model, so that its own ``forward`` is left alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found = self.model(images)
        assert isinstance(found, Tensor)
        return found


class GraphedLoss:
    """A ``step_fn``: the cross-entropy, by a graph that is captured anew whenever the model was cut.

    Args:
        label_smoothing: of the cross-entropy.
        teacher: whose logits are learned from, too, as :class:`singe_plugin.Distill` does by default; or None.
    """

    def __init__(self, label_smoothing: float = 0.1, teacher: nn.Module | None = None) -> None:
        self.label_smoothing, self.teacher = label_smoothing, teacher
        self.of: Any = None
        self.net: Any = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        state = (tuple((p.data_ptr(), p.shape) for p in (*model.parameters(), *model.buffers())), images.shape)
        if state != self.of:
            self.of, self.net = state, None  # the old graph goes first
            try:
                self.net = self._captured(model, images)
            except RuntimeError as error:
                warnings.warn(f"no graph, kernels one by one: {error}", stacklevel=2)
                self.net = model
        logits = self.net(images)
        hard = functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return hard
        with torch.no_grad():
            theirs = self.teacher(images)
        usual = Distill()
        return (1 - usual.weight) * hard + usual.weight * distillation(logits, theirs, usual.temperature)

    @staticmethod
    def _captured(model: nn.Module, images: Tensor) -> Any:
        """The model's graph; what warming up does to the running statistics is undone."""
        # capturing makes the nodes that add up gradients on a stream of its own, which is as it should be
        quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if quiet is not None:
            quiet(False)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        device = images.device.type
        # inside a graph a cast that was kept would belong to the graph before
        with torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        ):
            captured = torch.cuda.make_graphed_callables(_Net(model), (images.clone(),))
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        return captured


def graphed_loss(label_smoothing: float = 0.1, teacher: nn.Module | None = None) -> GraphedLoss | None:
    """A graphed loss where there is a GPU; None, the library's own step, where not."""
    return GraphedLoss(label_smoothing, teacher) if torch.cuda.is_available() else None
