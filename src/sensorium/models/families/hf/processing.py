"""Media of models of transformers: their own processor runs on one item at a time.

The processor gets a text that holds nothing but one placeholder, and one item. The ids that come
back are the expansion of the placeholder; those among them that equal the token of ``fill`` are the
places of the item's embeddings; all else that comes back are the item's features.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    UnsupportedModelError,
)
from sensorium.models.families.hf import adapter
from sensorium.models.families.hf.config import has_axes, read_hf_config, text_shape
from sensorium.models.families.hf.rope import numbered
from sensorium.models.families.qwen2_vl.sizes import check_aspect
from sensorium.models.interface import LoadedConfig
from sensorium.models.media import precomputed
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import check_image
from sensorium.multimodal.items import Audio, Decoded, Features, Modality
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import Markup, PlacedItem, Replacement

Bidirectional = Literal["items", "prompt"] | None
BIDIRECTIONAL: dict[str, Bidirectional] = {
    "gemma3": "items",
    "shieldgemma2": "items",
    "paligemma": "prompt",
}
"""Model types whose images, or whose prompts with images, attend to themselves both ways
(``Family.bidirectional``)."""
MAX_LINE_ENDS = 8
COLOURS = frozenset({"image_mean", "image_std", "rescale_factor", "resample"})
"""Options whose numbers change what is made of an image, but not how much."""
PROBE_IMAGE = (64, 64)
PROBE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Form of a modality's items in a prompt.

    text: the placeholder as a user writes it. ids: its token ids, or a marker if it is not one
    token. fill: the id at the places of embeddings. around: the ids before and behind these, for
    precomputed embeddings; None where the places are not one run.
    """

    modality: Modality
    text: str
    ids: tuple[int, ...]
    fill: int
    around: tuple[tuple[int, ...], tuple[int, ...]] | None


@dataclass(frozen=True, slots=True)
class HfProcessor:
    """Processor of a model of transformers; see ``multimodal.processor.Processor``."""

    folder: str
    model_type: str
    fingerprint: str
    hidden_size: int
    places: tuple[Place, ...]
    bidirectional: Bidirectional = None
    joins: tuple[tuple[tuple[int, int], int], ...] = ()
    """See ``Replacement``."""
    axes_of: str | None = None
    """The architecture whose code numbers tokens on several axes; None for plain positions."""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Return the modalities that the model takes."""
        return tuple(place.modality for place in self.places)

    @property
    def markup(self) -> Markup | None:
        """Return a pattern of the placeholders that are not one token of the vocabulary."""
        patterns = {
            place.modality: re.escape(place.text)
            for place in self.places
            if place.ids == marked(place.modality)
        }
        return Markup(patterns) if patterns else None

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> int | None:
        """Return the sampling rate of audio; images need no options."""
        return self._adapter.rate if modality == "audio" else None

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return configuration of model and processor, and options."""
        return identity_of("transformers 1", self.fingerprint, options, self.model_type)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check names against the processor's parts, and numbers against the checkpoint's own.

        Nothing else bounds the memory that they make an image take. The processor itself checks
        other values.
        """
        most = {
            name: self._adapter.most(modality, name)
            for modality in self.modalities
            for name in self._adapter.options(modality)
        }
        check_option_names(options, list(most))
        for name in options.keys() - COLOURS:
            for number in adapter.numbers_in(options[name]):
                if not 0 <= number <= most[name]:
                    raise InvalidRequestError(
                        f"Numbers of {name} may be from 0 to {most[name]:g} for this model, got "
                        f"{number!r:.80}.",
                        param=f"mm_processor_kwargs.{name}",
                    )

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return ``arrays``: the processor's whole result for a text with this item alone."""
        place = self._place(modality)
        own = {k: v for k, v in options.items() if k in self._adapter.options(modality)}
        try:
            arrays = self._adapter.call(modality, place.text, checked(data), own)
        except InvalidRequestError:
            raise
        except (
            Exception
        ) as error:  # whatever it raises for options and sizes that it does not expect
            raise InvalidRequestError(
                f"The model's processor does not take this {modality}: "
                f"{adapter.error_text(error, self.folder)}"
            ) from error
        num_embeds = int((arrays["input_ids"] == place.fill).sum())
        if num_embeds == 0:
            raise InvalidRequestError(f"The model's processor leaves nothing of this {modality}.")
        return Features(modality, arrays, num_embeds)

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings.

        source: a tensor (items, num_embeds, hidden size), a list of (num_embeds, hidden size), or
        either as the only member of a mapping (``image_embeds``).
        """
        place = self._place(modality)
        if place.around is None:
            raise InvalidEmbeddingsError(
                f"This model's embeddings of one {modality} do not stand side by side: send the "
                f"{modality} itself.",
                param=param,
            )
        source, param = precomputed.unwrapped(modality, source, param)
        found = []
        for array, where in precomputed.per_item(source, param):
            precomputed.check_width(array, self.hidden_size, where)
            found.append(Features(modality, {"embeds": array}, len(array), precomputed=True))
        return found

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the ids of the placeholder."""
        return self._place(modality).ids

    def fill(self, modality: Modality) -> int | None:
        """Return the token of the configuration, where an item's embeddings are one run."""
        place = self._place(modality)
        return place.fill if place.around is not None else None

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the text of the placeholder."""
        return self._place(modality).text

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the processor's expansion of the placeholder."""
        place = self._place(features.modality)
        if features.precomputed:
            before, after = place.around or ((), ())
            ids = (*before, *(place.fill,) * features.num_embeds, *after)
            runs = ((len(before), features.num_embeds),)
            return Replacement(ids, runs, dict(self.joins))
        found = self._adapter.expanded(features.arrays["input_ids"][0].tolist())
        return Replacement(tuple(found), runs_of(found, place.fill), dict(self.joins))

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """Return None for plain positions, three axes where the model has them, or spans.

        With bidirectional attention the three rows are each token's index, and the first and last
        index of its span: its own twice outside of any.
        """
        if self.axes_of is not None:
            return numbered(self.folder, self.axes_of, token_ids, items)
        if self.bidirectional is None:
            return None
        rows = np.broadcast_to(
            np.arange(len(token_ids), dtype=np.int32), (3, len(token_ids))
        ).copy()
        runs = [run for item in items for run in item.runs]
        for start, length in [(0, len(token_ids))] if self.bidirectional == "prompt" else runs:
            rows[1, start : start + length] = start
            rows[2, start : start + length] = start + length - 1
        return rows, 0

    @property
    def _adapter(self) -> adapter.HfProcessorAdapter:
        return adapter.processor_of(self.folder, self.model_type)

    def _place(self, modality: Modality) -> Place:
        return next(place for place in self.places if place.modality == modality)


def build(architecture: str, loaded: LoadedConfig) -> HfProcessor | None:
    """Build the processor of a checkpoint; None for a text model.

    Raises ConfigError when the processor cannot be built, and UnsupportedModelError when its
    expansion of an item cannot be determined.
    """
    config = read_hf_config(loaded.config)
    shape = text_shape(loaded)  # what its decoder refuses is told first
    if config.get_text_config(decoder=True) is config:
        return None
    own = adapter.processor_of(loaded.folder, config.model_type)
    places = tuple(find_place(own, modality, config) for modality in own.modalities)
    if not places:
        raise UnsupportedModelError(
            f"Models of type {config.model_type!r} cannot run here: their processor takes neither "
            "images nor audio.",
            param="model",
        )
    known = json.dumps([loaded.config, loaded.preprocessor, loaded.processor], sort_keys=True)
    return HfProcessor(
        folder=loaded.folder,
        model_type=config.model_type,
        fingerprint=hashlib.sha256(known.encode()).hexdigest(),
        hidden_size=shape.hidden_size,
        places=places,
        bidirectional=BIDIRECTIONAL.get(config.model_type),
        joins=line_ends(own),
        axes_of=architecture if has_axes(config.get_text_config(decoder=True)) else None,
    )


def find_place(own: adapter.HfProcessorAdapter, modality: Modality, config: Any) -> Place:
    """Try possible placeholders on a small item until the processor expands one.

    Raises UnsupportedModelError with all results when none is.
    """
    fill = fill_id(config, modality)
    reasons = []
    for text in own.placeholders(modality):
        try:
            arrays = own.call(modality, text, probe(modality, own.rate), {})
        except Exception as error:  # whatever a processor raises for a text that it does not expect
            reasons.append(f"{text!r}: {adapter.error_text(error)}")
            continue
        ids = own.expanded(arrays["input_ids"][0].tolist())
        runs = runs_of(ids, fill)
        if not runs:
            reasons.append(f"{text!r}: no token {fill} came of it")
            continue
        whole = own.ids_of(text)
        around = None
        if len(runs) == 1:
            (start, length) = runs[0]
            around = (tuple(ids[:start]), tuple(ids[start + length :]))
        found = whole if len(whole) == 1 or own.keeps_ids else marked(modality)
        return Place(modality, text, found, fill, around)
    raise UnsupportedModelError(
        f"Models of type {config.model_type!r} cannot run here: what their processor makes of one "
        f"{modality} could not be found out. Tried were "
        f"{'; '.join(reasons) or 'no placeholders: it names none'}.",
        param="model",
    )


def marked(modality: Modality) -> tuple[int, ...]:
    """Return the marker of a placeholder that is not a single token and is cut out of the text."""
    return (marker(modality),)


def line_ends(own: adapter.HfProcessorAdapter) -> tuple[tuple[tuple[int, int], int], ...]:
    """Return the runs of newline tokens that some tokenizers merge into one token."""
    tokens = {num: own.ids_of("\n" * num) for num in range(1, MAX_LINE_ENDS + 1)}
    known = {num: ids[0] for num, ids in tokens.items() if len(ids) == 1}
    return tuple(
        ((known[first], known[second]), known[first + second])
        for first in known
        for second in known
        if first + second in known
    )


def fill_id(config: Any, modality: Modality) -> int:
    """Return the token at the places of embeddings, from the model's configuration.

    Raises ConfigError without one.
    """
    for name in (f"{modality}_token_id", f"{modality}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise ConfigError(
        f"config.json: no {modality}_token_id or {modality}_token_index says where embeddings go.",
        param="model",
    )


def runs_of(ids: Sequence[int], fill: int) -> tuple[tuple[int, int], ...]:
    """Return (start, length) of each run of ``fill``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(ids) == fill, [0]))))
    return tuple((int(a), int(b - a)) for a, b in edges.reshape(-1, 2))


def checked(data: Decoded) -> np.ndarray:
    """Return an image (H, W, 3) uint8, or samples (N,) float32.

    Raises InvalidRequestError for an aspect ratio that would make an image of gigabytes in
    processors that fix the shorter edge.
    """
    if isinstance(data, Audio):
        return data.samples
    image = check_image(data)
    height, width = image.shape[:2]
    check_aspect(height, width, "An image")
    return image


def probe_item(processor: HfProcessor, modality: Modality) -> Decoded:
    """Return a small item in the form that ``process`` takes."""
    rate = processor.decoding(modality, {}) or 0
    data = probe(modality, rate)
    return Audio(data, rate) if modality == "audio" else data


def probe(modality: Modality, rate: int) -> np.ndarray:
    """Return a small item to try a processor with."""
    if modality == "audio":
        wave = np.sin(np.arange(int(PROBE_SECONDS * rate), dtype=np.float32) * 0.05)
        quiet: np.ndarray = wave.astype(np.float32) * np.float32(0.5)
        return quiet
    rows, columns = PROBE_IMAGE
    ramp = np.linspace(0, 255, rows * columns * 3).reshape(rows, columns, 3)
    return ramp.astype(np.uint8)
