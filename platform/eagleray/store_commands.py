"""`eagleray models` and `eagleray store`: what a store holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagleray.console import (
    JsonOption,
    Output,
    StoreOption,
    VerboseOption,
    existing_store,
    group,
    reporting,
    table,
)
from eagleray.errors import UsageError

if TYPE_CHECKING:
    from eagleray.store.aliases import AliasRecord
    from eagleray.store.registry import Registry, VersionInfo

MODELS_HELP = "List, check, name, import and export the versions of models."
DAMAGED = 1

RefArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="NAME, NAME@best, NAME@latest, NAME@ALIAS, NAME@step-100 or a full version."
    ),
]


def register(app: typer.Typer) -> None:
    """Add `eagleray models` and `eagleray store`."""
    models = group(app, "models", MODELS_HELP)
    models.command("list")(list_models)
    models.command()(show)
    models.command()(verify)
    models.command()(alias)
    group(app, "store", "Tidy the store.").command()(sweep)


def list_models(
    name: Annotated[str | None, typer.Argument(help="List this model's versions.", show_default=False)] = None,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the models of a store, or the versions of one."""
    with reporting(json=json, verbose=verbose) as out:
        registry = _registry(store)
        if name is not None:
            _list_versions(out, registry, name)
            return
        found = {model: registry.versions(model) for model in registry.names()}
        rows = [
            (model, len(versions), versions[-1].version, _best(registry, model), _aliases(versions))
            for model, versions in found.items()
        ]
        value = [
            {"name": model, "versions": len(versions), "latest": versions[-1].ref, "best": _best(registry, model)}
            for model, versions in found.items()
        ]
        text = table(("NAME", "VERSIONS", "LATEST", "BEST", "ALIASES"), rows) if rows else "no models"
        out.result({"models": value}, text)


def show(
    ref: RefArgument, store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Show one version: its step, scores, layout, files."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.store.registry import describe

        checkpoint = _registry(store).open(ref)
        manifest = checkpoint.manifest
        files = [{"path": entry.path, "size_bytes": entry.size} for entry in manifest.files]
        value = {
            **_version_json(describe(manifest)),
            "layout": manifest.layout,
            "versions": manifest.versions,
            "tensors": len(manifest.tensors),
            "files": files,
        }
        out.result(value, "\n".join(_described(value)))


def verify(
    ref: RefArgument, store: StoreOption = None, json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """Read every byte of a version and compare it with its manifest; exit status 1 if it is damaged."""
    with reporting(json=json, verbose=verbose) as out:
        checkpoint = _registry(store).open(ref)
        problems = checkpoint.verify()
        is_damaged = any(problem.is_damage for problem in problems)
        word = "damaged" if is_damaged else "whole"
        value = {
            "ref": checkpoint.ref,
            "whole": not is_damaged,
            "problems": [
                {"kind": problem.kind.value, "key": problem.key, "message": problem.message}
                for problem in problems
            ],
        }
        lines = [f"{checkpoint.ref} is {word}", *(f"  {problem.message}" for problem in problems)]
        out.result(value, "\n".join(lines))
        if is_damaged:
            raise typer.Exit(DAMAGED)


def alias(
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Argument(help="The alias, for example production.")],
    ref: Annotated[
        str | None, typer.Argument(metavar="REF", help="What it shall stand for.", show_default=False)
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Set it back to the version before.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Let it stand for nothing.")] = False,
    note: Annotated[str, typer.Option(help="Why; kept in the history.", show_default=False)] = "",
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Set an alias to a version, roll it back, remove it, or show its history."""
    with reporting(json=json, verbose=verbose) as out:
        if sum([ref is not None, rollback, remove]) > 1:
            raise UsageError("a REF, --rollback and --remove exclude each other", "Give one of them.")
        registry = _registry(store)
        if ref is not None:
            registry.set_alias(name, alias, ref, note)
        elif rollback:
            registry.rollback(name, alias, note)
        elif remove:
            registry.remove_alias(name, alias, note)
        history = registry.alias_history(name, alias)
        _show_history(out, name, alias, history)


def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove what no manifest names and no live run owns."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.store.sweep import sweep as sweep_store

        swept = sweep_store(existing_store(store), dry_run=dry_run)
        total = sum(each.size_bytes for each in swept)
        value = {
            "dry_run": dry_run,
            "size_bytes": total,
            "removed": [{"key": each.key, "size_bytes": each.size_bytes, "reason": each.reason} for each in swept],
        }
        verb = "would remove" if dry_run else "removed"
        lines = [f"{verb} {each.key} ({each.size_bytes} bytes): {each.reason}" for each in swept]
        out.result(value, "\n".join([*lines, f"{verb} {len(swept)} objects, {total} bytes"]))


def _registry(store: str | None) -> Registry:
    from eagleray.store.registry import Registry

    return Registry(existing_store(store))


def _list_versions(out: Output, registry: Registry, name: str) -> None:
    versions = registry.versions(name)
    if not versions:
        registry.resolve(f"{name}@latest")  # raises, and says what there is
    rows = [
        (info.version, info.created[:19], f"{info.size_bytes / 1e6:.1f} MB", _scores(info), " ".join(info.aliases))
        for info in versions
    ]
    text = table(("VERSION", "CREATED", "SIZE", "SCORES", "ALIASES"), rows)
    out.result({"name": name, "versions": [_version_json(info) for info in versions]}, text)


def _version_json(info: VersionInfo) -> dict[str, Any]:
    return {
        "ref": info.ref,
        "run": info.run,
        "step": info.step,
        "created": info.created,
        "metrics": info.metrics,
        "aliases": list(info.aliases),
        "size_bytes": info.size_bytes,
        "manifest_sha256": info.manifest_sha256,
        "problem": info.problem,
    }


def _described(value: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell people what `value` says: one for each fact, under its key."""
    for key, shown in value.items():
        for i, fact in enumerate(_facts(shown)):
            yield f"{key if i == 0 else '':<16} {fact}"


def _facts(shown: Any) -> list[str]:
    match shown:
        case None:
            return []
        case dict():
            return [f"{name} {_number(entry)}" for name, entry in shown.items()]
        case list():
            return [_file(each) if isinstance(each, dict) else str(each) for each in shown]
        case _:
            return [str(shown)]


def _number(entry: Any) -> str:
    return f"{entry:.4g}" if isinstance(entry, float) else str(entry)


def _file(file: Mapping[str, Any]) -> str:
    return f"{file['path']} ({file['size_bytes']:,} bytes)"


def _scores(info: VersionInfo) -> str:
    if info.problem is not None:
        return f"damaged: {info.problem}"
    return " ".join(
        f"{key} {value:.4g}" for key, value in info.metrics.items() if value is not None and "/" not in key
    )


def _best(registry: Registry, name: str) -> str | None:
    best = registry.best(name)
    return best.version if best is not None else None


def _aliases(versions: list[VersionInfo]) -> str:
    return " ".join(f"{alias}={info.version}" for info in versions for alias in info.aliases)


def _show_history(out: Output, name: str, alias: str, history: list[AliasRecord]) -> None:
    current = history[-1].version if history else None
    value = {
        "name": name,
        "alias": alias,
        "ref": f"{name}@{current}" if current else None,
        "history": [{"version": each.version, "created": each.created, "note": each.note} for each in history],
    }
    rows = [(each.created[:19], each.version or "removed", each.note) for each in history]
    state = f"{name}@{alias} is {current}" if current else f"{name}@{alias} stands for nothing"
    out.result(value, "\n".join([state, table(("SET", "VERSION", "NOTE"), rows)]) if rows else state)
