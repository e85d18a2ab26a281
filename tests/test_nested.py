"""Nested arguments: generated ones against a slow recursion, and every class of container that is kept."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from singe_plugin.nested import leaves_in, map_tensors, tensors_in, to_device
from singe_plugin.run.data import few

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["left", "right"])


@dataclass(frozen=True)
class Held:
    inner: Any
    name: str = "held"
    late: Any = field(init=False)  # never set


class Config(OrderedDict[str, Any]):
    """A dictionary with attributes, as model outputs of Transformers are."""

    def __setitem__(self, key: str, value: Any) -> None:
        assert not vars(self), "it refuses changes"
        super().__setitem__(key, value)


def _parts(inner: Any) -> Any:
    lists = st.lists(inner, max_size=3)
    return st.one_of(lists, lists.map(tuple), st.dictionaries(st.sampled_from("abc"), inner, max_size=3))


LEAVES = st.one_of(st.integers(0, 9).map(torch.tensor), st.integers(), st.none(), st.text(max_size=2))
NESTED = st.recursive(LEAVES, _parts, max_leaves=12)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (tuple, list)) else [value]


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(part) for key, part in value.items()}
    return type(value)(map(_shape, value)) if isinstance(value, (tuple, list)) else type(value)


@settings(deadline=None, max_examples=60)
@given(NESTED)
def test_what_is_in_nested_arguments(value: Any) -> None:
    leaves = _leaves(value)
    assert all(a is b for a, b in zip(leaves_in(value), leaves, strict=True))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    assert all(a is b for a, b in zip(tensors_in(value), tensors, strict=True))
    made = map_tensors(lambda t: t + 1, value)
    assert _shape(made) == _shape(value)
    for new, old in zip(_leaves(made), leaves, strict=True):
        assert bool(new == old + 1) if isinstance(old, Tensor) else new is old


@pytest.mark.parametrize("given", [Pair(1, torch.arange(4)), [(torch.arange(4),)], {"a": [torch.arange(4)]}])
def test_the_first_examples_and_a_move_keep_the_classes(given: Any) -> None:
    for made, count in ((few(given, 2), 2), (to_device(given, CPU), 4)):
        assert _shape_of(made) == _shape_of(given)
        assert next(tensors_in(made)).tolist() == list(range(count))


def _shape_of(value: Any) -> Any:
    return (type(value), len(value), [type(leaf) for leaf in leaves_in(value)])


def test_mappings_and_dataclasses() -> None:
    config = Config([("x", torch.arange(4))])
    config.note = "kept"  # type: ignore[attr-defined]
    made = few(config, 2)
    assert type(made) is Config
    assert made["x"].tolist() == [0, 1]
    assert made.note == "kept"
    assert few(UserDict(x=torch.arange(4)), 1) == {"x": torch.tensor([0])}
    held = few(Held([torch.arange(4)]), 3)
    assert type(held) is Held
    assert held.inner[0].tolist() == [0, 1, 2]
    assert held.name == "held"
    assert few(torch.tensor(3), 2).item() == 3


def test_what_can_move_itself_is_moved_by_it() -> None:
    class Graph(tuple[Any, ...]):
        def to(self, device: torch.device) -> str:
            return f"on {device}"

    packed = pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    moved = to_device({"graph": Graph((torch.ones(1),)), "words": [packed]}, CPU)
    assert moved["graph"] == "on cpu"
    assert isinstance(moved["words"][0], PackedSequence)
