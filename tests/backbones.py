"""What has to hold for a backbone: right, whole, worth it, fast, automatic. Each check returns what it found."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin import Builder, Pace, load, save
from singe_plugin.axes import AxisGraph
from singe_plugin.axes.algebra import is_fixed
from singe_plugin.axes.grouped import PlainGroups
from singe_plugin.axes.substitutes import derangement, double_inputs, exchanged, in_double, random_inputs, randomised
from singe_plugin.integrations.torch_pruning import (
    AxisDependencyGraph,
    GroupView,
    SInGEImportance,
    SInGEPruner,
)
from singe_plugin.loop.events import History
from singe_plugin.nested import call_model, relative_change, results_in, tensors_in
from singe_plugin.run.architecture import Structure, describe_structure
from singe_plugin.run.result import Metrics, Result

from masking import Masked

SIZES = (96, 128, 192, 224, 256)


@dataclass
class Row:
    """What was found for one model.

    Attributes:
        right, whole: what was wrong; empty if nothing.
        share: parameters inside verified groups, of all but the classifier's.
        removed: parameters that one step at ratio 0.5 removed.
        seconds: of the processor, for building the graph, verification and the step.
        scored: groups with finite scores of ``ig``, of all groups.
        left: reason -> how many groups or layers are left whole for it.
    """

    model: str
    params: int = 0
    groups: int = 0
    right: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    share: float = 0.0
    removed: float = 0.0
    seconds: float = 0.0
    scored: str = ""
    left: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """What a model computes, with the same draws every time: its results that are no positions or codes."""
    torch.manual_seed(1)
    return [t for t in results_in(call_model(model, x)) if t.is_floating_point()]


def classifier_parameters(model: nn.Module) -> set[int]:
    getter = getattr(model, "get_classifier", None)
    found: Any = getter() if callable(getter) else getattr(model, "fc", getattr(model, "classifier", None))
    parts = found if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
    return {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}


def prunable_share(graph: AxisGraph) -> float:
    """The parameters that belong to a unit of some group, of all but the classifier's."""
    covered: dict[int, dict[int, Tensor]] = {}
    for group in graph.groups.values():
        for part in group.slices():
            if part.is_parameter:
                dims = covered.setdefault(id(part.tensor), {})
                mine = torch.from_numpy(part.units >= 0)
                dims[part.dim] = dims.get(part.dim, torch.zeros_like(mine)) | mine
    heads, total, inside = classifier_parameters(graph.model), 0, 0
    for parameter in graph.model.parameters():
        if id(parameter) in heads:
            continue
        outside = 1
        for dim, size in enumerate(parameter.shape):
            mine = covered.get(id(parameter), {}).get(dim)
            outside *= size if mine is None else int((~mine).sum())
        total += parameter.numel()
        inside += parameter.numel() - outside
    return inside / max(total, 1)


def gradients(model: nn.Module, x: Tensor) -> set[str]:
    """The parameters that get a gradient in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss: Any = sum((o * torch.randn_like(o)).sum() for o in outputs(model, x) if o.requires_grad)
    loss.backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.shape == p.shape}
    model.zero_grad(set_to_none=True)
    model.eval()
    return found


def permutation(graph: AxisGraph, x: Any, seed: int = 7, double: bool = False) -> float:
    """The change of the outputs when the units of all groups are permuted at once, on the full image."""
    with randomised(graph.model, seed), torch.no_grad(), ExitStack() as stack:
        noise = random_inputs(x, seed)
        if double:
            stack.enter_context(in_double(graph.model))
            stack.enter_context(PlainGroups())
            noise = double_inputs(noise)
        generator = torch.Generator().manual_seed(seed)
        base = outputs(graph.model, noise)
        with exchanged({g: derangement(g.size, generator) for g in graph.groups.values()}):
            return relative_change(base, outputs(graph.model, noise))


def mixes(graph: AxisGraph) -> bool:
    """Whether an operator takes prunable channels together (norms, softmaxes, means)."""
    return any(not is_fixed(axis) for dims in graph.trace.mixing.values() for _, axis in dims)


def usable(model: nn.Module, x: Tensor, sizes: Iterable[int]) -> list[int]:
    """Image sizes that the model accepts."""
    found = []
    for size in sizes:
        try:
            with torch.no_grad():
                outputs(model, torch.randn(1, x.shape[1], size, size))
        except Exception:
            continue
        found.append(size)
    return found


def methods(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Shapes of what timm's feature methods return, without channels; a reason where they fail."""
    found: dict[str, Any] = {}

    def note(name: str, function: Callable[[], Any]) -> Any:
        try:
            with torch.no_grad():
                value = function()
            found[name] = [t.ndim for t in tensors_in(value)]
            return value
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
            return None

    if not hasattr(model, "forward_features"):
        return found
    features = note("forward_features", lambda: model.forward_features(x))  # type: ignore[operator]
    if features is not None and hasattr(model, "forward_head"):
        note("forward_head", lambda: model.forward_head(features))  # type: ignore[operator]
    if hasattr(model, "forward_intermediates"):
        note("forward_intermediates", lambda: model.forward_intermediates(x, intermediates_only=True))  # type: ignore[operator]
    if hasattr(model, "reset_classifier"):
        small = copy.deepcopy(model)

        def reset() -> Any:
            small.reset_classifier(5)  # type: ignore[operator]
            return small(x)

        note("reset_classifier", reset)
    return found


def widths(model: nn.Module) -> list[int]:
    """The channels that ``feature_info`` promises."""
    info: Any = getattr(model, "feature_info", None)
    entries = info.info if hasattr(info, "info") else info
    return [entry["num_chs"] for entry in entries] if isinstance(entries, list) else []


def saved_and_loaded(model: nn.Module, before: Structure, builder: Builder, x: Tensor) -> str | None:
    nothing = Metrics(0, 0, None, None)
    result = Result(model, nothing, nothing, [], {}, History(), {}, {}, builder, describe_structure(model, before, []))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        twin = load(save(result, folder)).model
        same = all(torch.equal(a, b) for a, b in zip(outputs(model, x), outputs(twin, x), strict=True))
    return None if same else "a loaded copy computes something else"


def check(
    name: str,
    make: Callable[[], nn.Module],
    builder: Builder | None,
    size: tuple[int, int, int],
    quick: bool = False,
    scoring_seconds: float = math.inf,
) -> Row:
    """Run every check on one model.

    Args:
        name: what the row is called.
        make: builds the model.
        builder: for saving; None skips that.
        size: channels, height and width of the default input.
        quick: leave out the independent masked reference.
        scoring_seconds: how long groups are scored.
    """
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(1, *size)
    row = Row(name, params=sum(p.numel() for p in model.parameters()))
    others = [s for s in usable(model, x, SIZES) if s != size[1]]
    small = min([*others, size[1]])
    pair = torch.randn(2, size[0], small, small)
    had = gradients(model, pair)
    with torch.no_grad():
        shapes = [t.shape for t in outputs(model, pair)]
    before_methods, fused = methods(model, x), [getattr(m, "fused_attn", None) for m in model.modules()]
    before = Structure.of(model)
    masked = Masked(model) if not quick and row.params < 60e6 else None

    start = time.process_time()
    ema = None if masked is None else masked.tags
    pruner = SInGEPruner(model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.5, iterative_steps=2, ema=ema)
    built = time.process_time() - start
    graph = pruner.DG.axis_graph
    row.groups, row.share = len(graph.groups), prunable_share(graph)
    for reason in graph.left_whole.values():
        row.left[reason] = row.left.get(reason, 0) + 1
    change = permutation(graph, x)
    if change >= 1e-4:  # some networks amplify rounding
        change = permutation(graph, x, double=True)
    if not change < 1e-4:
        row.right.append(f"permuting all units changes the output by {change:.2g}")
    finite, count = scores(graph, small, size[0], scoring_seconds)
    row.scored = f"{finite}/{count}" + (f" of {row.groups}" if count < row.groups else "")
    if finite < count:
        row.whole.append(f"{count - finite} groups have no finite score")

    start = time.process_time()
    pruner.step()
    row.seconds = built + time.process_time() - start
    if masked is not None and not mixes(graph):
        change = masked_difference(masked.model(), model, small, size[0])
        if not change < 1e-6:
            row.right.append(f"pruned and masked differ by {change:.2g}")
    pruner.step()
    row.removed = 1 - sum(p.numel() for p in model.parameters()) / row.params
    row.whole += wholeness(model, pair, shapes, had, [size[1], *others])
    after = methods(model, x)
    row.whole += [
        f"{k}: {after.get(k)}" for k, v in before_methods.items() if isinstance(v, list) and after.get(k) != v
    ]
    if isinstance(after.get("forward_intermediates"), list):
        maps = list(tensors_in(model.forward_intermediates(x, intermediates_only=True)))  # type: ignore[operator]
        if len(maps) == len(widths(model)) and [t.shape[1] for t in maps] != widths(model):
            row.whole.append(f"feature_info says {widths(model)}, the features have {[t.shape[1] for t in maps]}")
    if fused != [getattr(m, "fused_attn", None) for m in model.modules()]:
        row.whole.append("fused_attn changed")
    if builder is not None:
        failure = saved_and_loaded(model, before, builder, x)
        row.whole += [failure] if failure else []
    pace = Pace(verify=row.seconds < 10)
    again = SInGEPruner(model, x, tp.importance.MagnitudeImportance(), pruning_ratio=0.25, pace=pace)
    again.step()
    row.whole += [f"second pruner: {f}" for f in wholeness(model, pair, shapes, had, [])]
    return row


def wholeness(model: nn.Module, pair: Tensor, shapes: list[Any], had: set[str], others: list[int]) -> list[str]:
    found = []
    with torch.no_grad():
        made = outputs(model, pair)
        if [t.shape for t in made] != shapes:
            found.append(f"the output has shapes {[tuple(t.shape) for t in made]}")
        if not all(bool(torch.isfinite(t).all()) for t in made):
            found.append("the output is not finite")
        if len(outputs(model, torch.cat([pair, pair[:1]]))[0]) != 3 * len(made[0]) // 2:
            found.append("another batch size does not work")
        for size in others[:1] + others[-1:]:
            outputs(model, torch.randn(1, pair.shape[1], size, size))
    missing = had - gradients(model, pair)
    if missing:
        found.append(f"{len(missing)} parameters have no gradient, e.g. {sorted(missing)[0]}")
    return found


def scores(graph: AxisGraph, size: int, channels: int, seconds: float) -> tuple[int, int]:
    """How many groups get finite scores of ``ig`` with two nodes on random data, and how many were tried in time."""

    def objective(made: Any, targets: Any) -> Tensor:
        total: Any = sum((o.float() ** 2).mean() for o in tensors_in(made))
        return total  # type: ignore[no-any-return]

    batch = (torch.randn(2, channels, size, size), torch.zeros(2, dtype=torch.int64))
    importance = SInGEImportance("ig", nodes=2, objective=objective).bind(graph.model, [batch])
    wrapper = AxisDependencyGraph(graph)
    finite, count, start = 0, 0, time.perf_counter()
    for group in graph.groups.values():
        if time.perf_counter() - start > seconds:
            break
        count += 1
        found = importance.score_units(GroupView(wrapper, group), None)
        finite += bool(torch.isfinite(found).all()) and len(found) == group.size
    return finite, count


def masked_difference(masked: nn.Module, pruned: nn.Module, size: int, channels: int) -> float:
    """What the pruned model computes against the masked original, on randomised copies in double precision."""
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    with torch.no_grad(), in_double(pruned), in_double(masked):
        return relative_change(outputs(masked, x), outputs(pruned, x))
