"""Control tokens: finding their spellings, and breaking those that users type."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import InvalidRequestError
from sensorium.text.control import ControlTokens, pick_mark, unmark

words = st.lists(st.text(alphabet="<|ab>", min_size=2, max_size=5), min_size=1, max_size=6)
text = st.text(alphabet="<|ab> ", max_size=20)


@given(words, text)
def test_the_longest_spelling_at_the_first_place_is_found(spellings: list[str], text: str) -> None:
    found = ControlTokens.from_texts(spellings).pattern.search(text)
    places = [(text.find(s), -len(s), s) for s in spellings if s in text]
    expected = min(places) if places else None
    assert (found and (found.start(), found[0])) == (expected and (expected[0], expected[2]))


@given(words, st.lists(text, max_size=4), st.lists(text, max_size=4))
def test_protected_texts_form_no_control_token(
    spellings: list[str], typed: list[str], written: list[str]
) -> None:
    """However a template joins typed texts with its own, a spelling that is found lies wholly in
    its own text.
    """
    control = ControlTokens.from_texts(spellings)
    mark = pick_mark(typed)
    joined = ""
    own: list[bool] = []
    for i in range(max(len(typed), len(written))):
        for source, is_own in ((written, True), (typed, False)):
            piece = source[i] if i < len(source) else ""
            piece = piece if is_own else control.protect(piece, mark)
            joined += piece
            own += [is_own] * len(piece)
    for found in control.pattern.finditer(joined):
        assert all(own[found.start() : found.end()])


@given(words, text)
def test_protection_can_be_taken_off(spellings: list[str], text: str) -> None:
    mark = pick_mark([text])
    protected = ControlTokens.from_texts(spellings).protect(text, mark)
    assert unmark(protected, mark) == text
    assert unmark(json.dumps(protected), mark) == json.dumps(text)


def test_white_space_at_the_borders_stays_outside() -> None:
    control = ControlTokens.from_texts(["<end>"])
    assert control.protect("  <e \n", "#") == "  <e# \n"
    assert control.protect("  d> \n", "#") == "  #d> \n"
    assert control.protect("<end>", "#") == "<#end>"
    assert control.protect("<e", "#", whole_only=True) == "<e"


def test_reserved_characters_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="reserves"):
        ControlTokens.from_texts(["§"]).protect("a§b", "#")


def test_marks_are_not_in_the_texts() -> None:
    every = "".join(chr(c) for c in range(0x100000, 0x10FFFD) if c != 0x100007)
    assert pick_mark([every]) == chr(0x100007)
    with pytest.raises(InvalidRequestError, match="private-use"):
        pick_mark([every + chr(0x100007)])
