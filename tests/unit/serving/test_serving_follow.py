"""A server that follows a reference: a controller and replicas, without Ray and without weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from version_fakes import NAME, V1, V2, V3, FakeLoaded, Replica, Site, ask, commit

from eagleray.errors import CheckpointDamagedError, NotFoundError, ServingError, StoreError, UsageError
from eagleray.store.manifest import manifest_key
from eagleray.store.registry import Registry
from eagleray_serving.answering import Answers, ItemFailure
from eagleray_serving.split import Split
from eagleray_serving.watch import Watch


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_new_version_is_tried_by_all_and_takes_over_everywhere(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="latest")
        await site.pass_time()
        assert site.answering() == [Split(V1)] * 2
        commit(site.store, 2, chrf=51.0)
        await site.pass_time()
        assert site.answering() == [Split(V2)] * 2
        assert [replica.loads for replica in site.replicas] == [[(V2, True)]] * 2
        assert [replica.versions.loaded for replica in site.replicas] == [(V2,)] * 2
        assert (site.state().current, site.state().previous) == (V2, V1)

    run(follow)


def test_an_alias_is_followed_within_its_interval(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="@production", follow_interval_s=3)
        registry = Registry(site.store)
        registry.set_alias(NAME, "production", f"{NAME}@{V1}")
        commit(site.store, 2)
        await site.pass_time()
        assert site.answering() == [Split(V1)] * 2
        registry.set_alias(NAME, "production", f"{NAME}@{V2}")
        await site.pass_time(6)
        assert site.answering() == [Split(V2)] * 2
        registry.remove_alias(NAME, "production")
        await site.pass_time()
        assert site.answering() == [Split(V2)] * 2
        assert "alias production" in site.controller.view()["problem"]

    run(follow)


def test_a_version_with_a_worse_score_is_refused_and_the_next_better_one_is_not(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="latest")
        commit(site.store, 2, chrf=20.0)
        await site.pass_time()
        refused = site.controller.view()["refused"]
        assert (site.answering(), refused["version"]) == ([Split(V1)] * 2, V2)
        assert refused["reason"].startswith("worse: its chrf is 20, that of r1-step-00000001 50")
        assert [replica.loads for replica in site.replicas] == [[], []], "nothing was loaded for it"
        commit(site.store, 3, chrf=52.0)
        await site.pass_time()
        assert site.answering() == [Split(V3)] * 2

    run(follow)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointDamagedError("a byte changed"),
        ServingError("it fails on a first item"),
        RuntimeError("no memory"),
    ],
)
def test_a_version_that_one_replica_cannot_use_is_refused_by_all(tmp_path: Path, error: Exception) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="latest")
        site.replicas[1].failures[V2] = error
        commit(site.store, 2)
        await site.pass_time(20)
        assert site.answering() == [Split(V1)] * 2
        assert [replica.versions.loaded for replica in site.replicas] == [(V1,)] * 2
        assert site.controller.view()["refused"]["reason"] == str(error)
        assert len(site.replicas[1].loads) == 1, "it is not tried again and again"

    run(follow)


def test_a_manifest_that_was_changed_is_refused_before_a_replica_sees_it(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="latest")
        commit(site.store, 2)
        path = site.store.local_path(manifest_key(NAME, V2))
        assert path is not None
        path.chmod(0o600)
        path.write_bytes(path.read_bytes().replace(b'"step":2', b'"step":3'))
        await site.pass_time()
        assert site.answering() == [Split(V1)] * 2
        assert "was changed" in site.controller.view()["refused"]["reason"]

    run(follow)


def test_a_store_that_does_not_answer_is_no_refusal(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, follow="latest")
        for replica in site.replicas:
            replica.failures[V2] = StoreError("timed out")
        commit(site.store, 2)
        await site.pass_time()
        assert site.answering() == [Split(V1)] * 2
        assert site.controller.view()["refused"] is None
        for replica in site.replicas:
            replica.failures.clear()
        await site.pass_time()
        assert site.answering() == [Split(V2)] * 2

    run(follow)


def test_without_room_replicas_swap_one_after_the_other_and_hold_one_version(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, num_replicas=3, follow="latest")
        for replica in site.replicas:
            replica.room = "no memory"
        commit(site.store, 2)
        seen = set()
        for _ in range(20):
            await site.pass_time(1)
            seen.add(tuple(split.current if split else None for split in site.answering()))
        assert site.answering() == [Split(V2)] * 3
        assert [replica.most_held for replica in site.replicas] == [1] * 3
        assert (V2, V1, V1) in seen and (V2, V2, V1) in seen, "never two at once"

    run(follow)


def test_a_swap_in_place_that_fails_brings_the_old_version_back(tmp_path: Path) -> None:
    async def follow() -> None:
        site = Site(tmp_path, num_replicas=1, follow="latest")
        replica = site.replicas[0]
        replica.room, replica.failures[V2] = "no memory", ServingError("it fails")
        commit(site.store, 2)
        await site.pass_time(12)
        assert site.answering() == [Split(V1)]
        assert replica.loads == [(V2, True), (V1, False)]
        assert (await ask(replica.versions, "a")).version == V1
        assert site.controller.view()["refused"]["reason"] == "it fails"

    run(follow)


def test_a_replica_that_starts_later_or_again_begins_with_what_is_current(tmp_path: Path) -> None:
    async def grow() -> None:
        site = Site(tmp_path, follow="latest")
        commit(site.store, 2)
        await site.pass_time()
        late = Replica(site, "replica-late")
        assert (late.split, late.loads) == (Split(V2), [])
        site.replicas.append(late)
        commit(site.store, 3)
        await site.pass_time()
        assert site.answering() == [Split(V3)] * 3

    run(grow)


def test_a_replica_that_died_is_not_waited_for_and_its_word_is_removed(tmp_path: Path) -> None:
    async def die() -> None:
        site = Site(tmp_path, follow="latest")
        await site.pass_time(2)
        site.replicas.pop()
        commit(site.store, 2)
        await site.pass_time(25)
        assert site.answering() == [Split(V2)]
        assert [key for key in site.notes.values if "replicas" in key] == [
            f"rollout/server-1/{NAME}/replicas/replica-0"
        ]

    run(die)


def test_while_no_replica_runs_nothing_is_decided(tmp_path: Path) -> None:
    async def wake() -> None:
        site = Site(tmp_path, num_replicas=0, follow="latest")
        commit(site.store, 2)
        await site.pass_time(30)
        assert site.state().current == V1
        site.replicas.append(Replica(site, "woken"))
        await site.pass_time()
        assert site.answering() == [Split(V2)]

    run(wake)


def test_a_controller_that_starts_again_goes_on_where_it_was(tmp_path: Path) -> None:
    async def restart() -> None:
        site = Site(tmp_path)
        commit(site.store, 2)
        await site.pass_time(2)
        site.controller.canary("@latest", 30)
        for _ in range(4):
            site.controller = site.new_controller()
            await site.pass_time(1)
        assert site.answering() == [Split(V1, V2, 30)] * 2
        site.controller = site.new_controller()
        site.controller.promote()
        site.controller = site.new_controller()
        await site.pass_time(3)
        assert site.answering() == [Split(V2)] * 2
        assert [event.what for event in site.state().events] == ["canary", "current"]

    run(restart)


def test_a_canary_is_tried_split_promoted_and_the_followed_alias_goes_with_it(tmp_path: Path) -> None:
    async def canary() -> None:
        site = Site(tmp_path, follow="production")
        registry = Registry(site.store)
        registry.set_alias(NAME, "production", f"{NAME}@{V1}")
        commit(site.store, 2, chrf=1.0)
        assert site.controller.canary("latest", 25) == V2
        await site.pass_time(3)
        assert site.answering() == [Split(V1, V2, 25)] * 2
        site.controller.promote()
        await site.pass_time(3)
        assert site.answering() == [Split(V2)] * 2
        assert registry.resolve(f"{NAME}@production") == f"{NAME}@{V2}"
        assert registry.alias_history(NAME, "production")[-1].note == "promoted by eagleray serve promote"
        site.controller.roll_back()
        await site.pass_time(12)
        assert site.answering() == [Split(V1)] * 2
        assert registry.resolve(f"{NAME}@production") == f"{NAME}@{V1}"

    run(canary)


def test_a_version_that_was_rolled_back_is_not_followed_again(tmp_path: Path) -> None:
    async def back() -> None:
        site = Site(tmp_path, follow="latest")
        commit(site.store, 2)
        await site.pass_time()
        site.controller.roll_back()
        await site.pass_time(20)
        assert site.answering() == [Split(V1)] * 2
        commit(site.store, 3)
        await site.pass_time()
        assert site.answering() == [Split(V3)] * 2

    run(back)


def test_a_canary_that_fails_is_taken_back_and_no_request_is_lost(tmp_path: Path) -> None:
    async def fail() -> None:
        site = Site(tmp_path, num_replicas=1)
        commit(site.store, 2)
        replica = site.replicas[0]
        site.controller.canary(f"{NAME}@{V2}", 50)
        await site.pass_time(3)
        loaded = replica.versions.get(V2)
        assert isinstance(loaded, FakeLoaded)
        loaded._fault = lambda: Answers(V2, [ItemFailure("model_failed", "out of order")])
        answers = [await ask(replica.versions, f"r{number}") for number in range(40)]
        assert {answer.version for answer in answers} == {V1}
        await site.pass_time(3)
        assert site.answering() == [Split(V1)]
        assert replica.versions.loaded == (V1,)
        assert "requests failed" in site.controller.view()["refused"]["reason"]
        assert loaded.closed

    run(fail)


def test_commands_about_what_is_not_there_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for ref, error, message in (
        ("other@latest", UsageError, "'other@latest' is not a version of en-fr"),
        ("@r9-step-00000001", NotFoundError, "en-fr has no version r9-step-00000001"),
        ("@nobody", NotFoundError, "en-fr has no alias nobody"),
    ):
        with pytest.raises(error, match=message):
            site.controller.canary(ref, 10)


def test_what_is_served_outlives_retention(tmp_path: Path) -> None:
    async def retain() -> None:
        site = Site(tmp_path, follow="latest")
        await site.pass_time(1)
        for step in (2, 3, 4):
            commit(site.store, step)
        deleted = Registry(site.store).apply_retention(NAME, 1)
        assert deleted == [f"{NAME}@{V2}", f"{NAME}@{V3}"]
        await site.pass_time()
        assert site.answering() == [Split("r1-step-00000004")] * 2

    run(retain)


def test_best_is_watched_with_few_requests_and_skips_what_was_deleted(tmp_path: Path) -> None:
    site = Site(tmp_path)
    commit(site.store, 2, chrf=60.0)
    commit(site.store, 3, chrf=55.0)
    watch = Watch(site.store, NAME, "best")
    assert watch.look() == V2
    requests = count_requests(site)
    assert watch.look() == V2
    assert requests == ["children", "size"]
    site.store.delete(manifest_key(NAME, V2))
    assert watch.look() == V3


def count_requests(site: Site) -> list[str]:
    """Note each request that the site's store makes from now on."""
    made: list[str] = []
    for name in ("get", "size", "list", "children"):
        method = getattr(site.store, name)

        def noting(*args: Any, name: str = name, method: Any = method) -> Any:
            made.append(name)
            return method(*args)

        setattr(site.store, name, noting)
    return made
