"""Runs a loaded model over a paged cache without an engine, and the reference implementation
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout
from sensorium.models.loader import LoadedModel
from sensorium.multimodal.items import Audio, Decoded, Features, MediaItem, Modality, Video
from sensorium.multimodal.placeholders import expand
from sensorium.multimodal.processor import PlacedItem

BLOCK_SIZE = 8
NUM_BLOCKS = 512


@dataclass(eq=False)
class Running:
    """A prompt with its placeholders expanded, and how far it is computed."""

    ids: list[int]
    items: list[PlacedItem]
    positions: np.ndarray | None
    delta: int
    embeds: list[torch.Tensor]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0

    def position_rows(self, start: int, end: int) -> np.ndarray:
        """(3, end - start) rotary positions: the prompt's own, then index + delta."""
        index = np.arange(start, end)
        rows = np.broadcast_to(index + self.delta, (3, end - start)).copy()
        if self.positions is not None:
            known = index < self.positions.shape[1]
            rows[:, known] = self.positions[:, index[known]]
        return rows


def text_ids(folder: Path, text: str) -> list[int]:
    """Token ids of a text, special tokens in it included."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def place(
    loaded: LoadedModel, ids: Sequence[int], features: Sequence[Features]
) -> tuple[list[int], list[PlacedItem]]:
    """Replace each placeholder by that of its item; the items in the order of the prompt."""
    if loaded.processor is None:
        return list(ids), []
    items = [MediaItem(f.modality, bytes(32), f) for f in features]
    expansion = expand(ids, items, loaded.processor)
    return list(expansion.token_ids), list(expansion.items)


class Harness:
    """A loaded model and its cache: ``add`` adds sequences, ``step`` runs some tokens of each."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model
        shape = loaded.model.shape
        layout = KVCacheLayout(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, loaded.model.dtype
        )
        self.caches = ops.allocate_cache(layout, NUM_BLOCKS, loaded.model.device)
        self.free = list(range(NUM_BLOCKS - 1, 0, -1))

    def add(self, ids: Sequence[int], media: Sequence[Decoded] = (), **options: Any) -> Running:
        """Process and encode the items, each modality in one batch, and expand the placeholders.

        ``ids`` may hold the markers of placeholders that are no tokens; ``options`` are
        ``mm_processor_kwargs``.
        """
        features = self.process(media, **options)
        expanded, items = place(self.loaded, ids, features)
        processor = self.loaded.processor
        positions = processor.positions(expanded, items) if processor else None
        embeds: dict[int, torch.Tensor] = {}
        with torch.inference_mode():
            for modality in dict.fromkeys(f.modality for f in features):
                own = [f for f in features if f.modality == modality]
                embeds |= zip(map(id, own), self.model.encode(own), strict=True)
        rows, delta = positions if positions is not None else (None, 0)
        return Running(expanded, items, rows, delta, [embeds[id(item.features)] for item in items])

    def process(self, media: Sequence[Decoded], **options: Any) -> list[Features]:
        """Features of each item."""
        processor = self.loaded.processor
        if processor is None:
            return []
        modalities = [modality_of(data) for data in media]
        return [
            processor.process(modality, data, options, modalities.count(modality))
            for modality, data in zip(modalities, media, strict=True)
        ]

    def step(self, spans: Sequence[tuple[Running, int]]) -> list[torch.Tensor]:
        """Compute the next tokens of each sequence; logits (num tokens, V) of each."""
        spans = sorted(spans, key=lambda span: span[1] > 1)  # decodes first
        with torch.inference_mode():
            embeds = torch.cat([self._embeds(seq, num) for seq, num in spans])
            hidden = self.model.forward(embeds, self._batch(spans))
            logits = self.model.logits(hidden).float()
        for seq, num in spans:
            seq.num_computed += num
        return list(logits.cpu().split([num for _, num in spans]))

    def prefill(self, seq: Running, chunk: int | None = None) -> torch.Tensor:
        """Logits (num tokens, V) of the whole prompt, in chunks."""
        parts = []
        while seq.num_computed < len(seq.ids):
            num = min(chunk or len(seq.ids), len(seq.ids) - seq.num_computed)
            parts += self.step([(seq, num)])
        return torch.cat(parts)

    def greedy(self, seq: Running, num_tokens: int, chunk: int | None = None) -> list[int]:
        """The prompt's greedy continuation."""
        logits = self.prefill(seq, chunk)[-1]
        found = [int(logits.argmax())]
        while len(found) < num_tokens:
            seq.ids.append(found[-1])
            (logits,) = self.step([(seq, 1)])
            found.append(int(logits[-1].argmax()))
        return found

    def _rope_length(self, num_tokens: int) -> int:
        short = self.model.shape.short_context
        return num_tokens if short is not None and num_tokens > short else 0

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, device=self.model.device)

    def _embeds(self, seq: Running, num: int) -> torch.Tensor:
        start, end = seq.num_computed, seq.num_computed + num
        embeds = self.model.embed(self._tensor(seq.ids[start:end]))
        for item, own in zip(seq.items, seq.embeds, strict=True):
            offset = 0
            for first, length in item.runs:
                low, high = max(first, start), min(first + length, end)
                if low < high:
                    at = offset + low - first
                    embeds[low - start : high - start] = own[at : at + high - low]
                offset += length
        return embeds

    def _batch(self, spans: Sequence[tuple[Running, int]]) -> AttentionBatch:
        query_lens = [num for _, num in spans]
        kv_lens = [seq.num_computed + num for seq, num in spans]
        for (seq, _), kv_len in zip(spans, kv_lens, strict=True):
            while len(seq.blocks) * BLOCK_SIZE < kv_len:
                seq.blocks.append(self.free.pop())
        width = max(len(seq.blocks) for seq, _ in spans)
        table = [seq.blocks + [0] * (width - len(seq.blocks)) for seq, _ in spans]
        rows = [seq.position_rows(seq.num_computed, seq.num_computed + n) for seq, n in spans]
        lengths = [(self._rope_length(len(seq.ids)), num) for seq, num in spans]
        cos, sin = self.model.rotary(self._tensor(np.concatenate(rows, axis=1)), lengths)
        starts = np.cumsum([0, *query_lens]).tolist()
        return AttentionBatch(
            query_start=self._tensor(starts).int(),
            kv_len=self._tensor(kv_lens).int(),
            block_table=self._tensor(table).int(),
            num_decodes=sum(num == 1 for num in query_lens),
            max_query_len=max(query_lens),
            max_kv_len=max(kv_lens),
            cos=cos,
            sin=sin,
            caches=self.caches,
            query_lens=query_lens,
            kv_lens=kv_lens,
        )


class Reference:
    """``transformers`` on the same folder, with its own image processor."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        self.config = AutoConfig.from_pretrained(folder)
        self.is_vision = hasattr(self.config, "vision_config")
        kind = AutoModelForImageTextToText if self.is_vision else AutoModelForCausalLM
        self.model = kind.from_pretrained(folder, dtype=dtype).eval()
        self.folder = folder

    def inputs(self, seq: Running, images: Sequence[np.ndarray]) -> dict[str, Any]:
        """Arguments of the model for an expanded prompt."""
        ids = torch.tensor([seq.ids])
        found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            own = list(images)
            if self.config.model_type == "llava_onevision":
                own = [own]  # the images of one prompt
            found |= image_processor(self.folder)(
                own, return_tensors="pt", input_data_format="channels_last"
            )
            found["pixel_values"] = found["pixel_values"].to(self.model.dtype)
        if self.config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            found["mm_token_type_ids"] = (ids == self.config.image_token_id).int()
        return found

    @torch.inference_mode()
    def logits(self, seq: Running, images: Sequence[np.ndarray] = ()) -> torch.Tensor:
        """(num tokens, V) float32."""
        return self.model(**self.inputs(seq, images)).logits[0].float()

    def greedy(self, seq: Running, num_tokens: int, images: Sequence[np.ndarray] = ()) -> list[int]:
        """The prompt's greedy continuation, past any end token."""
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        out = self.model.generate(
            **self.inputs(seq, images), max_new_tokens=num_tokens, do_sample=False
        )
        return list(out[0, len(seq.ids) :].tolist())


def modality_of(data: Decoded) -> Modality:
    """Which modality decoded data are of."""
    if isinstance(data, Video):
        return "video"
    return "audio" if isinstance(data, Audio) else "image"


def image_processor(folder: Path) -> Any:
    """The reference's image processor of a checkpoint."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width, 3) uint8 with structure at several scales."""
    rng = np.random.default_rng(seed)
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    waves = [
        np.sin(rows * rng.uniform(1, 25) + columns * rng.uniform(1, 25) + rng.uniform(0, 6))
        for _ in range(3)
    ]
    noise = rng.normal(0, 20, (height, width, 3))
    base = 128 + 100 * np.stack(waves, axis=-1) * rng.uniform(0.3, 1, 3)
    return np.clip(base + noise, 0, 255).astype(np.uint8)
