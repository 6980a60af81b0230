"""How many replicas a load needs; the policy with Serve's own delays, in virtual time."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from eagleray.config.serving import ServeConfig
from eagleray_serving import scaling
from eagleray_serving.admission import HeldBack
from eagleray_serving.autoscaling import LOOK_BACK_S, METRICS_INTERVAL_S, POLICY, deployment_options
from eagleray_serving.live import pick, with_replicas
from eagleray_serving.scaling import KEY_PREFIX, METRIC, Load, TokenPolicy, wanted_replicas

TARGET = 1000
# Ray 2.60 deprecates the key in favour of variables that it does not read everywhere.
pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")


@pytest.mark.parametrize(
    "tokens, requests, running, target, wanted",
    [
        (0, 0, 1, 1, 0),
        (0, 1, 1, 1, 1),
        (1, 0, 1, 1, 1),
        (999, 5, 1, 1, 1),
        (1001, 5, 1, 1, 2),
        (7500, 5, 1, 1, 8),
        (7500, 5, 2, 8, 8),
        (1900, 5, 2, 2, 2),
        (1700, 5, 3, 3, 3),  # two would be 85 % full
        (1500, 5, 3, 3, 2),
        (0, 2, 3, 3, 1),
        (0, 0, 0, 0, 0),
        (0, 1, 0, 0, 1),
        (0, 0, 0, 2, 2),  # what was decided on is still starting
    ],
)
def test_a_load_wants_as_many_replicas_as_its_tokens_fill(
    tokens: int, requests: int, running: int, target: int, wanted: int
) -> None:
    assert wanted_replicas(Load(tokens, requests, running, target), TARGET) == wanted


def test_more_tokens_never_want_fewer_replicas() -> None:
    for target in range(1, 6):
        counts = [wanted_replicas(Load(tokens, 1, 1, target), TARGET) for tokens in range(0, 8000, 50)]
        assert counts == sorted(counts)


def test_what_is_wanted_is_stable_once_it_runs() -> None:
    for tokens in range(0, 8000, 50):
        wanted = wanted_replicas(Load(tokens, 1, 1, 1), TARGET)
        assert wanted_replicas(Load(tokens, 1, wanted, wanted), TARGET) == wanted


def context(tokens: dict[str, float], requests: float, target: int, running: int | None = None) -> Any:
    return SimpleNamespace(
        aggregated_metrics={METRIC: tokens},
        total_num_requests=requests,
        current_num_replicas=len(tokens) if running is None else running,
        target_num_replicas=target,
        app_name="model-m",
    )


def test_the_decision_and_what_it_was_made_from_are_shown_but_not_ten_times_a_second() -> None:
    shown: list[tuple[bytes, bytes]] = []
    now = [0.0]
    policy = TokenPolicy(TARGET, lambda: now[0], lambda key, value: shown.append((key, value)))
    for step in range(20):
        now[0] = step / 10
        assert policy(context({"a": 900, "b": 2000.4}, 3, 2)) == (3, {})
    assert len(shown) == 2
    assert shown[0][0] == KEY_PREFIX + b"model-m"
    assert json.loads(shown[0][1]) == {
        "queued_tokens": 2900,
        "ongoing_requests": 3,
        "running_replicas": 2,
        "target_replicas": 2,
        "wanted_replicas": 3,
        "target_queued_tokens": TARGET,
    }
    policy(context({"a": 0.0, "b": 0.0}, 1, 2))
    assert len(shown) == 3, "a changed decision is shown at once"


def test_the_policy_runs_where_eagleray_is_not_installed() -> None:
    cloudpickle.register_pickle_by_value(scaling)
    try:
        pickled = cloudpickle.dumps(TokenPolicy)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)
    assert b"eagleray_serving.admission" not in pickled and b"eagleray.errors" not in pickled


def test_serve_accepts_the_options_and_makes_the_policy() -> None:
    from ray.serve.config import AutoscalingConfig

    serve = ServeConfig.model_validate({"autoscaling_config": {"target_queued_tokens": 77}})
    config = AutoscalingConfig(**deployment_options(serve)["autoscaling_config"])
    assert config.policy.policy_function == POLICY
    made = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert made(context({"a": 300.0}, 1, 1))[0] == 4


class Cluster:
    """Serve's control loop around the policy: it decides ten times a second, a replica takes time to start."""

    START_S = 15.0

    def __init__(self, **scaling_config: Any) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve.config import AutoscalingConfig

        serve = ServeConfig.model_validate({"autoscaling_config": scaling_config})
        self.config = AutoscalingConfig(**deployment_options(serve)["autoscaling_config"])
        self._apply = autoscaling_policy._apply_autoscaling_config(TokenPolicy(TARGET, publish=lambda *_: None))
        self._state: dict[str, Any] = {}
        self.target = self.running = self.config.min_replicas
        self.starting: list[float] = []
        self.log: list[tuple[float, int]] = []
        self._samples: list[tuple[float, float]] = []

    def step(self, now: float, tokens: float, requests: float) -> None:
        # Reported at intervals and averaged over the time that is looked back, as Serve does.
        if not self._samples or now - self._samples[-1][0] >= METRICS_INTERVAL_S - 1e-9:
            self._samples.append((now, tokens))
        seen = [value for at, value in self._samples if now - at <= LOOK_BACK_S]
        reported = {"r": sum(seen) / len(seen)} if self.running else {}
        made = context(reported, requests, self.target, self.running)
        made.config, made.policy_state = self.config, dict(self._state)
        wanted, self._state = self._apply(made)
        wanted = max(self.config.min_replicas, min(self.config.max_replicas, wanted))
        if wanted != self.target:
            self.log.append((now, wanted))
            self.starting = [now + self.START_S] * max(0, wanted - self.running)
            self.target, self.running = wanted, min(self.running, wanted)
        self.running += sum(at <= now for at in self.starting)
        self.starting = [at for at in self.starting if at > now]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Serve's delays read the time; it is ours here."""
    from ray.serve import autoscaling_policy

    now = [0.0]
    monkeypatch.setattr(autoscaling_policy.time, "time", lambda: now[0])
    return now


def run(cluster: Cluster, clock: list[float], seconds: float, tokens: float, requests: float) -> None:
    for _ in range(round(seconds * 10)):
        cluster.step(clock[0], tokens, requests)
        clock[0] = round(clock[0] + 0.1, 1)


@pytest.mark.parametrize("tokens, wanted", [(1100, 2), (3500, 4), (100_000, 4)])
def test_too_much_load_is_decided_on_within_five_seconds(clock: list[float], tokens: int, wanted: int) -> None:
    cluster = Cluster(min_replicas=1, max_replicas=4)
    run(cluster, clock, 30, 500, 5)
    begin = clock[0]
    run(cluster, clock, 30, tokens, 50)
    assert cluster.log[0][0] - begin <= 5.0
    assert (cluster.log[0][1], cluster.target, len(cluster.log)) == (wanted, wanted, 1)


def test_a_moment_of_load_starts_nothing(clock: list[float]) -> None:
    cluster = Cluster(min_replicas=1, max_replicas=4)
    run(cluster, clock, 10, 0, 1)
    run(cluster, clock, 0.5, 1500, 9)
    run(cluster, clock, 20, 100, 1)
    assert cluster.log == []


def test_an_idle_model_goes_to_its_fewest_replicas_after_its_delay_and_to_zero_where_that_is_allowed(
    clock: list[float],
) -> None:
    cluster = Cluster(min_replicas=0, max_replicas=4, downscale_delay_s=20)
    run(cluster, clock, 1, 0, 1)
    assert cluster.log == [(0.0, 1)], "a request wakes the model at once"
    run(cluster, clock, 30, 3500, 50)
    assert cluster.target == 4
    begin = clock[0]
    run(cluster, clock, 60, 0, 0)
    assert [wanted for _, wanted in cluster.log[-2:]] == [1, 0]
    assert cluster.log[-2][0] - begin >= 20
    run(cluster, clock, 5, 0, 0)
    assert cluster.target == 0


def test_a_steady_load_does_not_make_replicas_come_and_go(clock: list[float]) -> None:
    cluster = Cluster(min_replicas=1, max_replicas=8, downscale_delay_s=5)
    for second in range(600):
        run(cluster, clock, 1, 2500 + 400 * ((second // 7) % 2), 20)
    assert len(cluster.log) == 1 and cluster.target == 3


def test_what_a_sender_holds_back_counts_until_it_is_sent_or_its_sender_is_silent() -> None:
    now = [0.0]
    held = HeldBack(lambda: now[0])
    held.tell("a", 100)
    held.tell("b", 50)
    assert held.num_tokens == 150
    held.tell("b", 0)
    assert (held.num_tokens, len(held._told)) == (100, 1)
    now[0] = 11
    assert (held.num_tokens, held._told) == (0, {})


def test_the_status_of_a_server_names_its_replicas() -> None:
    models = [{"name": "m", "replicas": {"running": 2}}, {"name": "n", "replicas": None}]
    assert with_replicas(["m@v", "n@w"], models) == ["m@v (2)", "n@w"]
    assert with_replicas(["m@v"], []) == ["m@v"]
    assert pick(models, "replicas") == {"m": {"running": 2}}
