"""Every other model of transformers: its modelling code and processor, with our paged attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sensorium.errors import UnsupportedModelError
from sensorium.models.families.hf import processing
from sensorium.models.families.hf.config import ENCODER_DECODER, known_architectures, text_shape
from sensorium.models.interface import BuildOptions, Family, LoadableModel, LoadedConfig
from sensorium.multimodal.items import Modality
from sensorium.multimodal.processor import Processor

EXAMPLES: tuple[tuple[str, str, str, tuple[Modality, ...]], ...] = (
    ("Gemma 3", "google/gemma-3-4b-it", "Gemma3ForConditionalGeneration", ("image",)),
    ("InternVL 3", "OpenGVLab/InternVL3-1B-hf", "InternVLForConditionalGeneration", ("image",)),
    ("PaliGemma", "google/paligemma-3b-mix-224", "PaliGemmaForConditionalGeneration", ("image",)),
    (
        "Idefics3",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "Idefics3ForConditionalGeneration",
        ("image",),
    ),
    ("GLM-4.1V", "zai-org/GLM-4.1V-9B-Thinking", "Glm4vForConditionalGeneration", ("image",)),
    (
        "Mistral Small 3",
        "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        "Mistral3ForConditionalGeneration",
        ("image",),
    ),
    (
        "LLaVA-NeXT",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "LlavaNextForConditionalGeneration",
        ("image",),
    ),
    (
        "Qwen2-Audio",
        "Qwen/Qwen2-Audio-7B-Instruct",
        "Qwen2AudioForConditionalGeneration",
        ("audio",),
    ),
    ("Voxtral", "mistralai/Voxtral-Mini-3B-2507", "VoxtralForConditionalGeneration", ("audio",)),
    ("Gemma 2", "google/gemma-2-2b-it", "Gemma2ForCausalLM", ()),
    ("OLMo 2", "allenai/OLMo-2-0425-1B-Instruct", "Olmo2ForCausalLM", ()),
    ("Granite", "ibm-granite/granite-3.3-2b-instruct", "GraniteForCausalLM", ()),
    ("StableLM", "stabilityai/stablelm-2-1_6b-chat", "StableLmForCausalLM", ()),
    ("Cohere", "CohereLabs/c4ai-command-r-v01", "CohereForCausalLM", ()),
    ("gpt-oss", "openai/gpt-oss-20b", "GptOssForCausalLM", ()),
)
"""Some of what runs this way, each tested: name, published checkpoint, architecture, what it
takes besides text."""


TEMPLATES = {"qwen2_audio": "qwen2_audio.jinja", "voxtral": "voxtral.jinja"}
"""Fallback chat templates, by model type, of models whose makers publish none as a file."""


def _voxtral_transcription(language: str | None) -> str:
    """Return the transcription prompt of mistral-common's tokenizer V7, without BOS."""
    told = f"lang:{language}" if language else ""
    return f"[INST][BEGIN_AUDIO][AUDIO][/INST]{told}[TRANSCRIBE]"


TRANSCRIPTIONS = {"voxtral": _voxtral_transcription}
"""Transcription prompts of their own, by model type."""


def _build_processor(architecture: str, loaded: LoadedConfig) -> Processor | None:
    return processing.build(architecture, loaded)


def _build_model(architecture: str, loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.families.hf.model import build

    return build(architecture, loaded, options, processing.build(architecture, loaded))


def names() -> tuple[str, ...]:
    """Return all architectures of transformers for which ``find`` returns a family."""
    return tuple(n for n, kind in known_architectures().items() if kind != ENCODER_DECODER)


def find(names: Sequence[str]) -> Family | None:
    """Return the family of the first of these architectures that transformers has, or None.

    Raises UnsupportedModelError for those that are known not to run here.
    """
    known = known_architectures() if names else {}
    for name in names:
        kind = known.get(name)
        if kind == ENCODER_DECODER:
            raise UnsupportedModelError(
                f"Architecture {name!r} is an encoder-decoder: its decoder attends to an encoder's "
                "output, for which there is no cache here.",
                param="model",
            )
        if kind is not None:
            return _family(name, kind)
    return None


def find_by_model_type(model_type: str) -> Family | None:
    """Return the family of transformers' text-generating model of this type, or None."""
    for name, kind in known_architectures().items():
        if kind == model_type:
            return _family(name, kind)
    return None


def _family(architecture: str, model_type: str) -> Family:
    return Family(
        name=f"{architecture} of transformers",
        checkpoint="",
        architectures=(architecture,),
        modalities=(),
        shape=text_shape,
        build_processor=partial(_build_processor, architecture),
        build_model=partial(_build_model, architecture),
        renames=(),
        template=(__name__, TEMPLATES[model_type]) if model_type in TEMPLATES else None,
        transcription=TRANSCRIPTIONS.get(model_type),
        bidirectional=processing.BIDIRECTIONAL.get(model_type),
        same_on_threads=False,
        invariant=False,  # soft caps, sinks, experts: what its code does is not known before
        quantizable=False,
        separable=False,
    )
