"""What a target counts of a network whose units go: measured, and what the cost model needs to predict it."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from singe_plugin.axes import Group, Snapshot, remove_units
from singe_plugin.axes.graph import AxisGraph
from singe_plugin.errors import ConfigError
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.costs import ALL, KINDS, LATENCY, Counted, Goal, all_of
from singe_plugin.loop.target import Target
from singe_plugin.loop.times import LatencyTable, LayerTime, Timing
from singe_plugin.nested import tensors_in
from singe_plugin.ranks import current
from singe_plugin.run.backends import find_backend
from singe_plugin.run.latency import Stopwatch, dtype_of, threads_of
from singe_plugin.state import model_device

__all__ = ["Meter", "layers_with_weights", "measure_table"]

STEPS = (1, 4, 8, 16)  # of widths, that a backend may like
NETWORKS = 24  # of random widths, that are timed for a table
_LEAST = 0.1  # of a layer's units that stay in them
_BETTER = 0.05  # by how much of its time a wider step must be quicker

_logger = logging.getLogger("singe_plugin")
Links = Mapping[int, Sequence[tuple[int, str, float]]]


class Meter:
    """Counts and times a network, and knows what it had before it was pruned.

    Args:
        model: the network, as it is whenever something is asked; unpruned when this is made.
        counted: its MACs.
        target: what is to go; None for a meter that only counts.
        watch: times the network against the unpruned one; by default it is made before the first removal.
    """

    def __init__(
        self, model: nn.Module, counted: Counted, target: Target | None, watch: Stopwatch | None = None
    ) -> None:
        self.model, self.counted, self.target, self.watch = model, counted, target, watch
        self.first: dict[str, float] = {}  # of every kind, in the unpruned network
        self.table: LatencyTable | None = None

    @property
    def timing(self) -> Timing:
        """With what is measured."""
        return (None if self.target is None else self.target.timing) or Timing()

    @property
    def is_timed(self) -> bool:
        """Whether latency is a target."""
        return self.target is not None and LATENCY in self.target.kinds

    @property
    def is_here(self) -> bool:
        """Whether the network is timed on this device, and not only planned by a table of another one."""
        return self.table is None or self.table.about.get("device") == _device(self.model, self.timing)

    def begin(
        self, graph: AxisGraph, groups: Mapping[str, Group], specs: Sequence[GroupSpec], costs: Callable[[str], Any]
    ) -> None:
        """Before the first removal: copy the network to time it against, measure or read the table, and count."""
        if self.is_timed and self.table is None:
            self._begin_timing(graph, groups, specs)
        if self.target is not None and (self.is_timed or self.target.parts):
            for kind in self.target.kinds:
                self.first.setdefault(kind, self.measure(kind, costs))

    def _begin_timing(self, graph: AxisGraph, groups: Mapping[str, Group], specs: Sequence[GroupSpec]) -> None:
        given = self.timing.table
        if isinstance(given, LatencyTable):
            self.table = given
        elif given is not None:
            stored = LatencyTable.load(given) if current().main and Path(given).exists() else None
            self.table = current().first("the latency table", stored)
        if self.watch is None:
            self.watch = Stopwatch(self.model, self.counted.example_inputs, self.timing)
        if self.table is not None:
            _check_table(self.table, self.model)
            _check_conditions(self.table, _about(self.model, self.watch), self.is_here)
        if self.table is None:
            self.table = measure_table(graph, groups, specs, self.watch)
            if isinstance(given, (str, Path)) and current().main:
                self.table.save(given)
        if not self.is_here:
            _logger.warning(
                "the latency table is of another device (%s): the target is met by what it predicts, and nothing is "
                "timed here", self.table.about.get("device"),
            )  # fmt: skip

    def measure(self, kind: str, costs: Callable[[str], Any]) -> float:
        """What a kind of target counts now.

        Args:
            kind: the kind.
            costs: makes the cost model of the network as it is, for what can only be predicted.
        """
        if kind == ALL:
            return all_of(self.goals, [self.measure(goal.kind, costs) for goal in self.goals])
        if kind == "macs":
            return self.counted.macs
        if kind != LATENCY:
            function = KINDS[kind].measure
            assert function is not None
            return function(self.model, self.counted.example_inputs)
        assert self.table is not None
        if self.watch is None or not self.is_here:
            return float(costs(LATENCY).latency({}))
        if LATENCY not in self.first:
            return self.table.whole_ms
        return self.first[LATENCY] * self.watch.ratio(self.model)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The targets that are met together, with what there was of each before pruning."""
        parts = () if self.target is None else self.target.parts
        return tuple(Goal(part.kind, part.fraction, self.first[part.kind]) for part in parts)

    def times(self, links: Links, blocks: Mapping[nn.Module, str]) -> tuple[LayerTime, ...]:
        """What each layer takes by its widths, as the table says; in all, what is measured now.

        Args:
            links: of each parameter, by its ``id``: ``(dimension, group, positions that go with each unit)``.
            blocks: module -> the residual block that it is in, if that may go as a whole.
        """
        assert self.table is not None
        found = _layer_times(self.table, self.model, links, blocks)
        if self.watch is None or not self.is_here or LATENCY not in self.first:
            return tuple(found)
        scale = self.first[LATENCY] * self.watch.ratio(self.model) / max(sum(one.ms({}) for one in found), 1e-12)
        return tuple(one.scaled(scale) for one in found)


def layers_with_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The largest matrix of every module that has one of its own, by the module's name; a shared one comes once.

    Example:
        >>> list(layers_with_weights(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3))))
        ['0']
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
        if own and not any(own[0] is p for p in found.values()):
            found[name] = max(own, key=nn.Parameter.numel)
    return found


def _layer_times(
    table: LatencyTable, model: nn.Module, links: Links, blocks: Mapping[nn.Module, str]
) -> list[LayerTime]:
    """What a table says of a model's layers as they are now."""
    found = []
    for name, weight in layers_with_weights(model).items():
        mine = tuple((dim, group, float(each)) for dim, group, each in links.get(id(weight), ()) if dim < 2)
        block = blocks.get(model.get_submodule(name))
        found.append(LayerTime(name, table.full[name], _sizes(weight), mine, table.factors[name], block))
    return found


def _sizes(weight: torch.Tensor) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def measure_table(
    graph: AxisGraph, groups: Mapping[str, Group], specs: Sequence[GroupSpec], watch: Stopwatch, seed: int = 0
) -> LatencyTable:
    """Time the layers of a network at several widths: of networks whose groups have random widths.

    Args:
        graph: of the network.
        groups: the groups that may lose units, by name.
        specs: their sizes and limits.
        watch: times whole networks, against the unpruned one.
        seed: of the widths.

    Units are really removed, and put back.
    """
    model, timing = graph.model, watch.timing
    specs = [spec for spec in specs if spec.name in groups]  # blocks go as a whole, with the times of their layers
    weights = layers_with_weights(model)
    full = {name: _sizes(weight) for name, weight in weights.items()}
    points: dict[str, list[tuple[float, float, float]]] = {name: [] for name in full}
    drawn = np.random.default_rng(seed)
    _logger.info(
        "measuring %d layers at %d widths each (%s)", len(full), NETWORKS, find_backend(timing.backend).version()
    )
    for number in range(NETWORKS):
        kept = {s.name: 1.0 if number == 0 else float(drawn.uniform(_LEAST, 1)) for s in specs}
        with _narrowed(graph, groups, specs, kept, 8):
            taken = watch.spread(model, list(full))
            for name, weight in weights.items():
                u, v = (now / size for now, size in zip(_sizes(weight), full[name], strict=True))
                points[name].append((u, v, taken[name]))
    whole = watch.compare(model)[0].median_ms
    table = LatencyTable(_about(model, watch), full, points, whole)
    table.step = _best_step(graph, groups, specs, watch, table)
    return table


@contextmanager
def _narrowed(
    graph: AxisGraph, groups: Mapping[str, Group], specs: Sequence[GroupSpec], kept: Mapping[str, float], round_to: int
) -> Iterator[None]:
    """Let the network have a share of the units of its groups, for a while."""
    undo = Snapshot(graph.model, graph)
    try:
        wanted = {s.name: s.units - replace(s, step=round_to).kept_for(kept[s.name] * s.units) for s in specs}
        for group, count in graph.allowed({groups[name]: count for name, count in wanted.items()}).items():
            remove_units(graph, group, range(count), undo=False)
        yield
    finally:
        undo.restore()


def _best_step(
    graph: AxisGraph, groups: Mapping[str, Group], specs: Sequence[GroupSpec], watch: Stopwatch, table: LatencyTable
) -> int:
    """The smallest step of widths that is nearly as quick as any, held against what the table predicts for its widths.

    Widths of multiples of 16 are multiples of 8, too: only what is ragged may be slower than its size.
    """
    found: dict[int, float] = {}
    for step in STEPS:
        ratios = []
        for share in (0.45, 0.7):
            with _narrowed(graph, groups, specs, dict.fromkeys((s.name for s in specs), share), step):
                predicted = sum(layer.ms({}) for layer in _layer_times(table, graph.model, {}, {}))
                ratios.append(watch.ratio(graph.model) / max(predicted, 1e-12))
        found[step] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return next(step for step in STEPS if found[step] <= (1 + _BETTER) * min(found.values()))


def _device(model: nn.Module, timing: Timing) -> str:
    """The device and what runs networks on it."""
    device = model_device(model)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {_processor()}".strip()
    return f"{device.type} {name}, {timing.backend}"


def _about(model: nn.Module, watch: Stopwatch) -> dict[str, Any]:
    """What a table is measured with."""
    timing = watch.timing
    return {
        "device": _device(model, timing), "version": find_backend(timing.backend).version(),
        "inputs": [list(tensor.shape) for tensor in tensors_in(watch.inputs)],
        "threads": threads_of(timing), "dtype": dtype_of(model),
    }  # fmt: skip


def _check_conditions(table: LatencyTable, asked: Mapping[str, Any], is_here: bool) -> None:
    """Raise :class:`ConfigError` for a table of other inputs or another precision; on this device, of other threads."""
    for name in ("inputs", "dtype", *(["threads"] if is_here else [])):
        if name in table.about and table.about[name] != asked[name]:
            raise ConfigError(
                f"the latency table was measured with {name} {table.about[name]}, and {asked[name]} is asked for; give "
                "what it was measured with (Timing(batch=, threads=), example_inputs), or measure another one"
            )


@cache
def _processor() -> str:
    """The name of the processor, where the system says one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _check_table(table: LatencyTable, model: nn.Module) -> None:
    """Raise :class:`ConfigError` for a table of another network."""
    mine = {name: _sizes(weight) for name, weight in layers_with_weights(model).items()}
    if missing := [name for name in mine if name not in table.full or name not in table.points]:
        raise ConfigError(
            f"the latency table does not have layer {missing[0]!r} ({len(missing)} of {len(mine)} are missing); it is "
            "of another network: measure one of this"
        )
    for name, size in mine.items():
        if table.full[name] != size:
            raise ConfigError(
                f"the latency table is of a network whose layer {name!r} is {table.full[name]}, and here it is {size}; "
                "measure one of this network"
            )
