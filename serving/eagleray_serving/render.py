"""A plan as a Serve config: what `serve deploy` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from eagleray_serving.autoscaling import deployment_options
from eagleray_serving.front import joined_environment
from eagleray_serving.plan import EDGE_APPLICATION, ModelPlan, prefixes

MODULE = "eagleray_serving.deployments"


def serve_config(plans: Sequence[ModelPlan], host: str, port: int) -> dict[str, Any]:
    """Return the config of all applications; the versions are pinned in it.

    Args:
        plans: The models.
        host: Address of the front; always written out, because Serve's default in a file is all interfaces.
        port: Port of the front.
    """
    bare = prefixes(plans)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            *(_application(plan, bare[plan.card.name]) for plan in plans),
            {
                "name": EDGE_APPLICATION,
                "route_prefix": "/",
                "import_path": f"{MODULE}:build_edge",
                "args": {"models": [plan.as_args() for plan in plans]},
            },
        ],
    }


def render(plans: Sequence[ModelPlan], host: str, port: int) -> str:
    """Return the config as YAML, with what it needs around it as comments."""
    refs = ", ".join(plan.card.ref for plan in plans)
    variables = [f"#   {name}={value!r}" for name, value in joined_environment().items()]
    head = [
        f"# Serves {refs}.",
        "# eagleray must be installed on the cluster, and the store must be reachable from every node.",
        "# For HAProxy as a front that loses no request, start Ray with:",
        *variables,
    ]
    body = yaml.safe_dump(serve_config(plans, host, port), sort_keys=False, allow_unicode=True)
    return "\n".join(head) + "\n" + body


def _application(plan: ModelPlan, prefix: str) -> dict[str, Any]:
    return {
        "name": plan.application,
        "route_prefix": prefix,
        "import_path": f"{MODULE}:build_model",
        "args": plan.as_args(),
        "deployments": [{"name": "Model", **deployment_options(plan.serve)}],
    }
