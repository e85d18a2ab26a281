"""A command's options in a YAML file: ``--config run.yaml``, and the file that a run leaves behind.

The keys are the options' names without dashes in front, and a value is the text that the command line would have;
lists and dictionaries stand for what is repeated or has commas in between. All scalars are read as text, so that
``pattern: 2:4`` is no number.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from singe_plugin.app.options import OUTPUT, given_texts, option
from singe_plugin.checks import closest
from singe_plugin.version import __version__

__all__ = ["CONFIG", "config_option", "config_text", "read_config"]

Command = TypeVar("Command", bound=Callable[..., Any])
CONFIG = "config.yaml"
_NOT_KEPT = ("config", "output", "resume", "as_json", "quiet")  # where and how a run is shown, not what it does
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), "True"), **dict.fromkeys(("false", "no", "off"), "False"), "null": "None",
    "~": "None",
}  # fmt: skip


def config_option() -> Callable[[Command], Command]:
    """The option ``--config``; it comes before all others, which then have the file's values as defaults."""
    return option(
        OUTPUT, "--config", type=click.Path(), metavar="FILE", is_eager=True, expose_value=False, callback=_use,
        help="A YAML file with any of these options (finetune-steps: 100); the command line wins. A finished run has "
        "left one in its folder, config.yaml.",
    )  # fmt: skip


def _use(context: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.default_map = {**(context.default_map or {}), **read_config(value, context.command)}


def _keys(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file may have, by their keys."""
    found = {}
    for param in command.params:
        if isinstance(param, click.Option) and param.name != "config":
            found.update({text[2:]: param for text in param.opts if text.startswith("--")})
    return found


def read_config(path: str | Path, command: click.Command) -> dict[str, Any]:
    """The options of a command that a file says, as click takes them for defaults.

    Raises:
        click.UsageError: if the file cannot be read, or says something that is no option of the command.
    """
    known, found = _keys(command), dict[str, Any]()
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.compose(file, Loader=yaml.BaseLoader)
            loader = yaml.BaseLoader("")
            if tree is None:
                return found
            if not isinstance(tree, yaml.MappingNode):
                raise click.UsageError(f"{path} holds no options: it needs lines such as 'model: resnet18'")
            pairs = [(loader.construct_object(k, True), loader.construct_object(v, True)) for k, v in tree.value]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    for key, value in pairs:
        param = known.get(key.replace("_", "-")) if isinstance(key, str) else None
        if param is None or param.name is None:
            raise click.UsageError(
                f"{path}: {key!r} is no option of 'singe {command.name}'{closest(key, known)}; "
                f"'singe {command.name} --help' has them all"
            )
        if param.name in found:
            raise click.UsageError(f"{path} says {key!r} twice; leave one out")
        if value in ("", "null", "~", "Null", "NULL") or value == [] or value == {}:
            raise click.UsageError(f"{path}: {key!r} has no value; leave it out, or write none where that is a value")
        found[param.name] = _as_click_takes(value, param)
    return found


def _as_click_takes(value: Any, param: click.Option) -> Any:
    """A value of the file as the command line would give it."""
    if isinstance(value, dict):
        value = [f"{key}={_literal(held)}" for key, held in value.items()]
    if param.multiple:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _literal(value: Any) -> str:
    """A value of a dictionary as a text that is read as a Python literal, where it is one."""
    if isinstance(value, list):
        return f"[{', '.join(_item(held) for held in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_item(held)}" for key, held in value.items()) + "}"
    return _WORDS.get(value.lower(), str(value))


def _item(value: Any) -> str:
    """The same inside of a list, where a text needs its quotes."""
    text = _literal(value)
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return repr(text)
    return text


class _Plain(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts without quotes where YAML's grammar needs none; they are read as texts, whatever they look like."""


_Plain.yaml_implicit_resolvers = {}


def config_text(context: click.Context) -> str:
    """What a run was asked for, on the command line and in a file: a file that repeats it from any folder.

    What was not asked for is not in it, and neither is where the results go.
    """
    kept: dict[str, Any] = {}
    for param in context.command.params:
        texts = given_texts(context)
        if not isinstance(param, click.Option) or param.name in _NOT_KEPT or param.name not in texts:
            continue
        value = texts[param.name]
        if isinstance(param.type, click.Path):
            value = os.path.abspath(value)
        key = max((text[2:] for text in param.opts if text.startswith("--")), key=len)
        kept[key] = [str(v) for v in value] if param.multiple else str(value).lower() if param.is_flag else str(value)
    name = context.command.name
    head = f"# singe_plugin {__version__}; 'singe {name} --config THIS_FILE --output FOLDER' does the same again\n"
    text: str = yaml.dump(kept, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=10_000)
    return head + text
