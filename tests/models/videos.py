"""A clip with something that moves, and transformers beside it, for the tests of the Qwen-VL
families' videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensorium.multimodal.items import Decoded, Video
from tests.models.harness import Running, image_processor, picture
from tests.models.test_processing import bare_tower

NUM_TOKENS = 10


def clip(frames: int, height: int, width: int, fps: float | None = None, seed: int = 0) -> Video:
    """Something that moves over a picture; every other frame of the source was taken."""
    base = picture(height, width, seed=seed + height * width)
    stack = np.stack([np.roll(base, 3 * i, axis=1) for i in range(frames)])
    return Video(stack, tuple(range(0, 2 * frames, 2)), 2 * frames, fps)


def tower_rows(pixels: np.ndarray) -> torch.Tensor:
    """Patches (t * h * w, 1176) of resized frames."""
    return bare_tower().patches(torch.from_numpy(pixels))[0]


class VideoReference:
    """``transformers`` on the same folder, given our positions and plain features."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.folder = folder

    def inputs(self, seq: Running, media: Sequence[Decoded]) -> dict[str, Any]:
        images = [item for item in media if not isinstance(item, Video)]
        found: dict[str, Any] = {}
        if images:
            found |= image_processor(self.folder)(
                images, return_tensors="pt", input_data_format="channels_last"
            )
        items = [item.features for item in seq.items if item.features.modality == "video"]
        if items:
            found["pixel_values_videos"] = torch.cat(
                [tower_rows(features.arrays["pixels"]) for features in items]
            )
            found["video_grid_thw"] = torch.tensor([features.meta["grid"] for features in items])
        return found

    @torch.inference_mode()
    def run(
        self, seq: Running, media: Sequence[Decoded], num_tokens: int = NUM_TOKENS
    ) -> tuple[torch.Tensor, list[int]]:
        """Logits of the prompt (T, V), and the greedy continuation."""
        own, rows = self.inputs(seq, media), seq.position_rows(0, len(seq.ids))
        ids, tokens = list(seq.ids), []
        out = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=torch.from_numpy(rows)[:, None],
            use_cache=True,
            **own,
        )
        logits = out.logits[0]
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if len(tokens) == num_tokens:
                return logits, tokens
            at = len(seq.ids) + len(tokens) - 1
            rows = seq.position_rows(at, at + 1)
            out = self.model(
                input_ids=torch.tensor([[tokens[-1]]]),
                position_ids=torch.from_numpy(rows)[:, None],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
