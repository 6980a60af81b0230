"""A function on every item of a list, by a pool of Ray Data actors, with the results in the order of the items."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_actors(
    make: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    *,
    max_workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[Result]:
    """Yield the result of each item, in order, as they come.

    An actor that dies is replaced, and what it had in hand is done again: the function must be pure.

    Args:
        make: Makes the function, once in each actor: this is where a model is loaded. Picklable.
        items: What it is called with; picklable.
        max_workers: Actors at most.
        num_cpus: CPUs of one actor.
        num_gpus: GPUs of one actor.
    """
    import ray.data
    from ray.data import ActorPoolStrategy

    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    results = dataset.map_batches(
        _Mapped,
        fn_constructor_args=(make,),
        batch_size=1,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, min(max_workers, len(rows)))),
    )
    for row in results.iter_rows():
        yield pickle.loads(row["result"])


class _Mapped:
    """One actor."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._function(pickle.loads(item))) for item in batch["item"]]}
