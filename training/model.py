"""The Qwen2-VL architecture in plain torch, for training: batches of images of one size.

The parameters carry the names of the published checkpoints (``visual.*``, ``model.*``, tied head).
Equal sizes allow dense attention in the vision tower. A still image fills both frames of a
temporal patch with the same pixels, so that it meets the sum of the weights for both.

Legend of shapes: B images, P patches, I image tokens (P / 4), L tokens, D width, H heads,
K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, MERGE, FRAMES = 14, 2, 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are those of the demo model."""

    vocab: int = 1344
    vision_width: int = 192
    vision_layers: int = 5
    vision_heads: int = 6
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 480
    rope_theta: float = 10.0
    mrope_section: tuple[int, int, int] = field(default=(4, 6, 6))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [B, H, L, K]; ``cos`` and ``sin`` broadcast to [B, H, L, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in plain products, faster to train on a CPU than the fused kernel.

    q, k, v [B, H, L, K]; ``mask`` [B, 1, L, L] is added to the scores. Returns [B, H, L, K].
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores + mask
    return scores.float().softmax(-1).to(v.dtype) @ v


class VisionBlock(nn.Module):
    """One layer of the vision tower."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.vision_width
        self.heads = shape.vision_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, P, D], cos and sin [P, K] -> [B, P, D]."""
        batch, patches, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(batch, patches, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, patches, width))
        h = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


class Vision(nn.Module):
    """Vision tower and merger."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.vision_width
        self.head_dim = width // shape.vision_heads
        values = 3 * FRAMES * PATCH * PATCH
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(values, width, bias=False)})
        self.blocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.vision_layers))
        self.merger = nn.ModuleDict(
            {
                "ln_q": nn.LayerNorm(width, eps=1e-6),
                "mlp": nn.Sequential(
                    nn.Linear(4 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, shape.width)
                ),
            }
        )
        self._angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def angles(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, K] for a grid of patches, in the order of the merged cells."""
        if (rows, columns) not in self._angles:
            dim = self.head_dim // 2
            frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2).float() / dim)
            row = torch.arange(rows).view(-1, 1).expand(rows, columns)
            column = torch.arange(columns).view(1, -1).expand(rows, columns)
            ids = torch.stack((row, column), -1).view(rows // 2, 2, columns // 2, 2, 2)
            ids = ids.permute(0, 2, 1, 3, 4).reshape(-1, 2)
            angle = (ids[:, :, None] * frequencies).flatten(1)
            angle = torch.cat((angle, angle), -1)
            self._angles[rows, columns] = angle.cos(), angle.sin()
        return self._angles[rows, columns]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels -> tokens [B, I, D], patches [B, P, D].

        Images are [B, 3, height, width], pairs of frames [B, 3, 2, height, width].
        """
        batch, height, width = pixels.shape[0], *pixels.shape[-2:]
        rows, columns = height // PATCH, width // PATCH
        x = pixels.reshape(batch, -1, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * columns, -1)
        weight = self.patch_embed["proj"].weight
        if pixels.ndim == 4:
            weight = weight.view(-1, 3, FRAMES, PATCH * PATCH).sum(2).flatten(1)
        x = F.linear(x, weight)
        cos, sin = self.angles(rows, columns)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        merged = self.merger["ln_q"](x).view(batch, rows * columns // 4, -1)
        return self.merger["mlp"](merged), x


class TextShape(Protocol):
    """Sizes of a decoder."""

    @property
    def vocab(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def inner(self) -> int: ...


class TextLayer(nn.Module):
    """One decoder layer; ``bias``: of the query, key and value projections, as in Qwen2."""

    def __init__(self, shape: TextShape, bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_layernorm = nn.RMSNorm(shape.width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(shape.width, q, bias=bias),
                "k_proj": nn.Linear(shape.width, kv, bias=bias),
                "v_proj": nn.Linear(shape.width, kv, bias=bias),
                "o_proj": nn.Linear(q, shape.width, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(shape.width, shape.inner, bias=False),
                "up_proj": nn.Linear(shape.width, shape.inner, bias=False),
                "down_proj": nn.Linear(shape.inner, shape.width, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], cos and sin [B, 1, L, K], mask [B, 1, L, L] added to scores."""
        batch, length, _ = x.shape
        h, attn = self.input_layernorm(x), self.self_attn
        q = attn["q_proj"](h).view(batch, length, self.heads, -1).transpose(1, 2)
        k = attn["k_proj"](h).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = attn["v_proj"](h).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
        mixed = attend(rotate(q, cos, sin), k, v, mask)
        x = x + attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))
        h, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class Text(nn.Module):
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, shape: TextShape, bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(TextLayer(shape, bias, eps) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=eps)

    def embed(self, ids: Tensor, media_index: Tensor, tokens: Tensor) -> Tensor:
        """Embed ids [B, L] as [B, L, D].

        Where ``media_index`` [B, L] is not -1, that one of ``tokens`` [B, I, D] is used.
        """
        x = self.embed_tokens(ids)
        index = media_index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
        picked = tokens.to(x.dtype).gather(1, index)
        return torch.where(media_index[..., None] >= 0, picked, x)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, L, D], and those after each layer, before the last norm."""
        states = []
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
            states.append(x)
        return self.norm(x), states


class DemoModel(nn.Module):
    """Qwen2-VL for images of one size per batch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.visual = Vision(shape)
        self.model = Text(shape)
        self.reset()

    def reset(self) -> None:
        """Random start: small embeddings, outputs of residual branches close to zero."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = 0.02 if "embed_tokens" in name else 0.6 * weight.shape[1] ** -0.5
                if name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight",
                                  "down_proj.weight")):  # fmt: skip
                    scale *= 0.2
                nn.init.normal_(weight, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def text_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """M-RoPE: positions [3, B, L] -> cos and sin [B, 1, L, K]."""
        dim = self.shape.head_dim
        frequencies = self.shape.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.shape.mrope_section))
        angle = positions[axis].permute(1, 2, 0) * frequencies
        angle = torch.cat((angle, angle), -1)[:, None]
        return angle.cos(), angle.sin()

    def hidden(
        self, ids: Tensor, positions: Tensor, image_index: Tensor, mask: Tensor, tokens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, L, D], and those after each layer, before the last norm.

        Args:
            ids: [B, L] token ids.
            positions: [3, B, L].
            image_index: [B, L], which of the image's tokens stands here, or -1.
            mask: [B, 1, L, L], 0 where a token may look and very low elsewhere.
            tokens: [B, I, D] from the vision tower.
        """
        x = self.model.embed(ids, image_index, tokens)
        return self.model(x, *self.text_angles(positions), mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocab] through the tied head."""
        return F.linear(hidden, self.model.embed_tokens.weight)
