"""What the builders share: sentences, sizes, names of weights in each layout, a tokenizer, the
writing of files.
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
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}"
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


@dataclass(frozen=True)
class Names:
    """Prefixes of weight names of each layout, where they differ from those in memory.

    First match counts.
    """

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


def class_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration for its class, as these classes change their arguments."""
    arguments = copy.deepcopy(dict(config))
    arguments.pop("torch_dtype", None)
    return arguments


def new_tokenizer(
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


def write_tokenizer(
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
    write_json(folder / "tokenizer_config.json", config)


def write_model(
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
        write_json(folder / "config.json", written | {"architectures": config["architectures"]})
    else:
        write_json(folder / "config.json", config)
    for name, value in neighbours.items():
        write_json(folder / name, value)
    tied = bool(config.get("tie_word_embeddings"))
    tensors = {
        names.of(layout, name): tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if layout == "hub":
        tensors |= {name: torch.arange(8) for name in names.constants}
    write_weights(folder, tensors, sharded)


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], sharded: bool) -> None:
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
    write_json(folder / "model.safetensors.index.json", index_file)


def enliven(model: torch.nn.Module, seed: int) -> None:
    """Fill a model with random weights large enough that its answers vary and depend on every
    input.
    """
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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
