"""The user's model is the same objects with the same content: after success, and after a failure at any point.

Faults are injected at the k-th call of a module, the k-th backward pass, optimizer step, batch, callback and file
write. Whatever is done to a model, the deep fingerprint of everything that it reaches is what it was.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import singe_plugin
from singe_plugin import Callback, FineTune
from singe_plugin.app.inspection import inspect_model
from singe_plugin.axes import AxisGraph, Snapshot, Trackers, removal, remove_units, verify_groups
from singe_plugin.errors import SingeError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.loop.costs import count_macs
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.run.data import evaluate
from singe_plugin.run.latency import measure_latency

from asked import asked
from fingerprint import assert_untouched, changes, fingerprint
from nasty_nets import NASTY, Base, batches_for

ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError)


class Fault:
    """Counts what happens, and raises at the k-th time."""

    def __init__(self, at: int = -1, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def tick(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error("injected")

    def around(self, function: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self.tick()
            made = function(*args, **kwargs)
            if after:
                self.tick()
            return made

        return wrapped


@contextmanager
def failing(place: str, fault: Fault) -> Iterator[None]:
    """While active, the fault is at a place."""
    with ExitStack() as stack:
        if place == "forward":
            handle = nn.modules.module.register_module_forward_pre_hook(fault.tick)
            stack.callback(handle.remove)
        elif place == "forward end":
            handle = nn.modules.module.register_module_forward_hook(fault.tick)
            stack.callback(handle.remove)
        elif place == "backward":
            for owner, name in ((torch.autograd, "grad"), (Tensor, "backward")):
                wrapped = fault.around(getattr(owner, name), after=True)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
        elif place == "step":
            wrapped = fault.around(torch.optim.SGD.step, after=True)
            stack.enter_context(mock.patch.object(torch.optim.SGD, "step", wrapped))
        elif place == "write":
            wrapped = fault.around(singe_plugin.run.checkpoint.save_file, after=True)
            stack.enter_context(mock.patch.object(singe_plugin.run.checkpoint, "save_file", wrapped))
        yield


def net_of(name: str, used: bool = True) -> Base:
    """A model in the middle of its life: it ran on another size before."""
    torch.manual_seed(0)
    net = NASTY[name]()
    if used:
        net(torch.randn(3, 2, 8, 8))
    return net


def example(size: int = 6) -> Tensor:
    return batches_for(1, size)[0][0][:2]


def verified(net: nn.Module) -> None:
    SInGEPruner(net, example(), lambda group: None)


def scored(net: nn.Module, **options: Any) -> None:
    graph = AxisGraph(net, example())
    for group in graph.groups.values():
        score_units(net, group.unit_group(), batches_for(), Scoring(nodes=2, **options))


def counted(net: nn.Module) -> None:
    count_macs(net, example())
    measure_latency(net, example(), repeats=2, warmup=1)
    evaluate(net, batches_for())


WORK: dict[str, Callable[[nn.Module], None]] = {
    "trace": lambda net: AxisGraph(net, example()) and None,
    "verification": verified,
    "inspect": lambda net: inspect_model(net, example()) and None,
    "scoring": scored,
    "scoring unit by unit": lambda net: scored(net, path="neuron", unit_batch=1),
    "counting": counted,
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", NASTY)
def test_what_succeeds_leaves_no_trace(name: str, work: str) -> None:
    net = net_of(name)
    if name == "Lived":
        SInGEPruner(net, example(), lambda group: None)
    before = fingerprint(net)
    if work != "inspect" or name != "Lived":
        WORK[work](net)
    assert_untouched(before, net, say=f"{work} of {name}:")
    net(torch.randn(3, 2, 8, 8))  # at its old size
    net(torch.randn(1, 2, 5, 7))


def calls_of(place: str, work: Callable[[nn.Module], None], name: str) -> int:
    fault, net = Fault(), net_of(name)
    with failing(place, fault):
        work(net)
    return fault.calls


def inject(place: str, work: Callable[[nn.Module], None], name: str, k: int, error: type[BaseException]) -> None:
    net = net_of(name)
    before = fingerprint(net)
    caught: BaseException | None = None
    with failing(place, Fault(k, error)):
        try:
            work(net)
        except BaseException as found:
            caught = found
    if not issubclass(error, RuntimeError):  # what says nothing about the model is nobody's to keep
        assert type(caught) is error, f"{caught!r} at {place} {k}"
    elif caught is not None:
        assert isinstance(caught, (SingeError, error))
    assert_untouched(before, net, say=f"{name}, {error.__name__} at {place} {k}:")


def some(count: int, most: int | None) -> list[int]:
    """Numbers below ``count``: all, or the first, the last and some that have no period in common with anything."""
    if most is None or count <= most:
        return list(range(count))
    return sorted({0, count - 1, *(i * count // most for i in range(most))})


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("work", ["verification", "scoring"])
@pytest.mark.parametrize("name", NASTY)
def test_a_fault_at_any_point_leaves_no_trace(name: str, work: str, place: str, error: Any) -> None:
    for k in some(calls_of(place, WORK[work], name), most=2):
        inject(place, WORK[work], name, k, error)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["forward", "forward end", "backward"])
@pytest.mark.parametrize("work", ["trace", "verification", "inspect", "scoring", "scoring unit by unit", "counting"])
@pytest.mark.parametrize("name", NASTY)
def test_a_fault_at_every_point_leaves_no_trace(name: str, work: str, place: str, error: Any) -> None:
    if work == "counting" and place == "backward":
        pytest.skip("nothing is differentiated")
    for k in range(calls_of(place, WORK[work], name)):
        if k % len(ERRORS) == ERRORS.index(error):  # every k, each with one of the errors
            inject(place, WORK[work], name, k, error)


class Events(Callback):
    """Has the fault at every event."""

    def __init__(self, fault: Fault) -> None:
        for name in dir(Callback):
            if name.startswith("on_"):
                setattr(self, name, fault.tick)


class Batches:
    """Batches with a fault in their midst."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def __iter__(self) -> Iterator[Any]:
        for batch in batches_for(3):
            self.fault.tick()
            yield batch


class Averaged(nn.Module):
    """An averaged copy in a wrapper, as timm's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.module, self.updates = copy.deepcopy(net), [0]

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        self.updates[0] += 1
        for mine, other in zip(self.module.parameters(), net.parameters(), strict=True):
            mine.lerp_(other, 0.5)


def pruned(net: nn.Module, ema: nn.Module, place: str, fault: Fault, out_dir: Path, order: str) -> None:
    loader: Any = Batches(fault) if place == "batch" else batches_for(3)
    with failing(place, fault), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        singe_plugin.prune(
            net, batches_for(2), **asked(target="params=0.38", order=order, nodes=1,
            finetune=FineTune(loader, 4, ema=ema), out_dir=out_dir, max_pruning_ratio=0.9, min_width=1,
            callbacks=[Events(fault)] if place == "callback" else []),
        )  # fmt: skip


PLACES = ("forward", "backward", "step", "batch", "callback", "write")


def prune_with_faults(name: str, place: str, order: str, out_dir: Path, most: int | None) -> None:
    count = Fault()
    net = net_of(name)
    ema = Averaged(net)
    pruned(net, ema, place, count, out_dir / "whole", order)
    assert count.calls, f"nothing happens at {place}"
    for number, k in enumerate(some(count.calls, most)):
        error = ERRORS[number % len(ERRORS)]
        net = net_of(name)
        ema = Averaged(net)
        before = fingerprint(net, ema, versions=False)
        try:
            pruned(net, ema, place, Fault(k, error), out_dir / f"{k}", order)
        except (SingeError, *ERRORS):
            say = f"{name}, {error.__name__} at {place} {k} of {count.calls}:"
            assert_untouched(before, net, ema, say=say, versions=False)
            assert [m for m in (out_dir / f"{k}").iterdir() if m.suffix == ".tmp"] == [], say
        else:
            assert error is RuntimeError, "it was swallowed"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "order"), [("Grid", "rounds"), ("Counting", "layers"), ("InPlace", "rounds")])
def test_a_prune_that_fails_leaves_no_trace(name: str, order: str, place: str, tmp_path: Path) -> None:
    prune_with_faults(name, place, order, tmp_path, most=3)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["rounds", "layers"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NASTY)
def test_a_prune_that_fails_anywhere_leaves_no_trace(name: str, place: str, order: str, tmp_path: Path) -> None:
    prune_with_faults(name, place, order, tmp_path, most=None)


@pytest.mark.parametrize("name", NASTY)
def test_a_trial_removal_is_undone_with_optimizer_and_average(name: str) -> None:
    net = net_of(name)
    ema = Averaged(net)
    optimizer = torch.optim.AdamW(net.parameters())
    net(example()).sum().backward()
    optimizer.step()
    own = list(net.first._forward_hooks.values())
    handle = net.first.register_forward_hook(lambda *_: None)
    graph = AxisGraph(net, example())
    before = fingerprint(net, ema, vars(optimizer))
    undo = Snapshot(net, graph, trackers=Trackers([optimizer], [ema]))
    for group in graph.groups.values():
        remove_units(graph, group, [0, 2], Trackers([optimizer], [ema]))
    assert changes(before, fingerprint(net, ema, vars(optimizer)))
    undo.restore()
    assert_untouched(before, net, ema, vars(optimizer))
    assert verify_groups(graph) == {}
    handle.remove()
    assert list(net.first._forward_hooks.values()) == own
    net(example())


def test_a_removal_that_fails_half_way_is_undone() -> None:
    net = net_of("Nested")
    graph = AxisGraph(net, example())
    before, failed = fingerprint(net), 0
    for k in range(20):
        wrapped = Fault(k, MemoryError).around(removal.swap_data)
        with mock.patch.object(removal, "swap_data", wrapped):
            try:
                remove_units(graph, graph.groups["first"], [1])
            except MemoryError:
                failed += 1
            else:
                break
        assert_untouched(before, net, say=f"at {k}")
    assert failed > 2
    assert net.first.out_channels == 5
