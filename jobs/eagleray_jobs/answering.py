"""The verbs `evaluate` and `predict`: a committed version and a cluster for the functions of the same names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eagleray.console import (
    AddressOption,
    FilesArgument,
    JsonOption,
    Output,
    StoreOption,
    VerboseOption,
    existing_store,
    reporting,
    table,
)

if TYPE_CHECKING:
    from eagleray.config.schema import RunConfig, ServeConfig
    from eagleray.store.checkpoint import Checkpoint
    from eagleray.store.objects import ObjectStore
    from eagleray_jobs.evaluate import EvaluateReport
    from eagleray_jobs.pool import ActorPool
    from eagleray_jobs.predict import PredictReport

CodeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--code",
        metavar="DIR",
        help="Your own packages that the version needs, also several times; default: where they were in training.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=1, help="Copies of the model; default: as many as there is room for."),
]


def evaluate(
    files: FilesArgument,
    ref: Annotated[
        str | None,
        typer.Option(
            "--ref", help="Which version: en-fr@best, @latest, @step-1200, ...; default: the file's best."
        ),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option("--split", help="Which examples.")
    ] = "test",
    num_workers: WorkersOption = None,
    store: StoreOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score a model on held-out examples, per kind, beside simple baselines."""
    with reporting(json=json, verbose=verbose) as out:
        reports = []
        for each in out.load(files, store):
            reports.append(_evaluate(out, each.config, ref, split, num_workers, address))
        values = [report.as_json() for report in reports]
        out.result(
            values[0] if len(values) == 1 else {"evaluations": values},
            "\n\n".join(_describe_scores(report) for report in reports),
        )


def predict(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="The version: en-fr, en-fr@best, en-fr@step-1200, ...")
    ],
    input: Annotated[str, typer.Argument(metavar="INPUT", help="A .jsonl, .csv, .tsv, .parquet or text file.")],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The file to write; its suffix says the format.")
    ],
    num_beams: Annotated[int | None, typer.Option("--num-beams", min=1, max=16, help="Beams.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest translation, in tokens.")
    ] = None,
    code: CodeOption = None,
    num_workers: WorkersOption = None,
    store: StoreOption = None,
    address: AddressOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer every row of a file, in its order.

    Text in and text out is line for line; the other formats keep their columns and add those of the answers. A
    call that was interrupted goes on where it was when it is made again.
    """
    with reporting(json=json, verbose=verbose) as out:
        given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        options = {name: value for name, value in given.items() if value is not None}
        with _keeping_parts(out, output):
            report = _predict(out, ref, input, output, options, code or [], num_workers, store, address)
        out.result(report.as_json(), _describe_rows(report))


def _evaluate(
    out: Output,
    config: RunConfig,
    ref: str | None,
    split: Literal["train", "validation", "test"],
    num_workers: int | None,
    address: str | None,
) -> EvaluateReport:
    from eagleray_jobs.evaluate import evaluate, keep_report

    store = existing_store(config.store)
    checkpoint = _open(store, ref or config.serve.ref or config.name, config.name)
    with _pool(out, config, checkpoint, config.serve, num_workers, address) as pool:
        load = _loader(store, checkpoint, pool, config.code, config.serve)
        report = evaluate(config, checkpoint.ref, load, pool, split=split)
    out.note(f"report: {store.location}/{keep_report(store, report)}")
    return report


def _predict(
    out: Output,
    ref: str,
    input_path: str,
    output_path: str,
    options: Mapping[str, Any],
    code: Sequence[str],
    num_workers: int | None,
    store: str | None,
    address: str | None,
) -> PredictReport:
    from eagleray.tasks import load_task
    from eagleray_jobs.predict import predict

    opened = existing_store(store)
    checkpoint = _open(opened, ref, None)
    config = find_code(checkpoint.ref, checkpoint.config(), code)
    with _pool(out, config, checkpoint, config.serve, num_workers, address) as pool:
        return predict(
            config,
            checkpoint.ref,
            _loader(opened, checkpoint, pool, config.code),
            pool,
            load_task(config),
            input_path,
            output_path,
            options=options,
            notify=out.note,
        )


@contextmanager
def _keeping_parts(out: Output, output: str) -> Iterator[None]:
    """Tell whoever interrupts a prediction that what was answered is not lost."""
    from eagleray_jobs.predict import PARTS_SUFFIX

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if Path(output + PARTS_SUFFIX).exists():
            out.note(
                f"what was answered so far is kept in {output}{PARTS_SUFFIX}: the same call goes on from there"
            )
        raise


def find_code(ref: str, config: RunConfig, code: Sequence[str]) -> RunConfig:
    """Put the user's own code of a version on the import path.

    Args:
        ref: The version.
        config: Its file, whose `code:` holds directories of the machine that trained it.
        code: Directories that hold the code here; empty: those of the file that are here too.

    Returns:
        The file with the directories that are here.

    Raises:
        ConfigError: A module that the version needs cannot be imported, or there is no such directory.
    """
    from eagleray.errors import ConfigError
    from eagleray.user_code import add_code, import_attribute

    here = [str(Path(entry).resolve()) for entry in code or config.code if code or Path(entry).is_dir()]
    add_code(here)
    for key, path in (("task", config.task), ("model.factory", config.model.factory)):
        if path is None or ":" not in path:
            continue  # built in
        try:
            import_attribute(path, key)
        except ConfigError as error:
            package = path.partition(":")[0].partition(".")[0]
            before = f"in {', '.join(config.code)}" if config.code else "installed"
            raise ConfigError(
                f"{ref} needs code of its own: {error.message}",
                f"Name the directory that holds {package} with --code DIR; "
                f"when {ref} was trained it was {before}.",
            ) from error
    return config.model_copy(update={"code": here})


def _open(store: ObjectStore, ref: str, name: str | None) -> Checkpoint:
    """Open a version; a reference that begins with `@` belongs to the name of the file."""
    from eagleray.store.registry import Registry

    return Registry(store).open(f"{name}{ref}" if ref.startswith("@") and name else ref)


def _loader(
    store: ObjectStore,
    checkpoint: Checkpoint,
    pool: ActorPool,
    code: Sequence[str],
    serve: ServeConfig | None = None,
) -> Any:
    from eagleray_jobs.pool import CheckpointLoader

    name, _, version = checkpoint.ref.partition("@")
    return CheckpointLoader(store, name, version, pool.device, serve, pool.num_cpus, tuple(code))


@contextmanager
def _pool(
    out: Output,
    config: RunConfig,
    checkpoint: Checkpoint,
    serve: ServeConfig,
    num_workers: int | None,
    address: str | None,
) -> Iterator[ActorPool]:
    from eagleray.cluster import connect
    from eagleray.engine.group import check_group, group_layout
    from eagleray.user_code import add_code
    from eagleray_jobs.pool import ActorPool

    add_code(config.code)
    check_group(checkpoint, serve)
    num_ranks = group_layout(serve).num_workers
    with connect(address, code=config.code, verbose=out.verbose, notify=out.note) as cluster:
        yield ActorPool.of(config, cluster.nodes(), num_workers, num_ranks)


def _describe_scores(report: EvaluateReport) -> str:
    headers, rows = report.rows()
    beside = ", ".join(report.baselines)
    lines = [
        f"{report.ref} on {report.num_examples:,} {report.split} examples of {report.source}"
        + (f" (in brackets: {beside})" if beside else ""),
        "",
        table(headers, rows),
    ]
    if report.num_failed:
        lines.append(f"{report.num_failed:,} examples could not be answered and count as wrong")
    lines += [f"{metric}: {signature}" for metric, signature in report.signatures.items()]
    return "\n".join(lines)


def _describe_rows(report: PredictReport) -> str:
    lines = [f"{report.output}: {report.num_rows:,} rows answered by {report.ref} in {report.wall_s:.1f} s"]
    if report.num_resumed:
        lines.append(f"{report.num_resumed:,} of them were answered before the interruption")
    if report.num_errors:
        lines.append(f"{report.num_errors:,} rows could not be answered:")
        lines += [f"  {error}" for error in report.errors]
    return "\n".join(lines)
