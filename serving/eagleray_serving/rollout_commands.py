"""The verbs `serve canary`, `serve promote` and `serve rollback`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagleray.console import JsonOption, Output, VerboseOption, reporting

if TYPE_CHECKING:
    from eagleray_serving.commanding import Commander

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of a served model.")]
RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="A version: @latest, @best, @r1-step-00001200, ...")
]
ServerOption = Annotated[
    str | None, typer.Option("--server", help="Id of the server; not needed where only one serves the model.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait for the replicas.")]
TIMEOUT_S = 600.0


def add(serve: typer.Typer) -> None:
    """Add the verbs to the group `serve`."""
    serve.command()(canary)
    serve.command()(promote)
    serve.command()(rollback)


def canary(
    name: NameArgument,
    ref: RefArgument,
    percent: Annotated[float, typer.Option("--percent", min=0.01, max=100, help="Part of the requests.")] = 10.0,
    server: ServerOption = None,
    timeout: TimeoutOption = TIMEOUT_S,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Give a part of the requests to another version, by a hash of the request id, within every replica."""
    from eagleray_serving.commanding import divides_for

    with reporting(json=json, verbose=verbose) as out:
        commander = _commander(name, server)
        version = commander.canary(name, ref, percent)
        out.note(f"{name}@{version} is being loaded beside the current version")
        _show(out, name, commander.wait(name, version, divides_for(version), timeout))


def promote(
    name: NameArgument,
    server: ServerOption = None,
    timeout: TimeoutOption = TIMEOUT_S,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Let the canary answer all requests; an alias that the server follows is set to it."""
    _settle(lambda commander: commander.promote(name), name, server, timeout, json, verbose)


def rollback(
    name: NameArgument,
    server: ServerOption = None,
    timeout: TimeoutOption = TIMEOUT_S,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """End the canary; where there is none, go back to the version before (and so does a followed alias)."""
    _settle(lambda commander: commander.roll_back(name), name, server, timeout, json, verbose)


def _commander(name: str, server: str | None) -> Commander:
    from eagleray_serving.commanding import Commander, choose_server
    from eagleray_serving.home import Home

    home = Home.default()
    return Commander(home, choose_server(home.records(), name, server))


def _settle(
    change: Callable[[Commander], str], name: str, server: str | None, timeout_s: float, json: bool, verbose: bool
) -> None:
    """Change what is served, and wait until the version that follows answers all requests on every replica."""
    from eagleray_serving.commanding import answers_alone

    with reporting(json=json, verbose=verbose) as out:
        commander = _commander(name, server)
        version = change(commander)
        _show(out, name, commander.wait(name, version, answers_alone(version), timeout_s))


def _show(out: Output, name: str, shown: dict[str, Any]) -> None:
    from eagleray_serving.views import summary

    out.result({"model": name, **shown}, f"{name}: {summary(shown)}")
