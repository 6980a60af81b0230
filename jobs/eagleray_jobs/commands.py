"""The verbs of this package."""

from __future__ import annotations

import typer

from eagleray_jobs import model_commands
from eagleray_jobs.submit import commands as submit


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    model_commands.register(app)
    submit.register(app)
