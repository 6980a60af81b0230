"""What is done before there are workers: the data is prepared, the layout checked, the memory estimated.

All of it needs torch, which takes seconds to be imported, while a local Ray takes seconds to start and computes
little: the driver has one done beside the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eagleray.cluster import Cluster, Notify
from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_unfilled
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, check_layout
from eagleray.parallel.cut import describe_cut
from eagleray.parallel.pipeline import cut_model
from eagleray.store.objects import ObjectStore
from eagleray.tasks import Processor, load_task
from eagleray_jobs.data.prepare import EncodePiece, PieceResult, prepare
from eagleray_jobs.data.ray_pieces import run_with_ray
from eagleray_jobs.data.rows import Piece, Source
from eagleray_jobs.train.outlook import Outlook


@dataclass(frozen=True, slots=True)
class Groundwork:
    """What workers and driver stand on.

    Attributes:
        fingerprint: Of the prepared data.
        num_examples: That there are to train on.
        best_metric: The task's score that `best` goes by, and whether greater is better.
        outlook: What the workers will need, still being estimated.
    """

    fingerprint: str
    num_examples: int
    best_metric: tuple[str, bool]
    outlook: Outlook


def lay(
    config: RunConfig, layout: Layout, store: ObjectStore, source: Source, cluster: Cluster, notify: Notify
) -> Groundwork:
    """Prepare the data on a cluster and look at the model.

    Raises:
        DataError: A row cannot be used.
        ConfigError: The model cannot be cut as the layout asks for.
    """
    task = load_task(config)

    def run_pieces(encode: EncodePiece, pieces: Sequence[Piece]) -> Iterable[PieceResult]:
        import ray.data  # noqa: F401  # it brings a log handler of its own

        cluster.quiet()
        return run_with_ray(encode, pieces)

    prepared = prepare(config, task, store, run_pieces, notify, source)
    processor = task.load_processor(prepared.processor_files)
    _check_layout(config, layout, processor, notify)
    outlook = Outlook()
    outlook.begin(config, layout, processor)
    return Groundwork(prepared.fingerprint, len(prepared.split("train")), task.best_metric, outlook)


def _check_layout(config: RunConfig, layout: Layout, processor: Processor, notify: Notify) -> None:
    """Refuse before there are workers what the model cannot be cut by, and show the stages of a pipeline."""
    if layout.tensor == layout.pipeline == 1:
        return
    model, _ = build_unfilled(config, processor)
    plan, options = parallel_plan(model), ParallelOptions.of(config)
    check_layout(model, layout, plan, options)
    if layout.pipeline > 1:
        cut = cut_model(model, layout, plan, options)
        for line in describe_cut(model, plan, cut, options.length):
            notify(f"pipeline: {line}")
