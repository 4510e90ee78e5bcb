"""``tokenizer.json`` and its neighbours of a GGUF file, from the vocabulary in its metadata.

Two kinds of vocabulary are read: byte-level BPE (``gpt2``), whose texts are split by the pattern
that ``tokenizer.ggml.pre`` names, and SentencePiece's BPE (``llama``), whose merges follow from the
scores of its tokens. Source: ``llama-vocab.cpp`` of llama.cpp for names, patterns and defaults; the
``tokenizer.json`` files of these models for the parts that do the same in ``tokenizers``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from sensorium.errors import ConfigError
from sensorium.models.gguf.config import token_ids
from sensorium.models.gguf.reader import GgufFile
from sensorium.models.gguf.tokens import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    tokens_of,
    types_of,
)

logger = logging.getLogger(__name__)

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _ENDINGS + "|" + _WORDS % r"\p{N}{1,3}"
_QWEN2 = _ENDINGS + "|" + _WORDS % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED % ("", "", r"\p{N}")
_GPT4O = _CASED % (_ENDINGS + "?", _ENDINGS + "?", r"\p{N}{1,3}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_COMPOSED = ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan")
"""Pre-tokenizers whose texts are composed first (NFC), as those of Qwen."""
PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(_COMPOSED, (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _GPT2),
    ),
}
"""Patterns that split texts, one after the other, by the name of a pre-tokenizer."""
_BEGINS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Pre-tokenizers whose texts begin with BOS where a file does not say.

They look a whole word up in the vocabulary before they merge it."""
_BY_ARCHITECTURE = {"qwen2": "qwen2", "qwen2vl": "qwen2", "qwen3": "qwen2"}
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>"),
)
"""Control tokens that end an answer whether or not a file names them."""
_MOST_MERGES = 1 << 20
MOST_CUTS = 1 << 23
"""Places where tokens are cut in search of merges; large vocabularies have about 2 million."""
_MOST_SPLITS = 64
"""Longest token, in characters, whose merges are derived from scores."""
_PREFIX = "\u2581"


def files_of(file: GgufFile) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[int]]:
    """Return the tokenizer of a file, its ``tokenizer_config.json``, and ids that end an answer.

    Raises ConfigError for a vocabulary that is of another kind, damaged or inconsistent.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    try:
        tokens = _unique(_spelled(file))
        types = types_of(file, len(tokens))
        ids = token_ids(file)
        if kind == "gpt2":
            tokenizer = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, tokens, types, ids)
        else:
            _bad(file, f"has a tokenizer of the kind {kind!r:.40}; gpt2 and llama are read")
        _add(tokenizer, file, tokens, types, ids)
        begins = _flag(file, "add_bos_token", _begins(file, kind)) and "bos" in ids
        ends = _flag(file, "add_eos_token", False) and "eos" in ids
        _surround(tokenizer, ids, begins, ends)
    except ConfigError:
        raise
    except Exception as error:  # the library raises plain Exception
        _bad(file, f"has a vocabulary that is inconsistent ({error})")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    config |= {names[name]: tokens[ids[name]] for name in names if name in ids}
    config |= {"add_bos_token": begins, "add_eos_token": ends}
    ends_of_answers = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    for place, token in enumerate(tokens):
        if token in END_TEXTS and types[place] in (CONTROL, USER_DEFINED):
            ends_of_answers.append(place)
    return tokenizer, config, list(dict.fromkeys(ends_of_answers))


def templates_of(file: GgufFile) -> dict[str, str]:
    """Return the chat templates of a file by name; ``default`` is the usual one."""
    found: dict[str, str] = {}
    own = file.metadata.get("tokenizer.chat_template")
    if isinstance(own, str) and own:
        found["default"] = own
    names = file.metadata.get("tokenizer.chat_templates")
    for name in names if isinstance(names, list) else ():
        text = file.metadata.get(f"tokenizer.chat_template.{name}")
        if isinstance(text, str) and name.replace("_", "").isalnum() and len(name) <= 64:
            found.setdefault(name, text)
    return found


def _spelled(file: GgufFile) -> list[str]:
    """Return the tokens as texts have them once spaces are replaced."""
    tokens = tokens_of(file)
    if file.metadata.get("tokenizer.ggml.model") != "llama" or not _is_gemma(file):
        return tokens
    # Its tokens of several spaces are stored as such.
    return [_PREFIX * len(t) if len(t) > 1 and not t.strip(" ") else t for t in tokens]


def _is_gemma(file: GgufFile) -> bool:
    return file.architecture.startswith("gemma")


def _unique(tokens: Sequence[str]) -> list[str]:
    """Return the tokens; one that is empty, or spelled as an earlier one, gets another spelling."""
    found: dict[str, int] = {}
    for place, token in enumerate(tokens):
        spelled = token
        while not spelled or spelled in found:
            spelled = f"{spelled}[{place}]"
        found[spelled] = place
    return list(found)


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    pre = _pre(file)
    if pre not in PATTERNS:
        _bad(
            file,
            f"splits texts as {pre!r:.40} does, which is not known; known are "
            f"{', '.join(PATTERNS)}",
        )
    if file.metadata.get("tokenizer.ggml.pre", "default") == "default":
        logger.warning(
            "%s does not say how its tokenizer splits texts (tokenizer.ggml.pre): the pattern of "
            "%s is taken, which may differ from training; a newer conversion says it",
            *(file.path.name, pre),
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    pairs = [_pair(file, text) for text in merges] if isinstance(merges, list) else []
    vocab = {token: place for place, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=pre in _BEGINS)
    tokenizer = tokenizers.Tokenizer(model)
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(text), behavior="isolated") for text in PATTERNS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre(file: GgufFile) -> str:
    """Return the name of the pre-tokenizer; of early files without one, that of the model."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name != "default":
        return str(name)
    if "<|begin_of_text|>" in file.metadata["tokenizer.ggml.tokens"]:
        return "llama-bpe"
    return _BY_ARCHITECTURE.get(file.architecture, "gpt-2")


def _pair(file: GgufFile, text: object) -> tuple[str, str]:
    first, found, second = text.partition(" ") if isinstance(text, str) else ("", "", "")
    if not found or not first or not second or " " in second:
        _bad(file, f"has the merge {text!r:.40}, which is no pair of tokens")
    return first, second


def _sentencepiece(
    file: GgufFile, tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int]
) -> tokenizers.Tokenizer:
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = file.metadata.get("tokenizer.ggml.merges")
    if isinstance(merges, list):
        pairs = [_pair(file, text) for text in merges]
    else:
        in_order = [-place for place in range(len(tokens))]
        ranks = in_order if _is_gemma(file) else _scores(file, len(tokens))
        pairs = _merges(file, vocab, ranks, types)
    unknown = tokens[ids["unknown"]] if "unknown" in ids else None
    if unknown is None:
        unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefixed = _flag(file, "add_space_prefix", True)
    replace = normalizers.Replace(" ", _PREFIX)
    first = [normalizers.Prepend(_PREFIX)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*first, replace])
    parts = [decoders.Replace(_PREFIX, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*parts, *([decoders.Strip(" ", 1, 0)] if prefixed else [])]
    )
    return tokenizer


def _scores(file: GgufFile, size: int) -> list[float]:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != size:
        _bad(file, "has no score (tokenizer.ggml.scores) for each token")
    if not np.isfinite(scores).all():
        _bad(file, "has scores (tokenizer.ggml.scores) that are not finite")
    return [float(value) for value in scores]


def _merges(
    file: GgufFile, vocab: Mapping[str, int], ranks: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Return the merges that scores imply: each token of any two others, the best score first.

    Of equals, the one with the longer first part. Source: the conversion of SentencePiece models in
    ``transformers``.
    """
    found: list[tuple[float, str, str]] = []
    num_cuts = 0
    for token, place in vocab.items():
        if len(token) > _MOST_SPLITS or types[place] in (CONTROL, BYTE, UNKNOWN):
            continue
        num_cuts += len(token) - 1
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in vocab and second in vocab:
                found.append((ranks[place], first, second))
        if len(found) > _MOST_MERGES or num_cuts > MOST_CUTS:
            _bad(file, f"has a vocabulary that takes more than {_MOST_MERGES} merges, or too long")
    found.sort(key=lambda own: (own[0], len(own[1]), len(own[2])), reverse=True)
    return [(first, second) for _, first, second in found]


def _add(
    tokenizer: tokenizers.Tokenizer,
    file: GgufFile,
    tokens: Sequence[str],
    types: Sequence[int],
    ids: Mapping[str, int],
) -> None:
    """Register the tokens that act in a text: control tokens, and those that users defined."""
    # Phi-3's take the white space behind them, as its own tokenizer does.
    strips = file.architecture == "phi3" and file.metadata.get("tokenizer.ggml.model") == "llama"
    kept = ("<s>", "<unk>", "<|endoftext|>")
    special = {place for place, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    special |= set(ids.values())
    plain = [place for place, kind in enumerate(types) if kind == USER_DEFINED]
    ordered = sorted({*special, *plain})
    added = [
        AddedToken(
            tokens[place],
            normalized=False,
            special=place in special,
            rstrip=strips and tokens[place] not in kept,
        )
        for place in ordered
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _begins(file: GgufFile, kind: object) -> bool:
    """Return whether texts begin with BOS where a file does not say."""
    return kind == "llama" or _pre(file) in _BEGINS


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    return value if isinstance(value, bool) else default


def _surround(
    tokenizer: tokenizers.Tokenizer, ids: Mapping[str, int], begins: bool, ends: bool
) -> None:
    """Let the tokenizer put BOS and EOS around a text."""
    around = [(name, ids[name]) for name, used in (("bos", begins), ("eos", ends)) if used]
    if not around:
        return
    first = ["bos"] if begins else []
    last = ["eos"] if ends else []
    tokenizer.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{name}:1" for name in first), "$B:1", *last],
        special_tokens=around,
    )


def _bad(file: GgufFile, reason: str) -> NoReturn:
    raise ConfigError(f"{file.path.name} {reason}.", param="model")
