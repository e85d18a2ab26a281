"""How a command's options are made, shown in sections, and read.

An option belongs to a section of the help: those that are written out say which, and those that are generated from an
options class (see :mod:`singe_plugin.fields`) are in the class's section.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from singe_plugin.errors import SingeError
from singe_plugin.fields import Spelling, spellings
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.finetune import FineTune, Recipe
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.loop.times import Timing
from singe_plugin.method.options import Scoring

__all__ = [
    "DATA", "FINETUNING", "MODEL", "OUTPUT", "PACE", "REMOVAL", "REPAIR", "SCORING", "Placed", "Sectioned", "generated",
    "given_texts", "is_given", "objects", "option", "section_of", "stacked",
]  # fmt: skip

Command = TypeVar("Command", bound=Callable[..., Any])
MODEL, DATA, REMOVAL = "Model", "Data", "What to remove"
SCORING, PACE, REPAIR = "How units are scored", "How fast, and in which order", "How the survivors take over"
FINETUNING, LATENCY, OUTPUT = "Fine-tuning", "With what latency is measured", "The run, and its output"
SECTIONS = (MODEL, DATA, REMOVAL, SCORING, PACE, REPAIR, FINETUNING, LATENCY, OUTPUT)
_CLASSES: dict[type, str] = {
    Scoring: SCORING,
    Pace: PACE,
    Repair: REPAIR,
    FineTune: FINETUNING,
    Recipe: FINETUNING,
    Distill: FINETUNING,
    Timing: LATENCY,
}
_REST = "Options"
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT)
_TEXTS = f"{__name__}.texts"


def section_of(cls: type) -> str:
    """The section of the help that the options of a class are in.

    Example:
        >>> section_of(FineTune)
        'Fine-tuning'
    """
    return _CLASSES.get(cls, _REST)


class Placed(click.Option):
    """An option in a section of the help. A flag has an opposite, too, which the help does not show.

    A flag that a file sets can be taken back so on the command line: ``--no-fold``, and ``--aug`` for ``--no-aug``.
    """

    def __init__(self, declarations: list[str], section: str = _REST, **attributes: Any) -> None:
        if attributes.get("is_flag"):
            long = next(text for text in declarations if text.startswith("--"))
            name = long[2:].removeprefix("no-") if long.startswith("--no-") else f"no-{long[2:]}"
            if not any(text.isidentifier() for text in declarations):
                declarations = [*declarations, long[2:].replace("-", "_")]
            declarations = [f"{text}/--{name}" if text == long else text for text in declarations]
            attributes.setdefault("default", False)
        super().__init__(declarations, **attributes)
        self.section = section

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """What the user said; it is kept as it is, so that it can be written down (see :func:`given_texts`)."""
        value, source = super().consume_value(ctx, opts)
        if source in _GIVEN:
            ctx.meta.setdefault(_TEXTS, {})[self.name] = value
        return value, source

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The line of the help, without the opposite."""
        opposites, self.secondary_opts = self.secondary_opts, []
        try:
            return super().get_help_record(ctx)
        finally:
            self.secondary_opts = opposites


class Sectioned(click.Command):
    """A command whose help has sections, and examples.

    Args:
        examples: ``(what it does, the command line)``.
        arguments, attributes: click's.
    """

    def __init__(self, *arguments: Any, examples: Iterable[tuple[str, str]] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = list(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, section by section; those of no section come last."""
        found: dict[str, list[tuple[str, str]]] = {section: [] for section in (*SECTIONS, _REST)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and record[1]:  # newer versions of click list arguments without a text, too
                found[getattr(param, "section", _REST)].append(record)
        for section, records in found.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they can be copied."""
        if self.examples:
            with formatter.section("Examples"):
                for text, line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}# {text}\n")
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


def option(section: str, *declarations: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option in a section: click's, with the section before everything else."""
    return click.option(*declarations, cls=Placed, section=section, **attributes)


def stacked(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options at once, in their order."""

    def add(command: Command) -> Command:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def generated(*classes: type) -> Callable[[Command], Command]:
    """A command's options for the fields of some options classes, as these say."""
    made = []
    for spelling in spellings(*classes):
        text = spelling.text if spelling.default in (None, False) else f"{spelling.text} [default: {spelling.default}]"
        text = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")
        about: dict[str, Any] = {"help": text, "metavar": spelling.metavar}
        if spelling.kind is bool:
            about["is_flag"] = True
        else:
            about["type"] = click.Choice(spelling.choices) if spelling.choices else spelling.kind
        if spelling.none:
            about["type"] = str
            about["metavar"] = "|".join([*(spelling.choices or [spelling.kind.__name__.upper()]), "none"])
            about["callback"] = partial(_or_none, spelling)
        if spelling.read is not None:
            about |= {"type": str, "callback": partial(_converted, spelling.read)}
        made.append(option(section_of(spelling.targets[0][0]), *spelling.flags, spelling.name, **about))
    return stacked(*made)


def _or_none(spelling: Spelling, context: Any, param: Any, value: str | None) -> Any:
    """A value, or what says that there is to be none."""
    if value is None or value == "none":
        return value
    kind = click.Choice(spelling.choices) if spelling.choices else click.types.convert_type(spelling.kind)
    return kind.convert(value, param, context)


def _converted(read: Callable[[str], Any], context: Any, param: Any, value: str | None) -> Any:
    try:
        return None if value is None else read(value)
    except SingeError as error:
        raise click.BadParameter(str(error)) from error


def objects(options: dict[str, Any], *classes: type) -> list[Any]:
    """Take the generated options out of a command's, as objects; a usage error for a value that cannot be."""
    fields: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for spelling in spellings(*classes):
        value = options.pop(spelling.name)
        if value is not None and value is not False:
            for cls, field in spelling.targets:
                fields[cls][field] = None if spelling.none and value == "none" else value
    try:
        return [cls(**fields[cls]) for cls in classes]
    except SingeError as error:
        raise click.UsageError(str(error)) from error


def is_given(name: str, context: click.Context | None = None) -> bool:
    """Whether a user said something of the present command's option, on the command line or in a file."""
    return (context or click.get_current_context()).get_parameter_source(name) in _GIVEN


def given_texts(context: click.Context) -> dict[str, Any]:
    """What a user said, by the options' names, before anything was made of it."""
    found: dict[str, Any] = context.meta.get(_TEXTS, {})
    return found
