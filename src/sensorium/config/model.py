"""Options of the model and of how it is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sensorium.config.fields import bad, check_choice, check_fields, check_non_empty, option

Dtype = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]
"""half is float16 and float is float32."""
_DTYPES = {"half": "float16", "float": "float32"}
LoadFormat = Literal["auto", "safetensors", "dummy"]
Runner = Literal["auto", "generate", "pooling"]
Convert = Literal["auto", "none", "embed"]
ContentFormat = Literal["auto", "string", "openai"]
WeightFormat = Literal["none", "int8", "int4"]
"""int8: per output; int4: in groups of 32 inputs."""
PUBLISHED_METHODS = (
    *("awq", "awq_marlin", "gptq", "gptq_marlin", "compressed-tensors", "fp8", "fbgemm_fp8"),
    *("modelopt", "bitsandbytes", "mlx", "gguf"),
)
"""Methods of published checkpoints, as vLLM names them: accepted where they are a checkpoint's."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, and how it is loaded."""

    model: str = option(
        "demo",
        "Hugging Face id, local folder, GGUF file (also of a repository: id:file.gguf), or 'demo'.",
    )
    mmproj: str | None = option(
        None,
        "GGUF file of the vision encoder, for a model that is a GGUF file (Qwen2-VL, LLaVA-1.5, "
        "SmolVLM).",
    )
    tokenizer: str | None = option(None, "Id or folder of the tokenizer, if not the model's.")
    trust_remote_code: bool = option(
        False, "Accepted for compatibility; no code from a checkpoint is ever executed."
    )
    dtype: Dtype = option(
        "auto",
        "Data type of weights and activations. auto: the checkpoint's. A CPU that does not "
        "multiply its 16-bit type widens the weights as it reads them; where no kernel does so, "
        "auto is float32 if the memory suffices.",
    )
    device: str = option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one.")
    seed: int = option(
        0, "Seed of dummy weights and of unseeded sampling.", ge=-(1 << 63), le=(1 << 64) - 1
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the model on the Hugging Face hub."
    )
    download_dir: str | None = option(
        None, "Folder for downloads from the hub; the hub's cache (HF_HUB_CACHE) if unset."
    )
    load_format: LoadFormat = option("auto", "dummy: random weights of the right shapes.")
    hf_overrides: dict[str, Any] = option(
        dict, "Values that override those of config.json.", factory=True
    )
    generation_config: str = option(
        "auto",
        "Source of the default sampling parameters. auto: the model's generation_config.json; "
        "vllm: none; or a folder with such a file.",
    )
    override_generation_config: dict[str, Any] = option(
        dict,
        'Default sampling parameters that override that file, such as {"temperature": 0.5}.',
        factory=True,
    )
    max_model_len: int | None = option(
        None,
        "Maximum number of tokens of prompt and output together; the model's own if unset.",
        ge=1,
        le=1 << 31,
    )
    quantization: str | None = option(
        None,
        "Format in which the decoder's linear layers are held: int8 per output, or int4 in groups "
        "of 32 inputs. The weights are quantized while they are loaded, on x86 CPUs with AVX2 "
        "alone. none: the data type of --dtype, also for checkpoints that are published quantized. "
        "Unset: --dtype for plain checkpoints; published ones stay as they are where the CPU has "
        "products for them. The method of a published checkpoint, such as awq, says the same as "
        "unset.",
    )
    quantization_towers: Literal["none", "int8", "int4"] = option(
        "none", "The same for the encoders of images, videos and audio, and their projectors."
    )
    quantization_head: Literal["auto", "none", "int8", "int4"] = option(
        "auto",
        "The same for the language-model head and the token embedding. auto: int8 with "
        "--quantization, else none.",
    )
    weights_cache: str = option(
        "auto",
        "Folder in which quantized weights are kept for the next start. auto: in the cache folder "
        "of the user, from 32 MiB on; off: nowhere.",
    )
    weights_cache_gb: float = option(
        16.0,
        "Size of that folder in GiB; what was used least recently makes room. 0: off.",
        ge=0,
        le=1 << 20,
    )
    batch_invariant: bool | None = option(
        None,
        "Make tokens and log probabilities of a request bitwise independent of the rest of the "
        "batch, of prompt chunks and of caches. If unset: on where its cost is negligible, which "
        "is everywhere except on GPUs.",
    )
    enforce_eager: bool = option(
        False,
        "Run decode steps kernel by kernel; otherwise small ones are captured and replayed.",
    )
    num_threads: int | None = option(
        None,
        "Number of CPU threads of the engine; if unset one for each physical core that this "
        "process may use, within its quota and one memory node, or one for a very small decoder; "
        "fewer while other processes take the cores.",
        ge=1,
        le=1024,
    )
    runner: Runner = option(
        "auto",
        "generate: text; pooling: embeddings; auto: generate unless the checkpoint is an embedding "
        "model.",
    )
    convert: Convert = option(
        "auto",
        "Conversion of the model for its runner. embed: embeddings from the hidden states of any "
        "model.",
    )
    task: str | None = option(None, "Deprecated, use --runner: generate or embed.")
    chat_template: str | None = option(None, "Chat template: a file, or the text of a template.")
    chat_template_content_format: ContentFormat = option(
        "auto",
        "Form in which the template takes the content of a message: string, or a list of parts "
        "(openai).",
    )
    interleave_mm_strings: bool = option(
        True,
        "For templates that take content as a string: keep placeholders where the media are in the "
        "message; off puts them before the text.",
    )

    def __post_init__(self) -> None:
        """Check the values, and resolve aliases. Raises ConfigError."""
        check_fields(self)
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
        self._check_quantization()
        check_non_empty("weights_cache", self.weights_cache)
        if self.task is not None:
            check_choice("task", self.task, ("generate", "embed", "embedding"))
            meant = "generate" if self.task == "generate" else "pooling"
            if self.runner not in ("auto", meant):
                bad("task", f"{self.task!r} does not go with runner={self.runner!r}")
            object.__setattr__(self, "runner", meant)
        if self.convert == "embed":
            if self.runner == "generate":
                bad("convert", "'embed' makes embeddings: it does not go with runner='generate'")
            object.__setattr__(self, "runner", "pooling")
        check_non_empty("generation_config", self.generation_config)

    @property
    def weight_format(self) -> WeightFormat | None:
        """Format that ``quantization`` asks for; None for weights as they are stored."""
        named = (name for name in get_args(WeightFormat) if name == self.quantization)
        return next(named, None)

    def _check_quantization(self) -> None:
        formats = get_args(WeightFormat)
        if self.quantization not in (None, *formats, *PUBLISHED_METHODS):
            bad(
                "quantization",
                f"must be one of {', '.join(formats)}, got {self.quantization!r}: checkpoints that "
                "are published quantized need no option",
            )
        check_choice("quantization_towers", self.quantization_towers, formats)
        check_choice("quantization_head", self.quantization_head, ("auto", *formats))

    def deprecations(self) -> list[str]:
        """Return a warning for each deprecated option that is set."""
        if self.task is None:
            return []
        return ["task is deprecated: use runner='generate' or runner='pooling'"]


@dataclass(frozen=True, kw_only=True)
class DeprecatedConfig:
    """Deprecated options that describe the model: checked against it, otherwise unused."""

    image_input_type: str | None = option(
        None, "Deprecated: pixel_values or image_features; checked, otherwise unused."
    )
    image_token_id: int | None = option(
        None,
        "Deprecated: id of the image token; checked against the model, otherwise unused.",
        ge=0,
        le=1 << 31,
    )
    image_input_shape: str | None = option(
        None, "Deprecated: such as 1,3,336,336; checked against the model, otherwise unused."
    )
    image_feature_size: int | None = option(
        None,
        "Deprecated: embeddings per image; checked against the model, otherwise unused.",
        ge=0,
        le=1 << 31,
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        if isinstance(self.image_input_shape, list | tuple):
            text = ",".join(map(str, self.image_input_shape))
            object.__setattr__(self, "image_input_shape", text)
        check_fields(self)
        if self.image_input_type is not None:
            kinds = ("pixel_values", "image_features")
            check_choice("image_input_type", self.image_input_type.lower(), kinds)
        if self.image_input_shape is not None:
            self.shape()

    def deprecations(self) -> list[str]:
        """Return a warning for each option that is set."""
        what = "is deprecated: the model's configuration has it, leave it out"
        return [f"{name} {what}" for name in self.given()]

    def given(self) -> list[str]:
        """Return the names of the options that are set."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def shape(self) -> tuple[int, ...]:
        """Return ``image_input_shape`` as numbers. Raises ConfigError."""
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
