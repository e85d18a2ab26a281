"""What runs when in a forward pass, so that many layers can be scored without computing twice what is in front of them.

A layer that decays changes nothing of what ran before it. One plain pass says when every module began and ended and
when each parameter was read for the first time; the layers are then taken in that order, and each pass starts from the
results that the one before has left (:class:`Prefix`): in front of a layer only the way from the layer before is
computed. Kept are the outermost modules that ended in time, were called once, leave their inputs alone and return new
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from singe_plugin.computed import computed_in
from singe_plugin.method.prefix import Given, Readings, is_new, is_plain, may_be_given
from singe_plugin.nested import copied, tensors_in

__all__ = ["Prefix", "Timeline"]


class Timeline:
    """When modules began and ended and parameters were read in one forward pass.

    Args:
        model: in eval mode.
        run: the forward pass.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> line = Timeline(net, lambda: net(torch.ones(1, 2)))
        >>> line.start([net[2]]) > line.start([net[0]]), line.kept(line.start([net[2]])) == [net[0], net[1]]
        (True, True)
    """

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        self.model, self.clock = model, 0
        self.began: dict[nn.Module, int] = {}
        self.ended: dict[nn.Module, int] = {}
        self.read: dict[int, int] = {}
        self._calls: dict[nn.Module, int] = {}
        self._inputs: dict[nn.Module, list[Any]] = {}
        self._once: set[nn.Module] = set()
        own = {id(parameter) for parameter in model.parameters()}
        handles = []
        for module in model.modules():
            kept = may_be_given(module)
            handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            if kept:
                handles.append(module.register_forward_hook(self._end, with_kwargs=True))
        try:
            with Readings(own, self._see):
                run()
        finally:
            for handle in handles:
                handle.remove()
            self._inputs.clear()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.clock += 1
        self.began.setdefault(module, self.clock)
        self._calls[module] = self._calls.get(module, 0) + 1
        self._inputs[module] = [(t, t._version) for t in tensors_in((args, kwargs))]

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.clock += 1
        self.ended[module] = self.clock
        if is_plain(output) and is_new(output, self._inputs.pop(module, [])):
            self._once.add(module)

    def _see(self, read: Collection[int]) -> None:
        self.clock += 1
        for parameter in read:
            self.read.setdefault(parameter, self.clock)

    def start(self, modules: Collection[nn.Module]) -> int:
        """When something of some modules was needed for the first time; after the end, if nothing was.

        Parameters are known by what they were then: this is asked before others take their place.
        """
        held = {p for module in modules for p in module._parameters.values()}
        held |= {
            w.holder._parameters[a]
            for m in modules
            for w in computed_in(m)
            for o, a in w.sources()
            if o is w.holder and a in o._parameters
        }
        read = (self.read.get(id(p)) for p in held if p is not None)
        times = [*read, *(self.began.get(module) for module in modules)]
        return min((time for time in times if time is not None), default=self.clock + 1)

    def kept(self, start: int) -> list[nn.Module]:
        """The outermost modules that ended before ``start`` and whose results can be kept; none if nothing starts."""
        return [] if start > self.clock else list(self._outermost(self.model, start, set()))

    def _outermost(self, module: nn.Module, start: int, seen: set[nn.Module]) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        if module in self._once and self._calls[module] == 1 and self.ended[module] < start:
            yield module
        elif self.began.get(module, 0) < start:  # a list of modules is not called, and has some that are
            for child in module.children():
                yield from self._outermost(child, start, seen)


class Prefix:
    """What is in front of one layer after the other, in the order of a :class:`Timeline`: it is computed once.

    Used as a context manager around all passes with one layer; the results in front are kept from its first pass to the
    next ones, and on to the layers after it.
    """

    def __init__(self, line: Timeline) -> None:
        self.line = line
        self.results: dict[nn.Module, Any] = {}
        self._wanted: list[nn.Module] = []
        self._handles: dict[nn.Module, Any] = {}
        self._given = Given()

    def before(self, start: int) -> Prefix:
        """The results that are there at some time, which is no earlier than what was asked for last."""
        self._wanted = self.line.kept(start)
        return self

    def __enter__(self) -> Prefix:
        for module, output in self.results.items():  # also inside of one that is to be kept now
            self._given.give(module, output)
        for module in self._wanted:
            if module not in self.results:
                self._handles[module] = module.register_forward_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.results[module] = copied(output)

    def seal(self) -> None:
        """End the first pass: from now on what it has found is given out."""
        for module, handle in self._handles.items():
            handle.remove()
            if module in self.results:
                self._given.give(module, self.results[module])
        self._handles.clear()

    def cancel(self) -> None:
        """Compute everything in every pass."""
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._given.back()
        self.results = {module: self.results[module] for module in self._wanted if module in self.results}
