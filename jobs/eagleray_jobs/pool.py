"""Many copies of one committed model: what `evaluate` and `predict` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.engine import Engine, load_engine
from eagleray.engine.group import group_layout
from eagleray.rank_actors import load_on_actors
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore

Item = TypeVar("Item")
Result = TypeVar("Result")

LoadEngine = Callable[[], Engine]
"""Loads the model; picklable."""


class RunItems(Protocol):
    """Runs a function on items by a pool of workers."""

    def __call__(self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the result of each item as soon as it is there, in any order.

        Args:
            make: Makes the function, once in each worker.
            items: What it is called with.
        """


def run_in_line(make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]) -> Iterator[Result]:
    """Run in this process."""
    function = make()
    return (function(item) for item in items)


@dataclass(frozen=True, slots=True)
class CheckpointLoader:
    """Loads a committed version from the store.

    Attributes:
        store: The store.
        name: Name of the model.
        version: `r2-step-00001200`.
        device: Where it runs.
        serve: Precision, engine and batches; None: what the version's own file says.
        num_cpus: CPUs of one worker, where a model lies on several.
        code: Directories of the user's own packages.
    """

    store: ObjectStore
    name: str
    version: str
    device: str = "cpu"
    serve: ServeConfig | None = None
    num_cpus: float = 1
    code: Sequence[str] = ()

    def __call__(self) -> Engine:
        """Load it; every byte is verified."""
        checkpoint = Checkpoint.open(self.store, self.name, self.version)
        serve = self.serve or checkpoint.config().serve
        if group_layout(serve).num_workers == 1:
            return load_engine(checkpoint, self.device, serve=serve)
        num_gpus = 1 if self.device == "cuda" else 0
        return load_on_actors(
            checkpoint, serve, num_cpus=self.num_cpus, num_gpus=num_gpus, code=self.code, own_group=True
        )


@dataclass(frozen=True, slots=True)
class ActorPool:
    """Runs items on Ray actors.

    Attributes:
        max_workers: Actors at most.
        num_cpus: CPUs of one.
        num_gpus: GPUs of one.
        num_ranks: Workers that one model lies on; they are actors of their own.
    """

    max_workers: int
    num_cpus: float
    num_gpus: float = 0
    num_ranks: int = 1

    @classmethod
    def of(
        cls, config: RunConfig, nodes: Sequence[dict[str, float]], num_workers: int | None, num_ranks: int = 1
    ) -> ActorPool:
        """Size a pool: as many models as workers are asked for, else as many as the cluster has room for.

        Args:
            config: The file; its `resources` are those of one worker.
            nodes: Resources of each node.
            num_workers: What the command line asks for.
            num_ranks: Workers that one model lies on.
        """
        resources = config.resources
        num_cpus = resources.resources_per_worker.get("CPU", 1.0)
        gpus = sum(node.get("GPU", 0) for node in nodes)
        use_gpu = gpus > 0 if resources.use_gpu == "auto" else resources.use_gpu
        cpus = sum(node.get("CPU", 0) for node in nodes)
        room = int(gpus) if use_gpu else int(cpus // num_cpus if num_cpus else cpus)
        return cls(num_workers or max(1, room // num_ranks), num_cpus, 1 if use_gpu else 0, num_ranks)

    @property
    def device(self) -> str:
        """Where the models run."""
        return "cuda" if self.num_gpus else "cpu"

    def __call__(self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the result of each item as soon as it is there."""
        from eagleray_jobs.ray_unordered import map_unordered

        # What leads a group computes nothing: the ranks have the resources.
        num_cpus, num_gpus = (self.num_cpus, self.num_gpus) if self.num_ranks == 1 else (0, 0)
        return map_unordered(make, items, max_workers=self.max_workers, num_cpus=num_cpus, num_gpus=num_gpus)
