"""Cutting a long text at sentences and putting translations together again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# The white space after a full stop, question or exclamation mark (with closing quotes or brackets), after CJK
# ones, which have none, and line breaks.
_BOUNDARY = re.compile(r"(?<=[.!?\u2026])[\"'\u2019\u201d\u00bb)\]]*\s+|(?<=[\u3002\uff01\uff1f])\s*|\s*\n\s*")


def split_text(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut a text at sentences into pieces that fit, each as long as possible.

    Args:
        text: Any text.
        fits: Whether a piece is short enough.

    Returns:
        The pieces, in order, without the white space between them. A sentence that is too long for itself is a
        piece that does not fit.
    """
    pieces: list[str] = []
    start: int | None = None
    for begin, end in _sentences(text):
        if start is not None and fits(text[start:end]):
            pieces[-1] = text[start:end]
        else:
            start = begin
            pieces.append(text[begin:end])
    return pieces


def join_pieces(text: str, pieces: Sequence[str], answers: Sequence[str]) -> str:
    """Put answers together with the white space that stood around their pieces in the text."""
    joined, position = [], 0
    for piece, answer in zip(pieces, answers, strict=True):
        begin = text.index(piece, position)
        joined += [text[position:begin], answer]
        position = begin + len(piece)
    return "".join([*joined, text[position:]])


def _sentences(text: str) -> list[tuple[int, int]]:
    """Return where sentences begin and end, white space around them left out."""
    ends = [match.end() for match in _BOUNDARY.finditer(text)]
    spans, begin = [], 0
    for end in [*ends, len(text)]:
        sentence = text[begin:end]
        if stripped := sentence.strip():
            offset = begin + sentence.index(stripped)
            spans.append((offset, offset + len(stripped)))
        begin = end
    return spans
