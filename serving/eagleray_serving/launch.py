"""Brings plans onto the Ray that this process is connected to, through Serve, and waits until they answer."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from eagleray.errors import ServingError
from eagleray_serving.deployments import edge_application, model_application
from eagleray_serving.front import LOOPBACK
from eagleray_serving.plan import EDGE_APPLICATION, ModelPlan, prefixes
from eagleray_serving.protection import Certificate

POLL_S = 0.1
HTTP_TIMEOUT_S = 5.0
DELETE_TIMEOUT_S = 60.0
FAILED = ("DEPLOY_FAILED",)
_OUR_ERROR = re.compile(r"eagleray\.errors\.\w+: (?P<message>[^\n]+)(?:\n {2}(?P<hint>\S[^\n]*))?")


def start_serve(
    host: str, port: int, variables: Mapping[str, str], certificate: Certificate | None = None
) -> None:
    """Start Serve.

    Args:
        host: Address that its front listens on.
        port: Port that its front listens on.
        variables: Environment of its controller and whatever that starts, where Ray's own lacks it.
        certificate: For TLS, where Ray's Python proxy is the front.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    tls = {}
    if certificate is not None:
        tls = {"ssl_certfile": str(certificate.chain), "ssl_keyfile": str(certificate.key)}
    serve.start(
        http_options=HTTPOptions(host=host, port=port, **tls),
        controller_options={"runtime_env": {"env_vars": dict(variables)}} if variables else None,
    )


def running_url() -> str | None:
    """Return the URL of the Serve that runs on the joined cluster, or None where none does."""
    options = _http_options()
    if options is None:
        return None
    host = LOOPBACK if options["host"] in ("0.0.0.0", "::", None) else options["host"]
    return f"http://{host}:{options['port']}"


def running_host() -> str:
    """Return the address that the Serve of the joined cluster listens on."""
    options = _http_options()
    return "0.0.0.0" if options is None or options["host"] is None else str(options["host"])


def refuse_existing(applications: Sequence[str]) -> None:
    """Refuse to replace what somebody else serves.

    Raises:
        ServingError: An application of one of these names is there.
    """
    from ray import serve

    taken = sorted(set(applications) & set(serve.status().applications))
    if taken:
        raise ServingError(
            f"the cluster serves {', '.join(taken)} already", "stop that server first: eagleray serve stop"
        )


def launch(
    plans: Sequence[ModelPlan], runtime_env: Mapping[str, Any] | None, token_sha256: str | None = None
) -> None:
    """Hand the applications to Serve; returns before they answer."""
    from ray import serve

    bare = prefixes(plans)
    targets = [
        serve.RunTarget(
            target=model_application(plan, runtime_env), name=plan.application, route_prefix=bare[plan.card.name]
        )
        for plan in plans
    ]
    edge = serve.RunTarget(
        target=edge_application(plans, runtime_env, token_sha256), name=EDGE_APPLICATION, route_prefix="/"
    )
    serve.run_many(
        [*targets, edge], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )


def wait_until_ready(
    applications: Sequence[str], url: str, paths: Sequence[str], timeout_s: float, trust: ssl.SSLContext
) -> None:
    """Return when every application runs and answers through the front.

    Args:
        applications: Their names.
        url: The front.
        paths: Routes of models that must answer by now.
        timeout_s: Seconds to wait.
        trust: What the front's certificate is checked with.

    Raises:
        ServingError: One failed, or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(applications)
    while waiting and time.monotonic() < deadline:
        time.sleep(POLL_S)
        waiting = _not_running(waiting)
    with httpx.Client(base_url=url, timeout=HTTP_TIMEOUT_S, verify=trust) as client:
        while not waiting and time.monotonic() < deadline:
            # GET on a model's route is 405 (401 where keys are asked for) from the replica itself.
            if _answers(client, "/readyz", 200) and all(_answers(client, path, 401, 405) for path in paths):
                return
            time.sleep(POLL_S)
    what = ", ".join(waiting) if waiting else url
    raise ServingError(
        f"{what} did not answer within {timeout_s:g} s",
        "the replicas may wait for resources that are in use; eagleray doctor shows what there is",
    )


def delete(applications: Sequence[str], timeout_s: float = DELETE_TIMEOUT_S) -> None:
    """Take applications off; their replicas answer first what they hold.

    Raises:
        ServingError: They are still there after the time.
    """
    from ray import serve

    deadline = time.monotonic() + timeout_s
    for name in set(applications) & set(serve.status().applications):
        serve.delete(name, _blocking=False)
    while left := sorted(set(applications) & set(serve.status().applications)):
        if time.monotonic() > deadline:
            raise ServingError(f"{', '.join(left)} did not end within {timeout_s:g} s", "look at `serve status`")
        time.sleep(POLL_S)


def current_runtime_env() -> dict[str, Any]:
    """Return what travels with this process's connection, for the replicas."""
    import ray

    return dict(ray.get_runtime_context().runtime_env)


def _not_running(names: Sequence[str]) -> list[str]:
    from ray import serve

    found = serve.status().applications
    for name in names:
        if name in found and found[name].status.value in FAILED:
            raise _failure(name, found[name])
    return [name for name in names if name not in found or found[name].status.value != "RUNNING"]


def _failure(name: str, status: Any) -> ServingError:
    """Find our own error in what Serve says about a failed application: it shows a traceback as text."""
    text = "\n".join([status.message, *(each.message for each in status.deployments.values())])
    raised = list(_OUR_ERROR.finditer(text))
    if raised:
        return ServingError(f"{name} did not start: {raised[-1]['message']}", raised[-1]["hint"])
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return ServingError(f"{name} did not start: {lines[-1].strip() if lines else 'no reason given'}", text)


def _answers(client: httpx.Client, path: str, *statuses: int) -> bool:
    try:
        return client.get(path).status_code in statuses
    except httpx.HTTPError:
        return False


def _http_options() -> dict[str, Any] | None:
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options: dict[str, Any] = client.get_serve_details()["http_options"]
    return options
