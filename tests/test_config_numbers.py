"""Which words of a YAML file are whole numbers."""

from __future__ import annotations

import pytest

from greenprune.config import load_yaml


@pytest.mark.parametrize(
    ("word", "value"), [("0", 0), ("-3", -3), ("+7", 7), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("128", 128)]
)
def test_a_whole_number(word: str, value: int) -> None:
    read = load_yaml(f"a: {word}")["a"]
    assert (type(read), read) == (int, value)


@pytest.mark.parametrize("word", ["1:30", "4:00:00", "host:80"])
def test_a_word_with_colons_is_text(word: str) -> None:
    """As version 1.2 has it: neither times nor places are numbers to the base of sixty."""
    assert load_yaml(f"a: {word}") == {"a": word}
