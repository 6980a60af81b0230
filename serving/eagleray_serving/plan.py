"""From files to what is to be served: references resolved, checkpoints checked, before anything is started."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.config.builtin_tasks import BUILTIN_TASKS
from eagleray.config.loader import LoadedFile
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.errors import CheckpointDamagedError, ConfigError, UsageError
from eagleray.labels import read_labels
from eagleray_serving.catalog import ModelCard, route_prefixes
from eagleray_serving.protection import Protection
from eagleray_serving.schema import InputKind

if TYPE_CHECKING:
    from eagleray.store.checkpoint import Checkpoint
    from eagleray.tasks import Task

EDGE_APPLICATION = "edge"
# Limits of one request, by their keys in `serve`: what `/v1/models` tells a client.
SHOWN_LIMITS = (
    "max_items",
    "max_item_characters",
    "max_body_bytes",
    "max_header_bytes",
    "max_depth",
    "max_image_pixels",
    "request_timeout_s",
)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model to be served; crosses processes, also as the arguments in a Serve config.

    Attributes:
        store: Location of the store.
        card: The model and its version: pinned, so that a replica that starts later serves the same.
        columns: The task's input columns.
        serve: The file's `serve` section.
        code: Directories of the user's own packages.
        server: Id of the server: where its versions are written down, apart from those of any other.
        protection: What the server was told about its edge.
    """

    store: str
    card: ModelCard
    columns: tuple[str, ...]
    serve: ServeConfig
    code: tuple[str, ...] = ()
    server: str = "server"
    protection: Protection = field(default_factory=Protection)

    @property
    def application(self) -> str:
        """Name of the Serve application; never that of the edge."""
        return f"model-{self.card.name}"

    def as_args(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {
            "store": self.store,
            "card": asdict(self.card),
            "columns": list(self.columns),
            "serve": self.serve.model_dump(mode="json"),
            "code": list(self.code),
            "server": self.server,
            "protection": self.protection.as_args(),
        }

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> ModelPlan:
        """Rebuild a plan from plain values."""
        return cls(
            args["store"],
            _card_of(args["card"]),
            tuple(args["columns"]),
            ServeConfig.model_validate(args["serve"]),
            tuple(args["code"]),
            args["server"],
            Protection.from_args(args["protection"]),
        )


def plan_models(
    files: Sequence[LoadedFile], *, verify: bool = True, notify: Callable[[str], None] = lambda _: None
) -> list[ModelPlan]:
    """Resolve what each file serves.

    Args:
        files: The files, one model each.
        verify: Read every byte of a checkpoint in a local store now, so that damage is found before Ray starts;
            the replicas do it again in any case.
        notify: Told what is served.

    Raises:
        UsageError: Two files have the same name.
        NotFoundError: There is no such version.
        CheckpointDamagedError: A byte of it is not what was committed.
    """
    plans: dict[str, ModelPlan] = {}
    server = secrets.token_hex(8)
    for file in files:
        if file.config.name in plans:
            raise UsageError(
                f"two files are named {file.config.name}", "each model of a server needs a name of its own"
            )
        plan = _plan(file.config, server, verify=verify)
        notify(f"{file.path}: {plan.card.ref}")
        plans[file.config.name] = plan
    return list(plans.values())


def prefixes(plans: Sequence[ModelPlan]) -> dict[str, str]:
    """Return the route prefix of each application by its model's name."""
    return route_prefixes([plan.card for plan in plans])


def check(checkpoint: Checkpoint) -> None:
    """Read every byte of a version.

    Raises:
        CheckpointDamagedError: Something is not what was committed.
    """
    damage = [problem for problem in checkpoint.verify() if problem.is_damage]
    if damage:
        more = f" (and {len(damage) - 1} more files)" if len(damage) > 1 else ""
        raise CheckpointDamagedError(
            f"{checkpoint.ref}: {damage[0].message}{more}", "serve another version with serve.ref"
        )


def _plan(config: RunConfig, server: str, *, verify: bool) -> ModelPlan:
    # Not at the top: with torch behind it, it would make `serve status` slow.
    from eagleray.console import existing_store
    from eagleray.store.registry import Registry

    assert config.store is not None, "the loader fills the store in"
    store = existing_store(config.store)
    checkpoint = Registry(store).open(reference(config))
    stored = checkpoint.config()
    if stored.task != config.task:
        raise ConfigError(
            f"{config.name}: the file's task is {config.task}, but {checkpoint.ref} was trained for {stored.task}",
            "serve it with the file that trained it",
        )
    if verify and store.is_local:
        check(checkpoint)
    _check_degrees(checkpoint, config)
    location = str(Path(config.store).resolve()) if store.is_local and "://" not in config.store else config.store
    card, columns = _card(stored.model_copy(update={"name": config.name}), checkpoint.version, config.code)
    limits = {key: getattr(config.serve, key) for key in SHOWN_LIMITS}
    scores = {name: score for name, score in checkpoint.manifest.metrics.items() if score is not None}
    card = replace(card, scores=scores, limits=limits, labels=_labels(card, checkpoint))
    if card.inputs == "inputs":
        card = replace(card, columns=columns)
    return ModelPlan(location, card, columns, config.serve, tuple(config.code), server)


def _labels(card: ModelCard, checkpoint: Checkpoint) -> tuple[str, ...]:
    if card.verb != "classify":
        return ()
    try:
        return read_labels(checkpoint.files())
    except KeyError:
        return ()  # a task of the user's own keeps them in another file


def _card_of(args: Mapping[str, Any]) -> ModelCard:
    lists = {key: tuple(args.get(key, ())) for key in ("labels", "columns")}
    return ModelCard(**{**args, **lists})


def _check_degrees(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuse degrees that do not fit the model, before anything is started.

    Raises:
        ConfigError: They do not; with the numbers.
    """
    if config.serve.tensor_parallel_degree * config.serve.pipeline_parallel_degree == 1:
        return
    from eagleray.engine.group import check_group
    from eagleray.user_code import add_code

    add_code(config.code)
    check_group(checkpoint, config.serve)


def reference(config: RunConfig) -> str:
    """Return what a file serves at its start: `serve.ref` or `serve.follow`, with the name in front."""
    ref = config.serve.ref
    follow = config.serve.follow
    if follow is not None:
        # As plain names do, it means the latest where no evaluation ran.
        selector = follow.removeprefix("@")
        return config.name if selector == "best" else f"{config.name}@{selector}"
    if ref is None:
        return config.name
    if ref.startswith("@"):
        return config.name + ref
    if ref.partition("@")[0] != config.name:
        raise ConfigError(
            f"serve.ref is {ref!r}, but the file's name is {config.name}",
            f"write {config.name}@VERSION, or only @VERSION",
        )
    return ref


def _card(config: RunConfig, version: str, code: Sequence[str]) -> tuple[ModelCard, tuple[str, ...]]:
    task = BUILTIN_TASKS.get(config.task) or _own_task(config.task, code)
    inputs: InputKind = "inputs"
    if task.route != "predict":
        inputs = "images" if task.input_columns == ("image",) else "text"
    pair = (config.data.source_lang, config.data.target_lang) if task.route == "translate" else (None, None)
    return ModelCard(config.name, version, task.route, inputs, *pair), tuple(task.input_columns)


def _own_task(name: str, code: Sequence[str]) -> type[Task]:
    from eagleray.tasks import task_class
    from eagleray.user_code import add_code

    add_code(code)
    return task_class(name)
