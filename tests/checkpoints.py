"""Tiny random checkpoints of the native families, written to a folder as their publishers write them.

Each builder makes a ``transformers`` model with lively random weights (so that greedy answers vary and depend on the
picture), and writes its weights under the names of one of three layouts:

- ``hub``: as first published, with the constants that older files store, and an older config.json
- ``resaved``: as transformers 4.52 and later wrote them
- ``t5``: as ``save_pretrained`` of transformers 5 writes them, with a newer config.json

Each folder has a working byte-level tokenizer with the family's special tokens, a chat template, and the processor and
generation files. The builders return the folder.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sensorium.models import llava, qwen2_vl

SENTENCES = (
    "What is shown in this picture? Describe it in a few words.",
    "There are three red squares to the left of a blue circle.",
    "How many yellow triangles can you see above the green star?",
    "The quick brown fox jumps over the lazy dog, and 1234567890 birds fly away.",
    "Ein großer Hund läuft über die Straße; 你好，世界！ Voilà: ça marche très bien.",
    "def answer(question):\n    return {'colour': 'red', 'count': 3}\n",
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
VOCAB_SIZE = 448
TEXT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def make_llava(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **top: Any,
) -> Path:
    """LLaVA-1.5: an image of 56 x 56 pixels is 16 embeddings. ``vision``, ``text``, ``top``: values of config.json."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = _tokenizer(first=("<unk>", "<s>", "</s>"), last=("<image>", "<pad>"), bos="<s>")
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
        "vocab_size": 32000,
        **(vision or {}),
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-5,
        **TEXT_SIZES,
        **(text or {}),
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": text_config,
        "vision_config": vision_config,
        **top,
    }
    model = LlavaForConditionalGeneration(LlavaConfig(**_class_arguments(config)))
    size = vision_config["image_size"]
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision_config["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
        },
        "chat_template.json": {"chat_template": llava.FAMILIES[0].chat_template()},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    _write_tokenizer(folder, tokenizer, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    _write_model(folder, model, config, layout, seed, sharded, LLAVA_NAMES, neighbours)
    return folder


def make_qwen2_vl(
    folder: Path,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Qwen2-VL: at most 48 embeddings an image. ``vision``, ``text``, ``options``: values of config.json."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    own = {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": (text or {}).get("hidden_size", TEXT_SIZES["hidden_size"]),
        **(vision or {}),
    }
    return _make_qwen(
        folder,
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        "qwen2_vl",
        own,
        text=text,
        **options,
    )


def _make_qwen(
    folder: Path,
    model_class: Any,
    config_class: Any,
    model_type: str,
    vision: Mapping[str, Any],
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    text: Mapping[str, Any] | None = None,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 48,
    **top: Any,
) -> Path:
    """A checkpoint of the Qwen-VL kind."""
    tokenizer = _tokenizer(last=QWEN_TOKENS)
    text_config = {
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 2048,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **TEXT_SIZES,
        **(text or {}),
    }
    config = {
        "architectures": [model_class.__name__],
        "model_type": model_type,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        **text_config,
        "vision_config": {"in_chans": 3, "spatial_patch_size": 14, **vision},
        **top,
    }
    model = model_class(config_class(**_class_arguments(config)))
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        "chat_template.json": {"chat_template": qwen2_vl.FAMILIES[0].chat_template()},
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
            "pad_token_id": config["bos_token_id"],
        },
    }
    template = qwen2_vl.FAMILIES[0].chat_template()
    _write_tokenizer(folder, tokenizer, eos="<|im_end|>", pad="<|endoftext|>", template=template)
    _write_model(folder, model, config, layout, seed, sharded, QWEN2_VL_NAMES, neighbours)
    return folder


def make_qwen2_5_vl(folder: Path, **options: Any) -> Path:
    """Qwen2.5-VL with windows of 2 x 2 merge cells and one block of full attention. ``options`` as of Qwen2-VL's."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": TEXT_SIZES["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
        **(options.pop("vision", None) or {}),
    }
    return _make_qwen(
        folder,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        "qwen2_5_vl",
        vision,
        **options,
    )


def make_text(
    family: str,
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    **sizes: Any,
) -> Path:
    """A text model: ``llama``, ``qwen2``, ``qwen3``, ``mistral`` or ``phi3``. ``sizes``: values of config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(first=("<unk>", "<s>", "</s>"), last=QWEN_TOKENS[:3])
    extras: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 500000.0},
        "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
        "qwen3": {"use_sliding_window": False, "head_dim": 24},
        "mistral": {"sliding_window": None},
        "phi3": {"sliding_window": None, "original_max_position_embeddings": 2048},
    }
    ids = {
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    architecture = {"phi3": "Phi3ForCausalLM"}.get(family, f"{family.capitalize()}ForCausalLM")
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        **ids,
        **TEXT_SIZES,
        **extras[family],
        **sizes,
    }
    arguments = _class_arguments(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(arguments.pop("model_type"), **arguments), dtype=torch.float32
    )
    _write_tokenizer(
        folder, tokenizer, bos="<s>", eos="<|im_end|>", pad="<|endoftext|>", template=CHATML
    )
    neighbours = {"generation_config.json": ids}
    _write_model(folder, model, config, layout, seed, sharded, TEXT_NAMES, neighbours)
    return folder


@dataclass(frozen=True)
class Names:
    """Prefixes of weight names of each layout, where they differ from those in memory; first match counts."""

    hub: tuple[tuple[str, str], ...] = ()
    resaved: tuple[tuple[str, str], ...] = ()
    t5: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()
    """What files of the hub layout hold besides weights."""

    def of(self, layout: str, name: str) -> str:
        """The name of a weight in a layout."""
        for old, new in getattr(self, layout):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


LLAVA_NAMES = Names(
    hub=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ),
    resaved=(("model.vision_tower.", "model.vision_tower.vision_model."),),
    t5=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ),
    constants=(
        "vision_tower.vision_model.embeddings.position_ids",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
)
QWEN2_VL_NAMES = Names(
    hub=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    t5=(("model.visual.", "visual."), ("model.language_model.", "model.")),
)
TEXT_NAMES = Names(constants=("model.layers.0.self_attn.rotary_emb.inv_freq",))


def _class_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration class takes; a copy, because these classes change what they are given."""
    arguments = copy.deepcopy(dict(config))
    arguments.pop("torch_dtype", None)
    return arguments


def _tokenizer(
    first: tuple[str, ...] = (), last: tuple[str, ...] = (), bos: str | None = None
) -> Tokenizer:
    """Byte-level BPE with ``first`` as the lowest ids and ``last`` as the highest."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in (*first, *last)]
    tokenizer.add_special_tokens(special)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    return tokenizer


def _write_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: str | None = None, **named: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": TEXT_SIZES["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in named.items()},
    }
    if template is not None:
        config["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", config)


def _write_model(
    folder: Path,
    model: torch.nn.Module,
    config: dict[str, Any],
    layout: str,
    seed: int,
    sharded: bool,
    names: Names,
    neighbours: Mapping[str, Any],
) -> None:
    enliven(model, seed)
    dtype = getattr(torch, config["torch_dtype"])
    model.to(dtype)
    if layout == "t5":
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        _write_json(folder / "config.json", written | {"architectures": config["architectures"]})
    else:
        _write_json(folder / "config.json", config)
    for name, value in neighbours.items():
        _write_json(folder / name, value)
    tied = bool(config.get("tie_word_embeddings"))
    tensors = {
        names.of(layout, name): tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if layout == "hub":
        tensors |= {name: torch.arange(8) for name in names.constants}
    _write_weights(folder, tensors, sharded)


def _write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], sharded: bool) -> None:
    metadata = {"format": "pt"}
    if not sharded:
        save_file(dict(tensors), folder / "model.safetensors", metadata=metadata)
        return
    names, num = sorted(tensors), 3
    weight_map = {}
    for index in range(num):
        file = f"model-{index + 1:05}-of-{num:05}.safetensors"
        own = names[index::num]  # the parts of a fused projection fall into different files
        save_file({name: tensors[name] for name in own}, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index_file)


def enliven(model: torch.nn.Module, seed: int) -> None:
    """Fill a model with random weights large enough that its answers vary and depend on every input."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and name.endswith("weight"):
            value = 1 + 0.1 * noise
        elif name.endswith("bias"):
            value = 0.1 * noise
        elif "embedding" in name and "patch" not in name:
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = 0.3 * noise
        else:
            gain = 3.0 if "lm_head" in name else 1.5
            value = noise * gain / math.sqrt(parameter[0].numel())
        parameter.data.copy_(value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
