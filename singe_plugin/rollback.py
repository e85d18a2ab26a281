"""All or nothing: what changes a model, put back if it fails, together with what changes along."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from singe_plugin.state import RngState, train_mode_of
from singe_plugin.undo import Contents

__all__ = ["Rewinding", "Snapshot", "Trackers", "all_or_nothing", "remembered", "swap_data"]


class Rewinding(Protocol):
    """What knows by itself how to go back: the groups of a model, a fine-tuning."""

    def rewinder(self) -> Callable[[], None]:
        """Return a function that puts everything back to where it is now, but for what tensors and attributes hold."""


@dataclass
class Trackers:
    """What has to be cut along with the model.

    Attributes:
        optimizers: any ``torch.optim`` optimizers over the model's parameters.
        emas: models with the same module names (or wrappers with a ``.module``, such as timm's ``ModelEmaV3``).
    """

    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    emas: list[nn.Module] = field(default_factory=list)

    def ema_models(self) -> list[nn.Module]:
        """Take the averaged models out of their wrappers."""
        inner = [getattr(e, "module", e) for e in self.emas]
        return [m if isinstance(m, nn.Module) else e for m, e in zip(inner, self.emas, strict=True)]


class Snapshot:
    """The structure (and on request the values) of a model, its graph and its trackers, to go back to.

    What is put back are the same objects with the same content, whatever can be reached from them.

    Args:
        model: the model.
        graph: its graph, if it has one.
        modules: the modules that may change; None means the whole model.
        trackers: optimizers and EMA copies that may change.
        values: also copy the values, so that training steps can be undone too.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Rewinding | None = None,
        modules: Collection[nn.Module] | None = None,
        trackers: Trackers | None = None,
        values: bool = False,
    ) -> None:
        trackers = trackers or Trackers()
        chosen: list[nn.Module] | None = None
        roots: list[Any] = [model, *trackers.emas]
        if modules is not None:
            averaged = trackers.ema_models()
            names = [name for name, module in model.named_modules() if module in modules] if averaged else []
            chosen = [*modules, *(ema.get_submodule(name) for ema in averaged for name in names)]
            roots = list(chosen)
        roots += [vars(optimizer) for optimizer in trackers.optimizers]
        self.contents = Contents(roots, chosen, math.inf if values else 0, parameters=values)
        self.tensors = [(t, t.data) for t in self.contents.tensors.values()]
        self.rewind = None if graph is None else graph.rewinder()

    def restore(self) -> None:
        """Put everything back."""
        for tensor, data in self.tensors:
            if not _same_memory(tensor, data):
                tensor.grad = None  # of another shape; the content's record has the old one
                swap_data(tensor, data)
        self.contents.restore()
        if self.rewind is not None:
            self.rewind()


def _same_memory(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor has this data, in this form."""
    now = tensor.data
    if now.dtype != data.dtype or now.device != data.device or now.shape != data.shape:
        return False
    return data.layout == torch.strided and not data.is_meta and bool(now.is_set_to(data))


def swap_data(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor data of another shape.

    Autograd caches the shape of a leaf in its gradient accumulator, which a graph may keep alive; going through
    another dtype makes it drop the cache.
    """
    if tensor.requires_grad:
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def remembered(
    model: nn.Module, trackers: Trackers, parts: Iterable[Rewinding | None], values: bool = True
) -> Callable[[], None]:
    """Return what puts everything back to where it is now: the same objects with the same content, and random states.

    Args:
        model: the model, copied with its values.
        trackers: optimizers and averaged copies that change along.
        parts: what knows by itself how to go back, in the order in which it does.
        values: whether model and trackers are put back; if not, somebody else does that.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> back = remembered(layer, Trackers(), ())
        >>> _ = nn.init.zeros_(layer.weight)
        >>> back()
        >>> bool(layer.weight != 0)
        True
    """
    rng = RngState.capture()
    undo = Snapshot(model, trackers=trackers, values=True) if values else None
    rewinders = [part.rewinder() for part in parts if part is not None]

    def back() -> None:
        if undo is not None:
            undo.restore()
        for rewind in rewinders:
            rewind()
        rng.restore()

    return back


_open: list[set[int]] = []  # of every block that is being run, the ids of what it puts back


@contextmanager
def all_or_nothing(
    model: nn.Module, finetune: Rewinding | None, trackers: Trackers, graph: Rewinding | None = None
) -> Iterator[None]:
    """Put model, graph, optimizer, EMA, scheduler, loader and random states back if the block fails.

    The modes of the modules are put back in any case. The values of all weights are copied once: in a block inside of
    another one that puts back the same model and trackers, a failure leaves them to that one, which it goes through.

    Args:
        model: the model.
        finetune: the fine-tuning that runs in the block, and is prepared in it: an optimizer that is made there goes.
        trackers: optimizers and averaged copies that change along.
        graph: the groups of the model, if units are removed.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> try:
        ...     with all_or_nothing(layer, None, Trackers()):
        ...         _ = nn.init.zeros_(layer.eval().weight)
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     bool(layer.weight != 0), layer.training
        (True, True)
    """
    covered = {id(thing) for thing in (model, *trackers.optimizers, *trackers.emas)}
    again = any(covered <= others for others in _open)
    modes, back = train_mode_of(model), remembered(model, trackers, (graph, finetune), values=not again)
    _open.append(covered)
    try:
        yield
    except BaseException:
        back()
        raise
    finally:
        _open.remove(covered)
        for module, training in modes.items():
            module.training = training
