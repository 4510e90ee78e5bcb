"""Stop strings, whatever the pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sensorium.text.stops import StopChecker
from sensorium.text.tokenizer import Tokenizer

letters = st.text(alphabet="ab.", max_size=12)
stops = st.lists(st.text(alphabet="ab.", min_size=1, max_size=5), max_size=4)


def naive(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The first stop string that is complete; the longest of those that end together."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not found:
        return text, None
    end, _, best = min(found)
    return text[: end if include else end - len(best)], best


@given(pieces=st.lists(letters, max_size=6), stop=stops, include=st.booleans())
def test_equals_the_naive_search(pieces: list[str], stop: list[str], include: bool) -> None:
    checker = StopChecker(stop, include)
    released, matched = "", None
    expected, expected_stop = naive("".join(pieces), stop, include)
    for piece in pieces:
        text, found = checker.feed(piece)
        released += text
        matched = matched or found
        assert expected.startswith(released)  # what was sent need not be taken back
    if matched is None:
        released += checker.flush()
    assert (released, matched) == (expected, expected_stop)


@given(pieces=st.lists(letters, max_size=6), stop=stops)
def test_holds_back_no_more_than_needed(pieces: list[str], stop: list[str]) -> None:
    checker = StopChecker(stop)
    seen = released = ""
    for piece in pieces:
        text, found = checker.feed(piece)
        if found:
            break
        seen += piece
        released += text
        held = seen[len(released) :]
        assert not held or any(s.startswith(held) for s in stop)


def test_stop_strings_across_pieces() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.feed("Hello\n") == ("Hello", None)
    assert checker.feed("\nUse") == ("", None)
    assert checker.feed("r: x") == ("", "\n\nUser:")
    assert checker.feed("more") == ("", None)
    assert checker.flush() == ""


def test_text_that_may_not_stop() -> None:
    checker = StopChecker(["ab"])
    assert checker.feed("xa") == ("x", None)
    assert checker.feed("bab", may_stop=False) == ("abab", None)
    assert checker.feed("b") == ("b", None)
    assert checker.feed("ab") == ("", "ab")


def test_bad_words(chatml: Tokenizer, llama: Tokenizer) -> None:
    (plain, spaced) = chatml.bad_words_token_ids(["a"])
    assert chatml.decode(plain) == "a"
    assert chatml.decode(spaced) == " a"
    assert len(chatml.bad_words_token_ids([" a", "a"])) == 2
    for sequence in llama.bad_words_token_ids(["the"]):
        assert llama.bos_token_id not in sequence
