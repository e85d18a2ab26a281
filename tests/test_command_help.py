"""The help of the commands: sections, examples that are right, opposites of flags."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from singe_plugin.app.cli import main
from singe_plugin.app.options import (
    FINETUNING,
    MODEL,
    PACE,
    REMOVAL,
    REPAIR,
    SCORING,
    SECTIONS,
    Sectioned,
    generated,
    option,
    section_of,
)  # fmt: skip
from singe_plugin.fields import spellings
from singe_plugin.loop.distill import Distill
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.repair import Repair
from singe_plugin.method.options import Scoring

OURS = ("prune", "inspect", "demo", "report")


def command(name: str) -> Sectioned:
    assert isinstance(main, click.Group)
    found = main.get_command(click.Context(main), name)
    assert isinstance(found, Sectioned)
    return found


def sections(text: str) -> dict[str, str]:
    """What the help says under each heading."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            heading = line.rstrip(":")
        found[heading] = found.get(heading, "") + line + "\n"
    return found


@pytest.mark.parametrize("name", OURS)
def test_every_option_is_in_its_section(name: str) -> None:
    shown = sections(CliRunner().invoke(main, [name, "-h"]).output)
    assert shown["Options"].split() == ["Options:", "-h,", "--help", "Show", "this", "message", "and", "exit."]
    for param in command(name).params:
        if isinstance(param, click.Option):
            assert param.section in SECTIONS  # type: ignore[attr-defined]
            assert param.help
            assert param.opts[-1] in shown[param.section].split()  # type: ignore[attr-defined]
    headings = [heading for heading in shown if heading in SECTIONS]
    assert headings == sorted(headings, key=SECTIONS.index)


def test_the_section_of_an_option_is_its_classs() -> None:
    shown = sections(CliRunner().invoke(main, ["prune", "-h"]).output)
    classes = {Scoring: SCORING, Pace: PACE, Repair: REPAIR, FineTune: FINETUNING, Distill: FINETUNING}
    for cls, section in classes.items():
        assert section_of(cls) == section
    for spelling in spellings(*classes):  # one that two classes share is with the first
        assert spelling.flags[-1] in shown[classes[spelling.targets[0][0]]].split()
    assert "--target" in shown[REMOVAL]
    assert "--checkpoint" in shown[MODEL]
    assert section_of(int) == "Options"


@pytest.mark.parametrize("name", OURS)
def test_three_examples_that_the_command_takes(name: str) -> None:
    examples = command(name).examples
    assert len(examples) == 3
    text = CliRunner().invoke(main, [name, "-h"]).output
    for says, line in examples:
        assert f"  # {says}\n  {line}\n" in text
        program, called, *arguments = shlex.split(line.partition(" > ")[0])
        assert (program, called) == ("singe", name)
        with command(name).make_context(name, arguments):
            pass  # every option is there and takes its value


def test_flags_have_opposites_that_the_help_does_not_show() -> None:
    seen: list[dict[str, bool]] = []
    flags = click.Command("try", params=[], callback=lambda **given: seen.append(given))
    flags = option(MODEL, "--no-aug", is_flag=True, help="None.")(option(MODEL, "--fold", "bent", is_flag=True)(flags))
    for arguments, expected in (
        ([], (False, False)), (["--no-aug", "--fold"], (True, True)), (["--no-aug", "--aug"], (False, False)),
        (["--fold", "--no-fold", "--aug"], (False, False)),
    ):  # fmt: skip
        assert CliRunner().invoke(flags, arguments).exit_code == 0
        assert (seen[-1]["no_aug"], seen[-1]["bent"]) == expected
    assert "--aug" not in CliRunner().invoke(flags, ["--help"]).output.split()
    for name in OURS:
        known = [text for p in command(name).params for text in (*p.opts, *p.secondary_opts)]
        assert len(known) == len(set(known))


def test_a_class_of_no_section_is_shown_all_the_same() -> None:
    plain = Sectioned("plain", params=[])
    plain = generated(Distill)(click.option("--else", help="Whatever.")(plain))
    text = CliRunner().invoke(plain, ["--help"]).output
    assert "--else TEXT" in sections(text)["Options"]
    assert "--distill-weight" in sections(text)[FINETUNING]


def test_the_first_page_needs_no_torch() -> None:
    script = "import sys; sys.argv = ['singe', '--help']\nfrom singe_plugin.app.cli import main\n"
    script += "import atexit; atexit.register(lambda: print('torch' in sys.modules))\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout
    assert done.stdout.strip().endswith("False")
