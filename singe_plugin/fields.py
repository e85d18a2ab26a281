"""Options that are defined once: the fields of a frozen dataclass with their documentation, read by everything else.

A field has its default, its check (in the dataclass) and a sentence. From these come the docstring, the keywords of
:class:`~singe_plugin.integrations.torch_pruning.SInGEImportance`, the command's options, what a run records, and the
tables in ``docs/options.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from typing_extensions import dataclass_transform

from singe_plugin.errors import ConfigError

__all__ = [
    "Spelling", "as_options", "describe", "describe_object", "documented", "option", "spellings", "table", "to_plain",
]  # fmt: skip

Kind = TypeVar("Kind")


def option(
    *,
    default: Any,
    text: str,
    choices: Iterable[str] = (),
    flag: str | tuple[str, ...] | None = None,
    read: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    command: bool = True,
    is_object: bool = False,
    named: bool = False,
    none: bool = False,
) -> Any:
    """A field of an options object.

    Args:
        default: what it is if nothing is said.
        text: what it means, in whole sentences.
        choices: the names that it may be; read whenever they are needed, so that a registry may grow.
        flag: how the command spells it; by default its name. Fields of one flag are set together.
        read: turns the command's text into the value, where it is more than a number or a name.
        metavar: how the command's help shows such a text.
        command: whether the command has it.
        is_object: whether it is something that lives on (data, a module, an optimizer): not compared, not printed, and
            recorded by the name of its class.
        named: whether such an object may be given by a name instead; it is compared and printed all the same then.
        none: whether the command may say ``none`` although that is the default.
    """
    about = {"text": text, "choices": choices, "flag": flag, "read": read, "metavar": metavar, "command": command}
    about |= {"is_object": is_object, "none": none}
    seen = named or not is_object
    return dataclasses.field(default=default, metadata=about, repr=seen, compare=seen)


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def documented(cls: type[Kind]) -> type[Kind]:
    """Make a class a frozen dataclass of options, and put their documentation into its docstring.

    Example:
        >>> @documented
        ... class Tea:
        ...     '''How tea is made.'''
        ...     minutes: int = option(default=3, text="How long it draws.")
        >>> print(Tea.__doc__)
        How tea is made.
        <BLANKLINE>
        Attributes:
            minutes: How long it draws. Default: 3.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    lines = [f"    {f.name}: {f.metadata['text']} Default: {f.default!r}." for f in dataclasses.fields(made)]  # type: ignore[arg-type]
    head, mark, tail = inspect.cleandoc(cls.__doc__ or "").partition("\n\nRaises:")
    made.__doc__ = "\n".join([head, "", "Attributes:", *lines]) + mark + tail
    return made


def as_options(cls: type[Kind], value: Any, name: str, shorthand: str) -> Kind:
    """An options object, or what stands for one: None for the defaults, and a value for one of its fields.

    Args:
        cls: the class.
        value: what a user gave.
        name: of the argument.
        shorthand: the field that a lone value is of.

    Raises:
        ConfigError: if it can be neither.
    """
    if isinstance(value, cls):
        return value
    if value is None:
        return cls()
    kinds = typing.get_type_hints(cls)[shorthand]
    lone = callable(value) and not isinstance(value, type) and "Callable" in str(kinds)
    if lone or (isinstance(value, _kind(kinds)) and not isinstance(value, bool)):
        return cls(**{shorthand: value})
    raise ConfigError(
        f"{name} must be a {cls.__name__}, or its {shorthand}, got {type(value).__name__}; give e.g. "
        f"{name}={cls.__name__}(...)"
    )


def to_plain(value: Any) -> Any:
    """A value as JSON keeps it, the same in every process: objects are described, long descriptions as a checksum.

    Example:
        >>> to_plain({"a": 1}), to_plain(("b", "c")), to_plain(len)
        ({'a': 1}, ['b', 'c'], '<built-in function len>')
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else describe_object(key): to_plain(held) for key, held in value.items()}
    if isinstance(value, (tuple, list)) and value and all(isinstance(name, str) for name in value):
        return list(value)
    text = describe_object(value)
    return text if len(text) <= 200 else f"{type(value).__qualname__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def describe_object(value: Any) -> str:
    """A description without the addresses of objects.

    Example:
        >>> describe_object(object())
        '<object object>'
    """
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def describe(options: Any) -> dict[str, Any]:
    """The fields of an options object as plain values: what a run records.

    Example:
        >>> from singe_plugin.loop.pace import Pace
        >>> describe(Pace("layers"))["order"]
        'layers'
    """
    found = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        plain = value is None or isinstance(value, str) or (callable(value) and not isinstance(value, nn.Module))
        lives = f.metadata["is_object"] and not plain
        kept = describe if _is_options(value) else to_plain
        found[f.name] = type(value).__qualname__ if lives else kept(value)
    return found


def _is_options(value: Any) -> bool:
    """Whether a value is an options object, all of whose fields are documented."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    inner = dataclasses.fields(value)
    return bool(inner) and all("text" in f.metadata for f in inner)


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the command spells an option.

    Attributes:
        flags: its flags, as click takes them.
        text: its help.
        targets: ``(class, field)`` of what it sets.
        choices: the names that it may be, or none.
        kind: the type of its value: ``int``, ``float``, ``str`` or ``bool``.
        read: turns a text into the value, or None.
        metavar: how the help shows its value, or None.
        default: what it is if it is not given.
        none: whether it may be switched off, with ``none``.
    """

    flags: tuple[str, ...]
    text: str
    targets: tuple[tuple[type, str], ...]
    choices: tuple[str, ...]
    kind: type
    read: Callable[[str], Any] | None
    metavar: str | None
    default: Any
    none: bool

    @property
    def name(self) -> str:
        """How a command's function calls it: its longest flag."""
        return max(self.flags, key=len).lstrip("-").replace("-", "_") + "_option"


def spellings(*classes: type) -> list[Spelling]:
    """The command's options for the fields of some options classes, in their order."""
    found: dict[tuple[str, ...], Spelling] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            about = f.metadata
            if not about["command"]:
                continue
            flags = about["flag"] or "--" + f.name.replace("_", "-")
            flags = (flags,) if isinstance(flags, str) else tuple(flags)
            targets: tuple[tuple[type, str], ...] = ((cls, f.name),)
            if flags in found:
                targets = (*found[flags].targets, *targets)
            made = Spelling(
                flags, about["text"], targets, tuple(about["choices"]), _kind(hints[f.name]), about["read"],
                about["metavar"], f.default,
                about["none"] or (f.default is not None and type(None) in typing.get_args(hints[f.name])),
            )  # fmt: skip
            if flags in found:
                made = dataclasses.replace(found[flags], targets=targets, none=found[flags].none or made.none)
            found[flags] = made
    return list(found.values())


def _kind(hint: Any) -> type:
    """The type of a value that a command line can give for a field."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in (bool, float, int) if kind in parts), str)


def table(cls: type) -> str:
    """The fields of an options class as a Markdown table."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(cls):
        text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", f.metadata["text"]).replace("``", "`").replace("|", "\\|")
        names = ", ".join(f"`{name}`" for name in f.metadata["choices"])
        rows.append(f"| `{f.name}` | `{f.default!r}` | {text}{f' One of {names}.' if names else ''} |")
    return "\n".join(rows)
