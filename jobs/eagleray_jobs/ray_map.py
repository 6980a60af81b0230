"""A function on every item of a list, by a pool of Ray Data actors."""

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
class _Pool:
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
    in_order: bool = True,
) -> Iterator[Result]:
    """Yield the result of each item as they come.

    When an actor dies, a new pool goes on with the items that have no result yet: the function must be pure.

    Args:
        make: Makes the function, once in each actor: this is where a model is loaded. Picklable.
        items: What it is called with; picklable.
        max_workers: Actors at most.
        num_cpus: CPUs of one actor.
        num_gpus: GPUs of one actor.
        in_order: Whether results keep the order of the items: then one that takes long holds others up.

    Raises:
        RunFailedError: Actors died again and again at the same place.
    """
    from ray.exceptions import ObjectLostError, RayActorError

    pool = _Pool(max_workers, num_cpus, num_gpus)
    left, num_deaths = dict(enumerate(items)), 0
    while left:
        try:
            for index, result in _map_once(make, list(left.items()), pool, in_order):
                num_deaths = 0
                del left[index]
                yield result
        except (RayActorError, ObjectLostError) as error:
            num_deaths += 1
            if num_deaths == MAX_DEATHS_IN_A_ROW:
                raise _dying(error, len(items) - len(left), len(items), pool) from error


def _map_once(
    make: Callable[[], Callable[[Item], Result]], items: Sequence[tuple[int, Item]], pool: _Pool, in_order: bool
) -> Iterator[tuple[int, Result]]:
    import ray.data
    from ray.data import ActorPoolStrategy

    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = in_order
    results = _without_restarts(
        dataset.map_batches,
        _Mapped,
        fn_constructor_args=(make,),
        batch_size=1,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(pool.max_workers, len(rows)))),
    )
    # Fetched ahead, each result would wait for the next one.
    for batch in results.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
        for index, result in zip(batch["index"].to_pylist(), batch["result"].to_pylist(), strict=True):
            yield index, pickle.loads(result)


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


def _dying(error: Exception, num_done: int, num_items: int, pool: _Pool) -> RunFailedError:
    return RunFailedError(
        f"{MAX_DEATHS_IN_A_ROW} workers in a row died after {num_done} of {num_items} pieces of work: {error}",
        "A worker that runs out of memory dies like this: give it less to do, or run fewer than "
        f"{pool.max_workers} at a time.",
    )


class _Mapped:
    """One actor."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [pickle.dumps(self._function(pickle.loads(item))) for item in batch["item"]]
        return {"index": batch["index"], "result": results}
