"""Residual blocks as units: found off the traced forward pass, proved, and removed.

A block is a module that returns :math:`a(x+f(x))` of the one tensor x that it is given, where the branch f ends in
layers of its own, and a is nothing or an activation. With everything that these layers write at zero it returns
:math:`a(x)`; so the module can be replaced by a. That is tried on random numbers, not read off names: modules are
looked at from the inside out, and the innermost ones that pass are the blocks. Whether the model without them is the
model with their branches at zero, with channels of the rest removed, too, is tried on the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import GroupError, RemovalError, SingeError, is_of_the_machine
from singe_plugin.method.units import Producer, tied_parameters
from singe_plugin.nested import relative_change
from singe_plugin.rollback import Snapshot, Trackers
from singe_plugin.state import RngState, casts_forgotten, plain_layers
from singe_plugin.undo import Contents

from .algebra import size_of
from .bench import Bench, opened_bench, own_start
from .blocks import AFTER, Block, is_matrix, producers_in, tensors_of
from .choices import Choices
from .graph import AxisGraph
from .groups import Group
from .oracles import Trials
from .sorting import sorted_out
from .substitutes import NormsOfTheRest, masked
from .values import Values

__all__ = ["find_blocks", "remove_block"]

_BRANCH = "with all that its branch writes at zero it does not return what it was given: its shortcut is no identity"
_TRAINING = "in training mode it does not return what it was given when all that its branch writes is zero"


def find_blocks(graph: AxisGraph, inputs: Any | None = None, verify: bool = True) -> dict[str, Block]:
    """Find the residual blocks of a model that can go as a whole, and note them in its graph.

    Modules of the same classes that cannot go are in the graph's ``left_whole``, with the reason.

    Args:
        graph: of the model; nothing of that is changed otherwise.
        inputs: example inputs; None takes those that the graph was made with.
        verify: whether the whole model without them is tried out, too.

    Returns:
        by the name of the module, in forward order.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        ...     def forward(self, x):
        ...         return x + self.body(x)
        >>> net = nn.Sequential(nn.Linear(3, 4), Residual(), Residual(), nn.Linear(4, 2))
        >>> find_blocks(AxisGraph(net, torch.zeros(2, 3)))
        {'1': Block('1', Identity is left), '2': Block('2', Identity is left)}
    """
    inputs = graph.inputs if inputs is None else inputs
    found: dict[str, Block] = {}
    failed: dict[nn.Module, str] = {}
    with opened_bench(graph, inputs) as bench:
        for module in _inside_out(graph):
            if found and not {id(b.module) for b in found.values()}.isdisjoint(map(id, module.modules())):
                continue
            outcome = _looked_at(bench, module)
            if isinstance(outcome, Block):
                found[outcome.name] = outcome
            else:
                failed[module] = outcome
        order = {module: number for number, module in enumerate(graph.trace.outputs)}
        found = dict(sorted(found.items(), key=lambda item: order[item[1].module]))
        kinds, right = {type(block.module) for block in found.values()}, list(found.values())
        reasons = {graph.names[m]: why for m, why in failed.items() if type(m) in kinds}
        for block in right:
            why = _why_not(graph, block)
            if why is not None:
                reasons[block.name] = why
                del found[block.name]
        graph.blocks.update(found)
        if verify:
            right = list(found.values())
            for trial in (_all_gone, partial(_half_gone, turn=0), partial(_half_gone, turn=1)):
                right, wrong = sorted_out(partial(trial, bench), right)
                reasons |= {block.name: why for block, why in wrong}
    places = {graph.names[module]: number for module, number in order.items()}
    graph.leave_blocks(dict(sorted(reasons.items(), key=lambda item: places[item[0]])))
    return dict(graph.blocks)


# -- looking at modules ---------------------------------------------------------------------------------------------


def _inside_out(graph: AxisGraph) -> Iterator[nn.Module]:
    """Yield the modules that may be blocks: those that run, and hold a layer, the innermost first."""
    holding = set[nn.Module]()
    for module in (m for m in graph.model.modules() if m is not graph.model and m in graph.trace.outputs):
        inside = set(module.modules())
        if any(owner in inside for owner in graph.trace.contracted_in) and not _is_of_torch(module):
            holding.add(module)
    yield from sorted(holding, key=lambda m: -graph.names[m].count("."))


def _is_of_torch(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's layers, of which none is a residual block."""
    own = type(module).__module__
    return own.startswith("torch.nn.") and next(module.children(), None) is None


def _looked_at(bench: Bench, module: nn.Module) -> Block | str:
    """A module as a block, or why it is none."""
    graph = bench.graph
    assert isinstance(graph, AxisGraph)
    trace, name = graph.trace, graph.names[module]
    calls = trace.runs[module] // max(trace.runs[graph.model], 1)
    if trace.runs[module] != trace.runs[graph.model]:
        return f"the model calls it {calls} times in a forward pass" if calls != 1 else "it runs in one mode only"
    if module not in trace.plain_calls:
        return "it is called with more than one tensor, or returns something else than one"
    given, result = ([size_of(axis) for axis in table[module][0]] for table in (trace.inputs, trace.outputs))
    if given != result:
        return f"it is given {_shape(given)} and returns {_shape(result)}: its shortcut is no identity"
    producers = producers_in(graph, module)
    if not producers or not any(map(is_matrix, producers)):
        return _BRANCH
    x = _drawn(given, bench)
    after = _left_by(bench, module, producers, x)
    if after is None:
        return _BRANCH
    for one in sorted(producers, key=is_matrix):  # what is not needed is no part of what is walked to zero
        fewer = [p for p in producers if p is not one]
        if fewer and any(map(is_matrix, fewer)) and _left_by(bench, module, fewer, x) == after:
            producers = fewer
    if not _holds_in_training(bench, module, producers, after, x):
        return _TRAINING
    return Block(graph, name, module, tuple(producers), after)


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes[1:])) or "one number"


def _drawn(sizes: Sequence[int], bench: Bench) -> Tensor:
    like = next(t for t in bench.graph.model.parameters() if t.is_floating_point())
    return torch.randn(sizes, generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64).to(like)


@contextmanager
def _at_zero(tensors: Sequence[Tensor], values: Values) -> Iterator[None]:
    try:
        for tensor in tensors:
            values.put(tensor, torch.zeros_like(tensor))
        yield
    finally:
        values.restore()


def _left_by(bench: Bench, module: nn.Module, producers: Sequence[Producer], x: Tensor) -> str | None:
    """What a module makes of x when some producers are at zero: the name of that, of :data:`AFTER`."""
    out = _run(bench, module, producers, x, own_start(bench.graph, module))
    if out is None or out.shape != x.shape:
        return None
    return next((name for name, make in AFTER.items() if _is_same(make()(x), out, bench)), None)


def _holds_in_training(bench: Bench, module: nn.Module, producers: Sequence[Producer], after: str, x: Tensor) -> bool:
    x = torch.cat([x, x])  # a batch-norm wants more than one value
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.train()
        out = _run(bench, module, producers, x, plain_layers(module))
    finally:
        for one, training in modes:
            one.training = training
    return out is not None and out.shape == x.shape and _is_same(AFTER[after]()(x), out, bench)


def _run(bench: Bench, module: nn.Module, producers: Sequence[Producer], x: Tensor, start: Any) -> Tensor | None:
    contents, rng = Contents([module]), RngState.capture()
    try:
        zeros = [tensor for producer in producers for tensor in tensors_of(producer)]
        with _at_zero(zeros, bench.values()), casts_forgotten(), start, torch.no_grad():
            out = module(x.clone())
    except Exception as error:  # it needs what the model sets up around it
        if is_of_the_machine(error):
            raise
        return None
    finally:
        contents.restore()
        rng.restore()
    return out if isinstance(out, Tensor) else None


def _is_same(one: Tensor, other: Tensor, bench: Bench) -> bool:
    return relative_change([one], [other]) <= bench.tolerance


def _why_not(graph: AxisGraph, block: Block) -> str | None:
    """Why a block stays that could go by what it computes."""
    places = Counter(id(m) for _, m in graph.model.named_modules(remove_duplicate=False))
    own = {id(p) for m in block.modules for p in m._parameters.values() if p is not None}
    inside = {f"{n}.".lstrip(".") for n, _ in graph.model.named_modules() if f"{n}.".startswith(f"{block.name}.")}
    for key, names in tied_parameters(graph.model).items():
        if key in own:
            outside = [n for n in names if not any(n.startswith(prefix) for prefix in inside)]
            if outside:
                return f"it shares a parameter with {outside[0]!r}"
    if any(places[id(m)] > 1 for m in block.modules):
        return "a module in it is registered in more than one place"
    for producer in block.producers:
        if any(slot.attr not in slot.owner._parameters for slot in producer.slots):
            return f"the weight of {producer.name!r}, which writes its results, is computed"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(m, table) for m in block.modules for table in hooks):
        return "it has hooks, which would go with it"
    if isinstance(block.module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    return None


# -- the whole model ------------------------------------------------------------------------------------------------


def _all_gone(bench: Bench, blocks: Sequence[Block]) -> str | None:
    return _gone(bench, blocks)


def _half_gone(bench: Bench, blocks: Sequence[Block], turn: int) -> str | None:
    """Let neighbours stay in turn: the channels of the rest have to be right then, too."""
    return _gone(bench, [block for number, block in enumerate(blocks) if number % 2 == turn])


def _gone(bench: Bench, blocks: Sequence[Block]) -> str | None:
    """Why the model without blocks, and without a few channels of the rest, is not the one with zeros there."""
    graph, trials = bench.graph, Trials(bench)
    left = [g for g in graph.groups.values() if not any(block.holds(g.writers) for block in blocks)]
    chosen = {g: units for g in left if (units := trials.some(g))}
    expected, choices = [], Choices()
    zeros = [tensor for block in blocks for tensor in block.tensors()]
    try:
        with (
            choices,
            _at_zero(zeros, bench.values()),
            masked(chosen, values=bench.values()),
            NormsOfTheRest(graph, chosen, bench.before),
        ):
            expected = bench.run()
    except SingeError as error:
        return str(error)
    except Exception as error:
        return bench.explained(error, "masked")
    try:
        with bench.repeating(choices):
            removed = _without(bench, blocks, chosen)
    except SingeError as error:
        return str(error)
    except Exception as error:
        return bench.explained(error, "removed")
    if [t.shape for t in removed] != [t.shape for t in expected]:
        return "removing it changes the shape of the model's output"
    change = relative_change(expected, removed)
    if change > bench.tolerance:
        return f"removing it is not the same as its branch at zero: the outputs differ by {change:.2g}"
    return None


def _without(bench: Bench, blocks: Sequence[Block], chosen: Mapping[Group, Sequence[int]]) -> list[Tensor]:
    """Compute the outputs when blocks and units were really removed, and put them back."""
    rewind, contents = bench.graph.rewinder(), Contents([bench.graph.model])
    try:
        for block in blocks:
            _replace(bench.graph, block)
        return bench.run_without([chosen])
    finally:
        contents.restore()
        rewind()


# -- removing -------------------------------------------------------------------------------------------------------


def remove_block(graph: AxisGraph, block: Block, trackers: Trackers | None = None, undo: bool = True) -> None:
    """Put what is left of a block in its place: nothing, or the activation behind its sum.

    Its parameters go from the groups of the optimizers, with their state, and averaged copies lose the block, too.

    Args:
        graph: of the model.
        block: one of the graph's.
        trackers: what changes along.
        undo: whether a failure is undone here; else by whoever tries this out, who goes back in any case.

    Raises:
        RemovalError: for a block that is not there, or if something fails on the way; the model is as before.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.relu(x + self.body(x))
        >>> net = nn.Sequential(nn.Linear(3, 4), Residual(), nn.Linear(4, 2))
        >>> graph = AxisGraph(net, torch.zeros(2, 3))
        >>> remove_block(graph, find_blocks(graph)["1"])
        >>> net[1]
        ReLU()
    """
    trackers = trackers or Trackers()
    if graph.blocks.get(block.name) is not block:
        raise RemovalError(
            f"block {block.name!r} is not there (any more); there are {', '.join(graph.blocks) or 'none'}"
        )
    parent, _ = _place(graph.model, block.name)
    before = Snapshot(graph.model, graph, [parent], trackers) if undo else None
    try:
        gone = {id(p) for p in block.module.parameters()}
        _replace(graph, block)
        for optimizer in trackers.optimizers:
            for settings in optimizer.param_groups:
                for parameter in (p for p in settings["params"] if id(p) in gone):
                    optimizer.state.pop(parameter, None)
                settings["params"] = [p for p in settings["params"] if id(p) not in gone]
        for ema in trackers.ema_models():
            owner, attr = _place(ema, block.name)
            owner._modules[attr] = AFTER[block.after]().train(ema.training)
    except BaseException as error:
        if before is not None:
            before.restore()
        if isinstance(error, Exception) and not isinstance(error, SingeError) and not is_of_the_machine(error):
            raise RemovalError(
                f"block {block.name!r}: removing it failed with {type(error).__name__}: {error}; the model is as it "
                "was before"
            ) from error
        raise


def _replace(graph: AxisGraph, block: Block) -> None:
    after = AFTER[block.after]()
    after.train(block.module.training)
    owner, attr = _place(graph.model, block.name)
    owner._modules[attr] = after
    graph.take_out(block.module, after)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds one of a name, and its name there."""
    path, _, attr = name.rpartition(".")
    owner = model.get_submodule(path)
    if attr not in owner._modules:
        raise GroupError(f"{type(model).__name__} has no module {name!r}")
    return owner, attr
