"""A deep fingerprint of everything that can be reached from an object, and of the random generators.

It shares nothing with the library: it walks attributes, slots, containers and tensors of whatever class, and notes for
each object which one it is, of what class, and what is in it. Two fingerprints are equal if nobody can tell that
anything happened.
"""

from __future__ import annotations

import functools
import hashlib
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["assert_untouched", "changes", "fingerprint"]

Print = dict[str, Any]
CODE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
    torch.dtype, torch.device, torch.Generator,
)  # fmt: skip
PLAIN = (int, float, complex, str, bytes, bool, type(None))


def fingerprint(*roots: Any, versions: bool = True) -> Print:
    """``path -> what is there``, for everything that the roots reach, each object once; and the random states.

    Without ``versions``, parameters may have been written to, if they have their values again.
    """
    seen: Print = {"torch": sha(torch.get_rng_state()), "python": sha(repr(random.getstate()))}
    seen["numpy"] = sha(repr([np.asarray(x).tobytes() for x in np.random.get_state()]))
    seen["grad mode"] = (torch.is_grad_enabled(), torch.backends.cudnn.enabled, torch.is_autocast_cache_enabled())
    seen["fast path"] = torch.backends.mha.get_fastpath_enabled()
    known: dict[int, str] = {}
    queue = [(f"root{i}", root) for i, root in enumerate(roots)]
    for path, value in queue:
        if isinstance(value, PLAIN):
            seen[path] = (type(value), repr(value))
        elif id(value) in known:
            seen[path] = ("same as", known[id(value)])
        else:
            known[id(value)] = path
            seen[path] = (id(value), type(value), *content(value, versions))
            queue.extend((f"{path}{step}", inner) for step, inner in inside(value))
    return seen


def sha(value: Any) -> str:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha1(value if isinstance(value, bytes) else value.encode()).hexdigest()


def content(value: Any, versions: bool) -> tuple[Any, ...]:
    """What an object is besides what it holds."""
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        found = (
            value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.requires_grad, value.is_leaf,
            sha(value), None if grad is None else (id(grad), sha(grad)),
        )  # fmt: skip
        return (*found, value._version if versions and isinstance(value, nn.Parameter) else "")
    if isinstance(value, np.ndarray):
        return (value.shape, value.tobytes())
    if isinstance(value, torch.Generator):
        return (sha(value.get_state()),)
    return (len(value),) if hasattr(value, "__len__") and not isinstance(value, nn.Module) else ()


def inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with the step that leads there."""
    if isinstance(value, CODE):
        return
    if isinstance(value, dict):
        for number, (key, item) in enumerate(list(value.items())):
            yield f"[#{number}]", key
            yield f"[{key!r}]", item
    elif isinstance(value, (set, frozenset)):
        yield from ((f"{{{number}}}", item) for number, item in enumerate(sorted(value, key=repr)))
    elif not isinstance(value, (Tensor, np.ndarray, str)) and hasattr(value, "__iter__") and hasattr(value, "__len__"):
        yield from ((f"[{number}]", item) for number, item in enumerate(list(value)))
    if isinstance(value, nn.Module):
        for owner in type(value).__mro__:
            if not owner.__module__.startswith("torch"):
                for name, item in list(vars(owner).items()):
                    if isinstance(item, (dict, list, set, Tensor, *PLAIN)) and not name.startswith("__"):
                        yield f"<{owner.__name__}.{name}>", item
    for owner in type(value).__mro__:
        for name in getattr(owner, "__slots__", ()) if isinstance(getattr(owner, "__slots__", ()), tuple) else ():
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                yield f".{name}", getattr(value, name)
    for name, item in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", item


def changes(before: Print, after: Print) -> list[str]:
    """The paths at which two fingerprints differ."""
    return [path for path in dict.fromkeys([*before, *after]) if before.get(path) != after.get(path)]


def assert_untouched(before: Print, *roots: Any, say: str = "", versions: bool = True) -> None:
    """Fail with the first few paths at which something changed."""
    after = fingerprint(*roots, versions=versions)
    found = changes(before, after)
    lines = [f"{path}: {before.get(path)} -> {after.get(path)}" for path in found[:5]]
    assert not found, "\n".join([f"{say} {len(found)} changes", *lines])
