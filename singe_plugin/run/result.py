"""What a pruning run gives back."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from singe_plugin.loop.events import History
from singe_plugin.run.export import Exported, export

__all__ = ["GroupRow", "Metrics", "Result", "latency_cells", "measured_cells", "package_versions"]

NARROW, SHARE = 4, 0.1  # what is left of a layer, in units and of what it had, below which it is warned of


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those packages that are installed.

    Example:
        >>> sorted(package_versions(["torch", "no-such-package"]))
        ['python', 'torch']
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Metrics:
    """A model in numbers; None where it was not measured.

    Attributes:
        params: parameters.
        macs: multiply-adds for one example.
        accuracy: top-1 on the validation data, in [0, 1].
        latency_ms: median time of one forward pass of one example batch.
        latency_iqr_ms: the distance between the quartiles of that time.
        latency_conditions: what it was measured with: examples, threads, device, dtype, backend.
        latency_change: of the network after pruning: by what fraction its pass takes longer than that of the unpruned
            one beside it; the lower quartile, the median and the upper quartile over these pairs of passes.
        nonzero: parameters that are not masked; None where no single weights were pruned.
        effective_macs: multiply-adds with a weight that is not masked, for one example; None likewise.
        measured: what the user's own function says, by name (see :class:`~singe_plugin.Evaluate`); None for what is
            not finite.
        size_bytes: of all parameters and buffers, as :func:`singe_plugin.save` writes them (without the file's header).
        by_layer: module -> its own parameters and multiply-adds for one example (see
            :func:`~singe_plugin.loop.costs.own_costs`); empty for a result of an earlier version.
    """

    params: int
    macs: int
    accuracy: float | None = None
    latency_ms: float | None = None
    latency_iqr_ms: float | None = None
    latency_conditions: str | None = None
    latency_change: list[float] | None = None
    nonzero: int | None = None
    effective_macs: int | None = None
    measured: dict[str, float | None] = field(default_factory=dict)
    size_bytes: int | None = None
    by_layer: dict[str, list[int]] = field(default_factory=dict)

    def known(self) -> dict[str, float]:
        """What was measured, by name.

        Example:
            >>> Metrics(10, 20, accuracy=0.5).known()
            {'params': 10, 'macs': 20, 'accuracy': 0.5}
        """
        found = vars(self) | self.measured
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}


@dataclass(frozen=True)
class GroupRow:
    """One line of the per-layer table: a group of coupled layers, its units before and after."""

    name: str
    block: str
    units_before: int
    units_after: int

    @property
    def narrow(self) -> str | None:
        """What there is to say of a layer that lost nearly all its units; None for others.

        Example:
            >>> GroupRow("conv1", "conv1", 16, 1).narrow
            "layer 'conv1' has 1 of 16 units left; the network may not recover, min_width keeps more"
            >>> GroupRow("conv1", "conv1", 16, 4).narrow
        """
        few = self.units_after < NARROW or self.units_after < SHARE * self.units_before
        if not 0 < self.units_after < self.units_before or not few:
            return None
        left = f"{self.units_after} of {self.units_before} units left"
        return f"layer {self.name!r} has {left}; the network may not recover, min_width keeps more"


@dataclass
class Result:
    """The outcome of :func:`singe_plugin.prune`, and what :func:`singe_plugin.save` writes.

    Attributes:
        model: the pruned model.
        before, after: parameters, MACs, accuracy, latency.
        layers: units per layer, before and after, in forward order.
        left_whole: group -> why it was not pruned.
        history: every event of the run.
        options: what was asked for.
        versions: of the libraries that took part.
        builder: how to build the unpruned architecture, or None.
        structure: what removals changed, by module: what :func:`singe_plugin.load` needs besides the builder.
        weight_masks: for pruned single weights, parameter name -> ``bool``: what
            :func:`singe_plugin.masks.hold_masks` needs. Empty otherwise.
        checkpoint: the file with the state of the finished run, which goes when the result is saved; None without
            ``out_dir``.
        inputs: what the model is called with, without the values: see
            :func:`~singe_plugin.run.inputs.describe_inputs`. None if that is not known.
    """

    model: nn.Module
    before: Metrics
    after: Metrics
    layers: list[GroupRow] = field(default_factory=list)
    left_whole: dict[str, str] = field(default_factory=dict)
    history: History = field(default_factory=History)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    builder: Any = None
    structure: dict[str, Any] = field(default_factory=dict)
    weight_masks: dict[str, Tensor] = field(default_factory=dict)
    checkpoint: Path | None = None
    inputs: Any = None

    def export(self, path: str | Path, format: str | None = None, **options: Any) -> Exported:
        """Write the model as ONNX, a ``torch.export`` program or TorchScript: see :func:`singe_plugin.export`."""
        return export(self, path, format, **options)

    @property
    def removed_params(self) -> float:
        """The fraction of the parameters that was removed."""
        return 1 - self.after.params / self.before.params

    @property
    def removed_macs(self) -> float:
        """The fraction of the multiply-adds that was removed."""
        return 1 - self.after.macs / max(self.before.macs, 1)

    @property
    def sparsity(self) -> float | None:
        """The fraction of all parameters that is masked; None where no single weights were pruned."""
        return None if self.after.nonzero is None else 1 - self.after.nonzero / max(self.after.params, 1)

    @property
    def weight_sparsity(self) -> float | None:
        """The fraction of the weights of the pruned layers that is masked; None likewise."""
        if self.after.nonzero is None:
            return None
        return 1 - sum(r.units_after for r in self.layers) / max(sum(r.units_before for r in self.layers), 1)

    @property
    def removed_blocks(self) -> list[str]:
        """The residual blocks that are gone, by name (see ``Pace(blocks=)``)."""
        return list(self.structure.get("blocks", {}))

    @property
    def stopped(self) -> str | None:
        """Why less was removed than was asked for, see :class:`~singe_plugin.Evaluate`; None if the target was met."""
        rows = self.history.select("stopped")
        return str(rows[-1]["reason"]) if rows else None

    @property
    def warnings(self) -> list[str]:
        """What is to be looked at before the model is used: layers left with next to no units (see :class:`GroupRow`).

        Single weights have no widths.
        """
        if self.sparsity is not None:
            return []
        return [row.narrow for row in self.layers if row.narrow is not None]

    def summary(self) -> str:
        """The before/after table as text, and below it what is to be known of the layers."""
        rows = [("", "before", "after", "change")]
        rows.append(_row("parameters", self.before.params, self.after.params, "{:,.0f}"))
        if self.before.nonzero is not None and self.after.nonzero is not None:
            rows.append(_row("not masked", self.before.nonzero, self.after.nonzero, "{:,.0f}"))
        rows.append(_row("MACs", self.before.macs, self.after.macs, "{:,.0f}"))
        if self.before.effective_macs is not None and self.after.effective_macs is not None:
            rows.append(_row("effective MACs", self.before.effective_macs, self.after.effective_macs, "{:,.0f}"))
        if self.before.accuracy is not None and self.after.accuracy is not None:
            change = f"{100 * (self.after.accuracy - self.before.accuracy):+.2f} points"
            rows.append(("accuracy", f"{self.before.accuracy:.2%}", f"{self.after.accuracy:.2%}", change))
        rows += measured_cells(self.before, self.after)
        if self.before.latency_ms is not None and self.after.latency_ms is not None:
            rows.append(("latency (ms)", *latency_cells(self.before, self.after)))
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = []
        for row in rows:
            name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join([name.strip().ljust(widths[0]), *cells]))
        if self.sparsity is not None and self.weight_sparsity is not None:
            lines.append(
                f"sparsity: {self.weight_sparsity:.2%} of the pruned layers' weights, "
                f"{self.sparsity:.2%} of all parameters"
            )
        if self.after.latency_conditions:
            lines.append(f"latency: {self.after.latency_conditions}; medians of passes in turn")
        if gone := self.removed_blocks:
            more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
            lines.append(f"removed as a whole: {', '.join(gone[:8])}{more}")
        lines += [f"stopped: {self.stopped}"] if self.stopped else []
        warnings = self.warnings
        lines += [f"warning: {text}" for text in warnings[:3]]
        if len(warnings) > 3:
            lines.append(f"warning: {len(warnings) - 3} more layers with next to no units left, see warnings")
        for name, reason in list(self.left_whole.items())[:3]:
            lines.append(f"left whole: {name} ({reason})")
        if len(self.left_whole) > 3:
            lines.append(f"left whole: {len(self.left_whole) - 3} more, see left_whole")
        return "\n".join(line.rstrip() for line in lines)


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    return name, form.format(before), form.format(after), f"{100 * (after - before) / max(before, 1e-12):+.1f} %"


def measured_cells(before: Metrics, after: Metrics) -> list[tuple[str, str, str, str]]:
    """A row for each of the user's own numbers: before, after, and the difference.

    Example:
        >>> measured_cells(Metrics(1, 1, measured={"mAP": 0.5}), Metrics(1, 1, measured={"mAP": 0.45}))
        [('mAP', '0.5', '0.45', '-0.05')]
    """
    rows = []
    for name, old in before.measured.items():
        new = after.measured.get(name)
        cells = ["not finite" if value is None else f"{value:.4g}" for value in (old, new)]
        rows.append((name, *cells, "" if old is None or new is None else f"{new - old:+.4g}"))
    return rows  # type: ignore[return-value]


def latency_cells(before: Metrics, after: Metrics) -> tuple[str, str, str]:
    """Both medians with half of the distance between their quartiles, and the median change of the pairs of passes.

    It is not measurable where more than a quarter of the pairs say the opposite; in a result of an earlier version,
    whose pairs are not known, where it is less than the distances.

    Example:
        >>> before = Metrics(1, 1, latency_ms=10.0, latency_iqr_ms=3.0)
        >>> latency_cells(before, Metrics(1, 1, latency_ms=9.0, latency_change=[-0.12, -0.1, -0.08]))
        ('10.00 ±1.50', '9.00', '-10.0 %')
        >>> latency_cells(before, Metrics(1, 1, latency_ms=9.0, latency_change=[-0.3, -0.1, 0.1]))[2]
        'not measurable'
    """
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    spread = [(m.latency_iqr_ms or 0.0) / 2 for m in (before, after)]
    shown = [
        f"{m.latency_ms:.2f}" + (f" ±{half:.2f}" if m.latency_iqr_ms is not None else "")
        for m, half in zip((before, after), spread, strict=True)
    ]
    if after.latency_change is None:
        change = after.latency_ms / before.latency_ms - 1
        apart = abs(after.latency_ms - before.latency_ms) > sum(spread)
    else:
        low, change, high = after.latency_change
        apart = low > 0 or high < 0
    return shown[0], shown[1], f"{100 * change:+.1f} %" if apart else "not measurable"
