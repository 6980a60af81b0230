"""A function on every item, by a pool of Ray actors each of which has one item in hand, in the order they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from eagleray_jobs.ray_map import MAX_DEATHS_IN_A_ROW, PoolSize, dying

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_unordered(
    make: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    *,
    max_workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
) -> Iterator[Result]:
    """Yield the result of each item as soon as it is there, whatever order they end in.

    An actor is given its next item once the caller asks for what comes after its last result. So whatever happens,
    each actor has at most one item of which the caller has not used the result: Ray Data, which works ahead of its
    caller, cannot promise that. When an actor dies, another one takes its place and its item comes last; the
    others go on. The function must be pure.

    Args:
        make: Makes the function, once in each actor: this is where a model is loaded. Picklable.
        items: What it is called with; picklable.
        max_workers: Actors at most. Those that the cluster has no room for wait until it has.
        num_cpus: CPUs of one actor.
        num_gpus: GPUs of one actor.

    Raises:
        RunFailedError: Actors died one after the other without a result in between.
    """
    from ray.exceptions import ObjectLostError, RayActorError

    size = PoolSize(max_workers, num_cpus, num_gpus)
    waiting, num_done, num_deaths = deque(items), 0, 0
    with _started(make, size, min(max_workers, len(items))) as workers:
        while num_done < len(items):
            worker, in_hand, ended = workers.wait()
            try:
                results = ended.result()
            except (RayActorError, ObjectLostError) as error:
                num_deaths += 1
                if num_deaths == MAX_DEATHS_IN_A_ROW:
                    raise dying(error, num_done, len(items), size) from error
                waiting.extend(in_hand)
                workers.replace(worker)
                continue
            for result in results:
                num_done, num_deaths = num_done + 1, 0
                yield result
            if waiting:
                workers.give(worker, [waiting.popleft()])
            else:
                workers.release(worker)


class _Workers:
    """Actors, and what each of them has in hand: one item, or none while it starts."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], size: PoolSize) -> None:
        import ray

        options = {"num_cpus": size.num_cpus, "num_gpus": size.num_gpus, "max_restarts": 0}
        self._actor = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **options)
        self._make = make
        self._busy: dict[Future[list[Any]], tuple[Any, list[Any]]] = {}

    def start(self) -> None:
        """Start an actor; it is waited for like one that works."""
        self.give(self._actor.remote(self._make), [])

    def give(self, worker: Any, items: list[Any]) -> None:
        """Let an actor begin with items."""
        self._busy[worker.run.remote(items).future()] = (worker, items)

    def wait(self) -> tuple[Any, list[Any], Future[list[Any]]]:
        """Wait until an actor is through; return it, what it had in hand and its results."""
        # Not in `ray.wait`: what a handler of a signal raises there loses its exit status.
        done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
        ended = next(each for each in self._busy if each in done)
        return *self._busy.pop(ended), ended

    def release(self, worker: Any) -> None:
        """End an actor."""
        import ray

        ray.kill(worker)

    def replace(self, worker: Any) -> None:
        """Start another actor in place of one that failed."""
        self.release(worker)  # where it is only out of reach, it lives
        self.start()

    def end(self) -> None:
        """End all of them, whatever they have in hand."""
        import ray

        # An iterator that is left behind ends late: then Ray would start a cluster to kill actors in it.
        if ray.is_initialized():
            for worker, _ in self._busy.values():
                self.release(worker)


@contextmanager
def _started(make: Callable[[], Callable[[Any], Any]], size: PoolSize, num_workers: int) -> Iterator[_Workers]:
    workers = _Workers(make, size)
    try:
        for _ in range(num_workers):
            workers.start()
        yield workers
    finally:
        workers.end()


class _Worker:
    """One actor."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._function = make()

    def run(self, items: Sequence[Any]) -> list[Any]:
        """Return the results of items; without any, that of having started."""
        return [self._function(item) for item in items]
