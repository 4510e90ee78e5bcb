"""Ultravox as its publishers describe it, put together of plain parts.

The reference that transformers does not have.

Whisper's and the decoder's layers are those of transformers; chunks, padding, mask, projector and
the placing of embeddings are written here from the description of the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HOP = 160


class PlainUltravox:
    """Reads the folder's projector, and the backbones of the folders ``text`` and ``whisper``."""

    def __init__(self, folder: Path) -> None:
        from transformers import (
            AutoModelForCausalLM,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
        )

        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        prefix = "multi_modal_projector."
        self.projector = {
            name.removeprefix(prefix).removesuffix(".weight"): value.float()
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        self.newer = bool(self.config.get("projector_ln_mid"))
        loaded = AutoModelForCausalLM.from_pretrained(folder / "text", dtype=torch.float32)
        self.text = loaded.eval()
        whole = WhisperForConditionalGeneration.from_pretrained(
            folder / "whisper", dtype=torch.float32
        )
        self.encoder = whole.model.encoder.eval()
        self.max_frames = 2 * self.encoder.config.max_source_positions
        self.extractor = WhisperFeatureExtractor(feature_size=self.encoder.config.num_mel_bins)

    def features(self, samples: np.ndarray) -> np.ndarray:
        """(bins, frames) of a sound at 16 kHz."""
        if len(samples) < 2 * HOP:
            samples = np.pad(samples, (0, 2 * HOP - len(samples)))
        if self.newer:
            samples = np.pad(samples, (0, -len(samples) % HOP))
        features: np.ndarray = self.extractor._np_extract_fbank_features(samples[None], "cpu")[0]
        return features

    def num_tokens(self, num_samples: int) -> int:
        """Placeholder tokens of a sound, by the publishers' formulas."""
        if not self.newer and num_samples <= self.max_frames * HOP:
            return math.ceil(round(num_samples / 320 + 1e-4) / 8)
        frames = math.ceil(num_samples / HOP) if self.newer else num_samples // HOP
        return sum(
            math.ceil(min(frames - start, self.max_frames) / 16)
            for start in range(0, frames, self.max_frames)
        )

    @torch.inference_mode()
    def embeds(self, samples: np.ndarray) -> torch.Tensor:
        """(tokens, hidden size) of a sound."""
        features, found = torch.from_numpy(self.features(samples)), []
        for start in range(0, features.shape[1], self.max_frames):
            chunk = features[:, start : start + self.max_frames]
            length = chunk.shape[1]
            if start and self.newer:
                chunk = F.pad(chunk, (0, self.max_frames - length))
            rows = self.encode(chunk, length)
            found.append(self.project(rows)[: math.ceil(length / 16)])
        return torch.cat(found)

    def encode(self, mel: torch.Tensor, length: int) -> torch.Tensor:
        """(rows, size): Whisper's encoder on fewer frames than it was made for, keys behind
        ``length`` masked.
        """
        encoder = self.encoder
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel[None].float()))))
        x = x.transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        seen = torch.arange(x.shape[1]) < (length - 1) // 2 + 1
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None, None]
        for layer in encoder.layers:
            x = layer(x, mask)
            x = x[0] if isinstance(x, tuple) else x
        found: torch.Tensor = encoder.layer_norm(x)[0]
        return found

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """(ceil(rows / 8), hidden size)."""
        rows = F.pad(rows, (0, 0, 0, -len(rows) % 8)).reshape(-(-len(rows) // 8), -1)
        weights = self.projector
        x, gate = (self.norm(rows, "ln_pre") @ weights["linear_1"].T).chunk(2, dim=-1)
        x = F.silu(gate) * x
        if self.newer:
            return self.norm(x, "ln_mid") @ weights["linear_2"].T
        return self.norm(x @ weights["linear_2"].T, "ln_post")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x * scale * self.projector[name]

    @torch.inference_mode()
    def inputs(self, pieces: Sequence[Sequence[int] | torch.Tensor]) -> torch.Tensor:
        """(1, T, H): token ids and embeddings one after another."""
        table = self.text.get_input_embeddings()
        parts = [
            p if isinstance(p, torch.Tensor) else table(torch.tensor(p).long()) for p in pieces
        ]
        return torch.cat([part for part in parts if len(part)])[None]

    @torch.inference_mode()
    def logits(self, pieces: Sequence[Sequence[int] | torch.Tensor]) -> torch.Tensor:
        """(T, V)."""
        found: torch.Tensor = self.text(inputs_embeds=self.inputs(pieces)).logits[0].float()
        return found

    def greedy(self, pieces: Sequence[Sequence[int] | torch.Tensor], num_tokens: int) -> list[int]:
        """The continuation, past any end token."""
        found: list[int] = []
        while len(found) < num_tokens:
            found.append(int(self.logits([*pieces, found])[-1].argmax()))
        return found
