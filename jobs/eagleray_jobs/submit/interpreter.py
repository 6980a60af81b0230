"""Tell a job's shell which Python the cluster runs on.

Ray starts a job's command in a shell whose PATH may lead to another Python than its own (a cluster that was
started as `/opt/venv/bin/ray start`, without activating the environment). The process that starts the shell is a
Ray worker, so that it can run this and hand the answer down. Every worker of a job imports it: keep it light.
"""

from __future__ import annotations

import os
import sys

PYTHON_VARIABLE = "EAGLERAY_PYTHON"


def remember_python() -> None:
    """Put the path of this interpreter into the environment that child processes inherit."""
    os.environ[PYTHON_VARIABLE] = sys.executable
