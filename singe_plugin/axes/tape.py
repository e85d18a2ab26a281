"""The operators of a forward pass on record, and the pass played again from where it was left.

What is changed in a network from some operator on needs nothing of the operators before it computed again:
:class:`Tape` knows which of their results are used later, :class:`Playback` keeps those of one pass and gives them out
in the next, in which the operators in front do not run at all. That needs a pass that is the same every time: one that
looks at values, draws random numbers or writes into what outlives it is not played from a record but run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from singe_plugin.nested import call_model, tensors_in

from .chains import Chains, Sum
from .contractions import CONTRACTING, Contraction, Names
from .sources import Computed, Sources

__all__ = ["MARKED", "Kept", "Playback", "Reached", "Strayed", "Tape"]

_CHANGING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)

MARKED = -(2**62)
"""Stands for the marked parameters among the contractions that something depends on."""
Place = tuple[int, int]
"""``(operator, which of its results)``."""
Kept = dict[Place, Tensor]
"""The results of operators that later ones use."""


class Strayed(RuntimeError):
    """A pass runs other operators than the one on record; raised before anything is shown of it."""


class Reached(Exception):
    """Raised to end a pass."""


@dataclass(frozen=True)
class _Shape:
    """What a result is, but for its values."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass
class _Step:
    """An operator on record.

    Attributes:
        name: of the operator.
        results: of each result, what it is; None for what is no tensor.
        spec: how they are nested.
        in_place: whether it returns the tensor that it changed.
    """

    name: str
    results: list[_Shape | None]
    spec: Any
    in_place: bool


@dataclass
class Tape:
    """What a forward pass does, operator by operator.

    Attributes:
        steps: the operators.
        contracting: by number, which operator every contraction is.
        sites: ``(weight, bias, which dimension of the weight reads)`` of every contraction, by number; the names are
            None where there is none.
        depends: by number, the contractions that it depends on, and :data:`MARKED` if what it reads depends on a marked
            parameter other than as the weight of a contraction.
        computed: by number, those whose weight is no parameter of their own; negative numbers are of other operators.
        order: the numbers, negative ones included, as they ran.
        touched: parameter -> the first operator that takes it, or what is made of it by turning it.
        sums: by number, where the results of contractions are added to something that does not depend on them; each
            sum once.
        read: parameter -> the operators that read it other than by contracting or turning it.
        added: by number, the parameter that is added to all that contractions give right behind them, and by which
            operator: a bias, where PyTorch does not add it in the same operator.
        why_not: why it cannot be played again, or None.
    """

    steps: list[_Step] = field(default_factory=list)
    contracting: list[int] = field(default_factory=list)
    sites: list[tuple[str | None, str | None, int]] = field(default_factory=list)
    depends: list[frozenset[int]] = field(default_factory=list)
    computed: dict[int, Computed] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    touched: dict[str, int] = field(default_factory=dict)
    sums: dict[int, Sum] = field(default_factory=dict)
    read: dict[str, set[int]] = field(default_factory=dict)
    added: dict[int, tuple[str, int]] = field(default_factory=dict)
    why_not: str | None = None
    _last: dict[Place, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Any, forward: Callable[[nn.Module, Any], Any] = call_model,
        marked: Collection[str] = (),
    ) -> Tape:  # fmt: skip
        """Record one pass of a model, which is in the mode to be recorded.

        Args:
            model: the model.
            inputs: what is put into it.
            forward: how it is called with them.
            marked: parameters; what depends on them is noted.

        Example:
            >>> net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 1))
            >>> tape = Tape.of(net, torch.zeros(1, 1, 4))
            >>> tape.sites, tape.depends
            ([('0.weight', '0.bias', 1), ('2.weight', '2.bias', 1)], [frozenset(), frozenset({0})])
        """
        tape = cls()
        with torch.no_grad(), _Recorder(model, tape, inputs, marked) as recorder:
            outputs = forward(model, inputs)
        for tensor in tensors_in(outputs):
            if tensor in recorder.places:
                tape._last[recorder.places[tensor]] = len(tape.steps)
        return tape

    def read_by(self, parameter: str, but: Collection[int] = ()) -> list[str]:
        """The names of the operators that read a parameter other than by contracting it; but for some."""
        return sorted({self.steps[step].name for step in self.read.get(parameter, set()) - set(but)})

    def live(self, start: int) -> dict[Place, _Shape]:
        """What operators before ``start`` leave to those from there on."""
        found = {}
        for (step, slot), last in self._last.items():
            shape = self.steps[step].results[slot]
            if step < start <= last and shape is not None:
                found[step, slot] = shape
        return found


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, tape: Tape, inputs: Any, marked: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.marked = frozenset(marked)
        self.tape, self.names, self.sources = tape, Names(model), Sources(model, inputs)
        self.places: Any = WeakIdKeyDictionary()
        self.reach: Any = WeakIdKeyDictionary()
        self.chains = Chains(model, self.names)
        tape.sums, tape.added = self.chains.sums, self.chains.added
        self.spread: frozenset[int] = frozenset()  # reaches everything: it was written into a part of a tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, tape, step = func._schema.name.split("::")[1], self.tape, len(self.tape.steps)
        if name == "detach":  # comes and goes with who holds a tensor, and does nothing
            for table in (self.places, self.reach, self.names.made, self.chains.table, *self.sources.tables):
                if args[0] in table:
                    table[out] = table[args[0]]
            return out
        operands = list(tensors_in((args, kwargs)))
        found = self.spread.union(*map(self._reaching, operands))
        marks: frozenset[int] = frozenset()
        for tensor in operands:
            if tensor in self.places:
                tape._last[self.places[tensor]] = step
            if tensor in self.names.made:
                origin = self.names.made[tensor][0]
                tape.touched.setdefault(origin, step)
                if not self.names.follows(name, tensor, args):
                    tape.read.setdefault(origin, set()).add(step)
                    marks = frozenset({MARKED}) if origin in self.marked else marks
        results, spec = tree_flatten(out)
        in_place = bool(func._schema.is_mutable)
        self._check(func, name, args, results, in_place)
        self.chains.follow(step, name, args, kwargs, results, operands, self._reaching)
        seen = None
        if name in CONTRACTING:
            number = len(tape.sites)
            tape.contracting.append(step)
            seen = self.names.contraction(number, name, args, out)
            turned = seen.columns if seen.convolution is None else seen.convolution[3]
            tape.sites.append((seen.weight, seen.bias, 0 if turned else 1))
            tape.depends.append(found)
            self.chains.start(number, out, name != "convolution")
        else:
            self.names.follow(name, args, out)
        found |= self._note_layer(name, args, operands, out, seen, found) | marks  # the bias of a layer is behind it
        for slot, result in enumerate(results):
            if isinstance(result, Tensor):
                self.reach[result] = found
                if result not in self.places:
                    self.places[result] = step, slot
        if in_place and operands and operands[0].untyped_storage().nbytes() > operands[0].nbytes:
            self.spread |= found
        shapes = [_Shape(r.size(), r.stride(), r.dtype, r.device) if isinstance(r, Tensor) else None for r in results]
        tape.steps.append(_Step(name, shapes, spec, in_place))
        return out

    def _reaching(self, tensor: Tensor) -> frozenset[int]:
        """The contractions that a tensor depends on."""
        found: frozenset[int] = self.reach.get(tensor, frozenset())
        return self.spread | found

    def _note_layer(
        self, name: str, args: Any, operands: list[Tensor], out: Any, seen: Contraction | None, depends: frozenset[int]
    ) -> frozenset[int]:
        """Note what contracts, with a parameter of its own or not; its number, if it has one."""
        tape, sources = self.tape, self.sources
        first = CONTRACTING.get(name, 0)
        plain = seen is not None and args[first + 1] in self.names.made
        computed = sources.layer(name, args, seen, plain, depends)
        own = seen is not None and seen.weight is not None and args[first] not in sources.known
        sources.follow(operands, out, own or computed is not None)
        if seen is None and computed is None:
            return frozenset()
        number = -1 - len(tape.computed) if seen is None else seen.number
        tape.order.append(number)
        if computed is not None:
            tape.computed[number] = computed
        return frozenset({number})

    def _check(self, func: Any, name: str, args: Any, results: list[Any], in_place: bool) -> None:
        """See whether the operator can be left out of a later pass."""
        why = None
        changing = any(tag in func.tags for tag in _CHANGING) and not _is_settled(name, args)
        if changing or not all(isinstance(r, Tensor) for r in results):
            why = f"what {name} gives depends on values"
        elif in_place and not (len(results) == 1 and results[0] is args[0]):
            why = f"{name} writes into other tensors"
        elif in_place and args[0] not in self.places:
            why = f"{name} writes into a tensor that outlives the pass"
        self.tape.why_not = self.tape.why_not or why


def _is_settled(name: str, args: Any) -> bool:
    """Whether an operator that may draw random numbers, or have results of any size, does not: by its arguments."""
    if "scaled_dot_product" in name:
        return not any(isinstance(a, float) and a > 0 for a in args)
    masks = [t for t in tensors_in(args[1:]) if t.dtype in (torch.bool, torch.uint8)]
    return name == "index" and not masks


class Playback(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A pass that shows its contractions, starts at some operator, and keeps what a later pass needs to start at one.

    Args:
        model: the model.
        tape: of it.
        see: gets every contraction that runs; it may raise :class:`Reached`.
        start: the operators before are not run.
        kept: what they left: the :attr:`kept` of an earlier pass that had ``keep`` there.
        keep: the operator for which to keep what is used from there on; None keeps nothing.
        watch: operator -> what to call with its arguments before it runs.

    Attributes:
        kept: what was kept; nothing, if parts of it share memory that a later operator writes into.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).requires_grad_(False)
        >>> x, tape = torch.ones(1, 2), Tape.of(net, torch.ones(1, 2))
        >>> last = tape.touched["2.weight"]
        >>> with torch.no_grad(), Playback(net, tape, lambda c: print("ran", c.weight), keep=last) as first:
        ...     y = net(x)
        ran 0.weight
        ran 2.weight
        >>> with torch.no_grad(), Playback(net, tape, lambda c: print("ran", c.weight), last, first.kept):
        ...     bool(torch.equal(net(x), y))
        ran 2.weight
        True
    """

    def __init__(
        self, model: nn.Module, tape: Tape, see: Callable[[Contraction], None], start: int = 0,
        kept: Kept | None = None, keep: int | None = None,
        watch: Mapping[int, Callable[[Any], None]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.see, self.start, self.given, self.keep = tape, see, start, kept or {}, keep
        self.watch = watch or {}
        self.names, self.at, self.number = Names(model), 0, 0
        self.wanted: Collection[Place] = () if keep is None else tape.live(keep)
        self.kept: Kept = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        step, name = self.at, func._schema.name.split("::")[1]
        if name == "detach":
            out = func(*args, **(kwargs or {}))
            if args[0] in self.names.made:
                self.names.made[out] = self.names.made[args[0]]
            return out
        if step == self.keep:  # now: what runs from here on may write into it
            self.kept = {} if self._is_entangled() else {place: tensor.clone() for place, tensor in self.kept.items()}
        self.at += 1
        if step < self.start:
            if self.tape.steps[step].name != name:
                raise Strayed(f"operator {step} was {self.tape.steps[step].name} and is {name}")
            out = self._left_out(self.tape.steps[step], step, args)
        else:
            if step in self.watch:
                self.watch[step](args)
            out = func(*args, **(kwargs or {}))
        if self.wanted and (self.keep is not None and step < self.keep):
            for slot, result in enumerate(tree_flatten(out)[0]):
                if (step, slot) in self.wanted:
                    self.kept[step, slot] = result
        if name in CONTRACTING:
            self.number += 1
            if step >= self.start:
                self.see(self.names.contraction(self.number - 1, name, args, out))
        elif step >= self.start:
            self.names.follow(name, args, out)
        return out

    def _is_entangled(self) -> bool:
        memory = [tensor.untyped_storage().data_ptr() for tensor in self.kept.values() if tensor.numel()]
        return len(set(memory)) < len(memory) and any(step.in_place for step in self.tape.steps[self.keep :])

    def _left_out(self, recorded: _Step, step: int, args: Any) -> Any:
        if recorded.in_place:
            return args[0]
        results = []
        for slot, shape in enumerate(recorded.results):
            assert shape is not None
            kept = self.given.get((step, slot))
            results.append(shape.empty() if kept is None else kept.clone())
        return tree_unflatten(results, recorded.spec)
