"""Construction and calls of the processor classes of transformers, without torchvision."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sensorium.errors import ConfigError
from sensorium.multimodal.items import Modality

Arrays = dict[str, np.ndarray]
_TEXTS = {
    "image": ("<image>", "<start_of_image>", "<IMG_CONTEXT>", "[IMG]", "<|image|>"),
    "audio": ("<audio>", "<|AUDIO|>", "[AUDIO]", "<|audio|>"),
}
"""Placeholders to try besides those that the processor names."""
_SETTINGS_OF_CALLS = frozenset(
    {
        *("return_tensors", "device", "data_format", "input_data_format", "disable_grouping"),
        *("padding", "sampling_rate", "return_attention_mask"),
    }
)
"""Options that requests may not set: they change the form of the result, not its content."""
_OF_THE_WEIGHTS = frozenset(
    {
        *("patch_size", "merge_size", "temporal_patch_size", "image_seq_length"),
        *("crop_size", "pad_size", "max_image_size"),
    }
)
"""Options that must stay as the weights were trained: others make a million patches of an image."""
MOST_OF_OPEN = 256
"""The largest number that a caller may set where the checkpoint sets none."""


_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class _NoVideos:
    """Stand-in for the video processor of transformers, which needs torchvision."""

    model_input_names: tuple[str, ...] = ()
    valid_kwargs = None


class HfProcessorAdapter:
    """A processor of transformers.

    It cannot be pickled: ``processor_of`` makes it once in each process.
    """

    keeps_ids = False
    """If true, placeholders of several tokens stay as they are and are not cut out of the text."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self._lock = threading.Lock()  # tokenizers change their settings while they are called
        self._specials: list[int] = own.tokenizer("")["input_ids"]

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Return the modalities that it has processors for."""
        has_images = getattr(self.own, "image_processor", None) is not None
        return (*(("image",) if has_images else ()), *(("audio",) if self._audio_part else ()))

    @property
    def rate(self) -> int:
        """Samples per second of audio; 0 when it takes none."""
        return int(self._audio_part.sampling_rate) if self._audio_part else 0

    @property
    def _audio_part(self) -> Any:
        own = self.own
        return getattr(own, "feature_extractor", None) or getattr(own, "audio_processor", None)

    def options(self, modality: Modality) -> list[str]:
        """Return the names of the options of its part for a modality."""
        part = self.own.image_processor if modality == "image" else self._audio_part
        known = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
        return sorted(set(known) - _SETTINGS_OF_CALLS - _OF_THE_WEIGHTS)

    def most(self, modality: Modality, name: str) -> float:
        """Return the largest number that a caller may set in an option.

        That is the checkpoint's own largest number there.
        """
        part = self.own.image_processor if modality == "image" else self._audio_part
        return max(numbers_in(getattr(part, name, None)), default=MOST_OF_OPEN)

    def placeholders(self, modality: Modality) -> list[str]:
        """Return texts that may be the placeholder, the likeliest first."""
        names = [f"{modality}_token", "boi_token" if modality == "image" else "boa_token"]
        texts = [
            getattr(part, name, None) for part in (self.own, self.own.tokenizer) for name in names
        ]
        found = [getattr(text, "content", text) for text in texts if text]
        return list(dict.fromkeys((*map(str, found), *_TEXTS[modality])))

    def ids_of(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text without special tokens around it."""
        return tuple(self.own.tokenizer(text, add_special_tokens=False)["input_ids"])

    def call(
        self, modality: Modality, text: str, data: np.ndarray, options: Mapping[str, Any]
    ) -> Arrays:
        """Return the processor's result for a text with one placeholder, and one item.

        data: an image (H, W, 3) or samples (N,). The result has ``input_ids`` (1, n).
        """
        if modality == "image":
            from PIL import Image

            media: dict[str, Any] = {"images": [Image.fromarray(data)]}
        else:
            media = {"audio": [data], "sampling_rate": self.rate}
        with self._lock:
            return as_arrays(self.own(text=[text], return_tensors="pt", **media, **options))

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """Return the ids without the special tokens that the tokenizer puts around a text."""
        specials, num_front = self._specials, 0
        while num_front < min(len(specials), len(ids)) and ids[num_front] == specials[num_front]:
            num_front += 1
        num_back = len(specials) - num_front
        if num_back and list(ids[-num_back:]) != specials[num_front:]:
            num_back = 0
        return list(ids[num_front : len(ids) - num_back])


class PaliGemmaAdapter(HfProcessorAdapter):
    """Processor of PaliGemma, which puts the BOS behind the image and a newline behind the text.

    So the placeholder is the image token behind the BOS of the tokenizer, and the BOS moves when it
    is expanded. The newline belongs to the prompt. One image per prompt.
    """

    keeps_ids = True

    def ids_of(self, text: str) -> tuple[int, ...]:
        """Return the ids of a placeholder behind the BOS, or of any other text alone."""
        ids = super().ids_of(text)
        is_image = text == getattr(self.own, "image_token", None)
        return (int(self.own.tokenizer.bos_token_id), *ids) if is_image else ids

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """Return image tokens and BOS, without the newline."""
        bos = int(self.own.tokenizer.bos_token_id)
        return list(ids[: list(ids).index(bos) + 1])


class VoxtralAdapter(HfProcessorAdapter):
    """Processor of Voxtral, whose own class needs a tokenizer that is not of transformers.

    An audio item is padded to a multiple of ``_SECONDS``; each such part becomes a row of mel
    frames and the same number of audio tokens.
    """

    keeps_ids = True
    _SECONDS = 30

    def __init__(self, folder: str) -> None:
        from types import SimpleNamespace

        from transformers import AutoConfig

        parts = {name: _part(name, folder) for name in ("tokenizer", "feature_extractor")}
        super().__init__(SimpleNamespace(**parts))
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
        audio = config.audio_config
        self._fill = int(config.audio_token_id)
        self._per_row = audio.max_source_positions * audio.hidden_size // audio.intermediate_size

    def placeholders(self, modality: Modality) -> list[str]:
        """Return the audio token, whatever its text is.

        It is behind the token that begins an audio item, where there is one.
        """
        tokenizer = self.own.tokenizer
        audio = str(tokenizer.convert_ids_to_tokens(self._fill))
        begin = ("[BEGIN_AUDIO]",) if "[BEGIN_AUDIO]" in tokenizer.get_vocab() else ()
        return ["".join((*begin, audio))]

    def call(
        self, modality: Modality, text: str, data: np.ndarray, options: Mapping[str, Any]
    ) -> Arrays:
        """Return ``input_features`` (rows, mel bins, frames) and ``input_ids`` (1, n)."""
        extractor = self.own.feature_extractor
        frames = extractor(
            data,
            sampling_rate=self.rate,
            padding=True,
            truncation=False,
            pad_to_multiple_of=self._SECONDS * self.rate,
            return_tensors="np",
        )["input_features"][0]
        width = self._SECONDS * self.rate // extractor.hop_length
        rows = frames.reshape(frames.shape[0], -1, width).transpose(1, 0, 2)
        ids: list[int] = []
        for token in self.own.tokenizer(text)["input_ids"]:
            ids += [token] * (len(rows) * self._per_row if token == self._fill else 1)
        features = np.ascontiguousarray(rows, dtype=np.float32)
        return {"input_features": features, "input_ids": np.array([ids])}


@functools.lru_cache(maxsize=4)
def processor_of(folder: str, model_type: str) -> HfProcessorAdapter:
    """Build the processor of a checkpoint, its parts loaded one by one.

    Raises ConfigError when it cannot be built.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = _declared(folder) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ConfigError(
            f"transformers names no processor for model_type {model_type!r}.", param="model"
        )
    try:
        if name == "VoxtralProcessor":
            return VoxtralAdapter(folder)
        kind = PaliGemmaAdapter if name == "PaliGemmaProcessor" else HfProcessorAdapter
        return kind(_build(_class(str(name)), folder))
    except Exception as error:
        raise ConfigError(
            f"The model's processor ({name}) cannot be built: {error_text(error, folder)}",
            param="model",
        ) from error


def as_arrays(made: Mapping[str, Any]) -> Arrays:
    """Convert tensors and lists to numpy arrays.

    Other values, and those meant for training, are left out.
    """
    found: Arrays = {}
    for name, value in made.items():
        if name == "labels":
            continue
        if hasattr(value, "detach"):
            found[name] = np.ascontiguousarray(value.detach().cpu().numpy())
        elif isinstance(value, list | tuple | np.ndarray):
            found[name] = np.ascontiguousarray(value)
    return found


def numbers_in(value: Any) -> list[float]:
    """Return all numbers of an option's value at any depth; booleans are none."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [value]
    if isinstance(value, Mapping):
        return [number for member in value.values() for number in numbers_in(member)]
    if isinstance(value, list | tuple):
        return [number for member in value for number in numbers_in(member)]
    # Sizes of transformers are data classes.
    return numbers_in(vars(value)) if dataclasses.is_dataclass(value) else []


def error_text(error: Exception, folder: str = "") -> str:
    """Return the message of another library's exception in one line.

    Local paths and memory addresses are removed.
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
    if folder:
        text = text.replace(folder, "the model's folder")
    text = re.sub(r"(?<![\w:/.])(/[\w.+-]+){2,}", "a local file", text)
    return f"{type(error).__name__}: {' '.join(text.split())[:400]}"


def _declared(folder: str) -> str | None:
    """Return ``processor_class`` of the checkpoint's files."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        path = Path(folder) / file
        if path.is_file():
            name = json.loads(path.read_text(encoding="utf-8")).get("processor_class")
            if name:
                return str(name)
    return None


def _class(name: str) -> Any:
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    types = [key for key, value in PROCESSOR_MAPPING_NAMES.items() if value == name]
    if not types:
        raise ValueError(f"transformers has no class {name}")
    # From its own module: the package hides what declares to need torchvision, if only for videos.
    homes = dict.fromkeys((name.removesuffix("Processor").lower(), *types))
    for home in map(model_type_to_module_name, homes):
        found = getattr(_module(home), name, None)
        if found is not None:
            break
    else:
        raise ValueError(f"transformers has no class {name}")
    # The check of the arguments' types would refuse the stand-in, and its repr could not write it
    # down.
    changed = {
        "check_argument_for_proper_class": lambda *_: None,
        "__repr__": object.__repr__,
    }
    return type(name, (found,), changed)


def _module(home: str) -> Any:
    """Return the module of a processor class; None when there is none.

    Where it imports a function from the torchvision image processor, it gets the one of the PIL
    image processor, which has the same functions.
    """
    path = f"transformers.models.{home}"
    try:
        return importlib.import_module(f"{path}.processing_{home}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torchvision"):
            return None
    wanted = f"{path}.image_processing_{home}"
    sys.modules[wanted] = importlib.import_module(f"{path}.image_processing_pil_{home}")
    try:
        return importlib.import_module(f"{path}.processing_{home}")
    finally:
        del sys.modules[wanted]


def _build(kind: Any, folder: str) -> Any:
    values, _ = kind.get_processor_dict(folder, local_files_only=True)
    parts = [_part(name, folder) for name in kind.get_attributes()]
    return kind.from_args_and_dict(parts, values)


def _part(name: str, folder: str) -> Any:
    import transformers

    if "tokenizer" in name:
        return transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
    if "image_processor" in name:
        # The same numbers whether torchvision is installed or not.
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    if "video_processor" in name:
        return _NoVideos()
    return transformers.AutoFeatureExtractor.from_pretrained(folder, **_LOCAL)
