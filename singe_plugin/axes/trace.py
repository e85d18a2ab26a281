"""What one forward pass says about the axes of a model, as it is noted while the pass runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from singe_plugin.computed import Computed, computed_in
from singe_plugin.method.folding import is_batchnorm
from singe_plugin.nested import tensors_in

from .algebra import Atom, Axis, fix, fix_all, fresh, is_fixed, leaves, size_of, unify
from .asked import Question
from .origins import Dims, Origins
from .places import Place
from .tracked import TrackedInt, dimension, plain
from .widths import own_widths, tensor_of

__all__ = ["AttentionCall", "Forward", "Trace"]

Forward = Callable[[nn.Module, Any], Any]
_LAYERS = frozenset({"convolution", "addmm", "mm", "linear", "conv2d", "_convolution"})
_SAME_VALUES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "contiguous",
        "_to_copy", "detach", "alias", "as_strided_", "flatten",
    }
)  # fmt: skip
_OF_THE_PASS = (
    "order", "mixing", "attention", "heads", "stack", "outputs", "inputs", "runs", "contractions", "contracted_in",
    "plain_calls", "_counts", "_calls", "_norm_calls", "operator",
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
        compared: sizes that the model found to be equal.
        asked: other comparisons that the model made of sizes.
        spent: sizes that are numbers to a function, and what that function is.
        constants: parts whose sizes the code gives, and where.
        multiples: axes whose sizes have to stay multiples of a number, and where.
        order: modules in the order in which their parameters are first read.
        mixing: ``(operator, how often it ran before) -> (dimension, axis)`` of reductions: they see all units at once.
        attention: calls that imply a scale.
        scales: sizes that became factors, and where.
        heads: the axes over which matrices are multiplied one by one.
        unknown: operators without a rule, and the classes of the modules that used them.
        inputs, outputs: for every module, the axes of the tensors that it was given and returned last.
        caches: attributes in which modules keep tensors that they computed (attention biases, by device).
        runs: how often every module ran.
        computed: the weights that layers compute, their axes, and the dimensions of parameters that theirs are made of.
        concatenations: by the sizes of the parts, who put them together last.
        contractions: the axes of the activation and of the result of every operator that contracts with one (see
            :mod:`singe_plugin.axes.contractions`).
        contracted_in: the module that was running, for each of these operators; None outside of all.
        plain_calls: modules that were called with one tensor alone, and returned one.
    """

    model: nn.Module
    links: dict[Place, list[tuple[Fraction, Axis]]] = field(default_factory=dict, init=False)
    equations: list[tuple[TrackedInt, Axis]] = field(default_factory=list, init=False)
    compared: list[tuple[TrackedInt, TrackedInt]] = field(default_factory=list, init=False)
    asked: dict[Any, Question] = field(default_factory=dict, init=False)
    spent: list[tuple[TrackedInt, str]] = field(default_factory=list, init=False)
    constants: list[tuple[Axis, str]] = field(default_factory=list, init=False)
    multiples: list[tuple[Axis, int, str]] = field(default_factory=list, init=False)
    order: dict[nn.Module, int] = field(default_factory=dict, init=False)
    mixing: dict[tuple[str, int], list[tuple[int, Axis]]] = field(default_factory=dict, init=False)
    attention: list[AttentionCall] = field(default_factory=list, init=False)
    heads: list[Axis] = field(default_factory=list, init=False)
    scales: list[tuple[TrackedInt, str]] = field(default_factory=list, init=False)
    unknown: dict[str, set[str]] = field(default_factory=dict, init=False)
    stack: list[nn.Module] = field(default_factory=list, init=False)
    outputs: dict[nn.Module, list[list[Axis]]] = field(default_factory=dict, init=False)
    inputs: dict[nn.Module, list[list[Axis]]] = field(default_factory=dict, init=False)
    caches: list[tuple[nn.Module, str]] = field(default_factory=list)
    runs: Counter[nn.Module] = field(default_factory=Counter, init=False)
    computed: dict[tuple[nn.Module, str], tuple[Computed, list[Axis], list[Dims]]] = field(
        default_factory=dict, init=False
    )
    concatenations: dict[tuple[int, ...], str] = field(default_factory=dict, init=False)
    contractions: list[tuple[list[Axis], list[Axis]]] = field(default_factory=list, init=False)
    contracted_in: list[nn.Module | None] = field(default_factory=list, init=False)
    plain_calls: set[nn.Module] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._axes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._owner: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._read: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._taken: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._counts: Counter[str] = Counter()
        self._calls: Counter[nn.Module] = Counter()
        self._made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._readers: dict[nn.Module, list[nn.Module | None]] = {}
        self._norm_calls: Counter[nn.Module] = Counter()
        self.origins = Origins()
        self.operator = ""
        self._computed_from: set[int] = set()
        self._booking = False
        for module in self.model.modules():
            for weight in computed_in(module):
                self._computed_from |= {id(o._parameters[a]) for o, a in weight.sources() if a in o._parameters}
            for table in (module._parameters, module._buffers):
                for tensor in table.values():
                    if tensor is not None and tensor not in self._axes:
                        self._axes[tensor] = [fresh(size) for size in tensor.shape]
                        self._owner[tensor] = module
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.origins.start(parameter)
            self.origins.hold(buffer for buffer in module._buffers.values() if buffer is not None)
            self._link_own(module)

    def _link_own(self, module: nn.Module) -> None:
        """Let the widths that a layer keeps follow its own tensors."""
        for attr, name, dim in own_widths(module):
            tensor, place = tensor_of(module, name), Place(module, attr)
            if tensor is not None and place not in self.links and module.__dict__.get(attr) == tensor.shape[dim]:
                self.links[place] = [(Fraction(1), self.of(tensor)[dim])]

    # -- for the rules --------------------------------------------------------------------------------------------

    @property
    def where(self) -> str:
        """Where the trace is: the operator, and the class of the module that uses it."""
        return f"{self.operator} in {type(self.stack[-1]).__name__ if self.stack else 'the model'}"

    @property
    def why(self) -> str:
        """Where the trace is, as a reason."""
        return f"{self.where} tells its positions apart, so that none of them can go"

    def of(self, tensor: Tensor) -> list[Axis]:
        """Return the axes of a tensor; one that was not seen before is a constant, and nothing can go from it."""
        axes: list[Axis] | None = self._axes.get(tensor)  # type: ignore[no-untyped-call]
        if axes is None:
            axes = self._axes[tensor] = [fresh(s, "it is combined with a constant tensor") for s in tensor.shape]
        return list(axes)

    def set(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Note the axes of a result."""
        if [size_of(axis) for axis in axes] != list(tensor.shape):
            raise AssertionError(f"{self.where}: axes {list(axes)} do not describe a tensor of {tuple(tensor.shape)}")
        self._axes[tensor] = list(axes)

    def unify(self, a: Axis, b: Axis) -> None:
        unify(a, b, self.why)

    def fix(self, *axes: Axis) -> None:
        fix_all(axes, self.why)

    def mixes(self, tensor: Tensor, dims: Sequence[int]) -> None:
        """Note that the current operator takes all units of these dimensions together."""
        axes = self.of(tensor)
        if self.origins.made_of(tensor, self._computed_from):
            return  # a computed weight is left as it was, whatever it is computed with
        if tensor not in self._owner and self.origins.is_constant(tensor):  # ``ones(width).sum()`` is the width
            fix_all([axes[d] for d in dims], f"{self.where} makes a number of its size")
            return
        self.mixing[self.operator, self._counts[self.operator]] = [(d % tensor.ndim, axes[d]) for d in dims]

    def numbers_units(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Note that a result holds positions along axes (where a largest value is): who reads it fixes them."""
        self._numbers[tensor] = list(axes)

    def takes(self, tensor: Tensor, axis: Axis) -> None:
        """Note that a result is one position of an axis: who reads it fixes that."""
        if not is_fixed(axis):
            self._taken[tensor] = axis, self.why

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Note that the values of these tensors are read."""
        for tensor in tensors:
            if tensor in self._taken:
                fix(*self._taken[tensor])

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
        self.spent.append((size, f"{self.where} depends on its size"))

    def note_equal(self, size: TrackedInt, other: TrackedInt) -> None:
        """Note that the model found two sizes to be equal."""
        self.compared.append((size, other))

    def note_asked(self, left: TrackedInt, right: Any, relation: Callable[[Any, Any], bool], answer: bool) -> None:
        """Note a comparison of sizes that the model made; not those that are made here."""
        if not self._booking:
            where = type(self.stack[-1]).__name__ if self.stack else "the model"
            question = Question(left, right, relation, answer, where)
            self.asked.setdefault(question.key, question)

    def depends_on(self, question: Question) -> dict[Atom, None]:
        """The leaves that the answer to a question depends on."""
        found: dict[Atom, None] = {}
        for source in question.sources():
            axis = self.follows(source)[1] if isinstance(source, Place) else source
            found |= dict.fromkeys(leaves(axis))
        return found

    def follows(self, place: Place) -> tuple[Fraction, Axis]:
        """How many times the size of which axis an attribute is; of none, the number that it is."""
        found = self.links.get(place)
        return (Fraction(place.get()), ()) if found is None else found[0]

    @contextmanager
    def booking(self) -> Iterator[None]:
        """What is compared now is not asked by the model."""
        before, self._booking = self._booking, True
        try:
            yield
        finally:
            self._booking = before

    def note_scale(self, size: TrackedInt) -> None:
        """Note that a size becomes a factor (``head_dim ** -0.5``): a removal would change it."""
        where = type(self.stack[-1]).__name__ if self.stack else "the model"
        self.scales.append((size, f"{where} computes a scale from its size"))

    # -- who reads whom -------------------------------------------------------------------------------------------

    def sole_reader(self, layer: nn.Module) -> nn.Module | None:
        """Find the batch-norm that reads a layer's output, if nothing else reads it and the norm reads nothing else."""
        readers = self._readers.get(layer, [])
        norm = readers[0] if len(readers) == 1 else None
        return norm if norm is not None and max(self._norm_calls[norm], self.runs[norm]) == 1 else None

    def note_reading(self, args: Any, out: Any) -> None:
        """Keep track of which layer's parameters and outputs the tensors are."""
        tensors = list(tensors_in(args))
        self.read(tensors)
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                self._read[tensor] = True
            if tensor in self._numbers:
                fix_all(self._numbers[tensor], f"{self.where} reads positions along it")
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
            self.note_reader(tensor, norm or self._computing_norm())
        if norm is not None:
            self._norm_calls[norm] += 1
        elif owners and self.operator in _LAYERS:
            for made in tensors_in(out):
                self._made_by[made] = owners[-1]

    def _computing_norm(self) -> nn.Module | None:
        """Return the batch-norm that is running, which may compute with other operators (frozen ones do)."""
        return self.stack[-1] if self.stack and is_batchnorm(self.stack[-1]) else None

    def note_reader(self, tensor: Tensor, reader: nn.Module | None) -> None:
        """Note who reads a tensor: a batch-norm, or anybody else."""
        if tensor in self._made_by:
            self._readers.setdefault(self._made_by[tensor], []).append(reader)

    def unread(self) -> list[Tensor]:
        """List the parameters that no operator has read."""
        return [p for p in self.model.parameters() if p not in self._read]

    def forget(self) -> None:
        """Empty the caches: what they hold was computed from other parameters."""
        for module, attr in self.caches:
            module.__dict__[attr].clear()

    def counted(self) -> None:
        self._counts[self.operator] += 1

    def count(self, operator: str) -> int:
        """Return how often an operator ran."""
        return self._counts[operator]

    def note_computed(self, weight: Computed, made: Tensor) -> None:
        """Note the axes of a weight that a layer has computed: it is the layer's as if it were a parameter."""
        self.order.setdefault(weight.layer, len(self.order))
        self._owner[made] = weight.layer
        self.computed[weight.layer, weight.attr] = weight, self.of(made), self.origins.dims_of(made)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Follow what the forward pass does not run: sizes and axes are noted, but not who reads whom and how often."""
        kept = {name: copy(getattr(self, name)) for name in _OF_THE_PASS}
        readers = {layer: list(found) for layer, found in self._readers.items()}
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)
            self._readers = readers

    def note_attention(self, query: Tensor) -> None:
        caller = self.stack[-1] if self.stack else self.model
        self.attention.append(AttentionCall(caller, self._calls[caller], self.of(query)[-1]))
        self._calls[caller] += 1
