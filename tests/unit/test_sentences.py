"""Cutting long texts and putting them together again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eagleray.tasks.sentences import join_pieces, split_text


def test_a_text_is_cut_at_sentences_into_pieces_as_long_as_fit() -> None:
    text = "One. Two!  Three?\n\nFour is longer. Five"
    assert split_text(text, lambda piece: len(piece) <= 17) == ["One. Two!  Three?", "Four is longer.", "Five"]


def test_a_decimal_number_is_no_boundary_and_a_closing_quote_belongs_to_its_sentence() -> None:
    text = 'It is 3.5. "Yes." No'
    assert split_text(text, lambda piece: False) == ["It is 3.5.", '"Yes."', "No"]


def test_chinese_sentences_need_no_space() -> None:
    assert split_text("\u4f60\u597d\u3002\u518d\u89c1\u3002", lambda piece: len(piece) <= 3) == [
        "\u4f60\u597d\u3002",
        "\u518d\u89c1\u3002",
    ]


@given(st.text(alphabet="ab.!? \n\u3002\"'"), st.integers(1, 12))
def test_joining_the_pieces_themselves_gives_the_text_back(text: str, limit: int) -> None:
    pieces = split_text(text, lambda piece: len(piece) <= limit)
    assert join_pieces(text, pieces, pieces) == text
    assert all(piece == piece.strip() and piece for piece in pieces)
