"""Tables of benchmarks: written for a terminal and for Markdown alike, and put in their place in a document."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

MEASURED_WITH = ("torch", "ray", "transformers", "accelerate")
CPU_INFO = Path("/proc/cpuinfo")


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table in columns as wide as their longest cell; all but the first are numbers."""
    widths = [max(3, *(len(row[i]) for row in [headers, *rows])) for i in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (headers, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_section(document: str, name: str, body: str) -> str:
    """Put text between the marks of a section; everything else stays as it is.

    Args:
        document: Markdown with one `<!-- NAME:begin -->` and, after it, one `<!-- NAME:end -->`.
        name: Name of the section.
        body: What stands between the marks from now on.

    Raises:
        ValueError: The marks are missing, doubled or in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"the document needs one {begin} and after it one {end}")
    before, rest = document.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{body.strip()}\n{end}{after}"


def write_section(path: Path, name: str, body: str) -> None:
    """Replace a section of a file."""
    path.write_text(replace_section(path.read_text(encoding="utf-8"), name, body), encoding="utf-8")


def smoke_and_write_options(about: str | None, section: str, smoke: str) -> argparse.ArgumentParser:
    """Return a parser of `--quick` and `--write`.

    Args:
        about: The benchmark's own words on itself.
        section: What `--write` replaces.
        smoke: What `--quick` leaves.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{smoke}: a smoke run")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"replace the section `{section}` of this document"
    )
    return parser


def publish(text: str, section: str, path: Path | None) -> None:
    """Print what was measured, and put it in its place in a document."""
    print(text)
    if path is not None:
        write_section(path, section, text)


def describe_machine() -> str:
    """Say what the numbers were measured on: cores, model, memory, load and versions."""
    versions = {"Python": platform.python_version(), **{name: version(name) for name in MEASURED_WITH}}
    parts = [
        f"{os.cpu_count()} cores ({_cpu_model()})",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory",
        f"load {os.getloadavg()[0]:.1f} before the start",
        _spell(versions),
    ]
    return "; ".join(parts)


def _cpu_model() -> str:
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _spell(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
