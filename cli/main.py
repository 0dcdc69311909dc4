"""The casemate command: which subcommands there are, and how errors become exit codes.

A subcommand's module is imported only when it is called, so that `casemate ps` does not pay for
what the others need.
"""

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cli.exits import ExitCode, exit_code
from cli.output import print_error
from rpc.errors import CasemateError

# Every subcommand, in the order of the help, and the module whose `app` it is.
COMMANDS = {
    "check": "cli.check",
    "ps": "cli.ps",
    "logs": "cli.logs",
    "trace": "cli.trace",
    "gc": "cli.gc",
    "config": "cli.config",
    "image": "cli.image",
    "template": "cli.template",
    "pool": "cli.pool",
    "gpu": "cli.gpu",
    "cdi": "cli.cdi",
    "bench": "cli.bench",
}


class Commands(typer.core.TyperGroup):
    """The table above as a command group, and the one place where errors end.

    The Any are typer's own copies of click's types, which it does not export.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            command = typer.main.get_command(importlib.import_module(COMMANDS[cmd_name]).app)
            command.name = cmd_name
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CasemateError as error:
            print_error(error.brief, error.details, error.hint)
            raise typer.Exit(exit_code(error.code)) from None
        except PermissionError as error:
            print_error(f"{error.filename or 'this'}: {error.strerror}", hint="run it as root")
            raise typer.Exit(ExitCode.NOT_PERMITTED) from None


app = typer.Typer(
    cls=Commands,
    name="casemate",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"casemate {version('casemate')}")
        except PackageNotFoundError:
            typer.echo("casemate, from a checkout")
        raise typer.Exit


@app.callback()
def casemate(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One virtual machine per pod: what runs on this host, how it got there, and what is wrong.

    Exit codes: 0 done; 1 failed; 2 wrong usage; 3 no such pod, image, device or trace; 4 needs root.
    """


if __name__ == "__main__":
    app()
