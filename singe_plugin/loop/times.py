r"""The time of a forward pass, layer by layer, as a function of widths: what a latency target plans with.

The time of a layer l, and of everything that runs between it and the next one, is fitted to what was measured while
the widths of the whole network were drawn at random:

.. math:: t_l(u, v) = a + b\,u + c\,v + d\,uv, \qquad a, b, c, d \ge 0

where u and v are the shares of its first and its second dimension that are left (of a convolution, what it writes and
what it reads). A layer of one width has no v. Steps of a backend are not in this: widths are rounded to them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singe_plugin.checks import check_choice, check_count
from singe_plugin.errors import ArtifactError, ConfigError
from singe_plugin.fields import documented, option
from singe_plugin.files import parse, write_text

__all__ = ["BACKENDS", "LatencyTable", "LayerTime", "Timing", "fit_times"]

BACKENDS = ("torch", "compile", "onnxruntime")


@dataclass(frozen=True)
class LayerTime:
    """What a layer takes, in milliseconds, by its widths.

    Attributes:
        name: the layer's.
        full: its first two dimensions when it was measured; 1 for a second one that it does not have.
        sizes: the same, now.
        links: ``(dimension, group, positions that go with each unit)``.
        factors: a, b, c, d.
        block: the residual block that it is in, if that may go as a whole, or None.
    """

    name: str
    full: tuple[int, int]
    sizes: tuple[float, float]
    links: tuple[tuple[int, str, float], ...]
    factors: tuple[float, float, float, float]
    block: str | None = None

    def after(self, removed: Mapping[str, int]) -> LayerTime:
        """The same after removals: it counts further ones on top of these."""
        if self.block is not None and removed.get(self.block):
            return replace(self, factors=(0.0, 0.0, 0.0, 0.0))
        sizes = list(self.sizes)
        for dim, group, per_unit in self.links:
            sizes[dim] = max(sizes[dim] - per_unit * removed.get(group, 0), 0.0)
        return replace(self, sizes=(sizes[0], sizes[1]))

    def scaled(self, factor: float) -> LayerTime:
        """The same, so many times as long."""
        a, b, c, d = (factor * one for one in self.factors)
        return replace(self, factors=(a, b, c, d))

    def ms(self, removed: Mapping[str, int]) -> float:
        """The time after removals.

        Example:
            >>> layer = LayerTime("conv", (8, 4), (8, 4), ((0, "conv", 1.0),), (0.1, 0.0, 0.0, 0.4))
            >>> layer.ms({}), round(layer.ms({"conv": 4}), 3)
            (0.5, 0.3)
        """
        left = self.after(removed)
        u, v = (size / full for size, full in zip(left.sizes, self.full, strict=True))
        a, b, c, d = left.factors
        return a + b * u + c * v + d * u * v


def fit_times(points: Sequence[tuple[float, float, float]]) -> tuple[float, float, float, float]:
    """The factors a, b, c, d that explain measured times best, none of them negative.

    Args:
        points: ``(u, v, milliseconds)``.

    Example:
        >>> [round(x, 6) for x in fit_times([(1, 1, 5.0), (0.5, 1, 3.0), (1, 0.5, 3.0), (0.5, 0.5, 2.0)])]
        [1.0, 0.0, 0.0, 4.0]
    """
    data = np.array(points, dtype=np.float64)
    u, v, times = data.T
    columns = np.stack([np.ones_like(u), u, v, u * v], axis=1)
    distinct = [i for i in range(4) if not any(np.allclose(columns[:, i], columns[:, j]) for j in range(i))]
    best = np.zeros(4, dtype=np.float64)
    least = math.inf
    for size in range(1, len(distinct) + 1):
        for chosen in map(list, itertools.combinations(distinct, size)):
            found = _solve(columns[:, chosen], times)
            miss = float(((columns[:, chosen] @ found - times) ** 2).sum())
            if (found >= 0).all() and miss < least - 1e-12 * float((times**2).sum()):
                least = miss
                best[:] = 0
                best[chosen] = found
    a, b, c, d = best.tolist()
    return a, b, c, d


def _solve(columns: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(columns, times, rcond=None)[0], dtype=np.float64)


@dataclass
class LatencyTable:
    """The times of a network's layers on a device, at several widths.

    Attributes:
        about: what was measured with: device and backend, version, shapes of the inputs, threads, dtype.
        full: layer -> its first two dimensions in the unpruned network.
        points: layer -> ``(u, v, milliseconds)``, a row for each network that was measured.
        whole_ms: what the unpruned network took in all.
        step: the number of channels to whose multiples widths are best rounded, by what was measured.

    Example:
        >>> table = LatencyTable({"device": "cpu"}, {"conv": (8, 4)}, {"conv": [(1, 1, 2.0), (0.5, 1, 1.0)]}, 2.0)
        >>> [round(x, 6) for x in table.factors["conv"]]
        [0.0, 2.0, 0.0, 0.0]
    """

    about: dict[str, Any]
    full: dict[str, tuple[int, int]]
    points: dict[str, list[tuple[float, float, float]]]
    whole_ms: float
    step: int = 1
    _factors: dict[str, tuple[float, float, float, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def factors(self) -> dict[str, tuple[float, float, float, float]]:
        """Layer -> a, b, c, d."""
        if not self._factors:
            self._factors.update({name: fit_times(rows) for name, rows in self.points.items()})
        return self._factors

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON.

        Raises:
            ArtifactError: if the file cannot be written.
        """
        record = {
            "about": self.about, "full": self.full, "points": self.points, "whole_ms": self.whole_ms, "step": self.step,
        }  # fmt: skip
        write_text(Path(path), json.dumps(record, indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that :meth:`save` wrote, here or on another machine.

        Raises:
            ArtifactError: if it is missing or damaged.
        """
        try:
            record = parse(Path(path).read_bytes(), path)
            return cls(
                dict(record["about"]),
                {name: (int(size[0]), int(size[1])) for name, size in record["full"].items()},
                {name: [(r[0], r[1], r[2]) for r in rows] for name, rows in record["points"].items()},
                float(record["whole_ms"]), int(record["step"]),
            )  # fmt: skip
        except OSError as error:
            raise ArtifactError(f"the latency table {path} cannot be read: {error}; measure it again") from error
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"the latency table {path} is damaged ({type(error).__name__}: {error}); measure it again"
            ) from error


@documented
class Timing:
    """With what the time of a forward pass is measured.

    Raises:
        ConfigError: for a value that cannot mean anything.

    Example:
        >>> Timing(backend="onnxruntime", batch=1).batch
        1
    """

    backend: str = option(
        default="torch",
        text="What runs the network: ``torch`` as it is, ``compile`` through torch.compile, or ``onnxruntime`` "
        "exported to ONNX.",
        choices=BACKENDS,
        flag="--latency-backend",
    )
    batch: int | None = option(
        default=None,
        text="How many examples are run at once: the first one, so many times. By default the example inputs as they "
        "are.",
        flag="--latency-batch",
    )
    threads: int | None = option(
        default=None,
        text="What the backend may use on the CPU. By default what PyTorch is allowed to.",
        flag="--latency-threads",
    )
    repeats: int | None = option(
        default=None,
        text="How many passes of each of two networks are timed, in turn. By default as many as take about a second, "
        "at least 30 and at most 300.",
        flag="--latency-repeats",
    )
    table: str | Path | LatencyTable | None = option(
        default=None,
        text="A latency table, or the file of one; it is measured and written there if there is no such file. A table "
        "of another device is what the network is planned by alone: it is not measured there.",
        flag="--latency-table",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check_choice("latency backend", self.backend, BACKENDS)
        counts = (("batch", "number of examples"), ("threads", "number of threads"), ("repeats", "number of passes"))
        for name, what in counts:
            if (value := getattr(self, name)) is not None:
                check_count(f"latency {name}", value, 1, what, why=", or None")
        if not isinstance(self.table, (str, Path, LatencyTable, type(None))):
            raise ConfigError(
                f"table={self.table!r} is no latency table; give a LatencyTable, or the path of a file of one"
            )
