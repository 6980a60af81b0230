"""The verbs `serve`, `serve status`, `serve stop` and `serve render`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from eagleray.console import (
    AddressOption,
    FilesArgument,
    JsonOption,
    Output,
    StoreOption,
    VerboseOption,
    reporting,
    table,
)
from eagleray_serving import rollout_commands
from eagleray_serving.key_commands import register_keys

if TYPE_CHECKING:
    from eagleray_serving.server import Served

DEFAULT_VERB = "up"
HostOption = Annotated[
    str, typer.Option("--host", help="Address to listen on; beyond this machine only with keys.")
]
KeysOption = Annotated[
    Path | None, typer.Option("--keys", help="File of API keys; ~/.eagleray/keys.json is used where it is there.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure-no-keys", help="Ask nobody for a key, also where a network can reach it.")
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")]


class _FilesOrVerb(TyperGroup):
    """`serve FILE...` beside `serve status`: what is no verb of the group is a file."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    serve = typer.Typer(
        cls=_FilesOrVerb,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Serve models over HTTP: `eagleray serve FILE...`; see also `eagleray serve up --help`.",
    )
    serve.command(DEFAULT_VERB)(up)
    serve.command()(status)
    serve.command()(stop)
    serve.command()(render)
    rollout_commands.add(serve)
    app.add_typer(serve, name="serve")
    register_keys(app)


def up(
    files: FilesArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it answers, and let it run.")] = False,
    keys: KeysOption = None,
    insecure_no_keys: InsecureOption = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate chain (PEM): HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key (PEM).")] = None,
    access_log: Annotated[
        str | None, typer.Option("--access-log", help="File of a JSON line per request; none: none.")
    ] = None,
    log_addresses: Annotated[
        bool, typer.Option("--log-addresses", help="Write into the access log where requests came from.")
    ] = False,
    store: StoreOption = None,
    address: AddressOption = None,
    record: Annotated[str | None, typer.Option("--record", hidden=True)] = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve the model of each file until Ctrl-C (the word `up` may be left out)."""
    with reporting(json=json, verbose=verbose) as out:
        loaded = out.load(files, store)
        from eagleray.cluster import find_address
        from eagleray_serving.home import Home
        from eagleray_serving.plan import plan_models
        from eagleray_serving.protection import edge_options
        from eagleray_serving.server import ServerOptions, refuse_relative_stores, serve_here, serve_there

        home = Home.default()
        target = None if record else find_address(address)
        edge = edge_options(
            host,
            keys=keys,
            insecure=insecure_no_keys,
            home=home.root,
            environ=os.environ,
            is_joining=target is not None,
            tls=(tls_cert, tls_key),
            access_log=access_log,
            log_addresses=log_addresses,
        )
        if target is not None:
            refuse_relative_stores(loaded)
        plans = plan_models(loaded, verify=record is None, notify=out.note)
        log = str(home.log_path(record)) if record else None
        options = ServerOptions(host, port, target, verbose, record or home.new_id(), log, edge=edge)
        if target is not None:
            serve_there(plans, options, home, lambda served: _show(out, served, detach), detach=detach)
        elif detach:
            from eagleray_serving.detached import start_detached

            _show(out, start_detached(plans, options, home, [*files, *_store_words(store)]), detach)
        else:
            serve_here(plans, options, home, lambda served: _show(out, served, detach))
            out.note("stopped")


def status(json: JsonOption = False, verbose: VerboseOption = False) -> None:
    """Show the servers that were started here."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray_serving.commanding import models
        from eagleray_serving.home import Home
        from eagleray_serving.live import pick, with_replicas
        from eagleray_serving.views import summary

        home = Home.default()
        records = home.records()
        found = {each.id: models(home, each) for each in records}
        rows = [
            (
                each.id,
                each.state,
                each.url,
                each.pid or each.address,
                " ".join(with_replicas(each.models, found[each.id])),
            )
            for each in records
        ]
        text = table(("id", "state", "url", "process", "models (replicas)"), rows) if rows else "no server runs"
        told = {id: {key: pick(shown, key) for key in ("rollout", "replicas")} for id, shown in found.items()}
        lines = [f"{id}  {name}: {summary(shown)}" for id in told for name, shown in told[id]["rollout"].items()]
        servers = [
            {**each.as_json(), "rollouts": told[each.id]["rollout"], "replicas": told[each.id]["replicas"]}
            for each in records
        ]
        out.result({"servers": servers}, "\n".join([text, *lines]))


def stop(
    id: Annotated[str | None, typer.Argument(help="Which one; not needed where only one runs.")] = None,
    all: Annotated[bool, typer.Option("--all", help="Stop every server that was started here.")] = False,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Stop a server: its own processes and no others."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray_serving.detached import choose, stop_server
        from eagleray_serving.home import Home

        home = Home.default()
        chosen = choose(home.records(), id, all=all)
        for each in chosen:
            stop_server(home, each, verbose=verbose)
        stopped = ", ".join(f"{each.id} ({each.url})" for each in chosen)
        out.result({"stopped": [each.id for each in chosen]}, f"stopped {stopped}" if chosen else "no server runs")


def render(
    files: FilesArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    keys: KeysOption = None,
    insecure_no_keys: InsecureOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Print a Serve config of the models, for Ray's own `serve deploy`."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray_serving import render as rendering
        from eagleray_serving.home import Home
        from eagleray_serving.plan import plan_models
        from eagleray_serving.protection import edge_options

        edge = edge_options(
            host,
            keys=keys,
            insecure=insecure_no_keys,
            home=Home.default().root,
            environ=os.environ,
            is_joining=True,
        )
        plans = plan_models(out.load(files, store), verify=False)
        plans = [replace(plan, protection=edge.protection(None)) for plan in plans]
        out.result(rendering.serve_config(plans, host, port), rendering.render(plans, host, port).rstrip())


def _store_words(store: str | None) -> list[str]:
    return [] if store is None else ["--store", store]


def _show(out: Output, served: Served, detach: bool) -> None:
    lines = [f"{plan.card.ref}  {served.record.url}{plan.card.path}" for plan in served.plans]
    if served.edge.has_keys:
        lines.append(f"keys: {served.edge.keys or 'from the environment'}")
    lines += ["", served.curl(), f"docs: {served.record.url}/docs", f"page: {served.record.url}/"]
    lines.append(f"stop it with: eagleray serve stop {served.record.id}" if detach else "Ctrl-C stops it")
    out.result(served.as_json(), "\n".join(lines))
