"""From updates to outputs: text, stop strings, min_tokens, log probabilities, times, endings."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from sensorium.core.request import SequenceUpdate, TokenSample
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.errors import UnavailableError
from sensorium.params import SamplingParams
from sensorium.text.tokenizer import Tokenizer

EOS = 0
LETTERS = {chr(97 + i): i + 1 for i in range(26)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocab = {"<end>": EOS, **LETTERS, "Ã": 30, "©": 31, "Ġ": 32}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, eos_token_ids=(EOS,))


def stream(tokenizer: Tokenizer, **params: Any) -> OutputCollector:
    sampling = SamplingParams(**{"max_tokens": 50, **params})
    ids = ["r"] if sampling.n == 1 else [f"r#{i}" for i in range(sampling.n)]
    return OutputCollector(
        request_id="r",
        engine_ids=ids,
        text="ab",
        token_ids=[1, 2],
        num_item_tokens={},
        params=sampling,
        continues=True,
        tokenizer=tokenizer,
        arrival_time=0.0,
    )


def token(letter: str | int, request_id: str = "r", **fields: Any) -> SequenceUpdate:
    token_id = LETTERS[letter] if isinstance(letter, str) else letter
    return SequenceUpdate(request_id, TokenSample(token_id), **fields)


def write(to: OutputCollector, text: str) -> list[bool]:
    return [to.apply(token(letter)) for letter in text]


def test_text_grows_and_the_end_token_is_counted_but_not_shown(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer)
    write(s, "hello")
    assert s.output.outputs[0].text == "hello"
    assert not s.finished
    assert not s.apply(token(EOS, finish_reason="stop"))
    sample = s.output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("hello", "stop", None)
    assert sample.token_ids[-1] == EOS
    assert s.output.finished


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer)
    s.apply(token(30))
    assert s.output.outputs[0].text == ""
    s.apply(token(31))
    assert s.output.outputs[0].text == "é"


def test_a_broken_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer)
    s.apply(token(30, finish_reason="length"))
    assert s.output.outputs[0].text == "\ufffd"


def test_stop_string_across_tokens_is_cut_and_reported(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, stop=["lo"])
    assert write(s, "hello") == [False, False, False, False, True]
    sample = s.output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("hel", "stop", "lo")
    assert s.finished
    assert not s.apply(token("x")), "the engine may be a step ahead of the abort"
    assert sample.text == "hel"
    assert s.open_ids == []


def test_stop_string_can_be_included(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, stop=["lo"], include_stop_str_in_output=True)
    write(s, "hello")
    assert s.output.outputs[0].text == "hello"


def test_held_back_text_appears_when_the_sample_ends_otherwise(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, stop=["xyz"])
    write(s, "ax")
    assert s.output.outputs[0].text == "a"
    s.apply(token("y", finish_reason="length"))
    assert s.output.outputs[0].text == "axy"
    assert s.output.outputs[0].finish_reason == "length"


def test_min_tokens_keeps_stop_strings_from_counting(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, stop=["b"], min_tokens=3)
    assert write(s, "abab") == [False, False, False, True]
    assert s.output.outputs[0].text == "aba"


def test_a_stop_token_is_shown_only_when_asked_for(tokenizer: Tokenizer) -> None:
    for included, text in ((False, "a"), (True, "ab")):
        s = stream(tokenizer, include_stop_str_in_output=included)
        write(s, "a")
        s.apply(token("b", finish_reason="stop", stop_token_id=2))
        sample = s.output.outputs[0]
        assert (sample.text, sample.stop_reason) == (text, 2)


def test_samples_end_one_by_one(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, n=2)
    s.apply(token("a", "r#0", num_cached_tokens=7))
    s.apply(token("b", "r#1", finish_reason="length", num_cached_tokens=9))
    assert [o.text for o in s.output.outputs] == ["a", "b"]
    assert not s.finished
    assert s.open_ids == ["r#0"]
    assert s.output.num_cached_tokens == 7
    s.apply(token("c", "r#0", finish_reason="length"))
    assert s.finished


def test_logprobs_and_prompt_logprobs(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer, logprobs=1, prompt_logprobs=0)
    entries = ((1, -0.5, 1), (400, -2.0, 2))
    update = SequenceUpdate("r", TokenSample(1, entries), prompt_logprobs=(((2, -1.0, 3),),))
    s.apply(update)
    sample = s.output.outputs[0]
    assert sample.logprobs is not None
    assert sample.logprobs[0][1].decoded_token == "a"
    assert sample.logprobs[0][400].decoded_token == "", "beyond the tokenizer's vocabulary"
    assert sample.cumulative_logprob == -0.5
    assert s.output.prompt_logprobs is not None
    assert s.output.prompt_logprobs[0] is None
    assert s.output.prompt_logprobs[1][2].rank == 3  # type: ignore[index]


def test_an_error_of_the_engine_is_raised(tokenizer: Tokenizer) -> None:
    s = stream(tokenizer)
    with pytest.raises(UnavailableError, match="broken"):
        s.apply(SequenceUpdate("r", finish_reason="error", error="broken"))
