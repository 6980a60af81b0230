"""What a job takes along: the unpacked wheel, the files with their overrides applied, and the user's code."""

from __future__ import annotations

import difflib
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.cli import verb_names
from eagleray.config.loader import LoadedFile, load_files, resolve_store, split_arguments
from eagleray.errors import UsageError
from eagleray.shipping import runtime_env
from eagleray.store.uri import parse_store_uri
from eagleray_jobs.submit.interpreter import PYTHON_VARIABLE

NOT_JOBS = ("init", "validate", "doctor", "serve", "models", "store", "jobs")
JOB_VARIABLE = "EAGLERAY_JOB_ID"
CODE_OPTION = "--code"
STOP_WAIT_S = 600
"""Seconds between SIGTERM and SIGKILL: what a checkpoint may take."""

_ENTRY = "eagleray_jobs.submit.entry"
_HOOK_VARIABLE = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
_HOOK = "eagleray_jobs.submit.interpreter.remember_python"
_FILE_SUFFIXES = (".yaml", ".yml")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "node_modules")


@dataclass(frozen=True, slots=True)
class Parcel:
    """A verb that is ready to travel.

    Attributes:
        verb: What runs.
        arguments: Its arguments, with each file by the name it travels under.
        files: The files by that name: what they resolved to.
        loaded: The same files as they were loaded here.
        store: Where the record goes.
        notes: What the user should know.
        code_options: Directories that the arguments name with `--code`.
    """

    verb: str
    arguments: tuple[str, ...]
    files: dict[str, dict[str, Any]]
    loaded: tuple[LoadedFile, ...]
    store: str
    notes: tuple[str, ...] = ()
    code_options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model that the job is about; empty where no file names one."""
        return self.loaded[0].config.name if self.loaded else ""

    @property
    def code(self) -> list[str]:
        """The user's directories, of all files and of the arguments, once each."""
        entries = [entry for each in self.loaded for entry in each.config.code]
        return list(dict.fromkeys((*entries, *self.code_options)))


def pack(verb: str, arguments: Sequence[str], store: str | None) -> Parcel:
    """Resolve a verb's arguments to what they mean on the cluster.

    Args:
        verb: A verb that runs to an end.
        arguments: Files, `key.sub=value`, and whatever else the verb takes.
        store: What `--store` says.

    Raises:
        UsageError: There is no such verb, it does not run to an end, or the store is relative.
        ConfigError: A file is wrong.
    """
    if verb in NOT_JOBS:
        raise UsageError(
            f"{verb} does not run to an end, so that it is no job", "Submit train, evaluate or predict."
        )
    if verb not in (known := verb_names()):
        near = difflib.get_close_matches(verb, known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"there is no verb {verb!r}{guess}", "Submit train, evaluate or predict.")
    others = [each for each in arguments if not _is_file(each)]
    paths = [each for each in arguments if _is_file(each)]
    overrides = split_arguments([each for each in others if _is_override(each)])[1] if paths else []
    loaded = tuple(load_files(paths, overrides, store)) if paths else ()
    stores = {each.config.store for each in loaded} or {resolve_store(store, None)}
    if len(stores) > 1:
        raise UsageError(
            f"the files name different stores: {', '.join(sorted(map(str, stores)))}", "Submit each by itself."
        )
    location = _shared(str(stores.pop()))
    files = {f"{each.config.name}.yaml": _travelling(each, i, location) for i, each in enumerate(loaded)}
    rest, code_options = _take_code([each for each in others if each not in overrides])
    rest, notes = _absolute_paths(rest)
    tail = [] if paths else ["--store", location]
    for place in _option_places(code_options):
        tail += [CODE_OPTION, f"./{place}"]
    return Parcel(verb, (*files, *rest, *tail), files, loaded, location, notes, code_options)


def entrypoint(job_id: str, parcel: Parcel) -> str:
    """Return the shell command of a job: the cluster's own Python runs the verb and writes its end."""
    command = shlex.join(
        ["-m", _ENTRY, "--store", parcel.store, "--id", job_id, "--", parcel.verb, *parcel.arguments]
    )
    # `exec`, so that a signal of Ray reaches Python and no shell in between.
    return f'exec "${{{PYTHON_VARIABLE}:-python3}}" {command}'


def environment(job_id: str, parcel: Parcel, staging: Path) -> dict[str, Any]:
    """Lay out what travels and return the job's runtime environment.

    Args:
        job_id: The job.
        parcel: What travels.
        staging: An empty directory that lives until Ray has uploaded it.
    """
    wheel, folder = staging / "wheel", staging / "files"
    wheel.mkdir()
    folder.mkdir()
    for name, content in parcel.files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
    for i, each in enumerate(parcel.loaded):
        for entry, place in zip(each.config.code, _code_places(each, i), strict=True):
            shutil.copytree(entry, folder / place, ignore=_IGNORED)
    for entry, place in zip(parcel.code_options, _option_places(parcel.code_options), strict=True):
        shutil.copytree(entry, folder / place, ignore=_IGNORED)
    return {
        **runtime_env(wheel, parcel.code),
        "working_dir": str(folder),
        "env_vars": {
            JOB_VARIABLE: job_id,
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            _HOOK_VARIABLE: _HOOK,
        },
    }


def _travelling(each: LoadedFile, number: int, store: str) -> dict[str, Any]:
    code = [f"./{place}" for place in _code_places(each, number)]
    # Only what was set: a default that travels as a setting would be taken for one.
    return each.config.model_copy(update={"code": code, "store": store}).model_dump(
        mode="json", exclude_unset=True
    )


def _code_places(each: LoadedFile, number: int) -> list[str]:
    # A package keeps its own name, under which it is imported.
    return [f"code/{number}-{i}/{Path(entry).name}" for i, entry in enumerate(each.config.code)]


def _option_places(directories: Sequence[str]) -> list[str]:
    return [f"code/option-{i}/{Path(entry).name}" for i, entry in enumerate(directories)]


def _take_code(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the arguments without their `--code` options, and the directories that these name.

    Raises:
        UsageError: One is not a directory.
    """
    rest: list[str] = []
    found: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != CODE_OPTION:
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not Path(value).is_dir():
            raise UsageError(f"{CODE_OPTION} {value}: there is no such directory", "Name one that holds packages.")
        found.append(str(Path(value).resolve()))
    return rest, tuple(found)


def _shared(store: str) -> str:
    location = parse_store_uri(store)
    if location.is_relative:
        raise UsageError(
            f"a job cannot use the relative store {store}: its processes run in other directories",
            "Name a shared directory by its absolute path, s3://bucket/prefix or gs://bucket/prefix.",
        )
    return str(location)


def _absolute_paths(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Make relative paths absolute, because the job has another working directory."""
    found: list[str] = []
    notes: list[str] = []
    for argument in arguments:
        is_relative = not argument.startswith(("-", "/")) and "://" not in argument and "=" not in argument
        if is_relative and (
            "/" in argument or Path(argument).suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".txt")
        ):
            notes.append(f"{argument} is {Path(argument).absolute()} in the job: every node must see it there")
            argument = str(Path(argument).absolute())
        found.append(argument)
    return found, tuple(notes)


def _is_file(argument: str) -> bool:
    return not argument.startswith("-") and argument.endswith(_FILE_SUFFIXES) and "=" not in argument


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and "=" in argument
