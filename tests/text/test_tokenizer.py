"""Encoding and decoding against transformers, and the refusal of what is no text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox",
    "  two  spaces\n\nand lines\t",
    "Grüße 你好 🎉👩‍👩‍👧",
    "<|im_start|>user\nWhat is shown?<|im_end|>",
    "USER: <image>\nWhat?</s> ASSISTANT:",
    "",
    "<tool_call>{}</tool_call>",
]


@pytest.mark.parametrize("name", ["chatml", "llama", "legacy", "unigram"])
def test_ids_equal_those_of_transformers(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(f"{name}_folder")
    reference = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == reference.decode(
            ids, skip_special_tokens=True
        )
    assert ours.all_special_ids >= set(reference.all_special_ids)
    assert ours.bos_token_id == reference.bos_token_id
    assert ours.eos_token_id == reference.eos_token_id
    assert ours.vocab_size == len(reference)


def test_start_does_not_import_transformers(chatml_folder: Path) -> None:
    code = (
        "import sys; from sensorium.text.tokenizer import Tokenizer; "
        f"Tokenizer.from_folder({str(chatml_folder)!r}).encode('a'); "
        "assert 'transformers' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens_of_the_configuration_are_added(tmp_path: Path, chatml: Tokenizer) -> None:
    top = chatml.max_token_id
    chatml.backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "added_tokens_decoder": {
            str(top + 2): {"content": "<b>", "special": False},
            str(top + 1): {"content": "<a>", "special": True},
        },
        "extra_special_tokens": ["<tool_call>"],
        "image_token": "<|image_pad|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<a><b>") == [top + 1, top + 2]
    assert tokenizer.is_special(top + 1)
    assert not tokenizer.is_special(top + 2)
    assert tokenizer.is_special(tokenizer.token_id("<tool_call>"))
    assert tokenizer.special_tokens["image_token"] == "<|image_pad|>"
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tmp_path)
    assert reference("x <a><b><tool_call>")["input_ids"] == tokenizer.encode("x <a><b><tool_call>")


def test_eos_ids_come_from_all_files(chatml: Tokenizer, tmp_path: Path) -> None:
    end, stop = chatml.token_id("<|im_end|>"), chatml.token_id("<|endoftext|>")
    assert chatml.eos_token_ids == (end, stop)
    chatml.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": stop}}))
    assert Tokenizer.from_folder(tmp_path, eos_token_ids=[7]).eos_token_ids == (7, stop)


def test_prefix_and_suffix(llama: Tokenizer, chatml: Tokenizer) -> None:
    assert (llama.prefix_ids, llama.suffix_ids) == ((llama.bos_token_id,), ())
    assert (chatml.prefix_ids, chatml.suffix_ids) == ((), ())


def test_typed_tokens_are_plain_text_when_not_allowed(any_tokenizer: Tokenizer) -> None:
    control = set(any_tokenizer.control.spellings)
    ids_of = {any_tokenizer.token_id(text) for text in control}
    text = "a " + " b ".join(sorted(control)) + " c"
    assert ids_of <= set(any_tokenizer.encode(text))
    plain = any_tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    unknown = any_tokenizer.token_id("<unk>")
    assert ids_of.isdisjoint(set(plain) - {unknown})
    if unknown is None:
        assert any_tokenizer.decode(plain) == text


@given(st.lists(st.sampled_from(["<|im_", "start|>", "<|im_start|>", " a", "é", "\n", "<", "|>"])))
def test_plain_encoding_loses_nothing(chatml: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = chatml.encode(text, allow_special=False)
    assert chatml.all_special_ids.isdisjoint(ids)
    assert chatml.decode(ids) == text


@given(st.text(alphabet="ab é\n.", max_size=30))
def test_texts_without_control_tokens_encode_alike(llama: Tokenizer, text: str) -> None:
    assert llama.inert.encode_plain(text) == llama.encode(text, add_special_tokens=False)
    assert llama.encode(text, allow_special=False) == llama.encode(text)


def test_markup_and_blanks_stay_tokens(chatml: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(chatml.backend.to_str())
    backend.add_tokens(["<table>", "\n\n", "<think>"])
    tokenizer = Tokenizer(backend)
    table, lines, think = (tokenizer.token_id(t) for t in ("<table>", "\n\n", "<think>"))
    ids = tokenizer.encode("<think>\n\n<table>", allow_special=False)
    assert table in ids
    assert lines in ids
    assert think not in ids


@pytest.mark.parametrize("bad", [-1, 1 << 40, True, "5", 1.0])
def test_ids_outside_the_vocabulary(chatml: Tokenizer, bad: object) -> None:
    with pytest.raises(InvalidRequestError):
        chatml.decode([bad])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError):
        chatml.token_text(bad)  # type: ignore[arg-type]


def test_lone_surrogates_are_refused(chatml: Tokenizer) -> None:
    for allow in (True, False):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            chatml.encode("a\ud800b<|im_end|>", allow_special=allow)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) not in str(caught.value)
