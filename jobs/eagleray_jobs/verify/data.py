"""The rows that `verify` trains on: those that a training prepared, or new ones in a place that is removed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from eagleray.config.schema import RunConfig
from eagleray.errors import StoreError
from eagleray.store.objects import ObjectStore
from eagleray.store.uri import parse_store_uri
from eagleray.tasks import load_task
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.data.prepare import find_prepared, prepare, run_in_line
from eagleray_jobs.data.rows import Source
from eagleray_jobs.data.sources import open_source


@contextmanager
def prepared_rows(config: RunConfig, notify: Callable[[str], None]) -> Iterator[PreparedData]:
    """Yield the rows of a file; nothing is written to its store.

    All rows are prepared and not only those of a few steps: the tokenizer, and with it the model, depends on them.

    Args:
        config: The file as it was written: what the check changes must not change the rows.
        notify: Told what a user should see.

    Raises:
        DataError: A file is missing, a row cannot be used, or there is nothing to train on.
    """
    source = open_source(config.data)
    found = _find(config, source, notify)
    if found is not None:
        notify(f"data: prepared before, in {found.store.location}")
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="eagleray-verify-") as folder:
        store = ObjectStore.open(folder)
        yield prepare(config, load_task(config), store, run_in_line, notify, source)


def _find(config: RunConfig, source: Source, notify: Callable[[str], None]) -> PreparedData | None:
    if config.store is None:
        return None
    where = parse_store_uri(config.store)
    if where.path is not None and not where.path.is_dir():
        return None  # opening it would make it
    try:
        return find_prepared(config, load_task(config), ObjectStore.open(config.store), source)
    except StoreError as error:
        notify(f"data: prepared anew, since the store cannot be read: {error.message}")
        return None
