"""Language codes as other APIs write them: `EN-US`, `pt-br`, `zh`."""

from __future__ import annotations

import re
from functools import lru_cache

_CODE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*")


def is_language(code: str) -> bool:
    """Whether a word looks like a language code and is one that CLDR has a name for."""
    return _CODE.fullmatch(code) is not None and language_name(code) != code


def same_language(wanted: str, has: str | None) -> bool:
    """Whether a client's code means a model's language; a region that the model's has none of is dropped."""
    if has is None:
        return False
    wanted, has = wanted.lower().replace("_", "-"), has.lower().replace("_", "-")
    return wanted == has or ("-" not in has and wanted.partition("-")[0] == has)


@lru_cache(maxsize=1024)
def language_name(code: str) -> str:
    """Return a language's English name; its code where there is none."""
    from babel import Locale, UnknownLocaleError

    try:
        locale = Locale.parse(code.replace("-", "_"))
    except (UnknownLocaleError, ValueError, TypeError):
        return code
    return locale.get_display_name("en") or code
