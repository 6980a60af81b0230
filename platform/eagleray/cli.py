"""The `eagleray` command: finds its verbs through the entry-point group `eagleray.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from eagleray import __version__
from eagleray.console import INTERRUPTED, Output, fail

GROUP = "eagleray.commands"
EXIT_USAGE = 2
# The order of the journey; other verbs follow.
ORDER = (
    "init",
    "validate",
    "verify",
    "train",
    "evaluate",
    "predict",
    "serve",
    "models",
    "store",
    "jobs",
    "doctor",
)


class _Journey(TyperGroup):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def build_app() -> typer.Typer:
    """Assemble the command line from the verbs of every installed package."""
    app = typer.Typer(
        name="eagleray",
        cls=_Journey,
        help="One file trains a torch model across many Ray workers and serves the same checkpoint.",
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for verbs in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        verbs.load()(app)
    return app


def verb_names() -> list[str]:
    """Return every verb and group of verbs, in the order of the journey."""
    command = get_command(build_app())
    assert isinstance(command, TyperGroup)
    return command.list_commands(typer.Context(command))


def _show_version(value: bool) -> None:
    if value:
        print(f"eagleray {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Exit status: 0 done; 1 the run failed, a checkpoint is damaged, an owner is alive; 2 the call or the file is
    wrong; 130 or 143 interrupted by SIGINT or SIGTERM, after committing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left (`eagleray models list | head -1`); what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    out = Output(sys.stdout, json="--json" in arguments, verbose=False)
    try:
        try:
            result = build_app()(args=arguments, prog_name="eagleray", standalone_mode=False)
        except typer.Abort:
            fail(out, "interrupted", "interrupted", None, INTERRUPTED)
        except typer.TyperException as error:
            _show_call_error(out, error)
    except typer.Exit as error:
        return error.exit_code
    return result if isinstance(result, int) else 0


def _show_call_error(out: Output, error: typer.TyperException) -> NoReturn:
    """Print what the parser says about the call: the error first, then where to look."""
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        out.note(message)
        raise typer.Exit(EXIT_USAGE)
    hint = f"see `{context.command_path} --help`" if context is not None else None
    fail(out, "usage", message, hint, EXIT_USAGE)


if __name__ == "__main__":
    main()
