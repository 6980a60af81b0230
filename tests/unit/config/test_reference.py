"""The reference of the file in the documentation."""

from __future__ import annotations

from pathlib import Path

from eagleray.config.reference import BEGIN, END, render_reference

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_reference_in_the_documentation_is_current() -> None:
    text = DOCUMENT.read_text()
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert written == render_reference(), "run: python -m eagleray.config.reference docs/configuration.md"


def test_the_reference_names_keys_of_every_level() -> None:
    reference = render_reference()
    for key in ("name", "learning_rate", "autoscaling_config.min_replicas", "tokenizer.vocab_size", "d_model"):
        assert f"| `{key}` |" in reference
