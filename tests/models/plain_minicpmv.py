"""MiniCPM-V 2.6 in plain torch, written down from the published description and not from ours.

The tower's layers and the decoder are those of ``transformers``, the resampler's attention is
torch's, imported by those who build a model. Views come as a padded batch with masks, as in the
published model; nothing here is shared with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig

Item = np.ndarray | list[np.ndarray]
"""A picture, or the frames of a video."""


class Embeddings(nn.Module):
    """Patches and learnt positions; each view takes those of its relative places."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def forward(self, strips: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Strips of patches (B, 3, p, p * L), zero past each view's own, and rows and columns of
        each view.
        """
        found = self.patch_embedding(strips)[:, :, 0].transpose(1, 2)
        ids = torch.zeros(found.shape[:2], dtype=torch.long)
        bounds = torch.arange(1 / self.side, 1.0, 1 / self.side).numpy()
        for index, (rows, columns) in enumerate(sizes):
            down = np.digitize(torch.arange(0, 1 - 1e-6, 1 / rows).numpy(), bounds)
            across = np.digitize(torch.arange(0, 1 - 1e-6, 1 / columns).numpy(), bounds)
            own = [int(y) * self.side + int(x) for y in down for x in across]
            ids[index, : len(own)] = torch.tensor(own)
        return found + self.position_embedding(ids)


class Tower(nn.Module):
    def __init__(self, config: SiglipVisionConfig, drop_last: bool) -> None:
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = SiglipEncoder(config)
        if drop_last:
            self.encoder.layers = self.encoder.layers[:-1]
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, strips: torch.Tensor, sizes: list[tuple[int, int]], mask: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.embeddings(strips, sizes)
        bias = torch.zeros(len(sizes), 1, 1, hidden.shape[1])
        bias.masked_fill_(~mask[:, None, None], torch.finfo(torch.float32).min)
        bias = bias.expand(-1, 1, hidden.shape[1], -1)
        return self.post_layernorm(
            self.encoder(inputs_embeds=hidden, attention_mask=bias).last_hidden_state
        )


def sines(positions: np.ndarray, width: int) -> np.ndarray:
    """(N, width): the sines of all frequencies, then the cosines."""
    omega = 1.0 / 10000 ** (np.arange(width // 2) / (width / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class Resampler(nn.Module):
    def __init__(self, num_queries: int, width: int, inputs: int) -> None:
        super().__init__()
        self.width = width
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.proj = nn.Parameter(torch.zeros(width, width))
        if inputs != width:
            self.kv_proj: nn.Module = nn.Linear(inputs, width, bias=False)
        else:
            self.kv_proj = nn.Identity()
        self.attn = nn.MultiheadAttention(width, width // 128)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, x: torch.Tensor, sizes: list[tuple[int, int]], mask: torch.Tensor
    ) -> torch.Tensor:
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)  # (L, B, width)
        pos = torch.zeros_like(x)
        for index, (rows, columns) in enumerate(sizes):
            grid = np.meshgrid(np.arange(columns), np.arange(rows))
            halves = [sines(axis.reshape(-1), self.width // 2) for axis in grid]
            pos[: rows * columns, index] = torch.from_numpy(np.concatenate(halves, axis=1)).float()
        q = self.ln_q(self.query)[:, None].expand(-1, len(sizes), -1)
        out, _ = self.attn(q, x + pos, x, key_padding_mask=~mask)
        return self.ln_post(out.transpose(0, 1)) @ self.proj


class PlainMiniCPMV(nn.Module):
    """The weights under their published names."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig

        super().__init__()
        eager = {"attn_implementation": "eager"}
        vision = SiglipVisionConfig(**config["vision_config"], **eager)
        own = {"vision_config", "slice_config", "architectures", "model_type"}
        fields = {k: v for k, v in config.items() if k not in own}
        text = Qwen2Config(**fields, **eager)
        self.llm = Qwen2ForCausalLM(text)
        self.vpm = Tower(vision, config["drop_vision_last_layer"])
        self.resampler = Resampler(config["query_num"], text.hidden_size, vision.hidden_size)
        self.patch = vision.patch_size

    def embeddings(self, views: list[Image.Image]) -> torch.Tensor:
        """(views, queries, H): all views in one padded batch."""
        strips, sizes = [], []
        for view in views:
            pixels = torch.from_numpy(np.asarray(view).astype(np.float32) / 255)
            pixels = ((pixels - 0.5) / 0.5).permute(2, 0, 1)
            sizes.append((view.height // self.patch, view.width // self.patch))
            cells = nn.functional.unfold(pixels[None], self.patch, stride=self.patch)
            strip = cells.view(3, self.patch, self.patch, -1).permute(0, 1, 3, 2)
            strips.append(strip.reshape(3, self.patch, -1))
        longest = max(strip.shape[-1] for strip in strips)
        batch = torch.zeros(len(views), 3, self.patch, longest)
        for row, strip in zip(batch, strips, strict=True):
            row[..., : strip.shape[-1]] = strip
        counts = torch.tensor([rows * columns for rows, columns in sizes])
        mask = torch.arange(longest // self.patch) < counts[:, None]
        return self.resampler(self.vpm(batch, sizes, mask), sizes, mask)


# --- preprocessing --------------------------------------------------------------------------------


def whole(length: float, patch: int) -> int:
    return max(round(length / patch) * patch, patch)


def fitted(width: float, height: float, scale: int, patch: int, up: bool) -> tuple[int, int]:
    if up or width * height > scale * scale:
        ratio = width / height
        height = int(scale / math.sqrt(ratio))
        width = int(height * ratio)
    return whole(width, patch), whole(height, patch)


def grid_of(width: int, height: int, scale: int, most: int) -> tuple[int, int] | None:
    """Columns and rows; None where the picture is not cut."""
    multiple = min(math.ceil(width * height / scale**2), most)
    if multiple <= 1:
        return None
    pairs = []
    for number in [multiple - 1, multiple, multiple + 1]:
        if number != 1 and number <= most:
            pairs += [(m, number // m) for m in range(1, number + 1) if number % m == 0]
    wanted = math.log(width / height)
    return min(pairs, key=lambda pair: abs(wanted - math.log(pair[0] / pair[1])))


def views_of(image: Image.Image, scale: int, patch: int, most: int) -> list[Image.Image]:
    """The source view and the slices."""
    bicubic = Image.Resampling.BICUBIC
    width, height = image.size
    grid = grid_of(width, height, scale, most)
    if grid is None:
        return [image.resize(fitted(width, height, scale, patch, True), bicubic)]
    columns, rows = grid
    views = [image.resize(fitted(width, height, scale, patch, False), bicubic)]
    w = max(round(width / columns) * columns, columns) / columns
    h = max(round(height / rows) * rows, rows) / rows
    w, h = fitted(w, h, scale, patch, True)
    large = image.resize((w * columns, h * rows), bicubic)
    cells = [(x * w, y * h) for y in range(rows) for x in range(columns)]
    return views + [large.crop((x, y, x + w, y + h)) for x, y in cells]


class PlainReference:
    """A checkpoint folder read by the plain model. ``most``: slices of pictures, and of frames."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
        self.model = PlainMiniCPMV(config).eval()
        files = sorted(folder.glob("*.safetensors"))
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        self.model.load_state_dict({k: v.float() for k, v in weights.items()})
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.num_queries = config["query_num"]

    def views(self, image: np.ndarray, most: int | None = None) -> list[Image.Image]:
        own = self.preprocessor
        most = own["max_slice_nums"] if most is None else most
        picture = Image.fromarray(image)
        return views_of(picture, own["scale_resolution"], own["patch_size"], most)

    def spelled(self, image: np.ndarray, number: int | None, most: int | None = None) -> str:
        """What a picture's placeholder is replaced by, as text."""
        unk = "<unk>" * self.num_queries
        height, width = image.shape[:2]
        most = self.preprocessor["max_slice_nums"] if most is None else most
        grid = grid_of(width, height, self.preprocessor["scale_resolution"], most) or (0, 0)
        text = "" if number is None else f"<image_id>{number}</image_id>"
        lines = [f"<slice>{unk}</slice>" * grid[0]] * grid[1]
        return text + f"<image>{unk}</image>" + "\n".join(lines)

    def prompt(
        self, text: str, items: Sequence[Item], *, most: int | None = None, ids: bool = True
    ) -> tuple[list[int], list[Image.Image]]:
        """Token ids with the placeholders written out, and the views in the order of the prompt.

        ``items``: pictures and videos in the order in which they stand; ``ids``: whether pictures
        are numbered.
        """
        views: list[Image.Image] = []
        num_pictures = 0
        for item in items:
            if isinstance(item, list):
                most_of_frame = min(most or 1, 2)
                spelled = "".join(self.spelled(frame, None, most_of_frame) for frame in item)
                text = text.replace("(<video>./</video>)", spelled, 1)
                for frame in item:
                    views += self.views(frame, most_of_frame)
                continue
            number = num_pictures if ids else None
            text = text.replace("(<image>./</image>)", self.spelled(item, number, most), 1)
            views += self.views(item, most)
            num_pictures += 1
        return self.tokenizer.encode(text).ids, views

    @torch.inference_mode()
    def inputs(self, ids: Sequence[int], views: list[Image.Image]) -> torch.Tensor:
        """(1, T, H): embeddings with those of the views between start and end tokens."""
        row = torch.tensor([list(ids)])
        embeds = self.model.llm.get_input_embeddings()(row)
        if not views:
            return embeds
        starts = [self.tokenizer.token_to_id(t) for t in ("<image>", "<slice>")]
        ends = [self.tokenizer.token_to_id(t) for t in ("</image>", "</slice>")]
        begins = [i + 1 for i, token in enumerate(ids) if token in starts]
        stops = [i for i, token in enumerate(ids) if token in ends]
        for begin, stop, own in zip(begins, stops, self.model.embeddings(views), strict=True):
            embeds[0, begin:stop] = own
        return embeds

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], views: list[Image.Image]) -> torch.Tensor:
        """(T, V)."""
        return self.model.llm(inputs_embeds=self.inputs(ids, views)).logits[0]

    @torch.inference_mode()
    def greedy(self, ids: Sequence[int], views: list[Image.Image], num_tokens: int) -> list[int]:
        """The greedy continuation, past any end token."""
        config = self.model.llm.generation_config
        config.eos_token_id, config.pad_token_id = None, 0
        out = self.model.llm.generate(
            inputs_embeds=self.inputs(ids, views),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        return list(out[0].tolist())
