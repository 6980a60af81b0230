"""The verbs that need neither training nor serving: they look at files, models and the machine."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from eagleray import store_commands
from eagleray.console import (
    AddressOption,
    JsonOption,
    Output,
    StoreOption,
    VerboseOption,
    reporting,
    store_location,
)

DEFAULT_PORT = 8000


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    app.command()(init)
    app.command()(validate)
    app.command()(doctor)
    store_commands.register(app)


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("eagleray.yaml"),
    task: Annotated[
        str,
        typer.Option(
            help="translation, text-classification, image-classification, or your own package.module:Task."
        ),
    ] = "translation",
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a commented starter file."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.config.starter import write_starter

        write_starter(path, task)
        out.result({"path": path, "task": task}, f"wrote {path}; next: eagleray validate {path}")


def validate(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE... [KEY.SUB=VALUE...]", help="YAML files, then settings that override theirs."
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the file, for editors, and nothing else.")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check files and show what they resolve to."""
    with reporting(json=json, verbose=verbose) as out:
        if schema:
            from eagleray.config.jsonschema import file_schema

            out.result(file_schema(), jsonlib.dumps(file_schema(), indent=2))
            return
        _validate(out, files or [], store)


def doctor(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = DEFAULT_PORT,
    store: StoreOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Look whether this machine, the store and Ray can do what is needed."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.doctor import examine, standard_probes

        found = []
        for name, finding in examine(standard_probes(store_location(store), address, port)):
            found.append({"name": name, **dataclasses.asdict(finding)})
            out.note(f"{finding.status:<8} {name}: {finding.found}")
            if finding.hint is not None:
                out.note(f"{'':<8} {finding.hint}")
        failed = [check["name"] for check in found if check["status"] == "failed"]
        summary = f"failed: {', '.join(failed)}" if failed else "ready"
        out.result({"ready": not failed, "checks": found}, summary)
        if failed:
            raise typer.Exit(1)


def _validate(out: Output, arguments: list[str], store: str | None) -> None:
    from eagleray.config.summary import summarize

    loaded = out.load(arguments, store)
    value = {
        "files": [
            {"path": each.path, "config": each.config.model_dump(mode="json"), "warnings": each.warnings}
            for each in loaded
        ]
    }
    out.result(value, "\n\n".join(summarize(each) for each in loaded))
