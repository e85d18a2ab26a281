"""Other forms of a module's forward pass, which read widths that the form in use does not.

A block cuts a tensor with ``chunk(2)`` and has a ``forward_split`` for export that cuts at ``self.width``. No forward
pass reads that attribute, so it would keep the old width. Whether a method is such a form is tried out, not guessed: it
gets what the module gets, and is one if it gives what the module gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from singe_plugin.errors import is_of_the_machine
from singe_plugin.nested import copied, relative_change, tensors_in
from singe_plugin.state import preserved

from .tracked import is_width

__all__ = ["other_forms"]

_SAME = 1e-5  # of the output, in single precision


def other_forms(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, list[str]]:
    """Find the methods that compute the same as ``forward``, and read widths that ``forward`` does not.

    Args:
        model: the model; it is left as it was.
        run: a forward pass of it.

    Example:
        >>> class Halves(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.width, self.mix = 2, nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.cat(self.mix(x).chunk(2, 1)[::-1], 1)
        ...     def forward_split(self, x):
        ...         return torch.cat(self.mix(x).split((self.width, self.width), 1)[::-1], 1)
        ...     def forward_first(self, x):
        ...         return self.mix(x)[:, : self.width]
        >>> net = Halves()
        >>> other_forms(net, lambda: net(torch.ones(1, 4)))[net]
        ['forward_split']
    """
    candidates = {module: names for module in model.modules() if (names := list(_candidates(module)))}
    if not candidates:
        return {}
    wrong: set[tuple[nn.Module, str]] = set()
    asked: dict[nn.Module, bool] = dict.fromkeys(candidates, False)
    busy: list[nn.Module] = []

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if busy:  # inside of another form: the module has its turn where it is called by itself
            return
        busy.append(module)
        asked[module] = True
        try:
            wrong.update((module, name) for name in candidates[module] if not _same(module, name, args, kwargs, output))
        finally:
            busy.pop()

    with preserved(model), torch.no_grad():
        for module in candidates:
            module.register_forward_hook(compare, with_kwargs=True)
        run()
    found = {m: [n for n in names if (m, n) not in wrong] for m, names in candidates.items() if asked[m]}
    return {module: names for module, names in found.items() if names}


def _candidates(module: nn.Module) -> Iterator[str]:
    """The methods of a module's own class that are named as a form of its forward pass, and read other widths."""
    kind = type(module)
    forward = module.__dict__.get("forward", kind.forward)
    read = _names_in(getattr(forward, "__func__", forward))
    widths = {attr for attr, value in vars(module).items() if is_width(value)} - read
    for name in dict.fromkeys(name for base in kind.__mro__ if base is not nn.Module for name in vars(base)):
        method = getattr(kind, name, None)
        if name.startswith("forward_") and isinstance(method, FunctionType) and widths & _names_in(method):
            yield name


def _names_in(function: Any) -> set[str]:
    """The names of attributes in the code of a function."""
    return set(function.__code__.co_names) if isinstance(function, FunctionType) else set()


def _same(module: nn.Module, name: str, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a method gives what the module gave, for what the module was given."""
    try:
        other = getattr(module, name)(*copied(args), **copied(kwargs))
    except Exception as error:  # it wants other arguments, or a state that it does not have
        if is_of_the_machine(error):
            raise
        return False
    given = list(tensors_in(output))
    return bool(given) and relative_change(given, list(tensors_in(other))) <= _SAME
