"""What a model writes never controls the terminal."""

from __future__ import annotations

import io
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sensorium.cli.chat.control import harmless
from sensorium.cli.chat.markdown import MarkdownAnswer, rendered

ATTACKS = [
    "\x1b]0;title\x07",
    "\x1b]52;c;cm0gLXJmIC8=\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "\x1bP$q\x1b\\",
    "a\rb\x08c\x7f",
    "&#27;[31m &#x9b;31m &#7;",
    "[link](http://a/\x1b]8;;evil)",
    "`\x1b[31m`\n\n```\n\x1b[31m\n```\n",
    "\ud800",
]
OWN = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
"""Sequences that the renderer itself writes: colours, and movements of its own."""


@given(st.text(st.characters(codec=None)))
def test_no_control_character_is_left(text: str) -> None:
    for character in harmless(text):
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs")


def test_ordinary_text_is_unchanged() -> None:
    text = "Zwölf Boxkämpfer – 日本語 👩‍🚀\n\tcode"
    assert harmless(text) == text


@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_has_no_sequences_but_its_own(attack: str) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system="standard")
    with MarkdownAnswer(console) as answer:
        for character in attack:
            answer.write(harmless(character))
    shown = OWN.sub("", file.getvalue())
    assert not [c for c in shown if unicodedata.category(c) == "Cc" and c not in "\n\r"]
    console.print(rendered(harmless(attack)))
