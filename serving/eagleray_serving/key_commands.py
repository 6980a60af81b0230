"""The verbs `keys add`, `keys list` and `keys remove`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eagleray.console import JsonOption, VerboseOption, group, reporting, table

if TYPE_CHECKING:
    from eagleray_serving.keys import KeyFile

FileOption = Annotated[
    Path | None, typer.Option("--keys", help="The file of their hashes; ~/.eagleray/keys.json by default.")
]
NameArgument = Annotated[str, typer.Argument(help="What logs call it.")]


def register_keys(app: typer.Typer) -> None:
    """Add `keys` to the command line."""
    keys = group(app, "keys", "API keys of servers: made, listed, removed; running servers follow within seconds.")
    keys.command()(add)
    keys.command("list")(list_)
    keys.command()(remove)


def add(
    name: NameArgument,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="translate, classify, predict, each also as VERB/MODEL; metrics; admin."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--tokens-per-s", help="Tokens of input a second; no limit by default.")
    ] = None,
    keys: FileOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a key, print it this once, and keep its hash."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray_serving.keys import VERBS, new_key

        file = _file(keys)
        key, kept = new_key(name, scope or VERBS, rate)
        file.add(kept)
        shown = {"name": name, "key": key, "scopes": list(kept.scopes), "file": str(file.path)}
        out.note(f"{name} may {', '.join(kept.scopes)}; the key is shown this once, {file.path} holds its hash")
        out.result(shown, key)


def list_(keys: FileOption = None, json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Show the keys by name: the keys themselves are kept nowhere."""
    with reporting(json=json, verbose=verbose) as out:
        file = _file(keys)
        found = file.read() if file.path.exists() else ()
        rows = [(key.name, " ".join(key.scopes), key.tokens_per_s or "", key.created.isoformat()) for key in found]
        text = table(("name", "scopes", "tokens/s", "made"), rows) if rows else f"there is no key in {file.path}"
        shown = [key.model_dump(mode="json", exclude={"sha256"}) for key in found]
        out.result({"file": str(file.path), "keys": shown}, text)


def remove(
    name: NameArgument, keys: FileOption = None, json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Remove a key; servers that run refuse it within seconds."""
    with reporting(json=json, verbose=verbose) as out:
        file = _file(keys)
        file.remove(name)
        out.result({"removed": name, "file": str(file.path)}, f"removed {name}")


def _file(path: Path | None) -> KeyFile:
    from eagleray_serving.home import Home
    from eagleray_serving.keys import KeyFile
    from eagleray_serving.protection import KEYS_FILE

    return KeyFile(path or Home.default().root / KEYS_FILE)
