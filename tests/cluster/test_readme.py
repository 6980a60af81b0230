"""The README's tour, run as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tour() -> list[str]:
    """Return the README's blocks of commands, in their order."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(600)
def test_the_tour_runs_as_it_is_printed(tmp_path: Path, ray_environment: dict[str, str]) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"EAGLERAY_HOME": str(tmp_path / "home")}
    script = tmp_path / "tour.sh"
    script.write_text("set -euxo pipefail\n" + "\n".join(tour()))
    log = tmp_path / "tour.log"
    with log.open("w") as output:
        done = subprocess.run(
            ["bash", str(script)],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=540,
        )
    said = log.read_text()
    assert done.returncode == 0, said[-4000:]
    assert len(tour()) == 7
    assert "tour@r1-step-00000200 is whole" in said
    answers = [line.split("\t") for line in (tmp_path / "answers.txt").read_text().splitlines()]
    assert answers == [["fr"], ["de"]]
    assert re.search(r'"model":"tour","version":"r1-step-00000200","predictions":\[\{"label":"de"', said)
    assert "'label': 'de'" in said
