"""A cluster's Jobs API."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from eagleray.errors import EaglerayError, UsageError
from eagleray_jobs.submit.records import RayJob

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
REQUEST_TIMEOUT_S = (5.0, 60.0)
"""For the connection and for the answer."""
AGENT_WAIT_S = 60.0
"""Of a cluster that is just starting: it knows no agent of a node yet that could run a job."""
AGENT_POLL_S = 1.0


class JobsApi(Protocol):
    """What we ask of a cluster."""

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job."""

    def find(self, job_id: str) -> RayJob | None:
        """Return what the cluster says of a job; None: it does not know it."""

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to a job, and SIGKILL when its own time to stop is over."""

    def logs(self, job_id: str, *, follow: bool) -> Iterator[str]:
        """Yield a job's log in pieces; with `follow` until the job is over."""


class RayJobs:
    """The Jobs API of a running cluster.

    Args:
        address: `http://host:8265`, or the cluster's GCS address `host:6379`.

    Raises:
        UsageError: Nothing answers there, or it wants a token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = _connect(address)

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        """Start a job."""
        deadline = time.monotonic() + AGENT_WAIT_S
        with self._explained("submit the job"):
            while True:
                try:
                    self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=runtime_env)
                    return
                except RuntimeError as error:
                    # A head that has just been started answers before it can take a job.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                time.sleep(AGENT_POLL_S)

    def find(self, job_id: str) -> RayJob | None:
        """Return what the cluster says of a job; None: it does not know it."""
        with self._explained("look up the job"):
            for job in self._client.list_jobs():
                if job.submission_id == job_id:
                    return RayJob(job.status.value, job.message)
        return None

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to a job, and SIGKILL when its own time to stop is over."""
        with self._explained("stop the job"):
            self._client.stop_job(job_id)

    def logs(self, job_id: str, *, follow: bool) -> Iterator[str]:
        """Yield a job's log in pieces; with `follow` until the job is over."""
        with self._explained("read the log"):
            if not follow:
                yield self._client.get_job_logs(job_id)
                return
            with asyncio.Runner() as runner:
                pieces = self._client.tail_job_logs(job_id)
                while (piece := runner.run(_next(pieces))) is not None:
                    yield piece

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from requests.exceptions import RequestException

        try:
            yield
        except (RuntimeError, OSError, RequestException) as error:
            message = f"the cluster at {self.address} did not {what}: {error}"
            raise EaglerayError(message, "Look at its dashboard, or try again.") from error


async def _next(pieces: Any) -> str | None:
    return await anext(pieces, None)


def choose_address(option: str | None, environ: Mapping[str, str] | None = None) -> str:
    """Choose the Jobs API: `--address`, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else this machine's.

    Raises:
        UsageError: The address holds credentials, which would end up in the job's record.
    """
    environ = os.environ if environ is None else environ
    chosen = option or next((environ[name] for name in ADDRESS_VARIABLES if environ.get(name)), DEFAULT_ADDRESS)
    if chosen == "auto":
        chosen = DEFAULT_ADDRESS
    parts = urlsplit(chosen if "://" in chosen else f"//{chosen}")
    if parts.username or parts.password or parts.query:
        hint = "A token belongs into RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token."
        raise UsageError(f"the address of {parts.hostname} holds credentials or a query", hint)
    return chosen.rstrip("/")


def _connect(address: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Waits for no answer longer than our limit: Ray sets none."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": REQUEST_TIMEOUT_S, **options})

    _hush()
    try:
        with _without(ADDRESS_VARIABLES):  # they would go before the address that was asked for
            return Client(address)
    except AuthenticationError as error:
        hint = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        raise UsageError(f"the cluster at {address} wants a token: {str(error).splitlines()[0]}", hint) from error
    except Exception as error:
        hint = "Start a cluster with `ray start --head`, and name its dashboard with --address http://host:8265."
        raise UsageError(f"no Jobs API answers at {address}: {error}", hint) from error


def _hush() -> None:
    """Keep Ray's notes about each package and connection off the terminal; its warnings stay."""
    for name in logging.root.manager.loggerDict.copy():
        if name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
