"""API keys: a file of their hashes, what each may do, and a ring that follows the file while the server runs.

A key is 256 random bits, so its plain SHA-256 tells nothing about it and can be looked up like any word: no two
keys share a prefix of their hashes that a clock could tell.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from eagleray.errors import ServingError, UsageError

logger = logging.getLogger(__name__)

PREFIX = "er_"
SECRET_BYTES = 32
VERBS = ("translate", "classify", "predict")
ADMIN, METRICS = "admin", "metrics"
_SCOPE = re.compile(rf"(?:{'|'.join(VERBS)})(?:/[a-z0-9][a-z0-9._-]{{0,127}})?|{ADMIN}|{METRICS}")


class ApiKey(BaseModel):
    """One key, without the key: what a server knows of it.

    Attributes:
        name: What logs call it.
        sha256: Hash of the key, in hexadecimal digits.
        scopes: What it may do: a verb (`translate`), a verb of one model (`translate/en-fr`), `metrics`, or
            `admin`, which is all of it and the control of versions.
        tokens_per_s: Tokens of input a second, over all replicas of a model; None: as many as there is room for.
        created: When it was made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: tuple[str, ...]
    tokens_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    created: datetime

    @field_validator("scopes")
    @classmethod
    def _known(cls, scopes: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [scope for scope in scopes if not _SCOPE.fullmatch(scope)]
        if unknown or not scopes:
            raise ValueError(f"not a scope: {', '.join(map(repr, unknown)) or 'none is given'}")
        return scopes

    def may(self, scope: str) -> bool:
        """Whether it may do something: `translate/en-fr`, `metrics`, `admin`."""
        return ADMIN in self.scopes or scope in self.scopes or scope.partition("/")[0] in self.scopes


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def new_key(name: str, scopes: Iterable[str], tokens_per_s: float | None = None) -> tuple[str, ApiKey]:
    """Make a key; returns it, for the only time, and what is kept of it.

    Raises:
        UsageError: The name, a scope or the rate is none.
    """
    key = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    return key, _described(name, key, scopes, tokens_per_s)


def keys_of(text: str) -> tuple[ApiKey, ...]:
    """Read keys as the environment gives them: `name=key` or `name=key:scope,scope`, separated by blanks.

    Raises:
        UsageError: A part is not of this form; no message repeats a key.
    """
    found = []
    for number, part in enumerate(text.split(), 1):
        name, _, rest = part.partition("=")
        key, _, scopes = rest.partition(":")
        if len(key) < SECRET_BYTES:
            raise UsageError(
                f"key {number} of the environment is not NAME=KEY with {SECRET_BYTES} characters of key or more",
                "make one with: eagleray keys add NAME",
            )
        found.append(_described(name, key, scopes.split(",") if scopes else VERBS))
    return _distinct(found)


def digest(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The file of the hashes; readable and writable by its owner alone.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[ApiKey, ...]:
        """Return its keys.

        Raises:
            ServingError: It cannot be read, others may write it, or it holds something else.
        """
        try:
            if self.path.stat().st_mode & 0o022:
                raise ServingError(
                    f"{self.path} can be written by others than its owner", f"chmod 600 {self.path}"
                )
            return _Document.model_validate_json(self.path.read_bytes()).keys
        except OSError as error:
            raise ServingError(
                f"the keys in {self.path} cannot be read: {error.strerror}",
                "make one with: eagleray keys add NAME",
            ) from None
        except ValidationError as error:
            where = error.errors(include_input=False, include_url=False)[0]
            raise ServingError(
                f"{self.path} is not a file of keys: {'.'.join(map(str, where['loc']))}: {where['msg']}",
                "write it with: eagleray keys add NAME",
            ) from None

    def add(self, key: ApiKey) -> None:
        """Add a key.

        Raises:
            UsageError: There is one of this name.
            ServingError: The file is there and cannot be read.
        """
        with self._locked():
            self._write(_distinct([*self._present(), key]))

    def remove(self, name: str) -> None:
        """Remove a key; servers that follow the file refuse it within seconds.

        Raises:
            UsageError: There is none of this name.
            ServingError: The file cannot be read.
        """
        with self._locked():
            keys = self.read()
            if name not in {key.name for key in keys}:
                listed = ", ".join(key.name for key in keys) or "none"
                raise UsageError(f"there is no key named {name!r} in {self.path}", f"there are: {listed}")
            self._write([key for key in keys if key.name != name])

    def write(self, keys: Iterable[ApiKey]) -> None:
        """Write the keys, whatever the file held."""
        with self._locked():
            self._write(keys)

    def _present(self) -> tuple[ApiKey, ...]:
        return self.read() if self.path.exists() else ()

    def _write(self, keys: Iterable[ApiKey]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            os.fchmod(descriptor, 0o600)
            stream.write(_Document(keys=tuple(keys)).model_dump_json(indent=2) + "\n")
            stream.flush()
            os.fsync(descriptor)
        temporary.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class KeyRing:
    """The keys of a running server.

    Args:
        file: Where they are; None: nobody is asked for a key.
        owner_sha256: Hash of one more key, that of the server's owner, for everything.

    Raises:
        ServingError: The file cannot be read.
    """

    def __init__(self, file: KeyFile | None = None, owner_sha256: str | None = None) -> None:
        self._file = file
        self._owner = () if owner_sha256 is None else (_owner(owner_sha256),)
        self._keys: Mapping[str, ApiKey] = {}
        self._names: Mapping[str, ApiKey] = {}
        self._seen: tuple[int, int, int] | None = None
        if file is not None:
            self._take(file.read())
            self._seen = self._look()

    @property
    def is_asked(self) -> bool:
        """Whether a request needs a key."""
        return self._file is not None

    def find(self, key: str) -> ApiKey | None:
        """Return what a key may do, or None where it is none of ours."""
        return self._keys.get(digest(key))

    def named(self, name: str | None) -> ApiKey | None:
        """Return the key that a request came with elsewhere."""
        return None if name is None else self._names.get(name)

    def follow(self) -> None:
        """Read the file again if it has changed; a file that is gone holds no key.

        Not on the event loop: a file on a slow disk must not hold requests up.
        """
        if self._file is None:
            return
        seen = self._look()
        if seen == self._seen:
            return
        try:
            self._take(() if seen is None else self._file.read())
        except ServingError as error:
            # The keys that were good stay good: half a file must not lock everybody out.
            logger.error("%s; the keys of before go on", error.message)
        self._seen = seen

    def _take(self, keys: Iterable[ApiKey]) -> None:
        found = (*keys, *self._owner)
        self._keys = {key.sha256: key for key in found}
        self._names = {key.name: key for key in found}

    def _look(self) -> tuple[int, int, int] | None:
        assert self._file is not None
        try:
            found = self._file.path.stat()
        except FileNotFoundError:
            return None
        except OSError:
            return self._seen  # a disk that does not answer for a while
        return found.st_mtime_ns, found.st_ino, found.st_size


def _owner(sha256: str) -> ApiKey:
    return ApiKey(name="owner", sha256=sha256, scopes=(ADMIN,), created=datetime.now(UTC))


def _described(name: str, key: str, scopes: Iterable[str], tokens_per_s: float | None = None) -> ApiKey:
    try:
        return ApiKey(
            name=name,
            sha256=digest(key),
            scopes=tuple(scopes),
            tokens_per_s=tokens_per_s,
            created=datetime.now(UTC).replace(microsecond=0),
        )
    except ValidationError as error:
        where = error.errors(include_input=False, include_url=False)[0]
        raise UsageError(
            f"this cannot be a key: {'.'.join(map(str, where['loc']))}: {where['msg']}",
            f"scopes are {', '.join(VERBS)}, each also with a model as in translate/en-fr, {METRICS} and {ADMIN}; "
            "a name is letters, digits, dots, dashes and underscores",
        ) from None


def _distinct(keys: Iterable[ApiKey]) -> tuple[ApiKey, ...]:
    found: dict[str, ApiKey] = {}
    for key in keys:
        if key.name in found:
            raise UsageError(
                f"there is a key named {key.name!r} already", "choose another name, or remove it first"
            )
        found[key.name] = key
    return tuple(found.values())
