"""Attention that divides by the square root of the width it finds, and the parameters that can make up for it.

``scaled_dot_product_attention(q, k, v)`` without a ``scale`` computes ``softmax(q k' / sqrt(d))`` with the *current*
head width d. After a removal d is smaller, and the softmax would be sharper than the model was trained with. The old
scale is kept by multiplying the parameters that produce q (or k) by ``sqrt(d_new / d_old)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from singe_plugin.state import plain_layers, preserved

from .algebra import Axis, fix, is_fixed
from .trace import Forward, Trace

__all__ = ["ImpliedScale", "implied_scales"]

_EXACT = 1e-3  # relative, in single precision


@dataclass
class ImpliedScale:
    """One attention's width, and the rows (of dimension 0) of the parameters that q or k is proportional to."""

    width: Axis
    rows: list[tuple[nn.Module, str, Tensor]]


class _Attention(TorchFunctionMode):
    def __init__(self, search: _Search) -> None:
        super().__init__()
        self.search = search

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.search.look(named["query"], named["key"], named["value"])
        return func(*args, **kwargs)


class _Search:
    """Finds, for every call of interest, the parameters of the calling module that its q (or k) is proportional to."""

    def __init__(self, callers: set[nn.Module]) -> None:
        self.callers = callers
        self.stack: list[nn.Module] = []
        self.plain, self.open = ExitStack(), 0
        self.calls: Counter[nn.Module] = Counter()
        self.found: dict[tuple[nn.Module, int], list[tuple[nn.Module, str, Tensor]] | None] = {}

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if not self.stack:
            return
        caller = self.stack[-1]
        key = (caller, self.calls[caller])
        self.calls[caller] += 1
        if key in self.found:
            return
        self.found[key] = None
        for one, others in ((q, (k, v)), (k, (q, v))):
            with _saved_plainly():
                rows = _proportional(caller, one, others)
            if rows is not None:
                self.found[key] = rows
                return

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stack.append(module)
        if module in self.callers:  # nothing in front of it needs a graph
            self.plain.enter_context(_saved_plainly())
            self.open += 1
            return tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()}
        return None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()
        if module in self.callers:
            self.open -= 1
            if not self.open:
                self.plain.close()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _saved_plainly() -> torch.autograd.graph.saved_tensors_hooks:
    """Keep what a checkpoint around this would not save, so that the graph in it can be differentiated."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _proportional(
    caller: nn.Module, one: Tensor, others: tuple[Tensor, ...]
) -> list[tuple[nn.Module, str, Tensor]] | None:
    if not one.requires_grad:
        return None
    holders = [m for m in caller.modules() if any(p.requires_grad for p in m._parameters.values() if p is not None)]
    generator = torch.Generator().manual_seed(0)
    # of the tensor's own signs, so that the projection is far from zero
    probe = one.detach().sign() * (torch.rand(one.shape, generator=generator) + 0.5).to(one)
    total = float((one.detach() * probe).sum())
    reached: list[tuple[nn.Module, str, Tensor, float]] = []
    for module in holders:
        for attr, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad:
                continue
            (gradient,) = torch.autograd.grad((one * probe).sum(), parameter, retain_graph=True, allow_unused=True)
            if gradient is None:
                continue
            rows = gradient.reshape(len(gradient), -1).abs().amax(1) > 0 if gradient.ndim else gradient.abs() > 0
            if not bool(rows.any()) or not gradient.ndim or _touches(others, parameter, rows):
                continue
            reached.append((module, attr, rows, float((gradient * parameter.detach()).sum())))
    # the derivative along parameters that a tensor is proportional to is the tensor itself (Euler)
    for chosen in _subsets(reached):
        if abs(sum(r[3] for r in chosen) - total) <= _EXACT * total:
            return [(module, attr, rows) for module, attr, rows, _ in chosen]
    return None


def _subsets(reached: list[Any]) -> Iterator[list[Any]]:
    for module in dict.fromkeys(r[0] for r in reached[::-1]):
        yield [r for r in reached if r[0] is module]
    yield reached


def _touches(others: tuple[Tensor, ...], parameter: Tensor, rows: Tensor) -> bool:
    for other in others:
        if not other.requires_grad:
            continue
        probe = torch.randn(other.shape, generator=torch.Generator().manual_seed(1)).to(other)
        (gradient,) = torch.autograd.grad((other * probe).sum(), parameter, retain_graph=True, allow_unused=True)
        if gradient is not None and bool((gradient.reshape(len(gradient), -1).abs().amax(1)[rows] > 0).any()):
            return True
    return False


def _two_of_each(inputs: Any) -> Any:
    """Take a single image twice: on CPU the gradient of a batch-norm in eval mode can be wrong for a batch of one."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4 and len(inputs) == 1:
        return torch.cat([inputs, inputs])
    return inputs


def implied_scales(model: nn.Module, inputs: Any, trace: Trace, forward: Forward) -> list[ImpliedScale]:
    """Find the parameters to rescale for every attention of a trace; a width that nothing can make up for is fixed."""
    wanted = [call for call in trace.attention if not is_fixed(call.width)]
    if not wanted:
        return []
    search = _Search({call.caller for call in wanted})
    with preserved(model), plain_layers(model), torch.enable_grad(), search.plain:
        model.eval()
        own = {id(p) for caller in search.callers for p in caller.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own and parameter.is_floating_point())
        for module in model.modules():
            module.register_forward_pre_hook(search.enter, with_kwargs=True)
            module.register_forward_hook(search.leave)
        trace.forget()
        with _Attention(search):
            forward(model, _two_of_each(inputs))
    found = []
    for call in wanted:
        rows = search.found.get((call.caller, call.number))
        if rows is None:
            fix(
                call.width,
                f"the scale of {type(call.caller).__name__} follows its width, and no parameter makes up for it",
            )
        else:
            found.append(ImpliedScale(call.width, rows))
    return found
