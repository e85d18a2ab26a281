r"""A phase of fine-tuning: forward and backward passes of a model whose shapes stay, alone or with other ranks.

Several ranks train through PyTorch's ``DistributedDataParallel``, which is made anew for every phase, for it knows the
shapes of the parameters that it was made with. It adds the ranks' gradients up and divides by their number, so each
rank's loss is weighted first: with :math:`n_r` examples on rank r of R ranks,

.. math:: \frac1R\sum_r\Bigl(R\,\frac{n_r}{\sum_qn_q}\Bigr)\nabla L_r

is the gradient of the mean over the whole batch, where the loss is a mean over examples.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from singe_plugin.errors import DataError, SingeError
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.losses import unmoved
from singe_plugin.loop.stream import BatchStream
from singe_plugin.masks import named_tensors
from singe_plugin.nested import are_images, examples_in, map_tensors, tensors_in, to_device
from singe_plugin.ranks import Division, current
from singe_plugin.state import model_device

__all__ = ["Phase", "precision_of", "rows_of"]

Loss = Callable[[nn.Module, Any], Tensor]
_ALL = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNCS_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ALL else "broadcast_buffers"  # until PyTorch 2.13


def precision_of(options: FineTune, device: torch.device) -> torch.dtype | None:
    """The type that a device computes in by itself; None is that of the tensors."""
    if options.amp == "auto":
        if device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        return torch.bfloat16
    return {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp]


class _Lossy(nn.Module):
    """A model as a module that gives its loss on a batch, which is what is differentiated."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


class Phase:
    """Passes of a model on one batch after the other.

    Args:
        model: the model, in train mode.
        loss: of the model on a batch.
        options: how it is fine-tuned.
        batches: gives one batch after the other.
        scaler: scales the loss in half precision, or None.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, options: FineTune, batches: BatchStream,
        scaler: torch.amp.GradScaler | None,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.options, self.batches, self.scaler = model, loss, options, batches, scaler
        self.accelerator: Any = options.accelerator
        self.ranks, self.device = current(), model_device(model)
        self.division: Division | None = None
        self.net: Any = None
        if self.ranks.world > 1:
            self.ranks.gather("fine-tuning", None)  # all are here
            handler = getattr(self.accelerator, "ddp_handler", None)
            asked = {"find_unused_parameters": True} | ({} if handler is None else handler.to_kwargs())
            # all ranks have the same values, and what statistics became is spread when the phase is over
            asked |= {"init_sync": False, _SYNCS_BUFFERS: False}
            self.net = DistributedDataParallel(_Lossy(model, loss), **asked)
            if handler is not None:
                handler.register_comm_hook(self.net)

    def gradients(self, step: int, lr: float) -> float:
        """Add up the gradients of the next batch, or of as many as an accelerator is to accumulate; the mean loss.

        Args:
            step: the number of the step, from 1.
            lr: its learning rate, for messages.

        Raises:
            DataError: if the loss is not finite, or has no gradient.
        """
        count = 1 if self.accelerator is None else int(self.accelerator.gradient_accumulation_steps)
        values = []
        for number in range(count):
            with nullcontext() if self.net is None or number + 1 == count else self.net.no_sync():
                values.append(self._pass(step * count + number, step, lr))
        return sum(values) / count

    def _pass(self, number: int, step: int, lr: float) -> float:
        batch, examples = self._mine(next(self.batches))
        batch = to_device(batch, self.device, self.options.channels_last)
        with self._cast():
            loss = self._forward(batch, number)
        value = float(loss.detach())  # here: read at the end, it would wait for the backward pass and the optimizer
        if self.ranks.world > 1:
            if not loss.requires_grad:
                raise unmoved(f"it has no gradient at step {step}")
            found = self.ranks.gather("a step", (value, examples))
            total = sum(count for _, count in found)
            value = sum(one * count for one, count in found if count) / total
            loss = loss * (self.ranks.world * examples / total)
        if not math.isfinite(value):
            raise DataError(
                f"the fine-tuning loss is {value} at step {step} of {self.options.steps}; lower lr (now {lr:g}), check "
                "the batches, or set amp=None"
            )
        if not loss.requires_grad:
            raise unmoved(f"it has no gradient at step {step}")
        with self.ranks.unheard():
            if self.accelerator is not None:
                self.accelerator.backward(loss)  # which divides by the number of batches that are accumulated
            else:
                (self.scaler.scale(loss) if self.scaler else loss).backward()  # type: ignore[no-untyped-call]
        return value

    def _mine(self, batch: Any) -> tuple[Any, int]:
        """What this rank takes of a batch, and how many examples that is."""
        if self.ranks.world == 1:
            return batch, 1
        if self.division is None:
            self.division = self.ranks.division(batch)
        if self.division.step == 1:
            return batch, max(examples_in(batch), 1)
        return rows_of(batch, self.division)

    def _forward(self, batch: Any, number: int) -> Tensor:
        """The loss; ranks draw other random numbers, and none of those that batches are drawn with."""
        if self.net is None:
            return self.loss(self.model, batch)
        seed = (torch.initial_seed() + number * self.ranks.world + self.ranks.rank) % 2**63
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            loss: Tensor = self.net(batch)
        return loss

    def _cast(self) -> AbstractContextManager[Any]:
        if self.accelerator is not None:
            context: AbstractContextManager[Any] = self.accelerator.autocast()
            return context
        precision = precision_of(self.options, self.device)
        return torch.autocast(self.device.type, dtype=precision) if precision else nullcontext()

    @contextmanager
    def done(self) -> Iterator[None]:
        """Give all ranks the same values and statistics when the block is over."""
        yield
        self.net = None
        if self.ranks.world > 1:
            averaged = getattr(self.options.ema, "module", self.options.ema)
            models = [self.model, *([averaged] if isinstance(averaged, nn.Module) else [])]
            self.ranks.align("the trained weights", [t for model in models for _, t in named_tensors(model)])


def rows_of(batch: Any, division: Division) -> tuple[Any, int]:
    """Take the examples of one rank out of a batch: every n-th row of each tensor, and of lists with one for each.

    Of fewer examples than ranks, those who get none take the first one, and it counts 0.

    Args:
        batch: as the data gives it.
        division: which examples are taken.

    Returns:
        the batch and the number of examples that count.

    Raises:
        DataError: if it is not clear what belongs to which example.

    Example:
        >>> batch = torch.arange(5), {"labels": torch.arange(5), "scale": torch.tensor(2.0)}
        >>> (x, rest), count = rows_of(batch, Division(1, 2))
        >>> x.tolist(), rest["labels"].tolist(), rest["scale"].item(), count
        ([1, 3], [1, 3], 2.0, 2)
    """
    whole = examples_in(batch)
    rows = division.of(whole)
    chosen = slice(rows.start, whole, rows.step) if rows else slice(0, 1)

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim and len(tensor) != whole:
            raise _undivided(f"a tensor of shape {tuple(tensor.shape)} for {whole} examples")
        return tensor[chosen] if tensor.ndim else tensor

    def listed(value: Any) -> Any:
        each = type(value) is list and value is not batch and len(value) == whole
        if each and (are_images(value) or not any(isinstance(one, Tensor) for one in value)):
            return value[chosen]
        if callable(getattr(value, "to", None)):
            raise _undivided(f"a {type(value).__name__}")
        return None

    if not whole or next(tensors_in(batch), None) is None:
        raise _undivided(f"a {type(batch).__name__} without examples that can be counted")
    return map_tensors(cut, batch, listed), len(rows)


def _undivided(what: str) -> SingeError:
    return DataError(
        f"a batch to fine-tune on is the same on all ranks and cannot be divided: it has {what}; give each rank "
        "batches of its own, by a DataLoader with a torch.utils.data.DistributedSampler"
    )
