"""Small tokenizers of the three kinds in the field, as model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sensorium.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "What is shown in the picture? A red circle and two blue squares.",
    "user assistant system tool start end image You are a helpful assistant.",
    "Grüße aus Köln: 12 Äpfel, 3 Birnen; naïve café déjà vu.",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
] * 3

CHATML_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHATML_TEMPLATE = r"""{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.name %} {{ message.name }}{% endif %}{{ '\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' or 'image_url' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TURNS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[INST] ' if m.role == 'user' else '' }}"
    "{{ m.content | trim }}{{ ' [/INST]' if m.role == 'user' else ' ' + eos_token }}{% endfor %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Like Qwen2: byte-level BPE without BOS, special tokens, and two added tokens that are not
    special.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in CHATML_SPECIALS]
    )
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>")]
    )
    return tokenizer


def byte_fallback(*, legacy: bool = False) -> tokenizers.Tokenizer:
    """Like Llama 2: BPE on ``▁`` with byte fallback and a BOS.

    ``legacy`` prepends to every stretch of text.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", "<image>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in specials]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Like T5 or XLM-R: Unigram on ``▁``, whose base vocabulary spells ``</s>`` and ``<image>``
    itself.
    """
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )
    trained.train_from_iterator(CORPUS, trainer)
    pieces = [tuple(p) for p in json.loads(trained.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in pieces}
    pieces += [(c, -8.0) for c in "<>|/_[]INST" if c not in known]
    pieces += [("</s>", -1.0), ("<image>", -1.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<image>"])
    return tokenizer


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], **files: Any) -> Path:
    """A model folder with a tokenizer; ``files`` are further JSON files by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for stem, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Qwen2-VL's."""
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML_TEMPLATE,
    }
    ends = [len(byte_level().get_vocab()) - 9 + i for i in (2, 0)]
    return save(
        tmp_path_factory.mktemp("chatml"),
        byte_level(),
        {**config, "tokenizer_class": "PreTrainedTokenizerFast"},
        generation_config={"eos_token_id": ends},
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a Llama tokenizer, with BOS."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": TURNS_TEMPLATE,
    }
    return save(tmp_path_factory.mktemp("llama"), byte_fallback(), config)


@pytest.fixture(scope="session")
def legacy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the normalizer of the first published Llama tokenizers."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TURNS_TEMPLATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return save(tmp_path_factory.mktemp("legacy"), byte_fallback(legacy=True), config)


@pytest.fixture(scope="session")
def unigram_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Unigram tokenizer."""
    config = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return save(tmp_path_factory.mktemp("unigram"), unigram(), config)


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(chatml_folder)


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(llama_folder)


@pytest.fixture(scope="session")
def legacy(legacy_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(legacy_folder)


@pytest.fixture(scope="session")
def unigram_tokenizer(unigram_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(unigram_folder)


@pytest.fixture(scope="session", params=["chatml", "llama", "legacy", "unigram_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return request.getfixturevalue(request.param)
