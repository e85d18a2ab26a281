"""What runs a network while its passes are timed: PyTorch, torch.compile or ONNX Runtime.

A backend makes a *runner* of a network: a function that runs
one pass; on a CUDA device, it may return before that is done. It can also say how
a pass is spread over layers: what runs between the start of one layer and of the next belongs to the first.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from singe_plugin.errors import ConfigError, MissingPackageError, is_of_the_machine
from singe_plugin.nested import call_model, tensors_in
from singe_plugin.state import model_device, preserved

__all__ = ["BACKENDS", "Backend", "Runner", "export_onnx", "find_backend", "now"]

Runner = Callable[[], Any]
_WARM = 3
_PASSES = 10


class Backend(Protocol):
    """What runs networks."""

    def runner(self, model: nn.Module, inputs: Any, threads: int) -> Runner:
        """A function that runs one pass of the model as it is now; the model is in eval mode."""

    def spread(self, model: nn.Module, inputs: Any, layers: Collection[str], threads: int) -> dict[str, float]:
        """Layer -> milliseconds until the next one starts; the least of some passes, as other programs only add."""

    def version(self) -> str:
        """The name and version of what runs."""


def now(device: torch.device) -> float:
    """The time in seconds, when everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Eager:
    """PyTorch as it is."""

    def runner(self, model: nn.Module, inputs: Any, threads: int) -> Runner:
        """Calls the model."""
        return partial(call_model, model, inputs)

    def spread(self, model: nn.Module, inputs: Any, layers: Collection[str], threads: int) -> dict[str, float]:
        """Looks at the clock whenever a layer starts."""
        device = model_device(model)
        seen: list[tuple[str, float]] = []
        found: dict[str, list[float]] = {name: [] for name in layers}
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with preserved(model), torch.no_grad(), current:
            model.eval()
            for name, module in model.named_modules():
                if name in found:
                    module.register_forward_pre_hook(lambda _, __, name=name: seen.append((name, now(device))))
            for number in range(_WARM + _PASSES):
                seen.clear()
                start = now(device)
                call_model(model, inputs)
                end = now(device)
                if number >= _WARM:
                    taken = dict.fromkeys(layers, 0.0)
                    starts = [start, *(when for _, when in seen[1:]), end]
                    for (name, _), first, last in zip(seen, starts, starts[1:], strict=False):
                        taken[name] += 1000 * (last - first)
                    for name, ms in taken.items():
                        found[name].append(ms)
        return {name: min(rows) for name, rows in found.items()}

    def version(self) -> str:
        """PyTorch's."""
        return f"torch {torch.__version__}"


class Compiled(Eager):
    """What torch.compile makes of the network; its layers are spread as PyTorch runs them."""

    def runner(self, model: nn.Module, inputs: Any, threads: int) -> Runner:
        """Compiles the forward pass, anew for every network."""
        torch._dynamo.reset()
        run = partial(call_model, torch.compile(model), inputs)
        try:
            run()
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise ConfigError(
                f"torch.compile cannot run {type(model).__name__} ({type(error).__name__}: {error}); measure its "
                "latency with another backend"
            ) from error
        return run


class OnnxRuntime:
    """ONNX Runtime, on the CPU or on the CUDA device that the model is on."""

    def runner(self, model: nn.Module, inputs: Any, threads: int) -> Runner:
        """Runs the exported network."""
        session, feeds = self._session(export_onnx(model, inputs), model, inputs, threads)
        return lambda: session.run(None, feeds)

    def spread(self, model: nn.Module, inputs: Any, layers: Collection[str], threads: int) -> dict[str, float]:
        """Reads the profile of its operators, which carry the names of the layers, those that they fuse included."""
        program = export_onnx(model, inputs)
        with tempfile.TemporaryDirectory() as folder:
            session, feeds = self._session(program, model, inputs, threads, Path(folder) / "profile")
            for _ in range(_WARM + _PASSES):
                session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        size = len(nodes) // (_WARM + _PASSES)
        owners = _Owners(program, layers)
        found: dict[str, list[float]] = {name: [] for name in layers}
        for number in range(_WARM, _WARM + _PASSES):
            taken, last = dict.fromkeys(layers, 0.0), None
            for event in nodes[number * size : (number + 1) * size]:
                last = owners.of(event["name"]) or last or owners.first
                if last is not None:
                    taken[last] += event["dur"] / 1000
            for name, ms in taken.items():
                found[name].append(ms)
        return {name: min(rows) for name, rows in found.items()}

    def version(self) -> str:
        """ONNX Runtime's."""
        return f"onnxruntime {_needed('onnxruntime').__version__}"

    def _session(
        self, program: bytes, model: nn.Module, inputs: Any, threads: int, profile: Path | None = None
    ) -> tuple[Any, dict[str, Any]]:
        runtime = _needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        wanted = ["CUDAExecutionProvider"] if model_device(model).type == "cuda" else ["CPUExecutionProvider"]
        if wanted[0] not in runtime.get_available_providers():
            raise ConfigError(
                "the model is on a CUDA device, and this ONNX Runtime runs on the CPU only; pip install "
                "onnxruntime-gpu, or measure with device='cpu'"
            )
        session = runtime.InferenceSession(program, options, providers=wanted)
        values = [tensor.detach().cpu().numpy() for tensor in tensors_in(inputs)]
        names = [given.name for given in session.get_inputs()]
        return session, dict(zip(names, values, strict=False))


class _Owners:
    """Which layer an operator of a profile is a part of, by the names of the program before it was optimised."""

    def __init__(self, program: bytes, layers: Collection[str]) -> None:
        graph = _needed("onnx").load_from_string(program).graph
        self._producers = {out: node for node in graph.node for out in node.output}
        self._layers = {node.name: owner for node in graph.node if (owner := _owner(node.name, layers)) is not None}
        self._by_name = {node.name: node for node in graph.node}
        self.first = next((self._layers[node.name] for node in graph.node if node.name in self._layers), None)

    def of(self, event: str) -> str | None:
        """The layer of an operator, or of what was fused into it; None for one that is none of a layer's own."""
        name = event.removesuffix("_kernel_time").removesuffix("_nchwc")
        node = self._producers.get(name) or self._by_name.get(name)
        if node is None:  # named after a node, with what became of it behind
            parts = name.split("/")
            node = next((self._by_name[n] for end in range(len(parts), 1, -1) if (n := "/".join(parts[:end])) in
                         self._by_name), None)  # fmt: skip
        waiting = [] if node is None else [node]
        for _ in range(4):  # an activation or a sum that was fused into the layer before it
            for one in waiting:
                if one.name in self._layers:
                    return self._layers[one.name]
            if not name.endswith("_output_0"):
                return None
            waiting = [self._producers[out] for one in waiting for out in one.input if out in self._producers]
        return None


def _owner(node: str, layers: Collection[str]) -> str | None:
    """The layer that a node was exported from: its scope repeats the path in every step.

    Example:
        >>> _owner("/layer1/layer1.0/conv1/Conv", {"layer1.0.conv1"}), _owner("/Add", {"fc"})
        ('layer1.0.conv1', None)
    """
    *scopes, _ = node.strip("/").split("/")
    path = ""
    for scope in scopes:
        inside = scope.startswith(f"{path}.") if path else False
        last = path.rpartition(".")[2]
        if inside:
            path = scope
        elif last and scope.startswith(f"{last}."):
            path = f"{path.rpartition('.')[0]}.{scope}".strip(".")
        else:
            path = f"{path}.{scope}".strip(".")
    return path if path in layers else None


def export_onnx(model: nn.Module, inputs: Any) -> bytes:
    """The network as an ONNX program for these inputs' shapes, with the layers' names in it.

    Raises:
        ConfigError: if it cannot be exported.
        MissingPackageError: without onnx.
    """
    _needed("onnx")
    program = io.BytesIO()
    arguments, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    arguments = tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)
    try:
        with warnings.catch_warnings(), torch.no_grad(), preserved(model):
            warnings.simplefilter("ignore")
            model.eval()
            # the older exporter, which names nodes after layers, writes into memory, and is ten times as fast
            torch.onnx.export(model, arguments, program, kwargs=keywords, dynamo=False, verbose=False)  # type: ignore[arg-type]
    except Exception as error:
        if is_of_the_machine(error):
            raise
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise ConfigError(
            f"{type(model).__name__} cannot be exported to ONNX to be timed ({type(error).__name__}: {reason}); "
            "measure its latency with backend='torch'"
        ) from error
    return program.getvalue()


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"latency with ONNX Runtime needs {name}, which is not installed: pip install onnx onnxruntime"
        ) from error


BACKENDS: dict[str, Backend] = {"torch": Eager(), "compile": Compiled(), "onnxruntime": OnnxRuntime()}
"""Name -> what runs networks."""


def find_backend(name: str) -> Backend:
    """The backend of a name, which :class:`~singe_plugin.loop.times.Timing` has checked."""
    return BACKENDS[name]
