r"""Batch-norm folding, as in all experiments of the paper (§4.1).

In eval mode a batch-norm is an affine map per channel, so
:math:`\mathrm{BN}(Wx+b)=\frac{\gamma}{\sigma}Wx+\frac{\gamma}{\sigma}(b-m)+\beta`. Only with that map folded into
:math:`W^n` is the end of the path, :math:`\mu^s W^n\to0`, the removal of the unit: otherwise the channel ends at
the constant :math:`\beta-\gamma m/\sigma`.

:func:`foldable_pairs` finds the pairs, :func:`fold_batchnorm` folds them for good. Scoring does the same
virtually, without touching the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import FoldingError
from singe_plugin.masks import mask_module
from singe_plugin.method.units import RowLayout, tied_parameters
from singe_plugin.nested import call_model, relative_change, tensors_in
from singe_plugin.state import preserved

__all__ = [
    "FoldingReport", "can_fold", "eval_outputs", "fold_batchnorm", "foldable_pairs", "is_batchnorm",
    "norm_scale_shift", "replace_folded",
]  # fmt: skip

_CONVS = (nn.modules.conv._ConvNd,)


def is_batchnorm(module: object) -> bool:
    """Whether a module normalises per channel with *running* statistics: ``nn.BatchNorm*``, ``SyncBatchNorm``,
    timm's ``BatchNormAct2d`` and ``FrozenBatchNormAct2d``, torchvision's ``FrozenBatchNorm2d``.

    Example:
        >>> import torch
        >>> is_batchnorm(torch.nn.BatchNorm2d(3)), is_batchnorm(torch.nn.LayerNorm(3))
        (True, False)
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return (
        isinstance(module, nn.Module)
        and "batchnorm" in type(module).__name__.lower()
        and all(isinstance(getattr(module, n, None), Tensor) for n in ("running_mean", "running_var"))
        and hasattr(module, "eps")
    )


def can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm, if it reads this layer alone and nothing else does, can be made a part of the layer.

    It then is a batch-norm with running statistics that has one channel per output of the layer.

    Example:
        >>> import torch
        >>> layer = torch.nn.Conv2d(3, 4, 1)
        >>> [can_fold(layer, torch.nn.BatchNorm2d(width)) for width in (4, 2)]
        [True, False]
    """
    width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    mean = getattr(norm, "running_mean", None)
    return is_batchnorm(norm) and mean is not None and width == len(mean)


def norm_scale_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    r"""Return a batch-norm in eval mode as scale :math:`\gamma/\sigma` and shift :math:`\beta-m\gamma/\sigma`.

    Args:
        norm: a batch-norm with running statistics.

    Returns:
        two tensors ``[C]``, in float32 or better.

    Raises:
        FoldingError: if the layer keeps no running statistics.

    Example:
        >>> import torch
        >>> scale, shift = norm_scale_shift(torch.nn.BatchNorm1d(2, eps=0.0))
        >>> scale.tolist(), shift.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or var is None:
        raise FoldingError(
            f"{type(norm).__name__} keeps no running statistics (track_running_stats=False), so it is not an affine "
            "map in eval mode and cannot be folded"
        )
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = torch.rsqrt(var.detach().to(dtype) + float(norm.eps))  # type: ignore[arg-type]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        scale = scale * weight.detach().to(dtype)
    shift = -mean.detach().to(dtype) * scale
    if bias is not None:
        shift = shift + bias.detach().to(dtype)
    return scale, shift


@dataclass(frozen=True)
class FoldingReport:
    """What :func:`fold_batchnorm` did.

    Attributes:
        folded: ``(layer, batch-norm)`` by qualified name.
        left: batch-norm name -> why it was left as it is.
    """

    folded: tuple[tuple[str, str], ...]
    left: dict[str, str]


def foldable_pairs(
    model: nn.Module, example_inputs: Any, virtual: bool = False
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Find every batch-norm that reads one convolution or linear layer, and nothing else reads that layer.

    One forward pass is traced through autograd, so that functional uses of a layer's output count as readers too.

    Args:
        model: any model; it is left as it was.
        example_inputs: what the model is called with.
        virtual: for scoring alone; layers whose weight is masked can be folded then.

    Returns:
        the pairs ``(layer, batch-norm)`` and, for every other batch-norm, the reason.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> foldable_pairs(net, torch.zeros(1, 3, 2, 2))
        ([('0', '1')], {})
    """
    names = {module: name for name, module in model.named_modules()}
    written: dict[Any, list[nn.Module]] = {}
    calls: dict[nn.Module, int] = {}
    read: dict[nn.Module, Any] = {}

    def after_layer(module: nn.Module, _: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(output, Tensor) and output.grad_fn is not None:
            written.setdefault(output.grad_fn, []).append(module)

    def before_norm(module: nn.Module, args: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        read[module] = args[0].grad_fn if args and isinstance(args[0], Tensor) else None

    with preserved(model):
        model.eval().requires_grad_(True)
        for module in model.modules():
            if isinstance(module, (*_CONVS, nn.Linear)):
                module.register_forward_hook(after_layer)
            elif is_batchnorm(module):
                module.register_forward_pre_hook(before_norm)
        with torch.enable_grad():
            try:
                outputs = call_model(model, example_inputs)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise FoldingError(
                    f"{type(model).__name__} fails on the example inputs with {type(error).__name__}: {error}; give "
                    "inputs that it runs on"
                ) from error
        readers = _count_readers(outputs)

    ties = tied_parameters(model)
    pairs: list[tuple[str, str]] = []
    left: dict[str, str] = {}
    for norm in (m for m in model.modules() if is_batchnorm(m)):
        layers = written.get(read.get(norm), []) if read.get(norm) is not None else []
        if norm not in calls:
            left[names[norm]] = "it did not run in the forward pass"
        elif norm.running_mean is None:
            left[names[norm]] = "it keeps no running statistics (track_running_stats=False)"
        elif calls[norm] > 1:
            left[names[norm]] = "it is called more than once"
        elif not layers:
            left[names[norm]] = "what it reads is not the output of a convolution or linear layer"
        elif calls[layers[0]] > 1:
            left[names[norm]] = f"{names[layers[0]]} is called more than once"
        elif readers.get(read[norm], 0) != 1:
            left[names[norm]] = f"the output of {names[layers[0]]} is read elsewhere too"
        elif "weight" not in layers[0]._parameters and not (virtual and mask_module(layers[0])):
            left[names[norm]] = f"the weight of {names[layers[0]]} is computed (parametrized)"
        elif any(id(parameter) in ties for parameter in layers[0]._parameters.values()):
            left[names[norm]] = f"{names[layers[0]]} shares a parameter with another layer"
        elif not can_fold(layers[0], norm):
            left[names[norm]] = f"it does not have one channel per output of {names[layers[0]]}"
        else:
            pairs.append((names[layers[0]], names[norm]))
    return pairs, left


def _count_readers(outputs: Any) -> dict[Any, int]:
    """Count how many edges of the autograd graph (and model outputs) read each node."""
    readers: dict[Any, int] = {}
    stack = []
    for tensor in tensors_in(outputs):
        if tensor.grad_fn is not None:
            readers[tensor.grad_fn] = readers.get(tensor.grad_fn, 0) + 1
            stack.append(tensor.grad_fn)
    seen = set(stack)
    while stack:
        node = stack.pop()
        for parent, _ in node.next_functions:
            if parent is None:
                continue
            readers[parent] = readers.get(parent, 0) + 1
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return readers


def fold_batchnorm(model: nn.Module, example_inputs: Any) -> FoldingReport:
    """Fold every batch-norm that can be folded, in place and for good (§4.1 of the paper).

    The layer gets the folded weight and a bias; the batch-norm is replaced by what is left of it: nothing, or
    the activation and drop layers of timm's ``BatchNormAct2d``. In eval mode the function is unchanged to
    rounding; training then continues without batch-norm.

    Args:
        model: changed in place.
        example_inputs: what the model is called with, for tracing.

    Returns:
        what was folded and what was not, with the reason.

    Raises:
        FoldingError: if the outputs on ``example_inputs`` change, because something outside autograd (``detach``,
            ``no_grad``) also reads a folded layer; the model is then as it was.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
        >>> fold_batchnorm(net, torch.zeros(1, 3, 2, 2)).folded
        (('0', '1'),)
        >>> net
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
        )
    """
    pairs, left = foldable_pairs(model, example_inputs)
    before = eval_outputs(model, example_inputs)
    undo = [(m, dict(m._parameters), dict(m._modules)) for m in model.modules()]
    data = [(p, p.data) for p in model.parameters()]
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        weight, bias = _fused(layer, norm)
        _assign(layer, "weight", weight)
        _assign(layer, "bias", bias)
        replace_folded(model, norm_name)
    change = relative_change(before, eval_outputs(model, example_inputs))
    if not change < 1e-2:
        for module, parameters, children in undo:
            module._parameters.update(parameters)
            module._modules.update(children)
        for parameter, value in data:
            parameter.data = value
        raise FoldingError(
            f"folding {len(pairs)} batch-norms of {type(model).__name__} changes the output by {change:.2g} : "
            "a folded layer's output is also read outside autograd (detach or no_grad in the forward); do not fold"
        )
    return FoldingReport(tuple(pairs), left)


def eval_outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Copy all floating tensors that a model returns in eval mode; the model is left as it was."""
    with preserved(model), torch.no_grad():
        model.eval()
        return [t.clone() for t in tensors_in(call_model(model, example_inputs)) if t.is_floating_point()]


def _fused(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    parameter, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert parameter is not None
    weight = parameter.detach()
    scale, shift = norm_scale_shift(norm)
    transposed = bool(getattr(layer, "transposed", False))
    layout = RowLayout(dim=1, groups=int(layer.groups)) if transposed else RowLayout()  # type: ignore[arg-type]
    start = torch.zeros_like(shift) if bias is None else bias.detach().to(shift.dtype)
    return (weight * layout.spread(scale, weight)).to(weight.dtype), (scale * start + shift).to(weight.dtype)


def _assign(layer: nn.Module, attr: str, value: Tensor) -> None:
    current = layer._parameters.get(attr)
    if current is None:
        weight = layer._parameters["weight"]
        flag = weight is not None and weight.requires_grad
        layer._parameters[attr] = nn.Parameter(value.clone(), requires_grad=flag)
    else:
        current.data = value.clone(memory_format=torch.preserve_format)


def replace_folded(model: nn.Module, norm_name: str) -> None:
    """Replace a folded batch-norm by what is left of it (its activation and drop layers, or an identity)."""
    norm = model.get_submodule(norm_name)
    rest = [getattr(norm, n) for n in ("drop", "act") if isinstance(getattr(norm, n, None), nn.Module)]
    rest = [m for m in rest if not isinstance(m, nn.Identity)]
    replacement: nn.Module = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    replacement.train(norm.training)
    # it may be registered under several names, any of which the forward may use
    for name in [n for n, m in model.named_modules(remove_duplicate=False) if m is norm]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
