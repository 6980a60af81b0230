"""The verb `verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from eagleray.console import FilesArgument, JsonOption, StoreOption, VerboseOption, reporting

if TYPE_CHECKING:
    from eagleray.config.layout import Layout


def verify(
    files: FilesArgument,
    layouts: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT,...",
            help="Layouts to try, spelled like ddp2, fsdp2.tp2, hsdp2x2, pp2.tp2; default: all that are possible.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 5,
    max_workers: Annotated[int, typer.Option(min=2, help="Most workers of a layout, where none is named.")] = 4,
    store: StoreOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove that layouts do not change the result, on your own model and data.

    Trains a few steps in one process and in each layout, from the same seed and the same global batches, and
    compares gradients, losses and weights tensor by tensor. Runs on this machine, without Ray; nothing is written
    to the store. Exit status 1: a layout gives something else.
    """
    with reporting(json=json, verbose=verbose) as out:
        from eagleray_jobs.verify.check import VerifyOptions
        from eagleray_jobs.verify.check import verify as verify_file

        options = VerifyOptions(None if layouts is None else _parse(layouts), steps, max_workers)
        loaded = out.load(files, store, require_train=True)
        reports = [verify_file(each.config, options, out.note) for each in loaded]
        values = [report.as_json() for report in reports]
        value = values[0] if len(values) == 1 else {"files": values, "passed": all(r.passed for r in reports)}
        out.result(value, "\n\n".join(report.text() for report in reports))
        if not all(report.passed for report in reports):
            raise typer.Exit(1)


def _parse(text: str) -> tuple[Layout, ...]:
    from eagleray.config.layout import parse_layout

    return tuple(dict.fromkeys(parse_layout(part.strip()) for part in text.split(",")))
