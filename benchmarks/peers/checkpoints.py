"""Random checkpoints in real shapes, for measurements of speed: no download, no correct answers.

    python -m benchmarks.peers.checkpoints qwen2-0.5b FOLDER
    python -m benchmarks.peers.checkpoints qwen2-vl-2b FOLDER

- qwen2-0.5b: the text model of LLaVA-OneVision-0.5B as a plain Qwen2 checkpoint
- qwen2-vl-2b: the shape of Qwen/Qwen2-VL-2B-Instruct, vision tower and all
- qwen2-vl-shallow: the same with two layers in the tower and two in the text model, so that a
  server's time goes into media and not into the model

A folder gets everything that an engine expects beside the weights: configuration in the spelling of
the published files, tokenizer, chat template, processor and generation settings. The same name and
seed give the same weights.

The tokenizer is a byte-level BPE trained on Python's standard library. The rest of the real
vocabulary is filled with tokens that no merge produces, so that special tokens have their real ids
and every id decodes to some text.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BPE_VOCAB = 16384
CORPUS_BYTES = 12_000_000
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
VISION_SPECIAL = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "size": {"shortest_edge": 3136, "longest_edge": 12845056},
}


@dataclass(frozen=True, slots=True)
class Shape:
    """One checkpoint: the text model's sizes, and the vision tower's when it has one."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int = 151936
    vision: dict[str, int] = field(default_factory=dict)

    def text_config(self) -> dict[str, Any]:
        """As config.json spells it."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": SPECIAL["<|endoftext|>"],
            "eos_token_id": SPECIAL["<|im_end|>"],
        }


_TOWER = {
    "embed_dim": 1280,
    "hidden_size": 1536,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
SHAPES = {
    "qwen2-0.5b": Shape(896, 24, 14, 2, 4864),
    "qwen2-vl-2b": Shape(1536, 28, 12, 2, 8960, vision={"depth": 32, **_TOWER}),
    "qwen2-vl-shallow": Shape(1536, 2, 12, 2, 8960, vision={"depth": 2, **_TOWER}),
}
ROPE_THETA = 1_000_000.0
MROPE_SECTION = [16, 24, 24]


def build(shape: Shape, folder: Path, *, seed: int = 0) -> int:
    """Write a checkpoint of ``shape`` to ``folder``; the number of its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {**SPECIAL, **(VISION_SPECIAL if shape.vision else {})}
    _write_tokenizer(folder, special, vision=bool(shape.vision))
    num_parameters = _write_weights(shape, folder, seed)
    _write_config(shape, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    if shape.vision:
        processor = {"processor_class": "Qwen2VLProcessor"}
        image = {"image_processor_type": "Qwen2VLImageProcessor", **IMAGE_PROCESSOR, **processor}
        video = {"video_processor_type": "Qwen2VLVideoProcessor", **IMAGE_PROCESSOR, **processor}
        _dump(folder / "preprocessor_config.json", image)
        _dump(folder / "video_preprocessor_config.json", video)
    return num_parameters


def _write_weights(shape: Shape, folder: Path, seed: int) -> int:
    import torch
    import transformers

    if shape.vision:
        rope = {"rope_type": "default", "mrope_section": MROPE_SECTION, "rope_theta": ROPE_THETA}
        config = transformers.Qwen2VLConfig(
            text_config={**shape.text_config(), "rope_parameters": rope},
            vision_config=dict(shape.vision),
            image_token_id=VISION_SPECIAL["<|image_pad|>"],
            video_token_id=VISION_SPECIAL["<|video_pad|>"],
            vision_start_token_id=VISION_SPECIAL["<|vision_start|>"],
            vision_end_token_id=VISION_SPECIAL["<|vision_end|>"],
            tie_word_embeddings=True,
        )
        kind: Any = transformers.Qwen2VLForConditionalGeneration
    else:
        config = transformers.Qwen2Config(**shape.text_config(), rope_theta=ROPE_THETA)
        kind = transformers.Qwen2ForCausalLM
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = kind(config).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=SPECIAL["<|endoftext|>"],
        pad_token_id=SPECIAL["<|endoftext|>"],
        eos_token_id=[SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]],
        do_sample=False,
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _write_config(shape: Shape, folder: Path) -> None:
    """config.json in the published spelling, which old and new readers take."""
    config: dict[str, Any] = {
        "rope_theta": ROPE_THETA,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **shape.text_config(),
    }
    if shape.vision:
        config |= {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
            "image_token_id": VISION_SPECIAL["<|image_pad|>"],
            "video_token_id": VISION_SPECIAL["<|video_pad|>"],
            "vision_token_id": VISION_SPECIAL["<|vision_pad|>"],
            "vision_start_token_id": VISION_SPECIAL["<|vision_start|>"],
            "vision_end_token_id": VISION_SPECIAL["<|vision_end|>"],
            "vision_config": {
                "model_type": "qwen2_vl",
                "in_chans": shape.vision["in_channels"],
                "spatial_patch_size": shape.vision["patch_size"],
                "hidden_act": "quick_gelu",
                **shape.vision,
            },
        }
    else:
        config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    _dump(folder / "config.json", config)


def _write_tokenizer(folder: Path, special: dict[str, int], *, vision: bool) -> None:
    from tokenizers import AddedToken, Tokenizer

    trained = json.loads(_trained_tokenizer().to_str())
    vocab = trained["model"]["vocab"]
    first = min(special.values())
    vocab.update({f"\u0120f{index}": index for index in range(len(vocab), first)})
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    names = {index: name for name, index in special.items()}
    for index in range(first, max(special.values()) + 1):
        name = names.get(index, f"<|extra_{index}|>")
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    wrong = {name for name, index in special.items() if tokenizer.token_to_id(name) != index}
    if wrong:
        raise RuntimeError(f"special tokens got other ids than they should: {sorted(wrong)}")
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(folder / "vocab.json", vocab)
    merges = [m if isinstance(m, str) else " ".join(m) for m in trained["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
        "split_special_tokens": False,
    }
    if vision:
        config["processor_class"] = "Qwen2VLProcessor"
    _dump(folder / "tokenizer_config.json", config)


def _trained_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _corpus() -> Iterator[str]:
    """Source files of Python's standard library in a fixed order."""
    num_bytes = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test"} & set(path.parts):
            continue
        text = path.read_text("utf-8", "ignore")
        num_bytes += len(text)
        yield text
        if num_bytes > CORPUS_BYTES:
            return


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_parameters = build(SHAPES[arguments.name], arguments.folder, seed=arguments.seed)
    print(f"{arguments.folder}: {num_parameters:,} parameters")


if __name__ == "__main__":
    main()
