"""2:4 weights that are computed faster: linear layers for the sparse tensor cores of CUDA devices.

Masks alone make nothing faster. For 2:4 in half precision PyTorch has kernels
(``torch.sparse.to_sparse_semi_structured``), on CUDA devices from compute capability 8.0 on. The weights are packed
for them, for inference; what does not fit stays dense, and is named with the reason.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, is_of_the_machine
from singe_plugin.masks import LAYERS, mask_module
from singe_plugin.nested import call_model, copied, relative_change, tensors_in, to_device
from singe_plugin.state import model_device, preserved

from .patterns import Pattern

__all__ = ["SparseKernels", "sort_layers", "use_sparse_kernels"]

_logger = logging.getLogger("singe_plugin")
_PATTERN = Pattern(2, 4)
_LEAST = (8, 0)  # compute capability: Ampere
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class SparseKernels:
    """What :func:`use_sparse_kernels` did.

    Attributes:
        layers: names of the layers whose weights are packed.
        left: names of the others with weights, and why they stay dense.
        difference: the largest change of the outputs, relative to their size.
    """

    layers: list[str]
    left: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers for 2:4 kernels, outputs differ by {self.difference:.1e} (relative)"]
        return "\n".join([*lines, *(f"dense: {name}: {why}" for name, why in self.left.items())])


def use_sparse_kernels(model: nn.Module, example_inputs: Any, tolerance: float | None = None) -> SparseKernels:
    """Pack the 2:4 weights of linear layers for PyTorch's sparse kernels, and compare the outputs.

    The model is for inference then: save or export it before. On failure it is as it was. How much faster a layer gets
    depends on its size and on the number of rows that it reads: measure it, with
    :func:`singe_plugin.run.latency.latency_of`, say.

    Args:
        model: on a CUDA device, in half precision or bfloat16, with zeros in its weights (``prune_weights(...,
            sparsity="2:4")``, saved ones too). Changed in place.
        example_inputs: what it is called with.
        tolerance: of the outputs, relative to their size; None is 1e-2, and 5e-2 for bfloat16.

    Raises:
        ConfigError: if there are no such kernels for the model's device, if no layer fits, or the outputs differ.

    Example:
        >>> use_sparse_kernels(nn.Linear(64, 32).half(), torch.ones(1, 64).half())
        Traceback (most recent call last):
        singe_plugin.errors.ConfigError: the model is on cpu, where zeros make nothing faster: ...
    """
    device = model_device(model)
    check_device(device)
    fitting, left = sort_layers(model)
    if not fitting:
        name, why = next(iter(left.items()), ("the model", "it has no linear layer"))
        raise ConfigError(f"no layer fits the 2:4 kernels, {name}: {why} ({len(left)} layers are left as they are)")
    modules = dict(model.named_modules())
    limit = tolerance or max(_TOLERANCES[modules[name].weight.dtype] for name in fitting)
    inputs = to_device(example_inputs, device)
    expected = _outputs(model, inputs)
    dense = {name: modules[name]._parameters["weight"] for name in fitting}
    done: list[str] = []
    try:
        for name in fitting:
            refused = _packed(modules[name])
            if refused is None:
                done.append(name)
            else:
                left[name] = refused
        change = relative_change(expected, _outputs(model, inputs))
        if not done or not change <= limit:
            raise ConfigError(
                f"with 2:4 kernels the outputs differ by {change:.1e} of their size, and {limit:g} is allowed; nothing "
                "was changed"
                if done
                else f"no layer could be packed, {fitting[0]}: {left[fitting[0]]}"
            )
    except BaseException:
        for name, weight in dense.items():
            modules[name]._parameters["weight"] = weight
        raise
    found = SparseKernels(done, left, change)
    _logger.info("%s", found)
    return found


def check_device(device: torch.device) -> None:
    """Raise :class:`ConfigError` unless a device has kernels for 2:4."""
    instead = "remove units instead (singe_plugin.prune), which makes the matrices smaller on every device"
    if device.type != "cuda":
        raise ConfigError(
            f"the model is on {device}, where zeros make nothing faster: PyTorch has kernels for 2:4 on CUDA devices "
            f"only. Move it to one, or {instead}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and 2:4 kernels need "
            f"{_LEAST[0]}.{_LEAST[1]}; {instead}"
        )


def sort_layers(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The layers whose weights fit the kernels, and of all others with weights why they do not.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(3, 8, 3)).half()
        >>> _ = net[0].weight.data.view(-1, 4)[:, 2:].zero_()
        >>> sort_layers(net)
        (['0'], {'1': 'it is a Conv2d, and PyTorch has 2:4 kernels for linear layers only'})
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    fitting, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            why = _misfit(module, owners, f"{name}.weight".lstrip("."))
            if why is None:
                fitting.append(name)
            else:
                left[name] = why
    return fitting, left


def _misfit(layer: nn.Module, owners: dict[int, list[str]], name: str) -> str | None:
    if mask_module(layer) is not None:
        return "its mask is held; make it permanent first, singe_plugin.masks.fold_masks(model)"
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear):
        return f"it is a {type(layer).__name__}, and PyTorch has 2:4 kernels for linear layers only"
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, whose weight may be read by other code"
    if weight is None:
        return "its weight is computed by a parametrization"
    others = [other for other in owners[id(weight)] if other != name]
    if others:
        return f"its weight is {others[0]!r}, too"
    if weight.dtype not in _TOLERANCES:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weights are {dtype}; the kernels take float16 and bfloat16, model.half() converts it"
    rows, columns = multiples(weight.dtype)
    out, inputs = weight.shape
    if out % rows or inputs % columns:
        return f"its weight is {out} x {inputs}; the kernels need multiples of {rows} x {columns}"
    if not _is_sparse(weight):
        return "more than two of some four consecutive weights are not zero: it has no 2:4 pattern"
    return None


def multiples(dtype: torch.dtype) -> tuple[int, int]:
    """The numbers of rows and columns that PyTorch's kernels want multiples of.

    Example:
        >>> all(number % 8 == 0 for number in multiples(torch.float16))
        True
    """
    base: Any = torch.sparse.SparseSemiStructuredTensor
    sparse: Any = torch.sparse
    name = "SparseSemiStructuredTensorCUTLASS" if base._FORCE_CUTLASS else "SparseSemiStructuredTensorCUSPARSELT"
    found = getattr(sparse, name)._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return int(found.sparse_min_rows), int(found.sparse_min_cols)


def _is_sparse(weight: Tensor) -> bool:
    blocks = weight.detach().reshape(-1, _PATTERN.block)
    return bool(((blocks != 0).sum(1) <= _PATTERN.keep).all())


def _packed(layer: nn.Module) -> str | None:
    """Pack a layer's weight; why PyTorch does not, if it does not."""
    weight = layer._parameters["weight"]
    assert weight is not None
    pack: Any = torch.sparse.to_sparse_semi_structured
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype: it is compared
            packed = pack(weight.detach().contiguous())
    except (RuntimeError, NotImplementedError) as error:
        if is_of_the_machine(error):
            raise
        return f"PyTorch does not pack it ({(str(error).splitlines() or [''])[0]})"
    layer._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
    return None


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with preserved(model), torch.no_grad():
        model.eval()
        try:
            return [t.float() for t in tensors_in(call_model(model, copied(inputs)))]
        except RuntimeError as error:
            if is_of_the_machine(error):
                raise
            raise ConfigError(
                f"{type(model).__name__} does not run on the example inputs: {(str(error).splitlines() or [''])[0]}"
            ) from error
