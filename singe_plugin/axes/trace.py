"""Following the axes of all parameters through one forward pass, operator by operator."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from singe_plugin.errors import GroupError
from singe_plugin.nested import call_model, tensors_in
from singe_plugin.state import computed_tables, plain_layers, preserved, tables_of

from .algebra import Axis, fix_all, fresh, is_fixed, size_of, unify
from .equations import own_widths, solve
from .origins import Origins
from .sizes import CUTS, cut_evenly, link_sizes
from .tracked import OBSERVERS, Place, TrackedInt, dimension, plain, tracked_attributes, tracked_in

__all__ = ["AttentionCall", "Forward", "Trace", "trace"]


Forward = Callable[[nn.Module, Any], Any]
_LAYERS = frozenset({"convolution", "addmm", "mm", "linear", "conv2d", "_convolution"})
_SAME_VALUES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "contiguous",
        "_to_copy", "detach", "alias", "as_strided_", "flatten",
    }
)  # fmt: skip


@dataclass
class AttentionCall:
    """A ``scaled_dot_product_attention`` that divides by the square root of the width it finds.

    Attributes:
        caller: the module whose forward calls it.
        number: which of the caller's calls it is.
        width: the axis that q and k are contracted over.
    """

    caller: nn.Module
    number: int
    width: Axis


@dataclass
class Trace:
    """What one forward pass says about a model's dimensions.

    Attributes:
        model: the traced model.
        links: integer attributes, and the axes whose sizes they are (times a number).
        equations: sizes that the model computes from attributes and dimensions, and the axes that have these sizes.
        spent: sizes that are numbers to a function, and what that function is.
        constants: parts whose sizes the code gives, and where.
        order: modules in the order in which their parameters are first read.
        mixing: ``(operator, how often it ran before) -> (dimension, axis)`` of reductions: they see all units at once.
        attention: calls that imply a scale.
        scales: sizes that became factors, and where.
        heads: the axes over which matrices are multiplied one by one.
        unknown: operators without a rule, and the classes of the modules that used them.
        inputs, outputs: for every module, the axes of the tensors that it was given and returned last.
        caches: attributes in which modules keep tensors that they computed (attention biases, by device).
    """

    model: nn.Module
    links: dict[Place, list[tuple[Fraction, Axis]]] = field(default_factory=dict)
    equations: list[tuple[TrackedInt, Axis]] = field(default_factory=list)
    spent: list[tuple[TrackedInt, str]] = field(default_factory=list)
    constants: list[tuple[Axis, str]] = field(default_factory=list)
    order: dict[nn.Module, int] = field(default_factory=dict)
    mixing: dict[tuple[str, int], list[tuple[int, Axis]]] = field(default_factory=dict)
    attention: list[AttentionCall] = field(default_factory=list)
    heads: list[Axis] = field(default_factory=list)
    scales: list[tuple[TrackedInt, str]] = field(default_factory=list)
    unknown: dict[str, set[str]] = field(default_factory=dict)
    stack: list[nn.Module] = field(default_factory=list)
    outputs: dict[nn.Module, list[list[Axis]]] = field(default_factory=dict)
    inputs: dict[nn.Module, list[list[Axis]]] = field(default_factory=dict)
    caches: list[tuple[nn.Module, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._axes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._owner: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._read: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._counts: Counter[str] = Counter()
        self._calls: Counter[nn.Module] = Counter()
        self._made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._readers: dict[nn.Module, list[nn.Module | None]] = {}
        self._norm_calls: Counter[nn.Module] = Counter()
        self.origins = Origins()
        self.operator = ""
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    if tensor is not None and tensor not in self._axes:
                        self._axes[tensor] = [fresh(size) for size in tensor.shape]
                        self._owner[tensor] = module
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.origins.start(parameter)
            self._link_own(module)

    def _link_own(self, module: nn.Module) -> None:
        """The widths that a layer keeps follow its own tensors."""
        for attr, name, dim in own_widths(module):
            tensor: Tensor | None = module._parameters.get(name)
            tensor = module._buffers.get(name) if tensor is None else tensor
            place = Place(module, attr)
            if tensor is not None and place not in self.links and module.__dict__.get(attr) == tensor.shape[dim]:
                self.links[place] = [(Fraction(1), self.of(tensor)[dim])]

    # -- for the rules --------------------------------------------------------------------------------------------

    @property
    def why(self) -> str:
        """Where the trace is, as a reason."""
        where = type(self.stack[-1]).__name__ if self.stack else "the model"
        return f"{self.operator} in {where}"

    def of(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor; one that was not seen before is a constant, which nothing can be removed from."""
        axes: list[Axis] | None = self._axes.get(tensor)  # type: ignore[no-untyped-call]
        if axes is None:
            axes = self._axes[tensor] = [fresh(s, "it is combined with a constant tensor") for s in tensor.shape]
        return list(axes)

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Note the axes of a result."""
        if [size_of(axis) for axis in axes] != list(tensor.shape):
            raise AssertionError(f"{self.why}: axes {list(axes)} do not describe a tensor of {tuple(tensor.shape)}")
        self._axes[tensor] = list(axes)

    def unify(self, a: Axis, b: Axis) -> None:
        unify(a, b, self.why)

    def fix(self, *axes: Axis) -> None:
        fix_all(axes, self.why)

    def mixes(self, tensor: Tensor, dims: Sequence[int]) -> None:
        """Note that the current operator takes all units of these dimensions together."""
        axes = self.of(tensor)
        if tensor not in self._owner and self.origins.is_constant(tensor):  # ``ones(width).sum()`` is the width
            fix_all([axes[d] for d in dims], f"{self.why} makes a number of its size")
            return
        self.mixing[self.operator, self._counts[self.operator]] = [(d % tensor.ndim, axes[d]) for d in dims]

    def numbers_units(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Note that a result holds positions along axes (where a largest value is): who reads it fixes them."""
        self._numbers[tensor] = list(axes)

    def link(self, size: Any, axis: Axis) -> None:
        """Note that ``size`` has to stay the size of ``axis``, if it is made of attributes and dimensions."""
        if not isinstance(size, TrackedInt):
            return
        if size != size_of(axis):
            self.spend(size)
        elif size.terms != dimension(plain(size), axis).terms:  # else it says that a size is itself
            self.equations.append((size, axis))

    def spend(self, size: TrackedInt) -> None:
        """Note that a size is a number to the current function: what that computes would change with a removal."""
        self.spent.append((size, f"{self.why} depends on its size"))

    def note_scale(self, size: TrackedInt) -> None:
        """A size is about to become a factor (``head_dim ** -0.5``): a removal would change it."""
        where = type(self.stack[-1]).__name__ if self.stack else "the model"
        self.scales.append((size, f"{where} computes a scale from its size"))

    # -- who reads whom -------------------------------------------------------------------------------------------

    def sole_reader(self, layer: nn.Module) -> nn.Module | None:
        """The batch-norm that reads a layer's output, if nothing else reads it and the norm reads nothing else."""
        readers = self._readers.get(layer, [])
        norm = readers[0] if len(readers) == 1 else None
        return norm if norm is not None and self._norm_calls[norm] == 1 else None

    def note_reading(self, args: Any, out: Any) -> None:
        """Keep track of which layer's parameters and outputs the tensors are."""
        tensors = list(tensors_in(args))
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                self._read[tensor] = True
            if tensor in self._numbers:
                fix_all(self._numbers[tensor], f"{self.why} reads positions along it")
        owners = [self._owner[t] for t in tensors if t in self._owner]
        for owner in owners:
            self.order.setdefault(owner, len(self.order))
        if self.operator in _SAME_VALUES:
            for table in (self._owner, self._made_by):
                if tensors and tensors[0] in table:
                    for made in tensors_in(out):
                        table[made] = table[tensors[0]]
            return
        norm = owners[0] if owners and "batch_norm" in self.operator and tensors[0] not in self._owner else None
        for tensor in tensors:
            if tensor in self._made_by:
                self._readers.setdefault(self._made_by[tensor], []).append(norm)
        if norm is not None:
            self._norm_calls[norm] += 1
        elif owners and self.operator in _LAYERS:
            for made in tensors_in(out):
                self._made_by[made] = owners[-1]

    def unread(self) -> list[Tensor]:
        """The parameters that no operator has read."""
        return [p for p in self.model.parameters() if p not in self._read]

    def forget(self) -> None:
        """Empty the caches: what they hold was computed from other parameters."""
        for module, attr in self.caches:
            module.__dict__[attr].clear()

    def counted(self) -> None:
        self._counts[self.operator] += 1

    def count(self, operator: str) -> int:
        """How often an operator ran."""
        return self._counts[operator]

    def note_attention(self, query: Tensor) -> None:
        caller = self.stack[-1] if self.stack else self.model
        self.attention.append(AttentionCall(caller, self._calls[caller], self.of(query)[-1]))
        self._calls[caller] += 1


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
        state.origins.note(name, args, list(tensors_in((args, kwargs))), list(tensors_in(out)))
        state.counted()
        return out


def _unknown(state: Trace, args: Any, kwargs: Any, out: Any) -> None:
    """Nothing may be removed from what an operator without a rule reads."""
    owner = type(state.stack[-1]).__name__ if state.stack else ""
    state.unknown.setdefault(state.operator, set()).add(owner)
    why = f"the operator {state.why} has no rule"
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
def _module_stack(state: Trace) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        state.stack.append(module)
        state.inputs[module] = [state.of(t) for t in tensors_in(args)]

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        state.stack.pop()
        state.outputs[module] = [state.of(t) for t in tensors_in(output)]

    handles = []
    try:
        for module in state.model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
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
    from .rules import RULES, pointwise

    _refuse_wrappers(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(plain_layers(model))
        stack.enter_context(torch.no_grad())
        model.eval()
        state = Trace(model, caches=computed_tables(model, lambda: forward(model, inputs)))
        state.forget()
        for tensor in tensors_in(inputs):
            state.set(tensor, [fresh(size, "it is a dimension of the model's input") for size in tensor.shape])
        state.origins.activate(tensors_in(inputs))
        stack.enter_context(tracked_attributes(model))
        stack.enter_context(_module_stack(state))
        OBSERVERS.append(state.note_scale)
        try:
            with _Functions(state), _Operators(state, RULES, pointwise):
                outputs = forward(model, inputs)
        finally:
            OBSERVERS.pop()
        for tensor in tensors_in(outputs):
            fix_all(state.of(tensor), "it reaches the model's output")
        before = dict.fromkeys(state.caches)
        state.caches = [key for key, table in tables_of(model) if key in before and table]
    solve(state)
    return state
