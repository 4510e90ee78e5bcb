"""Recording of tiny checkpoints that the formats' own tools write, and of what they answer.

``python -m tests.models.loading.published.record NAME...`` makes folders below ``recorded``: the
checkpoint as the tool saves it, and ``expected.safetensors`` with the logits of the tool's own
loading. It needs the tool, which no test does: install bitsandbytes, llmcompressor, gptqmodel or
mlx-lm beside transformers. The metadata of ``expected.safetensors`` name the versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RECORDED = Path(__file__).parent / "recorded"
IDS = (3, 1, 60, 14, 15, 9, 26, 53, 58, 9, 7, 32)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def base(folder: Path, **sizes: int) -> Path:
    """A plain Llama of random weights in float16, some inputs of which count more than others."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
                parameter.mul_(torch.rand(parameter.shape[1]) + 0.5)
            else:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    model.half().save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2").save_pretrained(folder)
    return folder


def through_transformers(folder: Path, dequantizes: bool = False, **more: Any) -> torch.Tensor:
    """Logits (T, V) of transformers' own loading in float32."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu", **more}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if dequantizes:  # its products would round activations as well
        model = model.dequantize().float()
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.tensor([IDS])).logits[0].float()
    return logits


def bitsandbytes(folder: Path, source: Path, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(folder)
    return through_transformers(folder, dequantizes=True)


def compressed_tensors(folder: Path, source: Path, **weights: Any) -> torch.Tensor:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    arguments = {"num_bits": 4, "type": "int", "symmetric": True, **weights}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": arguments}
    if arguments["num_bits"] == 8:
        group["input_activations"] = {
            "num_bits": 8,
            "type": arguments["type"],
            "strategy": "token",
            "dynamic": True,
        }
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    oneshot(model=model, recipe=QuantizationModifier(**groups))
    model.save_pretrained(folder, save_compressed=True)
    plain = CompressedTensorsConfig(dequantize=True)  # activations stay as they are
    return through_transformers(folder, quantization_config=plain)


def gptqmodel(folder: Path, source: Path, **options: Any) -> torch.Tensor:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    torch.manual_seed(8)
    rows = torch.randint(0, SIZES["vocab_size"], (32, 64)).tolist()
    data = [{"input_ids": row, "attention_mask": [1] * 64} for row in rows]
    model = GPTQModel.load(str(source), QuantizeConfig(**options))
    model.quantize(data, batch_size=1)
    model.save(str(folder))
    again = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    plain = again.model
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "dequantize_weight"):  # its products round to 16 bits
            weight = layer.dequantize_weight().t().contiguous()
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            parent, _, own = name.rpartition(".")
            setattr(plain.get_submodule(parent), own, linear)
    with torch.no_grad():
        logits: torch.Tensor = plain.float()(torch.tensor([IDS])).logits[0]
    return logits


def awq(folder: Path, source: Path) -> torch.Tensor:
    wide = base(source.with_name("wide"), num_key_value_heads=2)  # it takes 64 outputs at a time
    return gptqmodel(folder, wide, bits=4, group_size=32, quant_method="awq", format="gemm")


def mlx_lm(folder: Path, source: Path, **options: Any) -> torch.Tensor:
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(source)
    model, config = quantize_model(model, config, mode="affine", **options)
    folder.mkdir()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    again, _ = load_model(folder)
    again.set_dtype(mx.float32)
    logits = again(mx.array([IDS]))[0]
    return torch.tensor(logits.tolist())


BNB, CT, GPTQ, MLX = "bitsandbytes", "llmcompressor", "gptqmodel", "mlx-lm"
RECIPES: dict[str, tuple[Sequence[str], Callable[..., torch.Tensor], dict[str, Any]]] = {
    "bitsandbytes-nf4": (
        [BNB],
        bitsandbytes,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    "bitsandbytes-fp4": (
        [BNB],
        bitsandbytes,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
    "bitsandbytes-int8": ([BNB], bitsandbytes, {"load_in_8bit": True}),
    "compressed-w4a16": (
        [CT, "compressed-tensors"],
        compressed_tensors,
        {"strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "compressed-w8a8": (
        [CT, "compressed-tensors"],
        compressed_tensors,
        {"strategy": "channel", "num_bits": 8},
    ),
    "compressed-fp8": (
        [CT, "compressed-tensors"],
        compressed_tensors,
        {"strategy": "channel", "num_bits": 8, "type": "float"},
    ),
    "gptq": ([GPTQ], gptqmodel, {"bits": 4, "group_size": 32, "desc_act": False}),
    "gptq-act-order": (
        [GPTQ],
        gptqmodel,
        {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    ),
    "awq": ([GPTQ], awq, {}),
    "mlx-4": ([MLX, "mlx"], mlx_lm, {"bits": 4, "group_size": 64}),
    "mlx-3": ([MLX, "mlx"], mlx_lm, {"bits": 3, "group_size": 32}),
    "mlx-6": ([MLX, "mlx"], mlx_lm, {"bits": 6, "group_size": 64}),
}
"""Tools (distributions), function and its options by name of the folder."""


def record(name: str) -> None:
    """Write the folder of one recipe."""
    tools, make, options = RECIPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        source = base(Path(scratch) / "base")
        made = Path(scratch) / "made"
        logits = make(made, source, **options)
        target = RECORDED / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.copy(made / "model.safetensors", target)
        config = json.loads((made / "config.json").read_text())
        config.get("quantization_config", {}).pop("meta", None)  # has paths
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    versions = {tool: importlib.metadata.version(tool) for tool in (*tools, "transformers")}
    save_file({"logits": logits.contiguous()}, target / "expected.safetensors", metadata=versions)


def main() -> None:
    """Record the recipes that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="recipes; all by default")
    for name in parser.parse_args().names or RECIPES:
        record(name)
        print(name, "recorded")


if __name__ == "__main__":
    main()
