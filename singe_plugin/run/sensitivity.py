"""How much worse a network gets when some of the units of one layer go: what is found, saved, read and asked of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from singe_plugin.checks import check_choice, check_number
from singe_plugin.errors import ArtifactError, ConfigError, DataError
from singe_plugin.files import parse, seal, unseal, write_text
from singe_plugin.method.batches import inputs_for, read
from singe_plugin.method.evaluation import evaluate, evaluation_failed
from singe_plugin.method.options import Scoring
from singe_plugin.method.step import as_step, model_inputs
from singe_plugin.nested import call_model, to_device
from singe_plugin.run.data import right_answers
from singe_plugin.run.staging import count_examples
from singe_plugin.state import model_device, plain_layers, preserved
from singe_plugin.tables import markdown_table

__all__ = ["LayerSensitivity", "Sensitivity", "SensitivityPoint", "loss_and_accuracy", "shown"]

FORMAT = 1
Values = dict[str, float | None]


@dataclass(frozen=True)
class SensitivityPoint:
    """The network with a part of one layer gone.

    Attributes:
        ratio: the fraction of the layer's units that was asked for.
        removed: how many units went: the nearest number that the layer can be without.
        values: what the network is judged by, by name; None for what is not finite.
    """

    ratio: float
    removed: int
    values: Values


@dataclass(frozen=True)
class LayerSensitivity:
    """The curve of one layer (a group of coupled layers).

    Attributes:
        name, block: of its first layer.
        units: how many it has.
        points: by ratio, ascending.
    """

    name: str
    block: str
    units: int
    points: tuple[SensitivityPoint, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`singe_plugin.sensitivity` found.

    Attributes:
        whole: what the network is judged by with nothing removed: ``loss`` (F), ``accuracy`` where it classifies, and
            what the user's own function says.
        layers: one curve for each layer that can be pruned, in forward order.
        left_whole: group -> why it cannot be pruned.
        options: what was asked for.
        fingerprint: of the model and the data: what a run that goes on must have.
        finished: whether all points are there.

    Example:
        >>> points = [SensitivityPoint(r, round(8 * r), {"loss": 1 + r}) for r in (0.25, 0.5)]
        >>> found = Sensitivity({"loss": 1.0}, (LayerSensitivity("conv1", "conv1", 8, tuple(points)),))
        >>> found.ratios(max_drop=0.3)
        {'conv1': 0.25}
        >>> print(found.table())
        | layer | units | 25 % | 50 % |
        |:------|------:|-----:|-----:|
        | conv1 |     8 | 1.25 |  1.5 |
    """

    whole: Values
    layers: tuple[LayerSensitivity, ...] = ()
    left_whole: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = True

    @property
    def ratios_asked(self) -> list[float]:
        """Every ratio that a layer has a point for, ascending."""
        return sorted({point.ratio for layer in self.layers for point in layer.points})

    def measure(self, name: str | None = None) -> str:
        """The name of what the network is judged by: the accuracy if there is one, else the loss, if nothing is said.

        Raises:
            ConfigError: for a name that was not measured.
        """
        if name is None:
            return "accuracy" if "accuracy" in self.whole else "loss"
        check_choice("measure", name, self.whole)
        return name

    def table(self, measure: str | None = None) -> str:
        """The curves as a Markdown table that reads as text: a row for each layer, a column for each ratio.

        Args:
            measure: what is shown; see :meth:`measure`.
        """
        name, asked = self.measure(measure), self.ratios_asked
        rows = []
        for layer in self.layers:
            values = {point.ratio: shown(point.values.get(name), name) for point in layer.points}
            rows.append([layer.name, layer.units, *(values.get(ratio, "") for ratio in asked)])
        return markdown_table(["layer", "units", *(f"{100 * ratio:g} %" for ratio in asked)], rows)

    def ratios(
        self, max_drop: float = 0.01, measure: str | None = None, lower_is_better: bool | None = None
    ) -> dict[str, float]:
        """The largest ratio of each layer at which the network is no worse than given: what ``Pace(ratios=)`` takes.

        Each is true of the layer alone. Together they cost more than ``max_drop``, unless the survivors are repaired or
        the network is fine-tuned.

        Args:
            max_drop: how much worse than with nothing removed it may be, in units of the measure (an accuracy is in
                [0, 1]).
            measure: of what; see :meth:`measure`.
            lower_is_better: whether that is an error or a loss; None says so of ``loss`` alone.

        Returns:
            layer -> ratio, 0 where no point is good enough.

        Raises:
            ConfigError: for values that cannot mean anything.
        """
        name = self.measure(measure)
        check_number("max_drop", max_drop, 0, math.inf, "[[", "distance in the measure's units: a number")
        sign = -1 if (name == "loss" if lower_is_better is None else lower_is_better) else 1
        start = self.whole[name]
        if start is None:
            raise ConfigError(
                f"{name} of the network with nothing removed is not finite; nothing can be compared with it"
            )
        found = {}
        for layer in self.layers:
            values = [(p.ratio, p.values.get(name)) for p in layer.points]
            good = [ratio for ratio, value in values if value is not None and sign * (start - value) <= max_drop]
            found[layer.name] = max(good, default=0.0)
        return found

    def with_point(self, layer: str, point: SensitivityPoint) -> Sensitivity:
        """The same with one more point, or another one in the place of that with its ratio."""
        layers = []
        for row in self.layers:
            if row.name == layer:
                others = [p for p in row.points if p.ratio != point.ratio]
                row = replace(row, points=tuple(sorted([*others, point], key=lambda p: p.ratio)))
            layers.append(row)
        return replace(self, layers=tuple(layers))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all.

        Raises:
            ArtifactError: if the file cannot be written.
        """
        path = Path(path)
        record = json.loads(json.dumps(self.as_dict()))  # tuples become lists, as they are read
        write_text(path, json.dumps(seal(record), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: if the file is missing, damaged, or something else.
        """
        path = Path(path)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}; run singe sensitivity first") from error
        record = unseal(parse(text, path), path)
        if record.get("format") != FORMAT:
            raise ArtifactError(f"{path} has format {record.get('format')!r}, this version reads {FORMAT}")
        try:
            layers = tuple(
                LayerSensitivity(
                    row["name"], row["block"], row["units"], tuple(SensitivityPoint(**point) for point in row["points"])
                )
                for row in record["layers"]
            )
            rest = {key: record[key] for key in ("whole", "left_whole", "options", "fingerprint", "finished")}
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} was not written by Sensitivity.save ({type(error).__name__}: {error})"
            ) from error
        return cls(layers=layers, **rest)


def shown(value: float | None, measure: str) -> str:
    """A value as text: accuracies in percent.

    Example:
        >>> shown(0.5, "accuracy"), shown(1.23456, "loss"), shown(None, "loss")
        ('50.0 %', '1.235', 'not finite')
    """
    if value is None:
        return "not finite"
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{value:.4g}"


def loss_and_accuracy(model: nn.Module, batches: Iterable[Any], options: Scoring) -> tuple[float, float | None]:
    """F on batches, each weighted by its examples, and the top-1 accuracy: one forward pass of each.

    Args:
        model: is evaluated in eval mode, without gradients; left as it was.
        batches: as :func:`singe_plugin.prune` takes them.
        options: what F is.

    Returns:
        F, and the accuracy in [0, 1]; that is None where outputs are no class scores or targets no class indices.

    Raises:
        DataError: if there is no batch.
        ScoringError: if F cannot be evaluated.

    Example:
        >>> batch = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> loss_and_accuracy(nn.Identity(), [batch], Scoring())
        (0.6931471824645996, 0.5)
    """
    device, options = model_device(model), options.settle()
    total, right, count = 0.0, 0, 0
    classes = True
    with preserved(model), plain_layers(model), torch.no_grad():
        for index, batch in enumerate(read(batches, "reading the batches to judge on")):
            step, wrapped, plain = as_step(model, [batch], options)
            step.eval()
            assert wrapped is not None
            ((inputs, targets),) = [inputs_for(step, part) for part in wrapped]
            inputs, targets = (to_device(part, device, options.channels_last) for part in (inputs, targets))
            given: list[Any] = []

            def run(step: nn.Module = step, inputs: Any = inputs, given: list[Any] = given) -> Any:
                given.append(call_model(step, inputs))
                return given[0]

            try:
                value = float(evaluate(run, targets, plain, device))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise evaluation_failed("the network", index, inputs, error) from error
            size = count_examples(model_inputs(model, batch, options.objective))
            total, count = total + size * value, count + size
            answers = right_answers(given[0], targets) if classes else None
            classes = answers is not None
            right += answers or 0
    if not count:
        raise DataError("there is no batch to judge the network on; give at least one")
    return total / count, right / count if classes else None
