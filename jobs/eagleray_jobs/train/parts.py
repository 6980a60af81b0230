"""Everything the loop works on, and how a worker makes it from the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from eagleray.errors import ConfigError
from eagleray.models import (
    Base,
    base_tensors,
    build_unfilled,
    check_fit,
    initialize,
    load_weights,
    model_files,
    pretrained_base,
    set_adapters,
)
from eagleray.models.tied import untie
from eagleray.parallel import Fill, ParallelOptions, build_mesh, check_device, check_supported
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.manifest import MODEL_PREFIX
from eagleray.store.registry import Registry
from eagleray.store.runs import RunHandle, run_dir
from eagleray.store.saver import CheckpointSaver
from eagleray.store.versions import latest_version
from eagleray.tasks import Processor, Task, load_task
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.train.batches import Rows
from eagleray_jobs.train.evaluation import ScoredRows
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.lookout import Lookout
from eagleray_jobs.train.metrics import FILE_NAME, JsonlFile, JsonlSegments, MetricSink, TensorBoardFiles
from eagleray_jobs.train.probe import Probe
from eagleray_jobs.train.progress import Goal
from eagleray_jobs.train.saving import Saver
from eagleray_jobs.train.spec import WorkerSpec
from eagleray_jobs.train.state import Restorable
from eagleray_jobs.train.step import check_precision

Sinks = Callable[[int], Sequence[MetricSink]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop works on; `assemble` makes it from the store, a test from fakes. The loop closes it.

    Attributes:
        model: The model: on `meta` with `fill`, or on `device` with its initial weights.
        task: Loss, answers, scores.
        processor: Of the task.
        train: The training split.
        validation: The validation split; None or empty: nothing is evaluated.
        device: Where this rank computes.
        mesh: All ranks, from `build_mesh`.
        exchange: What the ranks tell each other through.
        files: What a checkpoint holds besides tensors and state, so that it can be opened.
        saver: Commits checkpoints.
        fill: What gives a model on `meta`, or this rank's part of it, its initial weights.
        resume: The version to go on from.
        sinks: Makes the places that metrics go to, given the step that the run goes on from; used on rank 0.
        prune: Applies `train.save_total_limit`, on rank 0.
        probe: Sees what is trained, and the gradients of every step.
        lookout: Tells the other ranks where this one is; None: the loop makes one.
        has_room: Says whether this rank may hold so many bytes more than it ever held.
    """

    model: nn.Module
    task: Task
    processor: Processor
    train: Rows
    validation: ScoredRows | None
    device: torch.device
    mesh: DeviceMesh
    exchange: Exchange
    files: dict[str, bytes]
    saver: Saver
    fill: Fill | None = None
    resume: Restorable | None = None
    sinks: Sinks = lambda step: ()
    prune: Callable[[], object] | None = None
    probe: Probe | None = None
    lookout: Lookout | None = None
    has_room: Callable[[int], bool] = lambda num_bytes: True


def assemble(
    spec: WorkerSpec,
    device: torch.device,
    *,
    extra_sinks: Callable[[], Sequence[MetricSink]] = tuple,
    lookout: Lookout | None = None,
    has_room: Callable[[int], bool] = lambda num_bytes: True,
) -> Parts:
    """Open the data, build the model and find the version to go on from; called by all ranks together.

    Args:
        spec: What the driver told the workers.
        device: Where this rank computes.
        extra_sinks: Makes further places for metrics, on rank 0.
        lookout: Tells the other ranks where this one is.
        has_room: Says whether this rank may hold so many bytes more than it ever held.

    Raises:
        ConfigError: The file asks for what the device or this version cannot do.
        DataError: The prepared data is missing or damaged.
        CheckpointDamagedError: The version to go on from, or to start from, is not what was committed.
    """
    options = ParallelOptions.of(spec.config)
    check_supported(spec.layout, options, spec.train.global_batch_size)
    check_device(options, device)
    check_precision(spec.train, device)
    check_sinks(spec)
    task = load_task(spec.config)
    goal = Goal.of(spec.train, task.best_metric)
    data = PreparedData(spec.run.store, spec.data_fingerprint)
    processor = task.load_processor(data.processor_files)
    exchange = Exchange(spec.train.ddp_timeout)
    resume = find_resume(spec.run, exchange)
    model, fill, base = _build(spec, processor, device, resume, exchange)
    return Parts(
        model=model,
        task=task,
        processor=processor,
        train=data.split("train"),
        validation=data.split("validation"),
        device=device,
        mesh=build_mesh(spec.layout, device.type, timeout_s=spec.train.ddp_timeout),
        exchange=exchange,
        files=model_files(model, spec.config, processor) | (base.to_files() if base else {}),
        fill=fill,
        saver=CheckpointSaver(
            None, spec.run, layout=spec.layout, config=spec.config, best_metric=goal.best_metric
        ),
        resume=resume,
        sinks=partial(make_sinks, spec, extra_sinks),
        prune=_retention(spec),
        lookout=lookout,
        has_room=has_room,
    )


def _build(
    spec: WorkerSpec, processor: Processor, device: torch.device, resume: Checkpoint | None, exchange: Exchange
) -> tuple[nn.Module, Fill | None, Base | None]:
    """Build the model; its weights come with `resume`, from the version that the run starts from, or are new.

    The weights under an adapter never come with `resume`, which does not hold them; they are returned as its base.
    """
    model, fill = build_unfilled(spec.config, processor)
    adapter = spec.config.model.adapter
    start = base = None
    if adapter is not None:
        start, base = _find_base(spec, resume, exchange)
    elif resume is None and spec.train.init_from is not None:
        start = find_start(spec.train.init_from, spec.run, exchange)
    if fill is None:
        if start is not None:
            load_weights(model, start.tensors())
        return model.to(device), None, base
    if resume is not None and adapter is None:
        return model, partial(initialize, seed=None), base  # what no checkpoint holds
    return model, fill if start is None else start_from(model, start, exchange, spec.train.seed), base


def _find_base(
    spec: WorkerSpec, resume: Checkpoint | None, exchange: Exchange
) -> tuple[Checkpoint | None, Base | None]:
    """Find what an adapter stands on: a version, a pretrained checkpoint, or neither, where the seed makes it.

    Raises:
        ConfigError: The run goes on, and what its adapter stood on is another one now.
    """
    ref, start, found = spec.train.init_from, None, None
    if ref is None and spec.config.model.pretrained is None:
        return None, None
    known = None if resume is None else Base.from_files(resume.files(), resume.ref)
    if ref is not None:
        start = find_start(known.source if known else ref, spec.run, exchange)
        found = Base(start.ref, start.manifest.sha256)
    else:
        found = exchange.broadcast(pretrained_base(spec.config) if exchange.rank == 0 else None)
    if known is not None and found.sha256 != known.sha256:  # it may lie elsewhere than before
        raise ConfigError(
            f"the run's adapter stands on {known.source} with SHA-256 {known.sha256}, and {found.source} has "
            f"{found.sha256} now",
            "bring the weights back that it was trained on, or begin anew with --new-run",
        )
    return start, found


def find_resume(run: RunHandle, exchange: Exchange) -> Checkpoint | None:
    """Open the newest version that the run has committed, the same on every rank; None: the run begins."""
    found = latest_version(run.store, run.name, run.run) if exchange.rank == 0 else None
    version: str | None = exchange.broadcast(found)
    return None if version is None else Checkpoint.open(run.store, run.name, version)


def find_start(ref: str, run: RunHandle, exchange: Exchange) -> Checkpoint:
    """Open the version whose weights the run starts from (`train.init_from`), the same on every rank.

    Raises:
        NotFoundError: There is no such version.
        ConfigError: It holds an adapter alone.
    """
    registry = Registry(run.store)
    full_ref: str = exchange.broadcast(registry.resolve(ref) if exchange.rank == 0 else None)
    checkpoint = registry.open(full_ref)
    adapter = checkpoint.config().model.adapter
    if adapter is not None and adapter.commit == "adapter":
        raise ConfigError(
            f"train.init_from: {full_ref} holds an adapter alone, without the weights that it stands on",
            "export it, and start from the export: model.pretrained",
        )
    return checkpoint


def start_from(model: nn.Module, start: Checkpoint, exchange: Exchange, seed: int) -> Fill:
    """Return what gives a model on `meta`, or a stage of it, the weights of a version; each rank reads its part.

    A new adapter follows from the seed.

    Raises:
        CheckpointDamagedError: The weights of the version do not fit the model.
    """
    tensors = [tensor for tensor in start.manifest.tensors if tensor.name.startswith(MODEL_PREFIX)]
    shapes = {tensor.name.removeprefix(MODEL_PREFIX): tensor.shape for tensor in tensors}
    untie(model, shapes.keys())
    check_fit(model, shapes)

    def fill(part: nn.Module) -> None:
        initialize(part, None)
        set_adapters(part, seed)
        own = base_tensors(part)
        start.load_into({f"{MODEL_PREFIX}{name}": tensor for name, tensor in own.items()}, exchange.group)

    return fill


def make_sinks(spec: WorkerSpec, extra: Callable[[], Sequence[MetricSink]], step: int) -> list[MetricSink]:
    """Make the places that metrics go to: the run's folder in the store, and what `report_to` names."""
    store, folder = spec.run.store, run_dir(spec.run.name, spec.run.run)
    path = store.local_path(f"{folder}/{FILE_NAME}")
    sinks: list[MetricSink] = [JsonlFile(path, step) if path else JsonlSegments(store, folder, step)]
    if "tensorboard" in spec.train.report_to:
        upload = None if path else lambda name, data: store.put(f"{folder}/tensorboard/{name}", data)
        sinks.append(TensorBoardFiles(path.parent / "tensorboard" if path else None, step, upload))
    return [*sinks, *extra()]


def check_sinks(spec: WorkerSpec) -> None:
    """Refuse a place for metrics that is not installed.

    Raises:
        ConfigError: `report_to: [tensorboard]` without TensorBoard.
    """
    if "tensorboard" in spec.train.report_to and find_spec("tensorboard") is None:
        raise ConfigError(
            "train.report_to names tensorboard, which is not installed", "pip install 'eagleray[tensorboard]'"
        )


def _retention(spec: WorkerSpec) -> Callable[[], object] | None:
    limit = spec.train.save_total_limit
    if limit is None:
        return None
    return partial(Registry(spec.run.store).apply_retention, spec.run.name, limit)
