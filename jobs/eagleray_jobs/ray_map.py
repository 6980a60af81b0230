"""A function on every item of a list, by a pool of Ray Data actors, with the results in the order of the items."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from eagleray.errors import RunFailedError

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_DEATHS_IN_A_ROW = 3
"""Pools that may lose an actor one after the other without a single new result in between."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Actors at most, and the resources of one."""

    max_workers: int
    num_cpus: float
    num_gpus: float


def map_on_actors(
    make: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    *,
    max_workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[Result]:
    """Yield the result of each item, in order, as they come.

    When an actor dies, a new pool goes on with the items that have no result yet: the function must be pure.

    Args:
        make: Makes the function, once in each actor: this is where a model is loaded. Picklable.
        items: What it is called with; picklable.
        max_workers: Actors at most.
        num_cpus: CPUs of one actor.
        num_gpus: GPUs of one actor.

    Raises:
        RunFailedError: Actors died again and again at the same place.
    """
    from ray.exceptions import ObjectLostError, RayActorError

    pool = PoolSize(max_workers, num_cpus, num_gpus)
    num_done, num_deaths = 0, 0
    while num_done < len(items):
        try:
            for result in _map_once(make, items[num_done:], pool):
                num_done, num_deaths = num_done + 1, 0
                yield result
        except (RayActorError, ObjectLostError) as error:
            num_deaths += 1
            if num_deaths == MAX_DEATHS_IN_A_ROW:
                raise dying(error, num_done, len(items), pool) from error


def _map_once(
    make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], pool: PoolSize
) -> Iterator[Result]:
    import ray.data
    from ray.data import ActorPoolStrategy

    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    results = _without_restarts(
        dataset.map_batches,
        _Mapped,
        fn_constructor_args=(make,),
        batch_size=1,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(pool.max_workers, len(rows)))),
    )
    for row in results.iter_rows():
        yield pickle.loads(row["result"])


def _without_restarts(map_batches: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `map_batches` for actors that Ray itself does not restart.

    Its restarts have no bound, and where they are allowed its core prints an error on the terminal for every
    actor with arguments in the object store, as those of Ray Data are (ray#53727). Ray Data passes the setting on
    only as a keyword that it calls deprecated. TODO: once Ray (2.64) takes it away, use what takes its place.
    """
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return map_batches(*args, max_restarts=0, **options)


def dying(error: Exception, num_done: int, num_items: int, pool: PoolSize) -> RunFailedError:
    """Return the error of a pool whose actors die again and again."""
    return RunFailedError(
        f"{MAX_DEATHS_IN_A_ROW} workers in a row died after {num_done} of {num_items} pieces of work: {error}",
        "A worker that runs out of memory dies like this: give it less to do, or run fewer than "
        f"{pool.max_workers} at a time.",
    )


class _Mapped:
    """One actor."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._function(pickle.loads(item))) for item in batch["item"]]}
