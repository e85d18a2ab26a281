"""The command ``singe``: which commands there are, and how it ends.

Exit codes: 0 done, 1 an error of ours (one line on stderr), 2 wrong usage, 130 interrupted. A command is imported when
it is asked for: PyTorch takes seconds, which ``--help`` and ``--version`` need not wait for.
"""

from __future__ import annotations

import importlib
import shlex
from typing import Any

import click

from singe_plugin.errors import SingeError
from singe_plugin.version import __version__

__all__ = ["COMMANDS", "main", "typed_command"]

COMMANDS = {
    "demo": "Train a small network on real digits and prune it four ways; a minute or two, offline.",
    "export": "Write the model saved in DIRECTORY as ONNX, a torch.export program or TorchScript, and compare it.",
    "inspect": "Show what can be pruned, what is left whole and why, and what scoring costs.",
    "prune": "Prune a timm model and fine-tune it on the way; save it with a report.",
    "report": "Write the report of the result saved in DIRECTORY again, and print its summary.",
    "sensitivity": "Measure what every layer alone can lose: loss and accuracy without 10 to 90 % of its units.",
}
_USUAL = "singe_plugin.app.commands"
_MODULES = {  # commands that are written elsewhere
    "export": "singe_plugin.app.export",
    "sensitivity": "singe_plugin.app.sensitivity",
}


_TYPED = "singe_plugin.command"


def typed_command() -> str | None:
    """The command line that is being run, as it could be typed again; None where none is."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(_TYPED)


class Singe(click.Group):
    """Imports the command that is asked for; turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(_MODULES.get(cmd_name, _USUAL)), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands and what they do, with none of them imported."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line, and remember it."""
        ctx.meta[_TYPED] = shlex.join(["singe", *args])
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SingeError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            resumed = {"prune": "round or layer", "sensitivity": "point"}.get(ctx.invoked_subcommand or "")
            hint = f"; the same command with --resume continues after the last finished {resumed}" if resumed else ""
            click.echo(f"interrupted{hint}", err=True)
            ctx.exit(130)


@click.group(cls=Singe, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="singe")
def main() -> None:
    """Prune networks with SInGE: integrated-gradient relevance of neurons, fine-tuning in between."""


if __name__ == "__main__":
    main()
