"""Precomputed embeddings in place of images, from a file that torch.save wrote.

python examples/embeddings_offline.py EXAMPLE EMBEDDINGS.pt [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from sensorium import LLM, RequestOutput, SamplingParams

SHORT = SamplingParams(temperature=0, max_tokens=64)


def llava(file: str, model: str = "llava-hf/llava-1.5-7b-hf") -> list[RequestOutput]:
    """Pass a tensor (1, image_feature_size, hidden_size of the decoder) to LLaVA-1.5."""
    image_embeds = torch.load(file, weights_only=True)
    llm = LLM(model=model, enable_mm_embeds=True)
    prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"
    return llm.generate({"prompt": prompt, "multi_modal_data": {"image": image_embeds}}, SHORT)


def llava_chat(file: str, model: str = "llava-hf/llava-1.5-7b-hf") -> list[RequestOutput]:
    """Pass the same tensor in a chat message."""
    image_embeds = torch.load(file, weights_only=True)
    llm = LLM(model=model, enable_mm_embeds=True)
    content = [
        {"type": "image_embeds", "image_embeds": image_embeds},
        {"type": "text", "text": "What is in this image?"},
    ]
    return llm.chat([{"role": "user", "content": content}], SHORT)


def qwen2_vl(file: str, model: str = "Qwen/Qwen2-VL-2B-Instruct") -> list[RequestOutput]:
    """Pass (num_images, image_feature_size, hidden_size) and the patch grids to Qwen2-VL."""
    saved = torch.load(file, weights_only=True)
    llm = LLM(model=model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 4})
    mm_data = {
        "image": {
            "image_embeds": saved["image_embeds"],
            "image_grid_thw": saved["image_grid_thw"],
        }
    }
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "What is in this image?<|im_end|>\n<|im_start|>assistant\n"
    )
    return llm.generate({"prompt": prompt, "multi_modal_data": mm_data}, SHORT)


def minicpmv(file: str, model: str = "openbmb/MiniCPM-V-2_6") -> list[RequestOutput]:
    """Pass embeddings of all slices of each image, and the image sizes, to MiniCPM-V."""
    saved = torch.load(file, weights_only=True)
    llm = LLM(model=model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 4})
    mm_data = {
        "image": {
            "image_embeds": saved["image_embeds"],
            "image_sizes": saved["image_sizes"],
        }
    }
    prompt = (
        "<|im_start|>user\n(<image>./</image>)\nWhat is in this image?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    return llm.generate({"prompt": prompt, "multi_modal_data": mm_data}, SHORT)


EXAMPLES: dict[str, Callable[..., list[RequestOutput]]] = {
    function.__name__: function for function in (llava, llava_chat, qwen2_vl, minicpmv)
}

if __name__ == "__main__":
    for output in EXAMPLES[sys.argv[1]](*sys.argv[2:4]):
        print(output.outputs[0].text)
