"""Audio of Ultravox: log-mel features of the audio's own length, without torch.

Releases up to v0.4.1 cut an audio item to whole frames of 10 ms; from v0.5 on (those whose
projector has its norm in the middle) the last frame is filled up with silence. Each audio item is
prepared as if it were alone in its prompt; in the reference the frames at the very end of an audio
item depend on whether a longer one stands in the same prompt. Releases up to v0.4.1 refuse audio of
more than 30 seconds; here they are encoded in chunks of that length, each on its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.errors import InvalidEmbeddingsError, InvalidRequestError
from sensorium.models.families.ultravox.config import AUDIO_PART, UltravoxConfig
from sensorium.models.interface import LoadedConfig, stop_token_ids
from sensorium.models.media import precomputed
from sensorium.models.media.mel import MelConfig, log_mel, pad_to_hops, read_mel_config
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.multimodal.items import Audio, Decoded, Features, Modality
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import Markup, PlacedItem, Replacement

PLACEHOLDER = "<|audio|>"
LEAST_HOPS = 2
"""Shorter audio is followed by silence: the reference's features need as much."""


@dataclass(frozen=True, slots=True)
class UltravoxProcessor:
    """Processor of Ultravox; see ``multimodal.processor.Processor``.

    ``filler_id`` takes the place of each embedding in the expanded prompt: the tokenizer's
    end-of-sequence token, as in the reference's own processor (so that a repetition penalty counts
    the same tokens). ``audio_token_index`` of config.json is not used: some files give an ordinary
    token there, others an id outside the vocabulary.
    """

    config: UltravoxConfig
    mel: MelConfig
    filler_id: int
    modalities: tuple[Modality, ...] = ("audio",)

    @property
    def markup(self) -> Markup | None:
        """Return the pattern of the placeholder, which is in no vocabulary."""
        return Markup({"audio": re.escape(PLACEHOLDER)})

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> int:
        """Return the sampling rate."""
        return self.mel.rate

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class and configuration."""
        return identity_of("ultravox 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse all options: there are none."""
        check_option_names(options, ())

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return ``arrays["mel"]``: (num_frames, num_bins) float32."""
        if not isinstance(data, Audio) or data.rate != self.mel.rate or not data.samples.size:
            raise InvalidRequestError(
                f"Audio must have samples at {self.mel.rate} per second, got {type(data).__name__} "
                f"of shape {data.shape}."
            )
        samples = data.samples
        if self.config.norm_between or len(samples) < LEAST_HOPS * self.mel.hop:
            samples = pad_to_hops(samples, self.mel, LEAST_HOPS)
        frames = log_mel(samples, self.mel)
        return Features(modality, {"mel": frames}, self.config.num_embeds(len(frames)))

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings of audio.

        source: a tensor (items, length, hidden size), a list of (length, hidden size), or either as
        ``audio_embeds`` of a mapping.
        """
        source, param = precomputed.unwrapped(modality, source, param)
        found = []
        for array, place in precomputed.per_item(source, param):
            precomputed.check_width(array, self.config.text.hidden_size, place)
            if not len(array):
                raise InvalidEmbeddingsError(
                    "The embeddings of an audio item are empty: their shape is "
                    f"{tuple(array.shape)}.",
                    param=place,
                )
            found.append(Features(modality, {"embeds": array}, len(array), precomputed=True))
        return found

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return a marker that is no token: see ``markup``."""
        return (marker("audio"),)

    def fill(self, modality: Modality) -> int:
        """Return the filler."""
        return self.filler_id

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the placeholder of the reference."""
        return PLACEHOLDER

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the filler, repeated: the chunks of a long audio item follow each other."""
        num = features.num_embeds
        return Replacement((self.filler_id,) * num, ((0, num),))

    def positions(self, token_ids: Sequence[int], items: Sequence[PlacedItem]) -> None:
        """Return None: positions are plain."""
        return


def build(config: UltravoxConfig, loaded: LoadedConfig) -> UltravoxProcessor:
    """Build the processor of a checkpoint.

    The mel settings come from the encoder's own checkpoint.
    """
    audio = loaded.parts.get(AUDIO_PART)
    preprocessor = loaded.preprocessor or (audio.preprocessor if audio is not None else {})
    return UltravoxProcessor(
        config=config,
        mel=read_mel_config(config.audio.num_bins, preprocessor),
        filler_id=_filler_id(loaded, config.text.vocab_size),
    )


def _filler_id(loaded: LoadedConfig, vocab_size: int) -> int:
    """Return the tokenizer's end-of-sequence token.

    Where its files do not name the id, the first stop token.
    """
    file = Path(loaded.folder) / "tokenizer_config.json"
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        eos = tokenizer["eos_token"]
        text = eos["content"] if isinstance(eos, Mapping) else eos
        listed = tokenizer["added_tokens_decoder"].items()
        own = [int(i) for i, token in listed if token["content"] == text]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        own = []  # the code that loads the tokenizer reports what is wrong with the file
    known = [i for i in (*own, *stop_token_ids(loaded), 0) if 0 <= i < vocab_size]
    return known[0]
