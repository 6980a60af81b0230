"""Read YAML into plain values that know their lines.

Scalars follow YAML 1.2's core schema, not PyYAML's YAML 1.1: `2e-3` is a number, and `no`, `on` and `off` are
words (`no` is a language). The document is built from parser events, because that is where duplicate keys,
exploding anchors and foreign tags can be refused before they cost anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 1024 * 1024
MAX_NODES = 100_000
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]

_TAG_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_TAG_PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map")} | {"!"}
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


class DocumentError(Exception):
    """The text is not a document we accept.

    Args:
        message: What is wrong.
        line: Where, counted from 1; None when it concerns the whole file.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message, line)
        self.message = message
        self.line = line


@dataclass(frozen=True)
class Document:
    """Plain values and where they stand.

    Attributes:
        value: dicts, lists, str, int, float, bool and None.
        lines: Line of each key or item, by its path.
    """

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_bounded(path: Path) -> str:
    """Return the text of a file of at most 1 MiB.

    Raises:
        DocumentError: It is missing, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise DocumentError(f"is larger than {MAX_FILE_BYTES} bytes, the limit for a file of settings")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DocumentError(f"is not UTF-8: byte 0x{data[error.start]:02x}", line) from error


def parse(text: str) -> Document:
    """Parse one YAML document.

    Raises:
        DocumentError: Malformed, more than one document, a duplicate key, an exploding or recursive anchor,
            a tag other than the standard ones, nesting or size beyond the limits.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(yaml.parse(text, Loader=loader)).build()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        advice = "; quote a value that begins with @ or `, and indent with spaces" if _is_token(error) else ""
        raise DocumentError(f"malformed YAML: {error.problem}{advice}", mark.line + 1 if mark else None) from error
    except yaml.YAMLError as error:
        raise DocumentError(f"malformed YAML: {str(error).splitlines()[0]}") from error


def _is_token(error: yaml.MarkedYAMLError) -> bool:
    return "cannot start any token" in str(error.problem)


def resolve_plain(text: str) -> Any:
    """Give an unquoted scalar its type under YAML 1.2's core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return _to_int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NON_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def _to_int(text: str) -> int | str:
    if len(text) > 100:  # int() refuses thousands of digits, and no setting has a hundred
        return text
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


@dataclass
class _Anchor:
    value: Any
    size: int


class _Builder:
    """Builds one document from events, counting what aliases expand to."""

    def __init__(self, events: Iterator[Any]) -> None:  # PyYAML's events are only partly typed
        self._events = events
        self._lines: dict[KeyPath, int] = {}
        self._anchors: dict[str, _Anchor | None] = {}
        self._num_nodes = 0

    def build(self) -> Document:
        value: Any = None
        num_documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise DocumentError("holds more than one YAML document", _line(event))
                value = self._node(next(self._events), ())
        return Document(value, self._lines)

    def _node(self, event: Any, path: KeyPath) -> Any:
        line = _line(event)
        self._lines.setdefault(path, line)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), line)
        self._count(1, line)
        if len(path) > MAX_DEPTH:
            raise DocumentError(f"is nested more than {MAX_DEPTH} levels deep", line)
        if event.tag is not None and event.tag not in _TAGS:
            raise DocumentError(f"tag {event.tag.replace(_TAG_PREFIX, '!!')} is not accepted", line)
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        before = self._num_nodes
        value = self._value(event, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = _Anchor(value, self._num_nodes - before + 1)
        return value

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        if event.tag is not None:
            return _tagged(event)
        return resolve_plain(event.value) if event.implicit[0] else event.value

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise DocumentError("a key must be a plain word", line)
            key = event.value
            if key == "<<" and event.implicit[0]:
                self._merge(self._node(next(self._events), (*path, key)), merged, line)
                continue
            if key in found:
                first = self._lines[*path, key]
                raise DocumentError(f"key {key} stands twice; first on line {first}", line)
            self._lines[*path, key] = line
            found[key] = self._node(next(self._events), (*path, key))
        return {**merged, **found}

    @staticmethod
    def _merge(value: Any, merged: dict[str, Any], line: int) -> None:
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                raise DocumentError("<< must be followed by an anchored section", line)
            for key, item in source.items():
                merged.setdefault(key, item)

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._node(event, (*path, len(items))))
        return items

    def _alias(self, name: str, line: int) -> Any:
        if name not in self._anchors:
            raise DocumentError(f"anchor *{name} is not defined", line)
        anchor = self._anchors[name]
        if anchor is None:
            raise DocumentError(f"anchor *{name} contains itself", line)
        self._count(anchor.size, line)
        return anchor.value

    def _count(self, size: int, line: int) -> None:
        self._num_nodes += size
        if self._num_nodes > MAX_NODES:
            raise DocumentError(f"holds more than {MAX_NODES} values once its anchors are expanded", line)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _tagged(event: Any) -> Any:
    kind = event.tag.removeprefix(_TAG_PREFIX)
    if kind in ("str", "!"):
        return event.value
    value = resolve_plain(event.value)
    expected: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "null": type(None)}
    if not isinstance(value, expected.get(kind, ())):
        raise DocumentError(f"{event.value!r} is not a !!{kind}", _line(event))
    return float(value) if kind == "float" else value
