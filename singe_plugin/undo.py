"""Everything that can be reached from a model, to be put back: the same objects, with the same content.

A model is more than its parameters: a forward pass may keep a grid and the shape it was made for, count its calls in a
configuration, append to a list. So all of it is looked at, whatever it is called: the attributes of modules, of their
classes and of other objects (dataclasses, configurations, slots included), dictionaries, lists, sets and deques of any
class, tensors, arrays and random generators in them. What was changed is put back *in place*, so that whoever holds the
object sees it, and without the methods of its class, so that a dictionary that refuses changes is put back, too.

Code is no content: functions, methods and what they closed over are left alone, and so are data loaders, optimizers,
loggers, open files and the machinery of training frameworks.
"""

from __future__ import annotations

import functools
import io
import logging
import operator
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from singe_plugin.errors import ScoringError

__all__ = ["LARGE", "Contents"]

LARGE = 16 * 2**20  # bytes of a tensor in a plain attribute, above which its values are not copied
_MANY = 100_000  # entries of a container, above which it is not searched for others
_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, range, slice}
)
_CODE = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.GeneratorType,
    functools.partial, Enum, BaseException, logging.Logger, logging.Handler, io.IOBase, torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler, torch.utils.data.Dataset, torch.utils.data.DataLoader,
    torch.utils.data.Sampler,
)  # fmt: skip
_MACHINERY = frozenset({"torch", "lightning", "lightning_fabric", "pytorch_lightning", "accelerate", "wandb"})
_DATA = (types.SimpleNamespace, Namespace)  # of the standard library


@dataclass(frozen=True)
class _Kind:
    """How the content of one kind of object is read, compared and put back."""

    take: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    put: Callable[[Any, Any], None]
    inner: Callable[[Any], Collection[Any]] = lambda _: ()  # what saved content holds


_EMPTY: tuple[list[Any], list[Any]] = ([], [])


def _each_is(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _mapping(base: Any) -> _Kind:
    def take(table: Any) -> tuple[list[Any], list[Any]]:
        return (list(base.keys(table)), list(base.values(table))) if base.__len__(table) else _EMPTY

    def same(table: Any, saved: Any) -> bool:
        if not base.__len__(table):
            return not saved[0]
        return _each_is(list(base.values(table)), saved[1]) and _each_is(list(base.keys(table)), saved[0])

    def put(table: Any, saved: Any) -> None:
        base.clear(table)
        for key, value in zip(*saved, strict=True):
            base.__setitem__(table, key, value)

    return _Kind(take, same, put, lambda saved: saved[1])


def _put_deque(value: Any, saved: list[Any]) -> None:
    deque.clear(value)
    deque.extend(value, saved)


def _put_set(value: Any, saved: set[Any]) -> None:
    set.clear(value)
    set.update(value, saved)


def _put_array(value: Any, saved: Any) -> None:
    np.copyto(value, saved)


def _same(saved: Any) -> Any:
    return saved


_DICT = _mapping(dict)
_CONTAINERS: dict[type, _Kind] = {
    OrderedDict: _mapping(OrderedDict),
    dict: _DICT,
    list: _Kind(
        lambda v: list.__getitem__(v, slice(None)),
        _each_is,
        lambda v, saved: list.__setitem__(v, slice(None), saved),
        _same,
    ),
    deque: _Kind(list, lambda v, saved: _each_is(list(v), saved), _put_deque, _same),
    set: _Kind(set, lambda v, saved: bool(set.__eq__(v, saved)), _put_set, _same),
    tuple: _Kind(_same, lambda v, saved: True, lambda v, saved: None, tuple),  # what cannot change may hold what can
    frozenset: _Kind(_same, lambda v, saved: True, lambda v, saved: None, frozenset),
    torch.Generator: _Kind(
        lambda g: g.get_state(), lambda g, s: torch.equal(g.get_state(), s), lambda g, s: g.set_state(s)
    ),
    random.Random: _Kind(lambda g: g.getstate(), lambda g, s: bool(g.getstate() == s), lambda g, s: g.setstate(s)),
    np.random.Generator: _Kind(
        lambda g: g.bit_generator.state,
        lambda g, s: repr(g.bit_generator.state) == repr(s),
        lambda g, s: setattr(g.bit_generator, "state", s),
    ),
    np.random.RandomState: _Kind(
        lambda g: g.get_state(), lambda g, s: repr(g.get_state()) == repr(s), lambda g, s: g.set_state(s)
    ),
}  # fmt: skip
_ARRAY = _Kind(lambda a: a.copy(), lambda a, saved: a.tobytes() == saved.tobytes(), _put_array)


@functools.cache
def _plan_of(cls: Any) -> tuple[_Kind | None, tuple[Any, ...], bool] | None:
    """How objects of a class are looked into: their kind, their slots, and whether they have no attributes.

    None for what is no content.
    """
    kind = next((kind for base, kind in _CONTAINERS.items() if issubclass(cls, base)), None)
    if kind is None and not issubclass(cls, (nn.Module, Tensor, np.ndarray, *_DATA)):
        package = cls.__module__.partition(".")[0]
        if issubclass(cls, _CODE) or package in _MACHINERY or package in sys.stdlib_module_names:
            return None
    return kind, _slots_of(cls), cls in _CONTAINERS or cls in (tuple, frozenset)


@functools.cache
def _slots_of(cls: Any) -> tuple[Any, ...]:
    """Return the descriptors of a class's slots."""
    members = (member for base in cls.__mro__ for member in vars(base).values())
    return tuple(member for member in members if isinstance(member, types.MemberDescriptorType))


@functools.cache
def _own_classes(cls: Any) -> tuple[type, ...]:
    """Return the classes of a module that are not PyTorch's: a cache may be an attribute of one."""
    return tuple(c for c in cls.__mro__ if issubclass(c, nn.Module) and c.__module__.partition(".")[0] != "torch")


def _data_of(cls: type) -> dict[str, Any]:
    """Return the attributes of a class that are no code."""
    return {
        key: value
        for key, value in vars(cls).items()
        if not key.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")
    }


_UNSET = object()


def _slot(member: Any, value: Any) -> Any:
    try:
        return member.__get__(value)
    except AttributeError:
        return _UNSET


def _put_slot(member: Any, value: Any, saved: Any) -> None:
    if saved is not _UNSET:
        member.__set__(value, saved)
    else:
        member.__delete__(value)


class Contents:
    """A record of everything that can be reached from some objects.

    Args:
        roots: modules, or other objects; they are looked into, whatever they are.
        within: of modules, only these are looked into; None means all.
        copied: the size in bytes up to which the values of tensors that are no parameters are copied, so that writing
            in place can be undone. Buffers are copied whatever their size, unless it is 0: then nothing is.
        parameters: copy the values of parameters, too.

    Attributes:
        tensors: all tensors that were found, by id.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.config = OrderedDict(calls=0)
        >>> contents = Contents([net])
        >>> config, net.config["calls"], net.shape = net.config, 1, (2, 2)
        >>> contents.restore()
        >>> net.config is config, dict(config), hasattr(net, "shape")
        (True, {'calls': 0}, False)
    """

    def __init__(
        self,
        roots: Iterable[Any],
        within: Collection[nn.Module] | None = None,
        copied: float = LARGE,
        parameters: bool = False,
    ) -> None:
        self._seen: dict[int, Any] = {}  # holds the objects, so that no id is given to another
        self._records: list[tuple[_Kind, Any, Any]] = []
        self._classes: list[tuple[Any, type]] = []
        self._slots: list[tuple[Any, Any, Any]] = []
        self._shared: dict[type, dict[str, Any]] = {}
        self._flags: list[tuple[Tensor, bool, Tensor | None]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._large: list[tuple[Tensor, int]] = []
        self.tensors: dict[int, Tensor] = {}
        roots = list(roots)
        self._walk(roots, None if within is None else {id(module) for module in within})
        owned = [v for v in self._seen.values() if isinstance(v, nn.Module)]
        own = {id(p): p for module in owned for p in module._parameters.values() if p is not None}
        buffers = {id(b) for module in owned for b in module._buffers.values() if b is not None}
        memory = {_memory(p) for p in own.values()} - {None}
        for key, tensor in self.tensors.items():
            if tensor.is_leaf:
                self._flags.append((tensor, tensor.requires_grad, tensor.grad))
            mine = key in own or (key not in buffers and _memory(tensor) in memory)
            if copied and (parameters if mine else True) and _has_values(tensor):
                if mine or key in buffers or tensor.numel() * tensor.element_size() <= copied:
                    self._values.append((tensor, tensor.detach().clone()))
                elif not tensor.is_inference():
                    self._large.append((tensor, tensor._version))

    def _walk(self, roots: list[Any], within: set[int] | None) -> None:
        opened = {id(root) for root in roots}
        stack = roots[::-1]
        seen = self._seen
        while stack:
            value = stack.pop()
            cls: Any = type(value)
            if cls in _ATOMS or id(value) in seen:
                continue
            plan = _plan_of(cls)
            if plan is None and id(value) not in opened:
                continue
            kind, slots, plain = plan or (None, _slots_of(cls), False)
            if within is not None and isinstance(value, nn.Module) and id(value) not in within:
                continue
            seen[id(value)] = value
            if kind is not None:
                content = kind.take(value)
                self._records.append((kind, value, content))
                inner = kind.inner(content)
                if len(inner) <= _MANY:
                    stack.extend(inner)
            if not plain:
                stack.extend(self._attributes(value, cls, slots))

    def _attributes(self, value: Any, cls: type, slots: tuple[Any, ...]) -> Iterator[Any]:
        """Record the attributes of an object, and yield what they hold."""
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, np.ndarray) and value.nbytes <= LARGE and not value.dtype.hasobject:
            self._records.append((_ARRAY, value, value.copy()))
        elif isinstance(value, nn.Module):
            for owner in _own_classes(cls):
                if owner not in self._shared:
                    self._shared[owner] = _data_of(owner)
                    yield from self._shared[owner].values()
        for member in slots:
            held = _slot(member, value)
            self._slots.append((member, value, held))
            yield held
        table = getattr(value, "__dict__", None)
        if type(table) is dict:
            self._classes.append((value, cls))
            self._records.append((_DICT, table, _DICT.take(table)))
            yield from table.values()

    def restore(self) -> None:
        """Put everything back; what was not changed is not touched."""
        for value, cls in self._classes:
            if type(value) is not cls:
                value.__class__ = cls  # a parametrization changes it
        for kind, value, saved in self._records:
            if not kind.same(value, saved):
                kind.put(value, saved)
        for member, value, saved in self._slots:
            if _slot(member, value) is not saved:
                _put_slot(member, value, saved)
        for owner, data in self._shared.items():
            now = _data_of(owner)
            for key in [k for k in now if k not in data]:
                delattr(owner, key)
            for key, value in data.items():
                if now.get(key, _UNSET) is not value:
                    setattr(owner, key, value)
        for tensor, flag, grad in self._flags:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)
            if tensor.grad is not grad:
                tensor.grad = grad
        with torch.no_grad():
            for tensor, value in self._values:
                if not _same_bytes(tensor, value):  # an untouched one keeps its version: graphs may hold it
                    tensor.copy_(value)

    def check(self) -> None:
        """Raise :class:`ScoringError` if a tensor that is too large to be copied was written in place."""
        for tensor, version in self._large:
            if tensor._version != version:
                raise ScoringError(
                    f"the forward pass writes in place into a tensor of {tuple(tensor.shape)} that the model keeps in "
                    "a plain attribute, and it is too large to be copied for every scoring, so it could not be put "
                    "back; make it a buffer (register_buffer, persistent=False), or write into a copy"
                )


def _memory(tensor: Tensor) -> int | None:
    """Return where a tensor's storage begins; None if it has none of its own."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
        return None
    return tensor.untyped_storage().data_ptr() or None


def _has_values(tensor: Tensor) -> bool:
    # a wrapper's values are in the tensors that it holds, which were found, too
    return not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits (NaN is not equal to itself)."""
    if a.layout != torch.strided:
        return False
    return torch.equal(a, b) or torch.equal(
        a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8)
    )
