"""`eagleray models import` and `export`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_distilbert

from eagleray.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, dict[str, object]]:
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), "--json"])
    return end.value.code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_directory_is_imported_listed_and_exported_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, ours = tmp_path / "store", save_distilbert(tmp_path / "theirs", ["no", "yes"])
    assert run(capsys, "models", "import", ours, "mood", "--store", store) == (
        0,
        {"ref": "mood@r1-step-00000000", "store": str(store)},
    )
    status, report = run(capsys, "models", "export", "mood", tmp_path / "out", "--store", store)
    assert (status, report["directory"]) == (0, str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    status, said = run(capsys, "models", "export", "mood", tmp_path / "out", "--store", store)
    assert status == 2
    assert said["error"]["code"] == "usage"  # type: ignore[index]
