"""The verbs of this package."""

from __future__ import annotations

import typer

from eagleray_jobs import model_commands
from eagleray_jobs.answering import evaluate, predict
from eagleray_jobs.submit import commands as submit
from eagleray_jobs.train.command import train
from eagleray_jobs.verify.command import verify


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the command line."""
    app.command()(train)
    app.command()(verify)
    app.command()(evaluate)
    app.command()(predict)
    model_commands.register(app)
    submit.register(app)
