"""The verb `train`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from eagleray.console import (
    AddressOption,
    FilesArgument,
    JsonOption,
    Output,
    StoreOption,
    VerboseOption,
    reporting,
)

if TYPE_CHECKING:
    from eagleray.config.loader import LoadedFile
    from eagleray_jobs.train.report import TrainReport


def train(
    files: FilesArgument,
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Begin a new run although the name holds one of another file.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Record three steps of all workers as a Chrome trace and a picture (or train.profile_steps).",
        ),
    ] = False,
    store: StoreOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a model, or go on with an unfinished run of it.

    Several files are trained one after the other on one Ray. Ctrl-C commits a checkpoint and prints the command
    that goes on from it; a second Ctrl-C stops at once.
    """
    with reporting(json=json, verbose=verbose) as out:
        reports = _train_all(out, files, store, address, new_run=new_run, profile=profile)
        values = [report.as_json() for report in reports]
        value = values[0] if len(values) == 1 else {"runs": values}
        out.result(value, "\n\n".join(report.text() for report in reports))
        if reports[-1].signal_number is not None:
            raise typer.Exit(128 + reports[-1].signal_number)


def _train_all(
    out: Output, files: list[str], store: str | None, address: str | None, *, new_run: bool, profile: bool
) -> list[TrainReport]:
    from eagleray_jobs.train.preflight import check

    loaded = out.load(files, store, require_train=True)
    for each in loaded:
        check(each.config, address)
    overrides = [argument for argument in files if "=" in argument]
    return _run(out, loaded, overrides, store, address, new_run=new_run, profile=profile)


def _run(
    out: Output,
    loaded: list[LoadedFile],
    overrides: list[str],
    store: str | None,
    address: str | None,
    *,
    new_run: bool,
    profile: bool,
) -> list[TrainReport]:
    from eagleray_jobs.train.driver import TrainOptions, train

    reports = []
    code = tuple(directory for each in loaded for directory in each.config.code)
    with ExitStack() as ray:  # the first run that needs Ray opens the connection for all of them
        for each in loaded:
            call = (str(each.path), *overrides, *(("--store", store) if store else ()))
            options = TrainOptions(
                address, new_run=new_run, verbose=out.verbose, call=call, code=code, profile=profile
            )
            reports.append(train(each.config, options, ray))
            if reports[-1].signal_number is not None:
                break
    return reports
