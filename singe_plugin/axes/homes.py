"""The parts of a model that hold everything of some groups, to try these groups out without the rest of the model.

Heads and hidden channels of a block are written and read in that block. Which of many groups are wrong is found out
there, on the inputs that the block gets from the model: a run of a block costs the same however deep the model is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from singe_plugin.errors import is_of_the_machine
from singe_plugin.nested import copied, relative_change, tensors_in

from .algebra import contains
from .bench import Bench
from .graph import AxisGraph
from .groups import Group

__all__ = ["Part", "home_of", "parts_of"]


@dataclass
class _Call:
    """What a module was called with, how often operators ran before, and what it returned."""

    args: Any
    kwargs: Any
    before: Mapping[str, int]
    outputs: list[Tensor] = field(default_factory=list)


class Part(Bench):
    """A module of a model, as a bench of its own: it is called as the model calls it."""

    def __init__(self, bench: Bench, module: nn.Module, call: _Call, groups: Sequence[Group]) -> None:
        super().__init__(
            bench.graph, bench.inputs, call.outputs, bench.tolerance, bench.sources, module, groups, call.before
        )
        self.call = call

    def _called(self) -> Any:
        """What the module returns."""
        return self.module(*copied(self.call.args), **copied(self.call.kwargs))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def parts_of(bench: Bench, groups: Sequence[Group]) -> Iterator[tuple[Part, list[Group]]]:
    """Yield the parts of the model that hold everything of some of these groups, with the groups.

    A part that does not compute by itself what it does in the model is left out.
    """
    homes: dict[nn.Module, list[Group]] = {}
    for group in groups:
        if (home := home_of(bench.graph, group)) is not None:
            homes.setdefault(home, []).append(group)
    for module, call in _calls(bench, homes).items() if homes else ():
        part = Part(bench, module, call, homes[module])
        try:
            change = relative_change(call.outputs, part.run())
        except Exception as error:  # it needs what the model sets up around it
            if is_of_the_machine(error):
                raise
            continue
        if change <= bench.tolerance and call.outputs:
            yield part, homes[module]


def home_of(graph: AxisGraph, group: Group) -> nn.Module | None:
    """Find the smallest module that holds everything of a group and runs once; None if that is the whole model.

    Neither its inputs nor its outputs have the units: nothing outside of it knows of them.
    """
    leaf = group.leaf.root()
    owners = dict.fromkeys(part.owner for part in group.slices())
    owners |= dict.fromkeys(place.owner for place in graph.index.places(leaf))
    owners |= dict.fromkeys(owner for scale in graph.index.widths(leaf) for owner, _, _ in scale.rows)
    paths = [graph.names[owner].split(".") for owner in owners]
    steps = itertools.takewhile(lambda step: len(set(step)) == 1, zip(*paths, strict=False))
    path = [step[0] for step in steps]
    trace = graph.trace
    while path and path != [""]:
        module = graph.model.get_submodule(".".join(path))
        tensors = [*trace.inputs.get(module, []), *trace.outputs.get(module, [])]
        if trace.runs[module] == 1 and not any(contains(axis, leaf) for axes in tensors for axis in axes):
            return module
        path.pop()
    return None


def _calls(bench: Bench, modules: Mapping[nn.Module, Any]) -> dict[nn.Module, _Call]:
    """Run the model once, and note the calls of some modules."""
    calls: dict[nn.Module, _Call] = {}
    counting = _Counting()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = _Call(copied(args), copied(kwargs), Counter(counting.counts))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].outputs = copied(list(tensors_in(output)))

    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with counting:
            bench.run()
    finally:
        for handle in handles:
            handle.remove()
    return calls
