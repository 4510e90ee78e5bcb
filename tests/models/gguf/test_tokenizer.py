"""Vocabularies of GGUF files, beside the tokenizers that transformers makes of the same files."""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType

from sensorium.errors import ConfigError
from sensorium.models.gguf import reader
from sensorium.models.gguf import tokenizer as tokenizer_module
from sensorium.models.gguf.tokenizer import PATTERNS, files_of, templates_of
from tests.checkpoints import SENTENCES
from tests.models.gguf.raw import Raw, array, string, value

TEXTS = (
    *SENTENCES,
    "  two spaces",
    "it's 12345 o'clock\n\n\tNOW",
    "été <s> <end_of_turn>hi",
    "cafe\u0301s",
    "",
)
PIECES = (
    *("▁", "e", "t", "a", "o", "n", "i", "s", "r", "h", "l", "d", "u", "c", "m", "w", "y", "p"),
    *("▁t", "he", "▁the", "in", "▁a", "er", "▁in", "ing", "▁s", "on", "▁o", "re", "▁re", "red"),
)


RUNS = ("  ", "   ")


def write_spm(path: Path, architecture: str, runs: int = TokenType.NORMAL, **flags: bool) -> Path:
    """A SentencePiece vocabulary: special tokens, bytes, pieces with falling scores."""
    special = ["<unk>", "<s>", "</s>", "<end_of_turn>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *RUNS, "<think>"]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 3, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * len(PIECES) + [runs] * len(RUNS) + [TokenType.USER_DEFINED]
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-place) for place in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, flag in flags.items():
        getattr(writer, name)(flag)
    writer.add_chat_template(
        [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    )
    writer.add_tensor("a.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ids_of(path: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer, _, _ = files_of(reader.read(path))
    return [tokenizer.encode(text).ids for text in texts]


def of_transformers(path: Path, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_sentencepiece(tmp_path: Path, architecture: str) -> None:
    flags = {"add_add_space_prefix": False} if architecture == "gemma2" else {}
    path = write_spm(tmp_path / "model.gguf", architecture, **flags)
    texts = [text for text in TEXTS if text and "<s>" not in text]
    if architecture == "llama":  # transformers adds no prefix before a space, llama.cpp does
        texts = [text for text in texts if text[0] != " "]
    found, expected = ids_of(path, texts), of_transformers(path, texts)
    assert found == expected
    tokenizer, config, ends = files_of(reader.read(path))
    for text, ids in zip(texts, found, strict=True):
        assert ids[0] == 1
        assert tokenizer.decode(ids[1:]) == text
    assert config["bos_token"] == "<s>"
    assert ends == [2, 3]
    assert tokenizer.encode("<think>", add_special_tokens=False).ids[-1] == 4 + 256 + len(
        PIECES
    ) + len(RUNS)
    assert templates_of(reader.read(path)) == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def write_bytes_vocabulary(path: Path, pre: str, **changes: Any) -> Path:
    """A byte-level vocabulary with a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges = ["h e", "Ġ t", "Ġt he", "t he", "i n", "1 2", "Ġ 1", "e r", "o n"]
    tokens = ["<|endoftext|>", *alphabet, *(text.replace(" ", "") for text in merges), "<tool>"]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(changes.get("tokens", tokens))
    types = [TokenType.CONTROL, *[TokenType.NORMAL] * (len(tokens) - 2), TokenType.USER_DEFINED]
    writer.add_token_types(changes.get("types", types))
    writer.add_token_merges(changes.get("merges", merges))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(changes.get("eos", 0))
    writer.add_tensor("a.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "tekken", "gpt-4o", "gpt-2"])
def test_patterns_split_as_those_of_transformers(tmp_path: Path, pre: str) -> None:
    path = write_bytes_vocabulary(tmp_path / "model.gguf", pre)
    own = ids_of(path, TEXTS)
    if pre in ("llama-bpe", "tekken"):  # these begin with BOS; transformers asks the file alone
        assert {ids[0] for ids in own} == {0}
        own = [ids[1:] for ids in own]
    texts = [unicodedata.normalize("NFC", text) if pre == "qwen2" else text for text in TEXTS]
    assert own == of_transformers(path, texts)


def test_smollm_splits_digits(tmp_path: Path) -> None:
    tokenizer, _, _ = files_of(
        reader.read(write_bytes_vocabulary(tmp_path / "model.gguf", "smollm"))
    )
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 123 b's\n\n c")]
    assert pieces == ["a", "Ġ", "1", "2", "3", "Ġb", "'s", "ĊĊ", "Ġc"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown pre-tokenizer": ({"pre": "new"}, "'new' does, which is not known"),
    "merges of other tokens": ({"merges": ["zz yy"]}, "inconsistent"),
    "a merge of one": ({"merges": ["the"]}, "no pair of tokens"),
    "fewer tokens than types": ({"tokens": ["a", "b"]}, r"no type .* for each token"),
    "types that are no integers": ({"types": [math.nan] * 267}, r"no type .* for each token"),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_vocabularies_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = dict(WRONG[name][0]), WRONG[name][1]
    path = write_bytes_vocabulary(tmp_path / "model.gguf", changes.pop("pre", "gpt-2"), **changes)
    with pytest.raises(ConfigError, match=message):
        files_of(reader.read(path))


def test_ids_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    path = write_bytes_vocabulary(tmp_path / "model.gguf", "gpt-2", eos=1 << 31)
    _, config, ends = files_of(reader.read(path))
    assert "eos_token" not in config
    assert ends == [0]


def test_tokens_of_one_spelling_stay_apart(tmp_path: Path) -> None:
    tokens = ["<|endoftext|>", *["a"] * 266]
    path = write_bytes_vocabulary(tmp_path / "model.gguf", "gpt-2", tokens=tokens, merges=[])
    tokenizer, _, _ = files_of(reader.read(path))
    assert tokenizer.get_vocab_size() == len(tokens)


def test_a_file_without_vocabulary_is_refused(tmp_path: Path) -> None:
    values = [("tokenizer.ggml.model", value(8, b"\4" + bytes(7) + b"gpt2"))]
    with pytest.raises(ConfigError, match="no vocabulary"):
        files_of(reader.read(Raw(values).write(tmp_path)))


def test_a_kind_that_is_no_text_is_refused(tmp_path: Path) -> None:
    values = [
        ("tokenizer.ggml.model", array(0, 2, bytes(2))),
        ("tokenizer.ggml.tokens", array(8, 1, string("a"))),
    ]
    with pytest.raises(ConfigError, match="inconsistent"):
        files_of(reader.read(Raw(values).write(tmp_path)))


def test_every_pattern_is_one(tmp_path: Path) -> None:
    for pre in PATTERNS:
        path = write_bytes_vocabulary(tmp_path / f"{pre}.gguf", pre)
        tokenizer, _, _ = files_of(reader.read(path))
        for text in TEXTS:
            found = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
            composed = tokenizer.normalizer is not None
            assert found.endswith(unicodedata.normalize("NFC", text) if composed else text)


def test_runs_of_spaces_that_a_model_defined(tmp_path: Path) -> None:
    """Files of Gemma have them with spaces; an id beyond the vocabulary would have no embedding."""
    flags = {"add_add_space_prefix": False}
    path = write_spm(tmp_path / "model.gguf", "gemma2", TokenType.USER_DEFINED, **flags)
    file = reader.read(path)
    tokenizer, _, _ = files_of(file)
    size, text = len(file.metadata["tokenizer.ggml.tokens"]), "a  e   e"
    first_run = file.metadata["tokenizer.ggml.tokens"].index(RUNS[0])
    ids = tokenizer.encode(text).ids
    assert {first_run, first_run + 1} < set(ids)
    assert max(tokenizer.get_vocab(with_added_tokens=True).values()) < size
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.decode(ids[1:]) == text


def test_texts_of_qwen_are_composed(tmp_path: Path) -> None:
    path = write_bytes_vocabulary(tmp_path / "model.gguf", "qwen2")
    composed, decomposed = ids_of(path, ["caf\u00e9", "cafe\u0301"])
    assert composed == decomposed


def test_a_pattern_that_is_guessed_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ids_of(write_bytes_vocabulary(tmp_path / "said.gguf", "gpt-2"), ["a"])
        assert not caplog.text
        ids_of(write_bytes_vocabulary(tmp_path / "guessed.gguf", "default"), ["a"])
    assert "the pattern of gpt-2 is taken" in caplog.text


def test_a_vocabulary_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MOST_CUTS", 10)
    with pytest.raises(ConfigError, match="or too long"):
        files_of(reader.read(write_spm(tmp_path / "model.gguf", "llama")))
