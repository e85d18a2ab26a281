"""A model as a file that runs without this library, and often without Python: written, opened again and compared.

A file is there only if it computes what the model does, on random inputs and on real ones, with other numbers of
examples than it was traced with.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from singe_plugin.checks import check_choice, check_count
from singe_plugin.errors import ArtifactError, ConfigError, is_of_the_machine
from singe_plugin.files import write_atomically
from singe_plugin.masks import fold_masks
from singe_plugin.nested import call_model, examples_in, map_tensors, tensors_in
from singe_plugin.run.formats import FORMATS, Format, Plan, sidecar
from singe_plugin.run.inputs import describe_inputs, random_inputs, rows_of
from singe_plugin.state import RngState

__all__ = ["Exportable", "Exported", "copied_plain", "differences", "export"]

_logger = logging.getLogger("singe_plugin")
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
_TRACED, _OTHERS = 2, (1, 5)  # examples; PyTorch treats a size of one as one that stays


class Exportable(Protocol):
    """A result: a model, and what is known of its inputs."""

    model: nn.Module
    inputs: Any


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared.

    Attributes:
        path: the file.
        format: its format.
        way: what wrote it.
        max_error: the largest absolute difference from the PyTorch model's outputs.
        allowed: how much that difference may be: the tolerance times the largest output.
        batches: the numbers of examples that it was compared with.
        real: whether real inputs were among them.
        batch_size: the one number of examples that it takes; None is any.
        half: whether it is in half precision.
        notes: what else there is to say: ways that did not work.
    """

    path: Path
    format: str
    way: str
    max_error: float
    allowed: float
    batches: tuple[int, ...]
    real: bool
    batch_size: int | None
    half: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = "any number of examples" if self.batch_size is None else f"{self.batch_size} examples at a time"
        kind = "random and real" if self.real else "random"
        precision = ", half precision" if self.half else ""
        lines = [
            f"{self.path}: {self.format} by {self.way}{precision}, {size}",
            f"largest difference from the PyTorch model: {self.max_error:.1e} (allowed: {self.allowed:.1e}), on {kind} "
            f"inputs of {', '.join(map(str, self.batches))} examples",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(
    model: nn.Module | Exportable,
    path: str | Path,
    format: str | None = None,
    *,
    example_inputs: Any = None,
    opset: int | None = None,
    half: bool = False,
    batch_size: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as ONNX, a ``torch.export`` program or TorchScript, and make sure that the file computes the same.

    The file is opened by the library that runs it elsewhere (ONNX Runtime, ``torch.export.load``, ``torch.jit.load``)
    and compared with the model in eval mode on the CPU, with one example, with two and with five. With one output y and
    what the file gives ŷ, max |ŷ - y| may be ``tolerance`` · max |y|. A file that fails is not left behind.

    Args:
        model: a module, or a result, which knows the shapes of its inputs. It is copied, and stays as it is.
        path: the file to write.
        format: ``"onnx"``, ``"torch-export"`` or ``"torchscript"``; None is what the end of the name says (``.onnx``,
            ``.pt2``, ``.pt``).
        example_inputs: real inputs (a tensor, a tuple of arguments, a mapping of keywords), which are compared, too. A
            module needs them; of a result they say another size, say.
        opset: the version of ONNX's operators; None is the exporter's.
        half: convert the weights to half precision first. What it costs is measured, against the model as it is.
        batch_size: the one number of examples that the file takes; None is any.
        tolerance: None is 1e-4, and 2e-2 in half precision.

    Returns:
        what was written, with the largest difference.

    Raises:
        ConfigError: for arguments that cannot mean anything.
        MissingPackageError: for ONNX without its packages.
        ArtifactError: if the model cannot be exported, the file differs from it, or cannot be written.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = export(net, Path(folder) / "net.pt2", example_inputs=torch.randn(3, 4))
        >>> done.format, done.batches, done.max_error <= done.allowed
        ('torch-export', (1, 2, 5), True)
    """
    path = Path(path)
    name = _format_of(path, format)
    kind = FORMATS[name]
    _check(name, kind, path, opset, batch_size, tolerance)
    module = model if isinstance(model, nn.Module) else model.model
    described = describe_inputs(example_inputs) if example_inputs is not None else getattr(model, "inputs", None)
    if example_inputs is not None and (described is None or not examples_in(example_inputs)):
        raise ConfigError(
            "example_inputs are not tensors alone; give a tensor, a tuple of arguments or a mapping of keywords, with "
            "lists, mappings, numbers and text in it at most, and a batch of at least one example"
        )
    if described is None or (isinstance(model, nn.Module) and example_inputs is None):
        raise ConfigError(
            f"what {type(module).__name__} is called with is not known; give example_inputs, a batch that it takes"
        )
    kind.need(name)
    limit = tolerance if tolerance is not None else _HALF_TOLERANCE if half else _TOLERANCE
    cases = list(_cases(described, example_inputs, batch_size))
    rng = RngState.capture()
    try:
        exported = _Export(copied_plain(module), name, path, half, cases, limit)
        done = exported.write(opset, batch_size)
    finally:
        rng.restore()
    for note in done.notes:
        _logger.warning("%s", note)
    _logger.info("%s", done)
    return done


def _format_of(path: Path, format: str | None) -> str:
    if format is not None:
        check_choice("format", format, list(FORMATS))
        return format
    for name, kind in FORMATS.items():
        if path.suffix in kind.suffixes:
            return name
    endings = ", ".join(f"{name} ({', '.join(kind.suffixes)})" for name, kind in FORMATS.items())
    raise ConfigError(f"{path} does not say which format is meant; give format=, or a name that ends so: {endings}")


def _check(
    name: str, kind: Format, path: Path, opset: int | None, batch_size: int | None, tolerance: float | None
) -> None:
    if path.suffix not in kind.suffixes:
        raise ConfigError(f"{path} is no name for {name}; give one that ends with {' or '.join(kind.suffixes)}")
    if opset is not None and not kind.opset:
        raise ConfigError(f"opset={opset} is of ONNX, and {name} has none; leave it out")
    if opset is not None:
        check_count("opset", opset, 1, "version of ONNX's operators")
    if batch_size is not None:
        check_count("batch_size", batch_size, 1, "number of examples")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
        raise ConfigError(f"tolerance={tolerance!r} is no difference that outputs may have; give a number >= 0")


@dataclass(frozen=True)
class _Case:
    inputs: Any
    count: int
    real: bool


def _cases(described: Any, real: Any, batch_size: int | None) -> Iterator[_Case]:
    """What the file is compared on; the first one is what it is traced with."""
    counts = [batch_size] if batch_size is not None else [_TRACED, *_OTHERS]
    if real is not None:
        yield from (_Case(rows_of(real, count), count, True) for count in counts)
    yield from (_Case(random_inputs(described, count, seed), count, False) for seed, count in enumerate(counts))


def differences(one: nn.Module, other: nn.Module, inputs: Any, tolerance: float) -> str:
    """How the outputs of two models differ by more than a tolerance, in words; nothing if they do not.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> differences(net, net, torch.ones(1, 2), 0.0)
        ''
    """
    with torch.no_grad():
        made, expected = (list(tensors_in(call_model(m, map_tensors(torch.clone, inputs)))) for m in (one, other))
    if [t.shape for t in made] != [t.shape for t in expected]:
        return "its outputs have other shapes"
    found = [_difference(a, b, tolerance) for a, b in zip(made, expected, strict=True)]
    wrong = [d for d in found if not d.error <= d.allowed]
    return f"its outputs differ by {max(wrong).error:.1e}" if wrong else ""


def copied_plain(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, with its masks in its weights.

    Raises:
        ArtifactError: if it cannot be copied.
    """
    try:
        twin = copy.deepcopy(module)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise ArtifactError(
            f"{type(module).__name__} cannot be copied, which exporting it needs: {type(error).__name__}: {error}; "
            "export it before a forward pass has left tensors in it, or from a saved result"
        ) from error
    fold_masks(twin)
    return twin.cpu().eval().requires_grad_(False)


def _halved(value: Any) -> Any:
    return map_tensors(lambda t: t.half() if t.is_floating_point() else t, value)


class _Export:
    """One file in the making."""

    def __init__(
        self, model: nn.Module, name: str, path: Path, half: bool, cases: Sequence[_Case], tolerance: float
    ) -> None:
        self.kind, self.name, self.path, self.half, self.cases = type(model).__name__, name, path, half, cases
        self.tolerance = tolerance
        self.expected = [self._outputs(model, case) for case in cases]
        self.model = copy.deepcopy(model).half() if half else model
        self.inputs = [_halved(case.inputs) if half else case.inputs for case in cases]

    def _outputs(self, model: nn.Module, case: _Case) -> Any:
        try:
            with torch.no_grad():
                return call_model(model, map_tensors(torch.clone, case.inputs))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise ArtifactError(
                f"{self.kind} itself fails on {_kind_of(case)}: {_said(error)}; give example_inputs that it takes, or "
                "batch_size= if it takes that number of examples only"
            ) from error

    def write(self, opset: int | None, batch_size: int | None) -> Exported:
        plan = Plan(self.model, self.inputs[0], self.expected[0], batch_size is None, opset)
        ways, failures = FORMATS[self.name].ways, []
        for way, write in ways.items():
            try:
                found: list[_Difference] = []
                write_atomically(self.path, partial(self._written, write, plan, found))
            except _DoesNot as error:
                failures.append((way, error))
                continue
            worst = max(found)
            notes = tuple(f"{name} did not do it ({why}), {way} did" for name, why in failures)
            counts = tuple(sorted({case.count for case in self.cases}))
            real = any(case.real for case in self.cases)
            return Exported(
                self.path, self.name, way, worst.error, worst.allowed, counts, real, batch_size, self.half, notes
            )  # fmt: skip
        reasons = "; ".join(f"{way}: {why}" for way, why in failures)
        remedy = "" if batch_size is not None else "; batch_size= fixes the number of examples, which may be easier"
        raise ArtifactError(
            f"{self.path} was not written, {self.kind} cannot be exported to {self.name}: {reasons}{remedy}"
        ) from failures[-1][1]

    def _written(self, write: Callable[[Plan, Path], None], plan: Plan, found: list[_Difference], path: Path) -> None:
        """Write a file and compare it, in the folder in which it is made."""
        try:
            write(plan, path)
            with _unwarned():
                run = FORMATS[self.name].run(path)
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise _DoesNot(_said(error)) from error
        for case, inputs, expected in zip(self.cases, self.inputs, self.expected, strict=True):
            found.extend(self._compared(run, case, inputs, list(tensors_in(expected))))
        if sidecar(path).exists():  # its own name is in the file, which comes last
            sidecar(path).replace(sidecar(self.path))

    def _compared(
        self, run: Callable[[Any], list[Tensor]], case: _Case, inputs: Any, expected: list[Tensor]
    ) -> Iterator[_Difference]:
        where = f"on {_kind_of(case)}"
        try:
            with torch.no_grad(), _unwarned():
                made = run(map_tensors(torch.clone, inputs))
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise _DoesNot(f"the file does not run {where}: {_said(error)}") from error
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (made, expected)]
        if shapes[0] != shapes[1]:
            raise _DoesNot(f"the file gives the shapes {shapes[0]} {where}, and the model {shapes[1]}")
        for one, other in zip(made, expected, strict=True):
            found = _difference(one, other, self.tolerance)
            if not found.error <= found.allowed:
                raise _DoesNot(
                    f"the file differs from the model by {found.error:.1e} {where}, and {found.allowed:.1e} is allowed "
                    f"(tolerance={self.tolerance:g} times the largest output)"
                )
            yield found


@contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _DoesNot(Exception):
    """A way does not work for a model."""


@dataclass(frozen=True, order=True)
class _Difference:
    error: float
    allowed: float


def _difference(made: Tensor, expected: Tensor, tolerance: float) -> _Difference:
    """The largest difference of two tensors, and what is allowed; values that are not finite must be the same."""
    made, expected = made.double(), expected.double()
    finite = expected.isfinite()
    size = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    same = (made == expected) | (made.isnan() & expected.isnan())
    if bool((~same & ~(finite & made.isfinite())).any()):
        return _Difference(math.inf, tolerance * size)
    return _Difference(float((made - expected)[~same].abs().max()) if bool((~same).any()) else 0.0, tolerance * size)


def _kind_of(case: _Case) -> str:
    return f"{case.count} {'real' if case.real else 'random'} example{'s' if case.count > 1 else ''}"


def _said(error: BaseException) -> str:
    """What is at the bottom of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, ArtifactError):
        return line
    return f"{type(error).__name__}: {line if len(line) <= 300 else line[:297] + '...'}"
