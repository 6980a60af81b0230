"""Where a store is, and what may be called what. Nothing here opens a file or a socket."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagleray.config.schema import NAME_PATTERN
from eagleray.errors import StoreURIError, UsageError

Scheme = Literal["file", "s3", "gs"]

MAX_LOCATION_CHARACTERS = 1024
_NAME = re.compile(NAME_PATTERN)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
_SEGMENT = re.compile(r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]{0,254}")
_HINT = "A store is a directory, s3://bucket/prefix or gs://bucket/prefix."


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """A checked store location.

    Attributes:
        scheme: `file` for a directory, else the kind of object store.
        bucket: The bucket of an object store; empty for a directory.
        prefix: Keys of an object store begin with it; empty for a directory or a whole bucket.
        path: The directory, absolute; None for an object store.
        is_relative: The directory was given relative to the working directory, so that another process, on
            another machine, may see another one.
    """

    scheme: Scheme
    bucket: str = ""
    prefix: str = ""
    path: Path | None = None
    is_relative: bool = False

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def parse_store_uri(text: str) -> StoreLocation:
    """Parse a store location.

    Args:
        text: A directory (relative, absolute or under `~/`), `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        StoreURIError: Another scheme, credentials, a query, or characters that no location needs.
    """
    _refuse_hostile(text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return _parse_directory(text)
    if scheme == "s3":
        return _parse_bucket(text, "s3", rest)
    if scheme == "gs":
        return _parse_bucket(text, "gs", rest)
    raise _refused(text, f"the scheme {scheme!r} is not supported")


def validate_name(text: str) -> str:
    """Return the name of a model if it may be one.

    Raises:
        UsageError: The name does not match `[a-z0-9][a-z0-9._-]{0,127}`.
    """
    if not isinstance(text, str) or _NAME.fullmatch(text) is None:
        raise UsageError(
            f"{_shorten(text)} is not a model name",
            hint="Small letters, digits, `.`, `_` and `-`; at most 128; the first is a letter or a digit.",
        )
    return text


def validate_key(key: str) -> str:
    """Return the key of an object if it may be one: segments of safe characters, none of them hidden or `..`.

    Raises:
        StoreURIError: The key could leave the store, or does not have one meaning everywhere.
    """
    if not isinstance(key, str) or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise StoreURIError(f"{_shorten(key)} is not a key of the store")
    return key


def _refuse_hostile(text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise _refused(text, "it is empty")
    if len(text) > MAX_LOCATION_CHARACTERS:
        raise _refused(text, f"it has {len(text)} characters, the limit is {MAX_LOCATION_CHARACTERS}")
    if text != text.strip():
        raise _refused(text, "it begins or ends with white space")
    if not text.isprintable():
        raise _refused(text, "it holds a character that cannot be printed")
    for part, reason in (
        ("?", "it holds a query"),
        ("#", "it holds a fragment"),
        ("::", "chained locations are not supported"),
        ("\\", "it holds a backslash"),
        ("$", "variables are not expanded"),
        ("%", "percent-encoding is not decoded"),
        ("*", "it holds a wildcard"),
    ):
        if part in text:
            raise _refused(text, reason)


def _parse_directory(text: str) -> StoreLocation:
    if text.startswith("//"):
        raise _refused(text, "it begins with `//`")
    if text.startswith("-"):
        raise _refused(text, "it looks like an option")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        raise _refused(text, "it looks like a location with a scheme")
    if text.startswith("~") and not (text == "~" or text.startswith("~/")):
        raise _refused(text, "another user's home is not looked up")
    path = Path(text).expanduser()
    return StoreLocation("file", path=Path(path.absolute()), is_relative=not path.is_absolute())


def _parse_bucket(text: str, scheme: Literal["s3", "gs"], rest: str) -> StoreLocation:
    bucket, _, prefix = rest.partition("/")
    if "@" in bucket:
        raise StoreURIError(
            f"a {scheme}:// store location holds credentials or a user",
            hint="Credentials come from the environment or from files, never from the location.",
        )
    if _BUCKET.fullmatch(bucket) is None or ".." in bucket or _IP_ADDRESS.fullmatch(bucket):
        raise _refused(text, f"{bucket!r} is not the name of a bucket")
    prefix = prefix.removesuffix("/")
    if prefix and not all(_SEGMENT.fullmatch(segment) for segment in prefix.split("/")):
        raise _refused(text, f"the prefix {prefix!r} holds an empty, hidden or unsafe segment")
    return StoreLocation(scheme, bucket=bucket, prefix=prefix)


def _refused(text: object, reason: str) -> StoreURIError:
    return StoreURIError(f"{_shorten(text)} is not a store location: {reason}", hint=_HINT)


def _shorten(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
