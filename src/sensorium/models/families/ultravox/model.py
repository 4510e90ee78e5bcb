"""Ultravox (Fixie AI, 2024): Whisper's hidden states, stacked and projected for the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.layers.activation import activation
from sensorium.layers.linear import Linear
from sensorium.layers.norm import RMSNorm
from sensorium.models.families.ultravox.config import UltravoxConfig
from sensorium.models.interface import BuildOptions, Part, WeightSlot
from sensorium.models.loading.weights import linear_slot, norm_slot
from sensorium.models.parts.decoder import DecoderModel, clone_parts
from sensorium.models.parts.whisper import MelChunk, WhisperEncoder
from sensorium.multimodal.items import Features

NORM_EPS = 1e-6
MAX_FRAMES = 24000
"""Mel frames that go through the tower at once: 8 chunks of 30 seconds. More would take memory
and win no time."""
_TOWER, _PROJECTOR = "audio_tower.", "multi_modal_projector."


class Projector:
    """Projector of Ultravox: norm, linear, SwiGLU or another activation, linear, and a second norm.

    The second norm is before (v0.5) or after (v0.3) the last linear layer.
    """

    def __init__(self, config: UltravoxConfig) -> None:
        self.is_gated = config.activation == "swiglu"
        self.act = activation("silu" if self.is_gated else config.activation)
        middle = config.inner_size // 2 if self.is_gated else config.inner_size
        stacked, size = config.audio.hidden_size * config.stack_factor, config.text.hidden_size
        self.norm_pre = RMSNorm(stacked, NORM_EPS)
        self.linear_1 = Linear(stacked, config.inner_size)
        self.linear_2 = Linear(middle, size)
        self.norm_between = config.norm_between
        self.norm = RMSNorm(middle if config.norm_between else size, NORM_EPS)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Weights under ``prefix``."""
        yield norm_slot(self.norm_pre, f"{prefix}ln_pre")
        shape = (self.linear_1.num_outputs, self.linear_1.num_inputs)
        if self.is_gated:
            first = Part(f"{prefix}linear_1.weight", shape)
            yield WeightSlot((first,), self._load_gated, layers=(self.linear_1,), is_swapped=True)
        else:
            yield linear_slot(self.linear_1, [(f"{prefix}linear_1", shape[0])])
        yield linear_slot(self.linear_2, [(f"{prefix}linear_2", self.linear_2.num_outputs)])
        yield norm_slot(self.norm, f"{prefix}{'ln_mid' if self.norm_between else 'ln_post'}")

    def _load_gated(self, weight: torch.Tensor) -> None:
        """Load the first linear layer with gate and up rows swapped.

        The files hold the gate's rows behind the others; the kernel needs them in front.
        """
        self.linear_1.load(torch.cat(weight.chunk(2)[::-1]))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Run (T, stacked size) -> (T, hidden size of the text)."""
        x = self.linear_1(self.norm_pre(x))
        x = ops.silu_mul(x) if self.is_gated else self.act(x)
        return self.linear_2(self.norm(x)) if self.norm_between else self.norm(self.linear_2(x))


class UltravoxModel(DecoderModel):
    """The decoder with an audio tower and a projector; without both when audio is skipped."""

    prefix = "language_model."

    def __init__(self, config: UltravoxConfig, options: BuildOptions) -> None:
        super().__init__(config.text, options)
        self.config = config
        self.tower: WhisperEncoder | None = None
        self.projector: Projector | None = None
        # What a checkpoint of the whole of Whisper holds besides the encoder.
        self.ignored_weights += (r"model\.decoder\..*", r"proj_out\..*")
        if "audio" in options.skip_modalities:
            self.ignored_weights += (r"audio_tower\..*", r"multi_modal_projector\..*")
            return
        try:
            self.tower = WhisperEncoder(config.audio, options)
            self.projector = Projector(config)
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error

    @property
    def has_encoder(self) -> bool:
        """Return whether the model takes audio."""
        return self.tower is not None

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from super().slots()
        if self.tower is not None and self.projector is not None:
            yield from self.tower.slots(_TOWER)
            yield from self.projector.slots(_PROJECTOR)

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, H) of each audio item.

        The chunks of all items run in one batch, or in several of them.
        """
        if self.tower is None or self.projector is None:
            return super().encode(items)
        chunks = [part for item in items for part in self._chunks(item.arrays["mel"])]
        stack = self.config.stack_factor
        found = [x for batch in batches(chunks, MAX_FRAMES) for x in self.tower(batch)]
        rows = [F.pad(x, (0, 0, 0, -len(x) % stack)) for x in found]
        embeds = self.projector(torch.cat(rows).view(-1, stack * rows[0].shape[1]))
        return clone_parts(embeds.split([item.num_embeds for item in items]))

    def _chunks(self, mel: np.ndarray) -> Iterator[MelChunk]:
        """Return the chunks of an audio item.

        From v0.5 on, the reference pads the last of several chunks to the encoder's full length,
        and stacks rows of that padding with the last rows of the audio. As much of the padding as
        reaches into embeddings is kept here.
        """
        frames = torch.from_numpy(np.require(mel, requirements="W"))
        step, start = self.config.frames_per_embed, 0
        for length in self.config.chunks(len(frames)):
            chunk = frames[start : start + length]
            if start and self.config.norm_between:
                wanted = min(-(-length // step) * step, self.config.audio.max_frames)
                chunk = F.pad(chunk, (0, 0, 0, wanted - length))
            yield MelChunk(chunk, length)
            start += length


def batches(chunks: Sequence[MelChunk], most: int) -> Iterator[list[MelChunk]]:
    """Yield consecutive chunks, as many together as have at most ``most`` frames.

    A larger chunk is a batch of its own.
    """
    batch: list[MelChunk] = []
    num = 0
    for chunk in chunks:
        if batch and num + len(chunk.mel) > most:
            yield batch
            batch, num = [], 0
        batch.append(chunk)
        num += len(chunk.mel)
    yield batch
