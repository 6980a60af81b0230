"""What every section of the file is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,127}"
IMPORT_PATH_PATTERN = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


class Section(BaseModel):
    """A part of the file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
