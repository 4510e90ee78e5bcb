"""The Ultravox architecture in plain torch, for training: a Whisper encoder, a projector, a Llama.

The parameters carry the names of the published checkpoints of version 0.5 (``audio_tower.*``,
``multi_modal_projector.*`` with ``ln_mid``, ``language_model.model.*``, tied head).

Legend of shapes: B sounds, F frames of mel features, E positions of the encoder (F / 2), A audio
tokens (E / 8), L tokens, D width, H heads, K head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import Text, attend

STACK = 8
#: Frames of features that one audio token stands for.
FRAMES_PER_TOKEN = 2 * STACK


@dataclass(frozen=True)
class AudioShape:
    """Sizes of the model; the defaults are those of the demo model."""

    vocab: int = 1024
    mels: int = 80
    audio_width: int = 128
    audio_layers: int = 4
    audio_heads: int = 4
    audio_inner: int = 384
    positions: int = 1500
    projector: int = 384
    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 288
    rope_theta: float = 500.0


def sinusoids(count: int, width: int) -> Tensor:
    """Whisper's table of positions: [count, width], sines, then cosines."""
    steps = math.log(10000) / (width // 2 - 1)
    angle = torch.arange(count)[:, None] * torch.exp(-steps * torch.arange(width // 2))
    return torch.cat((angle.sin(), angle.cos()), 1)


def valid_positions(lengths: Tensor) -> Tensor:
    """Positions of the encoder that ``lengths`` frames fill: [B] -> [B]."""
    return (lengths - 1) // 2 + 1


def token_counts(lengths: Tensor) -> Tensor:
    """Audio tokens of ``lengths`` frames: [B] -> [B]."""
    return (lengths + FRAMES_PER_TOKEN - 1) // FRAMES_PER_TOKEN


class AudioLayer(nn.Module):
    """One layer of the encoder."""

    def __init__(self, shape: AudioShape) -> None:
        super().__init__()
        width, self.heads = shape.audio_width, shape.audio_heads
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, width, bias=False),
                "v_proj": nn.Linear(width, width),
                "out_proj": nn.Linear(width, width),
            }
        )
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, shape.audio_inner)
        self.fc2 = nn.Linear(shape.audio_inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, E, D], mask [B, 1, 1, E] added to scores -> [B, E, D]."""
        batch, length, _ = x.shape
        h, attn = self.self_attn_layer_norm(x), self.self_attn
        q, k, v = (
            attn[name](h).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attend(q, k, v, mask).transpose(1, 2).reshape(batch, length, -1)
        x = x + attn["out_proj"](mixed)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioTower(nn.Module):
    """Whisper's encoder for sounds of any length up to 30 s, with a mask of true lengths."""

    def __init__(self, shape: AudioShape) -> None:
        super().__init__()
        width = shape.audio_width
        self.conv1 = nn.Conv1d(shape.mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(shape.positions, width)
        self.layers = nn.ModuleList(AudioLayer(shape) for _ in range(shape.audio_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features [B, mels, F], frames in ``lengths`` [B] -> [B, E, D], zero where there is none.

        Beyond its length a sound is zero before both convolutions, as if it stood alone.
        """
        frames = torch.arange(features.shape[2])[None] < lengths[:, None]
        x = F.gelu(self.conv1(features * frames[:, None])) * frames[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        valid = torch.arange(x.shape[1])[None] < valid_positions(lengths)[:, None]
        mask = torch.zeros(valid.shape, dtype=x.dtype).masked_fill_(~valid, -30000.0)
        x = x + self.embed_positions.weight[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.layer_norm(x) * valid[..., None]


class Projector(nn.Module):
    """Stacks eight positions and brings them to the width of the text model."""

    def __init__(self, shape: AudioShape) -> None:
        super().__init__()
        stacked = STACK * shape.audio_width
        self.ln_pre = nn.RMSNorm(stacked, eps=1e-6)
        self.linear_1 = nn.Linear(stacked, shape.projector, bias=False)
        self.ln_mid = nn.RMSNorm(shape.projector // 2, eps=1e-6)
        self.linear_2 = nn.Linear(shape.projector // 2, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, E, D] -> [B, A, D of the text model]."""
        x = F.pad(x, (0, 0, 0, -x.shape[1] % STACK))
        x = x.reshape(x.shape[0], -1, STACK * x.shape[2])
        value, gate = self.linear_1(self.ln_pre(x)).chunk(2, dim=-1)
        return self.linear_2(self.ln_mid(F.silu(gate) * value))


class AudioDemoModel(nn.Module):
    """Ultravox 0.5 with a tied head, for batches of sounds of different lengths."""

    def __init__(self, shape: AudioShape) -> None:
        super().__init__()
        self.shape = shape
        self.audio_tower = AudioTower(shape)
        self.multi_modal_projector = Projector(shape)
        self.language_model = nn.ModuleDict({"model": Text(shape, bias=False, eps=1e-5)})
        self.reset()

    def reset(self) -> None:
        """Random start: small embeddings, outputs of residual branches close to zero."""
        for name, weight in self.named_parameters():
            if weight.ndim >= 2:
                scale = 0.02 if "embed_tokens" in name else 0.6 * weight[0].numel() ** -0.5
                if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight",
                                  "down_proj.weight")):  # fmt: skip
                    scale *= 0.2
                nn.init.normal_(weight, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        table = self.audio_tower.embed_positions.weight
        table.requires_grad_(False)
        table.copy_(sinusoids(*table.shape))

    def listen(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Audio tokens [B, A, D] and states of the encoder [B, E, D] of features [B, mels, F]."""
        states = self.audio_tower(features, lengths)
        return self.multi_modal_projector(states), states

    def hidden(
        self, ids: Tensor, positions: Tensor, audio_index: Tensor, mask: Tensor, tokens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, L, D], and those after each layer, before the last norm.

        Args:
            ids: [B, L] token ids.
            positions: [B, L].
            audio_index: [B, L], which of the sound's tokens stands here, or -1.
            mask: [B, 1, L, L], 0 where a token may look and very low elsewhere.
            tokens: [B, A, D] from ``listen``.
        """
        text = self.language_model["model"]
        dim = self.shape.head_dim
        frequencies = self.shape.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
        angle = positions[..., None] * frequencies
        angle = torch.cat((angle, angle), -1)[:, None]
        return text(text.embed(ids, audio_index, tokens), angle.cos(), angle.sin(), mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocab] through the tied head."""
        return F.linear(hidden, self.language_model["model"].embed_tokens.weight)
