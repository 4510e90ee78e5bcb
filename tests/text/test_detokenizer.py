"""Text that comes token by token equals the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from sensorium.text.detokenizer import Detokenizer
from sensorium.text.tokenizer import Tokenizer

ids = st.lists(st.integers(0, 10_000), max_size=30)
texts = st.text(alphabet=st.sampled_from("ab tho é你好🎉👩‍👧\n  "), max_size=30)


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    pieces = [detokenizer.append([token_id]) for token_id in token_ids]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=200, deadline=None)
@given(numbers=ids, skip=st.booleans())
@pytest.mark.parametrize("name", ["chatml", "llama", "legacy", "unigram_tokenizer"])
def test_any_ids(name: str, request: pytest.FixtureRequest, numbers: list[int], skip: bool) -> None:
    tokenizer = request.getfixturevalue(name)
    token_ids = [n % (tokenizer.max_token_id + 1) for n in numbers]
    pieces = stream(tokenizer, token_ids, skip_special_tokens=skip)
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    if name in ("llama", "legacy") and "\ufffd" in whole:
        return  # the library then gives up whole runs of bytes; see the next test
    assert "".join(pieces) == whole


@settings(max_examples=150, deadline=None)
@given(text=texts)
@pytest.mark.parametrize("name", ["chatml", "llama", "legacy"])
def test_characters_are_never_broken(name: str, request: pytest.FixtureRequest, text: str) -> None:
    tokenizer = request.getfixturevalue(name)
    token_ids = tokenizer.encode(text)
    pieces = stream(tokenizer, token_ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)


def test_broken_bytes_spoil_only_themselves(llama: Tokenizer) -> None:
    spelled = ["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0xE2>", "a"]
    token_ids = [llama.token_id(t) for t in spelled]
    pieces = stream(llama, token_ids)
    assert pieces == ["", "", "€", "\ufffd", "", "\ufffda", ""]


def test_held_bytes_are_flushed(chatml: Tokenizer) -> None:
    token_ids = chatml.encode("🎉")[:-1]
    assert "".join(stream(chatml, token_ids)[:-1]) == ""
    assert "".join(stream(chatml, token_ids)) == "\ufffd"


def test_leading_space(llama: Tokenizer, chatml: Tokenizer) -> None:
    token_ids = llama.encode("The dog", add_special_tokens=False)
    assert "".join(stream(llama, token_ids)) == "The dog"
    assert "".join(stream(llama, token_ids, continues=True)) == " The dog"
    assert "".join(stream(chatml, chatml.encode(" The"))) == " The"


def test_special_tokens(chatml: Tokenizer) -> None:
    token_ids = chatml.encode("a<|im_end|><tool_call>b")
    assert "".join(stream(chatml, token_ids)) == "a<tool_call>b"
    kept = stream(chatml, token_ids, skip_special_tokens=False)
    assert "".join(kept) == "a<|im_end|><tool_call>b"


def spaced() -> Tokenizer:
    """A decoder that joins with blanks."""
    words = {w: i for i, w in enumerate(["[UNK]", "hello", "world", "##ly"])}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["<a>", "<b>"])
    return Tokenizer(backend)


def test_blanks_between_special_tokens() -> None:
    tokenizer = spaced()
    token_ids = [1, 3, 4, 5, 2]
    with_blanks = stream(tokenizer, token_ids, skip_special_tokens=False)
    assert "".join(with_blanks) == tokenizer.decode(token_ids) == "helloly <a> <b> world"
    without = stream(
        tokenizer, token_ids, skip_special_tokens=False, spaces_between_special_tokens=False
    )
    assert "".join(without) == "helloly <a><b> world"


def test_ids_outside_the_vocabulary_add_nothing(any_tokenizer: Tokenizer) -> None:
    assert "".join(stream(any_tokenizer, [any_tokenizer.max_token_id + 1, -1])) == ""


def test_the_window_does_not_grow() -> None:
    tokenizer = spaced()
    detokenizer = Detokenizer(tokenizer)
    for _ in range(100):
        detokenizer.append([1, 2, 3])
    assert len(detokenizer._stream._ids) <= 2  # type: ignore[attr-defined]


def test_token_bytes(chatml: Tokenizer, llama: Tokenizer) -> None:
    text = "Äpfel 🎉 the"
    for tokenizer in (chatml, llama):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(tokenizer.token_bytes(i) for i in token_ids)
        assert joined.decode().lstrip(" ") == text
    assert chatml.token_bytes(chatml.token_id("<|im_end|>")) == b"<|im_end|>"


def test_ids_that_pad_a_vocabulary_stand_for_nothing(chatml: Tokenizer) -> None:
    """A model may give them log probabilities, and prompts of ids may hold them."""
    assert chatml.token_bytes(chatml.max_token_id + 1) == b""
