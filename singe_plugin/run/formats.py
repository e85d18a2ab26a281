"""The formats that a model is exported to: how a file is written, and how it is run without the model.

A format may have more than one way to be written; they are tried in order, and what came of the first is said. Each is
run by the library that others run it with: ONNX Runtime, ``torch.export.load``, ``torch.jit.load``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ArtifactError, MissingPackageError
from singe_plugin.nested import call_model, examples_in, tensors_in
from singe_plugin.run.inputs import batched, template_of

__all__ = ["FORMATS", "Format", "Plan", "sidecar"]

Run = Callable[[Any], list[Tensor]]
BATCH = "batch"
LARGEST_ONNX = 2**31 - 2**24
"""Bytes of weights that fit into one ONNX file, which is limited to 2 GiB; those of larger models go beside it."""


@dataclass(frozen=True)
class Plan:
    """What is written.

    Attributes:
        model: a copy of the user's, on the CPU and in eval mode.
        inputs: what it is traced with.
        outputs: what it gives for them.
        dynamic: whether the number of examples may be another one later.
        opset: of ONNX; None is the exporter's own.
    """

    model: nn.Module
    inputs: Any
    outputs: Any
    dynamic: bool
    opset: int | None

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        if isinstance(self.inputs, Mapping):
            return ()
        return tuple(self.inputs) if isinstance(self.inputs, (tuple, list)) else (self.inputs,)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return dict(self.inputs) if isinstance(self.inputs, Mapping) else {}

    def dynamic_shapes(self) -> Any:
        """What ``torch.export`` is told of the sizes: the first one of everything with a row for each example."""
        if not self.dynamic:
            return None
        count, batch = examples_in(self.inputs), torch.export.Dim(BATCH)
        return template_of(self.kwargs or self.args, lambda t: {0: batch} if batched(t, count) else None)

    def input_names(self) -> list[str]:
        """A name for each tensor that goes in."""
        if self.kwargs:
            return _names(self.kwargs, "input")
        try:
            known = list(inspect.signature(self.model.forward).parameters)
        except (TypeError, ValueError):
            known = []
        named = dict(zip(known, self.args, strict=False))
        return _names(named if len(named) == len(self.args) else list(self.args), "input")

    def output_names(self) -> list[str]:
        """A name for each tensor that comes out."""
        return _names(self.outputs, "output")

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """The same as :meth:`dynamic_shapes`, as the older exporter is told."""
        if not self.dynamic:
            return {}
        count = examples_in(self.inputs)
        named: dict[str, Tensor] = {}
        for names, values in ((self.input_names(), self.inputs), (self.output_names(), self.outputs)):
            named |= dict(zip(names, tensors_in(values), strict=True))
        return {name: {0: BATCH} for name, tensor in named.items() if batched(tensor, count)}


def _names(value: Any, prefix: str) -> list[str]:
    found = [name or prefix for name in _named(value, "")]
    if isinstance(value, (tuple, list)):
        found = [prefix + name for name in found] if len(found) > 1 else [prefix] * len(found)
    return [name if found.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(found)]


def _named(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(part, f"{name}_{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _named(part, f"{name}_{i}")


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        suffixes: of its files; the first one is the usual one.
        ways: how it is written, by name: functions of a plan and a path, tried in this order.
        run: opens a file, and returns a function of inputs that gives all tensors of the outputs.
        packages: what has to be installed beside PyTorch.
        opset: whether it has versions of operators.
    """

    suffixes: tuple[str, ...]
    ways: Mapping[str, Callable[[Plan, Path], None]]
    run: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    opset: bool = False

    def need(self, name: str) -> None:
        """Raise :class:`~singe_plugin.MissingPackageError` unless everything is installed."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise MissingPackageError(
                f"{name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: pip "
                f"install {' '.join(self.packages)}",
                name=missing[0],
            )


# -- torch.export ---------------------------------------------------------------------------------------------------


def _program(plan: Plan) -> Any:
    return torch.export.export(
        plan.model, plan.args, plan.kwargs or None, dynamic_shapes=plan.dynamic_shapes(), strict=False
    )


def _write_program(plan: Plan, path: Path) -> None:
    torch.export.save(_program(plan), path)


def _run_program(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: list(tensors_in(call_model(module, inputs)))


# -- TorchScript ----------------------------------------------------------------------------------------------------


def _write_script(plan: Plan, path: Path) -> None:
    inputs = {"example_kwarg_inputs": plan.kwargs} if plan.kwargs else {"example_inputs": plan.args}
    jit: Any = torch.jit
    traced = jit.trace(plan.model, **inputs, strict=False, check_trace=False)
    jit.save(traced, str(path))


def _run_script(path: Path) -> Run:
    jit: Any = torch.jit
    module = jit.load(str(path), map_location="cpu")
    return lambda inputs: list(tensors_in(call_model(module, inputs)))


# -- ONNX -----------------------------------------------------------------------------------------------------------


def sidecar(path: Path) -> Path:
    """Where the weights of an ONNX file are that is too large for them."""
    return path.with_name(f"{path.name}.data")


def _beside(plan: Plan) -> bool:
    tensors = {t.data_ptr(): t.numel() * t.itemsize for t in (*plan.model.parameters(), *plan.model.buffers())}
    return sum(tensors.values()) >= LARGEST_ONNX


def _write_onnx(plan: Plan, path: Path) -> None:
    """By the exporter that starts from ``torch.export``."""
    program: Any = torch.onnx.export(
        plan.model, plan.args, kwargs=plan.kwargs or None, dynamo=True, verbose=False, opset_version=plan.opset,
        dynamic_shapes=plan.dynamic_shapes(), input_names=plan.input_names(), output_names=plan.output_names(),
    )  # fmt: skip
    program.save(path, external_data=_beside(plan))
    _check_opset(plan, path)


def _write_older_onnx(plan: Plan, path: Path) -> None:
    """By the exporter that starts from a TorchScript trace."""
    if _beside(plan):
        raise ArtifactError("its weights do not fit into one file, which this exporter would write")
    torch.onnx.export(
        plan.model, plan.args or (plan.kwargs,), str(path), dynamo=False, opset_version=plan.opset,
        input_names=plan.input_names(), output_names=plan.output_names(), dynamic_axes=plan.dynamic_axes(),
    )  # fmt: skip
    _check_opset(plan, path)


def _check_opset(plan: Plan, path: Path) -> None:
    onnx = importlib.import_module("onnx")
    found = {entry.domain: entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import}
    if plan.opset is not None and found.get("") != plan.opset:
        raise ArtifactError(f"opset {plan.opset} was asked for, and the exporter wrote opset {found.get('')}")


def _run_onnx(path: Path) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    expected = [entry.name for entry in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        values = list(tensors_in(inputs))
        names = [entry.name for entry in session.get_inputs()]
        if len(names) != len(values):
            raise ArtifactError(f"the file has the inputs {', '.join(expected)}, and the model has {len(values)}")
        return [torch.from_numpy(out) for out in session.run(None, {n: v.numpy() for n, v in zip(names, values)})]

    return run


def _quietly(write: Callable[[Plan, Path], None]) -> Callable[[Plan, Path], None]:
    """What exporters warn of (a trace that holds for one size only) is found by comparing; they print whole graphs."""

    def quiet(plan: Plan, path: Path) -> None:
        printed = io.StringIO()
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            write(plan, path)

    return quiet


FORMATS: dict[str, Format] = {
    "onnx": Format(
        (".onnx",),
        {
            "torch.onnx.export(dynamo=True)": _quietly(_write_onnx),
            "torch.onnx.export(dynamo=False)": _quietly(_write_older_onnx),
        },
        _run_onnx,
        ("onnx", "onnxruntime", "onnxscript"),
        opset=True,
    ),
    "torch-export": Format((".pt2",), {"torch.export.export": _quietly(_write_program)}, _run_program),
    "torchscript": Format((".pt", ".ts", ".torchscript"), {"torch.jit.trace": _quietly(_write_script)}, _run_script),
}
"""The formats by name."""
