"""Which numbers of a configuration make a class what a pruned model of it is: found by building it anew.

Which number gives which widths is not known by name: the class is built once more with another number, on no device,
and what has another shape then depends on it. A configuration is the model's only if the class, built so, computes the
same with the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import nn

from singe_plugin.axes.grouped import PlainGroups
from singe_plugin.axes.substitutes import double_inputs, in_double, normal, uniform
from singe_plugin.axes.values import Values
from singe_plugin.errors import is_of_the_machine
from singe_plugin.nested import call_model, map_tensors, relative_change, results_in
from singe_plugin.state import RngState, preserved

__all__ = ["Shapes", "built", "computes_the_same", "is_the_model", "shapes_of", "solved", "value_of"]

_EXACT, _ROUNDED = 1e-7, 1e-6  # in double precision, with constants in single precision, and in that


Key = TypeVar("Key")
Shapes = dict[str, tuple[int, ...]]
_TRIED = (16, 32)  # of a number that is not said
_TIMES = (2, 3, 5)  # of one that is: where it meets another number, the class may leave layers out


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of what a model saves, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def built(make: Callable[[], nn.Module]) -> Shapes | None:
    """The shapes of a model that is made on no device; None if it cannot be made.

    Example:
        >>> built(lambda: nn.Linear(2, 3, bias=False)), built(lambda: nn.Linear(2, -3))
        ({'weight': (3, 2)}, None)
    """
    try:
        with torch.device("meta"):
            return shapes_of(make())
    except Exception as error:
        if is_of_the_machine(error):
            raise
        return None


def solved(
    wanted: Shapes,
    numbers: Mapping[Key, int | None],
    order: Iterable[Key],
    make: Callable[[Mapping[Key, int]], nn.Module],
    known: Mapping[Key, int] | None = None,
) -> tuple[dict[Key, int], str]:
    """The numbers with which a class has the wanted shapes, one after the other, or why there are none.

    Args:
        wanted: the shapes.
        numbers: those of the configuration; None is one that is not said.
        order: in which they are tried: a product of two may be had by changing either.
        make: builds the class with other numbers.
        known: numbers that are sure.

    Example:
        >>> wanted, usual = shapes_of(nn.Linear(4, 3)), {"in": 8, "out": 3}
        >>> solved(wanted, usual, ["out", "in"], lambda changed: nn.Linear(*{**usual, **changed}.values()))
        ({'in': 4}, '')
    """
    changed = dict(known or {})
    base = built(lambda: make(changed))
    if base not in (None, wanted):
        alone = changed | _alone(wanted, base, {k: v for k, v in numbers.items() if k not in changed}, changed, make)
        better = built(lambda: make(alone))
        changed, base = (changed, base) if better is None else (alone, better)
    for key in order:
        if base is None:
            return {}, f"the class cannot be built with {changed}"
        if base == wanted:
            break
        number = numbers.get(key)
        found = None if key in changed else value_of(key, number, changed, base, wanted, make)
        if found is not None and found.denominator == 1 and found != number:
            changed[key] = int(found)
            base = built(lambda: make(changed))
    if base == wanted:
        return changed, ""
    made = base or {}
    name = next(name for name in {**wanted, **made} if made.get(name) != wanted.get(name))
    return {}, f"{name} has the shape {wanted.get(name)}, and would have {made.get(name)}"


def value_of(
    key: Key,
    value: int | None,
    changed: Mapping[Key, Any],
    base: Shapes,
    wanted: Shapes,
    make: Callable[[Mapping[Key, Any]], nn.Module],
    tried: tuple[int, int] = _TRIED,
) -> Fraction | None:
    """The number for a key with which all that depends on it has the wanted shape, or None if there is none.

    Args:
        key: of what is to be found.
        value: what it is; None if that is not said.
        changed: the other numbers, which stay.
        base: the shapes with these.
        wanted, make: as for :func:`solved`.
        tried: two numbers to build with, where it is not said.

    Example:
        >>> base, wanted = shapes_of(nn.Linear(4, 8)), shapes_of(nn.Linear(4, 6))
        >>> value_of("ratio", None, {}, base, wanted, lambda new: nn.Linear(4, int(4 * new["ratio"])), (1, 2))
        Fraction(3, 2)
    """
    return _agreed(_told_by(key, value, changed, base, wanted, make, tried).values())


def _told_by(
    key: Key,
    value: int | None,
    changed: Mapping[Key, Any],
    base: Shapes,
    wanted: Shapes,
    make: Callable[[Mapping[Key, Any]], nn.Module],
    tried: tuple[int, int] = _TRIED,
) -> dict[tuple[str, int], Fraction]:
    """What a number would have to be for each dimension that depends on it; none where that cannot be seen."""
    first = tried[0] if value is None else value
    start = base if value is not None else built(lambda: make({**changed, key: first}))
    if start is None:
        return {}
    for second in [tried[1]] if value is None else [times * value for times in _TIMES]:
        other = built(lambda second=second: make({**changed, key: second}))  # type: ignore[misc]
        if other is not None and other.keys() == start.keys() == wanted.keys():
            break
    else:
        return {}
    found: dict[tuple[str, int], Fraction] = {}
    for name, shape in start.items():
        if not len(shape) == len(other[name]) == len(wanted[name]):
            return {}
        for dim, (one, two, target) in enumerate(zip(shape, other[name], wanted[name], strict=True)):
            if one != two:  # the size is a straight line in the number
                found[name, dim] = first + Fraction((target - one) * (second - first), two - one)
    return found


def _agreed(values: Iterable[Fraction]) -> Fraction | None:
    """What all say, if that is a number of something."""
    found = set(values)
    number = found.pop() if len(found) == 1 else Fraction(0)
    return number if number > 0 else None


def _alone(
    wanted: Shapes,
    base: Shapes,
    numbers: Mapping[Key, int | None],
    changed: Mapping[Key, int],
    make: Callable[[Mapping[Key, int]], nn.Module],
) -> dict[Key, int]:
    """The numbers that are told by dimensions that depend on nothing else: sums and products of others wait for them.

    A layer behind a concatenation reads 64 + 32 channels, and alone says neither of both. Where dimensions contradict
    each other, the class cannot have these shapes; what most of them say then shows which ones are in the way.
    """
    moved = {k: _told_by(k, v, changed, base, wanted, make) for k, v in numbers.items() if v is not None}
    owners = Counter(place for places in moved.values() for place in places)
    found: dict[Key, int] = {}
    for key, places in moved.items():
        said = Counter(value for place, value in places.items() if owners[place] == 1)
        number = said.most_common(1)[0][0] if said else Fraction(0)
        if number > 0 and number.denominator == 1 and number != numbers[key]:
            found[key] = int(number)
    return found


def is_the_model(model: nn.Module, fresh: nn.Module, inputs: Any) -> bool:
    """Whether a model that was built anew is the model, once it has its weights."""
    first = next(model.parameters())
    fresh = fresh.to(device=first.device, dtype=first.dtype)
    fresh.load_state_dict(model.state_dict())
    return computes_the_same(model, fresh, inputs)


def computes_the_same(model: nn.Module, fresh: nn.Module, inputs: Any) -> bool:
    """Whether two models with parameters of the same names and shapes are one function of these and the inputs.

    The weights are random ones, and in double precision if the models run so: those of a model may be so small that a
    scale that is off would hardly show. Both are left as they were.

    Example:
        >>> layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> x, bent = torch.ones(1, 2), nn.Sequential(layer, nn.Tanh())
        >>> computes_the_same(layer, other, x), computes_the_same(bent, nn.Sequential(other), x)
        (True, False)
    """
    values = Values()
    with preserved(model), preserved(fresh), PlainGroups(), torch.no_grad():
        model.eval()
        fresh.eval()
        try:
            generator = torch.Generator().manual_seed(0)
            for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
                small = one.ndim < 2
                data = uniform(one, generator) if small else normal(one, generator) / max(one.shape[-1], 1) ** 0.5
                values.put(one, data)
                values.put(other, data.clone())
            try:
                with in_double(model), in_double(fresh):
                    return _apart(model, fresh, double_inputs(inputs)) < _EXACT
            except RuntimeError:  # they do not run in double precision
                return _apart(model, fresh, inputs) < _ROUNDED
        finally:
            values.restore()


def _apart(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    """How far the results of two models are apart, with the same random numbers."""
    start, found = RngState.capture(), []
    for model in (one, other):
        start.restore()
        found.append(list(results_in(call_model(model, map_tensors(torch.clone, inputs)))))
    return relative_change(*found)
