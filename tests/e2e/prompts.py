"""Mixed prompts for tiny models, and the reference's greedy tokens for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WORDS = tuple(
    (
        "what is shown in this picture describe it there are three red squares to the left of a "
        "blue circle how many yellow triangles can you see above the green star"
    ).split()
)
SIZES = [(30, 40), (64, 64), (90, 20), (33, 101), (57, 57), (140, 75), (28, 28), (1, 1), (200, 31)]


@dataclass(frozen=True)
class MixedPrompt:
    """A prompt in ids with unexpanded placeholders, and its images."""

    text: str
    images: list[Image.Image]


def image(rng: np.random.Generator) -> Image.Image:
    """A random picture of an odd size."""
    width, height = SIZES[rng.integers(len(SIZES))]
    low = rng.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


def mixed_prompts(
    count: int, placeholder: str, *, chat: tuple[str, str], seed: int = 0
) -> list[MixedPrompt]:
    """``count`` prompts: no, one or several images; raw or between ``chat``'s two texts.

    Short and long.
    """
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        num_images = int(rng.choice([0, 0, 1, 1, 1, 2, 3]))
        pieces: list[str] = []
        for _ in range(num_images):
            pieces += [" ".join(rng.choice(WORDS, rng.integers(0, 6))), placeholder]
        long = index % 8 == 7
        pieces.append(
            " ".join(rng.choice(WORDS, rng.integers(60, 90) if long else rng.integers(1, 12)))
        )
        text = " ".join(piece for piece in pieces if piece)
        if index % 2:
            text = chat[0] + text + chat[1]
        prompts.append(MixedPrompt(text, [image(rng) for _ in range(num_images)]))
    return prompts


def reference_tokens(
    folder: Path, inputs: list[dict[str, Any]], num_tokens: int
) -> list[list[int]]:
    """Greedy tokens of ``transformers`` for prepared model inputs, one prompt at a time, float32."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # Past any end token, as with ``ignore_eos``; ``min_new_tokens`` would keep the end from being
    # chosen.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    tokens = []
    for values in inputs:
        values = {"attention_mask": torch.ones_like(values["input_ids"]), **values}
        with torch.inference_mode():
            out = model.generate(**values, max_new_tokens=num_tokens, do_sample=False)
        tokens.append(out[0, values["input_ids"].shape[1] :].tolist())
    return tokens


def llava_inputs(folder: Path, prompts: list[MixedPrompt]) -> list[dict[str, Any]]:
    """What LLaVA's own processor makes of the prompts."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for prompt in prompts:
        out = processor(text=prompt.text, images=prompt.images or None, return_tensors="pt")
        found.append({k: v for k, v in out.items() if k in ("input_ids", "pixel_values")})
    return found


def qwen2_vl_inputs(folder: Path, prompts: list[MixedPrompt]) -> list[dict[str, Any]]:
    """Image processor and tokenizer put together as Qwen2-VL's processor does (which needs
    torchvision).
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    found = []
    for prompt in prompts:
        ids, values = tokenizer(prompt.text)["input_ids"], {}
        if prompt.images:
            values = dict(image_processor(prompt.images, return_tensors="pt"))
            lengths = iter((values["image_grid_thw"].prod(-1) // 4).tolist())
            ids = [i for token in ids for i in ([pad] * next(lengths) if token == pad else [token])]
        values["input_ids"] = torch.tensor([ids])
        values["mm_token_type_ids"] = (values["input_ids"] == pad).long()
        found.append(values)
    return found
