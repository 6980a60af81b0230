"""`eagleray models export` and `import`: to and from plain Hugging Face directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from eagleray.console import (
    JsonOption,
    StoreOption,
    VerboseOption,
    existing_store,
    group,
    reporting,
    store_location,
)
from eagleray.store_commands import MODELS_HELP, RefArgument


def register(app: typer.Typer) -> None:
    """Add the verbs to `eagleray models`."""
    models = group(app, "models", MODELS_HELP)
    models.command("export")(export)
    models.command("import")(import_directory)


def export(
    ref: RefArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; must not exist, or be empty.")],
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a version as a Hugging Face directory with a model card."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.store.registry import Registry
        from eagleray_jobs.export import export_model

        report = export_model(Registry(existing_store(store)), ref, directory)
        text = f"exported {report.ref} to {report.directory}: {', '.join(report.files)}"
        out.result(dataclasses.asdict(report), text)


def import_directory(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What save_pretrained wrote; safetensors only.")
    ],
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    task: Annotated[
        str | None, typer.Option(help="What it is for; default: what its config says.", show_default=False)
    ] = None,
    source_lang: Annotated[
        str | None, typer.Option(help="Language of the input of a translator.", show_default=False)
    ] = None,
    target_lang: Annotated[str | None, typer.Option(help="Language of its output.", show_default=False)] = None,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Commit a Hugging Face directory as a version, ready to be served."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.store.objects import ObjectStore
        from eagleray_jobs.import_model import import_model

        opened = ObjectStore.open(store_location(store))
        ref = import_model(
            opened, directory, name, task, source_lang=source_lang, target_lang=target_lang, notify=out.note
        )
        out.result({"ref": ref, "store": opened.location}, f"imported {ref}")
