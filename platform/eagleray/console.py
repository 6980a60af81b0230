"""What every verb shares: its options, its two output channels, its errors and its exit status.

A verb looks like this::

    @app.command()
    def show(ref: str, json: JsonOption = False, verbose: VerboseOption = False) -> None:
        \"\"\"Show one version.\"\"\"
        with reporting(json=json, verbose=verbose) as out:
            version = ...
            out.result({"ref": version.ref}, f"{version.ref}")

Standard output carries the result alone: text for people, or with `--json` one object on its last line. Everything
else (progress, warnings, what libraries print, errors) goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from eagleray.errors import EaglerayError, NotFoundError

if TYPE_CHECKING:
    from eagleray.config.loader import LoadedFile
    from eagleray.store.objects import ObjectStore

INTERRUPTED = 130
TERMINATED = 143

FilesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE... [KEY.SUB=VALUE...]",
        help="YAML files, then settings that override theirs.",
        show_default=False,
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        help="The store; default: the file's, else EAGLERAY_STORE, else ./store.",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster to join; default: RAY_ADDRESS, else a local Ray is started and stopped again.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show Ray's own log, and the traceback of an error.")
]


class Output:
    """Where a verb writes.

    Args:
        stdout: The stream of the result.
        json: Whether the result is JSON.
        verbose: Whether errors show their traceback.
    """

    def __init__(self, stdout: IO[str], *, json: bool, verbose: bool) -> None:
        self._stdout = stdout
        self.json = json
        self.verbose = verbose

    def result(self, value: Mapping[str, Any], text: str | None = None) -> None:
        """Print what the verb found: `value` with `--json`, else `text` (nothing when None)."""
        if self.json:
            print(jsonlib.dumps(value, default=_plain, allow_nan=False), file=self._stdout, flush=True)
        elif text is not None:
            print(text, file=self._stdout, flush=True)

    def note(self, text: str) -> None:
        """Tell the user something that is not the result."""
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Tell the user about something that may be wrong."""
        self.note(f"warning: {text}")

    def load(
        self, arguments: Sequence[str], store: str | None = None, *, require_train: bool = False
    ) -> list[LoadedFile]:
        """Load `FILE... key.sub=value...`, and show the warnings.

        Args:
            arguments: What a `FilesArgument` holds.
            store: What `--store` says.
            require_train: Whether a file without a `train` section is an error.

        Raises:
            eagleray.errors.ConfigError: Everything that is wrong in the files.
        """
        # Imported here: the schema is half of the time that `eagleray --help` would take.
        from eagleray.config.loader import load_files, split_arguments

        paths, overrides = split_arguments(arguments)
        loaded = load_files(paths, overrides, store, require_train=require_train)
        for each in loaded:
            for warning in each.warnings:
                self.warn(f"{each.path}: {warning}")
        return loaded


@contextmanager
def reporting(*, json: bool = False, verbose: bool = False) -> Iterator[Output]:
    """Run the body of a verb: give it its output, and turn an error into a message and an exit status.

    Raises:
        typer.Exit: The verb failed; the message is printed.
    """
    with _result_stream(json) as stdout:
        out = Output(stdout, json=json, verbose=verbose)
        try:
            yield out
        except (typer.Exit, BrokenPipeError):
            raise
        except EaglerayError as error:
            if verbose:
                traceback.print_exc()
            fail(out, error.code, error.message, error.hint, error.exit_code)
        except KeyboardInterrupt:
            fail(out, "interrupted", "interrupted", None, INTERRUPTED)
        except SystemExit as end:
            if end.code != TERMINATED:
                raise
            fail(out, "interrupted", "interrupted by SIGTERM", None, TERMINATED)
        except Exception as error:
            traceback.print_exc()
            hint = "this is a fault of eagleray: please report it with the lines above"
            fail(out, "internal", f"{type(error).__name__}: {error}", hint, 1)


def fail(out: Output, code: str, message: str, hint: str | None, exit_code: int) -> NoReturn:
    """Print an error in the shape that the call asked for, and leave.

    Raises:
        typer.Exit: Always.
    """
    lines = [f"error: {message}"] + ([f"  hint: {hint}"] if hint else [])
    out.note("\n".join(lines))
    if out.json:
        out.result({"error": {"code": code, "message": message, "hint": hint}})
    raise typer.Exit(exit_code)


def group(app: typer.Typer, name: str, help: str) -> typer.Typer:
    """Return the group of verbs of that name, made on first use: several packages add verbs to one group."""
    for info in app.registered_groups:
        if info.name == name and info.typer_instance is not None:
            return info.typer_instance
    made = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help)
    app.add_typer(made, name=name)
    return made


def store_location(option: str | None) -> str:
    """Choose the store of a verb that reads no file: `--store`, else `EAGLERAY_STORE`, else `./store`."""
    from eagleray.config.loader import resolve_store

    return resolve_store(option, None)


def existing_store(option: str | None) -> ObjectStore:
    """Open the store of a verb that only looks: a directory that is not there is not made.

    Raises:
        NotFoundError: There is no such directory.
    """
    from eagleray.store.objects import ObjectStore
    from eagleray.store.uri import parse_store_uri

    location = parse_store_uri(store_location(option))
    if location.path is not None and not location.path.is_dir():
        raise NotFoundError(f"there is no store at {location}", "Name it with --store or EAGLERAY_STORE.")
    return ObjectStore.open(str(location))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under headers, in columns as wide as their longest cell."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


@contextmanager
def _result_stream(json: bool) -> Iterator[IO[str]]:
    """Yield standard output; under `--json` keep everybody else off it, child processes too."""
    if not json:
        yield sys.stdout
        return
    stream, sys_stdout = None, sys.stdout
    sys_stdout.flush()
    if _is_descriptor_1(sys_stdout):
        stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield stream or sys_stdout
    finally:
        if stream is not None:
            sys_stdout.flush()
            os.dup2(stream.fileno(), 1)
            stream.close()


def _is_descriptor_1(stream: IO[str]) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):
        return False


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
