"""Nothing in front of a layer changes while the layer decays: compute it once per batch.

During the first pass, the outputs of modules that finish before the first decaying weight is read are kept; in the
passes that follow they are returned instead of being computed again. Only the outermost such modules are kept, and
only those that are called once, leave their inputs alone and return new memory. A weight is read when its layer runs,
or when anybody else takes its values (``F.linear(x, self.fc.weight)`` in another module).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singe_plugin.nested import copied, tensors_in

__all__ = ["Given", "PrefixCache", "Readings", "is_new", "is_plain", "may_be_given"]

_MISSING = object()
_NO_VALUES = frozenset(
    {
        "size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "element_size", "get_device", "__len__", "type", "data_ptr", "storage_offset",
    }
)  # fmt: skip


class Readings(TorchFunctionMode):
    """Notices when the values of some parameters are used, wherever that is, and tells which, by ``id``."""

    def __init__(self, parameters: set[int], read: Callable[[set[int]], None]) -> None:
        super().__init__()
        self.parameters, self.read = parameters, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        values = next(tensors_in(out), None) is not None if name == "__get__" else name not in _NO_VALUES
        found = self.parameters.intersection(id(t) for t in tensors_in((args, kwargs))) if values else None
        if found:
            self.read(found)
        return out


class PrefixCache:
    """Records one forward pass of a model, then short-cuts what ran before the given layers.

    Use as a context manager around all passes over one batch; leaving it takes everything out again.

    Args:
        model: in eval mode.
        layers: the modules whose parameters will change between passes.

    Example:
        >>> first, last = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Linear(2, 2)
        >>> net = torch.nn.Sequential(first, last)
        >>> with PrefixCache(net, [last]) as cache:
        ...     before = net(torch.ones(1, 2))
        ...     cache.seal()
        ...     (cache.kept == [first], torch.equal(net(torch.ones(1, 2)), before))
        (True, True)
        >>> "forward" in first.__dict__
        False
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.model = model
        self.layers = set(layers)
        self.kept: list[nn.Module] = []
        self._started = False
        self._calls: dict[nn.Module, int] = {}
        self._outputs: dict[nn.Module, Any] = {}
        self._inputs: dict[nn.Module, list[tuple[Tensor, int]]] = {}
        self._handles: list[Any] = []
        self._given = Given()
        own = {id(p) for layer in self.layers for p in layer._parameters.values() if p is not None}
        self._readings: Readings | None = Readings(own, self._read)
        self._inside = False  # the model's forward: who moves the weights along the path reads them, too

    def _read(self, _: set[int]) -> None:
        self._started = self._started or self._inside

    def _enter(self, *_: Any) -> None:
        self._inside = True

    def _leave(self, *_: Any) -> None:
        self._inside = False

    def __enter__(self) -> PrefixCache:
        self._handles.append(self.model.register_forward_pre_hook(self._enter))
        self._handles.append(self.model.register_forward_hook(self._leave, always_call=True))
        for module in self.model.modules():
            kept = may_be_given(module)
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            if kept:
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        if self._readings is not None:
            self._readings.__enter__()  # type: ignore[no-untyped-call]
        return self

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        self._inputs[module] = [(t, t._version) for t in tensors_in((args, kwargs))]
        if module in self.layers:
            self._started = True

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = self._inputs.pop(module, [])
        if self._started or not is_plain(output) or any(t.requires_grad for t in tensors_in(output)):
            return  # an output with a gradient depends on what decays
        if not is_new(output, inputs):
            return
        for inner in module.modules():
            self._outputs.pop(inner, None)
        self._outputs[module] = copied(output)

    def cancel(self) -> None:
        """Stop recording and keep nothing."""
        self._unhook()
        self._outputs.clear()

    def seal(self) -> None:
        """End the recording pass: from now on the kept outputs are returned. Calling it again does nothing."""
        if not self._handles:
            return
        self._unhook()
        if not self._started:
            self._outputs.clear()
        for module, output in self._outputs.items():
            if self._calls[module] == 1:
                self._given.give(module, output)
                self.kept.append(module)
        self._outputs.clear()

    def _unhook(self) -> None:
        if self._readings is not None:
            self._readings.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._readings = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def __exit__(self, *_: object) -> None:
        self._unhook()
        self._given.back()
        self._outputs.clear()


class Given:
    """Modules that give out what was kept of them instead of running."""

    def __init__(self) -> None:
        self._forwards: list[tuple[nn.Module, Any]] = []

    def give(self, module: nn.Module, output: Any) -> None:
        """Let a module return copies of an output (what follows may work in place)."""
        self._forwards.append((module, module.__dict__.get("forward", _MISSING)))
        module.__dict__["forward"] = lambda *_, **__: copied(output)

    def back(self) -> None:
        """Let all of them run again."""
        for module, forward in reversed(self._forwards):
            if forward is _MISSING:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
        self._forwards.clear()


def may_be_given(module: nn.Module) -> bool:
    """Whether a module can return what was kept: no user's hook changes its output, and it is not scripted."""
    return not (module._forward_hooks or module._forward_pre_hooks or isinstance(module, torch.jit.ScriptModule))


def is_new(output: Any, inputs: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether a module left its inputs alone, each with the version it had, and gives new memory."""
    if any(t._version != version for t, version in inputs):
        return False  # it works in place: what else holds its input must see that in every pass
    memory = {t.untyped_storage().data_ptr() for t, _ in inputs}
    # a view or the input itself: what follows in place would have to reach the input
    return not any(t.untyped_storage().data_ptr() in memory for t in tensors_in(output))


def is_plain(output: Any) -> bool:
    """Whether something is a tensor, or a flat list or tuple of tensors."""
    if isinstance(output, (tuple, list)):
        return type(output) in (tuple, list) and all(isinstance(t, Tensor) for t in output)
    return isinstance(output, Tensor)
