"""Phi-3.5-Vision put together plainly, for comparison: there is no such class in ``transformers``.

The tower and the decoder are those of ``transformers``; what lies between, the images' way to tiles
and the prompt's way to ids are written here a second time, from the description of the model, one
image at a time and without caches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
TAG = re.compile(r"<\|image_\d+\|>")


class ImageEmbedding(torch.nn.Module):
    """``model.vision_embed_tokens`` of the published files, without the table's second name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        sizes = CLIPVisionConfig(**config["img_processor"]["vision_config"])
        width, hidden = 4 * sizes.hidden_size, config["hidden_size"]
        self.img_processor = torch.nn.Module()
        self.img_processor.vision_model = CLIPVisionModel(sizes)
        self.sub_GN = torch.nn.Parameter(torch.zeros(1, 1, 1, width))
        self.glb_GN = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.img_projection = torch.nn.Sequential(
            torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
        )
        self.layer = config["img_processor"].get("layer_idx", -2)
        self.order = config["embd_layer"]["hd_transform_order"]

    def forward(self, image: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
        """(3, H, W) and (3, tile, tile), normalised -> (n, hidden)."""
        tile = small.shape[-1]
        rows = [
            torch.cat([self.merged(cell) for cell in row.split(tile, dim=2)], dim=1)
            for row in image.split(tile, dim=1)
        ]
        views = [self.with_ends(torch.cat(rows)), self.with_ends(self.merged(small))]
        if self.order == "glb_sub":
            views.reverse()
        return self.img_projection(torch.cat([views[0], self.glb_GN[0], views[1]]))

    def merged(self, tile: torch.Tensor) -> torch.Tensor:
        """(3, tile, tile) -> (m, m, 4 C)."""
        states = self.img_processor.vision_model(tile[None], output_hidden_states=True)
        patches = states.hidden_states[self.layer][0, 1:]
        side = int(len(patches) ** 0.5)
        grid = patches.view(side, side, -1)
        corners = [grid[y::2, x::2] for y in (0, 1) for x in (0, 1)]
        return torch.cat(corners, dim=-1)

    def with_ends(self, view: torch.Tensor) -> torch.Tensor:
        """(rows, columns, D) -> (rows * (columns + 1), D)."""
        return torch.cat([torch.cat([row, self.sub_GN[0, 0]]) for row in view])


def published_module(config: Mapping[str, Any]) -> torch.nn.Module:
    """The whole model, its weights under the published names."""
    from transformers import Phi3Config, Phi3ForCausalLM

    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("original_max_position_embeddings", "rope_theta", "tie_word_embeddings"),
    )
    original = config["original_max_position_embeddings"]
    rope = config["rope_scaling"] | {"original_max_position_embeddings": original}
    arguments = {name: config[name] for name in names}
    arguments |= {"rope_scaling": rope, "pad_token_id": 0}
    text = Phi3Config(**arguments, sliding_window=None, eos_token_id=None)
    model = Phi3ForCausalLM(text)
    model.model.vision_embed_tokens = ImageEmbedding(config)
    return model


class PlainPhi3V:
    """The model of a checkpoint folder (``hub`` or ``resaved`` layout), float32."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.num_crops = json.loads((folder / "preprocessor_config.json").read_text())["num_crops"]
        self.tile = self.config["img_processor"]["vision_config"]["image_size"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = published_module(self.config).eval()
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        tensors = {
            name: tensor.float()
            for name, tensor in tensors.items()
            if not name.endswith(("wte.weight", "position_ids", "inv_freq"))
        }
        self.model.load_state_dict(tensors, strict=True)

    @torch.inference_mode()
    def embeds(self, image: np.ndarray, num_crops: int | None = None) -> torch.Tensor:
        """(n, hidden) of one image (H, W, 3)."""
        large = hd_image(Image.fromarray(image), self.tile, num_crops or self.num_crops)
        return self.model.model.vision_embed_tokens(*normalized_views(large, self.tile))

    def ids(self, text: str, images: Sequence[torch.Tensor]) -> list[int]:
        """Ids of a prompt with tags; -k stands at the positions of image k (from 1)."""
        out: list[int] = []
        tags = [int(re.sub(r"\D", "", tag)) for tag in TAG.findall(text)]
        assert set(tags) == set(range(1, len(images) + 1))
        for chunk, tag in zip(TAG.split(text), [*tags, None], strict=True):
            out += self.tokenizer.encode(chunk).ids
            if tag is not None:
                out += [-tag] * len(images[tag - 1])
        return out

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], images: Sequence[torch.Tensor]) -> torch.Tensor:
        """(num tokens, V)."""
        tensor = torch.tensor(list(ids))
        embeds = self.model.model.embed_tokens(tensor.clamp_min(0))
        for number, image in enumerate(images, start=1):
            at = (tensor == -number).nonzero()[:, 0]
            embeds[at] = image.repeat(len(at) // len(image), 1)
        return self.model(inputs_embeds=embeds[None], use_cache=False).logits[0]

    def greedy(
        self, text: str, images: Sequence[np.ndarray], num_tokens: int, num_crops: int | None = None
    ) -> list[int]:
        """The greedy continuation, past any end token."""
        views = [self.embeds(image, num_crops) for image in images]
        ids = self.ids(text, views)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids, views)[-1].argmax()))
        return ids[-num_tokens:]


def hd_image(image: Image.Image, tile: int, num_crops: int) -> Image.Image:
    """Resized to as many tiles as allowed, padded with white."""
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    width = int(scale * tile)
    image = image.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
    target = int(np.ceil(image.height / tile) * tile)
    canvas = Image.new("RGB", (width, target), (255, 255, 255))
    canvas.paste(image, (0, int((target - image.height) / 2)))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas


def normalized_views(image: Image.Image, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The image (3, H, W) and the small copy of the whole (3, tile, tile), normalised."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    large = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    small = torch.nn.functional.interpolate(
        large[None], size=(tile, tile), mode="bicubic", align_corners=False
    )
    return large, small[0]
