"""Damage is named, and nothing that the manifest does not name is opened."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from versions_made import NAME, commit, tensors

from eagleray.errors import CheckpointDamagedError, StoreError
from eagleray.store.checkpoint import Checkpoint, ProblemKind
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def checkpoint(local_store: ObjectStore) -> Checkpoint:
    return Registry(local_store).open(commit(local_store, 1))


def file_of(checkpoint: Checkpoint, name: str) -> Path:
    entry = next(entry for entry in checkpoint.manifest.files if entry.name == name)
    path = checkpoint.store.local_path(f"{checkpoint.base}/{entry.path}")
    assert path is not None
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "name", ["model-00000.safetensors", "optim-00000.safetensors", "state.json", "config.json"]
)
@pytest.mark.parametrize(
    "damage, kind", [(flip, ProblemKind.CHANGED), (cut, ProblemKind.TRUNCATED), (Path.unlink, ProblemKind.MISSING)]
)
def test_verify_names_the_file_and_what_is_wrong(
    checkpoint: Checkpoint, name: str, damage: Callable[[Path], object], kind: ProblemKind
) -> None:
    assert checkpoint.verify() == []
    damage(file_of(checkpoint, name))
    (problem,) = checkpoint.verify()
    assert (problem.kind, problem.is_damage) == (kind, True)
    assert problem.key.endswith(f"/{name}") and problem.key in problem.message


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_weights_are_refused_before_they_are_used(
    checkpoint: Checkpoint, damage: Callable[[Path], object]
) -> None:
    damage(file_of(checkpoint, "model-00000.safetensors"))
    target = {"model.weight": torch.zeros(4, 3), "model.bias": torch.zeros(2).bfloat16()}
    for read in (checkpoint.tensors, lambda: checkpoint.load_into(target)):
        with pytest.raises(CheckpointDamagedError, match=r"model-00000\.safetensors") as error:
            read()
        assert error.value.exit_code == 1


def test_a_damaged_header_is_named_by_verify(checkpoint: Checkpoint) -> None:
    path = file_of(checkpoint, "model-00000.safetensors")
    path.write_bytes(path.read_bytes().replace(b"model.weight", b"model.weighs"))
    (problem,) = checkpoint.verify()
    assert problem.kind is ProblemKind.CHANGED


def test_an_extra_pickle_lies_there_unopened_and_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    extra = file_of(checkpoint, "state.json").with_name("model.pkl")
    extra.write_bytes(pickle.dumps(Evil(mark)))
    opened: list[str] = []
    is_watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    checkpoint.tensors()
    checkpoint.files()
    problems = checkpoint.verify()
    is_watching = False
    assert [(problem.kind, problem.is_damage) for problem in problems] == [(ProblemKind.UNNAMED, False)]
    assert problems[0].key.endswith("/model.pkl")
    assert not mark.exists() and not any("model.pkl" in path for path in opened)


def test_a_manifest_of_another_version_is_refused(local_store: ObjectStore) -> None:
    commit(local_store, 1)
    data = local_store.get(f"models/{NAME}/r1-step-00000001/manifest.json")
    local_store.put(f"models/{NAME}/r1-step-00000002/manifest.json", data)
    with pytest.raises(CheckpointDamagedError, match="is the manifest of en-fr@r1-step-00000001"):
        Registry(local_store).open(f"{NAME}@r1-step-00000002")


def test_a_manifest_that_leaves_the_version_is_refused(checkpoint: Checkpoint) -> None:
    key = f"{checkpoint.base}/manifest.json"
    for path in ("../../secret.json", "/etc/passwd", "a/../../b", "manifest.json", "a/b/c"):
        entry = checkpoint.manifest.files[0].model_copy(update={"path": path})
        changed = checkpoint.manifest.model_copy(update={"files": (*checkpoint.manifest.files, entry)})
        checkpoint.store.put(key, changed.to_bytes())
        with pytest.raises(CheckpointDamagedError, match="is not a manifest"):
            Registry(checkpoint.store).open(checkpoint.ref)


def test_tensors_of_another_model_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(StoreError, match=r"has no tensor model\.other"):
        checkpoint.load_into({"model.other": torch.zeros(1)})
    with pytest.raises(StoreError, match=r"model\.weight has shape \(3, 4\), in .* it has \(4, 3\)"):
        checkpoint.load_into({"model.weight": torch.zeros(3, 4)})


def test_a_part_is_loaded_in_place_and_counted(checkpoint: Checkpoint) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    assert checkpoint.load_into({"model.weight": weight}) == 48
    assert torch.equal(weight.detach(), tensors()["model.weight"])
