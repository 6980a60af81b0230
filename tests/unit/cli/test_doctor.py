"""Each look at the machine, and what is said when it fails."""

from __future__ import annotations

import socket
from pathlib import Path

from eagleray.doctor import Finding, check_packages, check_port, check_shared_memory, check_store, examine
from eagleray.errors import StoreError


def test_a_package_that_is_missing_or_too_old_is_named() -> None:
    found = check_packages(["no-such-package>=1", "pydantic>=99", "pytest>=1 ; extra == 'dev'"])
    assert found.status == "failed"
    assert "no-such-package is missing; pydantic " in found.found
    assert found.found.endswith("does not fit >=99")
    assert found.hint == "Run `pip install --upgrade eagleray`."
    assert check_packages(["pydantic>=2"]).status == "ok"


def test_a_taken_port_is_a_warning() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = check_port(port)
    assert found.status == "warning"
    assert found.found == f"127.0.0.1:{port} is taken: Address already in use"
    assert check_port(port).status == "ok"


def test_a_store_is_written_read_and_asked_to_overwrite_and_left_empty(tmp_path: Path) -> None:
    found = check_store(str(tmp_path / "store"))
    assert found.status == "ok", found
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_system_without_shared_memory_is_no_problem(tmp_path: Path) -> None:
    assert check_shared_memory(tmp_path / "none").status == "ok"


def test_a_look_that_raises_is_a_failed_one_and_the_others_go_on() -> None:
    def broken() -> Finding:
        raise OSError("no such library")

    def refused() -> Finding:
        raise StoreError("the store refused", "Do this.")

    found = dict(examine({"a": broken, "b": refused, "c": lambda: Finding("ok", "fine")}))
    assert found == {
        "a": Finding("failed", "OSError: no such library"),
        "b": Finding("failed", "the store refused", "Do this."),
        "c": Finding("ok", "fine"),
    }
