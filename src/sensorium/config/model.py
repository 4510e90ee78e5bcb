"""Which model, and how it is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sensorium.config.fields import (
    bad,
    check_choice,
    check_integer,
    check_non_empty,
    check_types,
    option,
)

Dtype = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]
"""half is float16 and float is float32."""
_DTYPES = {"half": "float16", "float": "float32"}
LoadFormat = Literal["auto", "safetensors", "dummy"]
Runner = Literal["auto", "generate", "pooling"]
Convert = Literal["auto", "none", "embed"]
ContentFormat = Literal["auto", "string", "openai"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: str = option("demo", "Hugging Face id, local folder, or 'demo'.")
    tokenizer: str | None = option(None, "Tokenizer id or folder, when not the model's.")
    trust_remote_code: bool = option(
        False, "Accepted for compatibility; no code from a checkpoint is ever executed."
    )
    dtype: Dtype = option(
        "auto",
        "Type of weights and activations; auto takes the checkpoint's, or float32 in place of a 16-bit type that the "
        "CPU has no units for, where the memory allows it.",
    )
    device: str = option("auto", "cpu, cuda, cuda:N, or auto: a GPU when there is one.")
    seed: int = option(0, "Seed of random weights and of unseeded sampling.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    download_dir: str | None = option(
        None, "Folder for downloads from the hub; its own cache (HF_HUB_CACHE) when not given."
    )
    load_format: LoadFormat = option("auto", "dummy makes random weights in the right shapes.")
    hf_overrides: dict[str, Any] = option(
        dict, "Values that replace those of config.json.", factory=True
    )
    generation_config: str = option(
        "auto",
        "Where the model's defaults of sampling come from: auto is its own generation_config.json, vllm none, or a "
        "folder with such a file.",
    )
    override_generation_config: dict[str, Any] = option(
        dict,
        'Defaults of sampling that win over that file, such as {"temperature": 0.5}.',
        factory=True,
    )
    max_model_len: int | None = option(
        None, "Longest prompt and answer together, in tokens; the model's own when not given."
    )
    quantization: str | None = option(None, "No quantization method is available yet: leave unset.")
    batch_invariant: bool | None = option(
        None,
        "Give a request the same tokens and log-probabilities, to the bit, whatever else is in the batch, however its "
        "prompt is cut and whatever of it comes from caches. When not given: on where it costs nothing to speak of, "
        "which is everywhere but on GPUs and, with bf16, on CPUs with matrix tiles (AMX).",
    )
    enforce_eager: bool = option(False, "Accepted for compatibility: no graphs are captured.")
    num_threads: int | None = option(
        None,
        "CPU threads of the engine; when not given all cores, or one for a very small decoder.",
    )
    runner: Runner = option(
        "auto",
        "generate makes text, pooling makes vectors; auto is generate unless the checkpoint is an embedding model.",
    )
    convert: Convert = option(
        "auto",
        "How a model is adapted for its runner; embed makes vectors of any model's hidden states.",
    )
    task: str | None = option(None, "Older spelling of the choice of runner: generate or embed.")
    chat_template: str | None = option(None, "Chat template: a file, or the template's text.")
    chat_template_content_format: ContentFormat = option(
        "auto", "Whether the template takes content as a string or as parts (openai)."
    )
    interleave_mm_strings: bool = option(
        True,
        "With templates that take content as a string: placeholders stand where the parts stand; off puts them in "
        "front of the texts.",
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_non_empty("model", self.model)
        check_choice("dtype", self.dtype, get_args(Dtype))
        object.__setattr__(self, "dtype", _DTYPES.get(self.dtype, self.dtype))
        check_choice("load_format", self.load_format, get_args(LoadFormat))
        check_choice("runner", self.runner, get_args(Runner))
        check_choice("convert", self.convert, get_args(Convert))
        check_choice(
            "chat_template_content_format",
            self.chat_template_content_format,
            get_args(ContentFormat),
        )
        check_integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, 1, 1 << 31)
        if self.num_threads is not None:
            check_integer("num_threads", self.num_threads, 1, 1024)
        if self.quantization is not None:
            bad("quantization", f"{self.quantization!r} is not available; leave it unset")
        if self.task is not None:
            check_choice("task", self.task, ("generate", "embed", "embedding"))
            meant = "generate" if self.task == "generate" else "pooling"
            if self.runner not in ("auto", meant):
                bad("task", f"{self.task!r} does not go with runner={self.runner!r}")
            object.__setattr__(self, "runner", meant)
        if self.convert == "embed":
            if self.runner == "generate":
                bad("convert", "'embed' makes vectors: it does not go with runner='generate'")
            object.__setattr__(self, "runner", "pooling")
        check_non_empty("generation_config", self.generation_config)
        for name in ("hf_overrides", "override_generation_config"):
            if not isinstance(getattr(self, name), dict):
                bad(name, f"must be a mapping, got {getattr(self, name)!r}")

    def deprecations(self) -> list[str]:
        """Return what to say of older spellings that are used."""
        if self.task is None:
            return []
        return ["task is the older spelling: use runner='generate' or runner='pooling'"]


@dataclass(frozen=True, kw_only=True)
class OlderConfig:
    """Spellings of the field's early days: checked against the model, which knows them itself, and then unused."""

    image_input_type: str | None = option(
        None, "Older: pixel_values or image_features; checked, then unused."
    )
    image_token_id: int | None = option(
        None, "Older: id of the image token; checked against the model, then unused."
    )
    image_input_shape: str | None = option(
        None, "Older: such as 1,3,336,336; checked against the model, then unused."
    )
    image_feature_size: int | None = option(
        None, "Older: embeddings per image; checked against the model, then unused."
    )

    def __post_init__(self) -> None:
        if isinstance(self.image_input_shape, list | tuple):
            text = ",".join(map(str, self.image_input_shape))
            object.__setattr__(self, "image_input_shape", text)
        check_types(self)
        if self.image_input_type is not None:
            kinds = ("pixel_values", "image_features")
            check_choice("image_input_type", self.image_input_type.lower(), kinds)
        for name in ("image_token_id", "image_feature_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, 1 << 31)
        if self.image_input_shape is not None:
            self.shape()

    def deprecations(self) -> list[str]:
        """Return what to say of those that are set."""
        what = "is an older spelling: the model's own configuration says it, leave it out"
        return [f"{name} {what}" for name in self.given()]

    def given(self) -> list[str]:
        """Names of those that are set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def shape(self) -> tuple[int, ...]:
        """``image_input_shape`` in numbers. Raises ConfigError."""
        text = self.image_input_shape or ""
        parts = [part.strip() for part in text.strip("()[]").split(",")]
        if len(parts) not in (3, 4) or not all(
            p.isdecimal() and 0 < int(p) < 1 << 16 for p in parts
        ):
            bad(
                "image_input_shape",
                f"must be three or four sizes such as 1,3,336,336, got {text!r}",
            )
        return tuple(map(int, parts))
