"""`eagleray jobs`: verbs that run on a cluster and outlive the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
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

if TYPE_CHECKING:
    from eagleray.store.objects import ObjectStore

JobsAddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://host:8265; default: the job's own, else RAY_API_SERVER_ADDRESS, "
        "RAY_ADDRESS, this machine.",
        show_default=False,
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id, as `jobs list` shows it.")]


def register(app: typer.Typer) -> None:
    """Add `eagleray jobs`."""
    jobs = group(app, "jobs", "Run verbs as jobs of a Ray cluster; they outlive the terminal.")
    options = {"ignore_unknown_options": True}
    jobs.command(context_settings=options)(submit)
    jobs.command("list")(list_jobs)
    jobs.command()(status)
    jobs.command()(logs)
    jobs.command()(stop)


def submit(
    verb: Annotated[str, typer.Argument(help="What runs: train, evaluate, predict.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE... [KEY.SUB=VALUE...]", help="What the verb takes, its own options too."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log until the job is over.")] = False,
    store: StoreOption = None,
    address: JobsAddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Submit a verb to a cluster; ships this eagleray, the files and their code."""
    with reporting(json=json, verbose=verbose) as out:
        from eagleray.store.objects import ObjectStore
        from eagleray_jobs.submit.api import choose_address
        from eagleray_jobs.submit.parcel import pack

        parcel = pack(verb, arguments or [], store)
        for note in parcel.notes:
            out.note(note)
        for each in parcel.loaded:
            for warning in each.warnings:
                out.warn(f"{each.path}: {warning}")
        jobs = _open(ObjectStore.open(parcel.store), None)
        record = jobs.submit(parcel, choose_address(address))
        if follow:
            _follow(out, jobs, record.id)
            return
        text = (
            f"submitted {record.id}\n  follow it:  eagleray jobs logs {record.id} --follow --store {parcel.store}"
        )
        out.result({"id": record.id, "state": "pending", "address": record.address, "store": parcel.store}, text)


def list_jobs(
    store: StoreOption = None,
    address: JobsAddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the jobs of a store, the newest last."""
    with reporting(json=json, verbose=verbose) as out:
        found = _open(existing_store(store), address).all()
        rows = [(each.record.id, each.record.verb, each.state, each.record.submitted[:19]) for each in found]
        text = table(("JOB", "VERB", "STATE", "SUBMITTED"), rows) if rows else "no jobs"
        out.result({"jobs": [_as_json(each) for each in found]}, text)


def status(
    job: JobArgument,
    store: StoreOption = None,
    address: JobsAddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what is known of a job, also after its cluster is gone."""
    with reporting(json=json, verbose=verbose) as out:
        found = _open(existing_store(store), address).find(job)
        out.result(_as_json(found), _as_text(found))


def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    store: StoreOption = None,
    address: JobsAddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show a job's log."""
    with reporting(json=json, verbose=verbose) as out:
        jobs = _open(existing_store(store), address)
        if follow and jobs.find(job).state in ("pending", "running"):
            _follow(out, jobs, job)
            return
        text = jobs.log(job)
        out.result({"id": job, "log": text}, text.rstrip("\n"))


def stop(
    job: JobArgument,
    store: StoreOption = None,
    address: JobsAddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Stop a job: it commits a checkpoint first."""
    with reporting(json=json, verbose=verbose) as out:
        found = _open(existing_store(store), address).stop(job, out.note)
        out.result(_as_json(found), _as_text(found))


def _open(store: ObjectStore, address: str | None) -> Any:
    from eagleray_jobs.submit.api import RayJobs, choose_address
    from eagleray_jobs.submit.records import JobRecords
    from eagleray_jobs.submit.service import Jobs

    chosen = choose_address(address) if address is not None else None
    return Jobs(JobRecords(store), RayJobs, chosen)


def _follow(out: Output, jobs: Any, job_id: str) -> None:
    """Show a log until the job is over; the exit status is the job's."""
    found = jobs.follow(job_id, _writer(out))
    out.result(_as_json(found), f"{job_id}: {found.state}")
    if found.state != "succeeded":
        end = found.record.end
        raise typer.Exit(end.exit_status if end is not None and end.exit_status else 1)


def _writer(out: Output) -> Callable[[str], None]:
    def write(piece: str) -> None:
        stream = sys.stderr if out.json else sys.stdout
        stream.write(piece)
        stream.flush()

    return write


def _as_json(found: Any) -> dict[str, Any]:
    record = found.record
    end = record.end
    return {
        "id": record.id,
        "state": found.state,
        "verb": record.verb,
        "name": record.name,
        "arguments": list(record.arguments),
        "address": record.address,
        "submitted": record.submitted,
        "started": record.started,
        "ended": record.ended,
        "exit_status": end.exit_status if end else None,
        "message": end.message if end else None,
        "hint": end.hint if end else None,
        "result": end.result if end else None,
    }


def _as_text(found: Any) -> str:
    shown = _as_json(found)
    if found.state == "unreachable":
        shown["message"] = "its cluster does not answer, and it has not written its end"
    width = max(map(len, shown))
    lines = [f"{key:<{width}}  {value}" for key, value in shown.items() if value not in (None, "", [])]
    return "\n".join(lines)
