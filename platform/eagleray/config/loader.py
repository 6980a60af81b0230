"""From files and overrides to configurations, or to every problem at once with file, line and key.

Paths in a file: `code`, the files under `data` and a `model.pretrained` directory are relative to the file that
names them (to the working directory when the command line names them) and come out absolute, because workers run
elsewhere. `store` is relative to the working directory and stays as it was written, because a joined cluster
refuses a relative one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from eagleray.config.contradictions import find_contradictions
from eagleray.config.crosschecks import cross_problems, family_problems, path_problems
from eagleray.config.document import Document, DocumentError, KeyPath, parse, read_bounded, resolve_plain
from eagleray.config.problems import Problem, dotted, explain, section_at, spellings
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError, UsageError

DEFAULT_STORE = "./store"
STORE_VARIABLE = "EAGLERAY_STORE"

_OVERRIDE = re.compile(r"([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)", re.DOTALL)
_STRUCTURED = ("[", "{", '"', "'")
_URI = re.compile(r"[a-z][a-z0-9+]*://")


@dataclass(frozen=True)
class LoadedFile:
    """A file and what it means.

    Attributes:
        path: Where it was read from.
        config: What it says, with the overrides, its paths absolute and its store filled in.
        warnings: Settings that are legal and have no effect; shown once.
    """

    path: Path
    config: RunConfig
    warnings: tuple[str, ...] = ()


def load_files(
    paths: Sequence[Path | str],
    overrides: Sequence[str] = (),
    store: str | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    require_train: bool = False,
) -> list[LoadedFile]:
    """Load files of settings.

    Args:
        paths: The files, one model each.
        overrides: `key.sub=value`, applied to every file; lists, sections and quoted text are YAML.
        store: What `--store` says; goes before the file's own.
        environ: Where `EAGLERAY_STORE` is looked up when neither names a store; default: the environment.
        require_train: Whether a file without a `train` section is an error.

    Raises:
        UsageError: No file, or an override that is not `key=value`.
        ConfigError: Everything that is wrong in all files, each with file, line and key.
    """
    if not paths:
        raise UsageError("no file is given", "Name at least one YAML file; `eagleray init` writes one.")
    parsed = [parse_override(text) for text in overrides]
    loaded: list[LoadedFile] = []
    messages: list[str] = []
    for path in map(Path, paths):
        try:
            loaded.append(_load(path, parsed, store, os.environ if environ is None else environ))
        except ConfigError as error:
            messages.append(error.message)
    if require_train:
        messages += [f"{each.path}: train is missing" for each in loaded if each.config.train is None]
    if messages:
        raise ConfigError("\n".join(messages))
    _refuse_same_names(loaded)
    return loaded


def resolve_store(option: str | None, of_file: str | None, environ: Mapping[str, str] | None = None) -> str:
    """Choose the store: `--store`, else the file's, else `EAGLERAY_STORE`, else `./store`."""
    environ = os.environ if environ is None else environ
    return option or of_file or environ.get(STORE_VARIABLE) or DEFAULT_STORE


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Split `FILE... key.sub=value...` into files and overrides.

    Raises:
        UsageError: A file stands behind an override.
    """
    paths: list[Path] = []
    overrides: list[str] = []
    for argument in arguments:
        if _OVERRIDE.fullmatch(argument) and not Path(argument).exists():
            overrides.append(argument)
        elif overrides:
            raise UsageError(
                f"{argument} stands behind {overrides[-1]}", "Name the files first, then key.sub=value."
            )
        else:
            paths.append(Path(argument))
    return paths, overrides


@dataclass(frozen=True)
class Override:
    """One `key.sub=value` of the command line."""

    key: KeyPath
    value: Any


def parse_override(text: str) -> Override:
    """Parse `key.sub=value`.

    Raises:
        UsageError: It has no key, or its value is not YAML.
    """
    match = _OVERRIDE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text} is not key.sub=value", "For example train.learning_rate=1e-4.")
    text_of_value = match[2].strip()
    if not text_of_value.startswith(_STRUCTURED):
        # A shell word is text as it stands: `@latest`, `*.jsonl` and `a: b` mean something else to YAML.
        return Override(tuple(match[1].split(".")), resolve_plain(text_of_value))
    try:
        return Override(tuple(match[1].split(".")), parse(text_of_value).value)
    except DocumentError as error:
        raise UsageError(f"the value of {text}: {error.message}", "Quotes, [] and {} are read as YAML.") from error


@dataclass
class _Draft:
    """A file on its way to a configuration."""

    path: Path
    document: Document
    value: dict[str, Any]
    overridden: list[KeyPath] = field(default_factory=list)

    def is_overridden(self, key: KeyPath) -> bool:
        return any(key[: len(set_key)] == set_key for set_key in self.overridden)

    def where(self, key: KeyPath) -> str:
        lines = self.document.lines
        new = key not in lines and any(set_key[: len(key)] == key for set_key in self.overridden)
        if new or self.is_overridden(key):
            return f"{self.path}, on the command line"
        known = next((key[:n] for n in range(len(key), -1, -1) if key[:n] in lines), None)
        return str(self.path) if not known else f"{self.path}:{lines[known]}"

    def error(self, problems: Sequence[Problem]) -> ConfigError:
        return ConfigError("\n".join(f"{self.where(each.key)}: {each.message}" for each in problems))


def _load(path: Path, overrides: Sequence[Override], store: str | None, environ: Mapping[str, str]) -> LoadedFile:
    draft = _read(path)
    problems = _canonical(draft.value, RunConfig, ())
    for override in overrides:
        problems += _apply(draft, override)
    problems += family_problems(draft.value)
    try:
        config = RunConfig.model_validate(draft.value)
    except ValidationError as error:
        problems = explain(error.errors(), RunConfig, draft.value) + problems
    if problems:
        raise draft.error(sorted(problems, key=lambda each: draft.document.lines.get(each.key, 0)))
    config = _with_absolute_paths(config, draft)
    if problems := cross_problems(config) + path_problems(config):
        raise draft.error(problems)
    config = config.model_copy(update={"store": resolve_store(store, config.store, environ)})
    return LoadedFile(path, config, tuple(find_contradictions(config)))


def _read(path: Path) -> _Draft:
    try:
        document = parse(read_bounded(path))
    except DocumentError as error:
        where = f"{path}:{error.line}" if error.line is not None else str(path)
        raise ConfigError(f"{where}: {error.message}") from error
    if not isinstance(document.value, dict):
        found = "nothing" if document.value is None else f"a {type(document.value).__name__}"
        raise ConfigError(f"{path}: must hold keys such as name: and task:, but holds {found}")
    return _Draft(path, document, document.value)


def _canonical(section: Any, kind: type[BaseModel] | None, at: KeyPath) -> list[Problem]:
    """Rename accepted aliases to the field they set; the same field twice is a problem."""
    if kind is None or not isinstance(section, dict):
        return []
    names, problems = spellings(kind), []
    for key in [key for key in section if names.get(key, key) != key]:
        if names[key] in section:
            problems.append(Problem((*at, key), f"{dotted((*at, key))} and {names[key]} are the same setting"))
        section.setdefault(names[key], section.pop(key))
    for key, value in section.items():
        problems += _canonical(value, section_at(kind, [key]), (*at, key))
    return problems


def _apply(draft: _Draft, override: Override) -> list[Problem]:
    key = _canonical_key(override.key)
    draft.overridden.append(key)
    section: dict[str, Any] = draft.value
    for i, part in enumerate(key[:-1], start=1):
        inner = section.get(str(part))
        if inner is not None and not isinstance(inner, dict):
            return [Problem(key, f"{dotted(key)} cannot be set: {dotted(key[:i])} is a value, not a section")]
        # A copy, because an anchored section may stand in several places.
        section[str(part)] = section = dict(inner or {})
    section[str(key[-1])] = override.value
    return _canonical(override.value, section_at(RunConfig, key), key)


def _canonical_key(key: KeyPath) -> KeyPath:
    done: list[str | int] = []
    for part in key:
        section = section_at(RunConfig, done)
        done.append(spellings(section).get(str(part), part) if section else part)
    return tuple(done)


def _with_absolute_paths(config: RunConfig, draft: _Draft) -> RunConfig:
    def absolute(text: str, *key: str | int) -> str:
        if _URI.match(text):
            return text
        base = Path.cwd() if draft.is_overridden(key) else draft.path.absolute().parent
        return os.path.normpath(base / Path(text).expanduser())

    def files(value: Any, *key: str | int) -> Any:
        if isinstance(value, str):
            return absolute(value, *key)
        if isinstance(value, list):
            return [absolute(item, *key) for item in value]
        if value is None:
            return None
        return value.model_copy(
            update={part: files(getattr(value, part), *key, part) for part in ("source", "target")}
        )

    splits = {name: files(getattr(config.data, name), "data", name) for name in ("train", "validation", "test")}
    pretrained = config.model.pretrained
    if pretrained is not None and Path(absolute(pretrained, "model", "pretrained")).is_dir():
        pretrained = absolute(pretrained, "model", "pretrained")
    return config.model_copy(
        update={
            "code": [absolute(item, "code") for item in config.code],
            "data": config.data.model_copy(update=splits),
            "model": config.model.model_copy(update={"pretrained": pretrained}),
        }
    )


def _refuse_same_names(loaded: Sequence[LoadedFile]) -> None:
    seen: dict[str, Path] = {}
    for each in loaded:
        first = seen.setdefault(each.config.name, each.path)
        if first is not each.path:
            raise ConfigError(f"{each.path}: name {each.config.name} is also the name in {first}")
