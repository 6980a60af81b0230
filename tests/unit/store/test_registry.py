"""References, aliases, retention, deletion and the sweep."""

from __future__ import annotations

import os

import pytest
from versions_made import NAME, commit, config, owned_run, save

from eagleray.errors import CheckpointDamagedError, EaglerayError, NotFoundError, UsageError
from eagleray.store.claim import RunClaim, claim_run
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry, VersionInfo, best_version, expendable_versions
from eagleray.store.sweep import sweep


def info(
    step: int, *, run: int = 1, by: tuple[str, bool] | None = ("bleu", True), **changes: object
) -> VersionInfo:
    bleu = changes.pop("bleu", None)
    metrics = {} if bleu is None else {"bleu": bleu}
    return VersionInfo(NAME, f"r{run}-step-{step:08d}", run, step, metrics=metrics, best_metric=by, **changes)  # type: ignore[arg-type]


@pytest.fixture
def registry(store: ObjectStore) -> Registry:
    commit(store, 5, run=1, bleu=20.0)
    commit(store, 10, run=1, bleu=30.0)
    commit(store, 5, run=2, bleu=25.0)
    return Registry(store)


def test_every_form_of_a_reference(registry: Registry) -> None:
    registry.set_alias(NAME, "production", f"{NAME}@r1-step-00000005")
    forms = {
        NAME: "r1-step-00000010",
        f"{NAME}@best": "r1-step-00000010",
        f"{NAME}@latest": "r2-step-00000005",
        f"{NAME}@step-5": "r2-step-00000005",
        f"{NAME}@r1-step-00000005": "r1-step-00000005",
        f"{NAME}@production": "r1-step-00000005",
    }
    for ref, version in forms.items():
        assert registry.resolve(ref) == f"{NAME}@{version}"
        assert registry.open(ref).ref == f"{NAME}@{version}"
    assert registry.names() == [NAME]


def test_a_name_without_scores_means_the_latest(local_store: ObjectStore) -> None:
    commit(local_store, 5)
    commit(local_store, 10)
    assert Registry(local_store).resolve(NAME) == f"{NAME}@r1-step-00000010"
    with pytest.raises(NotFoundError, match="en-fr has no version with a score"):
        Registry(local_store).resolve(f"{NAME}@best")


@pytest.mark.parametrize(
    "ref, error, message",
    [
        ("nothing", NotFoundError, "nothing has no committed version"),
        (f"{NAME}@latest", NotFoundError, "has no committed version"),
        (f"{NAME}@step-7", NotFoundError, "has no version of step 7"),
        (f"{NAME}@r1-step-00000007", NotFoundError, "has no version r1-step-00000007"),
        (f"{NAME}@production", NotFoundError, "has no alias production"),
        (f"{NAME}@", UsageError, "is not a reference"),
        (f"{NAME}@r1-step-7", UsageError, "is not an alias"),
        (f"{NAME}@a@b", UsageError, "is not an alias"),
        ("../x@latest", UsageError, "is not a model name"),
        (f"{NAME}@../x", UsageError, "is not an alias"),
    ],
)
def test_a_reference_to_nothing_says_so(
    local_store: ObjectStore, ref: str, error: type[EaglerayError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Registry(local_store).open(ref)


def test_a_reference_to_nothing_names_what_there_is(local_store: ObjectStore) -> None:
    commit(local_store, 5)
    with pytest.raises(NotFoundError, match="Its newest versions: r1-step-00000005"):
        Registry(local_store).open(f"{NAME}@r9-step-00000005")


def test_versions_are_listed_newest_last_with_their_aliases(registry: Registry) -> None:
    registry.set_alias(NAME, "production", f"{NAME}@best")
    versions = registry.versions(NAME)
    assert [(version.run, version.step) for version in versions] == [(1, 5), (1, 10), (2, 5)]
    assert [version.aliases for version in versions] == [(), ("production",), ()]
    assert versions[1].metrics == {"bleu": 30.0} and versions[1].size_bytes > 0


def test_a_torn_save_is_not_listed(local_store: ObjectStore) -> None:
    commit(local_store, 5)
    local_store.put(f"models/{NAME}/r1-step-00000009/a-1/model-00000.safetensors", b"torn")
    assert [version.step for version in Registry(local_store).versions(NAME)] == [5]
    assert Registry(local_store).resolve(f"{NAME}@latest") == f"{NAME}@r1-step-00000005"


@pytest.mark.parametrize(
    "versions, best_step",
    [
        ([info(1, bleu=3.0), info(2, bleu=5.0), info(3, bleu=4.0)], 2),
        ([info(1, bleu=5.0), info(2, bleu=5.0), info(3)], 2),
        ([info(1, bleu=3.0, by=("bleu", False)), info(2, bleu=5.0, by=("bleu", False))], 1),
        ([info(1, bleu=-3.0), info(2, bleu=-5.0)], 1),
        ([info(1), info(2)], None),
        ([info(1, bleu=3.0, by=None)], None),
        ([], None),
    ],
)
def test_the_best_version_is_that_of_the_best_score(versions: list[VersionInfo], best_step: int | None) -> None:
    best = best_version(versions)
    assert (best.step if best else None) == best_step


def test_retention_keeps_the_newest_the_best_the_aliased_and_the_damaged() -> None:
    versions = [
        info(1, bleu=1.0),
        info(2, bleu=9.0),
        info(3, bleu=2.0, aliases=("production",)),
        info(4, problem="changed"),
        info(5, bleu=3.0),
        info(6, bleu=4.0),
        info(7, bleu=5.0),
    ]
    assert [version.step for version in expendable_versions(versions, 2)] == [1, 5]
    assert [version.step for version in expendable_versions(versions, 7)] == []
    with pytest.raises(EaglerayError, match="at least one version must stay"):
        expendable_versions(versions, 0)


def test_retention_deletes_and_reports(store: ObjectStore) -> None:
    for step, bleu in enumerate([9.0, 1.0, 2.0, 3.0, 4.0]):
        commit(store, step, bleu=bleu)
    registry = Registry(store)
    registry.set_alias(NAME, "production", f"{NAME}@step-2")
    deleted = registry.apply_retention(NAME, 1, metric="bleu", greater_is_better=True)
    assert deleted == [f"{NAME}@r1-step-00000001", f"{NAME}@r1-step-00000003"]
    assert [version.step for version in registry.versions(NAME)] == [0, 2, 4]


def test_an_alias_has_a_history_and_goes_back(store: ObjectStore) -> None:
    first, second = commit(store, 1), commit(store, 2)
    registry = Registry(store)
    registry.set_alias(NAME, "production", first, note="first")
    registry.set_alias(NAME, "production", second)
    registry.set_alias(NAME, "production", second)
    assert registry.resolve(f"{NAME}@production") == second
    registry.rollback(NAME, "production")
    assert registry.resolve(f"{NAME}@production") == first
    history = registry.alias_history(NAME, "production")
    assert [record.sequence for record in history] == [1, 2, 3, 4]
    assert [record.version for record in history] == [ref.split("@")[1] for ref in (first, second, second, first)]
    assert [record.note for record in history] == ["first", "", "", "rollback"]


def test_a_rollback_without_a_past_is_refused(local_store: ObjectStore) -> None:
    registry = Registry(local_store)
    registry.set_alias(NAME, "production", commit(local_store, 1))
    with pytest.raises(NotFoundError, match="no earlier version"):
        registry.rollback(NAME, "production")


def test_a_removed_alias_stands_for_nothing_and_keeps_its_history(local_store: ObjectStore) -> None:
    registry = Registry(local_store)
    registry.set_alias(NAME, "production", commit(local_store, 1))
    registry.remove_alias(NAME, "production")
    with pytest.raises(NotFoundError, match="has no alias production"):
        registry.open(f"{NAME}@production")
    assert len(registry.alias_history(NAME, "production")) == 2


@pytest.mark.parametrize("alias", ["", "latest", "best", "step-5", "r1-step-00000005", "Prod", "a/b", "..", "1st"])
def test_words_that_are_no_alias_are_refused(local_store: ObjectStore, alias: str) -> None:
    ref = commit(local_store, 1)
    with pytest.raises(UsageError, match="is not an alias"):
        Registry(local_store).set_alias(NAME, alias, ref)


def test_an_alias_means_the_bytes_it_was_set_to(local_store: ObjectStore) -> None:
    registry = Registry(local_store)
    ref = commit(local_store, 1)
    registry.set_alias(NAME, "production", ref)
    version = ref.split("@")[1]
    local_store.delete(f"models/{NAME}/{version}/manifest.json")
    assert commit(local_store, 1) == ref
    registry.open(ref)
    with pytest.raises(CheckpointDamagedError, match="is not the manifest that en-fr@production was set to"):
        registry.open(f"{NAME}@production")


def test_an_aliased_version_is_not_deleted(local_store: ObjectStore) -> None:
    registry = Registry(local_store)
    ref = commit(local_store, 1)
    registry.set_alias(NAME, "production", ref)
    with pytest.raises(UsageError, match="has the alias production"):
        registry.delete(ref)


def test_a_deleted_version_is_gone_at_once_and_its_files_after_a_while(store: ObjectStore) -> None:
    registry = Registry(store)
    ref, kept = commit(store, 1), commit(store, 2)
    base = registry.open(ref).base
    registry.delete(ref)
    with pytest.raises(NotFoundError):
        registry.open(ref)
    assert sweep(store) == []
    assert list(store.list(base))
    swept = sweep(store, grace_s=-5)
    assert {item.reason for item in swept} == {"the version was deleted"}
    assert not list(store.list(base)) and not list(store.list(f"models/{NAME}/deleted"))
    assert registry.open(kept).verify() == []


def test_the_sweep_removes_what_no_manifest_names_and_no_live_run_owns(local_store: ObjectStore) -> None:
    ref = commit(local_store, 1)
    base = Registry(local_store).open(ref).base
    torn = [f"{base}/a-9/model-00000.safetensors", f"models/{NAME}/r1-step-00000009/a-1/state.json"]
    for key in torn:
        local_store.put(key, b"torn")
    staging = local_store.local_path(f"{base}/a-9/optim.safetensors")
    assert staging is not None
    staging.with_name("optim.safetensors#123").write_bytes(b"staged")
    assert sweep(local_store) == []
    preview = sweep(local_store, grace_s=-5, dry_run=True)
    swept = sweep(local_store, grace_s=-5)
    assert swept == preview
    assert [item.key for item in swept] == [*torn, f"{base}/a-9/optim.safetensors#123"]
    assert sum(item.size_bytes for item in swept) == 14
    assert Registry(local_store).open(ref).verify() == []


def test_the_sweep_leaves_a_live_run_alone(local_store: ObjectStore) -> None:
    claimed = claim_run(local_store, config(), notify=lambda _: None)
    assert isinstance(claimed, RunClaim)
    key = f"models/{NAME}/r1-step-00000009/a-1/state.json"
    with claimed:
        local_store.put(key, b"being written for a long time")
        path = local_store.local_path(key)
        assert path is not None
        os.utime(path, (0, 0))
        assert sweep(local_store) == []
    assert [item.key for item in sweep(local_store)] == [key]


def test_a_version_with_a_damaged_manifest_is_listed_and_left_alone(local_store: ObjectStore) -> None:
    commit(local_store, 1, bleu=1.0)
    owned_run(local_store)
    key = f"models/{NAME}/r1-step-00000001/manifest.json"
    local_store.put(key, local_store.get(key)[:-1])
    (version,) = Registry(local_store).versions(NAME)
    assert version.problem is not None and key in version.problem
    assert sweep(local_store, grace_s=-5) == []
    with pytest.raises(CheckpointDamagedError, match=key):
        Registry(local_store).open(NAME)


def test_a_step_is_committed_once(local_store: ObjectStore) -> None:
    first = save(local_store, 1, bleu=1.0)
    again = save(local_store, 1, bleu=2.0)
    assert first.ref == again.ref
    assert Registry(local_store).open(NAME).manifest.metrics == {"bleu": 1.0}
