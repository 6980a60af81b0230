"""From the file's words to Serve's, in one function."""

from __future__ import annotations

from typing import Any

from eagleray.config.schema import ServeConfig
from eagleray.rank_actors import bundles

# Serve's own is 30 s: a burst would be over before it is seen. With the upscale delay of 2 s, what is too much is
# seen, reported and decided on within 5 s.
LOOK_BACK_S = 2.0
# How often replicas and handles say what they are doing; 10 s by default.
METRICS_INTERVAL_S = 0.5
POLICY = "eagleray_serving.scaling:TokenPolicy"
# Constructors that fail before a deployment is given up; a damaged checkpoint does not mend itself.
MAX_CONSTRUCTOR_FAILURES = 2
# How often Serve asks a replica whether it lives, which it must deny three times; 10 s by default.
HEALTH_CHECK_PERIOD_S = 2.0
# Serve's own line per request, in Ray's files, took 6 % of a replica's time with a model that does nothing. Who
# wants an access log asks for ours, which has keys, tokens and versions.
LOGGING = {"enable_access_log": False}


def deployment_options(serve: ServeConfig) -> dict[str, Any]:
    """Return the options of a Serve deployment."""
    options: dict[str, Any] = {
        "max_ongoing_requests": serve.max_ongoing_requests,
        "ray_actor_options": {
            "num_cpus": serve.ray_actor_options.num_cpus,
            "num_gpus": serve.ray_actor_options.num_gpus,
        },
        "max_constructor_retry_count": MAX_CONSTRUCTOR_FAILURES,
        # What a replica holds when it is asked to go may take as long as a request may.
        "graceful_shutdown_timeout_s": serve.request_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        # A new configuration's replicas answer before those of the old one go: without it they would go first.
        "max_surge_percent": 100,
        "logging_config": dict(LOGGING),
    }
    if num_ranks(serve) > 1:
        options |= _group_options(serve)
    if serve.num_replicas != "auto":
        return {**options, "num_replicas": serve.num_replicas}
    scaling = serve.autoscaling_config
    autoscaling = {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "initial_replicas": scaling.initial_replicas,
        "policy": {
            "policy_function": POLICY,
            "policy_kwargs": {"target_queued_tokens": scaling.target_queued_tokens},
        },
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "look_back_period_s": LOOK_BACK_S,
        # Deprecated in favour of the variables in `front`, which Ray 2.60 does not read; it compares the look-back
        # with this, too.
        "metrics_interval_s": METRICS_INTERVAL_S,
    }
    return {
        **options,
        "autoscaling_config": {key: value for key, value in autoscaling.items() if value is not None},
    }


def num_ranks(serve: ServeConfig) -> int:
    """Return how many processes hold the parts of a replica's model."""
    return serve.tensor_parallel_degree * serve.pipeline_parallel_degree


def _group_options(serve: ServeConfig) -> dict[str, Any]:
    """Return what a replica of several ranks asks for: a bundle for each of them, and nothing for itself."""
    actor = serve.ray_actor_options
    return {
        "ray_actor_options": {"num_cpus": 0, "num_gpus": 0},
        "placement_group_bundles": bundles(num_ranks(serve), actor.num_cpus, actor.num_gpus),
        "placement_group_strategy": "PACK",
        # A replica ends by itself when it has lost a rank; Serve is to see it soon.
        "health_check_timeout_s": serve.rank_timeout_s,
    }


def initial_replicas(serve: ServeConfig) -> int:
    """Return the number of replicas that a deployment starts with."""
    if serve.num_replicas != "auto":
        return serve.num_replicas
    scaling = serve.autoscaling_config
    return scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas
