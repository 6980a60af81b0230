"""The memory that a run will need, found out in a thread while the workers start."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_unfilled
from eagleray.tasks import Processor
from eagleray_jobs.train.needs import Needs, find_needs

WAIT_S = 30.0

logger = logging.getLogger(__name__)


class Outlook:
    """Estimates what workers will hold; nobody waits for it, unless a run has failed."""

    def __init__(self) -> None:
        self._found: Future[Needs | None] | None = None
        self._limits: dict[str, float | None] = {}
        self._is_told = False

    def begin(self, config: RunConfig, layout: Layout, processor: Processor) -> None:
        """Begin to estimate; a model that its factory makes with memory is left out: it would be made here."""
        if config.model.factory is not None:
            return
        resources = config.resources
        self._limits = {
            "resources.worker_memory_limit_bytes": resources.worker_memory_limit_bytes,
            "resources.resources_per_worker.memory": resources.resources_per_worker.get("memory"),
        }
        pool = ThreadPoolExecutor(1, thread_name_prefix="outlook")
        self._found = pool.submit(_find, config, layout, processor)
        pool.shutdown(wait=False)

    def lines(self) -> list[str]:
        """Return what there is to say, once; nothing before the estimate is there."""
        if self._is_told or self._found is None or not self._found.done():
            return []
        self._is_told = True
        needs = self.needs()
        if needs is None:
            return []
        warnings = [needs.warning(limit, key) for key, limit in self._limits.items()]
        return [f"memory: {needs.summary()}", *(f"warning: {line}" for line in warnings if line is not None)]

    def needs(self) -> Needs | None:
        """Return the estimate; None: there is none."""
        return None if self._found is None else self._found.result(WAIT_S)


def _find(config: RunConfig, layout: Layout, processor: Processor) -> Needs | None:
    try:
        return find_needs(build_unfilled(config, processor)[0], config, layout)
    except Exception as error:  # the workers say it better, if it matters
        logger.debug("the memory of the workers was not estimated: %s: %s", type(error).__name__, error)
        return None
