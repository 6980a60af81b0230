"""Credentials of an object store: from the environment or the AWS files, into no message and no record."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def aws_options(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment leaves out and the files under `~/.aws` have: obstore reads the environment itself.

    Args:
        environment: Variables; `AWS_PROFILE`, `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE` count.
    """
    options: dict[str, str] = {}
    profile = environment.get("AWS_PROFILE", "default")
    if "AWS_ACCESS_KEY_ID" not in environment:
        path = environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
        section = _section(path, profile)
        options |= {ours: section[theirs] for theirs, ours in _KEYS.items() if theirs in section}
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environment.keys():
        name = profile if profile == "default" else f"profile {profile}"
        region = _section(environment.get("AWS_CONFIG_FILE", "~/.aws/config"), name).get("region")
        options |= {"region": region} if region else {}
    return options


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Blank the credentials that a server may have echoed."""
    secrets = [environment.get(name, "") for name in _SECRET_VARIABLES]
    secrets += [value for key, value in aws_options(environment).items() if key != "region"]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def _section(path: str, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(Path(path).expanduser())
    except configparser.Error:
        return {}
    return dict(parser[name]) if parser.has_section(name) else {}
