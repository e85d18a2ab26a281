"""Following the axes of all parameters through one forward pass, operator by operator."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from singe_plugin.computed import Computed, computed_in
from singe_plugin.errors import GroupError
from singe_plugin.nested import call_model, results_in, tensors_in
from singe_plugin.state import computed_tables, plain_layers, preserved, tables_of, want_gradients

from .algebra import fix_all, fresh, is_fixed
from .alternatives import other_forms
from .contractions import CONTRACTING
from .equations import solve
from .rules import RULES, pointwise
from .sizes import CUTS, cut_evenly, link_sizes
from .trace import Forward, Trace
from .tracked import ASKED, COMPARED, OBSERVERS, dimension, tracked_attributes, tracked_in

__all__ = ["trace"]


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rule of every operator."""

    def __init__(self, state: Trace, rules: dict[str, Callable[..., None]], pointwise: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state, self.rules, self.pointwise = state, rules, pointwise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        state = self.state
        out = func(*args, **kwargs)
        state.operator = name = func._schema.name.split("::")[1]
        state.note_reading((args, kwargs), out)
        rule = self.rules.get(name)
        if rule is not None:
            rule(state, args, kwargs, out)
        elif torch.Tag.pointwise in func.tags:
            self.pointwise(state, args, kwargs, out)
        else:
            _unknown(state, args, kwargs, out)
        if name in CONTRACTING:
            state.contractions.append((state.of(args[CONTRACTING[name]]), state.of(out)))
            state.contracted_in.append(state.stack[-1] if state.stack else None)
        state.origins.note(name, args, list(tensors_in((args, kwargs))), list(tensors_in(out)))
        state.counted()
        return out


def _unknown(state: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Nothing may be removed from what an operator without a rule reads."""
    owner = type(state.stack[-1]).__name__ if state.stack else ""
    state.unknown.setdefault(state.operator, set()).add(owner)
    why = f"the operator {state.where} has no rule"
    for tensor in tensors_in((args, kwargs)):
        fix_all(state.of(tensor), why)
    for tensor in tensors_in(out):
        state.set(tensor, [fresh(size, why) for size in tensor.shape])


class _Functions(TorchFunctionMode):
    """Links the integer attributes that torch functions are called with to the dimensions of what they return."""

    def __init__(self, state: Trace) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" and kwargs.get("scale") is None:
            self.state.note_attention(kwargs["query"] if "query" in kwargs else args[0])
        with torch._C.DisableTorchFunctionSubclass():  # a subclass would give out another object than what was followed
            out = func(*args, **kwargs)
        with self.state.booking():
            return self._noted(name, args, kwargs, out)

    def _noted(self, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """What the model gets of a function's result."""
        if name == "__get__" and isinstance(out, torch.Size):
            return self._sizes(args[0], out)
        if name == "size":
            if isinstance(out, torch.Size):
                return self._sizes(args[0], out)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return self._sizes(args[0], args[0].shape)[dim]
        if name in ("numel", "nelement"):
            return math.prod(self._sizes(args[0], args[0].shape))
        if name == "__len__":
            for size in tracked_in(tuple(self._sizes(args[0], args[0].shape))[:1]):
                self.state.operator = "len()"
                self.state.spend(size)  # what len() returns forgets where it comes from
        if name in CUTS:
            self.state.operator = name
            cut_evenly(self.state, name, args, kwargs, out)
        self.state.operator = name
        link_sizes(self.state, name, args, kwargs, out)
        return out

    def _sizes(self, tensor: Tensor, shape: Any) -> Any:
        """The sizes of a tensor, as integers that know their dimensions."""
        axes = self.state.of(tensor)
        return torch.Size([s if s < 2 or is_fixed(a) else dimension(s, a) for s, a in zip(shape, axes, strict=True)])


@contextmanager
def _module_stack(state: Trace, forms: Mapping[nn.Module, Sequence[str]]) -> Iterator[None]:
    aside: list[nn.Module] = []
    computed = [weight for module in state.model.modules() for weight in computed_in(module)]
    hooked: dict[nn.Module, list[Computed]] = {}
    for weight in (weight for weight in computed if weight.hook is not None):
        hooked.setdefault(weight.layer, []).append(weight)
    lists = {weight.holder: weight for weight in computed if weight.hook is None}

    def enter(module: nn.Module, args: Any) -> None:
        for weight in hooked.get(module, ()):
            state.note_computed(weight, getattr(module, weight.attr))
        state.stack.append(module)
        state.runs[module] += 1
        state.inputs[module] = [state.of(t) for t in tensors_in(args)]

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for name in () if aside else forms.get(module, ()):
            aside.append(module)
            with state.aside():
                getattr(module, name)(*args, **kwargs)
            aside.pop()
        state.stack.pop()
        state.outputs[module] = [state.of(t) for t in tensors_in(output)]
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            state.plain_calls.add(module)
        else:
            state.plain_calls.discard(module)
        if module in lists:
            state.note_computed(lists[module], output)

    handles = []
    try:
        for module in state.model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_wrappers(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            raise GroupError(
                f"{name} is a {type(tensor).__name__}, a tensor made of others (sharded, quantized, ...), which cannot "
                "be followed or cut; prune the model with plain tensors first, then convert it"
            )


def trace(model: nn.Module, inputs: Any, forward: Forward = call_model) -> Trace:
    """Run the model once, in eval mode, and follow every axis; the model is left as it was.

    Args:
        model: any module.
        inputs: example inputs.
        forward: how the model is called with them.
    """
    _refuse_wrappers(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(plain_layers(model))
        stack.enter_context(torch.no_grad())
        want_gradients(model.eval())
        state = Trace(model, caches=computed_tables(model, lambda: forward(model, inputs)))
        forms = other_forms(model, lambda: forward(model, inputs))
        state.forget()
        for tensor in tensors_in(inputs):
            state.set(tensor, [fresh(size, "it is a dimension of the model's input") for size in tensor.shape])
        state.origins.activate(tensors_in(inputs))
        stack.enter_context(tracked_attributes(model))
        stack.enter_context(_module_stack(state, forms))
        OBSERVERS.append(state.note_scale)
        COMPARED.append(state.note_equal)
        ASKED.append(state.note_asked)
        try:
            with _Functions(state), _Operators(state, RULES, pointwise):
                outputs = forward(model, inputs)
        finally:
            OBSERVERS.pop()
            COMPARED.pop()
            ASKED.pop()
        results = list(results_in(outputs))
        state.read(results)
        for tensor in results:
            state.note_reader(tensor, None)
            fix_all(state.of(tensor), "it reaches the model's output")
        before = dict.fromkeys(state.caches)
        state.caches = [key for key, table in tables_of(model) if key in before and table]
    solve(state)
    return state
