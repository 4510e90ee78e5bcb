"""The demo model's tokenizer: byte level, whole tokens for the words of questions and answers.

It has no merges. A word of the vocabulary is one token, everything else falls apart into single
bytes. So the words that the model reads in images are always spelled letter by letter, and any
UTF-8 text survives encoding and decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from training.clip_wording import CLIP_ANSWERS, CLIP_QUESTIONS
from training.palette import COLOURS, SHAPES
from training.wording import GREETING, IDENTITY, NO_PICTURE, QUESTIONS, SMALL_TALK

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SYSTEM = "You are a helpful assistant."
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
#: How text is cut before words are looked up: letters with the blank before them, single digits.
PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
#: Further words that users may write; most for questions about videos and sounds.
_MORE = """
    system user assistant You are a helpful assistant Answer in one word briefly Be brief yes no
    none nothing and an the with chart bar bars word number left right above below top bottom
    upper lower middle center half side picture image photo drawing video clip sound Picture
    first second third before after moves moving move fast slow up down stops starts turns
    direction motion speaker says said spoken tone tones high low higher longer shorter loud
    please can could would should tell me about it is are was were there this that these those
    many much different same both together how what which where when who why does do did of on at
    to from for by not or more than less most least any some all object objects thing things
    shape shapes color colors colour colours text letters digits digit letter written read see
    show shown shows look describe list name count big small large tiny tall short wide between
    next grey rectangle line point background dark light bright
"""
CHAT_TEMPLATE = (
    # Open WebUI lists the files of a message before its text; the message has the images anyway.
    "{% macro said(text) %}"
    "{% set around = text.split('<attached_files>') if '</attached_files>' in text else [text] %}"
    "{{ around[0] }}"
    "{% for more in around[1:] %}{{ more.split('</attached_files>')[-1].lstrip() }}{% endfor %}"
    "{% endmacro %}"
    "{% set images = namespace(n=0) %}{% set videos = namespace(n=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ said(message['content']) }}{% else %}"
    # Images and videos come before the words, as in training, wherever they stand.
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set images.n = images.n + 1 %}"
    "{% if add_vision_id %}Picture {{ images.n }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{% set videos.n = videos.n + 1 %}"
    "{% if add_vision_id %}Video {{ videos.n }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if 'text' in part %}{{ said(part['text']) }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level vocabularies, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for extra, byte in enumerate(b for b in range(256) if b not in characters):
        characters[byte] = chr(256 + extra)
    return [characters[byte] for byte in range(256)]


@dataclass(frozen=True)
class Lexicon:
    """What distinguishes one demo model's tokenizer from another's."""

    words: list[str]
    special: tuple[str, ...]
    template: str
    bos: str | None
    eos: str
    pad: str


def words_in(texts: Iterable[str]) -> list[str]:
    """All words that become one token, each without and with the blank before it, sorted."""
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    words |= {word.lower() for word in words} | {word.capitalize() for word in words}
    words = {word for word in words if len(word) > 1}
    return sorted(words | {" " + word for word in words} | {" a", " A", " I"})


def picture_lexicon() -> Lexicon:
    """Words, special tokens and chat template of the demo model for images and videos."""
    texts = [x.format(x=" ", y=" ") for xs in QUESTIONS.values() for x in xs]
    texts += [text for group, _ in SMALL_TALK for text in group]
    texts += [answer for _, answer in SMALL_TALK] + [GREETING, IDENTITY, NO_PICTURE, SYSTEM, _MORE]
    texts += [x.format(x=" ") for xs in CLIP_QUESTIONS.values() for x in xs] + list(CLIP_ANSWERS)
    texts += list(COLOURS) + list(SHAPES) + [s + "s" for s in SHAPES] + ["crosses"]
    return Lexicon(words_in(texts), SPECIAL, CHAT_TEMPLATE, None, "<|im_end|>", "<|endoftext|>")


def build_tokenizer(lexicon: Lexicon | None = None) -> Tokenizer:
    """The tokenizer: 256 bytes, then whole words, then the special tokens.

    ``lexicon`` is that of images and videos by default.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    lexicon = lexicon or picture_lexicon()
    characters = byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    for word in lexicon.words:
        token = "".join(characters[byte] for byte in word.encode())
        vocabulary.setdefault(token, len(vocabulary))
    assert not any(mark in vocabulary for mark in lexicon.special)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in lexicon.special]
    )
    return tokenizer


def save_tokenizer(folder: Path, lexicon: Lexicon | None = None) -> Tokenizer:
    """Write tokenizer.json, tokenizer_config.json and the chat template into ``folder``."""
    lexicon = lexicon or picture_lexicon()
    tokenizer = build_tokenizer(lexicon)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in lexicon.special}
    others = [text for text in lexicon.special if text not in (lexicon.bos, lexicon.pad)]
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
                     "single_word": False, "special": True}
            for text, i in ids.items()
        },
        "additional_special_tokens": others,
        "bos_token": lexicon.bos,
        "chat_template": lexicon.template,
        "clean_up_tokenization_spaces": False,
        "eos_token": lexicon.eos,
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": lexicon.pad,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }  # fmt: skip
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = json.dumps({"chat_template": lexicon.template}, indent=2) + "\n"
    (folder / "chat_template.json").write_text(template, encoding="utf-8")
    return tokenizer


def random_text(rng: Random, length: int) -> str:
    """``length`` arbitrary characters, to check that no text is lost."""
    return "".join(chr(rng.choice((rng.randint(32, 126), rng.randint(160, 50000))))
                   for _ in range(length))  # fmt: skip
