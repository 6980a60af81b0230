"""What a preparation wrote: the record that is written last and makes it valid."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eagleray.errors import DataError
from eagleray_jobs.data.split import SPLITS, Split

FORMAT = 1


def data_prefix(fingerprint: str) -> str:
    """Return the folder of prepared data."""
    return f"data/{fingerprint}"


def manifest_key(fingerprint: str) -> str:
    """Return the key of the record that is written last."""
    return f"{data_prefix(fingerprint)}/manifest.json"


@dataclass(frozen=True, slots=True)
class PreparedFile:
    """One file.

    Attributes:
        key: Where it is in the store.
        size: Its bytes.
        sha256: Of its content.
        num_rows: Rows in it; 0 for a file of the processor.
    """

    key: str
    size: int
    sha256: str
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What became of the rows.

    Attributes:
        source: What was read.
        num_rows: Rows by split.
        num_tokens: Tokens by split, by the length that batches go by.
        num_truncated: Rows that were longer than the limits and cut, by split.
        num_skipped: Rows that could not be used (`data.on_bad_row: skip`).
        skipped: The first of them, with place and reason.
        wall_s: Seconds that the preparation took.
    """

    source: str
    num_rows: Mapping[Split, int]
    num_tokens: Mapping[Split, int]
    num_truncated: Mapping[Split, int]
    num_skipped: int
    skipped: Sequence[str]
    wall_s: float

    def lines(self) -> list[str]:
        """Return what a user should see."""
        rows = ", ".join(f"{self.num_rows[split]:,} {split}" for split in SPLITS)
        shown = [f"data: {self.source}: {rows} rows"]
        if cut := sum(self.num_truncated.values()):
            shown.append(
                f"data: {cut:,} of {sum(self.num_rows.values()):,} rows are longer than data.max_source_length or "
                "data.max_target_length and were cut"
            )
        if self.num_skipped:
            shown.append(f"data: {self.num_skipped:,} rows could not be used and were skipped, the first of them:")
            shown += [f"  {row}" for row in self.skipped]
        return shown


@dataclass(frozen=True, slots=True)
class DataManifest:
    """The record.

    Attributes:
        fingerprint: Hash of all that the rows depend on.
        splits: Files of each split, in the order of the rows.
        processor: Files of the processor by name.
        summary: What became of the rows.
    """

    fingerprint: str
    splits: Mapping[Split, Sequence[PreparedFile]]
    processor: Mapping[str, PreparedFile]
    summary: DataSummary

    def to_json(self) -> bytes:
        """Write it."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> DataManifest:
        """Read it.

        Raises:
            DataError: It is damaged, or of a later version.
        """
        try:
            values: dict[str, Any] = json.loads(data)
            if values["format"] != FORMAT:
                raise DataError(f"prepared data of format {values['format']}, this version reads {FORMAT}")
            return cls(
                fingerprint=values["fingerprint"],
                splits={split: [PreparedFile(**file) for file in values["splits"][split]] for split in SPLITS},
                processor={name: PreparedFile(**file) for name, file in values["processor"].items()},
                summary=DataSummary(**values["summary"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"the manifest of prepared data is damaged: {error!r}") from None
